"""An audio file as bytes: reads at offsets, finds tags and padding, and makes the errors that name the file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from samekit.audio.tags import size_from_end, size_from_start
from samekit.errors import AudioFileError

if TYPE_CHECKING:
    from io import BufferedReader
    from pathlib import Path

# The cures for files that are damaged or cut off, and for those that libsndfile does not read to their end.
COPY: Final = "copy or download it again"
CONVERT: Final = "convert it: ffmpeg -i IN OUT.flac"
_BLOCK: Final = 2**16
# Limits the time that a malicious file of empty tags takes, and the memory that one of tiny streams takes.
_MOST_TAGS: Final = 1000
_MOST_STREAMS: Final = 10_000


class Source:
    """An open audio file. Offsets and sizes are in bytes."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        self.descriptor = file.fileno()

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes at `offset`, which may be beyond the end."""
        # Damaged files may announce offsets that no seek accepts.
        self._file.seek(min(offset, self.size))
        return self._file.read(max(0, size))

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Read at `offset` into a buffer, and return how many bytes were read."""
        self._file.seek(offset)
        return self._file.readinto(buffer)

    def error(self, cause: str, cure: str = COPY) -> AudioFileError:
        """Return an error about this file."""
        return AudioFileError(f"{self.path}: {cause}; {cure}")

    def cut_off(self, cure: str = COPY) -> AudioFileError:
        """Return the error of a file whose end is missing."""
        return self.error("is cut off, it announces more than it holds", cure)

    def unknown_bytes(self, size: int, where: str) -> AudioFileError:
        """Return the error of bytes that are neither samples nor a known tag."""
        return self.error(f"holds {size} bytes {where} that are neither its audio nor a tag", CONVERT)

    def check_streams(self, count: int) -> None:
        """Raise an error if the file holds too many streams."""
        if count > _MOST_STREAMS:
            raise self.error(f"holds more than {_MOST_STREAMS} streams", "split it")

    def after_tags(self, position: int, end: int) -> int:
        """Return the end of the tags that begin at `position`."""
        for _ in range(_MOST_TAGS):
            size = size_from_start(self.read(position, 32)) if position < end else 0
            if not size:
                break
            position += size
        return min(position, end)

    def before_tags(self, position: int, end: int) -> int:
        """Return the beginning of the tags that end at `end`, at least `position`."""
        for _ in range(_MOST_TAGS):
            size = size_from_end(self.read, position, end)
            if not 0 < size <= end - position:
                break
            end -= size
        return end

    def unaccounted(self, position: int, end: int) -> int:
        """Return how many bytes from `position` to `end` are neither tags nor padding."""
        position = self.after_tags(position, end)
        if self.is_padding(position, end):
            return 0
        last = self.before_tags(position, end)
        return 0 if self.is_padding(position, last) else last - position

    def is_padding(self, position: int, end: int) -> bool:
        """Return whether all bytes from `position` to `end` are equal."""
        first = self.read(position, 1)
        while position < end:
            block = self.read(position, min(_BLOCK, end - position))
            if not block or block.count(first) != len(block):
                return not block
            position += len(block)
        return True
