"""Run the windows of several threads on one backend; windows of one length share a batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit.arrays import as_one_batch
from samekit.backends.base import Backend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from samekit.arrays import Array
    from samekit.engine.spec import Direction


@dataclass(eq=False)
class _Piece:
    """A window that waits: its input `[1, features, length]`, and its output later."""

    direction: Direction
    array: Array
    output: Future[Array] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    alone: bool = False
    """Whether a batch with this window failed, so that it must run alone."""

    def fits(self, other: _Piece) -> bool:
        """Return whether both windows can be in one batch."""
        same = self.direction == other.direction and self.array.shape == other.array.shape
        return self is other or (same and not self.alone and not other.alone)


class SharedBackend(Backend):
    """A backend that many threads may call at the same time. One thread that it starts calls the wrapped backend.

    Windows wait in the order in which they came, so a long file delays a short one by a few windows only. If a batch
    of several windows fails, each runs again alone, so that only the thread with the cause gets the error.

    Args:
        backend: runs the batches; `close` closes it.
        max_batch: most windows in a batch.
        max_wait: most seconds that a window waits for others of its length.
        ran: called with the direction and the size of each batch.
    """

    def __init__(
        self, backend: Backend, max_batch: int, max_wait: float, ran: Callable[[Direction, int], object]
    ) -> None:
        super().__init__(backend.spec, backend.precision, backend.window_batch)
        # On the class, both are constants.
        self.name, self.device = backend.name, backend.device  # type: ignore[misc]
        self.device_id, self.longest_window = backend.device_id, backend.longest_window
        self._backend = backend
        self._max_batch, self._max_wait, self._ran = max_batch, max_wait, ran
        self._waiting: deque[_Piece] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="samekit-batches", daemon=True)
        self._thread.start()

    def use_packed_weights(self, direction: Direction) -> None:
        self._backend.use_packed_weights(direction)

    def default_window(self, direction: Direction) -> int:
        return self._backend.default_window(direction)

    def close(self) -> None:
        """Finish what waits, and close the backend."""
        super().close()
        with self._changed:
            self._changed.notify()
        self._thread.join()
        self._backend.close()

    def _submit(self, direction: Direction, pieces: Sequence[Array], shape: tuple[int, ...]) -> Callable[[], Array]:
        batch = as_one_batch(pieces)
        waiting = [_Piece(direction, batch[row : row + 1]) for row in range(shape[0])]
        with self._changed:
            self._waiting.extend(waiting)
            self._changed.notify()
        return lambda: np.concatenate([piece.output.result() for piece in waiting])

    def _run(self, direction: Direction, array: Array) -> Array:
        return self._submit(direction, [array], array.shape)()

    def _work(self) -> None:
        """Run batches until the backend is closed and nothing waits."""
        pending: deque[tuple[list[_Piece], Callable[[], Any]]] = deque()
        while True:
            batch = self._next_batch(wait=not pending)
            if batch:
                self._ran(batch[0].direction, len(batch))
                pending.append((batch, self._start(batch)))
            elif not pending:
                return
            if not batch or len(pending) >= self._backend.most_pending:
                self._deliver(*pending.popleft())

    def _next_batch(self, *, wait: bool) -> list[_Piece]:
        """Return the window that has waited longest with others of its length; nothing if none waits."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            first = self._waiting[0]
            left = first.arrived + self._max_wait - time.monotonic()
            self._changed.wait_for(lambda: len(self._like(first)) >= self._max_batch or self._closed, max(0.0, left))
            batch = self._like(first)[: self._max_batch]
            self._waiting = deque(piece for piece in self._waiting if piece not in batch)
        return batch

    def _like(self, first: _Piece) -> list[_Piece]:
        return [piece for piece in self._waiting if piece.fits(first)]

    def _start(self, batch: list[_Piece]) -> Callable[[], Any]:
        """Submit a batch; return the function that fetches its output, or raises the error of the submission."""
        try:
            return self._backend.submit(batch[0].direction, [piece.array for piece in batch])
        except Exception as error:  # noqa: BLE001 handled where the output is fetched
            failure = error

            def fail() -> Any:
                raise failure

            return fail

    def _deliver(self, batch: list[_Piece], fetch: Callable[[], Any]) -> None:
        """Give each window of a batch its part of the output, or the error."""
        try:
            outputs = fetch()
        except Exception as error:  # noqa: BLE001 given to the threads that wait
            if len(batch) > 1:
                for piece in batch:
                    piece.alone = True
                with self._changed:
                    self._waiting.extendleft(reversed(batch))
            else:
                batch[0].output.set_exception(error)
        else:
            for row, piece in enumerate(batch):
                piece.output.set_result(outputs[row : row + 1])
