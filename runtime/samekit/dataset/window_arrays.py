"""Memory for the windows of clips, used again and again: new memory is cleared page by page, which takes long.

A piece of memory is free again when the last array that shows it is gone.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.arrays import Array

# Far more windows than any batch has. The file is sparse: what no window has used takes no memory.
_MOST_ARRAYS: Final = 2**12


class PrivateMemory:
    """Memory of this process for windows of at most `values` values."""

    def __init__(self, values: int) -> None:
        self._values = values
        self._free: list[Array] = []

    def take(self, shape: tuple[int, ...]) -> Array:
        """Return an array with any values."""
        try:
            storage = self._free.pop()
        except IndexError:
            storage = np.empty(self._values, np.float32)
        return _shown(storage.data, shape, partial(self._free.append, storage))


class SharedMemory:
    """Numbered pieces of memory, each for `values` values, that this process shares with its children.

    The file behind it has no name, so that nothing is left when all processes are killed.

    Args:
        values: most values of an array.
        descriptor: the file, in a child; None creates it.
    """

    def __init__(self, values: int, descriptor: int | None = None) -> None:
        self.values = values
        self._bytes = -(-values * 4 // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        size = self._bytes * _MOST_ARRAYS
        try:
            self.descriptor = _unnamed_file(size) if descriptor is None else descriptor
            weakref.finalize(self, os.close, self.descriptor)
            self._map = mmap.mmap(self.descriptor, size)
        except (OSError, OverflowError, ValueError) as error:
            raise BackendError(f"no memory can be shared here ({error}); pass --worker-threads") from None
        self._free = list(reversed(range(_MOST_ARRAYS)))

    def take(self) -> int:
        """Return the number of a free piece."""
        try:
            return self._free.pop()
        except IndexError:
            raise BackendError(f"more than {_MOST_ARRAYS} windows wait for the encoder; pass a smaller batch") from None

    def give_back(self, number: int) -> None:
        """Make a piece free."""
        self._free.append(number)

    def array(
        self,
        number: int,
        shape: tuple[int, ...],
        end: Callable[[int], object],
        strides: tuple[int, ...] | None = None,
    ) -> Array:
        """Return a piece as an array. When it and its views are gone, `end` is called with the number.

        `strides` are those of NumPy, for an array that does not fill its memory; None for one that does.
        """
        begin = number * self._bytes
        piece = memoryview(self._map)[begin : begin + self._bytes]
        return _shown(piece, shape, partial(end, number), strides)

    def number(self, array: Array) -> int:
        """Return the number of the piece that an array shows."""
        start = np.frombuffer(self._map, np.uint8, 1).ctypes.data
        return (array.ctypes.data - start) // self._bytes


def _shown(
    storage: memoryview, shape: tuple[int, ...], end: Callable[[], object], strides: tuple[int, ...] | None = None
) -> Array:
    """Return memory as an array, and call `end` when this array and its views are gone."""
    # NumPy's views keep this array alive, because it does not own its memory.
    owner: Array = np.frombuffer(storage, np.float32)
    weakref.finalize(owner, end).atexit = False
    return np.ndarray(shape, np.float32, owner, strides=strides)


def _unnamed_file(size: int) -> int:
    """Return the descriptor of a file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        descriptor: int = os.memfd_create("samekit")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    return descriptor
