"""Backends behind one contract (`base.Backend`), opened by name; each imports its framework when it is opened."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from samekit.backends.base import has_driver
from samekit.engine.folder import Engine, find_engine
from samekit.engine.spec import GPU_PRECISIONS
from samekit.errors import (
    BackendUnavailableError,
    CheckpointError,
    EngineError,
    EngineNotFoundError,
    InputError,
    StaleEngineError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.backends.base import Backend, BackendOptions

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The backend that tries the others in order."""


def _open_tensorrt(engine: Engine, options: BackendOptions) -> Backend:
    from samekit.tensorrt.backend import open_tensorrt  # noqa: PLC0415

    return open_tensorrt(engine, options)


def _open_onnxruntime(engine: Engine, options: BackendOptions) -> Backend:
    from samekit.backends.onnxruntime import OnnxRuntimeBackend  # noqa: PLC0415

    return OnnxRuntimeBackend(engine, options)


def _open_eager_engine(engine: Engine, options: BackendOptions) -> Backend:
    from samekit.backends.pytorch import load_checkpoint, open_eager  # noqa: PLC0415

    checkpoint = load_checkpoint(engine.spec.name, engine.spec.source)
    if checkpoint.sha256 != engine.spec.source_sha256:
        raise BackendUnavailableError(
            f"{checkpoint.source}: not the checkpoint that {engine.folder} was exported from; export it again"
        )
    return open_eager(checkpoint, options)


# In the order in which "auto" tries them.
_OPENERS: dict[str, Callable[[Engine, BackendOptions], Backend]] = {
    "tensorrt": _open_tensorrt,
    "onnxruntime": _open_onnxruntime,
    "torch": _open_eager_engine,
}

BACKENDS = (AUTO, *_OPENERS)
"""What users pass as `backend=`."""

# What "auto" does not try where the CPU was asked for.
_GPU_ONLY = ("tensorrt",)

# The only one that "auto" tries for a precision that does not run on GPUs.
_CPU_PRECISIONS_BACKEND = "onnxruntime"


def open_backend(model: str | os.PathLike[str], backend: str, options: BackendOptions) -> Backend:
    """Open a model.

    Args:
        model: a name, an engine folder, or a checkpoint folder (run in PyTorch).
        backend: one of `BACKENDS`. "auto" tries them in order, logs every refusal and its choice; a name is opened or
            fails.
        options: how to open it.

    Raises:
        InputError: unknown backend.
        EngineNotFoundError: there is no engine, and no checkpoint that the backend can run instead.
        EngineError: the engine folder is damaged, or has TensorRT engines of another version or GPU only.
        BackendUnavailableError: the backend cannot be used here.
        CheckpointError: PyTorch was asked for, or there is no engine, and the checkpoint cannot be loaded.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == AUTO and options.device == "cuda" and not has_driver():
        # Each backend would name a package to install, which does not help.
        raise BackendUnavailableError("device cuda needs an NVIDIA driver, and there is none; choose device cpu")
    try:
        engine = find_engine(model)
    except EngineNotFoundError as error:
        return _open_without_engine(os.fspath(model), backend, options, error)
    if backend != AUTO:
        return _reopenable(_OPENERS[backend](engine, options), engine.folder, options)
    refusals = []
    for_cpus = options.precision not in GPU_PRECISIONS
    for name, opener in _OPENERS.items():
        if name in _GPU_ONLY and options.device == "cpu":
            continue
        if for_cpus and name != _CPU_PRECISIONS_BACKEND:
            continue
        try:
            opened = opener(engine, options)
        except (BackendUnavailableError, StaleEngineError, CheckpointError) as error:
            # An engine that was built and cannot be used is news; a backend that is not there is not.
            level = logging.WARNING if isinstance(error, StaleEngineError) else logging.INFO
            logger.log(level, "backend %s passed over: %s", name, error)
            refusals.append(f"{name}: {error}")
            continue
        logger.info("backend %s on %s, %s", name, opened.device, options.precision)
        if name == "torch":
            reasons = "; ".join(refusals)
            logger.warning("running in PyTorch, slower than the engine %s, for: %s", engine.folder, reasons)
        return _reopenable(opened, engine.folder, options)
    # What needs a GPU comes last: it is not what most people miss.
    refusals.sort(key=lambda refusal: refusal.startswith(_GPU_ONLY))
    only = f" (only {_CPU_PRECISIONS_BACKEND} runs {options.precision})" if for_cpus else ""
    raise BackendUnavailableError(f"no backend can open {engine.folder}{only}; " + "; ".join(refusals))


def _open_without_engine(model: str, backend: str, options: BackendOptions, error: EngineNotFoundError) -> Backend:
    """PyTorch on the checkpoint, where the backend asked for allows it."""
    # A folder mistyped beside others is no repository on the hub, which would be asked for half a minute.
    mistyped = os.path.isdir(os.path.dirname(model)) and not os.path.exists(model)  # noqa: PTH110, PTH112, PTH120
    if backend not in (AUTO, "torch") or mistyped:
        raise error
    from samekit.backends.pytorch import load_checkpoint, open_eager  # noqa: PLC0415

    try:
        return _reopenable(open_eager(load_checkpoint(model, None), options), model, options)
    except BackendUnavailableError as unavailable:
        raise EngineNotFoundError(f"{error} (PyTorch cannot take its place: {unavailable})") from None


def _reopenable(opened: Backend, model: str | os.PathLike[str], options: BackendOptions) -> Backend:
    """Let a backend be pickled and copied."""
    # The other process may have another working folder.
    path = os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)  # noqa: PTH100, PTH112
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
