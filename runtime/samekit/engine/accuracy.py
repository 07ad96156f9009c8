"""The measure of accuracy of graphs and engines: example inputs, the signal-to-noise ratio, and its floors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit.engine.spec import ENCODER, INT8_TARGET_DB

if TYPE_CHECKING:
    from samekit.arrays import Array
    from samekit.engine.spec import Direction, EngineSpec

INT8_MARGIN_DB: Final = 3.0
"""An int8 graph may be this much less accurate than its target. It reaches the target on examples of eight latents, and
activation ranges depend on the input."""

# Float32 graphs reach 104 to 130 dB, published float16 ports 46 dB with trained weights. An SNR below these floors
# indicates a fault.
FLOOR_DB: Final = {"fp32": 90.0, "fp16": 40.0, "int8": INT8_TARGET_DB - INT8_MARGIN_DB}
"""Precision -> least signal-to-noise ratio of a graph or an engine, in dB; for int8, with the default target."""


def floor_db(spec: EngineSpec, precision: str) -> float:
    """Return the least signal-to-noise ratio of an engine's graphs in dB."""
    return spec.int8_target_db - INT8_MARGIN_DB if precision == "int8" else FLOOR_DB[precision]


def snr_db(reference: Array, output: Array) -> float:
    """Return the signal-to-noise ratio in dB: 20 log10(|reference| / |output - reference|)."""
    error = float(np.linalg.norm(output.astype(np.float64) - reference))
    signal = float(np.linalg.norm(reference.astype(np.float64)))
    if error == 0:
        return math.inf
    return 20 * math.log10(signal / error) if signal else -math.inf


def example_input(spec: EngineSpec, direction: Direction, batch: int, latents: int, seed: int) -> Array:
    """Return noise of a usual level: audio at -14 dBFS, or latents of unit variance.

    A shorter example is the start of a longer one with the same seed, and a smaller batch is the start of a larger one.
    """
    features, unit = spec.layout(direction)
    rows = [
        np.random.default_rng((seed, row)).standard_normal((latents * unit, features), np.float32)
        for row in range(batch)
    ]
    level = np.float32(0.2 if direction == ENCODER else 1)
    return np.ascontiguousarray(np.stack(rows).transpose(0, 2, 1)) * level
