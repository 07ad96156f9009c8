"""Collect windows into batches for the encoder."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_WAITING_BATCHES: Final = 4


class WaitingWindows(Generic[T]):
    """Windows that wait until there are enough of one length, or until too many wait.

    Args:
        batch_size: most windows in a batch.
        padding: values by which a window may be padded, so that windows of several lengths are in one batch; see
            `Backend.padding`.
        room: returns the most values that a window can have with zeros appended; see `CuttingRules.room`.
    """

    def __init__(self, batch_size: int, padding: int, room: Callable[[T], int]) -> None:
        self._batch_size = batch_size
        self._padding = padding
        self._room = room
        # By length; the length that has waited longest comes first.
        self._windows: dict[int, list[T]] = defaultdict(list)

    def add(self, window: T, length: int) -> list[T]:
        """Add a window of a length; return a batch that should run now, or nothing."""
        self._windows[length].append(window)
        if len(self._windows[length]) >= self._batch_size:
            return self._windows.pop(length)
        if sum(map(len, self._windows.values())) > _WAITING_BATCHES * self._batch_size:
            return self.take()
        return []

    def take(self) -> list[T]:
        """Return the windows that have waited longest, and others that can be in one batch with them."""
        if not self._windows:
            return []
        length = next(iter(self._windows))
        batch = [(window, length) for window in self._windows.pop(length)]
        for other in sorted(self._windows, key=lambda other: abs(other - length)) if self._padding else ():
            left = []
            for window in self._windows[other]:
                if len(batch) < self._batch_size and self._fits([*batch, (window, other)]):
                    batch.append((window, other))
                else:
                    left.append(window)
            if left:
                self._windows[other] = left
            else:
                del self._windows[other]
        return [window for window, _ in batch]

    def _fits(self, batch: list[tuple[T, int]]) -> bool:
        """Return whether all windows can be padded to the longest one."""
        longest = max(length for _, length in batch)
        return all(
            length == longest or longest <= min(length + self._padding, self._room(window)) for window, length in batch
        )
