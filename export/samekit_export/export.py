"""A checkpoint to an engine folder: graphs, verification and `spec.json`, whole or not at all."""

from __future__ import annotations

import dataclasses
import math
import shutil
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from samekit._files import link_or_copy, output_errors, remove_abandoned, replace_folder, temporary_folder
from samekit.backends import ort
from samekit.errors import BackendUnavailableError, InputError, OutputError, SamekitError
from samekit.spec import DECODER, ENCODER, PRECISIONS, SPEC_FILE, EngineSpec, check_file_name
from samekit.store import Engine, describe_graph
from samekit.tensorrt_store import BUILDS_FOLDER, is_builds_own
from samekit_export.config import ChunkSpan
from samekit_export.graph import GraphDecoder, GraphEncoder
from samekit_export.int8 import quantize_
from samekit_export.model import Same
from samekit_export.to_onnx import OPSET, write_onnx
from samekit_export.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from samekit.spec import GraphFile
    from samekit_export.checkpoint import Checkpoint
    from samekit_export.config import TrunkConfig

GRAPHS: dict[str, type[GraphEncoder | GraphDecoder]] = {ENCODER: GraphEncoder, DECODER: GraphDecoder}
"""What is exported of each half."""


def _context(trunk: TrunkConfig) -> int:
    """Latents that a trunk sees to either side of a latent, of a window that starts at a multiple of the chunk."""
    if isinstance(trunk.span, ChunkSpan):
        transformers = trunk.span.latents // 2 if trunk.span.shifted else 0
    else:
        transformers = trunk.depth * trunk.span.latents
    # The decoder's convolution reaches one patch further, which lies in the next latent.
    return transformers + trunk.mapping_kernel // 2


def _chunk(trunk: TrunkConfig) -> int:
    """Latents in a chunk; 1 for a band, which may be cut anywhere."""
    return trunk.span.latents if isinstance(trunk.span, ChunkSpan) else 1


def spec_of(checkpoint: Checkpoint) -> EngineSpec:
    """The facts about a checkpoint's model, no graphs yet."""
    config = checkpoint.config
    return EngineSpec(
        name=checkpoint.name,
        sample_rate=config.sample_rate,
        channels=config.channels,
        hop=config.hop,
        latent_width=config.latent_width,
        # One for both halves, so that latents and audio can be cut at the same places.
        alignment=math.lcm(_chunk(config.encoder), _chunk(config.decoder)),
        contexts={ENCODER: _context(config.encoder), DECODER: _context(config.decoder)},
        source=checkpoint.source,
        source_sha256=checkpoint.sha256,
        tools=_tools(),
    )


def _tools() -> dict[str, str]:
    """Versions of everything that decides what a graph looks like."""
    packages = ("samekit", "torch", "onnx", "onnxscript")
    return {**{package: version(package) for package in packages}, "opset": str(OPSET)}


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

    Graphs of other precisions and TensorRT engines that lie there stay, if they are of the same checkpoint and tools.

    Args:
        checkpoint: what to export.
        out: the folder of engine folders.
        precisions: of `samekit.spec.PRECISIONS`.
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
    folder = out / checkpoint.name
    spec = spec_of(checkpoint)
    remove_abandoned(out, checkpoint.name)
    present = _present(folder)
    older = present if present and _is_of(present, spec) else None
    wanted = [p for p in precisions if force or older is None or not _is_whole(older, p)]
    if not wanted:
        report(f"{folder} is current; --force exports it again")
        return Engine.load(folder)
    with output_errors(folder):
        _check_place(folder)
    if "int8" in wanted:
        _check_processor()
    if present and present.spec.source_sha256 != spec.source_sha256:
        _check_replaced(present, spec, force=force)
        report(f"replaces an export of other weights ({present.spec.origin})")
    elif present and not older:
        report(f"replaces an export by other tools ({_other_tools(present, spec)}) and keeps nothing of it")
    model = Same.from_checkpoint(checkpoint)
    with _replaced_folder(folder) as staging:
        if older:
            spec = _carry_over(older, spec, wanted, staging)
        for precision in wanted:
            spec = _add_precision(staging, spec, model, precision, report)
        (staging / SPEC_FILE).write_text(spec.to_json(), encoding="utf-8")
    report(f"{folder} is ready")
    return Engine.load(folder)


def _present(folder: Path) -> Engine | None:
    """The engine folder there, if its `spec.json` can be read."""
    try:
        return Engine.load(folder)
    except SamekitError:
        return None


def _is_of(engine: Engine, spec: EngineSpec) -> bool:
    """Whether an engine folder is of the same checkpoint and made by the same tools."""
    return engine.spec.source_sha256 == spec.source_sha256 and engine.spec.tools == spec.tools


def _other_tools(engine: Engine, spec: EngineSpec) -> str:
    """The versions that made an engine folder, of the tools whose version is another one now."""
    made_by = engine.spec.tools
    return ", ".join(
        f"{tool} {made_by.get(tool, 'unknown')}"
        for tool in {**made_by, **spec.tools}
        if made_by.get(tool) != spec.tools.get(tool)
    )


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


def _carry_over(older: Engine, spec: EngineSpec, wanted: Sequence[str], staging: Path) -> EngineSpec:
    """Keep what an older folder holds besides: whole graphs of other precisions, and TensorRT engines."""
    kept = [p for p in older.spec.graphs if p not in wanted and _is_whole(older, p)]
    for precision in kept:
        for graph in older.spec.graphs[precision].values():
            for name in graph.sizes:
                link_or_copy(older.folder / name, staging / name)
    builds = older.folder / BUILDS_FOLDER
    if builds.is_dir():
        # But for what killed builds left.
        half_written = shutil.ignore_patterns(".*.tmp")
        shutil.copytree(builds, staging / BUILDS_FOLDER, copy_function=link_or_copy, ignore=half_written)
    return dataclasses.replace(
        spec,
        graphs={p: older.spec.graphs[p] for p in kept},
        verification={p: older.spec.verification.get(p, []) for p in kept},
    )


def _graph_name(half: str, precision: str) -> str:
    """The file of a graph."""
    return f"{half}.onnx" if precision == "fp32" else f"{half}.{precision}.onnx"


def _add_precision(
    staging: Path, spec: EngineSpec, model: Same, precision: str, report: Callable[[str], object]
) -> EngineSpec:
    """Write and verify the graphs of one precision; returns the spec that knows them."""
    graphs = {half: _write_graph(staging, model, half, precision, report) for half in GRAPHS}
    spec = dataclasses.replace(spec, graphs={**spec.graphs, precision: graphs})
    cases = verify(Engine(staging, spec), model, precision, report)
    return dataclasses.replace(spec, verification={**spec.verification, precision: cases})


def _write_graph(staging: Path, model: Same, half: str, precision: str, report: Callable[[str], object]) -> GraphFile:
    """Write one graph; returns what the spec tells of it."""
    file = _graph_name(half, precision)
    report(f"writing {file}")
    graph = GRAPHS[half](model)
    if precision == "fp16":
        graph.to_float16_()
    elif precision == "int8":
        report("rounding weights to int8")
        report(_told(quantize_(graph, model)))
    write_onnx(graph, staging / file)
    return describe_graph(staging, file)


def _told(kept: Sequence[str]) -> str:
    """What became int8."""
    return f"float32 for the sake of accuracy: {', '.join(kept)}" if kept else "every product of the blocks is int8"


def _check_processor() -> None:
    """Refuse int8 where it could not be verified in the end.

    Raises:
        BackendUnavailableError: ONNX Runtime's int8 sums saturate here.
    """
    try:
        import onnxruntime  # noqa: PLC0415
    except ImportError:
        # Verification says what is missing.
        return
    if ort.int8_saturates(onnxruntime):
        raise BackendUnavailableError(
            "int8 is verified on processors with VNNI instructions, and this one has none; export it on another machine"
        )


def _check_place(folder: Path) -> None:
    """Refuse to replace whatever is no engine folder, such as the checkpoint itself.

    Raises:
        OutputError: something else lies there.
    """
    if folder.is_symlink():
        raise OutputError(f"{folder}: is a link, and is not replaced; pass the folder that it leads into as --out")
    if not folder.exists():
        return
    if not folder.is_dir() or not all(_is_engines_own(path) for path in folder.iterdir()):
        raise OutputError(f"{folder}: is no engine folder, and is not replaced; choose another --out")


def _is_engines_own(path: Path) -> bool:
    """Whether an export writes a file or folder of this name."""
    graphs = {_graph_name(half, precision) for half in GRAPHS for precision in PRECISIONS}
    if path.name == BUILDS_FOLDER:
        return path.is_dir() and all(map(is_builds_own, path.iterdir()))
    return path.is_file() and (path.name == SPEC_FILE or path.name.removesuffix(".data") in graphs)


@contextmanager
def _replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when it does not."""
    with output_errors(folder), temporary_folder(folder) as staging:
        yield staging
        replace_folder(staging, folder)
