"""Which channels of a file are left and right. Containers order the channels of surround sound differently."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from samekit.audio.source import Source
    from samekit.errors import AudioFileError

Front = tuple[int, int]
"""Indices of the left and the right channel."""

# Vorbis I, 4.3.9, and RFC 7845, 5.1.1.2: with these channel counts the centre lies between left and right.
_CENTRE_SECOND: Final = (3, 5, 6, 7, 8)
# RFC 7845, 5.1.1.1, and RFC 8486, 3: channel mapping families of Opus.
_VORBIS_ORDER, _AMBISONICS = 1, (2, 3)
# The stereo downmix of FFmpeg and Core Audio (libavutil/channel_layout.h, AV_CH_STEREO_LEFT and AV_CH_STEREO_RIGHT).
_DOWNMIX: Final = (0x20000000, 0x40000000)
# Left and right in a WAVEFORMATEXTENSIBLE channel mask: front, back, front of centre, side, top front, top back.
_PAIRS: Final = ((0x1, 0x2), (0x10, 0x20), (0x40, 0x80), (0x200, 0x400), (0x1000, 0x4000), (0x8000, 0x20000), _DOWNMIX)
# Core Audio channel layout tags (CoreAudioBaseTypes.h), upper 16 bits: where left and right are.
_USE_DESCRIPTIONS, _USE_MASK, _MONO, _UNKNOWN = 0, 1, 100, 0xFFFF
_RANGES: Final = (range(101, 104), range(105, 107), range(108, 114), range(128, 141), range(145, 149))
_LEFT_RIGHT_FIRST: Final = frozenset((_MONO, 115, 117, 118, 121, 122, 125, 126, 153, _UNKNOWN)).union(*_RANGES)
_OTHER_PLACES: Final[dict[int, Front]] = {
    **dict.fromkeys((114, 116, 120, 124, 141, 142, 143, 144, 183, 184), (1, 2)),  # C L R ...
    **dict.fromkeys((119, 123, 150, 151, 152, 154, 155, 156), (0, 2)),  # L C R ...
    127: (3, 4),  # C Lc Rc L R ...
}
_LABEL_LEFT, _LABEL_RIGHT = 1, 2


def no_front(source: Source, what: str) -> AudioFileError:
    """Return the error of a file without a left and a right channel."""
    return source.error(f"{what}, so it has no left and right channel", "mix it to stereo: ffmpeg -i IN -ac 2 OUT.flac")


def front_of_ogg(source: Source, header: bytes) -> Front:
    """Return the front channels of a Vorbis, Opus or FLAC stream in Ogg, by its first packet."""
    channels = 0
    if header.startswith(b"OpusHead") and len(header) >= 19:
        family = header[18]
        if family in _AMBISONICS:
            raise no_front(source, "holds an ambisonic sound field")
        channels = header[9] if family == _VORBIS_ORDER else 0
    elif header.startswith(b"\x01vorbis") and len(header) >= 12:
        channels = header[11]
    return (0, 2) if channels in _CENTRE_SECOND else (0, 1)


def front_of_mask(source: Source, mask: int, channels: int) -> Front:
    """Return the front channels by a channel mask, whose bits are the channels in order."""
    bits = [1 << bit for bit in range(32) if mask >> bit & 1]
    # A mask with another number of channels is wrong, and an empty one says nothing.
    if channels < 2 or len(bits) != channels:
        return 0, 1
    for left, right in _PAIRS:
        if left in bits and right in bits:
            return bits.index(left), bits.index(right)
    raise no_front(source, f"holds {channels} channels of mask {mask:#x}")


def front_of_core_audio(source: Source, chunk: bytes, channels: int) -> Front:
    """Return the front channels by the `chan` chunk of a CAF or the `CHAN` chunk of an AIFF file."""
    if channels < 2 or len(chunk) < 12:
        return 0, 1
    tag, mask = (int.from_bytes(chunk[at : at + 4], "big") for at in (0, 4))
    kind = tag >> 16
    if tag == _USE_MASK << 16:
        return front_of_mask(source, mask, channels)
    if tag == _USE_DESCRIPTIONS:
        # Descriptions follow their count at 8. Each takes 20 bytes: label, flags and three coordinates.
        labels = [int.from_bytes(chunk[at : at + 4], "big") for at in range(12, len(chunk) - 19, 20)]
        if _LABEL_LEFT in labels and _LABEL_RIGHT in labels:
            return labels.index(_LABEL_LEFT), labels.index(_LABEL_RIGHT)
        if not labels:
            return 0, 1
    if kind in _LEFT_RIGHT_FIRST:
        return 0, 1
    if kind in _OTHER_PLACES and max(_OTHER_PLACES[kind]) < channels:
        return _OTHER_PLACES[kind]
    raise no_front(source, f"holds {channels} channels of Core Audio layout {tag:#x}")
