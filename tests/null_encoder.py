"""A backend that costs almost nothing, to test and to measure what happens before and after the encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from samekit.backends.base import Backend
from samekit.engine.spec import DECODER, ENCODER, Direction, EngineSpec, opposite

if TYPE_CHECKING:
    from samekit.arrays import Array

SPEC = EngineSpec(
    name="null",
    sample_rate=44_100,
    channels=2,
    hop=4096,
    latent_width=256,
    alignment=2,
    contexts={ENCODER: 1, DECODER: 2},
    source={},
    source_sha256="0",
)
"""The sizes of SAME-S."""


class NullEncoder(Backend):
    """Returns zeros in the shape of the output."""

    name = "null"

    def __init__(self) -> None:
        super().__init__(SPEC, "fp32")

    def _run(self, direction: Direction, array: Array) -> Array:
        """Run nothing."""
        latents = array.shape[2] // self.spec.layout(direction)[1]
        return np.zeros(self.spec.input_shape(opposite(direction), array.shape[0], latents), np.float32)
