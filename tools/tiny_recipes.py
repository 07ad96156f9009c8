"""The small models that `train_tiny.py` trains: their configurations, and the sizes of their trainings.

`same-tiny` comes with samekit. `same-tiny-band` is for tests. It has the attention and the gates of SAME-L, and it is
trained with the noise that SAME-L was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from samekit_export.random_weights import published_config


def model_config(published: str, width: int, blocks: tuple[int, int]) -> dict[str, Any]:
    """Return a `model_config.json`: two patches of 192 samples a latent, 64 features, 12 times fewer numbers.

    Args:
        published: the seeded model from which other fields are taken.
        width: features of a token.
        blocks: of the encoder and the decoder.
    """
    config = published_config(published)
    patch, stride, latent = 192, 2, 64
    model = config["model"]
    model["pretransform"]["config"]["patch_size"] = patch
    for direction, ends, depth in zip(("encoder", "decoder"), ("in_channels", "out_channels"), blocks, strict=True):
        trunk = {"channels": width, "c_mults": [1], "strides": [stride], "latent_dim": latent}
        model[direction]["config"] |= trunk | {ends: 2 * patch, "transformer_depths": [depth]}
    model["bottleneck"]["config"] |= {"dim": latent}
    model |= {"latent_dim": latent, "downsampling_ratio": patch * stride}
    return config


def _same_tiny() -> dict[str, Any]:
    config = model_config("tiny-s", 192, (2, 4))
    for direction in ("encoder", "decoder"):
        config["model"][direction]["config"] |= {"chunk_size": 16, "mask_noise": 0.0}
    config["model"]["bottleneck"]["config"]["noise_regularize"] = False
    return config


def _same_tiny_band() -> dict[str, Any]:
    config = model_config("tiny-l", 128, (2, 5))
    # As in SAME-L, the blocks after the first five twelfths have sine gates.
    # SAME-L has ten times more noise on learned tokens, but its residual stream is larger still.
    config["model"]["decoder"]["config"] |= {"sinusoidal_blocks": [4], "mask_noise": 0.01}
    return config


@dataclass(frozen=True)
class Recipe:
    """A model and the size of its training."""

    config: dict[str, Any]
    """Its `model_config.json`. Training adds the noise that it describes."""
    steps: int
    """Steps of the optimizer."""
    pool_clips: int = 320
    """Clips from which crops are drawn."""
    pool_seconds: float = 8.0
    """Length of each clip."""
    pool_steps: int = 1500
    """Steps after which all clips are replaced."""
    held_out_clips: int = 32
    """Clips of the curve."""
    held_out_seconds: float = 4.0
    """Length of each of them."""
    crop_latents: int = 64
    """Length of a crop."""
    batch: int = 8
    """Crops of a step."""
    every: int = 250
    """Steps between two checkpoints."""


RECIPES = {
    "same-tiny": Recipe(_same_tiny(), steps=3000),
    "same-tiny-band": Recipe(_same_tiny_band(), steps=1800, pool_clips=200, held_out_clips=8, batch=4, every=150),
}
"""With these values, the checkpoints and their curves were made."""
