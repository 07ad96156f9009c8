"""The frames of MPEG audio (MP3, MP2, MP1): found by their headers, counted, and given to the decoder without the rest.

libmpg123 estimates the length of a file without a Xing header from its first frames, and libsndfile reads no more than
this estimate. So the frames are counted here, and a Xing header with the true count is put before them where needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO, Final

from samekit.audio.parts import CONVERT, Part, Piece, unknown_bytes
from samekit.audio.tags import after_tags, before_tags, read_at, unaccounted
from samekit.errors import AudioFileError

if TYPE_CHECKING:
    from pathlib import Path

# ISO/IEC 11172-3, 2.4.2.3, and 13818-3: kbit/s by [MPEG-1 or not, layer] and index; Hz by version and index.
_RATES: Final = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_LOW_RATES: Final = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_BIT_RATES: Final = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): _LOW_RATES,
    (False, 3): _LOW_RATES,
}
_ID3V1_BYTES: Final = 128
# Bytes of the longest frame: layer II, 384 kbit/s, 32 kHz.
_LONGEST_FRAME: Final = 1729
# Fewer equal bytes than this between frames are not taken for padding.
_LEAST_PADDING: Final = 16
# Bytes that are read at a time.
_BLOCK: Final = 2**17
# Where the first frame is looked for.
_SEARCH: Final = 2**16


@dataclass(frozen=True)
class _Header:
    """What the four bytes of a frame header say."""

    size: int
    bit_rate: int
    samples: int
    rate: int
    mono: bool
    layer: int
    mpeg1: bool

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What the frames of one stream share."""
        return self.layer, self.rate, self.mono


@lru_cache(maxsize=4096)
def _header(word: int) -> _Header | None:
    """Read a frame header; None if it is none, or one of free format (bit rate 0)."""
    version, layer = word >> 19 & 3, 4 - (word >> 17 & 3)
    bit_index, rate_index = word >> 12 & 15, word >> 10 & 3
    if word >> 21 != 0x7FF or version == 1 or layer == 4 or bit_index in (0, 15) or rate_index == 3 or word & 3 == 2:
        return None
    rate = _RATES[version][rate_index]
    bits, padding = _BIT_RATES[version == 3, layer][bit_index] * 1000, word >> 9 & 1
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    size = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    return _Header(size, bits, samples, rate, word >> 6 & 3 == 3, layer, version == 3)


@dataclass
class _Stream:
    """Frames that follow each other and belong together."""

    header: _Header
    word: int
    info: bytes = b""
    """The frame that carries a Xing, Info or VBRI header instead of sound."""
    frames: int = 0
    bit_rate_changes: bool = False
    last: int = 0
    """Offset of the last frame."""
    ranges: list[list[int]] = field(default_factory=list)

    def drop_last(self) -> None:
        """Remove the last frame."""
        if self.frames > 1:
            self.frames -= 1
            self.ranges[-1][1] = self.last
            if self.ranges[-1][0] == self.last:
                self.ranges.pop()

    def add(self, start: int, end: int) -> None:
        """Append a frame."""
        self.frames += 1
        self.last = start
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1][1] = end
        else:
            self.ranges.append([start, end])


def first_frame(file: BinaryIO, start: int, end: int, *, search: bool) -> int | None:
    """Return the offset of the first MPEG frame, which another one or the end follows; None if there is none.

    Args:
        file: the open file.
        start: where to look.
        end: of the bytes that may be frames.
        search: look further than at `start` alone.
    """
    block = read_at(file, start, min(end - start, _SEARCH if search else 4))
    tags = before_tags(file, start, end)
    at = block.find(b"\xff") if search else 0
    while 0 <= at <= len(block) - 4:
        header = _header(int.from_bytes(block[at : at + 4], "big"))
        if header and _continues(file, header, start + at, end, tags):
            return start + at
        at = block.find(b"\xff", at + 1) if search else -1
    return None


def is_free_format(file: BinaryIO, start: int) -> bool:
    """Whether a frame header of free format (bit rate 0) is at `start`; such frames tell no size."""
    word = int.from_bytes(read_at(file, start, 4), "big")
    return word >> 12 & 15 == 0 and _header(word | 1 << 12) is not None


def _continues(file: BinaryIO, header: _Header, position: int, end: int, tags: int) -> bool:
    """Whether a frame is followed by two of its kind, by tags or by the end; tags at the end begin at `tags`."""
    for _ in range(2):
        position += header.size
        if position >= end - 3:
            return position <= end
        following = _header(int.from_bytes(read_at(file, position, 4), "big"))
        if following is None or following.kind != header.kind:
            tagged = after_tags(file, position, end) > position
            return following is None and (tagged or tags - position <= _LONGEST_FRAME)
        header = following
    return True


def mpeg_parts(path: Path, file: BinaryIO, start: int, end: int, *, whole_file: bool) -> list[Part]:
    """Find the streams of an MPEG file: one, or several that were joined.

    Args:
        path: for messages.
        file: the open file.
        start: of the first frame.
        end: of the bytes that may be frames.
        whole_file: nothing but tags precedes `start`, and `end` is that of the file.

    Raises:
        AudioFileError: a stretch longer than a frame is neither frame nor tag, shorter ones interrupt the frames
            twice, or a stream lacks its end.
    """
    streams = _walk(path, file, start, before_tags(file, start, end))
    # libmpg123 passes over an ID3v1 tag at the end; whatever else is there makes it complain to standard error.
    plain = whole_file and len(streams) == 1 and len(streams[0].ranges) == 1 and _only_id3v1(file, streams[0], end)
    return [_part(path, stream, plain=plain) for stream in streams]


def _only_id3v1(file: BinaryIO, stream: _Stream, end: int) -> bool:
    """Whether nothing or an ID3v1 tag follows the frames."""
    last = stream.ranges[-1][1]
    return end == last or (end == last + _ID3V1_BYTES and read_at(file, last, 3) == b"TAG")


def _walk(path: Path, file: BinaryIO, position: int, end: int) -> list[_Stream]:
    """Go from frame to frame."""
    streams: list[_Stream] = []
    seconds = 0.0
    damaged_at: float | None = None
    block, begin = b"", position
    while position < end:
        at = position - begin
        if at + _LONGEST_FRAME > len(block):
            block, begin, at = read_at(file, position, min(_BLOCK, end - position)), position, 0
        word = int.from_bytes(block[at : at + 4], "big")
        header = _header(word)
        if header is None or position + header.size > end:
            gap, position = position, _after_gap(path, file, position, end, seconds)
            block = b""
            if streams and after_tags(file, gap, end) == gap and first_frame(file, position, end, search=False):
                if not _is_join(file, streams[-1], gap, position):
                    if damaged_at is not None:
                        raise _damaged_twice(path, damaged_at, seconds)
                    damaged_at = seconds
                # The end of the frame before the gap is missing; libmpg123 would make noise of it, and complain.
                streams[-1].drop_last()
            continue
        # Such frames are silent: after the header and its checksum follow zeros.
        info = b"" if any(block[at + 6 : at + 12]) else _info_frame(block[at : at + header.size])
        if info or not streams or streams[-1].header.kind != header.kind:
            streams.append(_Stream(header, word, info))
        if not info:
            streams[-1].bit_rate_changes |= header.bit_rate != streams[-1].header.bit_rate
            streams[-1].add(position, position + header.size)
            seconds += header.samples / header.rate
        position += header.size
    return [stream for stream in streams if stream.frames]


def _is_join(file: BinaryIO, stream: _Stream, gap: int, position: int) -> bool:
    """Whether files were joined between `gap` and the frame at `position`.

    Signs of a join are padding, a tag, an information frame, and frames of another kind.
    """
    between = read_at(file, gap, position - gap)
    frame = read_at(file, position, _LONGEST_FRAME)
    header = _header(int.from_bytes(frame[:4], "big"))
    if header is None or header.kind != stream.header.kind or _info_frame(frame[: header.size]):
        return True
    padding = len(between) >= _LEAST_PADDING and between.count(between[:1]) == len(between)
    return padding or b"ID3" in between or b"TAG" in between


def _damaged_twice(path: Path, first: float, second: float) -> AudioFileError:
    """Return the error of a stream whose frames are interrupted in several places."""
    cause = (
        f"is damaged after {first:.1f} s and again after {second:.1f} s (bytes between the frames are no MPEG audio)"
    )
    cure = "copy or download it again, or take what can be decoded: ffmpeg -i IN OUT.flac"
    return AudioFileError(f"{path}: {cause}; {cure}")


def _after_gap(path: Path, file: BinaryIO, position: int, end: int, seconds: float) -> int:
    """Return where the frames go on after something else, which must be a tag, padding or shorter than a frame."""
    following = after_tags(file, position, end)
    if following > position:
        return following
    if unaccounted(file, position, end) <= _LONGEST_FRAME:
        return end
    found = first_frame(file, position + 1, min(end, position + 1 + _SEARCH), search=True)
    if found is not None and found - position <= _LONGEST_FRAME:
        return found
    if found is None:
        raise unknown_bytes(path, end - position, f"after {seconds:.1f} s")
    cause = f"is damaged after {seconds:.1f} s ({found - position} bytes are no MPEG audio)"
    raise AudioFileError(f"{path}: {cause}; copy or download it again")


def _info_frame(frame: bytes) -> bytes:
    """Return the frame if it carries a header about the stream, else nothing."""
    header = _header(int.from_bytes(frame[:4], "big"))
    return frame if header and header.layer == 3 and len(frame) >= 60 and _mark(frame) else b""


def _mark(frame: bytes) -> int:
    """Return the offset of the mark of a Xing, Info or VBRI header in a frame; 0 if there is none."""
    offsets = [frame.find(mark, 4, 48) for mark in (b"Xing", b"Info", b"VBRI")]
    return max(0, *offsets)


def _announced(info: bytes) -> int | None:
    """Return the number of frames that a Xing, Info or VBRI header announces; None if it does not."""
    at = _mark(info)
    if info[at : at + 4] == b"VBRI":
        return int.from_bytes(info[at + 14 : at + 18], "big") or None
    if not info or not info[at + 7] & 1:
        return None
    return int.from_bytes(info[at + 8 : at + 12], "big") or None


def _part(path: Path, stream: _Stream, *, plain: bool) -> Part:
    """Choose what the decoder gets to see of a stream."""
    announced = _announced(stream.info)
    # Some encoders count the frame with the header too.
    if announced is not None and announced > stream.frames + 1:
        total = announced * stream.header.samples / stream.header.rate
        held = stream.frames * stream.header.samples / stream.header.rate
        cause = f"is cut off, it announces {total:.1f} s and holds {held:.1f} s"
        raise AudioFileError(f"{path}: {cause}; copy or download it again")
    if stream.header.layer != 3 and stream.bit_rate_changes:
        # The length that libmpg123 estimates from the first frames is wrong, and only MP3 has a Xing header.
        cause = f"is MPEG layer {'I' * stream.header.layer} and changes its bit rate, so libsndfile counts it wrong"
        raise AudioFileError(f"{path}: {cause}; {CONVERT}")
    samples = stream.frames * stream.header.samples
    pieces: tuple[Piece, ...] = tuple((start, stop) for start, stop in stream.ranges)
    size = sum(stop - start for start, stop in stream.ranges)
    if stream.header.layer == 3:
        pieces = (_with_count(stream, size), *pieces)
    exact = announced is not None and announced - stream.frames in (0, 1) and _size_fits(stream.info, size)
    trimmed = _trimmed(stream.info)
    slack = 2 * stream.header.samples
    # libmpg123 does not read a file of one frame, and complains; with a Xing frame in front it does.
    prefer_file = plain and stream.frames > 1 and (exact or not stream.info)
    return Part(pieces, samples - trimmed, slack, prefer_file=prefer_file)


def _size_fits(info: bytes, size: int) -> bool:
    """Whether an information frame announces the right number of bytes, or none; libmpg123 complains from 1 % on."""
    at = _mark(info)
    if info[at : at + 4] == b"VBRI" or not info[at + 7] & 2:
        return True
    field = at + 8 + 4 * (info[at + 7] & 1)
    return abs(int.from_bytes(info[field : field + 4], "big") - size - len(info)) <= size // 200 + len(info)


def _trimmed(info: bytes) -> int:
    """Return how many samples an encoder's delay and padding take, as its LAME tag says; at most what it can say."""
    at = _mark(info)
    if not info or info[at : at + 4] == b"VBRI" or len(info) < at + 144:
        return 0
    flags = info[at + 7]
    tag = at + 8 + 4 * (flags & 1) + 2 * (flags & 2) + 25 * (flags & 4) + (flags & 8) // 2
    delays = int.from_bytes(info[tag + 21 : tag + 24], "big")
    return (delays >> 12) + (delays & 0xFFF)


def _with_count(stream: _Stream, size: int) -> bytes:
    """Return an information frame with the true count: the stream's own one corrected, or a new one."""
    frame, at = bytearray(stream.info), _mark(stream.info)
    if not frame or frame[at : at + 4] == b"VBRI" or frame[at + 7] & 3 != 3:
        word = stream.word | 0x10000 | 0x200
        # The smallest bit rate whose frame has room for the fields.
        for index in range(1, 15):
            word = word & ~0xF000 | index << 12
            header = _header(word)
            if header and header.size >= 64:
                break
        frame = bytearray(_header(word).size)  # type: ignore[union-attr]  # the fields of a valid header
        frame[:4] = word.to_bytes(4, "big")
        side = (17 if stream.header.mono else 32) if stream.header.mpeg1 else (9 if stream.header.mono else 17)
        at = 4 + side
        frame[at : at + 8] = b"Xing\0\0\0\3"
    frame[at + 8 : at + 12] = stream.frames.to_bytes(4, "big")
    frame[at + 12 : at + 16] = ((size + len(frame)) & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(frame)
