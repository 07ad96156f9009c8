"""MPEG audio (MP3, MP2, MP1): find and count the frames, and pass them to the decoder without the bytes between them.

libmpg123 estimates the length of a file without a Xing header from its first frames, and libsndfile reads no more than
this estimate. So the frames are counted here, and a Xing header with the true count is put before them where needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from samekit.audio.parts import Part
from samekit.audio.source import CONVERT, COPY

if TYPE_CHECKING:
    from samekit.audio.source import Source

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
# Bytes of the side information of layer III, by [MPEG-1 or not, mono or not]; the Xing header follows it.
_SIDE_BYTES: Final = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}
# Bytes of the longest frame: layer II, 384 kbit/s, 32 kHz.
_LONGEST_FRAME: Final = 1729
# The least size of a frame that has room for a Xing header with the counts of frames and bytes.
_LEAST_INFO: Final = 60
# The least equal bytes between frames that count as padding.
_LEAST_PADDING: Final = 16
# Bytes 6 to 12 of a frame that may carry a header about the stream: the side information of silence.
_SILENT: Final = bytes(6)
# A frame header, and as two numbers the bytes 6 to 12.
_BEGINNING: Final = Struct(">IxxIH")
# Bytes that are read at a time, and bytes in which the first frame is looked for.
_BLOCK: Final = 2**17
_SEARCH: Final = 2**16


class _Header(NamedTuple):
    """The four bytes of a frame header."""

    size: int
    bit_rate: int
    samples: int
    rate: int
    mono: bool
    layer: int
    mpeg1: bool
    kind: tuple[int, int, bool]  # what the frames of one stream share: layer, rate, mono


@lru_cache(maxsize=4096)
def _header(word: int) -> _Header | None:
    """Read a frame header; None if it is not valid, or of free format (bit rate 0)."""
    version, layer = word >> 19 & 3, 4 - (word >> 17 & 3)
    bit_index, rate_index = word >> 12 & 15, word >> 10 & 3
    if word >> 21 != 0x7FF or version == 1 or layer == 4 or bit_index in (0, 15) or rate_index == 3 or word & 3 == 2:
        return None
    rate = _RATES[version][rate_index]
    bits, padding = _BIT_RATES[version == 3, layer][bit_index] * 1000, word >> 9 & 1
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    size = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    mono = word >> 6 & 3 == 3
    return _Header(size, bits, samples, rate, mono, layer, version == 3, (layer, rate, mono))


def _header_in(data: bytes, at: int = 0) -> _Header | None:
    return _header(int.from_bytes(data[at : at + 4], "big"))


class _Info(NamedTuple):
    """A silent frame that carries a Xing, Info or VBRI header."""

    frame: bytes
    at: int  # where the name of this header is in the frame
    flags: int  # fields of a Xing or Info header: 1 frames, 2 bytes, 4 seek table, 8 quality
    frames: int  # announced; 0 if it announces none
    trimmed: int  # samples of the encoder's delay and padding, by the LAME tag after the fields


def _read_info(frame: bytes) -> _Info | None:
    """Return the header about the stream that a frame carries; None if it carries none."""
    header = _header_in(frame)
    at = max(frame.find(name, 4, 48) for name in (b"Xing", b"Info", b"VBRI"))
    if header is None or header.layer != 3 or len(frame) < _LEAST_INFO or at < 0:
        return None
    if frame.startswith(b"VBRI", at):
        return _Info(frame, at, 0, int.from_bytes(frame[at + 14 : at + 18], "big"), 0)
    flags = frame[at + 7]
    frames = int.from_bytes(frame[at + 8 : at + 12], "big") if flags & 1 else 0
    tag = at + 8 + 4 * (flags & 1) + 2 * (flags & 2) + 25 * (flags & 4) + (flags & 8) // 2
    delays = int.from_bytes(frame[tag + 21 : tag + 24], "big") if len(frame) >= tag + 24 else 0
    return _Info(frame, at, flags, frames, (delays >> 12) + (delays & 0xFFF))


@dataclass
class _Stream:
    """Frames that follow each other and belong together."""

    header: _Header
    word: int  # the first frame header
    start: int  # its offset
    info: _Info | None
    frames: int = 0
    bit_rate_changes: bool = False
    last: int = 0  # offset of the last frame
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, end: int, last: int, frames: int) -> None:
        """Append frames that follow each other, the last of which begins at `last`."""
        self.frames += frames
        self.last = last
        if self.ranges and self.ranges[-1][1] == start:
            start = self.ranges.pop()[0]
        self.ranges.append((start, end))

    def drop_last(self) -> None:
        """Remove the last frame, unless it is the only one."""
        if self.frames > 1:
            self.frames -= 1
            start, _ = self.ranges.pop()
            if start < self.last:
                self.ranges.append((start, self.last))


def first_frame(source: Source, start: int, end: int, *, search: bool) -> int | None:
    """Return the offset of the first MPEG frame, at `start` or, with `search`, after it; None if there is none."""
    block = source.read(start, min(end - start, _SEARCH if search else 4))
    tags = source.before_tags(start, end)
    at = block.find(b"\xff") if search else 0
    while 0 <= at <= len(block) - 4:
        header = _header_in(block, at)
        if header and _continues(source, header, start + at, end, tags):
            return start + at
        at = block.find(b"\xff", at + 1) if search else -1
    return None


def is_free_format(source: Source, start: int) -> bool:
    """Return whether a frame header of free format (bit rate 0) is at `start`. Such headers do not tell their size."""
    word = int.from_bytes(source.read(start, 4), "big")
    return word >> 12 & 15 == 0 and _header(word | 1 << 12) is not None


def _continues(source: Source, header: _Header, position: int, end: int, tags: int) -> bool:
    """Return whether a frame is followed by two of its kind, by tags or by the end; tags at the end begin at `tags`."""
    for _ in range(2):
        position += header.size
        if position >= end - 3:
            return position <= end
        following = _header_in(source.read(position, 4))
        if following is None:
            return source.after_tags(position, end) > position or tags - position <= _LONGEST_FRAME
        if following.kind != header.kind:
            return False
        header = following
    return True


def mpeg_parts(source: Source, start: int, end: int) -> list[Part]:
    """Return the streams of MPEG audio between `start` and `end`: one, or several that were joined."""
    streams = _find_streams(source, start, source.before_tags(start, end))
    return [_part(source, stream) for stream in streams if stream.frames]


def _find_streams(source: Source, position: int, end: int) -> list[_Stream]:
    """Return the streams, by reading each frame header up to `end`."""
    streams: list[_Stream] = []
    seconds = 0.0
    damaged_at: float | None = None
    block, begin = b"", position
    while position < end:
        at = position - begin
        if at + _LONGEST_FRAME > len(block):
            block, begin, at = source.read(position, min(_BLOCK, end - position)), position, 0
        word = int.from_bytes(block[at : at + 4], "big")
        header = _header(word)
        if header is None or position + header.size > end:
            gap, position = position, _after_gap(source, position, end, seconds)
            block = b""
            if streams and source.after_tags(gap, end) == gap and first_frame(source, position, end, search=False):
                if not _is_join(source, streams[-1], gap, position):
                    if damaged_at is not None:
                        cause = f"is damaged after {damaged_at:.1f} s and again after {seconds:.1f} s"
                        cure = f"{COPY}, or take what can be decoded: ffmpeg -i IN OUT.flac"
                        raise source.error(f"{cause} (bytes between the frames are no MPEG audio)", cure)
                    damaged_at = seconds
                # The end of the frame before the gap is missing: libmpg123 would decode noise and print an error.
                streams[-1].drop_last()
            continue
        # Frames with a header about the stream are silent: zeros follow the frame header and its checksum.
        info = _read_info(block[at : at + header.size]) if block[at + 6 : at + 12] == _SILENT else None
        if info or not streams or streams[-1].header.kind != header.kind:
            streams.append(_Stream(header, word, position, info))
            source.check_streams(len(streams))
        if not info:
            seconds += _add_frames(streams[-1], block, begin, position, end) * header.samples / header.rate
            position = streams[-1].ranges[-1][1]
        else:
            position += header.size
    return streams


def _add_frames(stream: _Stream, block: bytes, begin: int, position: int, end: int) -> int:
    """Append the frame at `position` to a stream, and those like it that follow; return how many they are.

    `block` holds the bytes from `begin` on. A frame that may carry a header about the stream is left out.
    """
    kind, bit_rate = stream.header.kind, stream.header.bit_rate
    at = last = position - begin
    most = min(len(block), end - begin) - _LONGEST_FRAME
    frames = 0
    word = int.from_bytes(block[at : at + 4], "big")
    # Few headers of a stream differ, and this loop takes most of the time of opening a file.
    sizes: dict[int, int] = {}
    while True:
        if word not in sizes:
            header = _header(word)
            if header is None or header.kind != kind:
                break
            stream.bit_rate_changes |= header.bit_rate != bit_rate
            sizes[word] = header.size
        frames += 1
        last, at = at, at + sizes[word]
        if at > most:
            break
        word, silent, silent_too = _BEGINNING.unpack_from(block, at)
        if not silent and not silent_too:
            break
    stream.add(position, begin + at, begin + last, frames)
    return frames


def _after_gap(source: Source, position: int, end: int, seconds: float) -> int:
    """Return where the next frame begins after bytes that are a tag, padding or shorter than a frame."""
    following = source.after_tags(position, end)
    if following > position:
        return following
    if source.unaccounted(position, end) <= _LONGEST_FRAME:
        return end
    found = first_frame(source, position + 1, min(end, position + 1 + _SEARCH), search=True)
    if found is None:
        raise source.unknown_bytes(end - position, f"after {seconds:.1f} s")
    if found - position > _LONGEST_FRAME:
        raise source.error(f"is damaged after {seconds:.1f} s ({found - position} bytes are no MPEG audio)")
    return found


def _is_join(source: Source, stream: _Stream, gap: int, position: int) -> bool:
    """Return whether files were joined between `gap` and the frame at `position`.

    Signs of a join are padding, a tag, a frame about the stream, and frames of another kind.
    """
    frame = source.read(position, _LONGEST_FRAME)
    header = _header_in(frame)
    if header is None or header.kind != stream.header.kind or _read_info(frame[: header.size]):
        return True
    between = source.read(gap, position - gap)
    padding = len(between) >= _LEAST_PADDING and between.count(between[:1]) == len(between)
    return padding or b"ID3" in between or b"TAG" in between


def _part(source: Source, stream: _Stream) -> Part:
    """Return the part of one stream."""
    header, info = stream.header, stream.info
    # Some encoders also count the frame that carries the header.
    if info and info.frames > stream.frames + 1:
        total, held = (frames * header.samples / header.rate for frames in (info.frames, stream.frames))
        raise source.error(f"is cut off, it announces {total:.1f} s and holds {held:.1f} s")
    if header.layer != 3 and stream.bit_rate_changes:
        # The length that libmpg123 estimates from the first frames is wrong, and only MP3 has a Xing header.
        cause = f"is MPEG layer {'I' * header.layer} and changes its bit rate, so libsndfile counts it wrong"
        raise source.error(cause, CONVERT)
    count_frame = _with_count(stream) if header.layer == 3 else b""
    frames = stream.frames * header.samples - (info.trimmed if info else 0)
    slack = 2 * header.samples
    if info and count_frame == info.frame and stream.start + len(count_frame) == stream.ranges[0][0]:
        # Nothing is to be corrected, so libsndfile may read the file itself.
        (_, stop), *others = stream.ranges
        return Part(((stream.start, stop), *others), frames, slack)
    # libmpg123 reads a stream of one frame only if a Xing frame precedes it.
    if info or (count_frame and stream.frames == 1):
        return Part((count_frame, *stream.ranges), frames, slack)
    return Part(tuple(stream.ranges), frames, slack, count_frame)


def _with_count(stream: _Stream) -> bytes:
    """Return a frame that counts the frames of a stream: its own one corrected, or a new one."""
    if stream.info and stream.info.flags & 3 == 3:
        frame, at = bytearray(stream.info.frame), stream.info.at
    else:
        # Layer III without checksum, padded, at the smallest bit rate whose frame has room for the fields.
        words = (stream.word & ~0xF000 | 0x10200 | index << 12 for index in range(1, 15))
        sizes = ((word, header.size) for word in words if (header := _header(word)))
        word, size = next((word, size) for word, size in sizes if size >= _LEAST_INFO)
        frame = bytearray(word.to_bytes(4, "big").ljust(size, b"\0"))
        at = 4 + _SIDE_BYTES[stream.header.mpeg1, stream.header.mono]
        frame[at : at + 8] = b"Xing\0\0\0\3"
    size = len(frame) + sum(end - start for start, end in stream.ranges)
    frame[at + 8 : at + 12] = stream.frames.to_bytes(4, "big")
    frame[at + 12 : at + 16] = (size & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(frame)
