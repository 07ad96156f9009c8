"""Formats whose header counts the samples that follow it: AU, VOC, NIST SPHERE, SDS, AVR, MPC 2000 and WVE.

libsndfile raises no error if such a file holds less than its header counts, and decodes bytes after the samples as
samples. So the count and the size of the file are compared here.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Final, Literal

from samekit.audio.parts import Part
from samekit.audio.source import CONVERT

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.audio.source import Source

_HEADER_BYTES: Final = 1024
# AU: byte order by the first four bytes.
_AU: Final[dict[bytes, Literal["big", "little"]]] = {b".snd": "big", b"dns.": "little"}
# Sizes from here on mean an unknown length: 0x7FFFF000 (SoX) or 0xFFFFFFFF.
_AU_UNKNOWN: Final = 0x7FFFF000
# Creative Voice File: block types of samples (new or continued), silence, and samples with an extended header.
_VOC: Final = b"Creative Voice File\x1a"
_VOC_SOUND: Final = (1, 2, 3, 9)
_VOC_TYPES: Final = range(1, 10)
# A VOC block has 24 bits for its size. SoX writes the lower bits of longer sizes, and 8 too few in type 9. One byte
# ends the file.
_VOC_SIZES: Final = 2**24
_VOC_SLACK: Final = 9
# Limits the time that a malicious file of empty blocks takes.
_MOST_BLOCKS: Final = 10_000
# MIDI Sample Dump Standard: packets of 127 bytes with 120 bytes of samples follow a header of 21 bytes.
_SDS_HEADER, _SDS_PACKET, _SDS_SAMPLES = 21, 127, 120


def counted_part(source: Source) -> Part | None:
    """Return the only part of a file in one of these formats; None if it has another format, or counts nothing."""
    header = source.read(0, _HEADER_BYTES).ljust(_HEADER_BYTES, b"\0")
    last = source.before_tags(0, source.size)
    if header.startswith(_VOC):
        _check_voc(source, header, last)
        return Part(((0, last),))
    if header[:4] in _AU:
        return _au_part(source, header, last)
    end = next((samples_end(header) for mark, samples_end in _ENDS.items() if header.startswith(mark)), 0)
    if not end:
        return None
    if end > source.size:
        raise source.cut_off()
    # Padding is refused too, because other decoders decode it as samples.
    following = source.after_tags(end, source.size)
    if rest := source.before_tags(following, source.size) - following:
        raise source.unknown_bytes(rest, "after the samples that it counts")
    return Part(((0, end),))


def _au_part(source: Source, header: bytes, end: int) -> Part:
    """Return the part of an AU file."""
    offset, size = (int.from_bytes(header[at : at + 4], _AU[header[:4]]) for at in (4, 8))
    if size < _AU_UNKNOWN and offset + size > end:
        raise source.cut_off()
    if size == 0 and max(offset, 12) < end:
        # A recorder that was stopped too early leaves 0, and libsndfile would read nothing.
        return Part(((0, 8), b"\xff\xff\xff\xff", (12, end)), check_tail=True)
    return Part(((0, end),), check_tail=True)


def _check_voc(source: Source, header: bytes, end: int) -> None:
    """Refuse several blocks of samples in a VOC file: libsndfile would decode the headers between them as samples."""
    position = int.from_bytes(header[20:22], "little")
    found = False
    for _ in range(_MOST_BLOCKS):
        block = source.read(position, 4)
        if position >= end or len(block) < 4 or block[0] not in _VOC_TYPES:
            break
        position += 4 + int.from_bytes(block[1:], "little")
        if block[0] not in _VOC_SOUND:
            continue
        if found:
            cause = "holds its samples in several blocks, and libsndfile takes the headers between them for samples"
            raise source.error(cause, CONVERT)
        found = True
        if position > end:
            raise source.cut_off()
        if (end - position) % _VOC_SIZES <= _VOC_SLACK:
            return
    if found:
        cure = "split it there if files were joined, or take what it counts: ffmpeg -i IN OUT.flac"
        raise source.error(f"holds {end - position} bytes after the samples that it counts", cure)


def _nist_end(header: bytes) -> int:
    """Return where the samples of a NIST SPHERE file end, by its text header; 0 if the header does not tell."""
    names = rb"sample_count|channel_count|sample_n_bytes"
    fields = dict(re.findall(rb"^(%b) -\w+ (\d{1,15})\s*$" % names, header, re.MULTILINE))
    size = re.match(rb"NIST_1A\n\s*(\d{1,9})\s", header)
    coding = re.search(rb"^sample_coding -\w+ (\S+)", header, re.MULTILINE)
    if size is None or len(fields) < 3 or (coding and coding[1] not in (b"pcm", b"ulaw", b"mu-law", b"alaw")):
        return 0
    count = int(fields[b"sample_count"]) * int(fields[b"channel_count"]) * int(fields[b"sample_n_bytes"])
    return int(size[1]) + count if count else 0


def _sds_end(header: bytes) -> int:
    """Return where the packets of a MIDI sample dump end. Each byte holds seven bits of a sample."""
    if header[3] != 1 or not 0 < header[6] <= 28:
        return 0
    count = header[10] & 0x7F | (header[11] & 0x7F) << 7 | (header[12] & 0x7F) << 14
    packet_samples = _SDS_SAMPLES // -(-header[6] // 7)
    return _SDS_HEADER + -(-count // packet_samples) * _SDS_PACKET


def _avr_end(header: bytes) -> int:
    """Return where the samples of an Audio Visual Research file end: 128 bytes of header, and a count of frames."""
    stereo, bits, frames = struct.unpack_from(">HH10xI", header, 12)
    return 128 + frames * (2 if stereo else 1) * (bits // 8) if frames else 0


def _mpc_end(header: bytes) -> int:
    """Return where the samples of an Akai MPC 2000 file end: 42 bytes of header, and a count of frames of 16 bits."""
    stereo, frames = struct.unpack_from("<B8xI", header, 21)
    return 42 + frames * (4 if stereo == 1 else 2) if frames else 0


def _wve_end(header: bytes) -> int:
    """Return where the samples of a Psion file end: 32 bytes of header, and a count of bytes."""
    return 32 + int.from_bytes(header[18:22], "big")


_ENDS: Final[dict[bytes, Callable[[bytes], int]]] = {
    b"NIST_1A\n": _nist_end,
    b"\xf0\x7e": _sds_end,
    b"2BIT": _avr_end,
    b"\x01\x04": _mpc_end,
    b"ALawSoundFile**": _wve_end,
}
