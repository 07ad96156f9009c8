"""Build TensorRT engines from ONNX graphs, with TensorRT or TensorRT-RTX.

TensorRT builds for the GPU of this machine. TensorRT-RTX needs no GPU and builds for several GPU architectures.
Networks are strongly typed: the graph decides the precision of every step. Each engine holds both profiles of
`samekit.engine.fingerprint`. Where a GPU can run the engines, they are compared with the graphs before they are valid.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from samekit.backends.base import has_driver
from samekit.engine.builds import (
    BUILDS_FOLDER,
    FAILED_LOG_SUFFIX,
    LOG_FILE,
    Build,
    BuiltEngine,
    is_whole,
    new_build,
    unfinished_builds,
    write_document,
)
from samekit.engine.fingerprint import (
    AMPERE_PLUS,
    BUILDER_DEFAULTS,
    FROM_AMPERE,
    PORTABLE,
    SAME_CAPABILITY,
    TENSORRT,
    TENSORRT_RTX,
    THIS_GPU,
    BuilderOptions,
    capability_name,
    fingerprint_of,
    runs_on,
)
from samekit.engine.folder import Engine
from samekit.engine.spec import DIRECTIONS, GPU_PRECISIONS, Direction
from samekit.errors import BackendUnavailableError, BuildError, InputError, VerificationError
from samekit.files.atomic import output_errors
from samekit.files.locks import folder_lock
from samekit.tensorrt.check import check_build
from samekit.tensorrt.flavours import import_flavour
from samekit.tensorrt.gpu import Gpu
from samekit_export.engine_builder import EngineBuilder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from samekit.engine.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

AUTO, RTX, OFF = MODES = ("auto", "rtx", "off")
"""auto: TensorRT if it and a GPU are available, else TensorRT-RTX if installed, else nothing. rtx: TensorRT-RTX."""

# Why TensorRT-RTX has none of the builder's options. `tests/test_tensorrt_options.py` tries what it does with them.
_RTX_LACKS = {
    "level": "it builds the same engine at every level",
    "hardware": "its engines run on GPUs of several generations anyway",
    "later_versions": "each release runs only its own engines",
}


def check_options(mode: str, options: BuilderOptions) -> None:
    """Raise InputError if options were chosen that the builder of a mode lacks; `auto` is checked when it builds."""
    for name in options.changed:
        option = f"--tensorrt-{name.replace('_', '-')}"
        if mode == OFF:
            raise InputError(f"{option} changes TensorRT engines, and none is built; pass --tensorrt auto too")
        if mode == RTX:
            raise InputError(f"tensorrt_rtx has no {option}: {_RTX_LACKS[name]}; leave it out")


def add_engines(
    engine: Engine, precisions: Sequence[str], mode: str, options: BuilderOptions = BUILDER_DEFAULTS
) -> list[Build]:
    """Build the TensorRT engines that a finished engine folder lacks; log each step, and what is left out and why.

    `mode` is one of `MODES`. Return the builds of these precisions, including current ones.

    Raises:
        InputError: unknown mode, or the flavour that builds lacks one of the options.
        BackendUnavailableError: TensorRT-RTX was asked for and cannot be imported.
        BuildError: TensorRT cannot build a graph.
        OutputError: the folder cannot be written.
    """
    check_options(mode, options)
    gpu = _gpu()
    flavour, target = _choose_flavour(mode, gpu, options)
    if flavour is None:
        return []
    if gpu and not runs_on(target, gpu.capability):
        gpu = None
    builds = []
    for precision in precisions:
        if precision in GPU_PRECISIONS:
            builds.append(build_engines(engine, precision, flavour, target, gpu, options))
        else:
            logger.info("no TensorRT engine of %s, which is for ONNX Runtime on the CPU", precision)
    return builds


def _gpu() -> Gpu | None:
    """Return the GPU for which TensorRT builds, the first one; None if there is none."""
    with suppress(BackendUnavailableError):
        return Gpu(0)
    return None


def _choose_flavour(mode: str, gpu: Gpu | None, options: BuilderOptions) -> tuple[Any, str]:
    """Return the module that builds and the target that it builds for; None if nothing can be built."""
    if mode not in MODES:
        raise InputError(f"unknown TensorRT mode {mode!r}; choose one of {', '.join(MODES)}")
    if mode == OFF:
        return None, ""
    reasons = []
    if mode == AUTO:
        try:
            module = import_flavour(TENSORRT)
            if gpu:
                return module, _target(gpu, options)
            reasons.append("tensorrt builds on a GPU, and PyTorch finds none; use tensorrt-rtx")
        except BackendUnavailableError as error:
            reasons.append(str(error))
    try:
        module = import_flavour(TENSORRT_RTX)
    except BackendUnavailableError as error:
        if mode == RTX:
            raise
        reasons.append(str(error))
    else:
        check_options(RTX, options)
        return module, PORTABLE
    why = "; ".join(reasons) if has_driver() else "no NVIDIA driver; for GPUs of other machines pass --tensorrt rtx"
    logger.info("left out: TensorRT engines (%s)", why)
    return None, ""


def _target(gpu: Gpu, options: BuilderOptions) -> str:
    """Return what TensorRT builds for on a GPU; raise InputError if it cannot build for `options.hardware` here."""
    if options.hardware != FROM_AMPERE:
        return capability_name(gpu.capability)
    if not runs_on(AMPERE_PLUS, gpu.capability):
        raise InputError(
            f"hardware {FROM_AMPERE} needs a GPU of compute capability {AMPERE_PLUS} to build, and {gpu.name} has "
            f"{capability_name(gpu.capability)}; choose {THIS_GPU} or {SAME_CAPABILITY}"
        )
    return AMPERE_PLUS


def build_engines(
    engine: Engine,
    precision: str,
    module: Any,
    target: str,
    gpu: Gpu | None = None,
    options: BuilderOptions = BUILDER_DEFAULTS,
) -> Build:
    """Build the engines of both directions of one precision, or leave them if they are complete and current.

    Wait while another process writes to the engine folder.

    Args:
        engine: a finished engine folder.
        precision: of its graphs, one of `GPU_PRECISIONS`.
        module: `tensorrt` or `tensorrt_rtx`, see `samekit.tensorrt.flavours.import_flavour`.
        target: as in `samekit.engine.fingerprint.Fingerprint`.
        gpu: where the engines are checked before they are valid; None leaves that to the first machine that opens them.
        options: settings of the builder, all of which the flavour has.

    Raises:
        BuildError: TensorRT cannot build a graph; its log stays beside the builds.
        VerificationError: the engines compute wrong values on the GPU; the log stays too.
        OutputError: the folder cannot be written.
    """
    if current := _current_build(engine, precision, module, target, options):
        return current
    with folder_lock(engine.folder):
        # Checked again: the process that held the lock may have built this, or exported other graphs.
        engine = Engine.load(engine.folder)
        engine.check(precision)
        if current := _current_build(engine, precision, module, target, options):
            return current
        for unfinished in unfinished_builds(engine):
            shutil.rmtree(unfinished, ignore_errors=True)
        fingerprint = fingerprint_of(engine.spec, precision, module.__name__, module.__version__, target, options)
        folder = engine.folder / BUILDS_FOLDER / fingerprint.name
        with new_build(folder), output_errors(folder):
            logger.info("building %s", folder)
            _failed_log(folder).unlink(missing_ok=True)
            try:
                build = Build(folder, fingerprint, _build_engines(engine, fingerprint, module, folder))
                if gpu is None:
                    logger.info(
                        "not checked: no GPU here runs these engines; the first machine that opens them does it"
                    )
                elif failure := check_build(engine, build, module, gpu).failure:
                    raise VerificationError(
                        f"{module.__name__} {module.__version__}: {failure}; these engines were deleted, use backend "
                        "onnxruntime, and please report this"
                    )
            except (BuildError, VerificationError):
                with suppress(OSError):
                    shutil.copyfile(folder / LOG_FILE, _failed_log(folder))
                raise
            write_document(build)
    return Build.load(folder)


def _current_build(engine: Engine, precision: str, module: Any, target: str, options: BuilderOptions) -> Build | None:
    """Return the build, if it exists and is complete and current."""
    fingerprint = fingerprint_of(engine.spec, precision, module.__name__, module.__version__, target, options)
    folder = engine.folder / BUILDS_FOLDER / fingerprint.name
    if not is_whole(folder):
        return None
    logger.info("%s is current", folder)
    return Build.load(folder)


def _failed_log(folder: Path) -> Path:
    """Return where the log of a build that failed stays."""
    return folder.with_name(f"{folder.name}{FAILED_LOG_SUFFIX}")


def _build_engines(engine: Engine, fingerprint: Fingerprint, module: Any, folder: Path) -> dict[Direction, BuiltEngine]:
    """Write the engines of both directions and the build log into a folder."""
    engines = {}
    with (folder / LOG_FILE).open("w", encoding="utf-8") as log:
        for direction in DIRECTIONS:
            builder = EngineBuilder(engine, direction, fingerprint, module, log, _failed_log(folder))
            engines[direction] = builder.build(folder / f"{direction}.engine")
    return engines
