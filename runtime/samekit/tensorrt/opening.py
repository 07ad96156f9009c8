"""Open the TensorRT engines of an engine folder: choose the build that runs here, and check it the first time."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from samekit.backends.experimental import TENSORRT, warn_experimental
from samekit.engine.builds import build_folders, builds_of, choose_build, why_not_here
from samekit.engine.fingerprint import capability_name
from samekit.engine.records import Tuning
from samekit.engine.spec import GPU_PRECISIONS
from samekit.errors import BackendUnavailableError, StaleEngineError
from samekit.tensorrt.backend import TensorRTBackend
from samekit.tensorrt.check import check_build
from samekit.tensorrt.flavours import FLAVOURS, INSTALL, import_flavour, installed_flavours
from samekit.tensorrt.gpu import Gpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.backends.base import BackendOptions
    from samekit.engine.builds import Build
    from samekit.engine.folder import Engine
    from samekit.engine.records import Check


def open_tensorrt(engine: Engine, options: BackendOptions) -> TensorRTBackend:
    """Open the build of an engine folder that runs on this machine.

    Engines that were not checked on such a GPU are checked first. This takes seconds, or a minute for a large model on
    few cores, because ONNX Runtime computes the reference on the CPU. The result is recorded in the folder of the
    build. Engines that compute wrong values never run.

    Raises:
        BackendUnavailableError: no GPU, no TensorRT, or no engine of this precision; or the engines were not checked,
            and ONNX Runtime is missing.
        BackendError: TensorRT or PyTorch is installed, but cannot be imported, or fails.
        StaleEngineError: there are engines, but none can run here, or those that can compute wrong values.
    """
    if options.device == "cpu":
        raise BackendUnavailableError("TensorRT runs on GPUs only; choose device cuda or another backend")
    if options.precision not in GPU_PRECISIONS:
        raise BackendUnavailableError(
            f"TensorRT runs {' and '.join(GPU_PRECISIONS)}, {options.precision} is for CPUs; choose precision fp16, "
            "or the onnxruntime backend on the CPU"
        )
    # Checked before PyTorch is imported, which takes seconds.
    if not build_folders(engine):
        raise BackendUnavailableError(
            f"{engine.folder}: no TensorRT engine, which needs an NVIDIA GPU to run; where there is one, and TensorRT, "
            f"run: {engine.export_command('--tensorrt', 'auto')}"
        )
    gpu = Gpu(options.device_id)
    modules = installed_flavours()
    if not modules:
        for flavour in FLAVOURS:
            with suppress(BackendUnavailableError):
                # Raises BackendError if the flavour is installed but cannot be imported.
                import_flavour(flavour)
        raise BackendUnavailableError(f"neither flavour of TensorRT is installed; run: {' or '.join(INSTALL.values())}")
    versions = {flavour: module.__version__ for flavour, module in modules.items()}
    build = choose_build(engine, options.precision, gpu.capability, versions)
    module = modules[build.fingerprint.flavour]
    # `choose_build` leaves out builds whose check failed.
    if build.check(gpu.capability) is None and (failure := check_build(engine, build, module, gpu).failure):
        raise StaleEngineError(f"{build.folder}: {failure}; use backend onnxruntime, and please report this")
    warn_experimental(TENSORRT)
    tuning = Tuning.read(build.folder, capability_name(gpu.capability), build.digests)
    return TensorRTBackend(engine.spec, build, module, gpu, options, tuning)


def check_builds(engine: Engine, precision: str, device_id: int = 0) -> Iterator[tuple[Build, Check]]:
    """Check every build of a precision that runs on this machine's GPU again, and record the results.

    Raises:
        BackendUnavailableError: there is no GPU, or ONNX Runtime is missing.
        BackendError: an engine fails to run.
    """
    gpu = Gpu(device_id)
    modules = installed_flavours()
    versions = {flavour: module.__version__ for flavour, module in modules.items()}
    for build in builds_of(engine, precision)[0]:
        if why_not_here(build, engine.spec, gpu.capability, versions) is None:
            yield build, check_build(engine, build, modules[build.fingerprint.flavour], gpu)
