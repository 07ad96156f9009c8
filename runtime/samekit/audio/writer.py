"""Write .wav and .flac files block by block."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import soundfile as sf

from samekit.errors import InputError, OutputError
from samekit.files.atomic import atomic_path, output_errors

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from samekit.audio.channels import Audio

# Bits of the integer subtypes of each format; 0 stands for floating point.
_SUBTYPES: Final = {
    "WAV": {"PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "FLOAT": 0},
    "FLAC": {"PCM_16": 16, "PCM_24": 24},
}
# WAV counts its bytes in 32 bits, and its headers take less than 4 KiB of them.
_WAV_BYTES: Final = 2**32 - 2**12


def format_of(path: Path, subtype: str) -> str:
    """Return the format of an output file, by its suffix: WAV or FLAC.

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
    """Write a .wav or .flac file block by block. The file appears atomically when the `with` block ends without error.

    Integer subtypes are rounded to the nearest step and limited to full scale; `samekit.audio.write_blocks` applies
    other peak policies. A WAV file of more than 4 GiB is written as RF64, if `frames` announces it.

    Args:
        path: the file; its suffix is the format.
        sample_rate: in Hz.
        channels: of every block.
        subtype: `PCM_16`, `PCM_24`, and in WAV also `PCM_32` or `FLOAT`.
        frames: samples a channel that will be written, if known.

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
    ) -> None:
        self.path = Path(path)
        """The file; absent before the `with` block ends."""
        self.frames = 0
        """Samples a channel that were written so far."""
        self.sample_rate = sample_rate
        """In Hz."""
        self.channels = channels
        self._subtype = subtype
        self._format = format_of(self.path, subtype)
        self._bits = _SUBTYPES[self._format][subtype]
        self.highest = 1 - 2.0 ** (1 - self._bits) if self._bits else 1.0
        """Highest sample that the subtype holds; the lowest one is -1. Both are full scale."""
        self._frame_bytes = channels * (self._bits or 32) // 8
        if self._format == "WAV" and (frames or 0) * self._frame_bytes > _WAV_BYTES:
            self._format = "RF64"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._temporary = stack.enter_context(atomic_path(self.path, follow_links=True))
            # soundfile encodes text in UTF-8, but POSIX names may be any bytes.
            name = os.fsencode(self._temporary) if os.name == "posix" else str(self._temporary)
            try:
                self._file = sf.SoundFile(
                    name, "w", self.sample_rate, self.channels, self._subtype, format=self._format
                )
            except sf.SoundFileError as error:
                layout = f"{self.channels} channels at {self.sample_rate} Hz"
                raise InputError(f"{self.path}: {self._format} cannot hold {layout}; change them") from error
            stack.callback(self._close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _close(self) -> None:
        with output_errors(self.path, sf.SoundFileError):
            self._file.close()

    def check(self, audio: Audio) -> None:
        """Raise InputError if a block has another shape than `[channels, samples]`, or holds NaN or infinity."""
        if audio.ndim != 2 or audio.shape[0] != self.channels:
            raise InputError(f"block of shape {audio.shape} does not fit; give [{self.channels}, samples]")
        if not np.isfinite(audio).all():
            raise InputError(f"{self.path}: the audio holds NaN or infinity; remove them before writing")

    def write(self, audio: Audio) -> None:
        """Append a block, `[channels, samples]`.

        Raises:
            InputError: as `check`.
            OutputError: the disk is full, or the file becomes too long for WAV.
        """
        self.check(audio)
        self.frames += audio.shape[1]
        if self._format == "WAV" and self.frames * self._frame_bytes > _WAV_BYTES:
            raise OutputError(f"{self.path}: WAV ends at 4 GiB; write .flac, or announce the length (frames=)")
        samples: npt.NDArray[np.float32 | np.int32] = _quantized(audio, self._bits) if self._bits else audio
        with output_errors(self.path, sf.SoundFileError):
            try:
                self._file.write(samples.T)
            except sf.SoundFileError:
                # libsndfile does not report the reason. Another write of this size raises the error of the system.
                with self._temporary.open("ab") as file:
                    file.write(bytes(samples.nbytes))
                raise


def _quantized(audio: Audio, bits: int) -> npt.NDArray[np.int32]:
    """Round to the steps of a PCM subtype, in the upper bits, where libsndfile takes them from.

    libsndfile's own conversion rounds down when it clips, which shifts a WAV file by half a step.
    """
    full_scale = 1 << (bits - 1)
    steps = np.rint(audio.astype(np.float64) * full_scale)
    limited = np.clip(steps, -full_scale, full_scale - 1).astype(np.int32)
    return limited << (32 - bits)
