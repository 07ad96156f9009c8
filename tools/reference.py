"""Write the API reference, HTML from the docstrings, to build/docs."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import pdoc

import samekit
import samekit_export
from samekit import dataset

FOLDER = Path("build", "docs")
# Its reference is `samekit COMMAND --help`.
LEFT_OUT = "samekit.cli"


def modules() -> list[str]:
    """Names of the public modules: those without a leading underscore."""
    names = []
    for package in (samekit, samekit_export):
        within = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names += [package.__name__, *(module.name for module in within)]
    return [name for name in names if "._" not in name and not name.startswith(LEFT_OUT)]


def prepare() -> None:
    """Import what pdoc reads from modules and does not import by itself."""
    # Names that a package imports on first use.
    for package in (samekit, dataset):
        for name in package.__all__:
            vars(package)[name] = getattr(package, name)
    for name in modules():
        importlib.import_module(name)


def write(folder: Path) -> None:
    """Write a page for each public module, and an index.

    Args:
        folder: what lies there is replaced.
    """
    prepare()
    pdoc.render.configure(docformat="google", footer_text=f"samekit {samekit.__version__}", show_source=False)
    # A package brings its modules along unless it has an `__all__` that leaves them out.
    pdoc.pdoc(*[name for name in modules() if not _is_brought_along(name)], output_directory=folder)


def _is_brought_along(name: str) -> bool:
    """Whether pdoc adds a module with the package that it is in."""
    package = name.rpartition(".")[0]
    return bool(package) and not hasattr(sys.modules[package], "__all__")


if __name__ == "__main__":
    write(FOLDER)
    sys.stdout.write(f"{FOLDER / 'index.html'}\n")
