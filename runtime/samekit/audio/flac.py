"""FLAC files (RFC 9639): one stream or several that were joined, with tags around them, and counts that may be wrong.

libFLAC reads no further than STREAMINFO says. So the last frame is found here, whose header tells its position.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np

from samekit.audio.layout import Front, front_of_mask
from samekit.audio.parts import Part, Piece, cut_off, unknown_bytes
from samekit.audio.tags import after_tags, before_tags, is_padding, read_at
from samekit.errors import AudioFileError

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK: Final = 2**18
_TAIL: Final = 2**14
# RFC 9639, 8.1 and 8.2: the signature and the header of the STREAMINFO block, last block or not.
_BEGINNING: Final = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_SIGNATURE: Final = int.from_bytes(b"fLaC", "little")
_STREAMINFO_END: Final = 42
# A hostile file may consist of streams without frames. The header of a frame and its checksums take 8 bytes or more.
_LEAST_FRAME: Final = 8
_MOST_EMPTY: Final = 1000
# A hostile file may consist of empty metadata blocks.
_MOST_BLOCKS: Final = 10_000
_SYNC: Final = re.compile(rb"\xff[\xf8\xf9]")
# RFC 9639, 9.1.1: samples of a frame by the code; 6 and 7 stand for a number at the header's end.
_BLOCK_SIZES: Final = {
    1: 192,
    **{code: 144 << code for code in (2, 3, 4, 5)},
    **{code: 1 << code for code in range(8, 16)},
}
_MASK: Final = re.compile(rb"WAVEFORMATEXTENSIBLE_CHANNEL_MASK=0x([0-9A-Fa-f]{1,8})", re.IGNORECASE)


def _crc8_table() -> bytes:
    """Return the table of the checksum of frame headers, polynomial x^8 + x^2 + x + 1."""
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value << 1 ^ (0x107 if value & 0x80 else 0)
        table.append(value)
    return bytes(table)


_CRC8: Final = _crc8_table()


def flac_parts(path: Path, file: BinaryIO, start: int, end: int, *, whole_file: bool) -> list[Part]:
    """Find the streams of a FLAC file.

    Args:
        path: for messages.
        file: the open file.
        start: of the first stream.
        end: of the file.
        whole_file: nothing precedes `start`.

    Raises:
        AudioFileError: a stream is cut off, or something unknown follows it.
    """
    starts = [start]
    empty = 0
    while (position := _metadata_end(file, starts[-1], end)) is not None:
        found = _find(file, position, end)
        if found is None:
            break
        empty += found - position < _LEAST_FRAME
        if empty > _MOST_EMPTY:
            cause = f"holds more than {_MOST_EMPTY} FLAC streams without samples"
            raise AudioFileError(f"{path}: {cause}; copy or download it again")
        starts.append(found)
    parts = []
    for begin, stop in zip(starts, [*starts[1:], end], strict=True):
        plain = whole_file and len(starts) == 1
        parts.append(_part(path, file, begin, stop, plain=plain))
    return parts


def _find(file: BinaryIO, position: int, end: int) -> int | None:
    """Return where the next stream begins; None if none does."""
    # The file is read twice, so this must be fast: words are compared at each of four alignments.
    buffer = bytearray(_BLOCK)
    # The first block is small: a hostile file may consist of tiny streams.
    most = _TAIL
    while position < end:
        file.seek(position)
        wanted = min(most, end - position)
        size = file.readinto(memoryview(buffer)[:wanted])  # type: ignore[attr-defined]
        for at in sorted(_signatures(buffer, size)):
            if _BEGINNING.match(buffer, at, size):
                return position + at
        if size < wanted or position + size >= end:
            return None
        position += size - 8
        most = _BLOCK
    return None


def _signatures(buffer: bytearray, size: int) -> list[int]:
    """Return where the four bytes of the signature are."""
    found = []
    for offset in range(4):
        words = np.frombuffer(buffer, "<u4", (size - offset) // 4, offset) if size >= offset + 4 else np.empty(0)
        found += [4 * int(index) + offset for index in np.flatnonzero(words == _SIGNATURE)]
    return found


def _metadata_end(file: BinaryIO, position: int, end: int) -> int | None:
    """Return where the metadata blocks of a stream end; None if they do not."""
    position += 4
    for _ in range(_MOST_BLOCKS):
        header = read_at(file, position, 4)
        if len(header) < 4 or position + 4 > end:
            break
        position += 4 + int.from_bytes(header[1:], "big")
        if header[0] & 0x80:
            return position if position <= end else None
    return None


def _part(path: Path, file: BinaryIO, start: int, end: int, *, plain: bool) -> Part:
    """Look at one stream."""
    info = read_at(file, start, _STREAMINFO_END)
    frames_start = _metadata_end(file, start, end)
    if len(info) < _STREAMINFO_END or frames_start is None:
        return Part(() if plain else ((start, end),))
    announced = int.from_bytes(info[18:26], "big") & (1 << 36) - 1
    stop = _before_trailer(file, frames_start, end)
    last = _last_frame(file, info, frames_start, stop)
    if last is not None:
        if announced and last[1] < announced:
            raise cut_off(path)
        # The frame that was found is the last one, so no more than one frame can follow its header.
        if stop - last[0] > _most_frame_bytes(info):
            raise unknown_bytes(path, stop - last[0], "from its last frame on")
    front = _front(path, info, read_at(file, start, min(frames_start - start, 2**16)))
    if plain and stop == end and (not announced or (last is not None and last[1] == announced)):
        return Part(frames=announced or None, front=front)
    return Part(without_count(file, ((start, stop),)), announced or None, front=front)


def without_count(file: BinaryIO, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Return the pieces of a stream with a STREAMINFO that counts no samples, so that libFLAC reads all frames."""
    start, stop = pieces[0]
    if isinstance(start, bytes) or isinstance(stop, bytes) or stop - start < _STREAMINFO_END:
        return pieces
    info = read_at(file, start, _STREAMINFO_END)
    return (info[:21] + bytes([info[21] & 0xF0]) + bytes(4) + info[26:], (start + _STREAMINFO_END, stop), *pieces[1:])


def _before_trailer(file: BinaryIO, start: int, end: int) -> int:
    """Return where the tags and the padding after the frames begin."""
    while True:
        before = before_tags(file, start, end)
        # ID3v2 tags of the next stream show at their beginning only.
        tail = max(start, before - _TAIL)
        found = read_at(file, tail, before - tail).rfind(b"ID3")
        if found >= 0 and after_tags(file, tail + found, end) == before:
            before = tail + found
        elif before - start > 1024 and is_padding(file, before - 1024, before):
            block = read_at(file, tail, before - tail)
            before = tail + len(block.rstrip(block[-1:]))
        if before == end:
            return end
        end = before


def _front(path: Path, info: bytes, metadata: bytes) -> Front:
    """Return the front channels: the first two, unless a mask tells others (RFC 9639, 8.6.2)."""
    channels = (info[20] >> 1 & 7) + 1
    mask = _MASK.search(metadata)
    return front_of_mask(path, int(mask[1], 16), channels) if mask else (0, 1)


def _most_frame_bytes(info: bytes) -> int:
    """Return the size that no frame passes: the largest one, or that of samples as they are."""
    largest = int.from_bytes(info[15:18], "big")
    channels, bits = (info[20] >> 1 & 7) + 1, ((info[20] & 1) << 4 | info[21] >> 4) + 1
    return largest or int.from_bytes(info[10:12], "big") * channels * (bits + 1) // 8 + 100


def _last_frame(file: BinaryIO, info: bytes, start: int, end: int) -> tuple[int, int] | None:
    """Return the offset of the last frame and the position after it in samples; None if there is none."""
    first = read_at(file, start, 4)
    stop = end
    while stop > start:
        begin = max(start, stop - _TAIL)
        block = read_at(file, begin, min(end, stop + 16) - begin)
        for match in reversed(list(_SYNC.finditer(block))):
            position = _position_after(block[match.start() : match.start() + 16], info, first)
            if position is not None:
                return begin + match.start(), position
        stop = begin
    return None


def _position_after(header: bytes, info: bytes, first: bytes) -> int | None:
    """Return the position after a frame in samples, by its header; None if it is none."""
    # All frames share strategy, rate, depth and the number of channels with the first one.
    if len(header) < 6 or header[1] != first[1] or (header[2] ^ first[2]) & 0x0F or (header[3] ^ first[3]) & 0x0F:
        return None
    leading = 8 - (header[4] ^ 0xFF).bit_length()
    size = max(1, leading)
    if leading in (1, 8) or any(byte >> 6 != 2 for byte in header[5 : 4 + size]):
        return None
    number = header[4] & (0x7F if leading == 0 else 0x7F >> leading)
    for byte in header[5 : 4 + size]:
        number = number << 6 | byte & 0x3F
    at = 4 + size
    code, rate = header[2] >> 4, header[2] & 0x0F
    samples = _BLOCK_SIZES.get(code, 0)
    if code in (6, 7):
        samples = int.from_bytes(header[at : at + code - 5], "big") + 1
        at += code - 5
    at += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if not samples or at >= len(header) or _checksum(header[:at]) != header[at]:
        return None
    smallest, largest = (int.from_bytes(info[offset : offset + 2], "big") for offset in (8, 10))
    if header[1] & 1:
        return number + samples
    # Frames of fixed size are counted; streams of the first encoders broke this rule.
    return number * largest + samples if smallest == largest else None


def _checksum(header: bytes) -> int:
    """Return the checksum of a frame header."""
    value = 0
    for byte in header:
        value = _CRC8[value ^ byte]
    return value
