"""Digests: the JSON text of settings and configurations from which they are taken."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Return the JSON text of a value from which digests are taken: sorted keys, no spaces, ASCII.

    A dataclass counts as an object of its fields, whatever its class is called. Fields at their default are left out,
    so that a new field whose default has the old meaning changes no digest. A class that stands for one of several
    kinds has a class attribute `kind`, which is counted with the fields.

    Args:
        value: JSON values and dataclasses of them.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _plain(value: Any) -> Any:
    """Return a value with dictionaries in place of dataclasses."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {
        field.name: _plain(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != _default(field)
    }
    kind = getattr(value, "kind", None)
    return fields if kind is None else {"kind": kind, **fields}


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; `dataclasses.MISSING`, which equals no value, if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
