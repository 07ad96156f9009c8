"""Audio in and out: files in blocks, and the channels and sample rate that a model wants. Knows no model.

Audio is float32 `[channels, samples]`, full scale at ±1.
"""

from __future__ import annotations

import math
import operator
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

import numpy as np
import numpy.typing as npt
import soundfile as sf
from numpy.lib.stride_tricks import sliding_window_view

from samekit._files import atomic_path, named, output_errors, regular_file, stamp
from samekit.errors import AudioFileError, InputError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

Audio = npt.NDArray[np.float32]

BLOCK: Final = 2**18
"""Samples a channel that are read at a time: 6 s at 44.1 kHz, 2 MiB in stereo."""
# Most samples of all channels in a block: a header may announce 1,024 channels.
_BLOCK_VALUES: Final = 2**21


# --- Reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says."""

    sample_rate: int
    """In Hz."""
    channels: int
    """As stored, before any conversion."""
    frames: int | None
    """Samples a channel; None if the header does not tell. An estimate in an MP3 without a Xing header."""
    format: str
    """Container as libsndfile names it, such as `WAV`, `FLAC`, `OGG`, `MP3`."""
    subtype: str
    """Encoding of the samples as libsndfile names it, such as `PCM_16`, `FLOAT`, `VORBIS`."""


class AudioReader:
    """Read a file block by block, once, in a memory that does not grow with its length.

    Reads whatever libsndfile does: WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF and more. A file that was cut
    off is refused where its format lets one see it: WAV, AIFF and Ogg on opening, FLAC and MP3 (with a Xing
    header) when reading gets there. So is, at the end, an MP3 that libsndfile cannot read to its end, and a file
    that was changed meanwhile.

    Args:
        path: the file.
        block: most samples a channel in one block; with many channels it is less.

    Raises:
        AudioFileError: on opening or reading, if the file is missing, empty, no audio, damaged, cut off, or
            holds NaN or infinity.
        InputError: no file can have this name.
    """

    def __init__(self, path: str | os.PathLike[str], block: int = BLOCK) -> None:
        self.path = named(path)
        """The file."""
        self._frames_read = 0
        self._source: BinaryIO | None = None
        _check_container(self.path)
        self._stamp = stamp(self.path)
        with ExitStack() as stack:
            self._file = stack.enter_context(_opened(self.path, _native(self.path)))
            if self._file.format == "MP3" and not _has_xing_header(self.path):
                # The position of a Python file is the only sign that libsndfile guessed the length too short.
                self._source = stack.enter_context(self.path.open("rb"))
                self._file = stack.enter_context(_opened(self.path, self._source))
            self.info = AudioInfo(
                sample_rate=self._file.samplerate,
                channels=self._file.channels,
                frames=self._file.frames if self._file.frames < _UNKNOWN_FRAMES else None,
                format=self._file.format,
                subtype=self._file.subtype,
            )
            if self.info.frames == 0:
                raise self._empty()
            self._block = max(1, min(block, _BLOCK_VALUES // self.info.channels))
            self._open_files = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._open_files.close()

    def __iter__(self) -> Iterator[Audio]:
        """Yield the samples that are left, as `[channels, samples]`."""
        while len(frames := self._read()):
            self._frames_read += len(frames)
            if not np.isfinite(frames).all():
                raise AudioFileError(f"{self.path}: holds NaN or infinity; render it again without them")
            yield np.ascontiguousarray(frames.T)
        self._check_end()

    def _read(self) -> Audio:
        """Decode the next block, `[samples, channels]`; no samples at the end."""
        seconds = self._frames_read / self.info.sample_rate
        with _decoder_errors(self.path, f"is damaged after {seconds:.1f} s", "copy or download it again"):
            frames: Audio = self._file.read(self._block, dtype="float32", always_2d=True)
        return frames

    def _check_end(self) -> None:
        """Refuse a file that ended before it should."""
        if not self._frames_read:
            raise self._empty()
        if stamp(self.path) != self._stamp:
            raise AudioFileError(f"{self.path}: was changed while it was read; read it again")
        if self._source is not None:
            if self._source.tell() < _MP3_READ * self.path.stat().st_size:
                cause = "is an MP3 of variable bit rate that does not tell its length"
                raise AudioFileError(f"{self.path}: {cause}; convert it to FLAC")
        elif self.info.frames is not None:
            slack = _LOSSY_SLACK if self.info.format in ("MP3", "OGG") else 0
            if self._frames_read < self.info.frames - slack:
                raise _cut_off(self.path)

    def _empty(self) -> AudioFileError:
        """Name the error of a file without samples."""
        return AudioFileError(
            f"{self.path}: holds no samples, or its header was never completed; record or render it again"
        )


def read_audio(path: str | os.PathLike[str]) -> tuple[Audio, int]:
    """Read a whole file.

    Args:
        path: the file.

    Returns:
        The samples, `[channels, samples]`, and the sample rate in Hz.

    Raises:
        AudioFileError: as `AudioReader`.
    """
    with AudioReader(path) as reader:
        return np.concatenate(list(reader), axis=1), reader.info.sample_rate


class _SequentialFile(sf.SoundFile):  # type: ignore[misc]  # soundfile ships no type information
    """A sound file that is only read forwards.

    After each read, soundfile seeks to where a seekable file stands already. In Opus files libsndfile then
    returns other samples when the reads are small.
    """

    def seekable(self) -> bool:
        """Return False, whatever the file could do."""
        return False


def _opened(path: Path, source: bytes | str | BinaryIO) -> _SequentialFile:
    """Open a decoder for `path`, from its name or from the open file."""
    with _decoder_errors(path, "cannot be read as audio", "give a file that libsndfile reads"):
        return _SequentialFile(source)


def _native(path: Path) -> bytes | str:
    """Return the path in the form in which soundfile takes every name, also one that is no valid text."""
    return os.fsencode(path) if os.name == "posix" else str(path)


# libsndfile's SF_COUNT_MAX: the length of a FLAC file that was written to a pipe.
_UNKNOWN_FRAMES: Final = 2**63 - 1
# Samples by which a sound lossy file may miss its announced length: the longest block of Vorbis.
_LOSSY_SLACK: Final = 8192
# Part of an MP3 file that is read if its length was guessed right; tags follow the sound.
_MP3_READ: Final = 0.9
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
def _decoder_errors(path: Path, cause: str, cure: str) -> Iterator[None]:
    """Raise the decoder's errors as an AudioFileError."""
    try:
        yield
    # A TypeError is how soundfile refuses files named .raw.
    except (sf.SoundFileError, TypeError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise AudioFileError(f"{path}: {cause} ({reason}); {cure}") from error


def _cut_off(path: Path) -> AudioFileError:
    """Name the error of a file whose end is missing."""
    return AudioFileError(f"{path}: is cut off, it announces more than it holds; copy or download it again")


def _check_container(path: Path) -> None:
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
        raise _cut_off(path)


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


def _has_xing_header(path: Path) -> bool:
    """Whether an MP3 file tells its length; without this header it is a guess from the bit rate."""
    with path.open("rb") as file:
        tag = file.read(10)
        # ID3v2.4, section 3.1: the size of a tag has seven bits a byte.
        tag_size = sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=False))
        file.seek(10 + tag_size if tag.startswith(b"ID3") else 0)
        frame = file.read(2048)
    return b"Xing" in frame or b"Info" in frame


# --- Writing ------------------------------------------------------------------------------------------------

# Bits of the integer subtypes of each format; 0 stands for floating point.
_SUBTYPES: Final = {
    "WAV": {"PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "FLOAT": 0},
    "FLAC": {"PCM_16": 16, "PCM_24": 24},
}
# WAV counts its bytes in 32 bits, and its headers take less than 4 KiB of them.
_WAV_BYTES: Final = 2**32 - 2**12


def format_of(path: Path, subtype: str) -> str:
    """The format of an output file, by its suffix: WAV or FLAC.

    Raises:
        InputError: another suffix, or the format does not hold the subtype.
    """
    name = path.suffix[1:].upper()
    if name not in _SUBTYPES:
        raise InputError(f"{path}: {path.suffix!r} is no output format; use .wav or .flac")
    if subtype not in _SUBTYPES[name]:
        choices = ", ".join(_SUBTYPES[name])
        bits = choices.replace("PCM_", "").lower()
        other = "" if name == "WAV" else ", or .wav"
        raise InputError(f"{path}: {name} holds no {subtype!r}; use one of {choices} (--bits {bits}){other}")
    return name


class AudioWriter:
    """Write a .wav or .flac file block by block; it appears when the `with` block ends well, or not at all.

    Integer subtypes are rounded to the nearest step and limited to full scale. A WAV file that would pass
    4 GiB is written as RF64, if `frames` announces it.

    Args:
        path: the file; its suffix, .wav or .flac, is the format.
        sample_rate: in Hz.
        channels: of every block.
        subtype: `PCM_16`, `PCM_24`, and in WAV also `PCM_32` or `FLOAT`.
        frames: samples a channel that will be written, if known.
        clip: limit `FLOAT` samples to ±1 too.

    Raises:
        InputError: the suffix, the subtype, the channels or the rate cannot be written.
        OutputError: the folder is missing, not writable or full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sample_rate: int,
        channels: int,
        subtype: str = "PCM_16",
        *,
        frames: int | None = None,
        clip: bool = False,
    ) -> None:
        self.path = Path(path)
        """The file; not there before the `with` block ends."""
        self.frames = 0
        """Samples a channel that were written so far."""
        self._channels = channels
        self._clip = clip
        self._format = format_of(self.path, subtype)
        self._bits = _SUBTYPES[self._format][subtype]
        self._frame_bytes = channels * (self._bits or 32) // 8
        if self._format == "WAV" and (frames or 0) * self._frame_bytes > _WAV_BYTES:
            self._format = "RF64"
        self._output = self._open(sample_rate, subtype)

    def __enter__(self) -> Self:
        self._file = self._output.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.__exit__(kind, error, trace)

    def write(self, audio: Audio) -> None:
        """Append a block.

        Args:
            audio: `[channels, samples]`, finite.

        Raises:
            InputError: the block has another shape, or holds NaN or infinity.
            OutputError: the disk is full, or the file becomes too long for WAV.
        """
        if audio.ndim != 2 or audio.shape[0] != self._channels:
            raise InputError(f"block of shape {audio.shape} does not fit; give [{self._channels}, samples]")
        if not np.isfinite(audio).all():
            raise InputError(f"{self.path}: the audio holds NaN or infinity; remove them before writing")
        self.frames += audio.shape[1]
        if self._format == "WAV" and self.frames * self._frame_bytes > _WAV_BYTES:
            raise OutputError(f"{self.path}: WAV ends at 4 GiB; write .flac, or announce the length (frames=)")
        samples: npt.NDArray[np.float32 | np.int32] = audio
        if self._bits:
            samples = _quantized(audio, self._bits)
        elif self._clip:
            samples = np.clip(audio, -1, 1)
        with output_errors(self.path, sf.SoundFileError):
            self._file.write(samples.T)

    @contextmanager
    def _open(self, sample_rate: int, subtype: str) -> Iterator[sf.SoundFile]:
        """Hold the temporary file open while the `with` block of the writer runs."""
        with atomic_path(self.path) as temporary:
            try:
                file = sf.SoundFile(_native(temporary), "w", sample_rate, self._channels, subtype, format=self._format)
            except sf.SoundFileError as error:
                layout = f"{self._channels} channels at {sample_rate} Hz"
                raise InputError(f"{self.path}: {self._format} cannot hold {layout}; change them") from error
            try:
                yield file
            finally:
                with output_errors(self.path, sf.SoundFileError):
                    file.close()


def _quantized(audio: Audio, bits: int) -> npt.NDArray[np.int32]:
    """Round to the steps of a PCM subtype, in the upper bits, where libsndfile takes them from.

    libsndfile's own conversion rounds down when it clips, which shifts a WAV file by half a step.
    """
    full_scale = 1 << (bits - 1)
    steps = np.rint(audio.astype(np.float64) * full_scale)
    limited = np.clip(steps, -full_scale, full_scale - 1).astype(np.int32)
    return limited << (32 - bits)


# --- Channels and length ------------------------------------------------------------------------------------


def to_channels(audio: Audio, channels: int) -> Audio:
    """Give audio the channels that a model takes, by the rule of the Stable Audio 3 reference.

    Mono is repeated, channels past the last one wanted are dropped; nothing is mixed.

    Args:
        audio: `[..., channels, samples]`.
        channels: how many are wanted.

    Returns:
        `[..., channels, samples]`, a view if nothing is repeated.

    Raises:
        InputError: there are too few channels, but more than one.
    """
    given = audio.shape[-2]
    if given >= channels:
        return audio[..., :channels, :]
    if given != 1:
        raise InputError(f"audio of {given} channels cannot become {channels}; give 1, or {channels} or more")
    return np.repeat(audio, channels, axis=-2)


def pad_to(audio: Audio, multiple: int) -> Audio:
    """Append zeros up to a whole multiple of samples.

    Args:
        audio: `[..., samples]`.
        multiple: in samples.

    Returns:
        `[..., ceil(samples / multiple) * multiple]`; the input itself if nothing is missing.
    """
    missing = -audio.shape[-1] % multiple
    if missing == 0:
        return audio
    return np.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, missing)])


# --- Resampling ---------------------------------------------------------------------------------------------

# The low-pass filter of the reference, the defaults of `torchaudio.functional.resample`.
_ZERO_CROSSINGS: Final = 6
_ROLLOFF: Final = 0.99
# Outputs of one small matrix product: with fewer, the windows overlap more; with more, the matrices hold more
# zeros. From 30 to 50 ran fastest.
_BLOCK_OUTPUTS: Final = 32
# Inputs that are filtered at a time, so that they and their windows stay in the processor's cache.
_SPAN: Final = 2**15
# A rate from a damaged header could ask for matrices of any size. Within these limits the worst pair of rates
# takes 150 MB, and the rates of actual recordings take less than 20 MB.
_LOWEST_RATE: Final = 1_000
_HIGHEST_RATE: Final = 768_000


def resampled_length(samples: int, rate_in: int, rate_out: int) -> int:
    """Samples of the resampled audio: `ceil(samples * rate_out / rate_in)`, as in the reference."""
    return -(-samples * rate_out // rate_in)


def resample(audio: Audio, rate_in: int, rate_out: int) -> Audio:
    """Change the sample rate as the reference does: a Hann-windowed sinc, six zero crossings to each side.

    Output m is the sum of `x[i]·h(i - m·r)` over all inputs i, where `r = rate_in / rate_out`,
    `h(u) = s·sinc(s·u)·cos²(π·s·u / 12)` for `|s·u| < 6`, else 0, and `s = 0.99·min(1, 1/r)`. It is the
    formula of `torchaudio.functional.resample` (lowpass_filter_width 6, rolloff 0.99, sinc_interp_hann), its
    strides and phases put together; the phases are rounded as there.

    Args:
        audio: `[..., samples]`, finite.
        rate_in: rate of `audio` in Hz, an integer from 1,000 to 768,000.
        rate_out: rate wanted, likewise.

    Returns:
        `[..., resampled_length(samples, rate_in, rate_out)]`; the input itself if the rates are equal.

    Raises:
        InputError: a rate is not an integer in range.
    """
    *batch, samples = audio.shape
    rows = math.prod(batch)
    resampler = StreamResampler(rate_in, rate_out, rows)
    if rate_in == rate_out:
        return audio
    resampled = np.concatenate([resampler.push(audio.reshape(rows, samples)), resampler.finish()], axis=1)
    return resampled.reshape(*batch, resampled.shape[1])


class StreamResampler:
    """`resample` for audio that comes in blocks of any size: the same numbers, bit for bit, in fixed memory.

    Outputs come for about 2**15 inputs at a time (at least one period of the two rates), the last with
    `finish`. With equal rates, the blocks pass through untouched.

    Args:
        rate_in: rate of the blocks in Hz, an integer from 1,000 to 768,000.
        rate_out: rate wanted, likewise.
        channels: of every block.

    Raises:
        InputError: a rate is not an integer in range.
    """

    def __init__(self, rate_in: int, rate_out: int, channels: int) -> None:
        self._rate_in = _checked_rate(rate_in)
        self._rate_out = _checked_rate(rate_out)
        self._filter = _polyphase_filter(self._rate_in, self._rate_out)
        self._span = np.empty((channels, self._filter.span), np.float32)
        self._reset()

    def push(self, block: Audio) -> Audio:
        """Take the next samples.

        Args:
            block: `[channels, samples]`, any number of samples.

        Returns:
            The outputs that are complete, `[channels, samples]`, often none.

        Raises:
            InputError: the block has another shape.
        """
        channels, capacity = self._span.shape
        if block.ndim != 2 or block.shape[0] != channels:
            raise InputError(f"block of shape {block.shape} does not fit; give [{channels}, samples]")
        if self._rate_in == self._rate_out:
            return block
        self._received += block.shape[1]
        outputs = [np.empty((channels, 0), np.float32)]
        while block.shape[1]:
            taken = min(block.shape[1], capacity - self._filled)
            self._span[:, self._filled : self._filled + taken] = block[:, :taken]
            self._filled += taken
            block = block[:, taken:]
            if self._filled == capacity:
                outputs.append(self._next_outputs())
        return np.concatenate(outputs, axis=1)

    def finish(self) -> Audio:
        """End the audio; the next `push` begins another.

        Returns:
            The outputs that were still to come, `[channels, samples]`.
        """
        channels, capacity = self._span.shape
        total = resampled_length(self._received, self._rate_in, self._rate_out)
        outputs = [np.empty((channels, 0), np.float32)]
        while self._produced < total:
            # Always a full span: a product of another shape may round differently.
            outputs.append(self.push(np.zeros((channels, capacity - self._filled), np.float32)))
        rest = np.concatenate(outputs, axis=1)
        rest = rest[:, : rest.shape[1] - (self._produced - total)]
        self._reset()
        return rest

    def _reset(self) -> None:
        """Begin at the first sample, with zeros before it."""
        self._filled = self._filter.before
        self._span[:, : self._filled] = 0
        self._received = 0
        self._produced = 0

    def _next_outputs(self) -> Audio:
        """Filter the full span, and keep what the next one shares with it."""
        outputs = self._filter.apply(self._span)
        self._produced += outputs.shape[1]
        self._filled -= self._filter.step
        self._span[:, : self._filled] = self._span[:, self._filter.step :].copy()
        return outputs


@dataclass(frozen=True, eq=False)
class _PolyphaseFilter:
    """The low-pass filter of a pair of rates as small dense matrices, applied to a span of whole periods.

    The phases repeat after a period of rate_out / gcd outputs. These are cut into blocks of consecutive
    outputs; the inputs that reach a block are its window, and its outputs are window times matrix:

        inputs       x x x x x x x x x x x x x x x x x x
        block 0      |---- window ----|                     @ weights[0] -> outputs 0 to 31
        block 1                |---- window ----|           @ weights[1] -> outputs 32 to 63
    """

    weights: Audio
    """`[blocks, taps, outputs of a block]`"""
    starts: npt.NDArray[np.int64]
    """First input of each window, counted in the span, `[blocks, periods]`."""
    before: int
    """Inputs of a span that lie before its first period."""
    step: int
    """Inputs from one span to the next: its whole periods."""
    span: int
    """Inputs of a span."""
    outputs: int
    """Outputs of a period; the blocks may hold a few more, which are dropped."""

    def apply(self, span: Audio) -> Audio:
        """Filter `[channels, span]` to `[channels, periods * outputs]`."""
        blocks, taps, size = self.weights.shape
        channels, periods = span.shape[0], self.starts.shape[1]
        windows = sliding_window_view(span, taps, axis=1).swapaxes(0, 1)[self.starts]
        # Samples beyond float32 become infinite, which is told further on.
        with np.errstate(over="ignore", invalid="ignore"):
            products = windows.reshape(blocks, periods * channels, taps) @ self.weights
        ordered = products.reshape(blocks, periods, channels, size).transpose(2, 1, 0, 3)
        kept = ordered.reshape(channels, periods, blocks * size)[:, :, : self.outputs]
        return kept.reshape(channels, periods * self.outputs)


@lru_cache(maxsize=4)
def _polyphase_filter(rate_in: int, rate_out: int) -> _PolyphaseFilter:
    """Build the filter of a pair of rates."""
    common = math.gcd(rate_in, rate_out)
    # Short periods are repeated up to the size of a block.
    repeats = max(1, _BLOCK_OUTPUTS * common // rate_out)
    inputs, outputs = repeats * rate_in // common, repeats * rate_out // common
    blocks = max(1, round(outputs / _BLOCK_OUTPUTS))
    size = -(-outputs // blocks)
    # Inputs that a weight reaches to either side.
    radius = _ZERO_CROSSINGS * max(1.0, rate_in / rate_out) / _ROLLOFF

    first_outputs = np.arange(blocks, dtype=np.int64) * size
    starts = np.ceil(first_outputs * (inputs / outputs) - radius).astype(np.int64)
    taps = math.floor((size - 1) * inputs / outputs + 2 * radius) + 1
    weights = np.empty((blocks, taps, size), np.float32)
    for block in range(blocks):
        at_inputs = starts[block] + np.arange(taps, dtype=np.int64)
        at_outputs = first_outputs[block] + np.arange(size, dtype=np.int64)
        weights[block] = _weights(at_inputs, at_outputs, rate_in // common, rate_out // common)

    periods = max(1, _SPAN // inputs)
    starts_in_span = (starts - starts[0])[:, None] + np.arange(periods, dtype=np.int64) * inputs
    return _PolyphaseFilter(
        weights=weights,
        starts=starts_in_span,
        before=int(-starts[0]),
        step=periods * inputs,
        span=int(starts_in_span[-1, -1]) + taps,
        outputs=outputs,
    )


def _weights(
    at_inputs: npt.NDArray[np.int64], at_outputs: npt.NDArray[np.int64], period_in: int, period_out: int
) -> npt.NDArray[np.float64]:
    """Evaluate the formula of `resample`, `[inputs, outputs]`, for rates reduced to their shortest period."""
    cutoff = _ROLLOFF * min(period_in, period_out)
    periods, phases = np.divmod(at_outputs, period_out)
    # torchaudio divides the phases in single precision, which shows in long periods: with exact phases,
    # 44,056 to 44,100 Hz agrees with it to 75 dB only.
    phase_times = (phases / np.float32(period_out)).astype(np.float32)
    input_times = (at_inputs[:, None] - periods * period_in) / period_in
    crossings = np.clip((input_times - phase_times) * cutoff, -_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = np.cos(np.pi / (2 * _ZERO_CROSSINGS) * crossings) ** 2
    return np.asarray(cutoff / period_in * np.sinc(crossings) * window, np.float64)


def _checked_rate(rate: int) -> int:
    """Return the sample rate if it is one."""
    try:
        rate = operator.index(rate)
    except TypeError:
        raise InputError(f"sample rate {rate!r} is no integer; give it in whole Hz") from None
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        raise InputError(f"sample rate {rate} Hz is out of range; use {_LOWEST_RATE} to {_HIGHEST_RATE} Hz")
    return rate


# --- What a model takes -------------------------------------------------------------------------------------


def prepare(audio: Audio, rate_in: int, rate_out: int, channels: int) -> Audio:
    """Bring one clip to the channels and the sample rate of a model, as the reference does before encoding.

    Args:
        audio: `[channels of the clip, samples]`.
        rate_in: rate of the clip in Hz.
        rate_out: rate of the model in Hz.
        channels: of the model.

    Returns:
        `[channels, resampled_length(samples, rate_in, rate_out)]`, not padded; it may share memory with `audio`.

    Raises:
        InputError: as `to_channels` and `resample`.
    """
    return resample(to_channels(audio, channels), rate_in, rate_out)


class PreparedReader:
    """Read a file as `prepare` gives it, block by block, in a memory that does not grow with its length.

    Args:
        path: the file.
        sample_rate: wanted, in Hz.
        channels: wanted.

    Raises:
        AudioFileError: on opening or reading, as `AudioReader`.
        InputError: on opening or reading, if the file's rate or channels cannot be converted.
    """

    def __init__(self, path: str | os.PathLike[str], sample_rate: int, channels: int) -> None:
        self.samples = 0
        """Samples a channel that were yielded so far: the exact length, once the file is read."""
        self._channels = channels
        self._reader = AudioReader(path)
        self.info = self._reader.info
        """The file's own rate, channels, length and format."""
        try:
            self._resampler = StreamResampler(self.info.sample_rate, sample_rate, channels)
        except InputError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __iter__(self) -> Iterator[Audio]:
        """Yield `[channels, samples]` at the rate wanted, in blocks of varying length."""
        for block in self._resampled():
            if block.shape[1]:
                self.samples += block.shape[1]
                yield block

    def _resampled(self) -> Iterator[Audio]:
        """Yield what comes of each block of the file and of its end; some are empty."""
        for block in self._reader:
            yield self._resampler.push(to_channels(block, self._channels))
        yield self._resampler.finish()
