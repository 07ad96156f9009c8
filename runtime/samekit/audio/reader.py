"""Read audio files in blocks, as stored or at the channels and sample rate that a model wants."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
import soundfile as sf

from samekit._files import named, stamp
from samekit.audio.channels import Audio, to_channels
from samekit.audio.containers import (
    LOSSY_SLACK,
    MP3_READ,
    UNKNOWN_FRAMES,
    check_container,
    cut_off,
    decoder_errors,
    has_xing_header,
)
from samekit.audio.resampler import StreamResampler, resample
from samekit.errors import AudioFileError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

BLOCK: Final = 2**18
"""Samples a channel that are read at a time: 6 s at 44.1 kHz, 2 MiB in stereo."""
# Most samples of all channels in a block: a header may announce 1,024 channels.
_BLOCK_VALUES: Final = 2**21


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
        check_container(self.path)
        self._stamp = stamp(self.path)
        with ExitStack() as stack:
            self._file = stack.enter_context(_opened(self.path, native(self.path)))
            if self._file.format == "MP3" and not has_xing_header(self.path):
                # The position of a Python file is the only sign that libsndfile guessed the length too short.
                self._source = stack.enter_context(self.path.open("rb"))
                self._file = stack.enter_context(_opened(self.path, self._source))
            self.info = AudioInfo(
                sample_rate=self._file.samplerate,
                channels=self._file.channels,
                frames=self._file.frames if self._file.frames < UNKNOWN_FRAMES else None,
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
        with decoder_errors(self.path, f"is damaged after {seconds:.1f} s", "copy or download it again"):
            frames: Audio = self._file.read(self._block, dtype="float32", always_2d=True)
        return frames

    def _check_end(self) -> None:
        """Refuse a file that ended before it should."""
        if not self._frames_read:
            raise self._empty()
        if stamp(self.path) != self._stamp:
            raise AudioFileError(f"{self.path}: was changed while it was read; read it again")
        if self._source is not None:
            if self._source.tell() < MP3_READ * self.path.stat().st_size:
                cause = "is an MP3 of variable bit rate that does not tell its length"
                raise AudioFileError(f"{self.path}: {cause}; convert it to FLAC")
        elif self.info.frames is not None:
            slack = LOSSY_SLACK if self.info.format in ("MP3", "OGG") else 0
            if self._frames_read < self.info.frames - slack:
                raise cut_off(self.path)

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
    with decoder_errors(path, "cannot be read as audio", "give a file that libsndfile reads"):
        return _SequentialFile(source)


def native(path: Path) -> bytes | str:
    """Return the path in the form in which soundfile takes every name, also one that is no valid text."""
    return os.fsencode(path) if os.name == "posix" else str(path)


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
