"""What a TensorRT engine is built from and for, and the shapes that it accepts.

Each engine has two optimisation profiles. The largest shape of a profile decides how much scratch memory it needs, the
optimal shape which kernels are chosen. So short windows in batches and whole songs each have a profile:

    profile    batch      latents       optimal
    narrow     1 ... 8    1 ... 256     the windows that a backend sends at once, see `samekit.engine.gpu_cost`
    wide       1          1 ... 4096    256 latents for encoders; 512 (chunks) or 1024 (bands) for decoders

The optimal lengths of the wide profile are those of the reference's TensorRT port on an H200. It found 1292 to cost 17
to 23 % at short lengths, and to gain nothing at long ones. samekit has not measured them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from samekit.arguments import check_flag, check_whole
from samekit.engine.digest import canonical_json
from samekit.engine.gpu_cost import gpu_cost
from samekit.engine.spec import DIRECTIONS, ENCODER
from samekit.errors import InputError
from samekit.files.json_fields import check_kinds

if TYPE_CHECKING:
    from samekit.engine.spec import Direction, EngineSpec

TENSORRT: Final = "tensorrt"
TENSORRT_RTX: Final = "tensorrt_rtx"
"""The two flavours of TensorRT, which are also the names of their Python modules."""

BUILDER_REVISION: Final = 2
"""Raise it when the same graph is built to another engine: after a change of the settings in
`samekit_export.engine_builder`, or of those that ONNX Runtime's TensorRT provider gets. Engines of another revision are
stale."""

PORTABLE: Final = "portable"
"""The target of a TensorRT-RTX engine that runs on several GPUs, see `runs_on`."""
AMPERE_PLUS: Final = "8.0+"
"""The target of a TensorRT engine that runs on all GPUs from Ampere on."""
_AMPERE: Final = (8, 0)
_TURING: Final = (7, 5)

# Compute capabilities for which TensorRT-RTX's builder makes an engine by default.
_PORTABLE_CAPABILITIES: Final = ((8, 0), (8, 6), (8, 9))
_PORTABLE_FROM: Final = (12, 0)

THIS_GPU, SAME_CAPABILITY, FROM_AMPERE = HARDWARE = ("gpu", "capability", "ampere+")
"""On which GPUs a TensorRT engine runs well: those like the one that built it, all of its compute capability, or all
from Ampere on. The wider, the slower."""


class Profile(NamedTuple):
    """The shapes that one optimisation profile accepts, each as (least, optimal, most)."""

    batch: tuple[int, int, int]
    latents: tuple[int, int, int]


NARROW: Final = Profile(batch=(1, 4, 8), latents=(1, 256, 256))
"""For windows, several at once."""
WIDE: Final = Profile(batch=(1, 1, 1), latents=(1, 256, 4096))
"""For whole songs in one pass."""
PROFILES: Final = (NARROW, WIDE)
"""The limits of the profiles in the order of an engine; the first that accepts a shape runs it. `profiles_of` has the
optimal shapes."""


def profiles_of(spec: EngineSpec, direction: Direction) -> tuple[Profile, Profile]:
    """Return the profiles of one engine of a model: `PROFILES` with its optimal shapes."""
    narrow = NARROW._replace(batch=(1, gpu_cost(spec).window_batch, NARROW.batch[2]))
    if direction == ENCODER:
        return narrow, WIDE
    return narrow, WIDE._replace(latents=(1, gpu_cost(spec).wide_decode, WIDE.latents[2]))


@dataclass(frozen=True)
class BuilderOptions:
    """Settings of TensorRT's builder that users choose. The defaults are TensorRT's own. TensorRT-RTX has none of them.

    Raises:
        InputError: a value that the builder does not have.
    """

    level: int | None = None
    """Optimization level from 0 to 5: how long the builder searches for fast kernels. None leaves it at 3."""
    hardware: str = THIS_GPU
    """One of `HARDWARE`."""
    later_versions: bool = False
    """Whether later versions of TensorRT with the same first number run the engine too. It may be slower then, and it
    holds a part of TensorRT, which runs on the CPU."""

    def __post_init__(self) -> None:
        if self.level is not None:
            check_whole("level", self.level, least=0, most=5)
        if self.hardware not in HARDWARE:
            raise InputError(f"unknown hardware {self.hardware!r}; choose one of {', '.join(HARDWARE)}")
        check_flag("later_versions", self.later_versions)

    @property
    def changed(self) -> dict[str, Any]:
        """Name -> value of the settings that are not at their default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in vars(self).items() if value != defaults[name]}

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Sorts builds for one machine: those for fewer GPUs and versions first, then those of a higher level."""
        return HARDWARE.index(self.hardware), self.later_versions, -(3 if self.level is None else self.level)


BUILDER_DEFAULTS: Final = BuilderOptions()
"""What TensorRT does by itself."""


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides whether an engine may run in place of a graph, and how it was built."""

    onnx: dict[str, str]
    """encoder / decoder -> sha256 of the graph, as in `spec.json`."""
    flavour: str
    """The builder: `TENSORRT`, `TENSORRT_RTX`, or `onnxruntime` for its TensorRT provider."""
    version: str
    """Version of the flavour; `runs_with` says which versions can load the engine."""
    target: str
    """Compute capability of the GPU that it was built for, such as `8.9`; or `PORTABLE` or `AMPERE_PLUS`."""
    precision: str
    profiles: dict[str, list[dict[str, list[int]]]]
    """encoder / decoder -> `profiles_of` as plain JSON."""
    builder_revision: int
    """`BUILDER_REVISION` of the build."""
    options: BuilderOptions = BUILDER_DEFAULTS
    """What the user chose."""

    @property
    def name(self) -> str:
        """The name of the build's folder, which ends in a digest of all fields."""
        digest = hashlib.sha256(canonical_json(self)).hexdigest()[:12]
        return f"{self.flavour}-{self.version}-{self.target}-{self.precision}-{digest}"

    def differences(self, other: Fingerprint) -> list[str]:
        """Describe each field that differs from another fingerprint."""
        words = []
        for name, value in vars(self).items():
            others = getattr(other, name)
            if value != others:
                short = isinstance(value, str | int) and isinstance(others, str | int)
                words.append(f"{name} {value} instead of {others}" if short else f"other {name}")
        return words

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Fingerprint:
        """Return the fingerprint of parsed JSON; raise TypeError if a field is missing, unknown or of another type."""
        texts = dict.fromkeys(("flavour", "version", "target", "precision"), str)
        check_kinds(document, {**texts, "builder_revision": int, "options": dict})
        return cls(**document | {"options": BuilderOptions(**document.get("options", {}))})


def fingerprint_of(
    spec: EngineSpec,
    precision: str,
    flavour: str,
    version: str,
    target: str,
    options: BuilderOptions = BuilderOptions(),
) -> Fingerprint:
    """Return the fingerprint of an engine that is built now from the graphs of a model.

    `spec` has graphs of this precision; `target` is as in `Fingerprint`.
    """
    return Fingerprint(
        onnx={direction: graph.sha256 for direction, graph in spec.graphs[precision].items()},
        flavour=flavour,
        version=version,
        target=target,
        precision=precision,
        profiles={
            direction: [
                {"batch": list(each.batch), "latents": list(each.latents)} for each in profiles_of(spec, direction)
            ]
            for direction in DIRECTIONS
        },
        builder_revision=BUILDER_REVISION,
        options=options,
    )


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Return whether an engine for `target` runs on a GPU of this compute capability, (major, minor)."""
    if target == PORTABLE:
        return capability in _PORTABLE_CAPABILITIES or capability >= _PORTABLE_FROM
    if target == AMPERE_PLUS:
        return capability >= _AMPERE
    return target == capability_name(capability)


def why_not_on(target: str, capability: tuple[int, int]) -> str | None:
    """Return why an engine for `target` does not run on a GPU of this compute capability, or None if it does."""
    if runs_on(target, capability):
        return None
    reason = f"was built for {target}, this GPU is {capability_name(capability)}"
    if target == PORTABLE and capability == _TURING:
        # NVIDIA's support matrix: no "FP32 GEMMs". With dynamic shapes they give zeros without an error
        # (pytorch/TensorRT, pull request 4643). Graphs of fp16 have such products at their ends.
        reason += ", which needs tensorrt, because TensorRT-RTX has no float32 products for it"
    return reason


def runs_with(fingerprint: Fingerprint, version: str) -> bool:
    """Return whether this version of the engine's flavour can load it."""
    if not fingerprint.options.later_versions:
        return version == fingerprint.version
    built, here = (tuple(map(int, re.findall(r"\d{1,9}", text, re.ASCII))) for text in (fingerprint.version, version))
    return built[:1] == here[:1] and here >= built


def capability_name(capability: tuple[int, int]) -> str:
    """Return (8, 9) as `8.9`."""
    return f"{capability[0]}.{capability[1]}"
