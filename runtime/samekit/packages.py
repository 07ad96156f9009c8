"""Imports of optional packages, and of what packages register in entry points; messages say what to install."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from samekit.errors import BackendError, BackendUnavailableError, first_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

INSTALL_EXPORT = "pip install 'samekit[export]'"
"""The command that installs what `samekit_export` needs."""


def import_installed(name: str) -> Any:
    """Import a package, but no folder that only has its name.

    Python imports a folder without `__init__.py` as a namespace package. `python -m` searches the working folder first,
    and an engine folder holds a folder called `tensorrt`.

    Raises:
        ModuleNotFoundError: the package is not installed.
        Exception: whatever the package raises while it is imported.
    """
    module = importlib.import_module(name)
    if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return module


def import_package(name: str, install: str) -> Any:
    """Import an optional package.

    Args:
        name: of the package, or of a module in it.
        install: the command that installs it.

    Returns:
        The module.

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
        raise _broken(name, error, install) from None
    # The loader of a package whose libraries are missing raises errors of many kinds.
    except Exception as error:
        if _was_interrupted(error):
            raise KeyboardInterrupt from error
        raise _broken(name, error, install) from None


def import_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        BackendUnavailableError, BackendError, KeyboardInterrupt: as `import_package`.
    """
    return import_package("onnxruntime", "pip install 'samekit[cpu]' or 'samekit[gpu]'")


def registered(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name. Other packages add to those of samekit, but cannot replace them."""
    # Importing it takes as long as all else that `samekit --help` needs.
    from importlib.metadata import distribution, entry_points

    found = (*entry_points(group=group), *distribution("samekit").entry_points.select(group=group))
    return {entry.name: entry for entry in found}


def load_registered(entry: EntryPoint) -> Any:
    """Import what an entry point names.

    Raises:
        BackendUnavailableError, BackendError, KeyboardInterrupt: as `import_package`.
    """
    package = entry.dist.name if entry.dist else entry.module
    module = import_package(entry.module, INSTALL_EXPORT if package == "samekit" else f"pip install {package}")
    try:
        return getattr(module, entry.attr)
    except AttributeError:
        raise BackendError(f"{package} registers {entry.value}, which does not exist; update {package}") from None


def _broken(name: str, error: Exception, install: str) -> BackendError:
    return BackendError(
        f"{name} is installed, but cannot be imported ({first_line(error)}); "
        f"install what is missing, or run: pip uninstall {name.replace('_', '-')}, then {install}"
    )


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error was caused by Ctrl-C."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
