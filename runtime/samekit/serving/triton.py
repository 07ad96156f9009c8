"""An engine folder as a model repository of the Triton Inference Server.

    OUT/same-l-encoder/config.pbtxt        what the server has to know, in its protobuf text format
    OUT/same-l-encoder/1/model.onnx        hard links to the engine folder's files, or copies of them;
    OUT/same-l-encoder/1/encoder.onnx.data external data keep the name that the graph knows
    OUT/same-l-decoder/...

Knows no server: it writes files.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from samekit.arguments import MOST_INT32, check_whole
from samekit.engine.spec import (
    DECODER,
    DIRECTIONS,
    ENCODER,
    GPU_PRECISIONS,
    INPUT_NAMES,
    PRECISIONS,
    Direction,
    opposite,
)
from samekit.errors import BackendUnavailableError, InputError, StaleEngineError
from samekit.files.atomic import output_errors, publish_folder, remove_abandoned, temporary_folder
from samekit.files.json_fields import check_kind, check_kinds
from samekit.files.paths import expanded, link_or_copy
from samekit.tensorrt.builds import Build, build_command, builds_of, why_stale
from samekit.tensorrt.fingerprint import NARROW, PROFILES, TENSORRT

if TYPE_CHECKING:
    from pathlib import Path

    from samekit.engine.folder import Engine
    from samekit.engine.spec import EngineSpec
    from samekit.files.json_fields import Kind

FACTS: Final = "samekit"
"""Name of the parameter that tells clients, as JSON, what they must know of the model: see `facts_of`."""
_SPEC_FACTS: Final[dict[str, Kind]] = {
    **dict.fromkeys(("name", "source_sha256"), str),
    **dict.fromkeys(("sample_rate", "channels", "hop", "latent_width", "alignment"), int),
    "contexts": dict,
}
_FACTS: Final[dict[str, Kind]] = {**_SPEC_FACTS, "precision": str, "longest_window": (int, type(None))}
_VERSION: Final = "1"
_KINDS: Final = ("auto", "gpu", "cpu")
# File names that each backend of the server looks for.
_FILES: Final = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}


@dataclass(frozen=True)
class TritonOptions:
    """How the server is to run both halves."""

    backend: str = "onnxruntime"
    """`onnxruntime` or `tensorrt`."""
    precision: str = "fp32"
    """Of the graphs or engines; int8 runs on CPUs, one request at a time whatever `max_batch` is."""
    max_batch: int = NARROW.batch[2]
    """Requests of one length that the server may run at once."""
    queue_delay: int = 2000
    """Microseconds that a request may wait for others."""
    instances: int = 1
    """Copies of each half, on each GPU."""
    kind: str = "auto"
    """Where: `gpu`, `cpu`, or `auto` for GPUs if there are any."""

    def __post_init__(self) -> None:
        for name, known in (("backend", tuple(_FILES)), ("precision", PRECISIONS), ("kind", _KINDS)):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name, least in (("max_batch", 1), ("queue_delay", 0), ("instances", 1)):
            check_whole(name, getattr(self, name), least, MOST_INT32)
        if self.precision not in GPU_PRECISIONS and (self.backend == "tensorrt" or self.kind == "gpu"):
            raise InputError(
                f"{self.precision} graphs are for CPUs; pass backend onnxruntime and kind cpu, or precision fp16"
            )
        if self.backend == "tensorrt":
            if self.max_batch > NARROW.batch[2]:
                raise InputError(
                    f"max_batch is {self.max_batch}; pass 1 to {NARROW.batch[2]}, which is what the engines take"
                )
            if self.kind == "cpu":
                raise InputError("TensorRT needs a GPU; pass kind gpu, or backend onnxruntime")


def write_repository(engine: Engine, out: Path, options: TritonOptions | None = None) -> list[Path]:
    """Write a model repository with the encoder and the decoder of an engine folder, whole or not at all.

    Args:
        engine: the engine folder.
        out: the repository; must not exist.
        options: how the server is to run it; `TritonOptions()` unless given.

    Returns:
        The folders of both models.

    Raises:
        InputError: `out` exists, or nothing can have this name.
        BackendUnavailableError: there is no graph, or no TensorRT engine, of this precision.
        StaleEngineError: there are TensorRT engines, but of something else.
        OutputError: the repository cannot be written.
    """
    options, out = options or TritonOptions(), expanded(out)
    remove_abandoned(out.parent, out.name)
    _require_new(out)
    sources = {direction: _files(engine, direction, options) for direction in DIRECTIONS}
    with output_errors(out), temporary_folder(out) as staging:
        for direction, files in sources.items():
            version = staging / model_name(engine.spec.name, direction) / _VERSION
            version.mkdir(parents=True)
            for name, source in files.items():
                link_or_copy(source, version / name)
            text = config_text(engine.spec, direction, options)
            (version.parent / "config.pbtxt").write_bytes(_utf8(text, engine))
        # Copies take their time, in which something else may have come there.
        if not publish_folder(staging, out):
            raise _taken(out)
    return [out / model_name(engine.spec.name, direction) for direction in sources]


def _require_new(out: Path) -> None:
    """Refuse to replace anything: nobody knows what it is."""
    if os.path.lexists(out):
        raise _taken(out)


def _taken(out: Path) -> InputError:
    return InputError(f"{out}: exists; remove it, or write another repository: a server takes several")


def model_name(name: str, direction: Direction) -> str:
    """What the server calls one half of a model of this name."""
    return f"{name}-{direction}"


def config_text(spec: EngineSpec, direction: Direction, options: TritonOptions) -> str:
    """The `config.pbtxt` of one half; the batch is no dimension of its own there."""
    before, after = ([spec.layout(side)[0], -1] for side in (direction, opposite(direction)))
    kind = "gpu" if options.backend == "tensorrt" else options.kind
    # The profile for windows in batches; the other one takes no batches.
    profile = f' profile: [ "{PROFILES.index(NARROW)}" ]' if options.backend == "tensorrt" else ""
    batch, batching = options.max_batch, f"dynamic_batching {{ max_queue_delay_microseconds: {options.queue_delay} }}\n"
    if options.precision not in GPU_PRECISIONS:
        # Ranges are measured in each call: joined with a loud request, a quiet one would lose accuracy.
        kind, batch, batching = "cpu", 1, ""
    facts = {name: getattr(spec, name) for name in _SPEC_FACTS} | {
        "precision": options.precision,
        "longest_window": NARROW.latents[2] if options.backend == "tensorrt" else None,
    }
    return f"""name: {_quoted(model_name(spec.name, direction))}
backend: "{options.backend}"
max_batch_size: {batch}
input [ {{ name: "{INPUT_NAMES[direction]}" data_type: TYPE_FP32 dims: {before} }} ]
output [ {{ name: "{INPUT_NAMES[opposite(direction)]}" data_type: TYPE_FP32 dims: {after} }} ]
{batching}instance_group [ {{ kind: KIND_{kind.upper()} count: {options.instances}{profile} }} ]
parameters {{ key: "{FACTS}" value {{ string_value: {_quoted(json.dumps(facts))} }} }}
"""


def _utf8(text: str, engine: Engine) -> bytes:
    """The bytes of a configuration; a model's name may be none that is text."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{engine.folder}: the model's name is no text, which the server needs; export it under another"
        ) from None


def _quoted(text: str) -> str:
    """A string in protobuf's text format: JSON's quotes and backslashes are its own, other letters stay."""
    return json.dumps(text, ensure_ascii=False)


def _files(engine: Engine, direction: Direction, options: TritonOptions) -> dict[str, Path]:
    """Name in the version's folder -> file of the engine folder."""
    model = _FILES[options.backend]
    if options.backend == "tensorrt":
        build = _build(engine, options.precision)
        build.read(direction)
        return {model: build.folder / build.engines[direction].file}
    graph = engine.graph(direction, options.precision)
    sizes = engine.spec.graphs[options.precision][direction].sizes
    return {model if name == graph.name else name: engine.folder / name for name in sizes}


def _build(engine: Engine, precision: str) -> Build:
    """The one build for the server's TensorRT; those of TensorRT-RTX it cannot run."""
    builds, damaged = builds_of(engine, precision)
    ours = [build for build in builds if build.fingerprint.flavour == TENSORRT]
    reasons = [reason for build in ours if (reason := why_stale(build.fingerprint, engine.spec, {}))]
    cure = f"beside such a GPU run: {build_command(engine, precision)}"
    if not ours and damaged:
        raise StaleEngineError(f"{engine.folder}: a TensorRT engine is damaged ({damaged[0]}); {cure}")
    if not ours:
        raise BackendUnavailableError(
            f"{engine.folder}: no {precision} engine of TensorRT (RTX ones do not do); {cure}"
        )
    if reasons:
        raise StaleEngineError(f"{engine.folder}: a TensorRT engine is stale ({reasons[0]}); {cure}")
    if len(ours) > 1:
        places = ", ".join(f"{b.fingerprint.version} for {b.fingerprint.target}" for b in ours)
        raise InputError(f"{engine.folder}: has engines of TensorRT {places}; leave the one that the server runs")
    return ours[0]


def facts_of(config: Any) -> dict[str, Any]:
    """What `FACTS` in a parsed `config.pbtxt` says.

    Args:
        config: a `ModelConfig` of the server's protobuf schema, from anywhere.

    Returns:
        Fields of `EngineSpec`; `precision`; and `longest_window` in latents, or None. Nothing else.

    Raises:
        InputError: it was not written here.
    """
    try:
        facts: dict[str, Any] = json.loads(config.parameters[FACTS].string_value)
        _check_fields(FACTS, facts, _FACTS)
        _check_fields("contexts", facts["contexts"], dict.fromkeys((ENCODER, DECODER), int))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(
            f"model {config.name!r} was not written by samekit triton; serve a repository that it wrote"
        ) from None
    return facts


def _check_fields(name: str, fields: Any, kinds: dict[str, Kind]) -> None:
    """Raise TypeError or ValueError unless it is an object with just these fields, each of its kind."""
    check_kind(name, fields, dict)
    if fields.keys() != kinds.keys():
        raise ValueError(f"{name} has {sorted(fields)}")
    check_kinds(fields, kinds)
