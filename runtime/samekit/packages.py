"""Import optional packages and entry points; the errors say what to install."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samekit.errors import BackendError, BackendUnavailableError, first_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
"""The tested versions of all packages; only a checkout of the sources has this file."""


def install_command(*extras: str) -> str:
    """Return the command that installs extras of samekit into this environment.

    In a checkout, it installs the versions of `constraints.txt`. pip takes the samekit that is installed already, so
    the command needs no samekit on PyPI.
    """
    pip = shutil.which("pip")
    is_ours = pip and os.path.dirname(pip) == os.path.dirname(sys.executable)
    command = "pip" if is_ours else f"{shlex.quote(sys.executable)} -m pip"
    versions = f" -c {shlex.quote(str(_CONSTRAINTS))}" if _CONSTRAINTS.is_file() else ""
    return f"{command} install 'samekit[{','.join(extras)}]'{versions}"


INSTALL_EXPORT = install_command("export")
"""The command that installs what `samekit_export` needs."""


def import_installed(name: str) -> Any:
    """Import a package, but not a folder of the same name.

    Python imports a folder without `__init__.py` as a namespace package. `python -m` searches the working folder first,
    and an engine folder holds a folder called `tensorrt`.

    Raises:
        ModuleNotFoundError: the package is not installed. The package itself can raise any other error.
    """
    if name == "openvino":
        # Its import would send usage data to the vendor without asking, unless this package is missing.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    module = importlib.import_module(name)
    if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return module


def import_package(name: str, install: str) -> Any:
    """Import an optional package or a module in it; `install` is the command that installs it.

    Raises:
        BackendUnavailableError: the package is not installed.
        BackendError: the package is installed, but cannot be imported.
        KeyboardInterrupt: the import was interrupted. Extension modules turn that into an ImportError.
    """
    try:
        return import_installed(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise BackendUnavailableError(f"{error.name} is not installed; run: {install}") from None
        cause: Exception = error
    # A package whose shared libraries are missing can raise errors of any type.
    except Exception as error:
        if _was_interrupted(error):
            raise KeyboardInterrupt from error
        cause = error
    raise BackendError(
        f"{name} is installed, but cannot be imported ({first_line(cause)}); "
        f"install what is missing, or run: pip uninstall {name.replace('_', '-')}, then {install}"
    )


def import_onnxruntime() -> Any:
    """Import ONNX Runtime; raises what `import_package` raises."""
    return import_package("onnxruntime", install_command("cpu"))


def import_openvino() -> Any:
    """Import OpenVINO; raises what `import_package` raises."""
    return import_package("openvino", install_command("openvino"))


def registered(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name. Other packages add to those of samekit, but cannot replace them."""
    # This import takes longer than the others of `samekit`, and most commands do not need it.
    from importlib.metadata import distribution, entry_points

    found = (*entry_points(group=group), *distribution("samekit").entry_points.select(group=group))
    return {entry.name: entry for entry in found}


def load_registered(entry: EntryPoint) -> Any:
    """Import what an entry point names; raises what `import_package` raises."""
    package = entry.dist.name if entry.dist else entry.module
    module = import_package(entry.module, INSTALL_EXPORT if package == "samekit" else f"pip install {package}")
    try:
        return getattr(module, entry.attr)
    except AttributeError:
        raise BackendError(f"{package} registers {entry.value}, which does not exist; update {package}") from None


def _was_interrupted(error: BaseException | None) -> bool:
    """Return whether an error was caused by Ctrl-C."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
