"""Export a checkpoint to an engine folder: write graphs, verify them, commit them; see `samekit.engine.folder`."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING

from samekit.backends import onnxruntime as ort
from samekit.engine.folder import (
    Engine,
    commit_export,
    describe_graph,
    graph_names,
    is_engine_file,
    leftovers,
    remove_leftovers,
    staging_folder,
)
from samekit.engine.spec import DECODER, ENCODER, PRECISIONS, Direction, EngineSpec, check_file_name
from samekit.errors import BackendUnavailableError, InputError, OutputError, SamekitError
from samekit.files.atomic import output_errors
from samekit.files.locks import LOCK_FILE, folder_lock
from samekit.files.paths import expanded
from samekit.packages import import_onnxruntime
from samekit.tensorrt.builds import BUILDS_FOLDER, is_builds_own, remove_stale_builds
from samekit_export.graph import GRAPH_REVISION, GraphDecoder, GraphEncoder
from samekit_export.int8 import quantize_
from samekit_export.model import Same
from samekit_export.model_spec import spec_of
from samekit_export.to_onnx import tool_versions, write_onnx
from samekit_export.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from samekit.engine.spec import GraphFile
    from samekit_export.tensors import Checkpoint

GRAPHS: dict[Direction, type[GraphEncoder | GraphDecoder]] = {ENCODER: GraphEncoder, DECODER: GraphDecoder}
"""What is exported of each half."""


def check_precisions(precisions: Sequence[str]) -> list[str]:
    """Precisions to export, each once.

    Raises:
        InputError: one cannot be exported.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise InputError(f"cannot export precision {precision!r}; choose of {', '.join(PRECISIONS)}")
    return list(dict.fromkeys(precisions))


def export(
    checkpoint: Checkpoint,
    out: Path,
    precisions: Sequence[str] = ("fp32",),
    *,
    force: bool = False,
    report: Callable[[str], object] = lambda _line: None,
) -> Engine:
    """Write `out` / the checkpoint's name, or leave it if it is current.

    It is current if it is of the same checkpoint and of this `GRAPH_REVISION`. Graphs of other precisions and TensorRT
    engines that are there stay if they are of the same checkpoint and revision. Exports into one folder wait for each
    other. Until the new export is complete and verified, the older one can be used.

    Args:
        checkpoint: what to export.
        out: the folder of engine folders.
        precisions: of `samekit.engine.spec.PRECISIONS`.
        force: export these precisions even if they are current, and let random weights replace others.
        report: takes a line for each step.

    Returns:
        The finished engine folder.

    Raises:
        InputError: a precision cannot be exported, or no folder can have the model's name.
        CheckpointError: the weights cannot be exported, such as a norm whose alpha is zero.
        BackendUnavailableError: ONNX Runtime, which verification needs, cannot be used here; or int8 is asked for on a
            processor on which it cannot be verified.
        VerificationError: a graph does not equal eager PyTorch; nothing was written.
        OutputError: the folder cannot be written, something else lies there, or random weights would replace others.
    """
    precisions = check_precisions(precisions)
    try:
        check_file_name("name", checkpoint.name)
    except ValueError:
        raise InputError(f"no engine folder can be called {checkpoint.name!r}; pass a name without / and \\") from None
    folder = expanded(out) / checkpoint.name
    spec = dataclasses.replace(spec_of(checkpoint), tools=tool_versions())
    present = _present(folder)
    if present and not force and not _missing(present, spec, precisions):
        _clear_away(folder)
        report(f"{folder} is current; --force exports it again")
        return present
    with output_errors(folder):
        _check_place(folder)
        with folder_lock(folder):
            try:
                return _export_locked(folder, checkpoint, spec, precisions, force=force, report=report)
            finally:
                remove_leftovers(folder)


def _export_locked(
    folder: Path,
    checkpoint: Checkpoint,
    spec: EngineSpec,
    precisions: Sequence[str],
    *,
    force: bool,
    report: Callable[[str], object],
) -> Engine:
    """Export into a folder whose lock is held."""
    remove_leftovers(folder)
    # Read again: the process that held the lock may have exported something.
    present = _present(folder)
    wanted = precisions if force or present is None else _missing(present, spec, precisions)
    if present and not wanted:
        report(f"{folder} is current; --force exports it again")
        return present
    if "int8" in wanted:
        _check_processor()
    older = present if present and _is_of(present, spec) else None
    if present and present.spec.source_sha256 != spec.source_sha256:
        _check_replaced(present, spec, force=force)
        report(f"replaces an export of other weights ({present.spec.origin})")
    elif present and not older:
        report(
            f"replaces an export of graph revision {present.spec.graph_revision} by one of revision {GRAPH_REVISION} "
            "and keeps nothing of it"
        )
    if older:
        kept = [p for p in older.spec.graphs if p not in wanted and _is_whole(older, p)]
        spec = dataclasses.replace(
            spec,
            graphs={p: older.spec.graphs[p] for p in kept},
            verification={p: older.spec.verification.get(p, []) for p in kept},
        )
    model = Same.from_checkpoint(checkpoint)
    with staging_folder(folder) as staging:
        for precision in wanted:
            spec = _add_precision(staging, spec, model, precision, graph_names(folder, precision), report)
        commit_export(folder, staging, spec)
    engine = Engine.load(folder)
    if not older:
        # Builds of graphs that are no longer there; builds of every version of TensorRT may be run somewhere.
        remove_stale_builds(engine, {})
    report(f"{folder} is ready")
    return engine


def _clear_away(folder: Path) -> None:
    """Delete what killed exports left in a folder that is current, unless another export is running there."""
    # A killed export leaves its lock file; the lock itself ended with it.
    if leftovers(folder) or (folder / LOCK_FILE).exists():
        with suppress(OSError), folder_lock(folder, wait=False):
            remove_leftovers(folder)


def _present(folder: Path) -> Engine | None:
    """The engine folder there, if its `spec.json` can be read."""
    try:
        return Engine.load(folder)
    except SamekitError:
        return None


def _is_of(engine: Engine, spec: EngineSpec) -> bool:
    """Whether an engine folder is of the same checkpoint and graph revision."""
    # Versions of torch and onnx do not count: every export is verified against eager PyTorch, whatever wrote it.
    return (engine.spec.source_sha256, engine.spec.graph_revision) == (spec.source_sha256, spec.graph_revision)


def _missing(engine: Engine, spec: EngineSpec, precisions: Sequence[str]) -> list[str]:
    """Return the precisions of which an engine folder has no whole graphs of this checkpoint and graph revision."""
    return [p for p in precisions if not (_is_of(engine, spec) and _is_whole(engine, p))]


def _check_replaced(present: Engine, spec: EngineSpec, *, force: bool) -> None:
    """Refuse to replace an export of other weights by one of random weights, unless that is forced.

    Raises:
        OutputError: so it would be.
    """
    if spec.is_random and not present.spec.is_random and not force:
        raise OutputError(
            f"{present.folder}: holds other weights ({present.spec.origin}), and random ones would replace "
            "them; pass --force, or another --out"
        )


def _is_whole(engine: Engine, precision: str) -> bool:
    """Whether both graphs of a precision are there at their full size."""
    try:
        engine.check(precision)
    except SamekitError:
        return False
    return True


def _add_precision(
    staging: Path,
    spec: EngineSpec,
    model: Same,
    precision: str,
    files: dict[str, str],
    report: Callable[[str], object],
) -> EngineSpec:
    """Write and verify the graphs of one precision; returns the spec that names them."""
    graphs = {d: _write_graph(staging / files[d], model, d, precision, report) for d in GRAPHS}
    spec = dataclasses.replace(spec, graphs={**spec.graphs, precision: graphs})
    cases = verify(Engine(staging, spec), model, precision, report)
    return dataclasses.replace(spec, verification={**spec.verification, precision: cases})


def _write_graph(
    path: Path, model: Same, direction: Direction, precision: str, report: Callable[[str], object]
) -> GraphFile:
    """Write one graph; returns what the spec tells of it."""
    report(f"writing {path.name}")
    graph = GRAPHS[direction](model)
    if precision == "fp16":
        graph.to_float16_()
    elif precision == "int8":
        report("rounding weights to int8")
        report(_told(quantize_(graph, model)))
    write_onnx(graph, path)
    return describe_graph(path.parent, path.name)


def _told(kept: Sequence[str]) -> str:
    """What became int8."""
    return f"float32 for the sake of accuracy: {', '.join(kept)}" if kept else "every product of the blocks is int8"


def _check_processor() -> None:
    """Refuse int8 where it could not be verified in the end.

    Raises:
        BackendUnavailableError: ONNX Runtime's int8 sums saturate here.
    """
    try:
        onnxruntime = import_onnxruntime()
    except BackendUnavailableError:
        # Verification says what is missing.
        return
    if ort.int8_saturates(onnxruntime):
        raise BackendUnavailableError(
            "int8 is verified on processors with VNNI instructions, and this one has none; export it on another machine"
        )


def _check_place(folder: Path) -> None:
    """Refuse to write into whatever is no engine folder, such as the checkpoint itself.

    Raises:
        OutputError: something else lies there.
    """
    if folder.is_symlink():
        raise OutputError(f"{folder}: is a link, and is not replaced; pass the folder that it leads into as --out")
    if not folder.exists() or _present(folder):
        return
    if not folder.is_dir() or not all(_is_engines_own(path) for path in folder.iterdir()):
        raise OutputError(f"{folder}: is no engine folder, and is not replaced; choose another --out")


def _is_engines_own(path: Path) -> bool:
    """Whether an export writes a file or folder of this name."""
    if path.name == BUILDS_FOLDER:
        return path.is_dir() and all(map(is_builds_own, path.iterdir()))
    return is_engine_file(path)
