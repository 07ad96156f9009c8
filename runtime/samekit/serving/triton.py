"""Write an engine folder as a model repository of the Triton Inference Server.

    OUT/same-l-encoder/config.pbtxt        the server's configuration, in protobuf's text format
    OUT/same-l-encoder/1/model.onnx        a hard link to a file of the engine folder, or a copy
    OUT/same-l-encoder/1/encoder.onnx.data external data, whose name the graph contains
    OUT/same-l-decoder/...

For the server's Python backend, a version folder holds the engine folder, and a `model.py` that runs this package:

    OUT/same-l-encoder/1/model.py
    OUT/same-l-encoder/1/engine/spec.json encoder.onnx decoder.onnx ...

A server can load several such repositories.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from samekit.arguments import MOST_INT32, check_flag, check_whole
from samekit.backends.experimental import TRITON, warn_experimental
from samekit.backends.selection import AUTO, BACKENDS
from samekit.engine.builds import Build, build_command, builds_of, why_stale
from samekit.engine.fingerprint import NARROW, PROFILES, TENSORRT
from samekit.engine.records import Check
from samekit.engine.spec import (
    DECODER,
    DIRECTIONS,
    ENCODER,
    GPU_PRECISIONS,
    INPUT_NAMES,
    SPEC_FILE,
    Direction,
    Precision,
    opposite,
)
from samekit.errors import BackendUnavailableError, InputError, StaleEngineError
from samekit.files.atomic import atomic_folder, remove_abandoned
from samekit.files.json_fields import check_kind, check_kinds
from samekit.files.paths import expanded, link_or_copy

if TYPE_CHECKING:
    from pathlib import Path

    from samekit.engine.folder import Engine
    from samekit.engine.spec import EngineSpec
    from samekit.files.json_fields import Kind

FACTS: Final = "samekit"
"""Name of the parameter that holds the facts about the model for clients, as JSON: see `facts_of`."""
_SPEC_FACTS: Final[dict[str, Kind]] = {
    **dict.fromkeys(("name", "source_sha256"), str),
    **dict.fromkeys(("sample_rate", "channels", "hop", "latent_width", "alignment"), int),
    "contexts": dict,
}
_FACTS: Final[dict[str, Kind]] = {**_SPEC_FACTS, "precision": str, "longest_window": (int, type(None))}
SAMPLE_RATE: Final = "sample_rate"
"""Name of the encoder's second input with the Python backend: Hz; the model's rate if it is left out."""
MODEL_BACKEND: Final = "model_backend"
"""Name of the parameter that holds `TritonOptions.model_backend` for the Python backend."""
MAX_SECONDS: Final = "max_seconds"
"""Name of the parameter that holds `TritonOptions.max_seconds` for the Python backend."""
ENGINE_FOLDER: Final = "engine"
"""Name of the engine folder in a version folder, for the Python backend."""
_VERSION: Final = "1"
_MODEL_FILE: Final = "model.py"
_MODEL: Final = 'from samekit.serving.triton_model import TritonPythonModel\n\n__all__ = ["TritonPythonModel"]\n'

PYTHON: Final = "python"
"""The server's backend that runs this package."""
ServerBackend = Literal["onnxruntime", "tensorrt", "python"]
InstanceKind = Literal["auto", "gpu", "cpu"]
# The file name that each backend of the server looks for.
_FILES: Final[dict[str, str]] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}


@dataclass(frozen=True)
class TritonOptions:
    """How the server runs encoder and decoder. Unknown or contradictory values raise InputError."""

    backend: ServerBackend = "onnxruntime"
    precision: Precision = "fp32"
    """Precision of the graphs or engines. int8 runs on CPUs, one request at a time, and ignores `max_batch`."""
    max_batch: int = NARROW.batch[2]
    """Most clips of a request, and of requests that the server runs at once; see `joins_requests`."""
    queue_delay: int = 2000
    """Microseconds that a request may wait for others."""
    instances: int = 1
    """Instances of encoder and decoder on each GPU."""
    kind: InstanceKind = "auto"
    """The device of the instances; `auto` uses GPUs if there are any."""
    model_backend: str = AUTO
    """samekit's own backend in the server's Python backend, one of `samekit.backends.selection.BACKENDS`."""
    streaming: bool = False
    """Answer in parts as windows are computed (a decoupled model, gRPC streams only); for the Python backend."""
    max_seconds: int = 600
    """Most seconds of audio in a request to the Python backend, all of its clips together. This bounds the memory."""

    def __post_init__(self) -> None:
        for name, kind in (("backend", ServerBackend), ("precision", Precision), ("kind", InstanceKind)):
            known = get_args(kind)
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name, least in (("max_batch", 1), ("queue_delay", 0), ("instances", 1), ("max_seconds", 1)):
            check_whole(name, getattr(self, name), least, MOST_INT32)
        if self.model_backend not in BACKENDS:
            raise InputError(f"unknown model_backend {self.model_backend!r}; choose one of {', '.join(BACKENDS)}")
        check_flag("streaming", self.streaming)
        if self.backend != PYTHON and (self.streaming or self.model_backend != AUTO):
            raise InputError("streaming and model_backend are for the Python backend; pass backend python")
        runs_tensorrt = "tensorrt" in (self.backend, self.model_backend)
        if self.precision not in GPU_PRECISIONS and (runs_tensorrt or self.kind == "gpu"):
            raise InputError(
                f"{self.precision} graphs are for CPUs; pass backend onnxruntime and kind cpu, or precision fp16"
            )
        if self.backend == "tensorrt" and self.max_batch > NARROW.batch[2]:
            raise InputError(
                f"max_batch is {self.max_batch}; pass 1 to {NARROW.batch[2]}, the batch sizes of the engines"
            )
        if runs_tensorrt and self.kind == "cpu":
            raise InputError("TensorRT needs a GPU; pass kind gpu, or backend onnxruntime")

    @property
    def joins_requests(self) -> bool:
        """Whether the server may run several requests at once."""
        # int8 computes ranges on each call. In a batch with a loud request, a quiet one would lose accuracy.
        # On CPUs, this package runs one window at a time, so a request would only wait for the others of its batch.
        return self.precision in GPU_PRECISIONS and not (self.backend == PYTHON and self.kind == "cpu")


def write_repository(engine: Engine, out: Path, options: TritonOptions | None = None) -> list[Path]:
    """Write a model repository with the encoder and the decoder of an engine folder, atomically.

    Args:
        engine: the engine folder.
        out: the repository; must not exist.
        options: how the server runs it; `TritonOptions()` by default.

    Returns:
        The folders of both models.

    Raises:
        InputError: `out` exists, or no folder can have this name.
        BackendUnavailableError: there is no graph, or no TensorRT engine, of this precision.
        StaleEngineError: there are TensorRT engines, but they are stale or damaged.
        OutputError: the repository cannot be written.
    """
    options, out = options or TritonOptions(), expanded(out)
    if options.kind == "gpu" or "tensorrt" in (options.backend, options.model_backend):
        warn_experimental(TRITON)
    remove_abandoned(out.parent, out.name)
    with atomic_folder(out) as repository:
        for direction in DIRECTIONS:
            model = repository / model_name(engine.spec.name, direction)
            version = model / _VERSION
            version.mkdir(parents=True)
            for name, source in _files(engine, direction, options).items():
                (version / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(source, version / name)
            try:
                (model / "config.pbtxt").write_text(config_text(engine.spec, direction, options), "utf-8", newline="")
                if options.backend == PYTHON:
                    (version / _MODEL_FILE).write_text(_MODEL, "utf-8", newline="")
                    pair = engine.spec.graphs[options.precision]
                    spec = replace(engine.spec, graphs={options.precision: pair})
                    (version / ENGINE_FOLDER / SPEC_FILE).write_text(spec.to_json(), "utf-8", newline="")
            except UnicodeEncodeError:
                raise InputError(
                    f"{engine.folder}: the model's name is not valid UTF-8; export it under another name"
                ) from None
    return [out / model_name(engine.spec.name, direction) for direction in DIRECTIONS]


def model_name(name: str, direction: Direction) -> str:
    """Return the server's name for the encoder or decoder of a model."""
    return f"{name}-{direction}"


def config_text(spec: EngineSpec, direction: Direction, options: TritonOptions) -> str:
    """Return the `config.pbtxt` of encoder or decoder; its dimensions do not include the batch."""
    before, after = ([spec.layout(side)[0], -1] for side in (direction, opposite(direction)))
    kind, batch, batching = options.kind, options.max_batch, ""
    if options.joins_requests:
        batching = f"dynamic_batching {{ max_queue_delay_microseconds: {options.queue_delay} }}\n"
    profile, longest = "", None
    if options.backend == "tensorrt":
        # The profile for batches of windows.
        kind, profile, longest = "gpu", f' profile: [ "{PROFILES.index(NARROW)}" ]', NARROW.latents[2]
    if options.precision not in GPU_PRECISIONS:
        kind, batch = "cpu", 1
    facts = {name: getattr(spec, name) for name in _SPEC_FACTS}
    facts |= {"precision": options.precision, "longest_window": longest}
    ragged, rate, more = "", "", ""
    if options.backend == PYTHON:
        # Requests of different lengths can be joined, because each arrives as a separate tensor.
        ragged = " allow_ragged_batch: true"
        if direction == ENCODER:
            before = [-1, -1]
            rate = f',\n        {{ name: "{SAMPLE_RATE}" data_type: TYPE_INT32 dims: [ 1 ] optional: true }}'
        for name in (MODEL_BACKEND, MAX_SECONDS):
            more += f'parameters {{ key: "{name}" value {{ string_value: "{getattr(options, name)}" }} }}\n'
        if options.streaming:
            more += "model_transaction_policy { decoupled: true }\n"
    return f"""name: {_quoted(model_name(spec.name, direction))}
backend: "{options.backend}"
max_batch_size: {batch}
input [ {{ name: "{INPUT_NAMES[direction]}" data_type: TYPE_FP32 dims: {before}{ragged} }}{rate} ]
output [ {{ name: "{INPUT_NAMES[opposite(direction)]}" data_type: TYPE_FP32 dims: {after} }} ]
{batching}instance_group [ {{ kind: KIND_{kind.upper()} count: {options.instances}{profile} }} ]
parameters {{ key: "{FACTS}" value {{ string_value: {_quoted(json.dumps(facts))} }} }}
{more}"""


def _quoted(text: str) -> str:
    """Return a string in protobuf's text format, which has the quotes and escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _files(engine: Engine, direction: Direction, options: TritonOptions) -> dict[str, Path]:
    """Return the files of a model: name in the repository -> file of the engine folder."""
    if options.backend == PYTHON:
        return {f"{ENGINE_FOLDER}/{path.relative_to(engine.folder)}": path for path in _engine_files(engine, options)}
    model = _FILES[options.backend]
    if options.backend == "tensorrt":
        build = _build(engine, options.precision)
        # This checks the digest of the engine file.
        build.read(direction)
        return {model: build.folder / build.engines[direction].file}
    graph = engine.graph(direction, options.precision)
    sizes = engine.spec.graphs[options.precision][direction].sizes
    return {model if name == graph.name else name: engine.folder / name for name in sizes}


def _engine_files(engine: Engine, options: TritonOptions) -> list[Path]:
    """Return the graphs of a precision and the files of its TensorRT builds."""
    engine.check(options.precision)
    graphs = engine.spec.graphs[options.precision].values()
    builds, _ = builds_of(engine, options.precision)
    return [
        *(engine.folder / name for graph in graphs for name in graph.sizes),
        *(path for build in builds for path in build.folder.iterdir() if path.is_file()),
    ]


def _build(engine: Engine, precision: str) -> Build:
    """Return the only TensorRT build of an engine; the server cannot run builds of TensorRT-RTX."""
    builds, damaged = builds_of(engine, precision)
    ours = [build for build in builds if build.fingerprint.flavour == TENSORRT]
    reasons = [reason for build in ours if (reason := why_stale(build.fingerprint, engine.spec, {}))]
    cure = f"on a machine with the server's GPU, run: {build_command(engine, precision)}"
    if not ours and damaged:
        raise StaleEngineError(f"{engine.folder}: a TensorRT engine is damaged ({damaged[0]}); {cure}")
    if not ours:
        raise BackendUnavailableError(
            f"{engine.folder}: no {precision} engine of TensorRT (the server cannot run TensorRT-RTX); {cure}"
        )
    if reasons:
        raise StaleEngineError(f"{engine.folder}: a TensorRT engine is stale ({reasons[0]}); {cure}")
    for build in ours:
        for check in Check.all_of(build.folder, build.digests):
            if check.failure:
                raise StaleEngineError(f"{engine.folder}: {check.failure}; pass backend onnxruntime, and report this")
        if build.fingerprint.options.later_versions:
            raise InputError(
                f"{engine.folder}: has an engine for later versions of TensorRT, which Triton does not load by itself; "
                "build it without --tensorrt-later-versions"
            )
    if len(ours) > 1:
        found = ", ".join(f"{b.fingerprint.version} for {b.fingerprint.target}" for b in ours)
        raise InputError(f"{engine.folder}: has engines of TensorRT {found}; leave only the one for the server")
    return ours[0]


def facts_of(config: Any) -> dict[str, Any]:
    """Return the facts about the model from a parsed `config.pbtxt`, which is treated as untrusted.

    Args:
        config: a `ModelConfig` of the server's protobuf schema.

    Returns:
        Fields of `EngineSpec`, `precision`, and `longest_window` in latents, or None.

    Raises:
        InputError: `write_repository` did not write this configuration.
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
    """Raise TypeError or ValueError unless a value is an object with exactly these fields and types."""
    check_kind(name, fields, dict)
    if fields.keys() != kinds.keys():
        raise ValueError(f"{name} has {sorted(fields)}")
    check_kinds(fields, kinds)
