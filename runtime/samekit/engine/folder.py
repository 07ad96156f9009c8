"""Engine folders: where they are, whether they are complete, and how an export is committed to one.

    engines/same-l/
      spec.json                        model facts, source, verification; names every graph file that counts
      encoder.onnx decoder.onnx        fp32 graphs, with .data beside them when large
      encoder.fp16.onnx ...            other precisions
      encoder.2.onnx ...               of an export that replaced an earlier one
      tensorrt/                        TensorRT engines, see `samekit.tensorrt.builds`
      .export-XXXXXXXX/                an export that is running, or was killed
      .lock                            held by the process that writes here, see `samekit.files.locks`

Graphs are written under names that `spec.json` does not contain. Replacing `spec.json`, which is atomic, is the one
step that makes them valid; the older export can be used until then. Graph files that `spec.json` does not name are
leftovers, which the process that holds the lock deletes. Readers take no lock.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shlex
import shutil
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from samekit.engine.spec import DIRECTIONS, RANDOM, SPEC_FILE, Direction, EngineSpec, GraphFile
from samekit.errors import BackendUnavailableError, EngineError, EngineNotFoundError
from samekit.files.atomic import atomic_path, sync_files, temporary_target
from samekit.files.locks import LOCK_FILE
from samekit.files.paths import checked_path, expanded_text, open_regular, remove

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ENGINES_FOLDER = "engines"
"""Where names are looked up first, and where `samekit export` writes."""

KNOWN_MODELS = ("same-s", "same-l", "same-tiny")
"""The models that `samekit export` takes by name, in upper or lower case."""

_STAGING_PREFIX = ".export-"
# Half, precision unless fp32, number unless 1, and the suffix of external data.
_GRAPH_FILE = re.compile(r"(encoder|decoder)(?:\.(fp16|int8))?(?:\.(\d+))?\.onnx(\.data)?", re.ASCII)


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

    def check_not_replaced(self, precision: str) -> None:
        """Check that the folder holds the same graphs of a precision as when it was loaded.

        Raises:
            EngineError: another export has replaced them.
        """
        try:
            now = EngineSpec.load(self.folder)
        except EngineError:
            # No export leaves that; whoever reads the graphs finds out whether they are there.
            return
        if now.graphs.get(precision) != self.spec.graphs.get(precision):
            raise EngineError(f"{self.folder}: was exported again since it was opened; open the model again")

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

    def graph(self, direction: Direction, precision: str) -> Path:
        """The path of a graph whose files are all there at their full size.

        Raises:
            BackendUnavailableError: the folder has no graph of this precision.
            EngineError: a file is missing or cut short, may not be read, or was replaced by another export since the
                folder was loaded.
        """
        pair = self.spec.graphs.get(precision)
        if pair is None:
            have = ", ".join(self.spec.graphs) or "none"
            raise BackendUnavailableError(
                f"{self.folder}: no {precision} graph (there is: {have}); "
                f"run: {self.export_command('--precision', precision)}"
            )
        graph = pair[direction]
        for name, size in graph.sizes.items():
            path = self.folder / name
            found = None
            try:
                with open_regular(path) as file:
                    found = os.fstat(file.fileno()).st_size
            except PermissionError as error:
                raise EngineError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
            except OSError:
                pass
            if found != size:
                self.check_not_replaced(precision)
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise EngineError(f"{path}: {state}; export the model again with --force")
        return self.folder / graph.file

    def check(self, precision: str) -> None:
        """Raise what `graph` raises unless both graphs of a precision are there at their full size."""
        for direction in DIRECTIONS:
            self.graph(direction, precision)

    def check_digests(self) -> None:
        """Compare every graph's contents with the digest in `spec.json`; reads all of it.

        Raises:
            EngineError: a graph is missing or is not the one that was exported.
        """
        for precision, pair in self.spec.graphs.items():
            self.check(precision)
            for graph in pair.values():
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


def graph_names(folder: Path, precision: str) -> dict[str, str]:
    """Return names for new graphs of a precision, encoder / decoder -> file, that nothing in the folder has.

    A number in the name is one more than that of every graph of this precision in the folder, so a reader that has
    read an older `spec.json` never finds another export's graph under a name that it knows.
    """
    numbers = [
        int(match[3] or 1)
        for match in (_GRAPH_FILE.fullmatch(path.name) for path in folder.iterdir())
        if match and (match[2] or "fp32") == precision
    ]
    suffix = ("" if precision == "fp32" else f".{precision}") + (f".{max(numbers) + 1}" if numbers else "")
    return {direction: f"{direction}{suffix}.onnx" for direction in DIRECTIONS}


def is_engine_file(path: Path) -> bool:
    """Return whether an export writes a file or folder of this name into an engine folder, TensorRT builds apart."""
    if path.name.startswith(_STAGING_PREFIX):
        return path.is_dir()
    known = path.name in (SPEC_FILE, LOCK_FILE) or temporary_target(path.name) == SPEC_FILE
    return path.is_file() and bool(known or _GRAPH_FILE.fullmatch(path.name))


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder inside an engine folder for graphs that are not committed yet; delete it in the end.

    The caller holds the engine folder's lock.

    Raises:
        OSError: it cannot be created.
    """
    staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def commit_export(folder: Path, staging: Path, spec: EngineSpec) -> None:
    """Move new graphs from a staging folder into an engine folder and make them valid by replacing `spec.json`.

    The graphs are on disk before `spec.json` names them. Killed or failed at any step, the folder holds the older
    export, or the new one. The caller holds the engine folder's lock.

    Args:
        folder: the engine folder.
        staging: holds the new graphs, under names from `graph_names`.
        spec: names the new graphs and those that stay.

    Raises:
        OSError: the folder cannot be written; the older export is still valid.
    """
    names = sorted(path.name for path in staging.iterdir())
    for name in names:
        (staging / name).rename(folder / name)
    sync_files(folder / name for name in names)
    with atomic_path(folder / SPEC_FILE) as temporary:
        temporary.write_text(spec.to_json(), encoding="utf-8")


def leftovers(folder: Path) -> list[Path]:
    """Return what killed and replaced exports left in an engine folder, or what a running one is writing.

    These are staging folders, unfinished `spec.json` files, and graphs that `spec.json` does not name. Graphs beside a
    `spec.json` that cannot be read are not counted, as a newer samekit may have written them.
    """
    valid: set[str] | None
    try:
        pair = EngineSpec.load(folder).graphs.values()
        valid = {name for graphs in pair for graph in graphs.values() for name in graph.sizes}
    except EngineError:
        valid = None if os.path.lexists(folder / SPEC_FILE) else set()

    def is_left(path: Path) -> bool:
        if _GRAPH_FILE.fullmatch(path.name):
            return valid is not None and path.name not in valid and not path.is_dir()
        return is_engine_file(path) and path.name not in (SPEC_FILE, LOCK_FILE)

    with suppress(OSError):
        return sorted(filter(is_left, folder.iterdir()))
    return []


def remove_leftovers(folder: Path) -> list[tuple[Path, int]]:
    """Delete what `leftovers` finds, as far as it can be deleted; the caller holds the engine folder's lock.

    Returns:
        What was deleted, and how many bytes it held.
    """
    removed = []
    for path in leftovers(folder):
        with suppress(OSError):
            removed.append((path, remove(path)))
    return removed


def engine_roots() -> Sequence[Path]:
    """Folders in which a model's name is looked up, in order."""
    cache = os.environ.get("SAMEKIT_CACHE") or os.path.join("~", ".cache", "samekit", ENGINES_FOLDER)  # noqa: PTH118
    # Not Path.expanduser, which raises for users without a home.
    return Path(ENGINES_FOLDER), Path(os.path.expanduser(cache))  # noqa: PTH111


def search_path() -> str:
    """Where a model's name is looked up, for messages."""
    return " or ".join((".", *map(str, engine_roots())))


def find_engine(name: str | os.PathLike[str]) -> Engine:
    """The engine folder of a model.

    Args:
        name: an engine folder, or a model's name, looked up in `./engines` and in the user's cache
            (`~/.cache/samekit/engines`, or the folder named by SAMEKIT_CACHE). Names of `KNOWN_MODELS` are looked up in
            lower case too, as `samekit export` writes them.

    Raises:
        EngineNotFoundError: there is none.
        EngineError: there is one, but it is incomplete or may not be read; or the folder holds engine folders, and is
            none.
    """
    text = expanded_text(name)
    path = checked_path(text)
    names = [text, text.lower()] if text.lower() in KNOWN_MODELS else [text]
    candidates = [path, *(root / each for root in engine_roots() for each in names)]
    for folder in candidates:
        if _found(folder, SPEC_FILE):
            return Engine.load(folder)
    # Not the methods of Path here and below, which raise on names that no file system takes.
    for folder in candidates:
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):  # noqa: PTH112
            raise EngineError(f"{folder}: cannot be read ({os.strerror(errno.EACCES)}); check its permissions")
    for folder in candidates:
        if _found(folder, "*.onnx"):
            raise EngineError(
                f"{folder}: no {SPEC_FILE}, so an export or a copy was cut short; {_export_again(folder)}"
            )
    inside = _found(path, f"*/{SPEC_FILE}")
    if inside:
        engines = ", ".join(str(path.parent) for path in inside)
        raise EngineError(f"{name}: is no engine folder, it holds some; pass one of these: {engines}")
    if text.lower() in KNOWN_MODELS or _found(path, "*.safetensors"):
        cure = f"run: samekit export {shlex.quote(text)}"
    elif os.path.basename(text) != text or os.path.isdir(text):  # noqa: PTH112, PTH119
        cure = "check the path"
    else:
        cure = (
            f"check the name (these are known: {', '.join(KNOWN_MODELS)}), or export the folder of a checkpoint: "
            "samekit export DIR"
        )
    raise EngineNotFoundError(f"no engine for {text!r} in {search_path()}; {cure}")


def _export_again(folder: Path) -> str:
    """The cure for an engine folder that does not say what was exported to it."""
    if folder.name not in KNOWN_MODELS:
        return "export the model again, or copy the whole folder again"
    out = [] if folder.parent == Path(ENGINES_FOLDER) else ["--out", str(folder.parent)]
    return f"run: {shlex.join(['samekit', 'export', folder.name, '--force', *out])}, or copy the whole folder again"


def _found(folder: Path, pattern: str) -> Sequence[Path]:
    """Such files in a folder; one that cannot be, its name being too long, holds none."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return ()
