"""The tensors of a SAME checkpoint: names and shapes, and those that follow from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samekit.errors import CheckpointError
from samekit_export.config import rotary_frequencies

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from samekit_export.config import SameConfig, TrunkConfig


# ---------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: what it is, what it holds, where it came from."""

    name: str
    """What users call the model."""
    config: SameConfig
    """Every number that decides the architecture."""
    tensors: dict[str, torch.Tensor]
    """Float32, under the bare published keys; exactly the autoencoder's."""
    source: dict[str, Any]
    """Where it was read, as `load_source` takes it."""
    sha256: str
    """Digest of the configuration and of every tensor, see `samekit_export.digest`."""


def tensor_shapes(config: SameConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the autoencoder: published key -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    enc, dec, latent = config.encoder, config.decoder, config.latent_width

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

    def trunk(prefix: str, t: TrunkConfig) -> None:
        shapes[f"{prefix}.new_tokens"] = (1, 1, t.width)
        for i in range(t.depth):
            block = f"{prefix}.transformers.{i}"
            norm(f"{block}.pre_norm", t.width)
            norm(f"{block}.ff_norm", t.width)
            norm(f"{block}.self_attn.q_norm", t.head_width)
            norm(f"{block}.self_attn.k_norm", t.head_width)
            shapes[f"{block}.self_attn.to_qkv.weight"] = (5 * t.width, t.width)
            shapes[f"{block}.self_attn.to_out.weight"] = (t.width, t.width)
            linear(f"{block}.ff.ff.0.proj", 2 * t.inner, t.width)
            linear(f"{block}.ff.ff.2", t.width, t.inner)
            shapes[f"{block}.rope.inv_freq"] = (max(t.head_width // 2, 32) // 2,)

    mapping("encoder.layers.0.mapping", enc.width, config.patch_width, enc.mapping_kernel)
    trunk("encoder.layers.0", enc)
    linear("encoder.layers.2", latent, enc.width)
    linear("decoder.layers.1", dec.width, latent)
    trunk("decoder.layers.3", dec)
    mapping("decoder.layers.3.mapping", config.patch_width, dec.width, dec.mapping_kernel)
    shapes["bottleneck.scaling_factor"] = shapes["bottleneck.bias"] = (1, latent, 1)
    shapes["bottleneck.running_std"] = (1,)
    shapes["bottleneck.noise_scaling_factor"] = (1, 0, 1)
    return shapes


def check_shapes(found: Mapping[str, tuple[int, ...]], config: SameConfig, source: str) -> None:
    """Refuse a missing, extra or misshaped tensor by its name."""
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


def derived_tensors(config: SameConfig) -> dict[str, torch.Tensor]:
    """The tensors that follow from the configuration; a checkpoint may lack them."""
    import torch  # noqa: PLC0415

    return {
        key: torch.as_tensor(rotary_frequencies(2 * shape[0]), dtype=torch.float32)
        if key.endswith(_FREQUENCIES)
        else torch.zeros(shape)
        for key, shape in tensor_shapes(config).items()
        if is_derived(key)
    }


_FREQUENCIES = "rope.inv_freq"


def is_derived(key: str) -> bool:
    """Whether a tensor follows from the configuration; a checkpoint may lack it."""
    return key.endswith((_FREQUENCIES, "bottleneck.noise_scaling_factor"))


def check_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse tensors that hold NaN or infinity."""
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{source}: tensor {key} holds NaN or infinity; download the checkpoint again")
