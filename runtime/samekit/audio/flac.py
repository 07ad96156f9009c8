"""FLAC files (RFC 9639): one stream or several joined ones, with tags around them and sample counts that may be wrong.

libFLAC reads no further than STREAMINFO says, so the last frame is found here, whose header tells its position.
"""

from __future__ import annotations

import re
from functools import cache, reduce
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit.audio.front_channels import front_of_mask
from samekit.audio.parts import Part, Piece
from samekit.audio.tags import size_from_start

if TYPE_CHECKING:
    from samekit.audio.source import Source

# Bytes that are read at a time in search of streams, and at the end; the least equal bytes that count as padding.
_BLOCK, _TAIL, _PADDING = 2**18, 2**14, 2**10
# RFC 9639, 8.1 and 8.2: the signature and the header of the STREAMINFO block, last block or not; the end of this block.
_BEGINNING: Final = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_BEGINNING_BYTES, _STREAMINFO_END = 8, 42
_SIGNATURE: Final = int.from_bytes(b"fLaC", "little")
# The header of a frame and its checksums take 8 bytes or more.
_LEAST_FRAME: Final = 8
# Limits of the time that a malicious file of empty streams or of empty metadata blocks takes.
_MOST_EMPTY, _MOST_BLOCKS = 1000, 10_000
_SYNC: Final = re.compile(rb"\xff[\xf8\xf9]")
_MOST_FRAME_HEADER: Final = 16
# RFC 9639, 9.1.1: samples of a frame by the code; 6 and 7 stand for a number of 8 or 16 bits at the header's end.
_BLOCK_SIZES: Final = {
    1: 192,
    **{code: 144 << code for code in range(2, 6)},
    **{code: 1 << code for code in range(8, 16)},
}
# RFC 9639, 9.1.2: bytes at the header's end that hold the sample rate, by the code.
_RATE_BYTES: Final = {12: 1, 13: 2, 14: 2}
_MASK: Final = re.compile(rb"WAVEFORMATEXTENSIBLE_CHANNEL_MASK=0x([0-9A-Fa-f]{1,8})", re.IGNORECASE)


def flac_parts(source: Source, start: int) -> list[Part]:
    """Return the streams of a FLAC file, the first of which begins at `start`."""
    parts = []
    empty = 0
    following: int | None = start
    while following is not None:
        start = following
        frames_start = _metadata_end(source, start)
        if frames_start is None:
            parts.append(Part(((start, source.size),)))
            break
        following = _next_stream(source, frames_start)
        end = source.size if following is None else following
        parts.append(_part(source, start, frames_start, end))
        source.check_streams(len(parts))
        empty += end - frames_start < _LEAST_FRAME
        if empty > _MOST_EMPTY:
            raise source.error(f"holds more than {_MOST_EMPTY} FLAC streams without samples")
    return parts


def without_count(source: Source, start: int, end: int, *others: tuple[int, int]) -> tuple[Piece, ...]:
    """Return the stretches of a stream with a STREAMINFO that counts no samples, so that libFLAC reads all frames."""
    if end - start < _STREAMINFO_END:
        return (start, end), *others
    info = source.read(start, _STREAMINFO_END)
    return info[:21] + bytes([info[21] & 0xF0]) + bytes(4) + info[26:], (start + _STREAMINFO_END, end), *others


def _next_stream(source: Source, position: int) -> int | None:
    """Return where the next stream begins; None if there is none."""
    # The first block is small: a malicious file may consist of tiny streams.
    size = _TAIL
    while len(block := source.read(position, size)) >= _BEGINNING_BYTES:
        if _holds_signature(block) and (match := _BEGINNING.search(block)):
            return position + match.start()
        position += len(block) - _BEGINNING_BYTES + 1
        size = _BLOCK
    return None


def _holds_signature(block: bytes) -> bool:
    """Return whether `fLaC` is in a block. Comparing words at each alignment is twice as fast as `bytes.find`."""
    words = (np.frombuffer(block, "<u4", (len(block) - start) // 4, start) for start in range(4))
    return any((aligned == _SIGNATURE).any() for aligned in words)


def _metadata_end(source: Source, position: int) -> int | None:
    """Return where the metadata blocks of a stream end; None if the file ends before."""
    position += 4
    for _ in range(_MOST_BLOCKS):
        header = source.read(position, 4)
        if len(header) < 4:
            break
        position += 4 + int.from_bytes(header[1:], "big")
        if header[0] & 0x80:
            return position if position <= source.size else None
    return None


def _part(source: Source, start: int, frames_start: int, end: int) -> Part:
    """Return the part of one stream."""
    info = source.read(start, _STREAMINFO_END)
    if len(info) < _STREAMINFO_END:
        return Part(((start, end),))
    announced = int.from_bytes(info[18:26], "big") & (1 << 36) - 1
    end = _before_trailer(source, frames_start, end)
    last = _last_frame(source, info, frames_start, end)
    held = None
    if last is not None:
        position, held = last
        if held < announced:
            raise source.cut_off()
        # This frame is the last one, so its bytes are all that can be left.
        if end - position > _most_frame_bytes(info):
            raise source.unknown_bytes(end - position, "from its last frame on")
    mask = _MASK.search(source.read(start, min(frames_start - start, 2**16)))
    # RFC 9639, 8.6.2: the first two channels are left and right, unless a comment holds another channel mask.
    front = front_of_mask(source, int(mask[1], 16), (info[20] >> 1 & 7) + 1) if mask else (0, 1)
    pieces = ((start, end),) if announced in (0, held) else without_count(source, start, end)
    return Part(pieces, announced or None, front=front)


def _before_trailer(source: Source, start: int, end: int) -> int:
    """Return where the tags and the padding after the frames begin."""
    while True:
        before = source.before_tags(start, end)
        tail = max(start, before - _TAIL)
        block = source.read(tail, before - tail)
        # ID3v2 tags of the next stream can be recognised only at their beginning.
        found = block.rfind(b"ID3")
        # Samples may hold these letters too, so the size of the tag must fit.
        if found >= 0 and tail + found + size_from_start(source.read(tail + found, 32)) == before:
            before = tail + found
        elif before - start > _PADDING and source.is_padding(before - _PADDING, before):
            before = tail + len(block.rstrip(block[-1:]))
        if before == end:
            return end
        end = before


def _most_frame_bytes(info: bytes) -> int:
    """Return the most bytes of a frame: as STREAMINFO says, or those of uncompressed samples."""
    largest = int.from_bytes(info[15:18], "big")
    channels, bits = (info[20] >> 1 & 7) + 1, ((info[20] & 1) << 4 | info[21] >> 4) + 1
    return largest or int.from_bytes(info[10:12], "big") * channels * (bits + 1) // 8 + 100


def _last_frame(source: Source, info: bytes, start: int, end: int) -> tuple[int, int] | None:
    """Return the offset of the last frame and the position after it in samples; None if there is none."""
    first = source.read(start, 4)
    stop = end
    while stop > start:
        begin = max(start, stop - _TAIL)
        block = source.read(begin, min(end, stop + _MOST_FRAME_HEADER) - begin)
        for match in reversed(list(_SYNC.finditer(block))):
            position = _position_after(block[match.start() :][:_MOST_FRAME_HEADER], info, first)
            if position is not None:
                return begin + match.start(), position
        stop = begin
    return None


def _position_after(header: bytes, info: bytes, first: bytes) -> int | None:
    """Return the position after a frame in samples, by its header (RFC 9639, 9.1); None if it is not a valid header."""
    # All frames share strategy, rate, depth and the number of channels with the first one.
    if len(header) < 6 or header[1] != first[1] or (header[2] ^ first[2]) & 0x0F or (header[3] ^ first[3]) & 0x0F:
        return None
    # The number of the frame or sample is coded like a character in UTF-8: leading ones count the bytes.
    leading = 8 - (header[4] ^ 0xFF).bit_length()
    at = 4 + max(1, leading)
    if leading in (1, 8) or any(byte >> 6 != 2 for byte in header[5:at]):
        return None
    number = header[4] & (0x7F >> leading)
    for byte in header[5:at]:
        number = number << 6 | byte & 0x3F
    code = header[2] >> 4
    samples = _BLOCK_SIZES.get(code, 0)
    if code in (6, 7):
        samples = int.from_bytes(header[at : at + code - 5], "big") + 1
        at += code - 5
    at += _RATE_BYTES.get(header[2] & 0x0F, 0)
    if not samples or at >= len(header) or reduce(_crc8, header[:at], 0) != header[at]:
        return None
    if header[1] & 1:
        return number + samples
    # Frames of a fixed size carry their number, which tells the position only if no frame but the last is shorter.
    smallest, largest = (int.from_bytes(info[offset : offset + 2], "big") for offset in (8, 10))
    return number * largest + samples if smallest == largest else None


@cache
def _crc8(value: int, byte: int) -> int:
    """Add a byte to the checksum of a frame header, polynomial x^8 + x^2 + x + 1."""
    value ^= byte
    for _ in range(8):
        value = value << 1 ^ (0x107 if value & 0x80 else 0)
    return value
