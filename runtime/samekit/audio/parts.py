"""Parts of an audio file: the bytes that one decoder reads to their end, and the frames that they must yield."""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from samekit.audio.front_channels import Front
    from samekit.audio.source import Source

# Bytes that are copied at a time.
_BLOCK: Final = 2**18

Piece = tuple[int, int] | bytes
"""Begin and end of a stretch of the file, or bytes that are read in its place."""


@dataclass(frozen=True)
class Part:
    """What one decoder reads to its end. Most files have one part."""

    pieces: tuple[Piece, ...]
    frames: int | None = None  # that the structure of the part shows; None if it does not show them
    slack: int = 0  # frames by which the decoder may stay below `frames`, or below its own count if that is None
    count_frame: bytes = b""  # put before the pieces unless the decoder counts `frames` to `frames + slack`
    starts_late: bool = False  # the time stamps begin after zero, so the decoder's own count is too large
    timed: bool = False  # the decoder stops at the last time stamp: bytes that it leaves unread are audio
    check_tail: bool = False  # the format does not show its end: the decoder must leave only few bytes unread
    demuxer: str = ""  # of FFmpeg, which reads the file in place of libsndfile
    front: Front = (0, 1)  # which channels are left and right, if there are two or more


class PieceFile:
    """A file object made of pieces, for soundfile."""

    def __init__(self, source: Source, pieces: tuple[Piece, ...]) -> None:
        self._source = source
        self._pieces = pieces
        sizes = (len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)
        self._starts = [0, *accumulate(sizes)]
        self.size = self._starts[-1]
        self._position = 0
        # The error of a read: libsndfile would not pass on the exception.
        self.error: OSError | None = None

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position; like `lseek`, leave it where it is if the result would be negative."""
        position = offset + (0, self._position, self.size)[whence]
        if position >= 0:
            self._position = position
        return self._position

    def copy_to(self, descriptor: int) -> None:
        """Write all pieces to an empty file, up to the first that cannot be read; leave its position at the start."""
        block = memoryview(bytearray(min(self.size, _BLOCK)))
        while count := self.readinto(block):
            os.write(descriptor, block[:count])
        os.lseek(descriptor, 0, os.SEEK_SET)

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer, and return how many bytes were read; fewer than it holds at the end only."""
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view) and self._position < self.size:
            index = bisect_right(self._starts, self._position) - 1
            piece, inside = self._pieces[index], self._position - self._starts[index]
            target = view[filled : filled + self._starts[index + 1] - self._position]
            try:
                if isinstance(piece, bytes):
                    target[:] = piece[inside:][: len(target)]
                    count = len(target)
                else:
                    count = self._source.readinto(piece[0] + inside, target)
            except OSError as error:
                self.error = error
                break
            if not count:
                break
            filled += count
            self._position += count
        return filled
