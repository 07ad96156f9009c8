"""Open a backend by its name, or the first one that works. Its framework is imported only then.

Other packages add backends by entry points of the group `samekit.backends`. Such an entry point names a function that
takes an `Engine` and `BackendOptions`, and returns a `Backend` of the same name. `torch` of samekit_export is one.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from samekit.backends.base import has_driver
from samekit.engine.folder import find_engine
from samekit.engine.spec import BF16, GPU_PRECISIONS, OPENVINO_DEVICES, graph_precision
from samekit.errors import (
    BackendUnavailableError,
    CheckpointError,
    EngineError,
    EngineNotFoundError,
    InputError,
    SamekitError,
    StaleEngineError,
)
from samekit.packages import load_registered, registered

if TYPE_CHECKING:
    from samekit.backends.base import Backend, BackendOptions

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The backend that tries the others in order."""

OPENVINO = "openvino"
"""The only backend for bf16, Intel's GPUs and NPUs."""

BACKENDS = (AUTO, "tensorrt", "onnxruntime", OPENVINO, "torch")
"""What users pass as `backend=`, in the order in which "auto" tries them. "auto" tries no backend of other packages."""

GROUP = "samekit.backends"
"""The entry points that name functions which open backends."""

# These are not entry points, because reading those would slow down every opening.
_BUILT_IN = {
    "tensorrt": ("samekit.tensorrt.opening", "open_tensorrt"),
    "onnxruntime": ("samekit.backends.onnxruntime", "OnnxRuntimeBackend"),
    OPENVINO: ("samekit.backends.openvino", "OpenVinoBackend"),
}

# The backend that "auto" does not try if the CPU was asked for.
_GPU_BACKEND = "tensorrt"

# The only backend of a device that the others do not support.
_BACKEND_OF_DEVICE = {"webgpu": "onnxruntime"}

# The only backend that runs int8.
_INT8_BACKEND = "onnxruntime"


def open_backend(model: str | os.PathLike[str], backend: str, options: BackendOptions) -> Backend:
    """Open a model.

    Args:
        model: as `find_engine` takes it, or a checkpoint, which runs in PyTorch.
        backend: one of `BACKENDS`, or a name that another package has registered. "auto" tries its backends in order,
            logs every refusal and its choice. A named backend is opened or fails.
        options: how to open it.

    Raises:
        InputError: unknown backend.
        EngineNotFoundError: there is no engine, and no checkpoint that the backend can run instead.
        EngineError: the engine folder is damaged, or has TensorRT engines of another version or GPU only.
        HubError: the engine's repository on the hub cannot be reached, or refuses.
        BackendUnavailableError: the backend cannot be used here, or the engine folder has no graphs of the precision,
            which only the backend "torch" can do without.
        CheckpointError: PyTorch was asked for, or there is no engine, and the checkpoint cannot be loaded.
    """
    if backend not in BACKENDS and backend not in registered(GROUP):
        known = dict.fromkeys([*BACKENDS, *registered(GROUP)])
        raise InputError(f"unknown backend {backend!r}; choose one of {', '.join(known)}")
    only = _BACKEND_OF_DEVICE.get(options.device or "")
    if only and backend not in (AUTO, only):
        raise BackendUnavailableError(f"device {options.device} runs in the backend {only} only; choose backend {only}")
    backend = only or backend
    _check_needs_openvino(backend, options)
    if backend == AUTO and options.device == "cuda" and not has_driver():
        # Each backend would name a package to install, which does not help.
        raise BackendUnavailableError("device cuda needs an NVIDIA driver, and there is none; choose device cpu")
    try:
        engine = find_engine(model)
    except EngineNotFoundError as error:
        return _open_without_engine(os.fspath(model), backend, options, error)
    if backend != AUTO:
        return _reopenable(_opener(backend)(engine, options), engine.name, options)
    # PyTorch could compute any precision, but slowly. So this error comes first, and it says how to export the graphs.
    engine.check(graph_precision(options.precision))
    refusals: dict[str, SamekitError] = {}
    for name in _candidates(options):
        try:
            opened = _opener(name)(engine, options)
        except (BackendUnavailableError, StaleEngineError, CheckpointError) as error:
            # The user built the engine that cannot be used, so that is a warning. A missing backend is not.
            level = logging.WARNING if isinstance(error, StaleEngineError) else logging.INFO
            logger.log(level, "backend %s passed over: %s", name, error)
            refusals[name] = error
            continue
        logger.info("backend %s on %s, %s", name, opened.device, options.precision)
        if name == "torch":
            reason = _first_to_cure(refusals)
            logger.warning("running in PyTorch, slower than the engine %s, because %s", engine.folder, reason)
        return _reopenable(opened, engine.name, options)
    raise BackendUnavailableError(f"{engine.folder} cannot be run: {_first_to_cure(refusals)}")


def _candidates(options: BackendOptions) -> tuple[str, ...]:
    """Return the backends that "auto" tries, in order.

    On CPUs, only bf16 has a reason to choose OpenVINO, which alone computes in it. Measured on AMD Zen 4, with SAME-S:
    fp32 takes 0.98 to 1.00 times as long in OpenVINO as in ONNX Runtime, but it opens ten times slower and needs twice
    the memory. int8 weights with dynamic quantization take 1.06 times as long there, 0.97 times with the rest in bf16.
    """
    if _needs_openvino(options):
        return (OPENVINO,)
    if options.precision not in GPU_PRECISIONS:
        return (_INT8_BACKEND,)
    return tuple(name for name in BACKENDS[1:] if name != _GPU_BACKEND or options.device != "cpu")


def _needs_openvino(options: BackendOptions) -> str | None:
    """Return the option that only the openvino backend has, or None."""
    if options.device in OPENVINO_DEVICES:
        return f"device {options.device}"
    return f"precision {BF16}" if options.precision == BF16 else None


def _check_needs_openvino(backend: str, options: BackendOptions) -> None:
    """Raise BackendUnavailableError if another backend of samekit was asked for what only openvino has."""
    option = _needs_openvino(options)
    if option and backend in BACKENDS and backend not in (AUTO, OPENVINO):
        raise BackendUnavailableError(f"the {backend} backend has no {option}; use backend {OPENVINO}")


def _first_to_cure(refusals: dict[str, SamekitError]) -> SamekitError:
    """Return the refusal of the backend that should run on this machine. The log has the others."""
    if not has_driver() and len(refusals) > 1:
        refusals.pop(_GPU_BACKEND, None)
    return next(iter(refusals.values()))


def _opener(name: str) -> Any:
    """Import the function that opens a backend."""
    if name in _BUILT_IN:
        module, function = _BUILT_IN[name]
        return getattr(import_module(module), function)
    return load_registered(registered(GROUP)[name])


def _open_without_engine(model: str, backend: str, options: BackendOptions, error: EngineNotFoundError) -> Backend:
    """Open the checkpoint `model` in PyTorch, if the chosen backend allows that."""
    # A path beside existing folders is mistyped. Looking it up on the hub would delay the error by half a minute.
    mistyped = os.path.isdir(os.path.dirname(model)) and not os.path.exists(model)
    if backend not in (AUTO, "torch") or mistyped:
        raise error
    try:
        _check_needs_openvino("torch", options)
        return _reopenable(_opener("torch")(model, options), model, options)
    except BackendUnavailableError as unavailable:
        raise EngineNotFoundError(f"{error} (PyTorch cannot take its place: {unavailable})") from None


def _reopenable(opened: Backend, model: str | os.PathLike[str], options: BackendOptions) -> Backend:
    """Let a backend be pickled and copied."""
    # The other process may have another working folder.
    path = os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)
    opened.reopening = reopen, (path, opened.name, options, opened.spec.source_sha256)
    return opened


def reopen(model: str, backend: str, options: BackendOptions, digest: str) -> Backend:
    """Open a backend again that was pickled or copied.

    Args:
        model: as `open_backend` takes it.
        backend: its name.
        options: how it was opened.
        digest: `EngineSpec.source_sha256` of its model.

    Raises:
        EngineError: there is another model now.
        SamekitError: as `open_backend`.
    """
    opened = open_backend(model, backend, options)
    if opened.spec.source_sha256 != digest:
        opened.close()
        raise EngineError(f"{model}: is another model now than the one that was copied; open the model again")
    return opened
