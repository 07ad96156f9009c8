"""The parts of an audio file: which bytes one decoder reads to their end, and what they must yield."""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO

from samekit.audio.tags import after_tags, before_tags
from samekit.errors import AudioFileError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

Piece = tuple[int, int] | bytes
"""Offset and end of a stretch of the file, or bytes in its place."""

CONVERT = "convert it: ffmpeg -i IN OUT.flac"
"""The cure for files that libsndfile does not read to their end."""


@dataclass(frozen=True)
class Part:
    """A stretch of a file that one decoder reads to its end. Most files have one part, which is the whole file."""

    pieces: tuple[Piece, ...] = ()
    """What the decoder gets to see; the file as it is, if empty."""
    frames: int | None = None
    """Frames that the structure of the part shows; None if it does not show them."""
    slack: int = 0
    """Frames by which the decoder may stay below `frames`, or below its own count if `frames` is None."""
    prefer_file: bool = False
    """Read the file itself instead of the pieces if the decoder then counts `frames`."""
    starts_late: bool = False
    """The time stamps begin after zero, so that the decoder's own count is too large."""
    timed: bool = False
    """The decoder stops at the last time stamp, so that bytes which it leaves unread are audio that is not counted."""
    check_tail: bool = False
    """The format shows no end: whatever the decoder leaves unread must be a tag or padding."""
    front: tuple[int, int] = (0, 1)
    """Which channels are left and right, if there are two or more."""


def cut_off(path: Path, other_cure: str = "") -> AudioFileError:
    """Return the error of a file whose end is missing."""
    cause = f"{path}: is cut off, it announces more than it holds; copy or download it again"
    return AudioFileError(f"{cause}, or {other_cure}" if other_cure else cause)


def unknown_bytes(path: Path, size: int, where: str) -> AudioFileError:
    """Return the error of bytes that are neither samples nor a known tag."""
    return AudioFileError(f"{path}: holds {size} bytes {where} that are neither its audio nor a tag; {CONVERT}")


def time_stamps_too_small(path: Path, seconds: float, size: int) -> AudioFileError:
    """Return the error of a stream that goes on after its last time stamp."""
    return AudioFileError(f"{path}: its time stamps announce {seconds:.1f} s, and {size} bytes follow; {CONVERT}")


class PieceFile:
    """A file of pieces, as soundfile wants its file objects. Errors of reading are kept in `error`."""

    def __init__(self, file: BinaryIO, pieces: tuple[Piece, ...]) -> None:
        self._file = file
        self._pieces = pieces
        sizes = (len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)
        self._starts = [0, *accumulate(sizes)]
        self._position = 0
        self.furthest = 0
        """End of the last byte that was read; the reader may reset it."""
        self.error: OSError | None = None
        """What went wrong in a read: an exception would not pass through the decoder."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return self._starts[-1]

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes from the position on; fewer at the end only."""
        chunks = []
        while size > 0 and self._position < self.size:
            index = bisect_right(self._starts, self._position) - 1
            piece, inside = self._pieces[index], self._position - self._starts[index]
            wanted = min(size, self._starts[index + 1] - self._position)
            chunk = (
                piece[inside : inside + wanted] if isinstance(piece, bytes) else self._load(piece[0] + inside, wanted)
            )
            if not chunk:
                break
            chunks.append(chunk)
            size -= len(chunk)
            self._position += len(chunk)
            self.furthest = max(self.furthest, self._position)
        return b"".join(chunks)

    def unread(self) -> int:
        """Return how many bytes after the furthest read are no tags; in these formats padding may be samples."""
        shift = self._pieces[0][0] if not isinstance(self._pieces[0], bytes) else 0
        position = after_tags(self._file, int(shift) + self.furthest, int(shift) + self.size)
        return before_tags(self._file, position, int(shift) + self.size) - position

    def _load(self, offset: int, size: int) -> bytes:
        """Read from the file itself."""
        try:
            self._file.seek(offset)
            return self._file.read(size)
        except OSError as error:
            self.error = error
            return b""
