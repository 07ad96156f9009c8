"""Checkpoints with seeded random weights, for tests and for measuring speed."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit.engine.spec import RANDOM
from samekit.errors import CheckpointError
from samekit_export.config import parse_config
from samekit_export.digest import checkpoint_digest
from samekit_export.tensors import Checkpoint, derived_tensors, is_derived, tensor_shapes

if TYPE_CHECKING:
    from samekit.arrays import Array
    from samekit_export.config import SameConfig

RANDOM_MODELS = ("same-s", "same-l", "tiny-s", "tiny-l")
"""The models that can have random weights."""

PLAIN, TRAINED_LIKE = 1, 2
"""Versions of random weights. The golden outputs in `tests/golden` are those of `PLAIN` and seed 0."""


def published_config(name: str) -> dict[str, Any]:
    """Return the published `model_config.json` of a model, in the standalone nesting.

    `same-s` is the published file of SAME-S. The file of SAME-L is not available here; `same-l` has the fields that the
    full checkpoint `stable-audio-3-medium` publishes for it. `tiny-s` and `tiny-l` have 2 M parameters and the same
    architectures.
    """
    if name not in RANDOM_MODELS:
        raise CheckpointError(f"no random weights for {name!r}; choose same-s, same-l, tiny-s or tiny-l")
    small, tiny = name.endswith("s"), name.startswith("tiny")
    latent, depth = (32, 4) if tiny else (256, 6 if small else 12)
    trunk: dict[str, Any] = {
        "channels": 32 if tiny else (128 if small else 256),
        "c_mults": [4 if tiny else 6],
        "strides": [16],
        "latent_dim": latent,
        "transformer_depths": [depth],
        "differential": True,
        "dim_heads": 64,
        "variable_stride": True,
    }
    if small:
        block_type = "same"
        trunk |= {"checkpointing": False, "dyt": True, "chunk_size": 32, "chunk_midpoint_shift": True}
        encoder: dict[str, Any] = {"mask_noise": 0.0}
        decoder: dict[str, Any] = {"sinusoidal_blocks": [0], "conv_mapping": True, "mask_noise": 0.01}
    else:
        block_type = "taae_v2"
        trunk |= {"conformer": False, "layer_scale": False, "conv_bias": False, "enable_inner_layer_dropout": False}
        trunk |= {"mapping_style": "none", "sliding_window": [1, 1], "use_dilated_conv": False, "use_flash": True}
        trunk |= {"use_snake": False}
        encoder = {"checkpointing": True, "mask_noise": 0.001}
        decoder = {"checkpointing": False, "sinusoidal_blocks": [3 if tiny else 8], "mask_noise": 0.1}
    block = {"type": block_type, "requires_grad": False}
    bottleneck = {"dim": latent, "noise_augment_dim": 0, "noise_regularize": True, "auto_scale": True, "freeze": True}
    return {
        "model_type": "autoencoder",
        "sample_size": 24576,
        "sample_rate": 44100,
        "audio_channels": 2,
        "model": {
            "pretransform": {"type": "patched", "config": {"patch_size": 256, "channels": 2}},
            "encoder": block | {"config": {"in_channels": 512, **trunk, **encoder}},
            "decoder": block | {"config": {"out_channels": 512, **trunk, **decoder}},
            "bottleneck": {"type": "softnorm", "config": bottleneck},
            "latent_dim": latent,
            "downsampling_ratio": 4096,
            "io_channels": 2,
        },
    }


def _random_scale(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return a mean and standard deviation: activations get a trained model's range, and every tensor has an effect."""
    field = key.rsplit(".", 1)[-1]
    if field == "alpha":
        alpha = 2.0 if ("q_norm" in key or "k_norm" in key) else 1.5
        return alpha, 0.1 * alpha
    if field in ("gamma", "weight_g", "scaling_factor"):
        return 1.0, 0.1
    if field in ("beta", "bias"):
        return 0.0, 0.1
    if field == "new_tokens":
        return 0.0, 0.5
    if field == "weight_v":
        return 0.0, 1.0
    branch_end = key.endswith(("to_out.weight", "ff.ff.2.weight"))
    return 0.0, (0.7 if branch_end else 1.0) / math.sqrt(shape[-1])


@dataclass(frozen=True)
class TrainedLike:
    """How weights of the version `TRAINED_LIKE` differ from plain ones.

    With these values, lower precision without further measures is as accurate as published for the trained weights
    (latents): SAME-S 36 dB in bfloat16 and 24 dB in int8, SAME-L 46 dB in float16 and 30 dB in int8. See
    `benchmarks/naive_tiers.py`.
    """

    offset: float
    """Constant value of a few features of the residual stream, for a width of 768. Rounding the stream to 16 bits loses
    small differences of large values. The output does not depend on the constants."""
    inner_spread: float
    """Standard deviation of the logarithm of the size of inner activations of the feed-forward."""
    norm_spread: float
    """The same of the gammas of the norms before the products."""
    sine_gate: float
    """Factor of the gates whose activation is a sine. Plain ones amplify errors."""


_TRAINED_LIKE = {
    "chunk": TrainedLike(offset=14.0, inner_spread=1.0, norm_spread=1.0, sine_gate=1.0),
    "band": TrainedLike(offset=36.0, inner_spread=0.3, norm_spread=0.2, sine_gate=0.35),
}
"""By `Span.kind`: SAME-S has chunks, SAME-L has bands."""
# Columns that read inner activations shrink by this power of their size, as if training had made up for a part of it.
_COMPENSATION = 0.3
_OFFSET_FEATURES = 8
# Makes the residual stream as large as that of trained weights, in the hundreds and thousands. A power of two, so the
# float32 function does not change.
_STREAM_SIZE = 64.0


def _normal(key: str, seed: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    generator = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    return generator.standard_normal(shape)


def _make_trained_like_(arrays: dict[str, Array], config: SameConfig, seed: int) -> None:
    """Turn plain random weights into those of the version `TRAINED_LIKE`, in place.

    Factors are computed in float64 and then rounded, so that they are the same on every machine.
    """
    for trunk, prefix, start, end in (
        (config.encoder, "encoder.layers.0", "encoder.layers.0.mapping", "encoder.layers.2"),
        (config.decoder, "decoder.layers.3", "decoder.layers.1", "decoder.layers.3.mapping"),
    ):
        like = _TRAINED_LIKE[trunk.span.kind]
        for i in range(trunk.depth):
            sine_gate = like.sine_gate if trunk.gates_with_sine(i) else 1.0
            _make_block_trained_like_(arrays, f"{prefix}.transformers.{i}", like, sine_gate, seed)
        which = slice(None, None, trunk.width // _OFFSET_FEATURES)
        offset = np.zeros(trunk.width, np.float32)
        offset[which] = like.offset * (trunk.width / 768) ** 0.5
        offset *= np.sign(_normal(f"{prefix} offset", seed, offset.shape))
        for key in (f"{start}.bias", f"{prefix}.new_tokens"):
            arrays[key] += offset
        # The bias of the end takes the constants back.
        if f"{end}.weight_v" in arrays:
            weight = arrays[f"{end}.weight_v"]
            centre = weight.shape[2] // 2
            # At both ends of the audio, the outer taps read zeros instead of the constants.
            weight[:, which, :centre] = weight[:, which, centre + 1 :] = 0
            length = np.sqrt(np.square(weight, dtype=np.float64).sum(axis=(1, 2)))
            read = weight[:, which, centre] * (arrays[f"{end}.weight_g"][:, 0] / length[:, None])
        else:
            read = arrays[f"{end}.weight"][:, which].astype(np.float64)
        arrays[f"{end}.bias"] -= (read * offset[which]).sum(axis=1).astype(np.float32)
        for name in ("bias", "weight", "weight_g"):
            if f"{start}.{name}" in arrays:
                arrays[f"{start}.{name}"] *= _STREAM_SIZE
            if name != "bias" and f"{end}.{name}" in arrays:
                arrays[f"{end}.{name}"] /= _STREAM_SIZE
        arrays[f"{prefix}.new_tokens"] *= _STREAM_SIZE


def _make_block_trained_like_(
    arrays: dict[str, Array], block: str, like: TrainedLike, sine_gate: float, seed: int
) -> None:
    project, back = f"{block}.ff.ff.0.proj", f"{block}.ff.ff.2"
    inner = arrays[f"{back}.weight"].shape[1]
    size = np.exp(like.inner_spread * _normal(f"{project} size", seed, (inner,)))
    factor = np.concatenate([size, np.full(inner, sine_gate)]).astype(np.float32)
    arrays[f"{project}.weight"] *= factor[:, None]
    arrays[f"{project}.bias"] *= factor
    read = size**-_COMPENSATION
    arrays[f"{back}.weight"] *= (read / np.sqrt(np.square(size * read).mean())).astype(np.float32)
    for name in ("pre_norm", "ff_norm"):
        gamma = arrays[f"{block}.{name}.gamma"]
        size = np.exp(like.norm_spread * _normal(f"{block}.{name} size", seed, gamma.shape))
        gamma *= (size / np.sqrt(np.square(size).mean())).astype(np.float32)
        arrays[f"{block}.{name}.alpha"] /= _STREAM_SIZE
    for key in (f"{block}.self_attn.to_out.weight", f"{back}.weight", f"{back}.bias"):
        arrays[key] *= _STREAM_SIZE


def random_checkpoint(name: str, seed: int = 0, version: int = PLAIN) -> Checkpoint:
    """Return a checkpoint with random weights.

    Every tensor is a function of its key, its shape, `seed` and `version`, through NumPy's frozen `RandomState` stream.
    So the same call gives the same model on every machine.

    Args:
        name: one of `RANDOM_MODELS`.
        seed: of the random numbers.
        version: `PLAIN` or `TRAINED_LIKE`.

    Raises:
        CheckpointError: the name or the version is not known.
    """
    if version not in (PLAIN, TRAINED_LIKE):
        raise CheckpointError(f"no random weights of version {version}; update samekit, or export the model again")
    import torch  # slow, and not needed to look up names of models

    config, _ = parse_config(published_config(name))
    arrays: dict[str, Array] = {"bottleneck.running_std": np.array([1.25], np.float32)}
    for key, shape in tensor_shapes(config).items():
        if key not in arrays and not is_derived(key):
            mean, std = _random_scale(key, shape)
            arrays[key] = (mean + std * _normal(key, seed, shape)).astype(np.float32)
    source = {"kind": RANDOM, "name": name, "seed": seed}
    if version == TRAINED_LIKE:
        _make_trained_like_(arrays, config, seed)
        source["version"] = version
    tensors = {**derived_tensors(config), **{key: torch.from_numpy(array) for key, array in arrays.items()}}
    return Checkpoint(name, config, tensors, source, checkpoint_digest(config, tensors))
