"""Decode the sound of files that libsndfile does not read, with FFmpeg through the optional package PyAV."""

from __future__ import annotations

import logging
import math
import os
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samekit.audio.av_formats import INSTALL_AV, NAMES
from samekit.audio.av_structure import check_structure
from samekit.audio.front_channels import no_front
from samekit.audio.source import CONVERT, COPY
from samekit.errors import BackendError, SamekitError, first_line
from samekit.packages import import_package

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.audio.channels import Audio
    from samekit.audio.parts import Part
    from samekit.audio.source import Source

logger = logging.getLogger(__name__)

# FFmpeg's names of left and right: front, back, side, front of centre, top front, top back, stereo downmix.
_PAIRS: Final = (("FL", "FR"), ("BL", "BR"), ("SL", "SR"), ("FLC", "FRC"), ("TFL", "TFR"), ("TBL", "TBR"), ("DL", "DR"))
# Samples by which the sound of an MP4 file may differ from its announced length: encoder delay and padding. iTunes
# writes a delay of 2,112 samples, and FFmpeg accepts up to 16,384.
_SLACK: Final = 2**14
# Formats that store how long they are. If sound is all that they hold, FFmpeg must find that much, but for this.
_TIMED: Final = (NAMES["matroska"], NAMES["asf"], NAMES["flv"])
_MOST_MISSING_SECONDS: Final = 0.5
# Time stamps are rounded to milliseconds or less. A larger jump shows that FFmpeg has left out damaged data.
_MOST_GAP_SECONDS: Final = 0.1
_STRICT: Final = {"err_detect": "crccheck+bitstream+buffer+explode"}


class AvDecoder:
    """Read the sound of a file, in order, with the interface of `Decoder`.

    The first two channels are left and right. Delay and padding of the encoder are left out as far as the file tells
    them. Of several sounds, the default one is read, or else the first.

    Raises:
        AudioFileError: PyAV is not installed, the file holds no sound, or FFmpeg cannot read it.
    """

    is_integer = False

    def __init__(self, source: Source, part: Part) -> None:
        self._source = source
        self._name = NAMES[part.demuxer]
        try:
            self._av = import_package("av", INSTALL_AV)
        except BackendError as error:
            cause = f"holds {self._name}, which libsndfile does not read, and {error.cause}"
            raise source.error(cause, f"run: {INSTALL_AV}, or {CONVERT}") from None
        self._edit_unit = check_structure(source, part.demuxer)
        # FFmpeg opens the path again. Its readers in Python would lose KeyboardInterrupt. No other file is opened.
        options = {"protocol_whitelist": "file", "codec_whitelist": _audio_decoders(self._av)}
        url = f"file:{os.path.abspath(source.path)}"
        self._frames_read = 0
        # End of the last frame in seconds, if the file tells times.
        self._time: float | None = None
        with self._decoding(f"cannot be read as {self._name}", CONVERT):
            # PyAV also passes `options` to the streams, of which FFmpeg may find more later.
            self._container = self._av.open(
                url, format=part.demuxer, container_options=options, metadata_errors="replace"
            )
            try:
                self._open()
            except BaseException:
                self.close()
                raise

    def _open(self) -> None:
        """Choose the stream, and decode its first frame: the header may tell half of the rate (HE-AAC)."""
        self._stream = self._choose()
        for stream in self._container.streams:
            if stream is not self._stream:
                stream.discard = self._av.stream.Discard.all
        context = self._stream.codec_context
        if context is None:
            raise self._source.error("holds sound that FFmpeg cannot decode, which may be encrypted", CONVERT)
        context.options = _STRICT
        self.layout = int(context.sample_rate or 1), int(context.layout.nb_channels or 1)
        self._blocks = self._decoded()
        self._held = next(self._blocks, np.empty((0, self.layout[1]), np.float32))
        self._most, is_exact = self._length()
        self.frames = 0 if not len(self._held) else self._most if is_exact else None
        version = f"FFmpeg {self._av.ffmpeg_version_info} (PyAV {self._av.__version__})"
        self.coding = self._name, str(context.codec.canonical_name), version

    def _choose(self) -> Any:
        """Return the stream to read."""
        sounds = self._container.streams.audio
        if not sounds:
            raise self._source.error("holds no sound", "give a file that holds sound")
        default = self._av.stream.Disposition.default
        chosen = next((stream for stream in sounds if stream.disposition & default), sounds[0])
        if len(sounds) > 1:
            logger.warning(
                "%s: holds %d sounds; number %d is read", self._source.path, len(sounds), 1 + sounds.index(chosen)
            )
        return chosen

    def _length(self) -> tuple[int | None, bool]:
        """Return the most samples that an MP4 file announces, and whether this is exact.

        FFmpeg leaves out the delay of the encoder, but not all of the padding. The length of the sound is in an edit
        list, or in the tag of iTunes.
        """
        stream = self._stream
        # Files in fragments tell the length of the first fragment only.
        if self._name != NAMES["mov"] or not stream.frames or not stream.duration:
            return None, False
        rate = self.layout[0]
        length = math.ceil(stream.duration * stream.time_base * rate)
        fields = str(self._container.metadata.get("iTunSMPB", "")).split()
        with suppress(ValueError):
            if len(fields) > 3 and length - _SLACK <= int(fields[3], 16) <= length:
                return int(fields[3], 16), True
        rounding = math.ceil(self._edit_unit * rate)
        return (length, True) if rounding <= 1 else (length + rounding, False)

    def _decoded(self) -> Iterator[Audio]:
        """Yield the samples of each frame, `[frames, channels]`."""
        first = held = end = None
        order: list[int] = []
        for packet in self._container.demux(self._stream):
            if packet.pts is not None and packet.duration:
                end = packet.pts + packet.duration
            for frame in packet.decode():
                if packet.is_corrupt or frame.is_corrupt:
                    raise self._source.error("is damaged, FFmpeg reports an incomplete packet", COPY)
                found = frame.sample_rate, frame.layout.name
                if first is None:
                    first, order = found, self._order(frame.layout)
                    self.layout = int(frame.sample_rate), int(frame.layout.nb_channels)
                elif found != first:
                    change = f"from {first[1]} at {first[0]} Hz to {found[1]} at {found[0]} Hz"
                    raise self._source.error(f"changes {change}", "split it there and convert the parts one by one")
                self._check_time(frame)
                if held is not None:
                    yield held
                held = _floats(frame)
                if order != sorted(order):
                    held = held[:, order]
        if held is not None:
            yield held[: len(held) - self._padding(end)]
        self._check_duration()

    def _padding(self, end: int | None) -> int:
        """Return the samples by which the last frame exceeds the end of its packet, which MP4 files tell exactly.

        `end` is in the time base of the stream.
        """
        rate = self.layout[0]
        if self._name != NAMES["mov"] or end is None or self._time is None or self._stream.time_base * rate > 1:
            return 0
        return max(0, round((self._time - float(end * self._stream.time_base)) * rate))

    def _check_duration(self) -> None:
        """Check that the last frame ends where the file does, if it holds nothing but this sound."""
        if self._name in _TIMED and len(self._container.streams) == 1 and self._container.duration:
            seconds = self._container.duration / self._av.time_base - (self._time or 0)
            if seconds > _MOST_MISSING_SECONDS:
                raise self._source.error(f"lacks {seconds:.1f} s at its end, or it is damaged there", COPY)

    def _check_time(self, frame: Any) -> None:
        """Check that a frame begins where the one before ended."""
        time = frame.time if frame.time is not None else self._time
        if time is not None and self._time is not None and abs(time - self._time) > _MOST_GAP_SECONDS:
            cause = f"its time stamps jump from {self._time:.1f} s to {time:.1f} s"
            raise self._source.error(cause, f"{COPY}; or, if it was recorded so, {CONVERT}")
        self._time = None if time is None else time + frame.samples / frame.sample_rate

    def _order(self, layout: Any) -> list[int]:
        """Return the indices of the channels: left, right, the others."""
        names = [channel.name for channel in layout.channels]
        rest = list(range(len(names)))
        for left, right in _PAIRS:
            if left in names and right in names:
                front = [names.index(left), names.index(right)]
                return front + [index for index in rest if index not in front]
        # Formats that do not tell the places of their channels begin with left and right.
        if len(names) > 1 and not all(name in ("NONE", "UNK") for name in names):
            raise no_front(self._source, f"holds the channels {layout.name}")
        return rest

    def read(self, most: int, seconds: float) -> Audio:
        """Decode up to `most` frames, `[frames, channels]`; none at the end. `seconds` of the file precede them."""
        wanted = most if self._most is None else min(most, self._most - self._frames_read)
        held, count = [self._held], len(self._held)
        with self._decoding(f"is damaged after {seconds:.1f} s", COPY):
            while count < wanted and (block := next(self._blocks, None)) is not None:
                held.append(block)
                count += len(block)
        joined = np.concatenate(held) if len(held) > 1 else self._held
        frames, self._held = joined[:wanted], joined[wanted:]
        self._frames_read += len(frames)
        return frames

    def check_end(self) -> None:
        """Raise an error if the file holds much less or much more than it announces."""
        if self._most is None:
            return
        rest = len(self._held)
        with self._decoding("is damaged at its end", COPY):
            for block in self._blocks:
                rest += len(block)
        if self._frames_read < self._most - _SLACK:
            raise self._source.cut_off()
        if rest > _SLACK:
            seconds = self._most / self.layout[0]
            raise self._source.error(f"announces {seconds:.1f} s, and holds {rest} samples more", CONVERT)

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    @contextmanager
    def _decoding(self, cause: str, cure: str) -> Iterator[None]:
        """Raise the errors of FFmpeg as an AudioFileError."""
        try:
            yield
        except SamekitError:
            raise
        # ValueError: PyAV does not convert some types of samples.
        except (self._av.FFmpegError, ValueError) as error:
            if isinstance(error, OSError):
                cause, cure = "cannot be read", "check the disk"
            reason = getattr(error, "strerror", None) or first_line(error).rstrip(".")
            raise self._source.error(f"{cause} ({reason})", cure) from error


def _floats(frame: Any) -> Audio:
    """Return the samples of a frame of FFmpeg, `[frames, channels]`."""
    array = frame.to_ndarray()
    array = array.T if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)
    # Samples beyond float32 become infinite, which the reader refuses.
    with np.errstate(over="ignore"):
        if array.dtype == np.uint8:
            array = (array - 128.0) / 128
        elif array.dtype.kind == "i":
            array = array / 2.0 ** (8 * array.dtype.itemsize - 1)
        samples: Audio = array.astype(np.float32)
    return samples


@cache
def _audio_decoders(av: Any) -> str:
    """Return the names of FFmpeg's decoders of sound. While it opens a file, FFmpeg would also decode pictures."""
    names = set()
    for name in av.codecs_available:
        try:
            codec = av.Codec(name, "r")
        except ValueError:
            continue
        if codec.type == "audio":
            names.add(codec.name)
    return ",".join(sorted(names))
