"""Measure which windows and batches are the fastest with the engines of this machine's GPU."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from samekit.engine.accuracy import example_input
from samekit.engine.fingerprint import capability_name
from samekit.engine.records import Tuning
from samekit.engine.spec import DIRECTIONS, Direction
from samekit.errors import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.tensorrt.backend import TensorRTBackend

logger = logging.getLogger(__name__)

WINDOWS: Final = (64, 128, 256, 512)
"""Latents of the windows that are measured. Windows that are longer than the narrow profile run one by one."""

BATCHES: Final = (1, 2, 4, 8, 16)
"""How many windows are measured at once. A batch that is larger than that of the narrow profile runs in parts."""

# Smaller windows and batches take less memory, so they are chosen if they are hardly slower.
_HARDLY_SLOWER: Final = 1.02
# Each case is measured for so many seconds, but at least three and at most 50 times.
_SECONDS: Final = 0.3


def tune(backend: TensorRTBackend, clock: Callable[[], float] = time.perf_counter) -> Tuning:
    """Measure `WINDOWS` and `BATCHES` in both directions; write the choice into the folder of the build.

    A time counts with copies to and from the GPU. It is divided by the latents that are kept of each window.

    Args:
        backend: an open backend, which no other thread uses.
        clock: returns the time in seconds.

    Raises:
        BackendError: not one case can be run in each direction.
    """
    build, gpu = backend.build, backend.gpu
    cases: list[dict[str, Any]] = []
    for direction in DIRECTIONS:
        for window in WINDOWS:
            kept = _kept(backend, direction, window)
            for batch in BATCHES if kept > 0 else ():
                try:
                    seconds = _seconds(backend, direction, batch, window, clock)
                except BackendUnavailableError:
                    raise
                except BackendError as error:
                    logger.info("%s, %s x %s latents: not measured (%s)", direction, batch, window, error.cause)
                    break
                each = 1e6 * seconds / (batch * kept)
                logger.info("%s, %s x %s latents: %.2f us for each latent that is kept", direction, batch, window, each)
                cases.append(
                    {"direction": direction, "batch": batch, "window": window, "microseconds_per_latent": each}
                )
    windows, window_batch = _choose(cases)
    tuning = Tuning(capability_name(gpu.capability), gpu.name, build.digests, cases, windows, window_batch)
    tuning.write(build.folder)
    return tuning


def _kept(backend: TensorRTBackend, direction: Direction, window: int) -> int:
    """Return how many latents of a window inside a long sequence are kept."""
    spec = backend.spec
    if window % spec.alignment:
        return 0
    room = window - 2 * spec.contexts[direction]
    return room - room % spec.alignment


def _seconds(
    backend: TensorRTBackend, direction: Direction, batch: int, window: int, clock: Callable[[], float]
) -> float:
    """Return the seconds of one batch, with as many batches pending as the backend takes."""
    pieces = [example_input(backend.spec, direction, 1, window, seed) for seed in range(batch)]
    backend.submit(direction, pieces)()
    start, runs = clock(), 0
    pending: deque[Callable[[], Any]] = deque()
    while runs < 3 or (clock() - start < _SECONDS and runs < 50):
        pending.append(backend.submit(direction, pieces))
        runs += 1
        if len(pending) == backend.most_pending:
            pending.popleft()()
    while pending:
        pending.popleft()()
    return (clock() - start) / runs


def _choose(cases: list[dict[str, Any]]) -> tuple[dict[Direction, int], int]:
    """Return the window of each direction and the batch of both."""
    times = {(case["direction"], case["window"], case["batch"]): case["microseconds_per_latent"] for case in cases}
    totals: dict[int, float] = {}
    for batch in BATCHES:
        best = [
            min((time for (d, _, b), time in times.items() if (d, b) == (direction, batch)), default=None)
            for direction in DIRECTIONS
        ]
        if None not in best:
            totals[batch] = sum(time for time in best if time is not None)
    if not totals:
        raise BackendError("no window could be run in both directions; see the log, or use another backend")
    chosen = _smallest(totals)
    return {
        direction: _smallest({w: time for (d, w, b), time in times.items() if (d, b) == (direction, chosen)})
        for direction in DIRECTIONS
    }, chosen


def _smallest(times: dict[int, float]) -> int:
    """Return the smallest size that is hardly slower than the fastest one."""
    return min(size for size, time in times.items() if time <= _HARDLY_SLOWER * min(times.values()))
