"""Engine folders: finding and checking them, and committing an export to one.

    engines/same-l/
      spec.json                        facts about the model, and the names of the valid graph files
      encoder.onnx decoder.onnx        fp32 graphs, with .data files beside them when large
      encoder.fp16.onnx ...            other precisions
      encoder.2.onnx ...               graphs of an export that replaced an earlier one
      encoder.bf16.DIGESTS.openvino    graphs that OpenVINO has compiled, see `samekit.backends.openvino_cache`
      tensorrt/                        TensorRT engines, see `samekit.engine.builds`
      .export-XXXXXXXX/                graphs of an export that is running, or was killed
      .lock                            held by the process that exports or deletes, see `samekit.files.locks`

New graphs get names that `spec.json` does not contain. Replacing `spec.json`, which is atomic, makes them valid; the
older export can be used until then. Graph files that `spec.json` does not name are leftovers, which the process that
holds the lock deletes. Readers take no lock, nor do those who add a compiled graph.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shlex
import shutil
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samekit.engine import hub
from samekit.engine.spec import DIRECTIONS, RANDOM, SPEC_FILE, Direction, EngineSpec, GraphFile
from samekit.errors import BackendUnavailableError, EngineError, EngineNotFoundError, HubError
from samekit.files.atomic import atomic_commit, temporary_target
from samekit.files.locks import LOCK_FILE
from samekit.files.paths import expanded_text, open_regular, remove

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger = logging.getLogger(__name__)

ENGINES_FOLDER: Final = "engines"
"""Folder in which names are looked up first, and to which `samekit export` writes."""

PACKAGED_ENGINES: Final = Path(__file__).parents[1] / ENGINES_FOLDER
"""Folder in which names are looked up last. In wheels that `make wheel` builds, it holds `same-tiny`."""

KNOWN_MODELS: Final = (
    *("same-s", "same-l"),
    *("small-music", "small-sfx", "small-music-base", "small-sfx-base", "medium", "medium-base"),
    "same-tiny",
)
"""The models that `samekit export` takes by name, in upper or lower case."""

_STAGING_PREFIX: Final = ".export-"
# Direction, precision unless fp32, number unless 1, and the suffix of external data.
_GRAPH_FILE: Final = re.compile(r"(encoder|decoder)(?:\.(fp16|int8))?(?:\.(\d+))?\.onnx(\.data)?", re.ASCII)
# Direction, precision, digest of the graph, and digest of the conditions in which it was compiled.
_COMPILED_FILE: Final = re.compile(r"(?:encoder|decoder)\.\w+\.([0-9a-f]{12})-[0-9a-f]{12}\.openvino", re.ASCII)


@dataclass(frozen=True)
class Engine:
    """A finished engine folder, and the facts that its `spec.json` holds."""

    folder: Path
    spec: EngineSpec
    snapshot: hub.Snapshot | None = None
    """The commit on the hub from which graphs are fetched when they are first used; None for other folders."""

    @property
    def name(self) -> str:
        """The name by which `find_engine` finds the same engine again, in any working folder."""
        return self.snapshot.name if self.snapshot else os.path.abspath(self.folder)

    @classmethod
    def load(cls, folder: Path) -> Engine:
        """Read an engine folder; raise EngineError if it is not finished or its `spec.json` is damaged."""
        return cls(folder, EngineSpec.load(folder))

    def check_not_replaced(self, precision: str) -> None:
        """Raise EngineError if another export has replaced the graphs of a precision since the folder was loaded."""
        try:
            now = EngineSpec.load(self.folder)
        except EngineError:
            # No export leaves a damaged spec. Opening the graphs shows whether they are there.
            return
        if now.graphs.get(precision) != self.spec.graphs.get(precision):
            raise EngineError(f"{self.folder}: was exported again since it was opened; open the model again")

    def export_command(self, *options: str) -> str:
        """Return the command that exports the same weights with `options`; to this folder unless it was renamed."""
        source, words = self.spec.source, [self.spec.name]
        if self.spec.is_random:
            words += ["--weights", RANDOM]
        elif "folder" in source:
            words += ["--weights", str(source["folder"])]
        elif str(source.get("name")).lower().endswith(f"/{self.spec.name}"):
            # A repository on the hub, which the name alone may not identify.
            words = [str(source["name"])]
        if self.folder.parent not in (Path(ENGINES_FOLDER), PACKAGED_ENGINES) and self.folder.name == self.spec.name:
            words += ["--out", str(self.folder.parent)]
        return shlex.join(["samekit", "export", *words, *options])

    def graph(self, direction: Direction, precision: str) -> Path:
        """Return the path of a graph, after checking that its files have their full size.

        A graph on the hub is fetched first, and compared with its digest.

        Raises:
            BackendUnavailableError: the folder has no such graph.
            EngineError: a file is missing, cut off or not readable, or another export has replaced it.
            HubError: a graph cannot be fetched from the hub.
        """
        graph = self.graph_file(direction, precision)
        if self.snapshot:
            self._fetch(self.snapshot, graph)
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

    def graph_file(self, direction: Direction, precision: str) -> GraphFile:
        """Return what `spec.json` says about a graph; raise BackendUnavailableError if there is no such graph."""
        graph = self._graphs(precision).get(direction)
        if graph is None:
            raise BackendUnavailableError(
                f"{self._shown}: no {direction} of {precision}, because only the other half was copied there; "
                "copy the whole engine"
            )
        return graph

    @property
    def _shown(self) -> str:
        """The folder, or the commit on the hub, for messages."""
        return self.snapshot.name if self.snapshot else str(self.folder)

    def _graphs(self, precision: str) -> dict[Direction, GraphFile]:
        """Return the graphs of a precision; raise BackendUnavailableError if there are none."""
        graphs = self.spec.graphs.get(precision)
        if graphs is None:
            have = ", ".join(self.spec.graphs) or "none"
            raise BackendUnavailableError(
                f"{self._shown}: no {precision} graph (there is: {have}); "
                f"run: {self.export_command('--precision', precision)}"
            )
        return graphs

    def _fetch(self, snapshot: hub.Snapshot, graph: GraphFile) -> None:
        """Fetch a graph unless it is in the cache; a graph without its digest is fetched again, once."""
        for again in (False, True):
            snapshot.fetch(graph, again=again)
            if snapshot.is_verified(graph):
                return
            if describe_graph(self.folder, graph.file) == graph:
                snapshot.remember_verified(graph)
                return
            if not again:
                logger.warning("%s of %s does not have its digest in %s", graph.file, snapshot.name, SPEC_FILE)
        raise EngineError(
            f"{snapshot.name}: {graph.file} does not have its digest in {SPEC_FILE}, also after another download; "
            "choose another revision, or tell the owner of the repository"
        )

    def check(self, precision: str) -> None:
        """Check that the graphs of a precision have their full size; errors as of `graph`. The hub is not asked."""
        graphs = self._graphs(precision)
        for direction in () if self.snapshot else graphs:
            self.graph(direction, precision)

    def check_digests(self) -> None:
        """Compare the contents of every graph with its digest in `spec.json`; errors as of `graph`."""
        for precision, pair in self.spec.graphs.items():
            for direction, graph in pair.items():
                self.graph(direction, precision)
                if describe_graph(self.folder, graph.file).sha256 != graph.sha256:
                    raise EngineError(
                        f"{self.folder / graph.file}: contents have changed since the export; export again with --force"
                    )


def describe_graph(folder: Path, file: str) -> GraphFile:
    """Return the digest and the sizes of a graph and of the external data beside it."""
    digest, sizes = hashlib.sha256(), {}
    for path in (folder / file, folder / f"{file}.data"):
        if path.is_file():
            sizes[path.name] = path.stat().st_size
            with path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return GraphFile(file, digest.hexdigest(), sizes)


def graph_names(folder: Path, precision: str) -> dict[str, str]:
    """Return names for new graphs of a precision: encoder / decoder -> file.

    The number in a name is larger than that of every other graph of this precision. So a reader that has read an older
    `spec.json` never finds another export's graph under a name that it knows.
    """
    numbers = [
        int(match[3] or 1)
        for match in (_GRAPH_FILE.fullmatch(path.name) for path in folder.iterdir())
        if match and (match[2] or "fp32") == precision
    ]
    suffix = ("" if precision == "fp32" else f".{precision}") + (f".{max(numbers) + 1}" if numbers else "")
    return {direction: f"{direction}{suffix}.onnx" for direction in DIRECTIONS}


def is_graph_file(name: str) -> bool:
    """Return whether an export gives graphs such a file name."""
    return bool(_GRAPH_FILE.fullmatch(name))


def compiled_name(direction: Direction, precision: str, graph: str, conditions: str) -> str:
    """Return the name of the file that keeps a compiled graph, given two hexadecimal digests (sha256)."""
    return f"{direction}.{precision}.{graph[:12]}-{conditions[:12]}.openvino"


def compiled_files(folder: Path) -> list[Path]:
    """Return the compiled graphs of an engine folder, which are made again when they are missing."""
    return sorted(path for path in folder.iterdir() if _COMPILED_FILE.fullmatch(path.name))


def is_engine_file(path: Path) -> bool:
    """Return whether samekit creates files or folders of this name in an engine folder; TensorRT builds excluded."""
    if path.name.startswith(_STAGING_PREFIX):
        return path.is_dir()
    if path.name in (SPEC_FILE, LOCK_FILE) or _GRAPH_FILE.fullmatch(path.name):
        return path.is_file()
    name = temporary_target(path.name) or path.name
    return path.is_file() and bool(name == SPEC_FILE or _COMPILED_FILE.fullmatch(name))


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder in an engine folder for uncommitted graphs, and delete it afterwards.

    So its files cannot be mistaken for those of another export if `spec.json` cannot be read. The caller holds the
    engine folder's lock.
    """
    staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def commit_export(folder: Path, staging: Path, spec: EngineSpec) -> None:
    """Move new graphs from a staging folder into an engine folder, and make them valid by replacing `spec.json`.

    `spec` names the new graphs and the older ones that stay valid. The caller holds the engine folder's lock. If this
    raises OSError or the process is killed, the folder holds either the older export or the new one.
    """
    graphs = [path.rename(folder / path.name) for path in sorted(staging.iterdir())]
    atomic_commit(folder / SPEC_FILE, spec.to_json(), graphs)


def leftovers(folder: Path) -> list[Path]:
    """Return the files that killed and replaced exports left in an engine folder, or that a running one is writing.

    These are staging folders, unfinished files, and graphs that `spec.json` does not name, compiled ones included. If
    `spec.json` cannot be read, no graph counts, as a newer samekit may have written it.
    """
    graphs: list[GraphFile] | None
    try:
        graphs = [graph for pair in EngineSpec.load(folder).graphs.values() for graph in pair.values()]
    except EngineError:
        graphs = None if os.path.lexists(folder / SPEC_FILE) else []
    valid = {name for graph in graphs or () for name in graph.sizes}
    digests = {graph.sha256[:12] for graph in graphs or ()}

    def is_left(path: Path) -> bool:
        compiled = _COMPILED_FILE.fullmatch(path.name)
        if compiled or _GRAPH_FILE.fullmatch(path.name):
            current = compiled[1] in digests if compiled else path.name in valid
            return graphs is not None and not current and not path.is_dir()
        return is_engine_file(path) and path.name not in (SPEC_FILE, LOCK_FILE)

    with suppress(OSError):
        return sorted(filter(is_left, folder.iterdir()))
    return []


def remove_leftovers(folder: Path) -> list[tuple[Path, int]]:
    """Delete what `leftovers` finds, as far as possible; the caller holds the engine folder's lock.

    Return the deleted paths, each with the bytes that it held.
    """
    removed = []
    for path in leftovers(folder):
        with suppress(OSError):
            removed.append((path, remove(path)))
    return removed


def engine_roots() -> Sequence[Path]:
    """Return the folders in which a model's name is looked up, in order."""
    cache = os.environ.get("SAMEKIT_CACHE") or os.path.join("~", ".cache", "samekit", ENGINES_FOLDER)
    return Path(ENGINES_FOLDER), Path(expanded_text(cache))


def search_path() -> str:
    """Return the folders in which a model's name is looked up, as text for messages."""
    return " or ".join((".", *map(str, engine_roots())))


def find_engine(name: str | os.PathLike[str]) -> Engine:
    """Return an engine, given by its folder, by the name of its model, or by its repository on the hub.

    This is the order:

    1. A folder of this path.
    2. The folder of this name in `./engines`, to which `samekit export` writes.
    3. The folder of this name in the user's cache: `~/.cache/samekit/engines`, or the folder that SAMEKIT_CACHE names.
    4. The engines that come with samekit.
    5. For `owner/name`: the repository on the hub, unless a local folder is called `owner`. `owner/name@REVISION`
       names a branch, tag or commit. The graphs are fetched when they are first used.

    Names of `KNOWN_MODELS` are looked up in lower case too, as `samekit export` writes them.

    Raises:
        EngineNotFoundError: no engine was found.
        EngineError: the folder is incomplete or not readable, or it only contains engine folders.
        HubError: the hub cannot be reached, has no such repository, or refuses.
    """
    text, revision = hub.split_revision(expanded_text(name))
    path = Path(text)
    names = [text, text.lower()] if text.lower() in KNOWN_MODELS else [text]
    candidates = [path, *(root / each for root in (*engine_roots(), PACKAGED_ENGINES) for each in names)]
    for folder in candidates:
        if _found(folder, SPEC_FILE):
            if revision:
                raise EngineError(f"{folder}: is a local folder, which has no revision {revision}; leave it out")
            return Engine.load(folder)
    _refuse_unfinished(text, candidates)
    if hub.is_repository(text):
        return engine_on_hub(text, revision)
    if text.lower() in KNOWN_MODELS or _found(path, "*.safetensors"):
        cure = f"run: samekit export {shlex.quote(text)}"
    elif os.path.basename(text) != text or os.path.isdir(text):
        cure = "check the path"
    else:
        cure = (
            f"check the name (these are known: {', '.join(KNOWN_MODELS)}), or export the folder of a checkpoint: "
            "samekit export DIR"
        )
    raise EngineNotFoundError(f"no engine for {text!r} in {search_path()}; {cure}")


def _refuse_unfinished(name: str, candidates: Sequence[Path]) -> None:
    """Raise EngineError if one of the folders that `find_engine` tries should be an engine and is none."""
    # The methods of Path raise for names that are too long for the file system.
    for folder in candidates:
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            raise EngineError(f"{folder}: cannot be read ({os.strerror(errno.EACCES)}); check its permissions")
    for folder in candidates:
        if _found(folder, "*.onnx"):
            raise EngineError(
                f"{folder}: no {SPEC_FILE}, so an export or a copy was cut short; {_export_again(folder)}"
            )
    if inside := _found(candidates[0], f"*/{SPEC_FILE}"):
        engines = ", ".join(str(path.parent) for path in inside)
        raise EngineError(f"{name}: is no engine folder, it holds some; pass one of these: {engines}")


def engine_on_hub(repository: str, revision: str | None) -> Engine:
    """Return the engine of a repository, from which `spec.json` alone is fetched now; errors as of `find_engine`."""
    try:
        snapshot = hub.open_snapshot(repository, revision)
    except BackendUnavailableError as error:
        raise HubError(
            f"no engine for {repository!r} in {search_path()}, and the hub cannot be asked ({error.cause}); "
            f"check the path, or run: {hub.INSTALL_HUB}"
        ) from None
    except HubError as error:
        raise HubError(f"there is no folder {repository}, and {error}") from None
    return Engine(snapshot.folder, EngineSpec.load(snapshot.folder), snapshot)


def _export_again(folder: Path) -> str:
    """Return the cure for an engine folder without a `spec.json`."""
    if folder.name not in KNOWN_MODELS:
        return "export the model again, or copy the whole folder again"
    out = [] if folder.parent == Path(ENGINES_FOLDER) else ["--out", str(folder.parent)]
    return f"run: {shlex.join(['samekit', 'export', folder.name, '--force', *out])}, or copy the whole folder again"


def _found(folder: Path, pattern: str) -> Sequence[Path]:
    """Return matching files of a folder; none if its name is too long for the file system."""
    with suppress(OSError):
        return sorted(folder.glob(pattern))
    return ()
