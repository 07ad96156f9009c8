"""Checkpoints with seeded random weights, for tests and for measuring speed."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

from samekit.engine.spec import RANDOM
from samekit.errors import CheckpointError
from samekit_export.config import parse_config
from samekit_export.digest import checkpoint_digest
from samekit_export.tensors import Checkpoint, derived_tensors, tensor_shapes

RANDOM_MODELS = ("same-s", "same-l", "tiny-s", "tiny-l")
"""The models that can have random weights."""


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


def random_checkpoint(name: str, seed: int = 0) -> Checkpoint:
    """Return a checkpoint with random weights; the golden outputs in `tests/golden` are those of seed 0.

    Every tensor is a function of its key, its shape and `seed`, through NumPy's frozen `RandomState` stream. So the
    same call gives the same model on every machine.
    """
    import torch  # slow, and not needed to look up names of models

    config, _ = parse_config(published_config(name))
    tensors = {**derived_tensors(config), "bottleneck.running_std": torch.from_numpy(np.array([1.25], np.float32))}
    for key, shape in tensor_shapes(config).items():
        if key not in tensors:
            mean, std = _random_scale(key, shape)
            generator = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
            tensors[key] = torch.from_numpy((mean + std * generator.standard_normal(shape)).astype(np.float32))
    source = {"kind": RANDOM, "name": name, "seed": seed}
    return Checkpoint(name, config, tensors, source, checkpoint_digest(config, tensors))
