"""Containers made of chunks: WAV and its 64-bit forms, AIFF, 8SVX, W64 and CAF."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

from samekit.audio.layout import Front, front_of_core_audio, front_of_mask, no_front
from samekit.audio.mpeg import first_frame, mpeg_parts
from samekit.audio.parts import CONVERT, Part, Piece, cut_off, unknown_bytes
from samekit.audio.tags import read_at, unaccounted
from samekit.errors import AudioFileError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class _Form:
    """How a container writes its chunks."""

    order: Literal["little", "big"]
    samples: bytes
    """Beginning of the name of the chunk that holds the samples."""
    first: int = 12
    """Offset of the first chunk."""
    name: int = 4
    """Bytes of a name."""
    size: int = 4
    """Bytes of a size."""
    counts_header: bool = False
    """The size of a chunk includes its name and size."""
    align: int = 2
    unknown: int = 0x7FFFF000
    """Sizes from here on stand for an unknown length if the file does not hold them."""


# Who writes to a pipe cannot go back to fill in the size and leaves 0x7FFFF000 (WAV, SoX), 0x7F000000 and a little
# (AIFF, SoX), 0x80000000 (arecord) or 0xFFFFFFFF (FFmpeg). So a file that lost its end is not recognised if it had
# more than 2 GiB.
_AIFF: Final = _Form("big", b"SSND", unknown=0x7EFF0000)
_FORMS: Final = {
    b"RIFF": _Form("little", b"data"),
    b"RIFX": _Form("big", b"data"),
    b"RF64": _Form("little", b"data"),
    b"BW64": _Form("little", b"data"),
    b"FORM": _AIFF,
    b"riff": _Form("little", b"data", 40, 16, 8, counts_header=True, align=8, unknown=2**62),
    b"caff": _Form("big", b"data", 8, 4, 8, align=1, unknown=2**62),
}
MAGICS: Final = tuple(_FORMS)
"""The first four bytes of these containers."""
_MPEG_TAGS: Final = (0x50, 0x55)
_LINEAR_TAGS: Final = (1, 3, 6, 7)
# A hostile file may consist of empty chunks.
_MOST_CHUNKS: Final = 10_000
_EXTENSIBLE: Final = 0xFFFE
# The CHAN chunk of 8SVX: left (2) and right (4).
_SVX_STEREO: Final = 6
# The tail of the sub-format of Ambisonic B-format files (.amb).
_AMBISONIC: Final = bytes.fromhex("2107d3118644c8c1ca000000")
# Names of chunks that people's tools append. A chunk that runs over the end is known by its name alone.
_TRAILING: Final = (
    *(b"LIST", b"list", b"id3 ", b"ID3 ", b"bext", b"JUNK", b"junk", b"PAD ", b"FLLR", b"cue ", b"smpl", b"inst"),
    *(b"iXML", b"_PMX", b"cart", b"acid", b"fact", b"PEAK", b"DISP", b"afsp", b"LGWV", b"levl", b"umid", b"axml"),
    *(b"chna", b"elm1", b"minf", b"regn", b"strc", b"NAME", b"AUTH", b"(c) ", b"ANNO", b"COMT", b"MARK", b"INST"),
    *(b"APPL", b"CHAN", b"MIDI", b"AESD", b"SAXL", b"basc", b"trns", b"free", b"info", b"uuid", b"pakt", b"chan"),
)


@dataclass
class _Chunks:
    """What the chunks of one file, or of one of several joined ones, say."""

    kind: bytes
    """The first four bytes."""
    start: int
    end: int = 0
    """Where the next file begins, or what is no chunk."""
    samples: list[tuple[int, int]] = field(default_factory=list)
    unknown_size: bool = False
    """The samples go on to the end of the file."""
    empty: list[int] = field(default_factory=list)
    """Offsets of chunks for samples that hold none, beside one that does."""
    format: bytes = b""
    layout: bytes = b""
    complete: bool = True


def chunked_parts(path: Path, file: BinaryIO, start: int, end: int, *, whole_file: bool) -> list[Part]:
    """Find the files in a chunked file: one, or several that were joined.

    Args:
        path: for messages.
        file: the open file.
        start: of the first file.
        end: of the file.
        whole_file: nothing precedes `start`.

    Raises:
        AudioFileError: the samples are cut off, more follow than announced, or something unknown does.
    """
    found = [_walk(file, start, end)]
    while found[-1].end < end and read_at(file, found[-1].end, 4) in MAGICS:
        found.append(_walk(file, found[-1].end, end))
    parts = []
    for chunks in found:
        if not chunks.complete:
            raise cut_off(path, "take what it holds: ffmpeg -i IN OUT.flac")
        if len(chunks.samples) > 1:
            cause = f"holds its samples in {len(chunks.samples)} chunks, of which libsndfile reads one"
            # Other decoders read one of them too.
            raise AudioFileError(f"{path}: {cause}; split it, so that each file has one")
        parts.extend(_file_parts(path, file, chunks, plain=whole_file and found[0].end == end))
    rest = unaccounted(file, found[-1].end, end)
    # Less than a frame, such as the line end that some transfers append, holds no sample.
    if rest >= max(1, _frame_bytes(found[-1])):
        raise _too_few(path, rest, found[-1])
    return parts


def _too_few(path: Path, rest: int, chunks: _Chunks) -> AudioFileError:
    """Return the error of bytes after the last chunk."""
    if not chunks.samples or chunks.samples[-1][1] != chunks.end:
        return unknown_bytes(path, rest, "after its last chunk")
    cause = f"{rest} bytes follow the samples that it announces, and are neither a chunk nor a tag"
    announced = "take what it announces: ffmpeg -i IN OUT.flac"
    if chunks.format.startswith(b"fmt ") and chunks.kind != b"riff":
        return AudioFileError(f"{path}: {cause}; {announced}, or all of it: ffmpeg -ignore_length 1 -i IN OUT.flac")
    return AudioFileError(f"{path}: {cause}; {announced}")


def _walk(file: BinaryIO, start: int, end: int) -> _Chunks:
    """Go from chunk to chunk."""
    head = read_at(file, start, 12)
    form = _FORMS[head[:4]]
    if head[:4] == b"FORM" and head[8:12] in (b"8SVX", b"16SV"):
        form = _Form("big", b"BODY")
    chunks = _Chunks(head[:4], start)
    long_size = 0
    position = start + form.first
    header_size = form.name + form.size
    for _ in range(_MOST_CHUNKS):
        header = read_at(file, position, header_size) if position < end else b""
        name, size = header[: form.name], int.from_bytes(header[form.name :], form.order)
        if len(header) < header_size or name[:4] in MAGICS or not _is_name(name[:4]):
            break
        body = position + header_size
        if form.counts_header:
            size -= header_size
        if name.startswith(form.samples):
            # Beside a chunk with samples, a size of 0 is what it says.
            known_empty = size == 0 and bool(chunks.samples)
            stop = body if known_empty else _samples_end(file, form, body, size, long_size, end)
            chunks.complete = stop <= end
            chunks.unknown_size = stop == end and body + size != end and (size <= 0 or form.size == 8)
            chunks.samples.append((body, min(stop, end)))
        else:
            stop = body + max(0, size)
            if stop > end and name[:4] not in _TRAILING and chunks.samples:
                break
            _keep(file, chunks, name, body, min(size, 2**16))
            if name == b"ds64":
                # RF64 (EBU Tech 3306): the sizes of the file and of its samples, 64 bits each.
                long_size = int.from_bytes(read_at(file, body + 8, 8), "little")
        position = _aligned(file, body, stop, end, form)
    chunks.end = min(position, end)
    if any(stop > body for body, stop in chunks.samples):
        chunks.empty = [body - header_size for body, stop in chunks.samples if stop <= body]
        chunks.samples = [(body, stop) for body, stop in chunks.samples if stop > body]
    return chunks


def _keep(file: BinaryIO, chunks: _Chunks, name: bytes, body: int, size: int) -> None:
    """Remember the chunks that tell the coding and the layout of the channels."""
    if name[:4] in (b"fmt ", b"COMM", b"desc"):
        chunks.format = name[:4] + read_at(file, body, size)
    elif name in (b"CHAN", b"chan"):
        chunks.layout = read_at(file, body, size)


def _is_name(name: bytes) -> bool:
    """Whether four bytes can name a chunk."""
    return all(0x20 <= byte < 0x7F for byte in name)


def _samples_end(file: BinaryIO, form: _Form, body: int, size: int, long_size: int, end: int) -> int:
    """Return where the chunk with the samples ends, by what it announces."""
    if form.size == 4 and size == 0xFFFFFFFF and long_size:
        size = long_size
    if body + size > end and size >= form.unknown:
        return end
    # A recorder that was stopped too early leaves 0; if there are no samples, another chunk or nothing follows.
    if size <= 0 and body < end and not _is_chunk(file, form, body, end):
        return end
    return body + max(0, size)


def _is_chunk(file: BinaryIO, form: _Form, position: int, end: int) -> bool:
    """Whether a chunk begins here: one that people's tools append, or one that ends with the file."""
    header = read_at(file, position, form.name + form.size)
    size = int.from_bytes(header[form.name :], form.order)
    if header[:4] in _TRAILING or header.startswith(form.samples):
        return True
    return _is_name(header[:4]) and 0 <= end - position - len(header) - size < form.align


def _aligned(file: BinaryIO, body: int, stop: int, end: int, form: _Form) -> int:
    """Return where the next chunk begins; some tools leave out the byte that pads odd sizes."""
    padded = stop + -(stop - body) % form.align
    if padded > stop and form.align == 2:
        plain = read_at(file, stop, 4)
        if _is_name(plain) and (plain in _TRAILING or plain in MAGICS or not _is_name(read_at(file, padded, 4))):
            return stop
    return min(padded, max(stop, end))


def _file_parts(path: Path, file: BinaryIO, chunks: _Chunks, *, plain: bool) -> list[Part]:
    """Return what the decoder reads of one file."""
    code = int.from_bytes(chunks.format[4:6], "little")
    if chunks.format.startswith(b"fmt ") and code in _MPEG_TAGS and chunks.samples:
        body, stop = chunks.samples[0]
        first = first_frame(file, body, stop, search=True)
        if first is not None:
            return mpeg_parts(path, file, first, stop, whole_file=False)
    pieces: tuple[Piece, ...] = () if plain else ((chunks.start, chunks.end),)
    if chunks.samples:
        body, stop = chunks.samples[0]
        size_bytes = {b"caff": 8, b"RIFF": 4}.get(chunks.kind, 0)
        if chunks.kind == b"riff" and stop < chunks.end:
            # libsndfile takes the chunks after the samples of a W64 file for samples.
            pieces = ((chunks.start, stop),)
        elif chunks.unknown_size and size_bytes:
            # libsndfile refuses the -1 of CAF, and finds no samples in some WAV files whose size is 0.
            order: Literal["little", "big"] = "little" if size_bytes == 4 else "big"
            size = (stop - body) & (1 << 8 * size_bytes) - 1
            pieces = ((chunks.start, body - size_bytes), size.to_bytes(size_bytes, order), (body, chunks.end))
    for position in chunks.empty:
        # libsndfile may take the empty one: it is given another name.
        pieces = _replaced(pieces or ((chunks.start, chunks.end),), position, b"JUNK")
    return [Part(pieces, _frames(chunks), front=_front(path, chunks))]


def _replaced(pieces: tuple[Piece, ...], position: int, data: bytes) -> tuple[Piece, ...]:
    """Return the pieces with other bytes at a position of the file."""
    found: list[Piece] = []
    for piece in pieces:
        if not isinstance(piece, bytes) and piece[0] <= position < piece[1]:
            found += [(piece[0], position), data, (position + len(data), piece[1])]
        else:
            found.append(piece)
    return tuple(found)


def _frames(chunks: _Chunks) -> int | None:
    """Return the frames that the samples of a WAV file take; None if it is another one or they are compressed."""
    frame = _frame_bytes(chunks)
    return (chunks.samples[0][1] - chunks.samples[0][0]) // frame if frame and chunks.samples else None


def _frame_bytes(chunks: _Chunks) -> int:
    """Return the bytes of a frame of a WAV file; 0 if it is another one or its samples are compressed."""
    body = chunks.format[4:]
    if not chunks.format.startswith(b"fmt ") or len(body) < 16:
        return 0
    code = int.from_bytes(body[:2], "little")
    if code == _EXTENSIBLE:
        code = int.from_bytes(body[24:26], "little")
    channels, align, bits = (int.from_bytes(body[at : at + 2], "little") for at in (2, 12, 14))
    return max(align, channels * -(-bits // 8)) if code in _LINEAR_TAGS else 0


def _front(path: Path, chunks: _Chunks) -> Front:
    """Return the front channels by the channel mask of WAV, or the channel layout of AIFF and CAF."""
    kind, body = chunks.format[:4], chunks.format[4:]
    if kind == b"fmt " and int.from_bytes(body[:2], "little") == _EXTENSIBLE and len(body) >= 40:
        channels = int.from_bytes(body[2:4], "little")
        if body[28:40] == _AMBISONIC and channels > 1:
            raise no_front(path, "holds an ambisonic sound field")
        return front_of_mask(path, int.from_bytes(body[20:24], "little"), channels)
    if chunks.kind == b"FORM" and not kind and int.from_bytes(chunks.layout[:4], "big") == _SVX_STEREO:
        # Amiga 8SVX: the left channel comes first as a whole, then the right one. libsndfile takes turns.
        raise AudioFileError(f"{path}: is 8SVX with two channels one after the other; {CONVERT}")
    if kind == b"COMM":
        return front_of_core_audio(path, chunks.layout, int.from_bytes(body[:2], "big"))
    if kind == b"desc":
        return front_of_core_audio(path, chunks.layout, int.from_bytes(body[24:28], "big"))
    return 0, 1
