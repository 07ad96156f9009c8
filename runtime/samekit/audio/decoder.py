"""Decode one part of an audio file with libsndfile, and check that all of it was decoded."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import soundfile as sf

from samekit.audio.parts import Part, Piece, PieceFile
from samekit.audio.source import CONVERT, COPY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.audio.channels import Audio
    from samekit.audio.source import Source

# libsndfile's SF_COUNT_MAX: the length of a FLAC file that was written to a pipe.
_UNKNOWN_FRAMES: Final = 2**63 - 1
# libsndfile's SF_ERR_SYSTEM: the operating system could not read.
_SYSTEM_ERROR: Final = 2
# Most bytes of the pieces of a file that are copied to memory, where libsndfile reads them without calls into Python.
_COPIED_BYTES: Final = 2**24
# Fewer unread bytes may be an incomplete block of a codec.
_BLOCK_BYTES: Final = 2048
# Containers whose 16-bit samples libsndfile copies as they are. NumPy converts them to the same floats in less than a
# tenth of the time that libsndfile takes.
_COPIED: Final = ("WAV", "WAVEX", "W64", "RF64")
_SCALE: Final = np.float32(2**-15)


def _file_in_memory() -> int | None:
    """Return the descriptor of a new file in memory; None where the system has or allows none."""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):
            descriptor: int = os.memfd_create("samekit")
            return descriptor
    return None


class _SequentialFile(sf.SoundFile):  # type: ignore[misc]  # soundfile ships no type information
    """A sound file that is only read forwards.

    After each read, soundfile seeks to the current position of a seekable file. In Opus files, libsndfile then returns
    other samples if the reads are small.
    """

    def seekable(self) -> bool:
        return False


class Decoder:
    """Read the frames of one part, in order.

    `layout` is the sample rate in Hz and the channels, `coding` the format and the subtype as libsndfile names them and
    the version of libsndfile, `frames` what the decoder announces, or None.

    Raises:
        AudioFileError: libsndfile cannot read it.
    """

    def __init__(self, source: Source, part: Part) -> None:
        self._source = source
        self._part = part
        self._open(part.pieces)
        frames = part.frames or 0
        if part.count_frame and not frames <= self._file.frames <= frames + part.slack:
            self.close()
            self._open((part.count_frame, *part.pieces))
        self.layout = int(self._file.samplerate), int(self._file.channels)
        self.coding = str(self._file.format), str(self._file.subtype), f"libsndfile {sf.__libsndfile_version__}"
        self.frames = None if self._file.frames >= _UNKNOWN_FRAMES else int(self._file.frames)
        self._frames_read = 0
        self._buffer: Audio = np.empty((0, self.layout[1]), np.float32)
        is_copied = self.coding[0] in _COPIED and self.coding[1] == "PCM_16"
        self.is_integer = is_copied
        """Whether the samples are 16-bit integers, so that none exceeds full scale."""
        # 16-bit samples before their conversion; None if libsndfile returns floats.
        self._integers = np.empty(self._buffer.shape, np.int16) if is_copied else None

    def _open(self, pieces: tuple[Piece, ...]) -> None:
        self._pieces = PieceFile(self._source, pieces)
        file: PieceFile | int = self._pieces
        self._descriptor = None
        # libsndfile reads faster without calls into Python. It then moves the position of the file, so nothing else may
        # read. On Windows, it may use another C library, to which Python's descriptors mean nothing.
        with ExitStack() as stack:
            if pieces == ((0, self._source.size),) and not self._part.count_frame and os.name == "posix":
                file = self._descriptor = self._source.descriptor
                os.lseek(file, 0, os.SEEK_SET)
            elif self._pieces.size <= _COPIED_BYTES and (memory := _file_in_memory()) is not None:
                file = self._descriptor = memory
                stack.callback(os.close, file)
                self._pieces.copy_to(file)
            with self._decoding("cannot be read as audio", f"give a file that libsndfile reads, or {CONVERT}"):
                self._file = stack.enter_context(_SequentialFile(file, closefd=False))
            self._opened = stack.pop_all()

    def close(self) -> None:
        """Close the decoder; the source stays open."""
        self._opened.close()

    def read(self, most: int, seconds: float) -> Audio:
        """Decode up to `most` frames, `[frames, channels]`; none at the end. `seconds` of the file precede them.

        The next call writes over them.
        """
        # libsndfile would drop frames beyond the announced ones, which hides that there are more.
        wanted = most if self.frames is None else max(0, min(most, self.frames - self._frames_read))
        # libsndfile does not report the position within the block.
        cause = f"is damaged after {seconds:.1f} s, before {seconds + wanted / self.layout[0]:.1f} s"
        if len(self._buffer) < wanted:
            self._buffer = np.empty((wanted, self.layout[1]), np.float32)
            if self._integers is not None:
                self._integers = np.empty(self._buffer.shape, np.int16)
        stored = self._buffer if self._integers is None else self._integers
        with self._decoding(cause, COPY):
            read = self._file.read(out=stored[:wanted])
        frames = self._buffer[: len(read)]
        if self._integers is not None:
            np.multiply(read, _SCALE, out=frames)
        self._frames_read += len(frames)
        return frames

    def check_end(self) -> None:
        """Raise an error if less was decoded than the part announces or holds."""
        announced = self.frames if self._part.frames is None else self._part.frames
        if announced is not None and not self._part.starts_late and self._frames_read < announced - self._part.slack:
            raise self._source.cut_off()
        descriptor = self._descriptor
        position = self._pieces.tell() if descriptor is None else os.lseek(descriptor, 0, os.SEEK_CUR)
        rest = self._pieces.size - position
        if self._part.timed and rest > 0:
            seconds = self._frames_read / self.layout[0]
            cause = f"its time stamps announce {seconds:.1f} s, and {rest} bytes follow"
            raise self._source.error(cause, CONVERT)
        if self._part.check_tail and rest > _BLOCK_BYTES:
            raise self._source.unknown_bytes(rest, "after the samples that it announces")

    @contextmanager
    def _decoding(self, cause: str, cure: str) -> Iterator[None]:
        """Raise the decoder's errors as an AudioFileError, and hold back signal handlers.

        libsndfile calls `PieceFile` to read, and cannot pass on what a handler raises there: KeyboardInterrupt would be
        printed and lost, and the file would seem to end.
        """
        failure: sf.SoundFileError | None = None
        received: list[tuple[int, Any]] = []
        # Only the main thread may set handlers, and only it runs them.
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
        try:
            for number in handlers:
                signal.signal(number, lambda number, frame: received.append((number, frame)))
            yield
        except sf.SoundFileError as error:
            failure = error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for caught, frame in received:
                handlers[signal.Signals(caught)](caught, frame)
        if fault := self._pieces.error:
            raise self._source.error(f"cannot be read ({fault.strerror})", "check the disk") from fault
        if failure:
            reason = str(getattr(failure, "error_string", failure)).rstrip(".")
            if getattr(failure, "code", None) == _SYSTEM_ERROR:
                cause, cure = "cannot be read", "check the disk"
            raise self._source.error(f"{cause} ({reason})", cure) from failure
