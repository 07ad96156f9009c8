"""Which container an audio file is, and of which parts it consists."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Final

from samekit.audio import chunks
from samekit.audio.chunks import chunked_parts
from samekit.audio.counted import counted_part
from samekit.audio.flac import flac_parts
from samekit.audio.mpeg import first_frame, is_free_format, mpeg_parts
from samekit.audio.ogg import ogg_parts
from samekit.audio.parts import CONVERT, Part
from samekit.audio.tags import after_tags, before_tags, file_size, read_at
from samekit.errors import AudioFileError
from samekit.files.paths import open_regular

if TYPE_CHECKING:
    from pathlib import Path

_MPEG_SUFFIXES: Final = (".mp3", ".mp2", ".mp1", ".mpga", ".mpa")


def find_parts(path: Path) -> list[Part]:
    """Return the parts of a file in their order, at least one.

    Raises:
        AudioFileError: the file cannot be opened, is empty, or shows that something is missing or left over.
    """
    try:
        with open_regular(path) as file:
            size = file_size(file)
            if size == 0:
                raise AudioFileError(f"{path}: is empty; copy or download it again")
            return _parts(path, file, size) or [Part()]
    except OSError as error:
        reason = error.strerror or error
        raise AudioFileError(f"{path}: cannot be opened ({reason}); check name and permissions") from error


def _parts(path: Path, file: BinaryIO, end: int) -> list[Part]:
    """Look at the first bytes after the tags."""
    start = after_tags(file, 0, end)
    magic = read_at(file, start, 4)
    whole_file = start == 0
    if magic in chunks.MAGICS:
        return chunked_parts(path, file, start, end, whole_file=whole_file)
    if magic == b"OggS":
        return ogg_parts(path, file, start, end)
    if magic == b"fLaC":
        return flac_parts(path, file, start, end, whole_file=whole_file)
    if start == 0 and (counted := counted_part(path, file, end)):
        return [counted]
    named_mpeg = path.suffix.lower() in _MPEG_SUFFIXES
    first = first_frame(file, start, end, search=named_mpeg or start > 0)
    if first is not None:
        # libmpg123 passes over ID3v2 tags, but not over the footer that flag 0x10 announces.
        head = read_at(file, 0, 6)
        plain = first == start and (start == 0 or (head.startswith(b"ID3") and not head[5] & 0x10))
        return mpeg_parts(path, file, first, end, whole_file=plain)
    if named_mpeg and not is_free_format(file, start):
        # libsndfile would call the file missing, and libmpg123 would print to the standard error.
        cause = "is named as MPEG audio and holds no MPEG frame near its beginning"
        raise AudioFileError(f"{path}: {cause}; copy or download it again, or {CONVERT}")
    # Many of these formats take all that follows for samples.
    return [Part(((start, before_tags(file, start, end)),), check_tail=True)]
