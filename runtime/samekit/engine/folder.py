"""Engine folders: finding and checking them; `samekit.engine.contents` describes their files."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samekit.engine import hub
from samekit.engine.spec import RANDOM, SPEC_FILE, Direction, EngineSpec, GraphFile
from samekit.errors import BackendUnavailableError, EngineError, EngineNotFoundError, HubError
from samekit.files.paths import expanded_text, open_regular

if TYPE_CHECKING:
    from collections.abc import Sequence

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
