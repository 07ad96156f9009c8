"""The options of a pre-encoding run, and the settings that its output records."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self, get_args

from samekit.arguments import MOST_THREADS, check_flag, check_whole
from samekit.dataset.captions import CAPTION_SOURCES
from samekit.dataset.file_names import SILENCE_FILE, Layout, mirrored_key, mirrored_name
from samekit.errors import InputError
from samekit.files.json_fields import check_kinds

SAMPLE_SIZE: Final = 12_582_912
"""The reference's default: 285 s at 44.1 kHz, 3,072 latents."""
TRAINING_SAMPLES: Final = 16_756_736
"""The longest part of a clip that the reference's training uses: 4,091 latents, 380 s."""
# 13.5 hours at 44.1 kHz. The silence latents of that length take half a gigabyte.
_MOST_SAMPLES: Final = 2**31
# Latents of music have an RMS of about 1. Far from it, the gain of the audio would be zero or infinite.
_LEAST_RMS, _MOST_RMS = 0.001, 1000
# Shard numbers in file names have at most six digits.
_MOST_SHARDS: Final = 999_999


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a dataset, counted from 1. Each part is encoded by its own process."""

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not (type(self.index) is type(self.count) is int and 1 <= self.index <= self.count <= _MOST_SHARDS):
            raise InputError(f"shard {self} does not exist; pass I/N with I from 1 to N, such as 1/4")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `I/N`; raises InputError for anything else."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not match:
            raise InputError(f"shard {text!r} does not exist; pass I/N with I from 1 to N, such as 1/4")
        return cls(*map(int, match.groups()))

    @classmethod
    def of_manifest_part(cls, name: str) -> tuple[Self, int] | None:
        """Return the shard and the number of the manifest part with this file name, or None for other files."""
        match = re.fullmatch(r"manifest(?:-(\d{1,6})-of-(\d{1,6}))?-(\d{6,12})\.jsonl", name)
        if not match:
            return None
        index, count, number = (int(digits or 1) for digits in match.groups())
        return (cls(index, count), number) if 1 <= index <= count else None

    def manifest_part(self, number: int) -> str:
        """Return the file name of a part of this shard's manifest."""
        return f"manifest{self._suffix}-{number:06d}.jsonl"

    @property
    def lock(self) -> str:
        """File name of this shard's lock."""
        return f"manifest{self._suffix}.lock"

    @property
    def report(self) -> str:
        """File name of this shard's report."""
        return f"report{self._suffix}.json"

    @property
    def _suffix(self) -> str:
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"

    def contains(self, relpath: str, layout: Layout = "numbered") -> bool:
        """Return whether a clip belongs to this shard.

        This depends on its relpath, and in the mirror layout only on the name of its files. So a clip that takes the
        place of another, such as a.flac of a.wav, belongs to the same shard.
        """
        return self._owns(relpath if layout == "numbered" else mirrored_key(mirrored_name(relpath)))

    def _owns(self, key: str) -> bool:
        digest = hashlib.sha256(os.fsencode(key)).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1

    def number(self, position: int) -> int:
        """Return the number of this shard's clip at `position`; no other shard uses it."""
        return position * self.count + self.index - 1

    def is_written_here(self, name: str, layout: Layout = "numbered") -> bool:
        """Return whether this shard writes a file of the output folder. The first shard writes the silence latents."""
        if part := self.of_manifest_part(name):
            return part[0] == self
        if name == SILENCE_FILE:
            return self.index == 1
        stem, _, suffix = name.rpartition(".")
        if layout == "mirror":
            # The name of a temporary file lacks the end of a long name, which tells the shard.
            return self.count == 1 or (suffix in ("npy", "json") and self._owns(mirrored_key(stem)))
        if stem.isdecimal():
            return int(stem) % self.count == self.index - 1
        return name == self.report

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class CutOptions:
    """Which part of each clip is encoded, how far it is padded, and how its samples are changed."""

    sample_size: int = SAMPLE_SIZE
    """Samples, at the model's rate, to which clips are cut; also the length of the silence latents."""
    pad: bool = False
    """Keep the latents of the zeros up to `sample_size`, so that all files have one length."""
    full: bool = False
    """Keep clips longer than `sample_size` whole."""
    crop: Literal["start", "random"] = "start"
    """Which part of a longer clip is kept. The reference takes a random part, a different one in each run."""
    seed: int = 0
    """Seed of `crop` and `flip`. What is random for a clip depends on this seed and its relpath only."""
    flip: Literal["none", "random"] = "none"
    """`random` inverts the phase of every second clip, as the reference does, differently in each run."""
    target_latent_rms: float | None = None
    """Root mean square of the latents to which each clip is scaled, see `samekit.dataset.loudness`."""

    def __post_init__(self) -> None:
        check_whole("sample_size", self.sample_size, least=1, most=_MOST_SAMPLES)
        check_whole("seed", self.seed, least=0)
        check_flag("pad", self.pad)
        check_flag("full", self.full)
        if self.crop not in ("start", "random"):
            raise InputError(f"crop {self.crop!r} is not known; pass start or random")
        if self.flip not in ("none", "random"):
            raise InputError(f"flip {self.flip!r} is not known; pass none or random")
        target = self.target_latent_rms
        if target is not None and (type(target) not in (int, float) or not _LEAST_RMS <= target <= _MOST_RMS):
            cure = f"pass a number from {_LEAST_RMS} to {_MOST_RMS}, such as 0.9"
            raise InputError(f"target_latent_rms is {target!r}; {cure}")
        if self.full and self.crop == "random":
            raise InputError("full keeps whole clips and crop cuts them; pass one of them")


@dataclass(frozen=True)
class PreEncodeOptions(CutOptions):
    """How to encode a dataset."""

    batch_size: int = 1
    """Windows that are encoded at once. The latents are the same, except for rounding errors."""
    float16: bool = False
    """Write float16 files. The precision of the model is chosen when the model is opened."""
    captions: tuple[str, ...] = ("json", "txt")
    """Where captions are looked for, in this order: some of `json`, `txt`, and last `tags`. See
    `samekit.dataset.captions`."""
    layout: Layout = "numbered"
    """Names of the files: numbers as in the reference, or `mirror`, those of the audio files."""
    shard: Shard = field(default_factory=Shard)
    """The part of the dataset to encode."""
    checksum: bool = False
    """Compare the contents of audio and caption with the last run, not their size and time."""
    strict: bool = False
    """Raise an error if a clip is bad, after the others are encoded."""
    reencode: bool = False
    """If the folder holds latents of other settings, encode everything again under the same numbers. Latents of clips
    that are no longer in the dataset are removed."""
    prune: bool = False
    """Remove the latents of clips that left the dataset. Their numbers stay reserved."""
    readers: int = 0
    """Threads or processes that read ahead; 0 uses one per core, at most 4, or at most 16 with a GPU."""
    reader_processes: bool | None = None
    """Read in processes; None does so with a GPU or more than 4 cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("batch_size", self.batch_size, least=1)
        check_whole("readers (--workers)", self.readers, least=0, most=MOST_THREADS)
        for name in ("float16", "checksum", "strict", "reencode", "prune"):
            check_flag(name, getattr(self, name))
        if self.reader_processes is not None:
            check_flag("reader_processes", self.reader_processes)
        if self.layout not in get_args(Layout):
            raise InputError(f"layout {self.layout!r} is not known; pass {' or '.join(get_args(Layout))}")
        known = isinstance(self.captions, tuple) and set(self.captions) <= set(CAPTION_SOURCES)
        if not (known and self.captions and len(set(self.captions)) == len(self.captions)):
            given = ",".join(map(str, self.captions)) if isinstance(self.captions, tuple) else repr(self.captions)
            raise InputError(f"captions are {given!r}; pass some of {', '.join(CAPTION_SOURCES)}, each once")
        if "tags" in self.captions[:-1]:
            raise InputError(f"captions are {','.join(self.captions)}, but tags are read last; put tags at the end")
        if not isinstance(self.shard, Shard):
            raise InputError(f"shard is {self.shard!r}; pass a samekit.dataset.Shard, such as Shard(1, 4)")

    @property
    def dtype(self) -> str:
        """Data type of the latents on disk."""
        return "float16" if self.float16 else "float32"

    @property
    def cut(self) -> CutOptions:
        """The cut options alone, with seed 0 where the seed has no effect."""
        options = {item.name: getattr(self, item.name) for item in dataclasses.fields(CutOptions)}
        if "random" not in (self.crop, self.flip):
            options["seed"] = 0
        return CutOptions(**options)


@dataclass(frozen=True)
class Settings:
    """Everything except the audio that determines the latents. All latents of a folder have the same settings."""

    model: str
    model_sha256: str
    precision: str
    dtype: str
    """Data type on disk, `float32` or `float16`."""
    width: int
    """Length of one latent vector."""
    sample_rate: int
    cut: CutOptions
    layout: Layout = "numbered"

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        """Create settings from JSON; wrong fields raise TypeError, ValueError or KeyError."""
        settings = cls(**{**fields, "cut": CutOptions(**fields["cut"])})
        texts = dict.fromkeys(("model", "model_sha256", "precision"), str)
        check_kinds(vars(settings), {**texts, "width": int, "sample_rate": int})
        if settings.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype = {settings.dtype!r}")
        if settings.layout not in get_args(Layout):
            raise ValueError(f"layout = {settings.layout!r}")
        return settings

    def differences(self, other: Settings) -> list[str]:
        """Return a text for each difference, with both values. Models are compared by digest, not by name."""
        ours, theirs = self._described(), other._described()
        same_model = self.model_sha256 == other.model_sha256
        return [
            f"{name} {theirs[name]} there, {value} here"
            for name, value in ours.items()
            if value != theirs[name] and not (name == "model" and same_model)
        ]

    def _described(self) -> dict[str, Any]:
        """Return all fields in one dict, with the model's name and digest as one field."""
        fields = dataclasses.asdict(self)
        fields["model"] = f"{self.model} ({fields.pop('model_sha256')[:8]})"
        cut = fields.pop("cut")
        return {**fields, **cut}
