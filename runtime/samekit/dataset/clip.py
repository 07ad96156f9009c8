"""Read one clip of a dataset: its caption, and its audio as the windows that the encoder runs."""

from __future__ import annotations

import hashlib
import math
import os
import random
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import soundfile as sf

from samekit.audio import AudioReader, PreparedReader, resampled_length
from samekit.dataset.bad_clip import BadClipError
from samekit.dataset.captions import MOST_CAPTION_BYTES, Caption, captions_sha256, choose_caption
from samekit.dataset.changes import file_identity, sha256_of
from samekit.dataset.file_names import mirrored_name
from samekit.engine.spec import ENCODER
from samekit.errors import AudioFileError, SamekitError
from samekit.files.latents import MODEL_DIGEST, PADDING_MASK
from samekit.files.paths import open_regular, read_regular
from samekit.streaming import WindowCutter, new_array

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from samekit.arrays import Array
    from samekit.audio import AudioInfo
    from samekit.dataset.file_names import Layout
    from samekit.dataset.loudness import Loudness
    from samekit.dataset.manifest import Status
    from samekit.dataset.options import CutOptions, PreEncodeOptions
    from samekit.dataset.sources import Source
    from samekit.engine.spec import EngineSpec
    from samekit.windows import ExactWindows, Window

SILENCE_DB: Final = -60
"""A clip is silent if its loudest sample is below this level, relative to full scale."""
# As in `PhaseFlipper` of stable_audio_3/data/utils.py.
_FLIP_PROBABILITY: Final = 0.5
_SILENCE_PEAK: Final = 10 ** (SILENCE_DB / 20)


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
    layout: Layout = "numbered"

    @property
    def window_values(self) -> int:
        """Samples of all channels of the longest window."""
        return self.spec.channels * self.spec.samples(self.windows.size)

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

    caption: Caption
    samples: int
    """Length of the whole file."""
    offset: int
    """Samples before the part that is kept."""
    kept: int
    extent: Extent
    decoder: str
    """Library that decoded the file."""
    is_flipped: bool = False
    """Whether the phase is inverted."""
    loudness: Loudness | None = None
    """The gain of the audio, if the loudness is corrected."""

    def metadata(self, source: Source, rules: CuttingRules) -> dict[str, Any]:
        """Return the contents of the `.json` file: the fields that training reads, the model, and the caption's own."""
        rate = rules.spec.sample_rate
        padding = max(0, rules.limit - self.extent.latents) if rules.cut.pad else 0
        prompt, mirror_fields = self.caption.prompt, {}
        if rules.layout == "mirror":
            mirror_fields["latent_shape"] = [rules.spec.latent_width, self.extent.latents + padding]
        elif not prompt:
            # The reference needs a prompt. The trainers that read mirrored folders make one from the tags themselves.
            prompt = self.caption.tag_prompt
        return {
            "path": source.path,
            **names_of(source.relpath, rules.layout),
            **timing(self.samples, self.offset, self.kept, rate, rules.cut, rules.layout),
            PADDING_MASK: [1] * self.extent.latents + [0] * padding,
            **mirror_fields,
            "sample_rate": rate,
            "decoder": self.decoder,
            **({"prompt": prompt} if prompt else {}),
            "caption_source": self.caption.source,
            **({"phase_flipped": self.is_flipped} if rules.cut.flip == "random" else {}),
            **(self.loudness.metadata() if self.loudness else {}),
            "model": rules.spec.name,
            MODEL_DIGEST: rules.spec.source_sha256,
            **self.caption.fields,
        }


def names_of(relpath: str, layout: Layout) -> dict[str, str]:
    """Return the metadata fields that name the clip."""
    if layout == "numbered":
        return {"relpath": relpath}
    return {"relpath": f"{mirrored_name(relpath)}.npy", "src_relpath": relpath}


def timing(samples: int, offset: int, kept: int, rate: int, cut: CutOptions, layout: Layout) -> dict[str, Any]:
    """Return the metadata fields that say which part of a file was encoded; the lengths are those of `Clip`.

    `seconds_total` is the length of the file, rounded up, as in the reference. In the mirror layout, it is the length
    of the part that was encoded, with three decimals, as in the scripts of other trainers.
    """
    part = kept if cut.full and kept > cut.sample_size else cut.sample_size
    whole = max(samples, part)
    fields = {"timestamps": [offset / whole, (offset + part) / whole], "seconds_start": offset // rate}
    if layout == "numbered":
        return {**fields, "seconds_total": math.ceil(samples / rate)}
    return {**fields, "seconds_total": round(kept / rate, 3), "audio_samples": kept}


@dataclass
class ClipReader:
    """Read one clip as windows for the encoder, in memory that does not grow with its length.

    With `checksum`, compute the SHA-256 of both files too.
    """

    source: Source
    rules: CuttingRules
    captions: Sequence[str] = ("txt",)
    """The sources of captions, see `samekit.dataset.captions`."""
    checksum: bool = False
    gain: float = 1.0
    """Factor of the samples, after they are clipped to full scale."""
    allocate: Callable[[tuple[int, ...]], Array] = new_array
    """Returns a float32 array of a shape, with any values, for a window."""
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
            caption = self._caption()
            if self.checksum:
                self._identity = file_identity(path)
                self.sha256 = sha256_of(path)
            yield from self._windows(caption)
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

    def _caption(self) -> Caption:
        """Read all caption files, because their digests show whether one has changed, and choose the caption."""
        contents = []
        for file in self.source.captions:
            path = Path(file.path)
            try:
                contents.append(read_regular(path, MOST_CAPTION_BYTES))
            except OSError as error:
                reason = f"{path}: cannot be read ({error.strerror}); check its permissions and size"
                raise BadClipError("unreadable", reason, transient=not _can_be_opened(path)) from error
        if self.checksum:
            digests = [hashlib.sha256(content).hexdigest() for content in contents]
            sources = [file.source for file in self.source.captions]
            self.caption_sha256 = captions_sha256(list(zip(sources, digests, strict=True)))
        return choose_caption(self.source.path, self.source.captions, contents, self.captions)

    def _windows(self, caption: Caption) -> Iterator[tuple[Window, Array]]:
        """Cut the part that is kept, and the zeros after it, into windows."""
        rules, spec = self.rules, self.rules.spec
        offset = self._random_offset() if rules.cut.crop == "random" else 0
        is_flipped = rules.cut.flip == "random" and self._random("flip").random() < _FLIP_PROBABILITY
        scale = np.float32(-self.gain if is_flipped else self.gain)
        with self._open() as reader:
            expected = None if reader.info.frames is None else _expected_extent(reader.info, rules, offset).sequence
            cutter = WindowCutter(rules.windows, spec.hop, expected, self.allocate)
            kept, silent = 0, True
            for block in self._kept_blocks(reader, offset):
                silent = silent and _is_silent(block)
                if reader.exceeds_full_scale:
                    np.clip(block, -1, 1, out=block)
                kept += block.shape[1]
                if scale != 1:
                    np.multiply(block, scale, out=block)
                for window, audio in cutter.push(block[None]):
                    if silent:
                        self._require_sound(offset)
                        silent = False
                    yield window, audio[0]
            if silent and kept:
                raise self._silence()
            whole = rules.cut.full or kept < rules.cut.sample_size
            length = offset + kept if whole else self._length(reader)
            self._require_unchanged()
            self.clip = Clip(caption, length, offset, kept, rules.extent(kept), reader.info.decoder, is_flipped)
        missing = spec.samples(self.clip.extent.sequence) - kept
        zeros = np.broadcast_to(np.float32(0), (1, spec.channels, missing))
        for window, audio in cutter.push(zeros, final=True):
            yield replace(window, core_stop=min(window.core_stop, self.clip.extent.computed)), audio[0]

    def _open(self) -> PreparedReader:
        return PreparedReader(self.source.path, self.rules.spec.sample_rate, self.rules.spec.channels)

    def _kept_blocks(self, reader: PreparedReader, offset: int) -> Iterator[Array]:
        """Yield the blocks of the part that is kept, each written over the last one, and stop reading after it."""
        end = math.inf if self.rules.cut.full else offset + self.rules.cut.sample_size
        position = 0
        for block in reader.views():
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
                raise self._silence()

    def _silence(self) -> BadClipError:
        """Return the error of a silent clip; raise AudioFileError if its file has changed."""
        self._require_unchanged()
        return BadClipError("silent", f"{self.source.path}: no sample reaches {SILENCE_DB} dB; remove the clip")

    def _length(self, reader: PreparedReader) -> int:
        """Return the length of the whole file, from its header if that can be trusted, else by reading to the end."""
        info = reader.info
        if info.frames is not None and info.format != "MP3":
            announced = resampled_length(info.frames, info.sample_rate, self.rules.spec.sample_rate)
            if announced > reader.samples:
                return announced
        for _ in reader.views():
            pass
        return reader.samples

    def _random_offset(self) -> int:
        """Return where the kept part begins, which depends only on seed, relpath and length."""
        with self._open() as reader:
            room = self._length(reader) - self.rules.cut.sample_size
        return self._random().randint(0, max(0, room))

    def _random(self, purpose: str = "") -> random.Random:
        """Return a generator whose numbers depend only on the seed, the relpath and the purpose."""
        return random.Random(f"{purpose}{self.rules.cut.seed}".encode() + os.fsencode(self.source.relpath))

    def _is_empty(self) -> bool:
        """Return whether a file that could not be read has no samples."""
        if self.source.audio is None:
            return False
        with suppress(sf.SoundFileError, OSError):
            size, _ = self.source.audio
            return size == 0 or sf.info(os.fsencode(self.source.path)).frames == 0
        return False


def open_clip(
    source: Source,
    rules: CuttingRules,
    options: PreEncodeOptions,
    gain: float,
    allocate: Callable[[tuple[int, ...]], Array],
) -> ClipReader:
    """Return the reader of a clip; for `gain` and `allocate` see `ClipReader`."""
    return ClipReader(source, rules, options.captions, options.checksum, gain, allocate)


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
    return bool(max(-block.min(), block.max()) < _SILENCE_PEAK)


def expected_extent(source: Source, rules: CuttingRules) -> Extent:
    """Return the lengths of a clip according to its header, or zeros if that cannot be read."""
    try:
        with AudioReader(source.path) as reader:
            return _expected_extent(reader.info, rules)
    except (SamekitError, OSError):
        return Extent(0, 0, 0)


def _expected_extent(info: AudioInfo, rules: CuttingRules, offset: int = 0) -> Extent:
    """Return the lengths of a clip, from `offset` samples on, according to its header."""
    samples = resampled_length(info.frames or 0, info.sample_rate, rules.spec.sample_rate) - offset
    return rules.extent(samples if rules.cut.full else min(samples, rules.cut.sample_size))
