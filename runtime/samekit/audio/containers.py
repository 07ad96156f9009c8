"""What the containers of audio files say about where the samples end."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

import soundfile as sf

from samekit._files import regular_file
from samekit.errors import AudioFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# libsndfile's SF_COUNT_MAX: the length of a FLAC file that was written to a pipe.
UNKNOWN_FRAMES: Final = 2**63 - 1
# Samples by which a sound lossy file may miss its announced length: the longest block of Vorbis.
LOSSY_SLACK: Final = 8192
# Part of an MP3 file that is read if its length was guessed right; tags follow the sound.
MP3_READ: Final = 0.9
# Of the containers made of chunks: byte order of the sizes, name of the chunk with the samples.
_CHUNKED: Final[dict[bytes, tuple[Literal["little", "big"], bytes]]] = {
    b"RIFF": ("little", b"data"),
    b"RIFX": ("big", b"data"),
    b"RF64": ("little", b"data"),
    b"FORM": ("big", b"SSND"),
}
# Who writes to a pipe cannot go back to fill in the size and leaves 0x7FFFF000 (SoX), 0x80000000 (arecord) or
# 0xFFFFFFFF (FFmpeg). So a WAV file that lost its end is not recognised if it had more than 2 GiB.
_UNKNOWN_SIZE: Final = 0x7FFFF000
# The largest Ogg page is 65,307 bytes; a tag may follow it.
_OGG_TAIL: Final = 2**17


@contextmanager
def decoder_errors(path: Path, cause: str, cure: str) -> Iterator[None]:
    """Raise the decoder's errors as an AudioFileError."""
    try:
        yield
    # A TypeError is how soundfile refuses files named .raw.
    except (sf.SoundFileError, TypeError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise AudioFileError(f"{path}: {cause} ({reason}); {cure}") from error


def cut_off(path: Path) -> AudioFileError:
    """Name the error of a file whose end is missing."""
    return AudioFileError(f"{path}: is cut off, it announces more than it holds; copy or download it again")


def check_container(path: Path) -> None:
    """Refuse a file that cannot be opened, is empty, or shows that its end is missing."""
    try:
        with regular_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            magic = file.read(4)
            if magic in _CHUNKED:
                complete = _samples_end(file, magic) <= size
            else:
                complete = magic != b"OggS" or _has_last_page(file, size)
    except OSError as error:
        reason = error.strerror or error
        raise AudioFileError(f"{path}: cannot be opened ({reason}); check name and permissions") from error
    if size == 0:
        raise AudioFileError(f"{path}: is empty; copy or download it again")
    if not complete:
        raise cut_off(path)


def _samples_end(file: BinaryIO, magic: bytes) -> int:
    """Offset where the samples of a chunked container should end, or begin if it does not tell."""
    order, wanted = _CHUNKED[magic]
    long_size = 0
    file.seek(12)
    while len(header := file.read(8)) == 8:
        name, size = header[:4], int.from_bytes(header[4:], order)
        start = file.tell()
        if name == wanted:
            return start + (size if size < _UNKNOWN_SIZE else long_size)
        if name == b"ds64":
            # RF64 (EBU Tech 3306): the sizes of the file and of its data chunk, 64 bits each.
            long_size = int.from_bytes(file.read(16)[8:], "little")
        file.seek(start + size + size % 2)
    return 0


def _has_last_page(file: BinaryIO, size: int) -> bool:
    """Whether an Ogg file ends with a complete page that is marked as the last (RFC 3533, section 6)."""
    file.seek(max(0, size - _OGG_TAIL))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27:
        return False
    segments = page[26]
    complete = len(page) >= 27 + segments + sum(page[27 : 27 + segments])
    return complete and bool(page[5] & 4)


def has_xing_header(path: Path) -> bool:
    """Whether an MP3 file tells its length; without this header it is a guess from the bit rate."""
    with path.open("rb") as file:
        tag = file.read(10)
        # ID3v2.4, section 3.1: the size of a tag has seven bits a byte.
        tag_size = sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=False))
        file.seek(10 + tag_size if tag.startswith(b"ID3") else 0)
        frame = file.read(2048)
    return b"Xing" in frame or b"Info" in frame
