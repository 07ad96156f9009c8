"""The Python modules of TensorRT and TensorRT-RTX behind one door; both have the same names for what samekit needs."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from samekit.errors import BackendError, BackendUnavailableError
from samekit.packages import import_onnxruntime, import_package
from samekit.tensorrt.fingerprint import TENSORRT, TENSORRT_RTX

if TYPE_CHECKING:
    from collections.abc import Callable

OLDEST = {TENSORRT: (10, 15), TENSORRT_RTX: (1, 4)}
"""The first whose parser knows RotaryEmbedding of ONNX opset 23, in TensorRT's and in TensorRT-RTX's own counting."""

FLAVOURS = tuple(OLDEST)
"""The preferred one first: it compiles for the very GPU that it runs on."""

INSTALL = {TENSORRT: "pip install 'samekit[gpu]'", TENSORRT_RTX: "pip install 'samekit[rtx]'"}
"""How to get each flavour."""


def import_flavour(flavour: str) -> Any:
    """The module of a flavour, imported when first needed.

    Raises:
        BackendUnavailableError: it is not installed, or is too old for our graphs.
        BackendError: it is installed, but cannot be imported; or another module has its name.
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
    """The modules that can be imported, by flavour, the preferred one first."""
    modules = {}
    for flavour in FLAVOURS:
        with suppress(BackendError):
            modules[flavour] = import_flavour(flavour)
    return modules


def installed_versions() -> dict[str, str]:
    """The versions of the flavours that can be imported, the preferred one first."""
    return {flavour: module.__version__ for flavour, module in installed_flavours().items()}


def builder_versions() -> dict[str, str]:
    """The versions of what keeps engines: the flavours, and ONNX Runtime for its TensorRT provider."""
    versions = installed_versions()
    with suppress(BackendError):
        versions["onnxruntime"] = import_onnxruntime().__version__
    return versions


def make_logger(module: Any, write: Callable[[str, str], object]) -> Any:
    """A logger to pass to TensorRT.

    Args:
        module: as `import_flavour` returns it.
        write: called with the severity, such as `WARNING`, and the message; never for VERBOSE.
    """

    class Logger(module.ILogger):  # type: ignore[misc] # the module is known only now
        """Hands messages on."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT, from any thread."""
            if severity != module.ILogger.Severity.VERBOSE:
                write(severity.name, message)

    return Logger()
