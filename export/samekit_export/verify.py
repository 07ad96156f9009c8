"""Measure exported graphs against eager PyTorch; an export below the least SNR of its precision fails."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit.backends.base import BackendOptions
from samekit.backends.onnxruntime import OnnxRuntimeBackend
from samekit.batches import Autoencoder
from samekit.engine.spec import DIRECTIONS, ENCODER, Direction
from samekit.errors import NonFiniteError, VerificationError
from samekit_export.backend import EagerBackend

if TYPE_CHECKING:
    from samekit.arrays import Array
    from samekit.backends.base import Backend
    from samekit.engine.folder import Engine
    from samekit.engine.spec import EngineSpec
    from samekit_export.model import Same

logger = logging.getLogger(__name__)

# Float32 graphs reach 104 to 130 dB, published float16 ports 46 dB with trained weights. An SNR below these floors
# indicates a fault. `int8.quantize_` reaches 38 dB on examples of eight latents, and other lengths have other ranges.
# Graphs in which every weight is rounded to the nearest step reach 30 dB.
FLOOR_DB = {"fp32": 90.0, "fp16": 40.0, "int8": 32.0}
"""Precision -> least signal-to-noise ratio of an export, in dB."""


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


def verify(engine: Engine, model: Same, precision: str) -> list[dict[str, Any]]:
    """Measure the graphs of a precision in ONNX Runtime on the CPU against eager PyTorch in float32; log each case.

    Args:
        engine: the graphs; the folder may be unfinished.
        model: eager PyTorch with the same weights.
        precision: of the graphs.

    Returns:
        A row for each case: direction, batch, latents, window, snr_db, max_error.

    Raises:
        VerificationError: a case is below the floor of the precision, or not finite.
    """
    rows = []
    with (
        OnnxRuntimeBackend(engine, BackendOptions(precision=precision, device="cpu")) as tested,
        EagerBackend(engine.spec, model, BackendOptions(device="cpu")) as eager,
    ):
        for direction in DIRECTIONS:
            for batch, latents, window in _cases(engine.spec):
                snr, max_error = _compare(tested, eager, direction, batch, latents, window)
                windows = f" in windows of {window}" if window else ""
                logger.info("%s %s: %s x %s latents%s: %.1f dB", precision, direction, batch, latents, windows, snr)
                if not snr >= FLOOR_DB[precision]:
                    raise VerificationError(
                        f"the {precision} {direction} is {snr} dB from eager PyTorch at {batch} x {latents} latents, "
                        f"{FLOOR_DB[precision]} dB is the least; do not use this graph, and please report this"
                    )
                case = {"direction": direction, "batch": batch, "latents": latents, "window": window}
                rows.append({**case, "snr_db": snr, "max_error": max_error})
    return rows


def _cases(spec: EngineSpec) -> list[tuple[int, int, int | None]]:
    """Return batch, latents and window of each case: single, even and odd lengths, a batch, several windows."""
    # An Autoencoder has one window for both directions, so it must suit the larger context.
    context, alignment = max(spec.contexts.values()), spec.alignment
    window = alignment * math.ceil((2 * context + 8) / alignment)
    return [(1, 1, None), (1, 2, None), (1, 5, None), (2, 7, None), (1, 2 * window - 2 * context + 3, window)]


def _compare(
    tested: Backend, eager: Backend, direction: Direction, batch: int, latents: int, window: int | None
) -> tuple[float, float]:
    """Return the SNR and the largest error of one case; eager PyTorch computes everything in one pass."""
    array = example_input(tested.spec, direction, batch, latents, seed=latents)
    expected = eager.run(direction, array)
    try:
        codec = Autoencoder(tested, window)
        output = (codec.encode_audio if direction == ENCODER else codec.decode_audio)(array)
    except NonFiniteError as error:
        raise VerificationError(str(error)) from None
    return round(snr_db(expected, output), 2), float(np.abs(output - expected).max())
