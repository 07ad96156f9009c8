"""Which container an audio file is, and which parts it consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from samekit.audio.au_voc import counted_part
from samekit.audio.av_formats import find_demuxer
from samekit.audio.flac import flac_parts
from samekit.audio.mpeg import first_frame, is_free_format, mpeg_parts
from samekit.audio.ogg import ogg_parts
from samekit.audio.parts import Part
from samekit.audio.source import CONVERT, COPY
from samekit.audio.wav_aiff import MAGICS, chunked_parts

if TYPE_CHECKING:
    from samekit.audio.source import Source

_MPEG_SUFFIXES: Final = (".mp3", ".mp2", ".mp1", ".mpga", ".mpa")


def find_parts(source: Source) -> list[Part]:
    """Return the parts of a file in their order, at least one.

    Raises:
        AudioFileError: the file is empty, or shows that something is missing or left over.
    """
    end = source.size
    if end == 0:
        raise source.error("is empty")
    start = source.after_tags(0, end)
    if demuxer := find_demuxer(source, start):
        return [Part(((0, end),), demuxer=demuxer)]
    magic = source.read(start, 4)
    parts: list[Part] = []
    if magic in MAGICS:
        parts = chunked_parts(source, start)
    elif magic == b"OggS":
        parts = ogg_parts(source, start)
    elif magic == b"fLaC":
        parts = flac_parts(source, start)
    elif start == 0 and (counted := counted_part(source)):
        parts = [counted]
    else:
        named_mpeg = source.path.suffix.lower() in _MPEG_SUFFIXES
        first = first_frame(source, start, end, search=named_mpeg or start > 0)
        if first is not None:
            parts = mpeg_parts(source, first, end)
        elif named_mpeg and not is_free_format(source, start):
            # libsndfile would not name the cause, and libmpg123 would print to the standard error.
            cause = "is named as MPEG audio and holds no MPEG frame near its beginning"
            raise source.error(cause, f"{COPY}, or {CONVERT}")
    # In many of the other formats, all bytes up to the end are samples.
    return parts or [Part(((start, source.before_tags(start, end)),), check_tail=True)]
