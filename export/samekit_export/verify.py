"""Measure exported graphs against eager PyTorch; an export below the least SNR of its precision fails."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit.backends.base import BackendOptions
from samekit.backends.onnxruntime import OnnxRuntimeBackend
from samekit.batches import Autoencoder
from samekit.engine.accuracy import FLOOR_DB, example_input, floor_db, snr_db
from samekit.engine.spec import DIRECTIONS, ENCODER, Direction
from samekit.errors import NonFiniteError, VerificationError
from samekit_export.backend import EagerBackend
from samekit_export.music import music

if TYPE_CHECKING:
    from samekit.arrays import Array
    from samekit.backends.base import Backend
    from samekit.engine.folder import Engine
    from samekit.engine.spec import EngineSpec
    from samekit_export.model import Same

logger = logging.getLogger(__name__)

NOISE, MUSIC = "noise", "music"
"""The contents of cases."""

__all__ = ["FLOOR_DB", "example_input", "snr_db", "verify"]


def verify(engine: Engine, model: Same, precision: str) -> list[dict[str, Any]]:
    """Measure the graphs of a precision in ONNX Runtime on the CPU against eager PyTorch in float32; log each case.

    Args:
        engine: the graphs; the folder may be unfinished.
        model: eager PyTorch with the same weights.
        precision: of the graphs.

    Returns:
        A row for each case: direction, content (noise or music), batch, latents, window, snr_db, max_error.

    Raises:
        VerificationError: a case is below the floor of the precision, or not finite.
    """
    rows, least = [], floor_db(engine.spec, precision)
    with (
        OnnxRuntimeBackend(engine, BackendOptions(precision=precision, device="cpu")) as tested,
        EagerBackend(engine.spec, model, BackendOptions(device="cpu")) as eager,
    ):
        for direction in DIRECTIONS:
            for content, batch, latents, window in _cases(engine.spec):
                array = _input(eager, direction, content, batch, latents)
                snr, max_error = _compare(tested, eager, direction, array, window)
                windows = f" in windows of {window}" if window else ""
                logger.info(
                    "%s %s: %s, %s x %s latents%s: %.1f dB", precision, direction, content, batch, latents, windows, snr
                )
                if not snr >= least:
                    raise VerificationError(
                        f"the {precision} {direction} is {snr} dB from eager PyTorch at {batch} x {latents} latents "
                        f"of {content}, {least} dB is the least; do not use this graph, and please report this"
                    )
                case = {
                    "direction": direction,
                    "content": content,
                    "batch": batch,
                    "latents": latents,
                    "window": window,
                }
                rows.append({**case, "snr_db": snr, "max_error": max_error})
    return rows


def _cases(spec: EngineSpec) -> list[tuple[str, int, int, int | None]]:
    """Return content, batch, latents and window of each case: single, even, odd lengths, a batch, several windows."""
    # An Autoencoder has one window for both directions, so it must suit the larger context.
    context, alignment = max(spec.contexts.values()), spec.alignment
    window = alignment * math.ceil((2 * context + 8) / alignment)
    several = (1, 2 * window - 2 * context + 3, window)
    alone = ((1, 1, None), (1, 2, None), (1, 5, None), (2, 7, None), several)
    return [(NOISE, *case) for case in alone] + [(MUSIC, *several)]


def _input(eager: Backend, direction: Direction, content: str, batch: int, latents: int) -> Array:
    """Return audio, or latents; those of music are the latents of its audio."""
    if content == NOISE:
        return example_input(eager.spec, direction, batch, latents, seed=0)
    audio = music(eager.spec, latents)
    return audio if direction == ENCODER else eager.run(ENCODER, audio)


def _compare(
    tested: Backend, eager: Backend, direction: Direction, array: Array, window: int | None
) -> tuple[float, float]:
    """Return the SNR and the largest error of one case; eager PyTorch computes everything in one pass."""
    expected = eager.run(direction, array)
    try:
        codec = Autoencoder(tested, window)
        output = (codec.encode_audio if direction == ENCODER else codec.decode_audio)(array)
    except NonFiniteError as error:
        raise VerificationError(str(error)) from None
    return round(snr_db(expected, output), 2), float(np.abs(output - expected).max())
