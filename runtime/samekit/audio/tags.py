"""Tags and padding before and after the audio of a file. They hold no samples."""

from __future__ import annotations

import os
from typing import BinaryIO, Final

# Lyrics3 v1 (id3.org/Lyrics3): at most 5,100 bytes of text between its two marks.
_LYRICS_BYTES: Final = 5100 + 20
_BLOCK: Final = 2**16
# A hostile file may consist of empty tags.
_MOST_TAGS: Final = 1000


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Return up to `size` bytes at `offset`."""
    file.seek(offset)
    return file.read(max(0, size))


def after_tags(file: BinaryIO, position: int, end: int) -> int:
    """Return where the tags that begin at `position` end, each known by its first bytes."""
    for _ in range(_MOST_TAGS):
        size = _size_from_start(read_at(file, position, 32)) if position < end else 0
        if not size:
            break
        position += size
    return min(position, end)


def before_tags(file: BinaryIO, position: int, end: int) -> int:
    """Return where the tags that end at `end` begin, each known by its last bytes; not before `position`."""
    for _ in range(_MOST_TAGS):
        size = _size_from_end(file, position, end)
        if not 0 < size <= end - position:
            break
        end -= size
    return end


def unaccounted(file: BinaryIO, position: int, end: int) -> int:
    """Return how many bytes from `position` to `end` are neither tags nor padding (one byte over and over)."""
    position = after_tags(file, position, end)
    if is_padding(file, position, end):
        return 0
    last = before_tags(file, position, end)
    return 0 if is_padding(file, position, last) else last - position


def is_padding(file: BinaryIO, position: int, end: int) -> bool:
    """Whether one byte is repeated from `position` to `end`."""
    first = read_at(file, position, 1)
    while position < end:
        block = read_at(file, position, min(_BLOCK, end - position))
        if not block or block.count(first) != len(block):
            return not block
        position += len(block)
    return True


def _synchsafe(data: bytes) -> int:
    """Read a size of seven bits a byte (ID3v2.4, section 6.2)."""
    return sum((byte & 0x7F) << shift for byte, shift in zip(data, (21, 14, 7, 0), strict=False))


def _size_from_start(head: bytes) -> int:
    """Return the size of the tag that begins with these bytes; 0 if none does."""
    if head.startswith(b"ID3") and len(head) >= 10 and head[3] < 0xFF and head[4] < 0xFF:
        # ID3v2.4, section 3.1: the size leaves out the header and the footer that flag 0x10 announces.
        return 10 + _synchsafe(head[6:10]) + (10 if head[5] & 0x10 else 0)
    if head.startswith(b"APETAGEX") and len(head) == 32:
        # APEv2: the size leaves out this header.
        return 32 + int.from_bytes(head[12:16], "little")
    if head.startswith(b"TAG+"):
        return 227
    if head.startswith(b"TAG"):
        return 128
    return 0


def _size_from_end(file: BinaryIO, position: int, end: int) -> int:
    """Return the size of the tag that ends at `end`; 0 if none does."""
    tail = read_at(file, max(position, end - 355), min(355, end - position))
    if tail[-128:].startswith(b"TAG"):
        return 355 if tail.startswith(b"TAG+") and len(tail) == 355 else 128
    if tail[-32:].startswith(b"APETAGEX"):
        flags = int.from_bytes(tail[-12:-8], "little")
        return int.from_bytes(tail[-20:-16], "little") + (32 if flags & 2**31 else 0)
    if tail.endswith(b"LYRICS200") and tail[-15:-9].isdigit():
        return int(tail[-15:-9]) + 15
    if tail.endswith(b"LYRICSEND"):
        start = max(position, end - _LYRICS_BYTES)
        found = read_at(file, start, end - start).rfind(b"LYRICSBEGIN")
        return end - start - found if found >= 0 else 0
    if tail[-10:].startswith(b"3DI"):
        return 20 + _synchsafe(tail[-4:])
    return 0


def file_size(file: BinaryIO) -> int:
    """Return the size of an open file in bytes."""
    return file.seek(0, os.SEEK_END)
