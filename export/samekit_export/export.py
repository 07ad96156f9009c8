"""Export a checkpoint to an engine folder: write the graphs, verify them, and commit them with `spec.json`."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from samekit.backends import onnxruntime as ort
from samekit.engine.builds import BUILDS_FOLDER, is_builds_own, remove_stale_builds
from samekit.engine.contents import (
    commit_export,
    graph_names,
    is_engine_file,
    leftovers,
    remove_leftovers,
    staging_folder,
)
from samekit.engine.folder import Engine, describe_graph
from samekit.engine.spec import (
    BF16,
    DECODER,
    ENCODER,
    INT8_TARGET_DB,
    INT8_TARGET_RANGE,
    PRECISIONS,
    Direction,
    EngineSpec,
    check_file_name,
)
from samekit.errors import BackendUnavailableError, InputError, OutputError, SamekitError
from samekit.files.atomic import output_errors
from samekit.files.locks import LOCK_FILE, folder_lock
from samekit.files.paths import expanded
from samekit.packages import import_onnxruntime
from samekit_export.backend import pytorch_defaults
from samekit_export.graph import GRAPH_REVISION, GraphDecoder, GraphEncoder
from samekit_export.int8 import quantize_
from samekit_export.model import Same
from samekit_export.model_spec import spec_of
from samekit_export.to_onnx import tool_versions, write_onnx
from samekit_export.verify import verify

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from samekit_export.tensors import Checkpoint

logger = logging.getLogger(__name__)

GRAPHS: dict[Direction, type[GraphEncoder | GraphDecoder]] = {ENCODER: GraphEncoder, DECODER: GraphDecoder}
"""The graph of each direction."""


def check_precisions(precisions: Sequence[str]) -> list[str]:
    """Return the precisions to export, each once.

    Raises:
        InputError: one cannot be exported.
    """
    for precision in precisions:
        if precision == BF16:
            raise InputError("bf16 runs the graphs of fp32; export precision fp32")
        if precision not in PRECISIONS:
            raise InputError(f"cannot export precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    return list(dict.fromkeys(precisions))


@pytorch_defaults()
def export(
    checkpoint: Checkpoint,
    out: Path,
    precisions: Sequence[str] = ("fp32",),
    *,
    int8_target_db: float = INT8_TARGET_DB,
    force: bool = False,
) -> Engine:
    """Write the engine folder `out` / the checkpoint's name, or leave it if it is current.

    It is current if it holds the same checkpoint at this `GRAPH_REVISION`, with the same target for int8. Then graphs
    of other precisions and TensorRT engines in it are kept. Exports into one folder wait for each other. Until the new
    export is complete and verified, the older one can be used. Each step is logged at level INFO.

    Args:
        checkpoint: the checkpoint to export.
        out: the folder of engine folders.
        precisions: of `samekit.engine.spec.PRECISIONS`.
        int8_target_db: accuracy in dB that int8 graphs should reach, in `INT8_TARGET_RANGE`. Products stay float32
            until they do.
        force: export these precisions even if they are current, and let random weights replace others.

    Raises:
        InputError: a precision or its target cannot be exported, or no folder can have the model's name.
        CheckpointError: the weights cannot be exported, for example because the alpha of a norm is zero.
        BackendUnavailableError: ONNX Runtime, which verification needs, cannot be used here; or int8 was requested, and
            this processor cannot verify it.
        VerificationError: a graph does not equal eager PyTorch; nothing was written.
        OutputError: the folder cannot be written, is no engine folder, or random weights would replace others.
    """
    precisions = check_precisions(precisions)
    if not INT8_TARGET_RANGE[0] <= int8_target_db <= INT8_TARGET_RANGE[1]:
        least, most = INT8_TARGET_RANGE
        raise InputError(f"int8 cannot aim at {int8_target_db} dB; pass a target from {least:g} to {most:g} dB")
    try:
        check_file_name("name", checkpoint.name)
    except ValueError:
        raise InputError(f"no engine folder can be called {checkpoint.name!r}; pass a name without / and \\") from None
    folder = expanded(out) / checkpoint.name
    spec = dataclasses.replace(spec_of(checkpoint), tools=tool_versions(), int8_target_db=int8_target_db)
    present = _load_engine(folder)
    if present and not force and not _missing(present, spec, precisions):
        _remove_leftovers_unless_locked(folder)
        logger.info("%s is current; --force exports it again", folder)
        return present
    with output_errors(folder):
        _check_out(folder)
        with folder_lock(folder):
            try:
                return _export_locked(folder, checkpoint, spec, precisions, force=force)
            finally:
                remove_leftovers(folder)


def _export_locked(
    folder: Path, checkpoint: Checkpoint, spec: EngineSpec, precisions: Sequence[str], *, force: bool
) -> Engine:
    """Export into a folder whose lock this process holds."""
    remove_leftovers(folder)
    # Loaded again, because the process that held the lock may have exported something.
    present = _load_engine(folder)
    wanted = precisions if force or present is None else _missing(present, spec, precisions)
    if present and not wanted:
        logger.info("%s is current; --force exports it again", folder)
        return present
    if "int8" in wanted:
        _check_processor()
    older = present if present and _is_same(present, spec) else None
    if present and present.spec.source_sha256 != spec.source_sha256:
        if spec.is_random and not present.spec.is_random and not force:
            raise OutputError(
                f"{folder}: holds other weights ({present.spec.origin}), and random ones would replace them; "
                "pass --force, or another --out"
            )
        logger.info("replaces an export of other weights (%s)", present.spec.origin)
    elif present and not older:
        logger.info(
            "replaces an export of graph revision %s by one of revision %s and keeps nothing of it",
            present.spec.graph_revision,
            GRAPH_REVISION,
        )
    if older:
        kept = [p for p in older.spec.graphs if p not in wanted and _is_whole(older, p)]
        spec = dataclasses.replace(
            spec,
            graphs={p: older.spec.graphs[p] for p in kept},
            verification={p: older.spec.verification.get(p, []) for p in kept},
        )
        if "int8" in kept:
            spec = dataclasses.replace(spec, int8_target_db=older.spec.int8_target_db)
    model = Same.from_checkpoint(checkpoint)
    with staging_folder(folder) as staging:
        for precision in wanted:
            spec = _add_precision(staging, spec, model, precision, graph_names(folder, precision))
        commit_export(folder, staging, spec)
    engine = Engine.load(folder)
    if not older:
        # Builds of the replaced graphs are deleted. With no versions given, builds for any version of TensorRT stay.
        remove_stale_builds(engine, {})
    logger.info("%s is ready", folder)
    return engine


def _remove_leftovers_unless_locked(folder: Path) -> None:
    """Delete what killed exports left in a folder that is current, unless another export is running there."""
    # A killed export leaves its lock file, which is not locked any more.
    if leftovers(folder) or (folder / LOCK_FILE).exists():
        with suppress(OSError), folder_lock(folder, wait=False):
            remove_leftovers(folder)


def _load_engine(folder: Path) -> Engine | None:
    """Return the engine folder, if its `spec.json` can be read."""
    try:
        return Engine.load(folder)
    except SamekitError:
        return None


def _is_same(engine: Engine, spec: EngineSpec) -> bool:
    """Whether an engine folder holds the same checkpoint at the same graph revision."""
    # Versions of torch and onnx do not count, because every export is verified against eager PyTorch.
    return (engine.spec.source_sha256, engine.spec.graph_revision) == (spec.source_sha256, spec.graph_revision)


def _missing(engine: Engine, spec: EngineSpec, precisions: Sequence[str]) -> list[str]:
    """Return the precisions for which an engine folder lacks complete graphs of this checkpoint and graph revision.

    Graphs of int8 must also have the same target.
    """
    if not _is_same(engine, spec):
        return list(precisions)
    other_target = engine.spec.int8_target_db != spec.int8_target_db
    return [p for p in precisions if (p == "int8" and other_target) or not _is_whole(engine, p)]


def _is_whole(engine: Engine, precision: str) -> bool:
    """Whether both graphs of a precision are there at their full size."""
    try:
        engine.check(precision)
    except SamekitError:
        return False
    # A copy may hold one half only.
    return set(engine.spec.graphs[precision]) == set(GRAPHS)


def _add_precision(staging: Path, spec: EngineSpec, model: Same, precision: str, files: dict[str, str]) -> EngineSpec:
    """Write and verify the graphs of one precision; return the spec with them."""
    graphs = {}
    for direction, graph_class in GRAPHS.items():
        path = staging / files[direction]
        logger.info("writing %s", path.name)
        graph = graph_class(model)
        if precision == "fp16":
            graph.to_float16_()
        elif precision == "int8":
            logger.info("rounding weights to int8, for an accuracy of %g dB", spec.int8_target_db)
            if kept := quantize_(graph, model, spec.int8_target_db):
                logger.info("products that stay float32 for accuracy: %s", ", ".join(kept))
            else:
                logger.info("all products of the blocks are int8")
        write_onnx(graph, path)
        graphs[direction] = describe_graph(staging, path.name)
    spec = dataclasses.replace(spec, graphs={**spec.graphs, precision: graphs})
    cases = verify(Engine(staging, spec), model, precision)
    return dataclasses.replace(spec, verification={**spec.verification, precision: cases})


def _check_processor() -> None:
    """Refuse int8 where ONNX Runtime's int8 sums saturate, so that verification would fail in the end."""
    try:
        onnxruntime = import_onnxruntime()
    except BackendUnavailableError:
        # Verification raises this error again.
        return
    if ort.int8_saturates(onnxruntime):
        raise BackendUnavailableError(
            "int8 is verified on processors with VNNI instructions, and this one has none; export it on another machine"
        )


def _check_out(folder: Path) -> None:
    """Refuse to write into a folder that is no engine folder, such as the checkpoint itself."""
    if folder.is_symlink():
        raise OutputError(f"{folder}: is a link, and is not replaced; pass the folder of its target as --out")
    if not folder.exists() or _load_engine(folder):
        return
    if not folder.is_dir() or not all(_is_from_export(path) for path in folder.iterdir()):
        raise OutputError(f"{folder}: is no engine folder, and is not replaced; choose another --out")


def _is_from_export(path: Path) -> bool:
    """Whether samekit writes a file or folder of this name."""
    if path.name == BUILDS_FOLDER:
        return path.is_dir() and all(map(is_builds_own, path.iterdir()))
    return is_engine_file(path)
