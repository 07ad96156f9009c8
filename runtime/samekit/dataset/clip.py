"""The clips of a dataset: which files there are, and each of them as the windows that the encoder runs.

Knows the rules by which clips are cut and described; knows no encoder and no output folder.
"""

from __future__ import annotations

import hashlib
import logging
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
from samekit.dataset.sources import Source, universal_newlines
from samekit.engine.spec import ENCODER
from samekit.errors import AudioFileError, SamekitError
from samekit.files.latents import MODEL_DIGEST, PADDING_MASK
from samekit.files.paths import open_regular, read_regular
from samekit.streaming import WindowCutter

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from samekit.arrays import Array
    from samekit.dataset.manifest import Status
    from samekit.engine.spec import EngineSpec
    from samekit.windows import ExactWindows, Window

logger = logging.getLogger(__name__)
SILENCE_DB: Final = -60
"""A clip whose loudest sample lies below this, relative to full scale, is silent."""
# Far more than a model reads; a larger file is something else.
_MOST_CAPTION_BYTES: Final = 2**20
_SILENCE_PEAK: Final = 10 ** (SILENCE_DB / 20)


# --- How a clip is cut --------------------------------------------------------------------------------------


class BadClipError(Exception):
    """A clip that is not encoded; becomes a row with a status and a reason."""

    def __init__(self, status: Status, reason: str, *, transient: bool = False) -> None:
        super().__init__(reason)
        self.status: Status = status
        """Which kind of bad, see `manifest.Status`."""
        self.reason = " ".join(reason.split())
        """Cause and cure, in one line."""
        self.transient = transient
        """Whether its files cannot even be opened now, which says nothing of what is in them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), transient=self.transient), (self.status, self.reason)


@dataclass(frozen=True)
class Extent:
    """Lengths in latents: what is kept of a clip, and the sequence that has to be encoded for it.

        |------- clip -------|--- zeros, up to sample_size ------------ ... -|
        |------ latents ------|                           their mask is 1
        |--------- computed ---------|                    differ from the silence latents; more than `latents` if padded
        |------------- sequence ------------|             computed and the context that they see

    None is shorter than the one above it.
    """

    latents: int
    """Of the clip."""
    computed: int
    """That are taken from the encoder; what follows them in a padded clip are silence latents."""
    sequence: int
    """That the encoder is given."""


@dataclass(frozen=True)
class CuttingRules:
    """What a run does to every clip."""

    spec: EngineSpec
    """Of the model."""
    windows: ExactWindows
    """Of its encoder."""
    sample_size: int
    """Samples at the model's rate to which a clip is cut, or padded."""
    pad: bool
    """Whether the latents of the zeros up to `sample_size` are kept."""
    full: bool
    """Whether longer clips are kept whole."""
    crop: str
    """Which part of a longer clip is kept: `start` or `random`."""
    seed: int
    """Of the random parts."""

    @property
    def limit(self) -> int:
        """Latents of `sample_size`."""
        return self.spec.latents(self.sample_size)

    def extent(self, samples: int) -> Extent:
        """How a clip of so many samples (after cutting) is encoded.

        A clip is followed by zeros up to `sample_size`, and of these matters what the last latent sees: the encoder's
        context, counted from an aligned window's end. Where the zeros end sooner, the sequence ends there. A
        clip that is kept whole has no such end.
        """
        latents, context = self.spec.latents(samples), self.spec.contexts[ENCODER]
        pad = self.pad and latents <= self.limit
        computed = self.aligned(latents) + context if pad else latents
        sequence = self.aligned(computed + context)
        if self.full and not pad:
            return Extent(latents, computed, sequence)
        return Extent(latents, min(computed, self.limit), min(sequence, self.limit))

    def aligned(self, latents: int) -> int:
        """The next length at which an aligned window can end."""
        return self.spec.alignment * math.ceil(latents / self.spec.alignment)


@dataclass(frozen=True)
class Clip:
    """A clip that was read to its end."""

    prompt: str
    """Its caption."""
    samples: int
    """Of the whole file, at the model's rate."""
    offset: int
    """Samples before the part that is kept."""
    kept: int
    """Samples of that part."""
    extent: Extent
    """Its lengths in latents."""

    def metadata(self, source: Source, rules: CuttingRules) -> dict[str, Any]:
        """What the training code reads beside the latents: the fields of the reference, and the model."""
        rate = rules.spec.sample_rate
        padding = max(0, rules.limit - self.extent.latents) if rules.pad else 0
        return {
            "path": source.path,
            "relpath": source.relpath,
            **timing(self.samples, self.offset, self.kept, rate, rules.sample_size, full=rules.full),
            PADDING_MASK: [1] * self.extent.latents + [0] * padding,
            "sample_rate": rate,
            "prompt": self.prompt,
            "model": rules.spec.name,
            MODEL_DIGEST: rules.spec.source_sha256,
        }


def timing(samples: int, offset: int, kept: int, rate: int, sample_size: int, *, full: bool) -> dict[str, Any]:
    """Return the fields of the metadata that say which part of a file was encoded.

    Args:
        samples: of the whole file.
        offset: samples before the part that is kept.
        kept: samples of that part.
        rate: in Hz.
        sample_size: samples that clips are cut to.
        full: whether longer clips are kept whole.
    """
    part = kept if full and kept > sample_size else sample_size
    whole = max(samples, part)
    return {
        "timestamps": [offset / whole, (offset + part) / whole],
        "seconds_start": offset // rate,
        "seconds_total": math.ceil(samples / rate),
    }


class ClipReader:
    """Reads one clip as windows for the encoder, in a memory that does not grow with its length.

    Args:
        source: the files.
        rules: how to cut them.
        checksum: whether to compute digests of the files that were read.
    """

    def __init__(self, source: Source, rules: CuttingRules, *, checksum: bool = False) -> None:
        self._source = source
        self._rules = rules
        self._checksum = checksum
        self._signature: tuple[int, ...] | None = None
        self.clip: Clip | None = None
        """What is known of the clip once every window was taken."""
        self.sha256: str | None = None
        """Digest of the audio file that was read; None if none was asked for, or the file changed meanwhile."""
        self.caption_sha256: str | None = None
        """Digest of the caption, likewise."""

    def __iter__(self) -> Generator[tuple[Window, Array]]:
        """Yield each window and its audio, `[channels, samples]`; together the cores are what is to be kept.

        Raises:
            BadClipError: there is nothing to encode, or reading failed, maybe after some windows.
        """
        path = Path(self._source.path)
        try:
            if self._source.audio is None:
                raise AudioFileError(_why_no_audio(path))
            prompt = self._caption()
            if self._checksum:
                self._signature = _signature(path)
                self.sha256 = digest_of(path)
            yield from self._windows(prompt)
        except (SamekitError, OSError) as error:
            reason = str(error) if self._source.path in str(error) else f"{self._source.path}: {error}"
            status: Status = "empty" if self._is_empty() and not self._has_changed() else "unreadable"
            raise BadClipError(status, reason, transient=not _opens(path)) from error

    def _has_changed(self) -> bool:
        """Whether the audio file is another one than that whose digest was taken; forgets the digest if so."""
        if self._signature is None:
            return False
        with suppress(OSError):
            if _signature(Path(self._source.path)) == self._signature:
                return False
        self.sha256 = None
        return True

    def _require_unchanged(self) -> None:
        """Raise if the audio file was changed since its digest was taken."""
        if self._has_changed():
            raise AudioFileError(f"{self._source.path}: was changed while it was read; run pre-encode again")

    def _caption(self) -> str:
        """The text beside the audio."""
        path = self._source.caption_path
        if self._source.caption is None:
            raise BadClipError("no_caption", f"{path}: does not exist; write the caption there")
        try:
            content = read_regular(path, _MOST_CAPTION_BYTES)
            if self._checksum:
                self.caption_sha256 = hashlib.sha256(content).hexdigest()
            prompt = universal_newlines(content.decode("utf-8-sig")).strip()
        except OSError as error:
            reason = f"{path}: cannot be read ({error.strerror}); check its permissions and size"
            raise BadClipError("unreadable", reason, transient=not _opens(path)) from error
        except UnicodeDecodeError as error:
            raise BadClipError("no_caption", f"{path}: cannot be read as UTF-8 ({error}); write it again") from error
        if "\0" in prompt:
            raise BadClipError("no_caption", f"{path}: holds zero bytes, as UTF-16 does; save it as UTF-8")
        if not prompt:
            raise BadClipError("no_caption", f"{path}: is empty; write the caption there")
        return prompt

    def _windows(self, prompt: str) -> Iterator[tuple[Window, Array]]:
        """Cut the part that is kept, and the zeros that count, into windows."""
        rules, spec = self._rules, self._rules.spec
        offset = self._random_offset() if rules.crop == "random" and not rules.full else 0
        cutter = WindowCutter(rules.windows, spec.hop)
        with self._open() as reader:
            kept = 0
            for block in self._part(reader, offset):
                if kept == 0 and _is_silent(block):
                    self._require_sound(offset)
                kept += block.shape[1]
                for window, audio in cutter.push(np.clip(block, -1, 1)[None]):
                    yield window, audio[0]
            whole = rules.full or kept < rules.sample_size
            samples = offset + kept if whole else self._length(reader)
            self._require_unchanged()
            self.clip = Clip(prompt, samples, offset, kept, rules.extent(kept))
        zeros = np.zeros((1, spec.channels, spec.samples(self.clip.extent.sequence) - kept), np.float32)
        for window, audio in cutter.push(zeros, final=True):
            yield replace(window, core_stop=min(window.core_stop, self.clip.extent.computed)), audio[0]

    def _open(self) -> PreparedReader:
        """Open the audio at the model's rate and channels."""
        return PreparedReader(self._source.path, self._rules.spec.sample_rate, self._rules.spec.channels)

    def _part(self, reader: PreparedReader, offset: int) -> Iterator[Array]:
        """Yield the blocks of the part that is kept, and stop reading after it."""
        end = math.inf if self._rules.full else offset + self._rules.sample_size
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
        """Read the part once, for its loudness alone: a clip may begin with any length of silence."""
        with self._open() as reader:
            if all(_is_silent(block) for block in self._part(reader, offset)):
                self._require_unchanged()
                reason = f"no sample reaches {SILENCE_DB} dB; remove the clip"
                raise BadClipError("silent", f"{self._source.path}: {reason}")

    def _length(self, reader: PreparedReader) -> int:
        """Samples of the whole file at the model's rate, of which some may have been read."""
        announced = _announced_samples(reader, self._rules.spec.sample_rate)
        if announced is None or announced <= reader.samples:
            for _ in reader:
                pass
            return reader.samples
        return announced

    def _random_offset(self) -> int:
        """Where the part that is kept begins: any place, but always the same one for a seed and a relpath."""
        with self._open() as reader:
            room = self._length(reader) - self._rules.sample_size
        seed = str(self._rules.seed).encode() + os.fsencode(self._source.relpath)
        return random.Random(seed).randint(0, max(0, room))  # noqa: S311 no secret

    def _is_empty(self) -> bool:
        """Whether a file that could not be read has no samples."""
        if self._source.audio is None:
            return False
        with suppress(sf.SoundFileError, OSError):
            size, _ = self._source.audio
            return size == 0 or sf.info(os.fsencode(self._source.path)).frames == 0
        return False


def digest_of(path: Path) -> str:
    """Return the SHA-256 of what a file holds.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _signature(path: Path) -> tuple[int, ...]:
    """Return what changes whenever a file is written or replaced, even if its time of modification is set back.

    Raises:
        OSError: it is not there.
    """
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _why_no_audio(path: Path) -> str:
    """Return what is wrong with an audio file that was no regular file when it was found, and the cure."""
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


def _opens(path: Path) -> bool:
    """Whether a file is there and can be opened."""
    with suppress(OSError), open_regular(path):
        return True
    return False


def _is_silent(block: Array) -> bool:
    """Whether every sample lies below the threshold."""
    return bool(np.abs(block).max(initial=0) < _SILENCE_PEAK)


def _announced_samples(reader: PreparedReader, rate: int) -> int | None:
    """Samples at `rate` if the header of the file can be trusted."""
    info = reader.info
    if info.frames is None or info.format == "MP3":
        return None
    return resampled_length(info.frames, info.sample_rate, rate)


def expected_latents(source: Source, rules: CuttingRules) -> int:
    """Latents to encode for a clip, judged by its header; 0 if it cannot be read."""
    try:
        with AudioReader(source.path) as reader:
            info = reader.info
    except (SamekitError, OSError):
        return 0
    samples = resampled_length(info.frames or 0, info.sample_rate, rules.spec.sample_rate)
    return rules.extent(samples if rules.full else min(samples, rules.sample_size)).sequence
