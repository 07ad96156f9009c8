"""The facts about an exported model, `EngineSpec`, and the file `spec.json` that holds them."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from samekit.errors import EngineError
from samekit.files.json_fields import check_kind, check_kinds
from samekit.files.paths import checked_path, read_regular

if TYPE_CHECKING:
    from pathlib import Path

SPEC_FILE: Final = "spec.json"
"""Name of the file in an engine folder."""

FORMAT: Final = 1
"""Format of `spec.json`. Raise it when an older samekit could misread the file."""

Direction = Literal["encoder", "decoder"]
"""Audio to latents, or latents to audio. An engine folder holds one graph of each."""

ENCODER: Final = "encoder"
DECODER: Final = "decoder"
DIRECTIONS: Final[tuple[Direction, ...]] = (ENCODER, DECODER)

INPUT_NAMES: Final[dict[Direction, str]] = {ENCODER: "audio", DECODER: "latents"}
"""Names of the graphs' inputs. A graph's output has the name of the other graph's input."""

Precision = Literal["fp32", "fp16", "int8"]
"""What a graph computes in. Audio and latents are float32 in all of them."""

PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "int8")
"""Every precision, the most accurate one first."""

GPU_PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16")
"""The precisions that run on GPUs. int8 measures activation ranges in each call, which is only fast on CPUs."""

BF16: Final = "bf16"
"""Products in bfloat16, all else in float32. The openvino backend computes the fp32 graphs so."""

RUN_PRECISIONS: Final = (*PRECISIONS, BF16)
"""Every precision that a model can run in."""

OPENVINO_DEVICES: Final = ("intel-gpu", "npu")
"""Devices that only the openvino backend runs on."""

DEVICES: Final = ("cpu", "cuda", "webgpu", *OPENVINO_DEVICES)
"""What users pass as `device=`. `webgpu` is any GPU with Vulkan, Metal or Direct3D 12."""

INT8_TARGET_DB: Final = 35.0
"""Accuracy in dB that an export of int8 graphs aims at, unless told otherwise."""

INT8_TARGET_RANGE: Final = (10.0, 100.0)
"""The least and the largest accuracy in dB that an export of int8 graphs can aim at."""

RANDOM: Final = "random"
"""The `kind` of a source of seeded random weights."""

# Larger values are damage, and could ask for any amount of memory.
_LIMITS: Final = {"sample_rate": 768_000, "channels": 64, "hop": 2**20, "latent_width": 2**16, "alignment": 2**16}
# Samples of all channels per latent.
_LATENT_VALUES: Final = 2**21


def graph_precision(precision: str) -> str:
    """Return the precision of the graphs that a model runs in a precision."""
    return "fp32" if precision == BF16 else precision


def opposite(direction: Direction) -> Direction:
    """Return the other direction, whose input is the output of this one."""
    return DECODER if direction == ENCODER else ENCODER


@dataclass(frozen=True)
class GraphFile:
    """One ONNX graph of an engine folder."""

    file: str
    """File name in the folder."""
    sha256: str
    """Digest of the graph file followed by its external data."""
    sizes: dict[str, int]
    """Bytes of the graph file and of its external data, by file name."""

    @property
    def weights_file(self) -> str | None:
        """Name of the file with external data, or None if the graph file holds all weights."""
        return next((name for name in self.sizes if name != self.file), None)


@dataclass(frozen=True)
class EngineSpec:
    """Every fact about an exported model. Lengths are in latents unless stated otherwise."""

    name: str
    """The model's name for users, for example `same-l`."""
    sample_rate: int
    """Sample rate of the audio in Hz."""
    channels: int
    """Audio channels."""
    hop: int
    """Samples per latent."""
    latent_width: int
    """Length of one latent vector."""
    alignment: int
    """A window that does not start where the audio starts must start at a multiple of this."""
    contexts: dict[Direction, int]
    """encoder / decoder -> latents that it sees on either side of a latent in an aligned window."""
    source: dict[str, Any]
    """Where the checkpoint came from, so that it can be loaded again: `kind` and its arguments."""
    source_sha256: str
    """Digest of the checkpoint's configuration and tensors."""
    soft_clip: bool = False
    """Whether the decoder's last step is tanh."""
    graph_revision: int = 0
    """`samekit_export.graph.GRAPH_REVISION` of the export: other revisions export other graphs of the same weights."""
    int8_target_db: float = INT8_TARGET_DB
    """Accuracy in dB that the export of the int8 graphs aimed at, if there are any."""
    tools: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that the last export ran with; for information only."""
    graphs: dict[str, dict[Direction, GraphFile]] = field(default_factory=dict)
    """precision -> encoder / decoder -> graph. A copy of one half of an engine has the graphs of one direction only."""
    verification: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """precision -> cases measured against eager PyTorch: direction, batch, latents, window, snr_db, max_error."""

    @property
    def is_random(self) -> bool:
        """Whether the weights are random, which is good for tests and speed only."""
        return self.source.get("kind") == RANDOM

    @property
    def origin(self) -> str:
        """`source` as text for messages, with what is known of the weights at its end."""
        source = dict(self.source)
        weights = [str(source.pop("weights"))] if "weights" in source else []
        return ", ".join([*(f"{key} {value}" for key, value in source.items()), *weights])

    def samples(self, latents: int) -> int:
        """Return the number of samples that this many latents represent."""
        return latents * self.hop

    def latents(self, samples: int) -> int:
        """Return the number of latents for this many samples, rounded up: the last one may be partly padding."""
        return -(-samples // self.hop)

    def layout(self, direction: Direction) -> tuple[int, int]:
        """Return the features of a graph's input, and its values of each feature per latent."""
        return (self.channels, self.hop) if direction == ENCODER else (self.latent_width, 1)

    def input_shape(self, direction: Direction, batch: int, latents: int) -> tuple[int, int, int]:
        """Return the shape of a graph's input, `[batch, features, length]`."""
        features, unit = self.layout(direction)
        return (batch, features, latents * unit)

    def to_json(self) -> str:
        """Return the text of `spec.json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> EngineSpec:
        """Read and check the `spec.json` of an engine folder.

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
        """Return the spec of parsed JSON. Damage raises TypeError, ValueError, KeyError or AttributeError."""
        for name, most in _LIMITS.items():
            _check_count(name, document[name], least=1, most=most)
        if document["channels"] * document["hop"] > _LATENT_VALUES:
            raise ValueError(f"{document['channels']} channels of {document['hop']} samples per latent")
        check_file_name("name", document["name"])
        objects = dict.fromkeys(("contexts", "source", "tools", "verification", "graphs"), dict)
        check_kinds(document, {**objects, "source_sha256": str})
        check_kind("soft_clip", document.get("soft_clip", False), bool)
        if set(document["contexts"]) != {ENCODER, DECODER}:
            raise ValueError(f"contexts = {document['contexts']!r}")
        for direction, context in document["contexts"].items():
            _check_count(f"contexts.{direction}", context, least=0, most=_LIMITS["alignment"])
        _check_count("graph_revision", document.get("graph_revision", 0), least=0, most=2**31)
        _check_int8_target(document.get("int8_target_db", INT8_TARGET_DB))
        for tool, version in document.get("tools", {}).items():
            check_kind(f"tools.{tool}", version, str)
        for precision, cases in document.get("verification", {}).items():
            check_kind(f"verification.{precision}", cases, list)
            for case in cases:
                check_kind(f"verification.{precision}", case, dict)
                check_kind("snr_db", case["snr_db"], (int, float))
        graphs = {
            precision: {direction: _checked_graph(pair[direction]) for direction in DIRECTIONS if direction in pair}
            for precision, pair in document.pop("graphs").items()
        }
        for precision, pair in graphs.items():
            if not pair:
                raise ValueError(f"no graphs of {precision}")
        return cls(**document, graphs=graphs)


def check_file_name(name: str, value: Any) -> None:
    """Raise TypeError, ValueError or InputError unless a text is the name of a file in a folder, not a path."""
    check_kind(name, value, str)
    if value in ("", ".", "..") or "/" in value or "\\" in value:
        raise ValueError(f"{name} = {reprlib.repr(value)}")
    checked_path(value)


def _checked_graph(fields: dict[str, Any]) -> GraphFile:
    """Return a graph of parsed JSON; its files must lie in the engine folder."""
    graph = GraphFile(**fields)
    check_kinds(fields, {"sha256": str, "sizes": dict})
    for name, size in graph.sizes.items():
        _check_count(f"size of {name!r}", size, least=0, most=2**63)
    for name in (graph.file, *graph.sizes):
        check_file_name("graph file name", name)
    if graph.file not in graph.sizes:
        raise ValueError(f"no size for {graph.file!r}")
    if others := graph.sizes.keys() - {graph.file, f"{graph.file}.data"}:
        raise ValueError(f"{min(others)!r} does not belong to {graph.file!r}")
    return graph


def _check_int8_target(value: Any) -> None:
    check_kind("int8_target_db", value, (int, float))
    if not INT8_TARGET_RANGE[0] <= value <= INT8_TARGET_RANGE[1]:
        raise ValueError(f"int8_target_db = {value}")


def _check_count(name: str, value: Any, least: int, most: int) -> None:
    check_kind(name, value, int)
    if not least <= value <= most:
        raise ValueError(f"{name} = {value}")
