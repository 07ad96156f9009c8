"""Write the API reference, as HTML that is made from the docstrings; build_docs.py makes it a part of the site."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import TYPE_CHECKING

import pdoc

import samekit
import samekit_export
from samekit import dataset

if TYPE_CHECKING:
    from pathlib import Path

# The reference of the commands is `samekit COMMAND --help`.
LEFT_OUT = "samekit.cli"


def modules() -> list[str]:
    """Return the names of the public modules, which do not begin with an underscore."""
    names = []
    for package in (samekit, samekit_export):
        within = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names += [package.__name__, *(module.name for module in within)]
    return [name for name in names if "._" not in name and not name.startswith(LEFT_OUT)]


def prepare() -> None:
    """Import the modules and names that pdoc reads but does not import itself."""
    # These packages import their public names on first use.
    for package in (samekit, dataset):
        for name in package.__all__:
            vars(package)[name] = getattr(package, name)
    for name in modules():
        importlib.import_module(name)


def write(folder: Path) -> None:
    """Write a page for each public module and an index to a folder, and replace what it holds."""
    prepare()
    pdoc.render.configure(docformat="google", footer_text=f"samekit {samekit.__version__}", show_source=False)
    # pdoc adds the modules of a package itself, unless the package has an `__all__`.
    pdoc.pdoc(*[name for name in modules() if not _is_added_by_pdoc(name)], output_directory=folder)


def _is_added_by_pdoc(name: str) -> bool:
    """Return whether pdoc adds a module together with its package."""
    package = name.rpartition(".")[0]
    return bool(package) and not hasattr(sys.modules[package], "__all__")
