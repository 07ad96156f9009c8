"""The tensors of a SAME checkpoint: their names and shapes, and the values that follow from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit.errors import CheckpointError
from samekit_export.config import rotary_frequencies

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from samekit_export.config import SameConfig, TrunkConfig

_FREQUENCIES = "rope.inv_freq"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    name: str
    """What users call the model."""
    config: SameConfig
    """The architecture."""
    tensors: dict[str, torch.Tensor]
    """Exactly the autoencoder's tensors: float32, under the published keys without a prefix."""
    source: dict[str, Any]
    """Where it was read, as `load_source` takes it."""
    sha256: str
    """Digest of the configuration and of every tensor, see `samekit_export.digest`."""


def tensor_shapes(config: SameConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the autoencoder: published key -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    encoder, decoder, latent = config.encoder, config.decoder, config.latent_width

    def norm(prefix: str, width: int) -> None:
        shapes[f"{prefix}.alpha"] = (1,)
        shapes[f"{prefix}.gamma"] = shapes[f"{prefix}.beta"] = (width,)

    def linear(prefix: str, n_out: int, n_in: int) -> None:
        shapes[f"{prefix}.weight"] = (n_out, n_in)
        shapes[f"{prefix}.bias"] = (n_out,)

    def mapping(prefix: str, n_out: int, n_in: int, kernel: int) -> None:
        shapes[f"{prefix}.weight_v"] = (n_out, n_in, kernel)
        shapes[f"{prefix}.weight_g"] = (n_out, 1, 1)
        shapes[f"{prefix}.bias"] = (n_out,)

    def trunk(prefix: str, trunk: TrunkConfig) -> None:
        shapes[f"{prefix}.new_tokens"] = (1, 1, trunk.width)
        for i in range(trunk.depth):
            block = f"{prefix}.transformers.{i}"
            norm(f"{block}.pre_norm", trunk.width)
            norm(f"{block}.ff_norm", trunk.width)
            norm(f"{block}.self_attn.q_norm", trunk.head_width)
            norm(f"{block}.self_attn.k_norm", trunk.head_width)
            shapes[f"{block}.self_attn.to_qkv.weight"] = (5 * trunk.width, trunk.width)
            shapes[f"{block}.self_attn.to_out.weight"] = (trunk.width, trunk.width)
            linear(f"{block}.ff.ff.0.proj", 2 * trunk.inner, trunk.width)
            linear(f"{block}.ff.ff.2", trunk.width, trunk.inner)
            shapes[f"{block}.{_FREQUENCIES}"] = (trunk.rotated // 2,)

    mapping("encoder.layers.0.mapping", encoder.width, config.patch_width, encoder.mapping_kernel)
    trunk("encoder.layers.0", encoder)
    linear("encoder.layers.2", latent, encoder.width)
    linear("decoder.layers.1", decoder.width, latent)
    trunk("decoder.layers.3", decoder)
    mapping("decoder.layers.3.mapping", config.patch_width, decoder.width, decoder.mapping_kernel)
    shapes["bottleneck.scaling_factor"] = shapes["bottleneck.bias"] = (1, latent, 1)
    shapes["bottleneck.running_std"] = (1,)
    shapes["bottleneck.noise_scaling_factor"] = (1, 0, 1)
    return shapes


def check_shapes(found: Mapping[str, tuple[int, ...]], config: SameConfig, source: str) -> None:
    """Raise CheckpointError, with the tensor's name, if one is missing, unexpected or of another shape."""
    expected = tensor_shapes(config)
    for key, shape in expected.items():
        if key not in found:
            raise CheckpointError(f"{source}: tensor {key} {list(shape)} is missing; download the checkpoint again")
        if found[key] != shape:
            raise CheckpointError(
                f"{source}: tensor {key} has shape {list(found[key])}, the configuration asks for {list(shape)}; "
                "take both files of one download"
            )
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise CheckpointError(
            f"{source}: tensor {extra[0][:200]} is not part of a SAME autoencoder ({len(extra)} such), and nothing is "
            "ignored; pass the autoencoder's own checkpoint"
        )


def is_derived(key: str) -> bool:
    """Whether a tensor follows from the configuration; a checkpoint may lack it."""
    return key.endswith((_FREQUENCIES, "bottleneck.noise_scaling_factor"))


def derived_tensors(config: SameConfig) -> dict[str, torch.Tensor]:
    """Return the tensors that follow from the configuration."""
    import torch  # slow, and not needed to look up names of models

    # From NumPy, because the user may have set another default dtype or device in PyTorch.
    return {
        key: torch.from_numpy(
            (rotary_frequencies(2 * shape[0]) if key.endswith(_FREQUENCIES) else np.zeros(shape)).astype(np.float32)
        )
        for key, shape in tensor_shapes(config).items()
        if is_derived(key)
    }


def check_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise CheckpointError, with the tensor's name, if one holds NaN or infinity."""
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{source}: tensor {key} holds NaN or infinity; download the checkpoint again")
