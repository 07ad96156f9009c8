"""Read one clip of a dataset: its caption, and its audio as the windows that the encoder runs."""

from __future__ import annotations

import hashlib
import math
import os
import random
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import soundfile as sf

from samekit.audio import AudioReader, PreparedReader, resampled_length
from samekit.dataset.changes import file_identity, sha256_of
from samekit.engine.spec import ENCODER
from samekit.errors import AudioFileError, SamekitError
from samekit.files.latents import MODEL_DIGEST, PADDING_MASK
from samekit.files.paths import open_regular, read_regular
from samekit.streaming import WindowCutter

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from samekit.arrays import Array
    from samekit.dataset.manifest import Status
    from samekit.dataset.options import CutOptions
    from samekit.dataset.sources import Source
    from samekit.engine.spec import EngineSpec
    from samekit.windows import ExactWindows, Window

SILENCE_DB: Final = -60
"""A clip is silent if its loudest sample is below this level, relative to full scale."""
_SILENCE_PEAK: Final = 10 ** (SILENCE_DB / 20)
# A larger file is not a caption.
_MOST_CAPTION_BYTES: Final = 2**20


class BadClipError(Exception):
    """A clip cannot be encoded. The manifest records its status and the reason."""

    def __init__(self, status: Status, reason: str, *, transient: bool = False) -> None:
        super().__init__(reason)
        self.status: Status = status
        self.reason = " ".join(reason.split())
        """Cause and cure in one line."""
        self.transient = transient
        """Whether a file cannot be opened now; it may still hold what was encoded before."""

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), transient=self.transient), (self.status, self.reason)


@dataclass(frozen=True)
class Extent:
    """Lengths in latents of a clip, from the shortest to the longest.

        |------- clip -------|--- zeros, up to sample_size ------------ ... -|
        |------ latents ------|                           latents of the clip itself; their mask is 1
        |--------- computed ---------|                    latents that are taken from the encoder
        |------------- sequence ------------|             input of the encoder: `computed` and their context

    `computed` exceeds `latents` only in a padded clip. There, silence latents follow up to `sample_size`.
    """

    latents: int
    computed: int
    sequence: int


@dataclass(frozen=True)
class CuttingRules:
    """How the clips of a run are cut into windows."""

    spec: EngineSpec
    windows: ExactWindows
    """Windows of the encoder."""
    cut: CutOptions

    @property
    def limit(self) -> int:
        """Number of latents of `sample_size`."""
        return self.spec.latents(self.cut.sample_size)

    def extent(self, samples: int) -> Extent:
        """Return the lengths for a clip that has `samples` samples after cutting.

        The sequence ends where the context of the last computed latent ends, at an aligned position. It is not longer
        than `sample_size`, except for clips that are kept whole (`full`).
        """
        latents, context = self.spec.latents(samples), self.spec.contexts[ENCODER]
        pad = self.cut.pad and latents <= self.limit
        computed = self._aligned(latents) + context if pad else latents
        sequence = self._aligned(computed + context)
        if self.cut.full and not pad:
            return Extent(latents, computed, sequence)
        return Extent(latents, min(computed, self.limit), min(sequence, self.limit))

    def room(self, window: Window, extent: Extent) -> int:
        """Return how many latents a window can have at most if zeros are appended to its audio.

        Behind the sequence of a clip, the reference encodes zeros up to `sample_size`; behind a clip that is kept whole
        (`full`) there is no limit. Where the sequence ends earlier, its last latents are not kept, so more zeros do not
        change the others. Other windows than the last one cannot be padded.
        """
        if window.stop != extent.sequence:
            return window.stop - window.start
        unlimited = self.cut.full and not (self.cut.pad and extent.latents <= self.limit)
        end = math.inf if unlimited else self.limit
        return int(min(self.windows.size, end - window.start))

    def _aligned(self, latents: int) -> int:
        """Return the next length at which an aligned window can end."""
        return self.spec.alignment * math.ceil(latents / self.spec.alignment)


@dataclass(frozen=True)
class Clip:
    """A clip that was read completely. Lengths are in samples at the model's rate."""

    prompt: str
    samples: int
    """Length of the whole file."""
    offset: int
    """Samples before the part that is kept."""
    kept: int
    extent: Extent

    def metadata(self, source: Source, rules: CuttingRules) -> dict[str, Any]:
        """Return the contents of the `.json` file: the fields of the reference, and the model."""
        rate = rules.spec.sample_rate
        padding = max(0, rules.limit - self.extent.latents) if rules.cut.pad else 0
        return {
            "path": source.path,
            "relpath": source.relpath,
            **timing(self.samples, self.offset, self.kept, rate, rules.cut),
            PADDING_MASK: [1] * self.extent.latents + [0] * padding,
            "sample_rate": rate,
            "prompt": self.prompt,
            "model": rules.spec.name,
            MODEL_DIGEST: rules.spec.source_sha256,
        }


def timing(samples: int, offset: int, kept: int, rate: int, cut: CutOptions) -> dict[str, Any]:
    """Return the metadata fields that say which part of a file was encoded; the lengths are those of `Clip`."""
    part = kept if cut.full and kept > cut.sample_size else cut.sample_size
    whole = max(samples, part)
    return {
        "timestamps": [offset / whole, (offset + part) / whole],
        "seconds_start": offset // rate,
        "seconds_total": math.ceil(samples / rate),
    }


@dataclass
class ClipReader:
    """Read one clip as windows for the encoder, in memory that does not grow with its length.

    With `checksum`, compute the SHA-256 of both files too.
    """

    source: Source
    rules: CuttingRules
    checksum: bool = False
    clip: Clip | None = None
    """Set after the last window."""
    sha256: str | None = None
    """Digest of the audio; None if the file changed while it was read."""
    caption_sha256: str | None = None
    _identity: tuple[int, ...] | None = None

    def __iter__(self) -> Generator[tuple[Window, Array]]:
        """Yield each window with its audio, `[channels, samples]`. The cores of all windows cover the kept part.

        Raises BadClipError, possibly after some windows.
        """
        path = Path(self.source.path)
        try:
            if self.source.audio is None:
                raise AudioFileError(_why_no_audio(path))
            prompt = self._caption()
            if self.checksum:
                self._identity = file_identity(path)
                self.sha256 = sha256_of(path)
            yield from self._windows(prompt)
        except (SamekitError, OSError) as error:
            reason = str(error) if self.source.path in str(error) else f"{self.source.path}: {error}"
            status: Status = "empty" if self._is_empty() and not self._has_changed() else "unreadable"
            raise BadClipError(status, reason, transient=not _can_be_opened(path)) from error

    def _has_changed(self) -> bool:
        """Return whether the audio file has changed since its digest was computed, and drop the digest if so."""
        if self._identity is None:
            return False
        with suppress(OSError):
            if file_identity(Path(self.source.path)) == self._identity:
                return False
        self.sha256 = None
        return True

    def _require_unchanged(self) -> None:
        if self._has_changed():
            raise AudioFileError(f"{self.source.path}: was changed while it was read; run pre-encode again")

    def _caption(self) -> str:
        path = self.source.caption_path
        if self.source.caption is None:
            raise BadClipError("no_caption", f"{path}: does not exist; write the caption there")
        try:
            content = read_regular(path, _MOST_CAPTION_BYTES)
            if self.checksum:
                self.caption_sha256 = hashlib.sha256(content).hexdigest()
            # Line ends are converted as `Path.read_text` does, with which the reference reads captions.
            prompt = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").strip()
        except OSError as error:
            reason = f"{path}: cannot be read ({error.strerror}); check its permissions and size"
            raise BadClipError("unreadable", reason, transient=not _can_be_opened(path)) from error
        except UnicodeDecodeError as error:
            raise BadClipError("no_caption", f"{path}: cannot be read as UTF-8 ({error}); write it again") from error
        if "\0" in prompt:
            raise BadClipError("no_caption", f"{path}: holds zero bytes, as UTF-16 does; save it as UTF-8")
        if not prompt:
            raise BadClipError("no_caption", f"{path}: is empty; write the caption there")
        return prompt

    def _windows(self, prompt: str) -> Iterator[tuple[Window, Array]]:
        """Cut the part that is kept, and the zeros after it, into windows."""
        rules, spec = self.rules, self.rules.spec
        offset = self._random_offset() if rules.cut.crop == "random" else 0
        cutter = WindowCutter(rules.windows, spec.hop)
        with self._open() as reader:
            kept = 0
            for block in self._kept_blocks(reader, offset):
                if kept == 0 and _is_silent(block):
                    self._require_sound(offset)
                kept += block.shape[1]
                for window, audio in cutter.push(np.clip(block, -1, 1)[None]):
                    yield window, audio[0]
            whole = rules.cut.full or kept < rules.cut.sample_size
            samples = offset + kept if whole else self._length(reader)
            self._require_unchanged()
            self.clip = Clip(prompt, samples, offset, kept, rules.extent(kept))
        zeros = np.zeros((1, spec.channels, spec.samples(self.clip.extent.sequence) - kept), np.float32)
        for window, audio in cutter.push(zeros, final=True):
            yield replace(window, core_stop=min(window.core_stop, self.clip.extent.computed)), audio[0]

    def _open(self) -> PreparedReader:
        return PreparedReader(self.source.path, self.rules.spec.sample_rate, self.rules.spec.channels)

    def _kept_blocks(self, reader: PreparedReader, offset: int) -> Iterator[Array]:
        """Yield the blocks of the part that is kept, and stop reading after it."""
        end = math.inf if self.rules.cut.full else offset + self.rules.cut.sample_size
        position = 0
        for block in reader:
            begin = max(0, offset - position)
            stop = int(min(block.shape[1], end - position))
            if begin < stop:
                yield block[:, begin:stop]
            position += block.shape[1]
            if position >= end:
                return

    def _require_sound(self, offset: int) -> None:
        """Raise BadClipError if the whole kept part is silent, after reading it once."""
        with self._open() as reader:
            if all(_is_silent(block) for block in self._kept_blocks(reader, offset)):
                self._require_unchanged()
                reason = f"no sample reaches {SILENCE_DB} dB; remove the clip"
                raise BadClipError("silent", f"{self.source.path}: {reason}")

    def _length(self, reader: PreparedReader) -> int:
        """Return the length of the whole file, from its header if that can be trusted, else by reading to the end."""
        info = reader.info
        if info.frames is not None and info.format != "MP3":
            announced = resampled_length(info.frames, info.sample_rate, self.rules.spec.sample_rate)
            if announced > reader.samples:
                return announced
        for _ in reader:
            pass
        return reader.samples

    def _random_offset(self) -> int:
        """Return where the kept part begins, which depends only on seed, relpath and length."""
        with self._open() as reader:
            room = self._length(reader) - self.rules.cut.sample_size
        seed = str(self.rules.cut.seed).encode() + os.fsencode(self.source.relpath)
        return random.Random(seed).randint(0, max(0, room))

    def _is_empty(self) -> bool:
        """Return whether a file that could not be read has no samples."""
        if self.source.audio is None:
            return False
        with suppress(sf.SoundFileError, OSError):
            size, _ = self.source.audio
            return size == 0 or sf.info(os.fsencode(self.source.path)).frames == 0
        return False


def _why_no_audio(path: Path) -> str:
    """Return cause and cure for a path that was not a regular file when the dataset was searched."""
    try:
        with open_regular(path):
            return f"{path}: has changed since the dataset was searched; run pre-encode again"
    except FileNotFoundError:
        if path.is_symlink():
            return f"{path}: is a link to a file that does not exist; copy the audio there"
        return f"{path}: does not exist; copy the audio there, or remove its line from filelist.txt"
    except PermissionError as error:
        return f"{path}: cannot be opened ({error.strerror}); check the permissions of it and its folder"
    except OSError:
        return f"{path}: is no regular file; copy the audio there"


def _can_be_opened(path: Path) -> bool:
    with suppress(OSError), open_regular(path):
        return True
    return False


def _is_silent(block: Array) -> bool:
    return bool(np.abs(block).max(initial=0) < _SILENCE_PEAK)


def expected_latents(source: Source, rules: CuttingRules) -> int:
    """Return the latents to encode for a clip according to its header, or 0 if that cannot be read."""
    try:
        with AudioReader(source.path) as reader:
            info = reader.info
    except (SamekitError, OSError):
        return 0
    samples = resampled_length(info.frames or 0, info.sample_rate, rules.spec.sample_rate)
    return rules.extent(samples if rules.cut.full else min(samples, rules.cut.sample_size)).sequence
