"""Containers made of chunks: WAV and its 64-bit forms, AIFF, 8SVX, W64 and CAF."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from samekit.audio.front_channels import Front, front_of_core_audio, front_of_mask, no_front
from samekit.audio.mpeg import first_frame, mpeg_parts
from samekit.audio.parts import Part, Piece
from samekit.audio.source import CONVERT, COPY

if TYPE_CHECKING:
    from samekit.audio.source import Source


class _Form(NamedTuple):
    """How a container writes its chunks."""

    order: Literal["little", "big"]
    samples: bytes = b"data"  # beginning of the name of the chunk that holds the samples
    first: int = 12  # offset of the first chunk
    name: int = 4  # bytes of a name
    size: int = 4  # bytes of a size
    counts_header: bool = False  # the size of a chunk includes its name and size
    align: int = 2
    unknown: int = 0x7FFFF000  # sizes from here on stand for an unknown length if the file does not hold them


# A program that writes to a pipe cannot go back to fill in the size. It leaves 0x7FFFF000 (WAV, SoX), 0x7F000000 and a
# little (AIFF, SoX), 0x80000000 (arecord) or 0xFFFFFFFF (FFmpeg). So a file that lost its end is not recognised if it
# had more than 2 GiB.
_FORMS: Final = {
    b"RIFF": _Form("little"),
    b"RIFX": _Form("big"),
    b"RF64": _Form("little"),
    b"BW64": _Form("little"),
    b"FORM": _Form("big", b"SSND", unknown=0x7EFF0000),
    b"riff": _Form("little", first=40, name=16, size=8, counts_header=True, align=8, unknown=2**62),
    b"caff": _Form("big", first=8, size=8, align=1, unknown=2**62),
}
_SVX: Final = _Form("big", b"BODY")
MAGICS: Final = tuple(_FORMS)
"""The first four bytes of these containers."""
# Format codes of WAV (mmreg.h): MPEG audio; PCM, float, A-law and mu-law; the code follows in the extension.
_MPEG_CODES: Final = (0x50, 0x55)
_LINEAR_CODES: Final = (1, 3, 6, 7)
_EXTENSIBLE: Final = 0xFFFE
# Limits the time that a malicious file of empty chunks takes.
_MOST_CHUNKS: Final = 10_000
# Most bytes of a chunk that are kept. Those that are used are shorter: a channel layout takes 20 bytes a channel.
_MOST_CONTENT: Final = 2**15
# The CHAN chunk of 8SVX: left (2) and right (4).
_SVX_STEREO: Final = 6
# The tail of the sub-format of Ambisonic B-format files (.amb).
_AMBISONIC: Final = bytes.fromhex("2107d3118644c8c1ca000000")
# Names of chunks that programs append to the samples. Only these may extend past the end of the file.
_TRAILING: Final = tuple(
    name.ljust(4)
    for name in (
        b"LIST list id3 ID3 bext JUNK junk PAD FLLR cue smpl inst iXML _PMX cart acid fact PEAK DISP afsp LGWV levl "
        b"umid axml chna elm1 minf regn strc NAME AUTH (c) ANNO COMT MARK INST APPL CHAN MIDI AESD SAXL basc trns free "
        b"info uuid pakt chan"
    ).split()
)


@dataclass
class _Chunks:
    """The chunks of one file, or of one of several joined ones."""

    kind: bytes  # the first four bytes
    start: int
    end: int = 0  # where the next file begins, or bytes that are no chunk
    samples: list[tuple[int, int]] = field(default_factory=list)  # begin and end of the content of these chunks
    empty: list[int] = field(default_factory=list)  # offsets of empty chunks of samples, beside one that is not
    format: bytes = b""  # name and content of the chunk that tells the coding
    layout: bytes = b""  # content of the chunk that tells the channels of AIFF, 8SVX and CAF
    long_size: int = 0  # bytes of the samples of RF64

    def keep(self, name: bytes, content: bytes) -> None:
        """Remember the content of a chunk that does not hold samples."""
        if name in (b"fmt ", b"COMM", b"desc"):
            self.format = name + content
        elif name in (b"CHAN", b"chan"):
            self.layout = content
        elif name == b"ds64":
            # RF64 (EBU Tech 3306): the sizes of the file and of its samples, 64 bits each.
            self.long_size = int.from_bytes(content[8:16], "little")


def chunked_parts(source: Source, start: int) -> list[Part]:
    """Return the files in a file of chunks: one, or several that were joined."""
    parts: list[Part] = []
    end = start
    while True:
        chunks = _read_chunks(source, end)
        if len(chunks.samples) > 1:
            # Other decoders read only one of them too.
            cause = f"holds its samples in {len(chunks.samples)} chunks, of which libsndfile reads one"
            raise source.error(cause, "split it, so that each file has one")
        parts.extend(_parts(source, chunks))
        source.check_streams(len(parts))
        end = chunks.end
        if source.read(end, 4) not in MAGICS:
            break
    rest = source.unaccounted(end, source.size)
    # Less than a frame, such as the line end that some transfers append, holds no sample.
    if rest < max(1, _frame_bytes(chunks)):
        return parts
    if not chunks.samples or chunks.samples[-1][1] != end:
        raise source.unknown_bytes(rest, "after its last chunk")
    cure = "take what it announces: ffmpeg -i IN OUT.flac"
    if chunks.format.startswith(b"fmt ") and chunks.kind != b"riff":
        cure += ", or all of it: ffmpeg -ignore_length 1 -i IN OUT.flac"
    cause = f"{rest} bytes follow the samples that it announces, and are neither a chunk nor a tag"
    raise source.error(cause, cure)


def _read_chunks(source: Source, start: int) -> _Chunks:
    """Read the headers of the chunks of one file."""
    head = source.read(start, 12)
    form = _SVX if head[:4] == b"FORM" and head[8:] in (b"8SVX", b"16SV") else _FORMS[head[:4]]
    chunks = _Chunks(head[:4], start)
    position = start + form.first
    header_size = form.name + form.size
    for _ in range(_MOST_CHUNKS):
        header = source.read(position, header_size)
        name, size = header[:4], int.from_bytes(header[form.name :], form.order)
        if len(header) < header_size or name in MAGICS or not _is_name(name):
            break
        body = position + header_size
        if form.counts_header:
            size -= header_size
        if name == form.samples:
            if size == 0xFFFFFFFF:
                size = chunks.long_size or size
            # A size of 0 is unknown, unless another chunk holds samples: then this one is empty.
            stop = body if size == 0 and chunks.samples else _samples_end(source, form, body, size)
            if stop > source.size:
                raise source.cut_off(f"{COPY}, or take what it holds: ffmpeg -i IN OUT.flac")
            chunks.samples.append((body, stop))
        else:
            stop = body + max(0, size)
            if stop > source.size and name not in _TRAILING and chunks.samples:
                break
            chunks.keep(name, source.read(body, min(size, _MOST_CONTENT)))
        position = _next_chunk(source, form, body, stop)
    chunks.end = min(position, source.size)
    if any(stop > body for body, stop in chunks.samples):
        chunks.empty = [body - header_size for body, stop in chunks.samples if stop <= body]
        chunks.samples = [(body, stop) for body, stop in chunks.samples if stop > body]
    return chunks


def _is_name(name: bytes) -> bool:
    """Return whether four bytes can name a chunk: they are printable ASCII."""
    return all(0x20 <= byte < 0x7F for byte in name)


def _samples_end(source: Source, form: _Form, body: int, size: int) -> int:
    """Return where the chunk with the samples ends, by what it announces."""
    if body + size > source.size and size >= form.unknown:
        return source.size
    # A recorder that was stopped too early leaves 0; if there are no samples, another chunk or nothing follows.
    if size <= 0 and body < source.size and not _is_chunk(source, form, body):
        return source.size
    return body + max(0, size)


def _is_chunk(source: Source, form: _Form, position: int) -> bool:
    """Return whether a chunk begins here: one that programs append, or one that ends with the file."""
    header = source.read(position, form.name + form.size)
    if header[:4] in _TRAILING or header[:4] == form.samples:
        return True
    rest = source.size - position - len(header) - int.from_bytes(header[form.name :], form.order)
    return _is_name(header[:4]) and 0 <= rest < form.align


def _next_chunk(source: Source, form: _Form, body: int, stop: int) -> int:
    """Return where the next chunk begins; some programs leave out the byte that pads odd sizes."""
    padded = stop + -(stop - body) % form.align
    if padded > stop and form.align == 2:
        name = source.read(stop, 4)
        if _is_name(name) and (name in _TRAILING or name in MAGICS or not _is_name(source.read(padded, 4))):
            return stop
    return min(padded, max(stop, source.size))


def _parts(source: Source, chunks: _Chunks) -> list[Part]:
    """Return what the decoder reads of one file."""
    if not chunks.samples:
        return [Part(((chunks.start, chunks.end),), front=_front(source, chunks))]
    body, stop = chunks.samples[0]
    if chunks.format.startswith(b"fmt ") and _number(chunks.format, 4) in _MPEG_CODES:
        first = first_frame(source, body, stop, search=True)
        if first is not None:
            return mpeg_parts(source, first, stop)
    # libsndfile would decode the chunks after the samples of a W64 file as samples.
    end = stop if chunks.kind == b"riff" else chunks.end
    # libsndfile may take an empty chunk of samples for the only one, so it gets another name.
    changes = dict.fromkeys(chunks.empty, b"JUNK")
    form = _FORMS[chunks.kind]
    if chunks.kind in (b"RIFF", b"caff") and stop - body < 1 << 8 * form.size:
        # libsndfile refuses the -1 of CAF, and finds no samples in some WAV files whose size is 0.
        at, size = body - form.size, (stop - body).to_bytes(form.size, form.order)
        if source.read(at, form.size) != size:
            changes[at] = size
    pieces: list[Piece] = []
    position = chunks.start
    for at, data in sorted(changes.items()):
        pieces += [(position, at), data]
        position = at + len(data)
    frame = _frame_bytes(chunks)
    frames = (stop - body) // frame if frame else None
    return [Part((*pieces, (position, end)), frames, front=_front(source, chunks))]


def _number(data: bytes, at: int) -> int:
    """Read a number of 16 bits of a WAV file."""
    return int.from_bytes(data[at : at + 2], "little")


def _frame_bytes(chunks: _Chunks) -> int:
    """Return the bytes of a frame of a WAV file; 0 if it is another one or its samples are compressed."""
    body = chunks.format[4:]
    if not chunks.format.startswith(b"fmt ") or len(body) < 16:
        return 0
    # WAVEFORMATEX: code, channels, rate (32 bits), bytes a second (32 bits), bytes a frame, bits a sample.
    code = _number(body, 24 if _number(body, 0) == _EXTENSIBLE else 0)
    return max(_number(body, 12), _number(body, 2) * -(-_number(body, 14) // 8)) if code in _LINEAR_CODES else 0


def _front(source: Source, chunks: _Chunks) -> Front:
    """Return the front channels by the channel mask of WAV, or the channel layout of AIFF and CAF."""
    kind, body = chunks.format[:4], chunks.format[4:]
    if kind == b"fmt " and _number(body, 0) == _EXTENSIBLE and len(body) >= 40:
        channels = _number(body, 2)
        if body[28:40] == _AMBISONIC and channels > 1:
            raise no_front(source, "holds an ambisonic sound field")
        return front_of_mask(source, int.from_bytes(body[20:24], "little"), channels)
    if chunks.kind == b"FORM" and not kind and int.from_bytes(chunks.layout[:4], "big") == _SVX_STEREO:
        # Amiga 8SVX: all samples of the left channel precede those of the right one. libsndfile reads them alternately.
        raise source.error("is 8SVX with two channels one after the other", CONVERT)
    # The channels are 16 bits in the COMM chunk of AIFF, and 32 bits in the desc chunk of CAF.
    field = {b"COMM": body[:2], b"desc": body[24:28]}.get(kind, b"")
    return front_of_core_audio(source, chunks.layout, int.from_bytes(field, "big"))
