"""The options of a pre-encoding run, and the settings that its output folder records."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from samekit.arguments import MOST_THREADS, check_flag, check_whole
from samekit.dataset.file_names import SILENCE_FILE
from samekit.errors import InputError
from samekit.files.json_fields import check_kinds

SAMPLE_SIZE: Final = 12_582_912
"""The reference's default: 285 s at 44.1 kHz, 3,072 latents."""
# Of `sample_size`: 13.5 hours at 44.1 kHz, whose silence takes half a gigabyte.
_MOST_SAMPLES: Final = 2**31


# Six digits, in names of files.
_MOST_SHARDS: Final = 999_999


@dataclass(frozen=True)
class Shard:
    """One of several parts of a dataset, each encoded by its own process, maybe on its own machine."""

    index: int = 1
    """Which part, from 1."""
    count: int = 1
    """How many parts there are."""

    def __post_init__(self) -> None:
        if not (type(self.index) is type(self.count) is int and 1 <= self.index <= self.count <= _MOST_SHARDS):
            raise InputError(f"shard {self} does not exist; pass I/N with I from 1 to N, such as 1/4")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `I/N`.

        Raises:
            InputError: it is something else, or I is not one of 1 ... N.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not match:
            raise InputError(f"shard {text!r} does not exist; pass I/N with I from 1 to N, such as 1/4")
        return cls(*map(int, match.groups()))

    @classmethod
    def of_manifest(cls, name: str) -> Shard:
        """The part whose manifest has this file name."""
        match = re.fullmatch(r"manifest-(\d{1,6})-of-(\d{1,6})\.jsonl", name)
        return cls(*map(int, match.groups())) if match else cls()

    def contains(self, relpath: str) -> bool:
        """Whether a clip belongs to this part; it depends on nothing but its relpath."""
        digest = hashlib.sha256(os.fsencode(relpath)).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1

    def number(self, position: int) -> int:
        """The number of this part's clip at `position`; no other part has it."""
        return position * self.count + self.index - 1

    @property
    def manifest(self) -> str:
        """File name of this part's manifest."""
        return f"manifest{self._suffix}.jsonl"

    @property
    def report(self) -> str:
        """File name of this part's report."""
        return f"report{self._suffix}.json"

    @property
    def _suffix(self) -> str:
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"

    def is_written_here(self, name: str) -> bool:
        """Whether this part alone writes a file of the output folder; the first one writes the silence latents."""
        stem, _, _ = name.partition(".")
        if stem.isdecimal():
            return int(stem) % self.count == self.index - 1
        return name in (self.manifest, self.report) or (name == SILENCE_FILE and self.index == 1)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Settings:
    """Everything but the audio that decides what the latents are; one folder holds latents of one kind."""

    model: str
    """Name of the model."""
    model_sha256: str
    """Digest of its checkpoint."""
    precision: str
    """That it computed in."""
    dtype: str
    """Of the files, `float32` or `float16`."""
    width: int
    """Features of a latent."""
    sample_size: int
    """Samples that a clip is cut to, and those of the silence latents."""
    pad: bool
    """Whether clips are padded to `sample_size`."""
    full: bool
    """Whether longer clips are kept whole."""
    crop: str
    """`start` or `random`."""
    seed: int
    """Of the random crops."""

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Settings:
        """Settings from JSON; raises what a wrong value raises."""
        settings = cls(**fields)
        numbers = dict.fromkeys(("width", "sample_size", "seed"), int)
        texts = dict.fromkeys(("model", "model_sha256", "precision", "dtype", "crop"), str)
        check_kinds(vars(settings), {**numbers, **texts, "pad": bool, "full": bool})
        if settings.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype = {settings.dtype!r}")
        return settings

    def differences(self, other: Settings) -> list[str]:
        """What differs from other settings, with both values; a model is what its digest says, whatever its name."""
        ours, theirs = self._described(), other._described()
        same_model = self.model_sha256 == other.model_sha256
        return [
            f"{name} {theirs[name]} there, {value} here"
            for name, value in ours.items()
            if value != theirs[name] and not (name == "model" and same_model)
        ]

    def _described(self) -> dict[str, Any]:
        """Every field, with the model's name and digest as one."""
        fields = dataclasses.asdict(self)
        fields["model"] = f"{self.model} ({fields.pop('model_sha256')[:8]})"
        return fields


@dataclass(frozen=True)
class PreEncodeOptions:
    """How to encode a dataset; the first four are the reference's."""

    batch_size: int = 1
    """Windows of clips that are encoded at once; no clip is padded for it."""
    sample_size: int = SAMPLE_SIZE
    """Samples, at the model's rate, to which clips are cut, and those of the silence latents."""
    float16: bool = False
    """Write float16; the model's own precision is chosen when it is opened."""
    pad: bool = False
    """Keep the latents of the zeros up to `sample_size`, so that all files are of one length."""
    full: bool = False
    """Keep clips longer than `sample_size` whole."""
    crop: Literal["start", "random"] = "start"
    """Which part of a longer clip is kept. The reference takes a random one, another one in each run."""
    seed: int = 0
    """Of the random parts; each clip's depends on nothing but this and its relpath."""
    shard: Shard = field(default_factory=Shard)
    """The part of the dataset to encode."""
    checksum: bool = False
    """Judge by the contents of audio and caption whether they have changed, not by their size and time."""
    strict: bool = False
    """Raise if a clip is bad, once the others are encoded."""
    reencode: bool = False
    """If the folder holds latents of other settings, encode everything again under the same numbers; the latents
    of clips that are no longer in the dataset are removed."""
    readers: int = 0
    """Threads that read ahead; 0 takes one a core, at most 4."""

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, least=1)
        check_whole("sample_size", self.sample_size, least=1, most=_MOST_SAMPLES)
        check_whole("readers (--workers)", self.readers, least=0, most=MOST_THREADS)
        check_whole("seed", self.seed, least=0)
        for name in ("float16", "pad", "full", "checksum", "strict", "reencode"):
            check_flag(name, getattr(self, name))
        if not isinstance(self.shard, Shard):
            raise InputError(f"shard is {self.shard!r}; pass a samekit.dataset.options.Shard, such as Shard(1, 4)")
        if self.crop not in ("start", "random"):
            raise InputError(f"crop {self.crop!r} is not known; pass start or random")
        if self.full and self.crop == "random":
            raise InputError("full keeps whole clips and crop cuts them; pass one of them")
