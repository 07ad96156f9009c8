"""Every fact about an exported model, and its one file: `EngineSpec` <-> `spec.json`.

Knows no arrays, no backend and no graph; whoever needs a number of a model asks an EngineSpec for it.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from samekit.errors import EngineError
from samekit.files.json_fields import check_kind
from samekit.files.paths import checked_path, read_regular

if TYPE_CHECKING:
    from pathlib import Path

SPEC_FILE = "spec.json"
"""Name of the file, in an engine folder."""

FORMAT = 1
"""Of the file; raised when an older samekit could misread it."""

Direction = Literal["encoder", "decoder"]
"""Audio to latents, or latents to audio. An engine folder holds one graph of each."""

ENCODER: Final = "encoder"
DECODER: Final = "decoder"
DIRECTIONS: Final[tuple[Direction, ...]] = (ENCODER, DECODER)

INPUT_NAMES: dict[Direction, str] = {ENCODER: "audio", DECODER: "latents"}
"""Of the graphs; each half's output is named as the other half's input."""

PRECISIONS = ("fp32", "fp16", "int8")
"""Every precision of the format, most accurate first."""

GPU_PRECISIONS = ("fp32", "fp16")
"""What runs on GPUs: int8 graphs have ranges that are measured in every call, which pays on CPUs only."""

RANDOM = "random"
"""The kind of source of seeded random weights."""


# Beyond these a spec is damaged, and believing it could ask for any amount of memory.
_LIMITS = {"sample_rate": 768_000, "channels": 64, "hop": 2**20, "latent_width": 2**16, "alignment": 2**16}
# Samples of all channels that a latent stands for.
_LATENT_VALUES = 2**21


def opposite(direction: Direction) -> Direction:
    """Return the other direction, whose input is the output of this one."""
    return DECODER if direction == ENCODER else ENCODER


@dataclass(frozen=True)
class GraphFile:
    """One ONNX graph of an engine folder."""

    file: str
    """Name inside the folder."""
    sha256: str
    """Of the graph file and, after it, of its external data."""
    sizes: dict[str, int]
    """Bytes of the graph file and of its external data, by name."""


@dataclass(frozen=True)
class EngineSpec:
    """Every fact about an exported model.

    Lengths are in latents unless they say otherwise.
    """

    name: str
    """What users call the model, for example `same-l`."""
    sample_rate: int
    """Of the audio that the graphs take and give, in Hz."""
    channels: int
    """Audio channels."""
    hop: int
    """Samples per latent."""
    latent_width: int
    """Features of a latent."""
    alignment: int
    """A window that does not start where the audio starts must start at a multiple of this."""
    contexts: dict[str, int]
    """Latents that the encoder and the decoder see to either side of a latent, of an aligned window."""
    source: dict[str, Any]
    """Where the checkpoint came from, so that it can be loaded again: `kind` and its arguments."""
    source_sha256: str
    """Digest of the checkpoint's configuration and tensors."""
    graph_revision: int = 0
    """`samekit_export.graph.GRAPH_REVISION` of the export: other revisions export other graphs of the same weights."""
    tools: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that the last export ran with; information only."""
    graphs: dict[str, dict[Direction, GraphFile]] = field(default_factory=dict)
    """precision -> encoder / decoder -> graph."""
    verification: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """precision -> cases measured against eager PyTorch: half, batch, latents, window, snr_db, max_error."""

    @property
    def is_random(self) -> bool:
        """Whether the weights are random: good for tests and speed only."""
        return self.source.get("kind") == RANDOM

    @property
    def origin(self) -> str:
        """`source` for messages; what is known of the weights stands at its end."""
        fields = [f"{key} {value}" for key, value in self.source.items() if key != "weights"]
        return ", ".join([*fields, *(str(self.source[key]) for key in ("weights",) if key in self.source)])

    def samples(self, latents: int) -> int:
        """Samples that so many latents stand for."""
        return latents * self.hop

    def latents(self, samples: int) -> int:
        """Latents that so many samples take: the last one may be partly padding, hence the ceiling."""
        return -(-samples // self.hop)

    def layout(self, direction: Direction) -> tuple[int, int]:
        """Features of a half's input, and values of each that a latent stands for."""
        return (self.channels, self.hop) if direction == ENCODER else (self.latent_width, 1)

    def input_shape(self, direction: Direction, batch: int, latents: int) -> tuple[int, int, int]:
        """The shape of a half's input, `[batch, features, length]`; of its output with the `opposite` half."""
        features, unit = self.layout(direction)
        return (batch, features, latents * unit)

    def to_json(self) -> str:
        """The text of `spec.json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> EngineSpec:
        """Read and check an engine folder's `spec.json`.

        Raises:
            EngineError: it is missing, damaged, of another format, or may not be read.
        """
        path = folder / SPEC_FILE
        cure = "export the model again"
        try:
            document = json.loads(read_regular(path).decode())
        except FileNotFoundError:
            raise EngineError(f"{folder}: no {SPEC_FILE}, so this is no finished engine folder; {cure}") from None
        except PermissionError as error:
            raise EngineError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
        except (OSError, ValueError, RecursionError) as error:
            raise EngineError(f"{path}: cannot be read ({error}); {cure}") from None
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise EngineError(f"{path}: not of format {FORMAT}, which this samekit reads; {cure}")
        try:
            return cls._checked(document)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise EngineError(f"{path}: damaged ({error}); {cure}") from None

    @classmethod
    def _checked(cls, document: dict[str, Any]) -> EngineSpec:
        """A spec from parsed JSON; raises what a wrong value raises."""
        for name, most in _LIMITS.items():
            _check_count(name, document[name], minimum=1, maximum=most)
        if document["channels"] * document["hop"] > _LATENT_VALUES:
            raise ValueError(f"{document['channels']} channels of {document['hop']} samples per latent")
        if set(_checked_object("contexts", document["contexts"])) != {ENCODER, DECODER}:
            raise ValueError(f"contexts = {document['contexts']!r}")
        for direction, context in document["contexts"].items():
            _check_count(f"contexts.{direction}", context, minimum=0, maximum=_LIMITS["alignment"])
        _check_count("graph_revision", document.get("graph_revision", 0), minimum=0, maximum=2**31)
        check_file_name("name", document["name"])
        check_kind("source_sha256", document["source_sha256"], str)
        _checked_object("source", document["source"])
        for tool, version in _checked_object("tools", document.get("tools", {})).items():
            check_kind(f"tools.{tool}", version, str)
        for precision, rows in _checked_object("verification", document.get("verification", {})).items():
            _check_rows(f"verification.{precision}", rows)
        graphs = {
            precision: {direction: GraphFile(**pair[direction]) for direction in DIRECTIONS}
            for precision, pair in document.pop("graphs").items()
        }
        for pair in graphs.values():
            for graph in pair.values():
                _check_graph(graph)
        return cls(**document, graphs=graphs)


def check_file_name(name: str, value: Any) -> None:
    """Check that a text names something in a folder, and cannot lead out of it.

    Raises:
        TypeError, ValueError: it does not.
    """
    check_kind(name, value, str)
    if value in ("", ".", "..") or "/" in value or "\\" in value:
        raise ValueError(f"{name} = {reprlib.repr(value)}")
    checked_path(value)


def _check_count(name: str, value: Any, minimum: int, maximum: int) -> None:
    """A whole number of a believable size."""
    check_kind(name, value, int)
    if not minimum <= value <= maximum:
        raise ValueError(f"{name} = {value}")


def _checked_object(name: str, value: Any) -> dict[str, Any]:
    """The value, if it is a JSON object."""
    check_kind(name, value, dict)
    return dict(value)


def _check_rows(name: str, rows: Any) -> None:
    """Measured cases, each with a number where numbers are read."""
    check_kind(name, rows, list)
    for row in rows:
        check_kind(f"{name}: snr_db", _checked_object(name, row)["snr_db"], (int, float))


def _check_graph(graph: GraphFile) -> None:
    """Plain file names only: a spec must not lead out of its folder."""
    check_kind("sha256", graph.sha256, str)
    for name, size in _checked_object("sizes", graph.sizes).items():
        _check_count(f"size of {name!r}", size, minimum=0, maximum=2**63)
    for name in (graph.file, *graph.sizes):
        check_file_name("graph file name", name)
    if graph.file not in graph.sizes:
        raise ValueError(f"no size for {graph.file!r}")
