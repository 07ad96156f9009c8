"""Where an engine folder lies, and whether it is whole.

    engines/same-l/
      spec.json                        model facts, source, verification
      encoder.onnx decoder.onnx        fp32 graphs, with .data beside them when large
      encoder.fp16.onnx ...            other precisions
      tensorrt/                        TensorRT engines, see `samekit.tensorrt_store`

Knows no graph: files are compared with what `spec.json` says of them.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from samekit._files import named
from samekit.errors import BackendUnavailableError, EngineError, EngineNotFoundError
from samekit.spec import DECODER, ENCODER, RANDOM, SPEC_FILE, EngineSpec, GraphFile

if TYPE_CHECKING:
    from collections.abc import Sequence

ENGINES_FOLDER = "engines"
"""Where names are looked up first, and where `samekit export` writes."""


@dataclass(frozen=True)
class Engine:
    """A finished engine folder."""

    folder: Path
    """Where it lies."""
    spec: EngineSpec
    """What its `spec.json` says."""

    @classmethod
    def load(cls, folder: Path) -> Engine:
        """Read an engine folder.

        Raises:
            EngineError: it is not finished or its `spec.json` is damaged.
        """
        return cls(folder, EngineSpec.load(folder))

    def is_replaced(self, precision: str) -> bool:
        """Whether another export of a precision is there since it was loaded; without a `spec.json` none is."""
        try:
            return EngineSpec.load(self.folder).graphs.get(precision) != self.spec.graphs.get(precision)
        except EngineError:
            return False

    def export_command(self, *options: str) -> str:
        """The command that exports the same weights to this folder, with `options`."""
        source, words = self.spec.source, [self.spec.name]
        if self.spec.is_random:
            words += ["--weights", RANDOM]
        elif "folder" in source:
            words += ["--weights", str(source["folder"])]
        elif str(source.get("name")).lower().endswith(f"/{self.spec.name}"):
            # A repository on the hub, which the name alone may not tell.
            words = [str(source["name"])]
        if self.folder.parent != Path(ENGINES_FOLDER) and self.folder.name == self.spec.name:
            words += ["--out", str(self.folder.parent)]
        return shlex.join(["samekit", "export", *words, *options])

    def graph(self, half: str, precision: str) -> Path:
        """The path of a graph whose files are all there at their full size.

        Raises:
            BackendUnavailableError: the folder has no graph of this precision.
            EngineError: a file is missing or cut short.
        """
        halves = self.spec.graphs.get(precision)
        if halves is None:
            have = ", ".join(self.spec.graphs) or "none"
            raise BackendUnavailableError(
                f"{self.folder}: no {precision} graph (there is: {have}); "
                f"run: {self.export_command('--precision', precision)}"
            )
        graph = halves[half]
        for name, size in graph.sizes.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise EngineError(f"{path}: {state}; export the model again with --force")
        return self.folder / graph.file

    def check(self, precision: str) -> None:
        """Raise what `graph` raises unless both graphs of a precision are there at their full size."""
        for half in (ENCODER, DECODER):
            self.graph(half, precision)

    def check_digests(self) -> None:
        """Compare every graph's contents with the digest in `spec.json`; reads all of it.

        Raises:
            EngineError: a graph is missing or is not the one that was exported.
        """
        for precision, halves in self.spec.graphs.items():
            self.check(precision)
            for graph in halves.values():
                if describe_graph(self.folder, graph.file).sha256 != graph.sha256:
                    raise EngineError(
                        f"{self.folder / graph.file}: contents have changed since the export; export again with --force"
                    )


def describe_graph(folder: Path, file: str) -> GraphFile:
    """Digest and sizes of a graph and of the external data beside it."""
    digest = hashlib.sha256()
    sizes = {}
    for path in (folder / file, folder / f"{file}.data"):
        if path.is_file():
            sizes[path.name] = path.stat().st_size
            with path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return GraphFile(file, digest.hexdigest(), sizes)


def engine_roots() -> Sequence[Path]:
    """Folders in which a model's name is looked up, in order."""
    cache = os.environ.get("SAMEKIT_CACHE") or os.path.join("~", ".cache", "samekit", ENGINES_FOLDER)  # noqa: PTH118
    # Not Path.expanduser, which raises for users without a home.
    return Path(ENGINES_FOLDER), Path(os.path.expanduser(cache))  # noqa: PTH111


def places() -> str:
    """Where a model's name is looked up, for messages."""
    return " or ".join((".", *map(str, engine_roots())))


def find_engine(name: str | os.PathLike[str]) -> Engine:
    """The engine folder of a model.

    Args:
        name: an engine folder, or a model's name, looked up in `./engines` and in the user's cache
            (`~/.cache/samekit/engines`, or the folder named by SAMEKIT_CACHE).

    Raises:
        EngineNotFoundError: there is none.
        EngineError: there is one, but it is not whole; or the folder holds engine folders, and is none.
    """
    candidates = [named(name), *(root / name for root in engine_roots())]
    for folder in candidates:
        if _found(folder, SPEC_FILE):
            return Engine.load(folder)
    for folder in candidates:
        if _found(folder, "*.onnx"):
            raise EngineError(
                f"{folder}: no {SPEC_FILE}, so its export was cut short; run: samekit export {name} --force"
            )
    inside = _found(Path(name), f"*/{SPEC_FILE}")
    if inside:
        engines = ", ".join(str(path.parent) for path in inside)
        raise EngineError(f"{name}: is no engine folder, it holds some; pass one of these: {engines}")
    text = os.fspath(name)
    # A checkpoint, or a name. Not the methods of Path, which raise on names that no file system takes.
    exportable = _found(Path(name), "*.safetensors") or (os.path.basename(text) == text and not os.path.isdir(text))  # noqa: PTH112, PTH119
    cure = f"run: samekit export {text}" if exportable else "check the path"
    raise EngineNotFoundError(f"no engine for {text!r} in {places()}; {cure}")


def _found(folder: Path, pattern: str) -> Sequence[Path]:
    """Such files in a folder; one that cannot be, its name being too long, holds none."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return ()
