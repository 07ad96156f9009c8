"""What was measured with the engines of a build on one kind of GPU: their accuracy, and the fastest windows.

A build holds `check-8.9.json` and `tune-8.9.json` for each compute capability. TensorRT-RTX builds engines without a
GPU, so its builds have no check until a machine opens them. Records of other engines do not count.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from samekit.engine.spec import DECODER, ENCODER
from samekit.errors import OutputError
from samekit.files.atomic import atomic_path, output_errors
from samekit.files.json_fields import check_kind, check_kinds
from samekit.files.paths import read_regular

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

    from samekit.engine.spec import Direction

logger = logging.getLogger(__name__)

FORMAT: Final = 1
"""Format of the records. Raise it when an older samekit could misread them."""


@dataclass(frozen=True)
class Record:
    """A measurement with the engines of a build on one kind of GPU."""

    capability: str
    """Compute capability of the GPU, such as `8.9`."""
    gpu: str
    """Name of the GPU."""
    engines: dict[Direction, str]
    """encoder / decoder -> sha256 of the engine that was measured."""
    cases: list[dict[str, Any]]
    """The measured cases; each has at least a direction and batch."""

    kind: ClassVar[str]
    """The file names of the records of this kind begin with it."""

    @classmethod
    def read(cls, folder: Path, capability: str, engines: Mapping[Direction, str]) -> Self | None:
        """Return the record in a build's folder of the engines with these digests; None if there is no valid one."""
        path = folder / f"{cls.kind}-{capability}.json"
        try:
            document = json.loads(read_regular(path).decode())
            if document.pop("format") != FORMAT:
                raise ValueError("unknown format")
            check_kinds(document, {"capability": str, "gpu": str, "engines": dict, "cases": list})
            record = cls(**document)
            record.validate()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            logger.warning("%s: cannot be read (%r), so it is ignored", path, error)
            return None
        return record if (record.capability, record.engines) == (capability, dict(engines)) else None

    @classmethod
    def all_of(cls, folder: Path, engines: Mapping[Direction, str]) -> list[Self]:
        """Return the records of a build for all GPUs."""
        names = sorted(path.stem.removeprefix(f"{cls.kind}-") for path in folder.glob(f"{cls.kind}-*.json"))
        return [record for name in names if (record := cls.read(folder, name, engines))]

    def validate(self) -> None:
        """Raise TypeError, ValueError or LookupError if a field that came from a file is wrong."""
        if not self.cases:
            raise ValueError("no cases")
        for case in self.cases:
            check_kind("cases", case, dict)

    def write(self, folder: Path) -> None:
        """Write the record into the folder of a build; only warn if that is impossible, as in a read-only folder."""
        path = folder / f"{self.kind}-{self.capability}.json"
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"
        try:
            with output_errors(path), atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OutputError as error:
            logger.warning("what was measured on this GPU is not kept: %s", error)


@dataclass(frozen=True)
class Check(Record):
    """How far the results of the engines are from those of the ONNX graphs."""

    reference: str
    """Precision of the graphs that ONNX Runtime ran on the CPU."""
    failure: str | None
    """What is wrong with the engines; None if every case is above the floor of the precision."""

    kind = "check"

    @property
    def least_snr_db(self) -> float:
        """The lowest signal-to-noise ratio of the cases, in dB."""
        return min(float(case["snr_db"]) for case in self.cases)

    def validate(self) -> None:
        super().validate()
        check_kind("reference", self.reference, str)
        check_kind("failure", self.failure, (str, type(None)))
        for case in self.cases:
            check_kind("snr_db", case["snr_db"], (int, float))


@dataclass(frozen=True)
class Tuning(Record):
    """The fastest windows and batches of those that were measured."""

    windows: dict[Direction, int]
    """encoder / decoder -> latents of a window."""
    window_batch: int
    """How many windows to run at once."""

    kind = "tune"

    def validate(self) -> None:
        super().validate()
        check_kind("windows", self.windows, dict)
        for name, value in (("window_batch", self.window_batch), *((d, self.windows[d]) for d in (ENCODER, DECODER))):
            check_kind(name, value, int)
            if not 1 <= value <= _MOST:
                raise ValueError(f"{name} = {value}")


# Larger windows and batches are damage, and could ask for any amount of memory.
_MOST: Final = 4096
