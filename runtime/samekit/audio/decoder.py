"""Decode one part of an audio file with libsndfile, and check that all of it was decoded."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import soundfile as sf

from samekit.audio.parts import Part, PieceFile, cut_off, time_stamps_too_small, unknown_bytes
from samekit.audio.tags import file_size
from samekit.errors import AudioFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from samekit.audio.channels import Audio

# libsndfile's SF_COUNT_MAX: the length of a FLAC file that was written to a pipe.
_UNKNOWN_FRAMES: Final = 2**63 - 1
# Fewer unread bytes than this may be an incomplete block of a coding.
_BLOCK_BYTES: Final = 2048


class _SequentialFile(sf.SoundFile):  # type: ignore[misc]  # soundfile ships no type information
    """A sound file that is only read forwards.

    After each read, soundfile seeks to where a seekable file stands already. In Opus files libsndfile then
    returns other samples when the reads are small.
    """

    def seekable(self) -> bool:
        """Return False, whatever the file could do."""
        return False


class Decoder:
    """Read the frames of one part, in order.

    Args:
        path: the file.
        part: of it.

    Raises:
        AudioFileError: libsndfile cannot read it.
    """

    def __init__(self, path: Path, part: Part) -> None:
        self._path = path
        self._part = part
        self._pieces: PieceFile | None = None
        self.frames_read = 0
        """Frames that were decoded so far."""
        with ExitStack() as stack:
            self._stack = stack
            # soundfile takes files with this name for samples without a header, unless it gets a file object.
            named_raw = path.suffix.lower() == ".raw"
            by_name = (part.prefer_file or not part.pieces) and not named_raw
            if by_name:
                self._file = self._open(native(path))
            if not by_name or (part.pieces and not self._counts_right()):
                stack.close()
                with _decoder_errors(path, "cannot be opened", "check name and permissions"):
                    source = stack.enter_context(path.open("rb"))
                    pieces = part.pieces or ((0, file_size(source)),)
                self._pieces = PieceFile(source, pieces)
                self._file = self._open(self._pieces)
                self._pieces.furthest = 0
            self._stack = stack.pop_all()

    def _open(self, source: bytes | str | PieceFile) -> _SequentialFile:
        """Open libsndfile's decoder."""
        cure = "give a file that libsndfile reads, or convert it: ffmpeg -i IN OUT.flac"
        with _decoder_errors(self._path, "cannot be read as audio", cure), self._held_signals(source):
            file = _SequentialFile(source)
        self._stack.callback(file.close)
        return file

    def _counts_right(self) -> bool:
        """Whether the decoder's own count of the whole file can be taken."""
        frames = self._part.frames or 0
        return bool(frames <= self._file.frames <= frames + self._part.slack)

    @property
    def frames(self) -> int | None:
        """Frames that the decoder announces; None if it does not know."""
        return None if self._file.frames >= _UNKNOWN_FRAMES else int(self._file.frames)

    @property
    def layout(self) -> tuple[int, int]:
        """Sample rate in Hz, and channels."""
        return int(self._file.samplerate), int(self._file.channels)

    @property
    def coding(self) -> tuple[str, str]:
        """Format and subtype, as libsndfile names them."""
        return str(self._file.format), str(self._file.subtype)

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def read(self, most: int, seconds: float) -> Audio:
        """Decode up to `most` frames, `[frames, channels]`; none at the end.

        Args:
            most: frames.
            seconds: that precede them in the file, for messages.

        Raises:
            AudioFileError: the decoder fails.
        """
        announced = self.frames
        # The decoder would drop what it decoded beyond the announced frames, and so hide that there was more.
        wanted = most if announced is None else min(most, announced - self.frames_read)
        # The decoder does not tell where in the block.
        cause = f"is damaged after {seconds:.1f} s, before {seconds + wanted / self._file.samplerate:.1f} s"
        with _decoder_errors(self._path, cause, "copy or download it again"), self._held_signals(self._pieces):
            frames: Audio = self._file.read(max(0, wanted), dtype="float32", always_2d=True)
        if self._pieces and self._pieces.error:
            error = self._pieces.error
            raise AudioFileError(f"{self._path}: cannot be read ({error.strerror}); check the disk") from error
        self.frames_read += len(frames)
        return frames

    def check_end(self) -> None:
        """Compare what was decoded with what the part announces and holds.

        Raises:
            AudioFileError: something is missing, or left over.
        """
        announced = self._part.frames if self._part.frames is not None else self.frames
        if announced is not None and not self._part.starts_late and self.frames_read < announced - self._part.slack:
            raise cut_off(self._path)
        self.check_time_stamps()
        if self._part.check_tail and self._pieces:
            rest = self._pieces.unread()
            if rest > _BLOCK_BYTES:
                raise unknown_bytes(self._path, rest, "after the samples that it announces")

    def check_time_stamps(self) -> None:
        """Refuse a part of which the decoder leaves bytes unread because its time stamps announce too little.

        Raises:
            AudioFileError: bytes are left.
        """
        rest = self._pieces.size - self._pieces.tell() if self._part.timed and self._pieces else 0
        if rest > 0:
            seconds = self.frames_read / self._file.samplerate
            raise time_stamps_too_small(self._path, seconds, rest)

    @contextmanager
    def _held_signals(self, source: object) -> Iterator[None]:
        """Hold back signal handlers while the decoder calls back into Python.

        The decoder's callbacks cannot pass on what a handler raises: KeyboardInterrupt would be printed and lost, and
        the file would seem to end there.
        """
        if not isinstance(source, PieceFile) or threading.current_thread() is not threading.main_thread():
            yield
            return
        received: list[tuple[int, Any]] = []
        handlers: dict[signal.Signals, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    handlers[number] = handler
                    signal.signal(number, lambda number, frame: received.append((number, frame)))
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for caught, frame in received:
                handlers[signal.Signals(caught)](caught, frame)


def native(path: Path) -> bytes | str:
    """Return the path in the form in which soundfile takes every name, also one that is no valid text."""
    return os.fsencode(path) if os.name == "posix" else str(path)


@contextmanager
def _decoder_errors(path: Path, cause: str, cure: str) -> Iterator[None]:
    """Raise the decoder's errors as an AudioFileError."""
    try:
        yield
    except (sf.SoundFileError, OSError) as error:
        reason = str(getattr(error, "error_string", None) or getattr(error, "strerror", None) or error).rstrip(".")
        raise AudioFileError(f"{path}: {cause} ({reason}); {cure}") from error
