"""Which channels of a file are left and right. Containers order the channels of surround sound differently."""

from __future__ import annotations

from typing import Final

from samekit.errors import AudioFileError

Front = tuple[int, int]
"""Indices of the left and the right channel."""

# Vorbis I, 4.3.9, and RFC 7845, 5.1.1.2: with these counts the centre lies between left and right.
_CENTRE_SECOND: Final = (3, 5, 6, 7, 8)
# The stereo downmix of FFmpeg and Core Audio (libavutil/channel_layout.h, AV_CH_STEREO_LEFT and AV_CH_STEREO_RIGHT).
_DOWNMIX: Final = (0x20000000, 0x40000000)
# Left and right in a WAVEFORMATEXTENSIBLE channel mask: front, back, front of centre, side, top front, top back.
_PAIRS: Final = ((0x1, 0x2), (0x10, 0x20), (0x40, 0x80), (0x200, 0x400), (0x1000, 0x4000), (0x8000, 0x20000), _DOWNMIX)
# Core Audio channel layout tags (CoreAudioBaseTypes.h), upper 16 bits: where left and right are.
_LEFT_RIGHT_FIRST: Final = frozenset(
    (
        101,
        102,
        103,
        105,
        106,
        *range(108, 114),
        115,
        117,
        118,
        121,
        122,
        125,
        126,
        *range(128, 141),
        *range(145, 149),
        153,
    )
)
_OTHER_PLACES: Final[dict[int, Front]] = {
    **dict.fromkeys((114, 116, 120, 124, 141, 142, 143, 144, 183, 184), (1, 2)),  # C L R ...
    **dict.fromkeys((119, 123, 150, 151, 152, 154, 155, 156), (0, 2)),  # L C R ...
    127: (3, 4),  # C Lc Rc L R ...
}
_USE_DESCRIPTIONS, _USE_MASK, _UNKNOWN, _MONO = 0, 1, 0xFFFF, 100
_LABEL_LEFT, _LABEL_RIGHT, _MOST_CHANNELS = 1, 2, 1024


def no_front(path: object, what: str) -> AudioFileError:
    """Return the error of a file without a left and a right channel."""
    cause = f"{what}, so it has no left and right channel"
    return AudioFileError(f"{path}: {cause}; mix it to stereo: ffmpeg -i IN -ac 2 OUT.flac")


def front_of_ogg(path: object, header: bytes) -> Front:
    """Return the front channels of a Vorbis, Opus or FLAC stream in Ogg, by its first packet.

    Raises:
        AudioFileError: the channels are those of a sound field.
    """
    if header.startswith(b"OpusHead") and len(header) >= 19:
        # RFC 7845, 5.1.1, and RFC 8486: mapping family 2 and 3 are ambisonics, 255 tells nothing.
        channels, family = header[9], header[18]
        if family in (2, 3):
            raise no_front(path, "holds an ambisonic sound field")
        return (0, 2) if family == 1 and channels in _CENTRE_SECOND else (0, 1)
    if header.startswith(b"\x01vorbis") and len(header) >= 12:
        return (0, 2) if header[11] in _CENTRE_SECOND else (0, 1)
    return 0, 1


def front_of_mask(path: object, mask: int, channels: int) -> Front:
    """Return the front channels by a channel mask, whose bits are the channels in order.

    Raises:
        AudioFileError: the mask has no pair of left and right.
    """
    bits = [1 << bit for bit in range(32) if mask >> bit & 1]
    # A mask of another size is wrong, and none tells nothing.
    if channels < 2 or len(bits) != channels:
        return 0, 1
    for left, right in _PAIRS:
        if left in bits and right in bits:
            return bits.index(left), bits.index(right)
    raise no_front(path, f"holds {channels} channels of mask {mask:#x}")


def front_of_core_audio(path: object, chunk: bytes, channels: int) -> Front:
    """Return the front channels by the `chan` chunk of a CAF or the `CHAN` chunk of an AIFF file.

    Raises:
        AudioFileError: the layout has no left and right, or is not known.
    """
    if channels < 2 or len(chunk) < 12:
        return 0, 1
    tag, mask, count = (int.from_bytes(chunk[at : at + 4], "big") for at in (0, 4, 8))
    kind = tag >> 16
    if tag == _USE_MASK << 16:
        return front_of_mask(path, mask, channels)
    if tag == _USE_DESCRIPTIONS:
        # A description takes 20 bytes: label, flags and three coordinates.
        labels = [int.from_bytes(chunk[at : at + 4], "big") for at in range(12, len(chunk) - 19, 20)]
        if _LABEL_LEFT in labels and _LABEL_RIGHT in labels and count <= _MOST_CHANNELS:
            return labels.index(_LABEL_LEFT), labels.index(_LABEL_RIGHT)
        if not labels:
            return 0, 1
    if kind in _LEFT_RIGHT_FIRST or kind in (_UNKNOWN, _MONO):
        return 0, 1
    if kind in _OTHER_PLACES and max(_OTHER_PLACES[kind]) < channels:
        return _OTHER_PLACES[kind]
    raise no_front(path, f"holds {channels} channels of Core Audio layout {tag:#x}")
