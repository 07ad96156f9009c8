"""The identity of a model: one SHA-256 of its configuration and its tensors.

Engines, manifests and latents files record this digest, so it must not change when code is renamed or extended. See
`samekit.engine.digest.canonical_json` for the rules.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from samekit.engine.digest import canonical_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


def checkpoint_digest(config: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a configuration and of tensors, in hexadecimal digits.

    A header of canonical JSON holds the configuration and each tensor's dtype and shape. The values follow in the
    order of the tensors' names: C order, little-endian, nothing between them.

    Args:
        config: a dataclass of plain values and other such dataclasses.
        tensors: on the CPU, of dtypes that NumPy has.
    """
    arrays = {name: tensors[name].numpy() for name in sorted(tensors)}
    kinds = {name: [array.dtype.name, array.shape] for name, array in arrays.items()}
    digest = hashlib.sha256(canonical_json({"configuration": config, "tensors": kinds}))
    for array in arrays.values():
        # This copies nothing of arrays that are little-endian and in C order already.
        values = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        digest.update(values.reshape(-1).view("uint8").data)
    return digest.hexdigest()
