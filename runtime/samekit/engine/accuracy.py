"""The measure of accuracy of graphs and engines: example inputs, the signal-to-noise ratio, and its floors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit.engine.spec import ENCODER

if TYPE_CHECKING:
    from samekit.arrays import Array
    from samekit.engine.spec import Direction, EngineSpec

# Float32 graphs reach 104 to 130 dB, published float16 ports 46 dB with trained weights. An SNR below these floors
# indicates a fault. `int8.quantize_` reaches 38 dB on examples of eight latents, and other lengths have other ranges.
# Graphs in which every weight is rounded to the nearest step reach 30 dB.
FLOOR_DB: Final = {"fp32": 90.0, "fp16": 40.0, "int8": 32.0}
"""Precision -> least signal-to-noise ratio of a graph or an engine, in dB."""


def snr_db(reference: Array, output: Array) -> float:
    """Return the signal-to-noise ratio in dB: 20 log10(|reference| / |output - reference|)."""
    error = float(np.linalg.norm(output.astype(np.float64) - reference))
    signal = float(np.linalg.norm(reference.astype(np.float64)))
    if error == 0:
        return math.inf
    return 20 * math.log10(signal / error) if signal else -math.inf


def example_input(spec: EngineSpec, direction: Direction, batch: int, latents: int, seed: int) -> Array:
    """Return noise of a usual level: audio at -14 dBFS, or latents of unit variance."""
    noise = np.random.default_rng(seed)
    if direction == ENCODER:
        return noise.standard_normal((batch, spec.channels, spec.samples(latents)), np.float32) * np.float32(0.2)
    return noise.standard_normal((batch, spec.latent_width, latents), np.float32)
