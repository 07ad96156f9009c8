"""The canonical JSON of settings and configurations, from which digests are computed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Return the JSON text from which digests are computed: sorted keys, no spaces, ASCII.

    A dataclass becomes an object of its fields, whatever its class is called. Fields at their default are left out, so
    a new field whose default has the old meaning changes no digest. A class that is one of several kinds has a class
    attribute `kind`, which is added to the fields.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _plain(value: Any) -> Any:
    """Replace dataclasses by dictionaries."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {}
    for field in dataclasses.fields(value):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        # `dataclasses.MISSING`, the default of a field that has none, equals no value.
        if getattr(value, field.name) != default:
            fields[field.name] = _plain(getattr(value, field.name))
    kind = getattr(value, "kind", None)
    return fields if kind is None else {"kind": kind, **fields}
