"""What a TensorRT engine is built from and for, and which shapes it takes; pure, shared by builder and backend.

Two profiles lie in one engine. The largest shape of a profile decides how much scratch memory it needs, the optimal
one which kernels are chosen, so short windows in batches and whole songs each have their own:

    profile    batch      latents
    narrow     1 ... 8    1 ... 256     windows, and many clips at once
    wide       1          1 ... 4096    six minutes in one pass
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samekit.engine.digest import canonical_json
from samekit.files.json_fields import check_kind

if TYPE_CHECKING:
    from samekit.engine.spec import EngineSpec

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt_rtx"
"""The flavours of TensorRT, by the name of their Python module."""

BUILDER_REVISION = 1
"""Raise it when the same graph is built to another engine: after a change of the settings in
`samekit_export.to_tensorrt`, or of those that ONNX Runtime's TensorRT provider gets. Engines of another revision are
stale."""

PORTABLE = "portable"
"""The target of a TensorRT-RTX engine: what its builder takes unless told otherwise, see `runs_on`."""

_PORTABLE_CAPABILITIES = ((8, 0), (8, 6), (8, 9))
_PORTABLE_FROM = (12, 0)


@dataclass(frozen=True)
class Profile:
    """The shapes that one optimisation profile takes, each as (least, optimal, most)."""

    batch: tuple[int, int, int]
    """Rows."""
    latents: tuple[int, int, int]
    """Length of a row."""

    def takes(self, batch: int, latents: int) -> bool:
        """Whether a shape lies inside."""
        return self.batch[0] <= batch <= self.batch[2] and self.latents[0] <= latents <= self.latents[2]


NARROW = Profile(batch=(1, 1, 8), latents=(1, 256, 256))
"""For windows, several at once."""
WIDE = Profile(batch=(1, 1, 1), latents=(1, 1292, 4096))
"""For whole songs in one pass; optimal at two minutes."""
PROFILES = (NARROW, WIDE)
"""In the order in which they lie in an engine; the first that takes a shape runs it."""


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides whether an engine may run in place of a graph."""

    onnx: dict[str, str]
    """encoder / decoder -> sha256 of the graph, as in `spec.json`."""
    flavour: str
    """What built it: `TENSORRT`, `TENSORRT_RTX`, or `onnxruntime` for its TensorRT provider."""
    version: str
    """Of the flavour; an engine is read back by the same version only."""
    target: str
    """The compute capability that it was built for, such as `8.9`, or `PORTABLE`."""
    precision: str
    """Of the graphs."""
    profiles: list[dict[str, list[int]]]
    """The profiles as plain JSON."""
    builder_revision: int
    """`BUILDER_REVISION` of the build."""

    @property
    def name(self) -> str:
        """A folder name: readable in front, a digest of everything behind."""
        digest = hashlib.sha256(canonical_json(self)).hexdigest()[:12]
        return f"{self.flavour}-{self.version}-{self.target}-{self.precision}-{digest}"

    def differences(self, opposite: Fingerprint) -> list[str]:
        """What differs from another fingerprint, in words; empty if they are equal."""
        words = []
        for field in dataclasses.fields(self):
            mine, others = getattr(self, field.name), getattr(opposite, field.name)
            if mine != others:
                short = isinstance(mine, str | int) and isinstance(others, str | int)
                words.append(f"{field.name} {mine} instead of {others}" if short else f"other {field.name}")
        return words

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Fingerprint:
        """A fingerprint from `dataclasses.asdict` of one; raises TypeError where fields are missing or unknown."""
        fingerprint = cls(**document)
        texts = (fingerprint.flavour, fingerprint.version, fingerprint.target, fingerprint.precision)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("fields of the fingerprint must be strings")
        check_kind("builder_revision", fingerprint.builder_revision, int)
        return fingerprint


def fingerprint_of(spec: EngineSpec, precision: str, flavour: str, version: str, target: str) -> Fingerprint:
    """The fingerprint that engines of a model's graphs have today.

    Args:
        spec: of the model; has graphs of this precision.
        precision: of the graphs.
        flavour: what builds the engines.
        version: of the flavour.
        target: a compute capability or `PORTABLE`.
    """
    return Fingerprint(
        onnx={direction: graph.sha256 for direction, graph in spec.graphs[precision].items()},
        flavour=flavour,
        version=version,
        target=target,
        precision=precision,
        profiles=[{"batch": list(profile.batch), "latents": list(profile.latents)} for profile in PROFILES],
        builder_revision=BUILDER_REVISION,
    )


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether an engine for `target` runs on a GPU of this compute capability, (major, minor).

    The portable set is that of TensorRT-RTX: 8.0, 8.6, 8.9, and everything from 12.0.
    """
    if target == PORTABLE:
        return capability in _PORTABLE_CAPABILITIES or capability >= _PORTABLE_FROM
    return target == capability_name(capability)


def capability_name(capability: tuple[int, int]) -> str:
    """(8, 9) as `8.9`."""
    return f"{capability[0]}.{capability[1]}"
