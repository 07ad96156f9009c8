"""The pages of Ogg files (RFC 3533): each is checked, and each stream is given to the decoder on its own.

libogg skips pages that are damaged or missing without an error, and libsndfile reads the first of several streams only.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Final

from samekit.audio.flac import without_count
from samekit.audio.layout import front_of_ogg
from samekit.audio.parts import CONVERT, Part, Piece, cut_off, unknown_bytes
from samekit.audio.tags import read_at, unaccounted
from samekit.errors import AudioFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Samples by which a sound stream may miss its announced length: the longest block of Vorbis.
_SLACK: Final = 8192
# Samples that a packet holds at most: half of two such blocks, or 120 ms of Opus at 48 kHz.
_MOST_PACKET_SAMPLES: Final = {b"\x01vor": 8192, b"Opus": 5760}
_AUDIO: Final = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ", b"PCM     ")
_FIRST, _LAST = 2, 4
_FLAC: Final = b"\x7fFLAC"
# Before the signature of FLAC: the mark above, a version and the number of header packets.
_FLAC_HEADER_BYTES: Final = 9
_REVERSED: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class _Page:
    """A page and where it lies."""

    start: int
    end: int
    flags: int
    granule: int
    serial: int
    number: int
    packets: int
    """Packets that end on it."""
    head: bytes
    """First bytes of its content."""


@dataclass
class _Stream:
    """The pages of one logical stream."""

    head: bytes
    number: int
    granule: int = 0
    timed: bool = False
    starts_late: bool = False
    last: tuple[int, int] = (0, 0)
    ended: bool = False
    ranges: list[tuple[int, int]] = field(default_factory=list)

    @property
    def is_audio(self) -> bool:
        """Whether it holds samples."""
        return self.head.startswith(_AUDIO)


def page_checksum(page: bytes | bytearray) -> int:
    """Return the checksum of a page whose checksum field is zero.

    It is CRC-32 with the polynomial of zlib, bits in the other order, start value and final inversion left out.
    """
    reflected = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def ogg_parts(path: Path, file: BinaryIO, start: int, end: int) -> list[Part]:
    """Find the audio streams of an Ogg file, which may follow each other.

    Args:
        path: for messages.
        file: the open file.
        start: of the first page.
        end: of the file.

    Raises:
        AudioFileError: a page is damaged, missing or cut off, or two audio streams run at the same time.
    """
    groups: list[dict[int, _Stream]] = []
    last = start
    opening = False
    for page in _pages(path, file, start, end):
        if page.flags & _FIRST:
            if not opening or page.serial in groups[-1]:
                groups.append({})
            opening = True
            groups[-1][page.serial] = _Stream(page.head, page.number - 1)
        else:
            opening = False
        if not groups or page.serial not in groups[-1]:
            cause = f"is damaged: the page at byte {page.start} belongs to no stream that has begun"
            raise AudioFileError(f"{path}: {cause}; copy or download it again")
        _append(path, groups[-1][page.serial], page)
        last = page.end
    if unaccounted(file, last, end):
        raise unknown_bytes(path, end - last, "after its last page")
    parts: list[Part] = []
    for group in groups:
        streams = [stream for stream in group.values() if stream.is_audio]
        if len(streams) > 1:
            cause = f"holds {len(streams)} audio streams that run at the same time"
            raise AudioFileError(f"{path}: {cause}; take one of them: ffmpeg -i IN -map 0:a:0 OUT.flac")
        # A group without audio is left to libsndfile, which tells why it does not read it.
        parts.extend(_part(path, file, stream) for stream in streams or list(group.values())[:1])
    return parts


def _part(path: Path, file: BinaryIO, stream: _Stream) -> Part:
    """Return what the decoder gets to see of one stream."""
    front = front_of_ogg(path, stream.head)
    if stream.head.startswith(_FLAC):
        # libsndfile does not read FLAC in Ogg, but the content of its pages is a FLAC stream (RFC 9639, 10.1).
        bodies = tuple(_body(file, start, stop) for start, stop in _split(file, stream.ranges))
        pieces: tuple[Piece, ...] = ((bodies[0][0] + _FLAC_HEADER_BYTES, bodies[0][1]), *bodies[1:])
        frames = None if stream.starts_late else stream.granule
        return Part(without_count(file, pieces), frames, front=front)
    pieces = tuple((start, stop) for start, stop in stream.ranges)
    if not stream.ended:
        # libsndfile refuses Opus whose last page is not marked as the last; recorders that are stopped leave it so.
        start, stop = stream.last
        page = bytearray(read_at(file, start, stop - start))
        page[5] |= _LAST
        page[22:26] = bytes(4)
        page[22:26] = page_checksum(page).to_bytes(4, "little")
        pieces = (*pieces[:-1], (pieces[-1][0], start), bytes(page))
    # libsndfile stops at the last time stamp. The pages that it leaves unread show that the time stamps are too small.
    return Part(pieces, slack=_SLACK, starts_late=stream.starts_late, timed=True, front=front)


def _largest_flac_block(head: bytes) -> int:
    """Return how many samples a FLAC frame holds at most, by the STREAMINFO in the first packet (RFC 9639, 8.2)."""
    at = _FLAC_HEADER_BYTES + 10
    return int.from_bytes(head[at : at + 2], "big") or 65_535


def _split(file: BinaryIO, ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the pages in stretches of the file."""
    for position, end in ranges:
        start = position
        while start < end:
            header = read_at(file, start, 27 + 255)
            stop = start + 27 + header[26] + sum(header[27 : 27 + header[26]])
            yield start, stop
            start = stop


def _body(file: BinaryIO, start: int, stop: int) -> tuple[int, int]:
    """Return where the content of a page lies."""
    return start + 27 + read_at(file, start + 26, 1)[0], stop


def _append(path: Path, stream: _Stream, page: _Page) -> None:
    """Add a page to its stream, in which no page may be missing and times never go back."""
    if stream.ended:
        cause = f"goes on at byte {page.start} after the page that is marked as the last"
        raise AudioFileError(f"{path}: {cause}; {CONVERT}")
    gap = page.number != stream.number + 1 & 0xFFFFFFFF
    stream.number = page.number
    # A radio relay sends the first pages, with the headers, and goes on with what is played at the moment.
    if gap and stream.timed:
        cause = f"misses pages before byte {page.start}"
        raise AudioFileError(f"{path}: {cause}; copy or download it again, or close the gap: ffmpeg -i IN OUT.flac")
    stream.starts_late |= gap
    if page.granule > 0:
        most = _MOST_PACKET_SAMPLES.get(stream.head[:4]) or _largest_flac_block(stream.head)
        stream.starts_late |= not stream.timed and page.granule > most * max(1, page.packets)
        if page.granule < stream.granule:
            cause = f"has times that go back at byte {page.start}"
            raise AudioFileError(f"{path}: {cause}; {CONVERT}")
        stream.granule, stream.timed = page.granule, True
    stream.last, stream.ended = (page.start, page.end), bool(page.flags & _LAST)
    if stream.ranges and stream.ranges[-1][1] == page.start:
        stream.ranges[-1] = (stream.ranges[-1][0], page.end)
    else:
        stream.ranges.append((page.start, page.end))


def _pages(path: Path, file: BinaryIO, position: int, end: int) -> Iterator[_Page]:
    """Yield the pages from `position` to the end, or to what is no page.

    Raises:
        AudioFileError: a page is incomplete, or its checksum is wrong, or another page follows what is none.
    """
    while position < end:
        header = read_at(file, position, 27 + 255)
        if not header.startswith(b"OggS"):
            following = _next_page(file, position, end)
            if following is not None:
                cause = f"is damaged: {following - position} bytes at byte {position} are no Ogg page"
                raise AudioFileError(f"{path}: {cause}; copy or download it again")
            return
        lacing = header[27 : 27 + header[26]] if len(header) >= 27 else b""
        stop = position + 27 + len(lacing) + sum(lacing)
        if len(header) < 27 or len(lacing) < header[26] or stop > end:
            raise cut_off(path)
        page = read_at(file, position, stop - position)
        checksum = int.from_bytes(page[22:26], "little")
        if page_checksum(page[:22] + bytes(4) + page[26:]) != checksum:
            raise AudioFileError(
                f"{path}: is damaged: the page at byte {position} is not as it was written; copy or download it again"
            )
        yield _Page(
            position,
            stop,
            page[5],
            int.from_bytes(page[6:14], "little", signed=True),
            int.from_bytes(page[14:18], "little"),
            int.from_bytes(page[18:22], "little"),
            len(lacing) - lacing.count(255),
            page[27 + len(lacing) :][:64],
        )
        position = stop


def _next_page(file: BinaryIO, position: int, end: int) -> int | None:
    """Return where the next page begins; None if none does."""
    while position < end:
        block = read_at(file, position, 2**16)
        found = block.find(b"OggS\0")
        if found >= 0:
            return position + found
        position += max(1, len(block) - 4)
        if len(block) < 2**16:
            return None
    return None
