"""Every exported graph against eager PyTorch, in numbers; below its floor no export is finished."""

from __future__ import annotations

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
    from collections.abc import Callable

    from samekit.arrays import Array
    from samekit.backends.base import Backend
    from samekit.engine.folder import Engine
    from samekit.engine.spec import EngineSpec
    from samekit_export.model import Same

# Float32 ports reach 104 to 130 dB; below 90 dB something is wrong. Published float16 ports stand at 46 dB with trained
# weights, so below 40 dB something is wrong there. int8 graphs are made to stand at 38 dB on examples of eight latents,
# and other lengths have other ranges; ports that round everything the plain way stand at 30 dB.
FLOOR_DB = {"fp32": 90.0, "fp16": 40.0, "int8": 32.0}
"""precision -> least signal-to-noise ratio of an export, in dB."""


def snr_db(reference: Array, output: Array) -> float:
    """Signal-to-noise ratio in dB: 20 log10(|reference| / |output - reference|)."""
    error = float(np.linalg.norm(output.astype(np.float64) - reference))
    signal = float(np.linalg.norm(reference.astype(np.float64)))
    if error == 0:
        return math.inf
    return 20 * math.log10(signal / error) if signal else -math.inf


def example_input(spec: EngineSpec, direction: Direction, batch: int, latents: int, seed: int) -> Array:
    """Noise of a usual level: audio at -14 dBFS, or latents of unit variance."""
    noise = np.random.default_rng(seed)
    if direction == ENCODER:
        return noise.standard_normal((batch, spec.channels, spec.samples(latents)), np.float32) * np.float32(0.2)
    return noise.standard_normal((batch, spec.latent_width, latents), np.float32)


def verify(
    engine: Engine, model: Same, precision: str, report: Callable[[str], object] | None = None
) -> list[dict[str, Any]]:
    """Measure a precision's graphs in ONNX Runtime on the CPU against eager PyTorch in float32.

    Args:
        engine: the graphs; may still be unfinished.
        model: eager PyTorch with the same weights.
        precision: which graphs.
        report: takes a line for each case.

    Returns:
        A row for each case: half, batch, latents, window, snr_db, max_error.

    Raises:
        VerificationError: a case is below the precision's floor, or not finite.
    """
    options = BackendOptions(precision=precision, device="cpu")
    rows = []
    with (
        OnnxRuntimeBackend(engine, options) as tested,
        EagerBackend(engine.spec, model, BackendOptions(device="cpu")) as oracle,
    ):
        for direction in DIRECTIONS:
            for batch, latents, window in _cases(engine.spec):
                row: dict[str, Any] = {"direction": direction, "batch": batch, "latents": latents, "window": window}
                row |= _compare(tested, oracle, direction, batch, latents, window)
                rows.append(row)
                if report:
                    report(
                        f"{precision} {direction}: {batch} x {latents} latents"
                        f"{f' in windows of {window}' if window else ''}: {row['snr_db']:.1f} dB"
                    )
                _judge(row, precision)
    return rows


def _cases(spec: EngineSpec) -> list[tuple[int, int, int | None]]:
    """Batch, latents and window: single, whole and odd lengths, a batch, and more than one window."""
    # A codec has one window for both halves, so it must suit the one that sees further.
    context, alignment = max(spec.contexts.values()), spec.alignment
    window = alignment * math.ceil((2 * context + 8) / alignment)
    return [(1, 1, None), (1, 2, None), (1, 5, None), (2, 7, None), (1, 2 * window - 2 * context + 3, window)]


def _compare(
    tested: Backend, oracle: Backend, direction: Direction, batch: int, latents: int, window: int | None
) -> dict[str, float]:
    """SNR and largest error of one case; the oracle does everything in one pass."""
    array = example_input(tested.spec, direction, batch, latents, seed=latents)
    expected = oracle.run(direction, array)
    try:
        codec = Autoencoder(tested, window)
        output = (codec.encode_audio if direction == ENCODER else codec.decode_audio)(array)
    except NonFiniteError as error:
        raise VerificationError(str(error)) from None
    return {"snr_db": round(snr_db(expected, output), 2), "max_error": float(np.abs(output - expected).max())}


def _judge(row: dict[str, Any], precision: str) -> None:
    floor = FLOOR_DB[precision]
    if not row["snr_db"] >= floor:
        raise VerificationError(
            f"the {precision} {row['direction']} is {row['snr_db']} dB from eager PyTorch at {row['batch']} x "
            f"{row['latents']} latents, {floor} dB is the least; do not use this graph, and please report this"
        )
