"""Check the pages of Ogg files (RFC 3533), and return one part for each audio stream.

libogg skips damaged and missing pages without an error, and libsndfile reads only the first of several streams.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from samekit.audio.flac import without_count
from samekit.audio.front_channels import front_of_ogg
from samekit.audio.parts import Part, Piece
from samekit.audio.source import CONVERT, COPY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.audio.source import Source

# RFC 3533, 6: magic, version, flags, granule position, serial number, page number, checksum, count of segments.
_PAGE_HEADER: Final = struct.Struct("<4sBBqIIIB")
_FIRST, _LAST = 2, 4
_CHECKSUM: Final = slice(22, 26)
_MOST_SEGMENTS: Final = 255
# Samples by which a stream may miss its announced length: the longest block of Vorbis.
_SLACK: Final = 8192
# Samples that a packet holds at most: half of two such blocks, or 120 ms of Opus at 48 kHz.
_MOST_PACKET_SAMPLES: Final = {b"\x01vor": 8192, b"Opus": 5760}
_FLAC: Final = b"\x7fFLAC"
_AUDIO: Final = (b"\x01vorbis", b"OpusHead", _FLAC, b"Speex   ", b"PCM     ")
# RFC 9639, 10.1: the mark above, a version and the number of header packets precede the signature of FLAC.
_FLAC_HEADER_BYTES: Final = 9
# RFC 9639, 8.2: the most samples of a frame, by the STREAMINFO in the first packet.
_FLAC_BLOCK: Final = slice(19, 21)
_REVERSED: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class _Page(NamedTuple):
    start: int
    body: int
    end: int
    flags: int
    granule: int  # the time stamp: samples up to the end of the last packet that ends on this page
    serial: int
    number: int
    packets: int  # packets that end on this page
    head: bytes  # first bytes of its content


@dataclass
class _Stream:
    """One logical stream."""

    head: bytes
    number: int  # of the last page
    last: tuple[int, int] = (0, 0)  # begin and end of the last page
    granule: int = 0  # the last time stamp above zero
    starts_late: bool = False
    ended: bool = False
    ranges: list[tuple[int, int]] = field(default_factory=list)  # where its pages are; of FLAC, only their content


def page_checksum(page: bytes | bytearray) -> int:
    """Return the checksum of a page whose checksum field is zero.

    It is CRC-32 with the polynomial of zlib and the opposite bit order, without start value and final inversion.
    """
    reflected = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def ogg_parts(source: Source, start: int) -> list[Part]:
    """Return the audio streams of an Ogg file, which may follow each other."""
    groups: list[dict[int, _Stream]] = []
    end = start
    opening = False
    begun = 0
    for page in _pages(source, start):
        if page.flags & _FIRST:
            if not opening or page.serial in groups[-1]:
                groups.append({})
            groups[-1][page.serial] = _Stream(page.head, page.number - 1)
            begun += 1
            source.check_streams(begun)
        opening = bool(page.flags & _FIRST)
        if not groups or page.serial not in groups[-1]:
            raise source.error(f"is damaged: the page at byte {page.start} belongs to no stream that has begun")
        _append(source, groups[-1][page.serial], page)
        end = page.end
    if source.unaccounted(end, source.size):
        raise source.unknown_bytes(source.size - end, "after its last page")
    parts: list[Part] = []
    for group in groups:
        streams = [stream for stream in group.values() if stream.head.startswith(_AUDIO)]
        if len(streams) > 1:
            cause = f"holds {len(streams)} audio streams that run at the same time"
            raise source.error(cause, "take one of them: ffmpeg -i IN -map 0:a:0 OUT.flac")
        # For a group without audio, the decoder raises an error that says why.
        parts.extend(_part(source, stream) for stream in streams or list(group.values())[:1])
    return parts


def _pages(source: Source, position: int) -> Iterator[_Page]:
    """Yield the pages up to the first bytes that are no page, after which no other page may follow."""
    while position < source.size:
        header = source.read(position, _PAGE_HEADER.size + _MOST_SEGMENTS)
        if not header.startswith(b"OggS"):
            following = _next_page(source, position)
            if following is not None:
                raise source.error(f"is damaged: {following - position} bytes at byte {position} are no Ogg page")
            return
        if len(header) < _PAGE_HEADER.size:
            raise source.cut_off()
        _, _, flags, granule, serial, number, checksum, segments = _PAGE_HEADER.unpack_from(header)
        # The lacing values are the sizes of the segments; a packet ends with each one below 255.
        lacing = header[_PAGE_HEADER.size :][:segments]
        body = position + _PAGE_HEADER.size + segments
        end = body + sum(lacing)
        if len(lacing) < segments or end > source.size:
            raise source.cut_off()
        page = bytearray(source.read(position, end - position))
        page[_CHECKSUM] = bytes(4)
        if page_checksum(page) != checksum:
            raise source.error(f"is damaged: the page at byte {position} is not as it was written")
        head = bytes(page[body - position :][:64])
        packets = segments - lacing.count(255)
        yield _Page(position, body, end, flags, granule, serial, number, packets, head)
        position = end


def _next_page(source: Source, position: int) -> int | None:
    """Return where the next page begins; None if there is none."""
    size = 2**16
    while len(block := source.read(position, size)) > 4:
        found = block.find(b"OggS\0")
        if found >= 0:
            return position + found
        position += len(block) - 4
    return None


def _append(source: Source, stream: _Stream, page: _Page) -> None:
    """Add a page to its stream, in which no page may be missing and times never go back."""
    if stream.ended:
        cause = f"goes on at byte {page.start} after the page that is marked as the last"
        raise source.error(cause, CONVERT)
    # A radio relay sends the first pages, which hold the headers, and continues with the current programme.
    gap = page.number != stream.number + 1 & 0xFFFFFFFF
    if gap and stream.granule:
        raise source.error(f"misses pages before byte {page.start}", f"{COPY}, or close the gap: ffmpeg -i IN OUT.flac")
    stream.starts_late |= gap
    if page.granule > 0:
        most = _MOST_PACKET_SAMPLES.get(stream.head[:4]) or int.from_bytes(stream.head[_FLAC_BLOCK], "big") or 65_535
        stream.starts_late |= not stream.granule and page.granule > most * max(1, page.packets)
        if page.granule < stream.granule:
            raise source.error(f"has times that go back at byte {page.start}", CONVERT)
        stream.granule = page.granule
    stream.number, stream.last, stream.ended = page.number, (page.start, page.end), bool(page.flags & _LAST)
    start = page.body if stream.head.startswith(_FLAC) else page.start
    if stream.ranges and stream.ranges[-1][1] == start:
        start = stream.ranges.pop()[0]
    stream.ranges.append((start, page.end))


def _part(source: Source, stream: _Stream) -> Part:
    """Return the part of one stream."""
    front = front_of_ogg(source, stream.head)
    (start, end), *others = stream.ranges
    if stream.head.startswith(_FLAC):
        # libsndfile does not read FLAC in Ogg, but the content of its pages is a FLAC stream (RFC 9639, 10.1).
        flac_pieces = without_count(source, start + _FLAC_HEADER_BYTES, end, *others)
        return Part(flac_pieces, None if stream.starts_late else stream.granule, front=front)
    pieces: tuple[Piece, ...] = tuple(stream.ranges)
    if not stream.ended:
        # libsndfile refuses Opus whose last page is not marked as the last, as a recorder that was stopped leaves it.
        start, end = stream.last
        page = bytearray(source.read(start, end - start))
        page[5] |= _LAST
        page[_CHECKSUM] = bytes(4)
        page[_CHECKSUM] = page_checksum(page).to_bytes(4, "little")
        pieces = (*pieces[:-1], (stream.ranges[-1][0], start), bytes(page))
    # libsndfile stops at the last time stamp. Pages that it leaves unread show that the time stamps are too small.
    return Part(pieces, slack=_SLACK, starts_late=stream.starts_late, timed=True, front=front)
