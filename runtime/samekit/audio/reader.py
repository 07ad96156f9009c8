"""Read audio files in blocks, as stored or at the channels and sample rate that a model takes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit.audio.av_decoder import AvDecoder
from samekit.audio.channels import Audio, to_channels
from samekit.audio.containers import find_parts
from samekit.audio.decoder import Decoder
from samekit.audio.resampler import StreamResampler, resample
from samekit.audio.source import CONVERT, Source
from samekit.errors import AudioFileError, InputError
from samekit.files.paths import checked_path, file_signature, open_regular

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from typing import Self

BLOCK: Final = 2**18
"""Samples a channel that are read at a time: 6 s at 44.1 kHz, 2 MiB in stereo."""
# Samples a channel that stay in the processor's cache from one step to the next.
_CACHED_BLOCK: Final = 2**17
# Most samples of all channels in a block: a header may announce 1,024 channels.
_BLOCK_VALUES: Final = 2**21


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says, before any conversion."""

    sample_rate: int
    """In Hz."""
    channels: int
    frames: int | None
    """Samples a channel; None if the file does not tell, or holds several streams that follow each other. In an MP3
    without a Xing header it may be up to two MPEG frames too many."""
    format: str
    """Container, such as `WAV`, `FLAC`, `OGG`, `MP3`, as libsndfile names it; or such as `MP4`, `Matroska`."""
    subtype: str
    """Encoding of the samples, such as `PCM_16`, `FLOAT`, `VORBIS`, as libsndfile names it; or such as `aac`."""
    decoder: str
    """Library that decodes the file, and its version."""


class AudioReader:
    """Read a file once, block by block, in memory that does not grow with its length.

    It reads the formats of libsndfile: WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF and more. If PyAV is installed, it
    also reads M4A, AAC, WMA, Matroska, the sound of videos and more. Streams that follow each other in one file are
    read as one. A file that is cut off, damaged, or holds more than can be read is refused: on opening if its structure
    shows it, else at the end. A file that changes while it is read is refused too.

    The channels are in the order of the file, except that left and right are the first two.

    Args:
        path: the file.
        block: most samples a channel in one block; with many channels it is less.

    Raises:
        AudioFileError: on opening or reading, if the file is missing, empty, no audio, damaged, cut off, or
            holds NaN or infinity.
        InputError: no file can have this name.
    """

    def __init__(self, path: str | os.PathLike[str], block: int = BLOCK) -> None:
        self.path = checked_path(path)
        """The file."""
        self._frames_read = 0
        self._signature = file_signature(self.path)
        with ExitStack() as stack:
            try:
                self._source = Source(self.path, stack.enter_context(open_regular(self.path)))
                self._part, *self._parts = find_parts(self._source)
            except OSError as error:
                cause = f"{self.path}: cannot be opened ({error.strerror or error})"
                raise AudioFileError(f"{cause}; check name and permissions") from error
            self._decoder = (AvDecoder if self._part.demuxer else Decoder)(self._source, self._part)
            frames = None if self._parts or self._part.starts_late else self._decoder.frames
            self.info = AudioInfo(*self._decoder.layout, frames, *self._decoder.coding)
            """What the file says of itself."""
            if frames == 0:
                if self._part.timed:
                    self._decoder.check_end()
                raise self._empty()
            self._stack = stack.pop_all()
        self._block = max(1, min(block, _BLOCK_VALUES // self.info.channels))
        self.exceeds_full_scale = False
        """Whether the last block may hold samples beyond full scale."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._decoder.close()
        self._stack.close()

    def __iter__(self) -> Iterator[Audio]:
        """Yield the samples that are left, as `[channels, samples]`."""
        for block in self.views():
            yield block.copy()

    def views(self) -> Iterator[Audio]:
        """Yield what iteration yields, without a copy: the next block is written over the last one."""
        while True:
            front, channels = self._part.front, self.info.channels
            if front != (0, 1) and max(front) >= channels:
                cause = f"names left and right among more channels than the {channels} that it holds"
                raise self._source.error(cause, CONVERT)
            order = [*front, *(channel for channel in range(channels) if channel not in front)]
            while len(frames := self._decoder.read(self._block, self._seconds)):
                self._frames_read += len(frames)
                if not self._decoder.is_integer:
                    low, high = frames.min(), frames.max()
                    # Comparisons with NaN are false.
                    if not (-np.inf < low and high < np.inf):
                        raise self._source.error("holds NaN or infinity", "render it again without them")
                    self.exceeds_full_scale = bool(low < -1 or high > 1)
                yield frames.T if front == (0, 1) else frames.T[order]
            if file_signature(self.path) != self._signature:
                raise self._source.error("was changed while it was read", "read it again")
            self._decoder.check_end()
            if not self._parts:
                break
            self._next_part()
        if not self._frames_read:
            raise self._empty()

    @property
    def _seconds(self) -> float:
        """Seconds of the file that were read."""
        return self._frames_read / self.info.sample_rate

    def _next_part(self) -> None:
        """Continue with the next stream, which must have the rate and channels of the first."""
        self._decoder.close()
        self._part = self._parts.pop(0)
        self._decoder = Decoder(self._source, self._part)
        before, after = (self.info.sample_rate, self.info.channels), self._decoder.layout
        if before != after:
            change = f"from {before[1]} channels at {before[0]} Hz to {after[1]} at {after[0]} Hz"
            # ffmpeg loses a part of what follows such a change in FLAC and Ogg.
            cure = "split it there and convert the parts one by one"
            raise self._source.error(f"changes after {self._seconds:.1f} s {change}", cure)

    def _empty(self) -> AudioFileError:
        """Return the error of a file without samples."""
        return self._source.error("holds no samples, or its header was never completed", "record or render it again")


class PreparedReader(AudioReader):
    """Read a file block by block at the sample rate, in Hz, and the channels of a model; `info` is that of the file.

    Raises:
        AudioFileError: on opening or reading, as `AudioReader`.
        InputError: on opening or reading, if the file's rate or channels cannot be converted.
    """

    def __init__(self, path: str | os.PathLike[str], sample_rate: int, channels: int) -> None:
        super().__init__(path, _CACHED_BLOCK)
        self.samples = 0
        """Samples a channel that were yielded so far: the exact length, once the file is read."""
        self._channels = channels
        try:
            self._resampler = StreamResampler(self.info.sample_rate, sample_rate, channels)
        except InputError:
            self.close()
            raise

    def views(self) -> Iterator[Audio]:
        """Yield `[channels, samples]` at the rate wanted, in blocks of varying length; the next is written over it."""
        for block in self._resampled():
            self.samples += block.shape[1]
            if self._resampler.changes_rate:
                # Resampling can exceed the peaks of its input. Comparisons with NaN are false.
                self.exceeds_full_scale = not (block.min() >= -1 and block.max() <= 1)
            yield block

    def _resampled(self) -> Iterator[Audio]:
        """Yield the outputs for each block of the file and for its end."""
        for block in super().views():
            yield from self._resampler.outputs(to_channels(block, self._channels))
        yield from self._resampler.last_outputs()


def read_audio(path: str | os.PathLike[str]) -> tuple[Audio, int]:
    """Return the samples of a whole file, `[channels, samples]`, and the sample rate in Hz.

    Raises:
        AudioFileError: as `AudioReader`.
    """
    with AudioReader(path) as reader:
        return np.concatenate(list(reader), axis=1), reader.info.sample_rate


def prepare(audio: Audio, rate_in: int, rate_out: int, channels: int) -> Audio:
    """Convert `[channels of the clip, samples]` to the channels and the sample rate of a model, as the reference does.

    The result, `[channels, resampled_length(samples, rate_in, rate_out)]`, may share memory with `audio`.

    Raises:
        InputError: as `to_channels` and `resample`.
    """
    return resample(to_channels(audio, channels), rate_in, rate_out)
