"""The Python modules of TensorRT and TensorRT-RTX, which have the same names for everything that samekit uses."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from samekit.engine.fingerprint import TENSORRT, TENSORRT_RTX
from samekit.errors import BackendError, BackendUnavailableError
from samekit.packages import import_onnxruntime, import_package, install_command

if TYPE_CHECKING:
    from collections.abc import Callable

OLDEST: Final = {TENSORRT: (10, 15), TENSORRT_RTX: (1, 4)}
"""The first version of each flavour whose parser supports RotaryEmbedding of ONNX opset 23."""

FLAVOURS: Final = tuple(OLDEST)
"""Both flavours. TensorRT is preferred: it compiles for the GPU of the machine."""

INSTALL: Final = {TENSORRT: install_command("gpu"), TENSORRT_RTX: install_command("rtx")}
"""The command that installs each flavour."""


def import_flavour(flavour: str) -> Any:
    """Import the module of a flavour.

    Raises:
        BackendUnavailableError: it is not installed, or older than `OLDEST`.
        BackendError: it is installed but cannot be imported, or another module has its name.
    """
    module = import_package(flavour, INSTALL[flavour])
    version = re.match(r"(\d+)\.(\d+)", str(getattr(module, "__version__", "")), re.ASCII)
    if version is None:
        raise BackendError(
            f"{getattr(module, '__file__', flavour)}: has no version such as 10.15, so it is not {flavour}; rename it, "
            "or work in another folder"
        )
    if (int(version[1]), int(version[2])) < OLDEST[flavour]:
        oldest = ".".join(map(str, OLDEST[flavour]))
        raise BackendUnavailableError(
            f"{flavour} {module.__version__} is older than {oldest}, the first to read our graphs; "
            f"run: {INSTALL[flavour]} --upgrade"
        )
    return module


def installed_flavours() -> dict[str, Any]:
    """Return the modules that can be imported, by flavour, the preferred one first."""
    modules = {}
    for flavour in FLAVOURS:
        with suppress(BackendError):
            modules[flavour] = import_flavour(flavour)
    return modules


def builder_versions() -> dict[str, str]:
    """Return the versions of everything that makes engines: the flavours, and ONNX Runtime's TensorRT provider."""
    versions = {flavour: module.__version__ for flavour, module in installed_flavours().items()}
    with suppress(BackendError):
        versions["onnxruntime"] = import_onnxruntime().__version__
    return versions


def make_logger(module: Any, write: Callable[[str, str], object]) -> Any:
    """Return a logger for TensorRT, which calls `write(severity, message)` from any thread, except for VERBOSE."""

    class Logger(module.ILogger):  # type: ignore[misc] # the base class is known at run time only
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity != module.ILogger.Severity.VERBOSE:
                write(severity.name, message)

    return Logger()
