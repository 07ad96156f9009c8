"""The identity of a model: one SHA-256 of its configuration and its tensors.

Engines, manifests and latents files record this digest, so it must not change when code is renamed or extended:

* a configuration counts as plain data, as canonical JSON: field names and values, but no names of classes;
* a field at its default value is left out, so a new field whose default has the old meaning changes no digest;
* a class that stands for one of several kinds has a class attribute `kind`, which is counted with its fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


def checkpoint_digest(config: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a configuration and of tensors, in hexadecimal digits.

    A header of canonical JSON (sorted keys, no spaces, ASCII) holds the configuration and each tensor's dtype and
    shape. The values follow in the order of the tensors' names: C order, little-endian, nothing between them.

    Args:
        config: a dataclass of plain values and other such dataclasses.
        tensors: on the CPU, of dtypes that NumPy has.
    """
    arrays = {name: tensors[name].numpy() for name in sorted(tensors)}
    layout = {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()}
    header = {"configuration": _plain(config), "tensors": layout}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii"))
    for array in arrays.values():
        # No copy is made of what is little-endian and in C order, as tensors of a file are.
        values = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        digest.update(values.reshape(-1).view("uint8").data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Return a dataclass as a dictionary of what is not at its default; anything else unchanged."""
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
