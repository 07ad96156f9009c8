"""Sizes of tags before and after the audio of a file: ID3v1, ID3v2, APE and Lyrics3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# Lyrics3 v1 (id3.org/Lyrics3): at most 5,100 bytes of text between the marks LYRICSBEGIN and LYRICSEND.
_LYRICS_BYTES: Final = 5100 + 20
# ID3v1 (id3.org/ID3v1), and the enhanced tag TAG+ that may precede it.
_ID3V1, _ENHANCED = 128, 227


def size_from_start(head: bytes) -> int:
    """Return the size of the tag that begins with these 32 bytes; 0 if they begin no tag."""
    if head.startswith(b"ID3") and len(head) >= 10 and head[3] < 0xFF and head[4] < 0xFF:
        # ID3v2.4, section 3.1: the size excludes the header and the footer that flag 0x10 announces.
        return 10 + _synchsafe(head[6:10]) + (10 if head[5] & 0x10 else 0)
    if head.startswith(b"APETAGEX") and len(head) == 32:
        # APEv2: the size excludes this header.
        return 32 + int.from_bytes(head[12:16], "little")
    if head.startswith(b"TAG"):
        return _ENHANCED if head.startswith(b"TAG+") else _ID3V1
    return 0


def size_from_end(read: Callable[[int, int], bytes], position: int, end: int) -> int:
    """Return the size of the tag that ends at `end`; 0 if no tag does.

    Args:
        read: returns bytes of the file, given offset and size.
        position: least offset at which the tag may begin.
        end: offset of the end of the tag.
    """
    most = _ENHANCED + _ID3V1
    tail = read(max(position, end - most), min(most, end - position))
    if tail[-_ID3V1:].startswith(b"TAG"):
        return most if tail.startswith(b"TAG+") and len(tail) == most else _ID3V1
    if tail[-32:].startswith(b"APETAGEX"):
        # Flag 31 announces a header, which the size excludes.
        flags = int.from_bytes(tail[-12:-8], "little")
        return int.from_bytes(tail[-20:-16], "little") + (32 if flags & 2**31 else 0)
    if tail.endswith(b"LYRICS200") and tail[-15:-9].isdigit():
        # Lyrics3 v2: the size excludes itself (6 digits) and the mark.
        return int(tail[-15:-9]) + 15
    if tail.endswith(b"LYRICSEND"):
        start = max(position, end - _LYRICS_BYTES)
        found = read(start, end - start).rfind(b"LYRICSBEGIN")
        return end - start - found if found >= 0 else 0
    if tail[-10:].startswith(b"3DI"):
        return 20 + _synchsafe(tail[-4:])
    return 0


def _synchsafe(data: bytes) -> int:
    """Read a number of four bytes with seven bits each (ID3v2.4, section 6.2)."""
    return sum((byte & 0x7F) << shift for byte, shift in zip(data, (21, 14, 7, 0), strict=False))
