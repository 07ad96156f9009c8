"""Check the structure of files that FFmpeg reads.

FFmpeg reads what is left of a file that is cut off, without an error. And it allocates memory for as many samples as a
file announces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from samekit.audio.av_formats import ADTS_HEADER, TS_PACKET, adts_size
from samekit.audio.source import CONVERT

if TYPE_CHECKING:
    from samekit.audio.source import Source
    from samekit.errors import AudioFileError

# Boxes that contain boxes.
_PARENTS: Final = (b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl", b"moof", b"traf")
# FFmpeg also accepts tables in these boxes, whose contents are often invalid, because few programs read them.
_LOOSE_PARENTS: Final = (b"udta", b"meta", b"ilst", b"dinf", b"mvex", b"tref", b"wave", b"sinf", b"schi")
_TABLES: Final = (b"stsz", b"stz2", b"trun", b"elst")
# FFmpeg decompresses such a header in memory, whatever its size, and reads its tables.
_COMPRESSED: Final = b"cmov"
# Larger than the descriptions of codecs in any file.
_MOST_DESCRIPTION_BYTES: Final = 2**20
# Limits the time that a malicious file of empty boxes takes, and the memory that one of many edits takes.
_MOST_BOXES, _MOST_EDITS = 1_000_000, 100
# Bytes of the content of a box that tell its size or unit.
_HEAD_BYTES: Final = 24
# FFmpeg refuses boxes that are nested more than ten deep.
_MOST_DEPTH: Final = 16


def check_structure(source: Source, demuxer: str) -> float:
    """Raise AudioFileError if the end of the file is missing, or if a table announces more than the file can hold.

    Returns:
        The unit in seconds in which an MP4 file gives the length of an edit; 0 for other files.
    """
    if demuxer == "mov":
        checker = _BoxChecker(source)
        checker.check(0, source.before_tags(0, source.size))
        return checker.edit_unit
    check = {
        "aac": _check_adts,
        "matroska": _check_ebml,
        "asf": _check_asf,
        "avi": _check_avi,
        "mpegts": _check_transport_stream,
    }.get(demuxer)
    if check:
        check(source)
    return 0.0


def _check_ebml(source: Source) -> None:
    """Check that the segment, which follows the EBML header (RFC 8794), ends in the file."""
    segment = sum(_ebml_sizes(source, 0))
    if segment + sum(_ebml_sizes(source, segment)) > source.size:
        raise source.cut_off()


def _check_asf(source: Source) -> None:
    """Check that the objects end in the file. Their headers are 24 bytes and end in the size (ASF, 2.1)."""
    position = 0
    while (size := int.from_bytes(source.read(position + 16, 8), "little")) >= 24:
        position += size
    if position > source.size:
        raise source.cut_off()


def _check_avi(source: Source) -> None:
    """Check that the chunks end in the file. Programs that write to a pipe leave a size of ones."""
    position = 0
    while (head := source.read(position, 8))[:4] == b"RIFF" and head[4:] != b"\xff" * 4:
        position += 8 + int.from_bytes(head[4:], "little")
    if position > source.size:
        raise source.cut_off()


def _check_transport_stream(source: Source) -> None:
    if source.size % TS_PACKET and source.size % (TS_PACKET + 4):
        raise source.cut_off()


class _BoxChecker:
    """Check the boxes of an MP4 or QuickTime file (ISO/IEC 14496-12), and what their tables announce."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.edit_unit = 0.0
        self._boxes = 0
        self._samples = 0

    def check(self, position: int, end: int, depth: int = 0, *, is_loose: bool = False) -> None:
        """Check the boxes between two offsets; with `is_loose`, cut a box that is too large, as FFmpeg does."""
        while position < end:
            self._boxes += 1
            head = self._source.read(position, 16)
            size, kind, header = int.from_bytes(head[:4], "big"), head[4:8], 8
            if size == 1:
                size, header = int.from_bytes(head[8:16], "big"), 16
            elif size == 0:
                size = end - position
            if self._boxes > _MOST_BOXES or (size < header and depth == 0):
                raise self._source.unknown_bytes(end - position, "after its boxes")
            if is_loose:
                size = min(size, end - position)
            elif position + size > end:
                raise self._source.cut_off() if depth == 0 else self._damaged(kind)
            if size < header:
                return
            self._check_box(kind, position + header, position + size, depth, is_loose=is_loose)
            position += size

    def _check_box(self, kind: bytes, position: int, end: int, depth: int, *, is_loose: bool) -> None:
        """Check a box, whose content is between two offsets."""
        head = self._source.read(position, _HEAD_BYTES)
        if kind in _PARENTS + _LOOSE_PARENTS and depth < _MOST_DEPTH:
            # In MP4 files, but not in QuickTime files, four bytes precede the boxes of `meta`.
            skipped = 4 if kind == b"meta" and head[8:12] == b"hdlr" else 0
            self.check(position + skipped, end, depth + 1, is_loose=is_loose or kind in _LOOSE_PARENTS)
        elif kind in _TABLES:
            self._check_table(kind, head)
        elif kind == _COMPRESSED:
            raise self._source.error("holds a compressed header", CONVERT)
        elif kind == b"stsd":
            self._check_description(position, end - position)
        elif kind == b"mvhd":
            # Two dates come before, of eight bytes each in version 1.
            at = 20 if head[:1] == b"\1" else 12
            self.edit_unit = 1 / max(1, int.from_bytes(head[at : at + 4], "big"))

    def _check_table(self, kind: bytes, content: bytes) -> None:
        """Check what a table of samples or of edits announces. FFmpeg repeats the list of samples for each edit."""
        at = 8 if kind in (b"stsz", b"stz2") else 4
        count = int.from_bytes(content[at : at + 4], "big")
        if kind != b"elst":
            self._samples += count
        elif count > _MOST_EDITS:
            raise self._source.error(f"holds more than {_MOST_EDITS} edits", CONVERT)
        if self._samples > self._source.size:
            raise self._damaged(kind)

    def _check_description(self, position: int, size: int) -> None:
        """Check that the description of the codec is small and contains no tables, which FFmpeg would read."""
        if size > _MOST_DESCRIPTION_BYTES:
            raise self._damaged(b"stsd")
        content = self._source.read(position, size)
        if any(kind in content for kind in (*_TABLES, _COMPRESSED)):
            raise self._source.error("is damaged, its box stsd contains a table")

    def _damaged(self, kind: bytes) -> AudioFileError:
        return self._source.error(f"is damaged, its box {kind.decode('ascii', 'backslashreplace')} is too large")


def _check_adts(source: Source) -> None:
    """Check that frames follow each other to the end, with tags between them. FFmpeg would skip what is between."""
    position, end = 0, source.before_tags(0, source.size)
    while position < end:
        size = adts_size(source.read(position, ADTS_HEADER))
        if not size and (after := source.after_tags(position, end)) > position:
            position = after
            continue
        if not size:
            if rest := source.unaccounted(position, end):
                raise source.unknown_bytes(rest, "after its frames")
            return
        position += size
    if position > end:
        raise source.cut_off()


def _ebml_sizes(source: Source, position: int) -> tuple[int, int]:
    """Return the bytes of the head of an EBML element, and those of its content, which count as 0 if unknown."""
    head = source.read(position, 12)
    id_bytes = 9 - head[0].bit_length() if head else 0
    width = 9 - head[id_bytes].bit_length() if id_bytes < len(head) else 0
    size = int.from_bytes(head[id_bytes : id_bytes + width], "big") & ((1 << 7 * width) - 1)
    return id_bytes + width, 0 if size == (1 << 7 * width) - 1 else size
