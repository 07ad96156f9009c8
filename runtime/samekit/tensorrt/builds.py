"""The TensorRT engines of an engine folder: which there are, whether they are whole and current, and clearing away.

    engines/same-l/tensorrt/
      tensorrt_rtx-1.7.1.116-portable-fp16-0123456789ab/     a build: both engines of one precision
        encoder.engine decoder.engine
        fingerprint.json                                     what it was built from, and what is in it
        build.log                                            what the builder said
      onnxruntime-1.32.0-any-fp16-fedcba987654/              what ONNX Runtime's TensorRT provider keeps

`fingerprint.json` is written last and makes a folder a build. A folder of such a name without one is being built, or
was left by a build that was killed; the process that holds the engine folder's lock deletes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samekit.engine.folder import Engine, leftovers, remove_leftovers
from samekit.engine.spec import DECODER, ENCODER, PRECISIONS, Direction, check_file_name
from samekit.errors import BackendUnavailableError, StaleEngineError
from samekit.files.atomic import atomic_path, output_errors, sync_files
from samekit.files.json_fields import check_kinds
from samekit.files.locks import folder_lock
from samekit.files.paths import read_regular, remove
from samekit.tensorrt.fingerprint import Fingerprint, capability_name, fingerprint_of, runs_on

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from samekit.engine.spec import EngineSpec

BUILDS_FOLDER = "tensorrt"
"""Where builds lie in an engine folder."""
FINGERPRINT_FILE = "fingerprint.json"
"""Name of the file that makes a folder a build."""
LOG_FILE = "build.log"
"""Name of the builder's log, in a build."""
FAILED_LOG_SUFFIX = ".failed.log"
"""Of the log of a build that failed, which lies beside the builds."""

FORMAT = 1
"""Of `fingerprint.json`; raised when an older samekit could misread it."""


# As `Fingerprint.name` makes them.
_BUILD_NAME = re.compile(rf".+-({'|'.join(PRECISIONS)})-[0-9a-f]{{12}}", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class BuiltEngine:
    """One engine file of a build, and what its building took."""

    file: str
    """Name inside the build's folder."""
    size: int
    """Bytes."""
    sha256: str
    """Of its contents."""
    layers: int
    """Layers of the network after parsing, before TensorRT fused them."""
    seconds: float
    """From reading the graph to the finished engine."""
    peak_memory: int | None
    """Bytes: the most that the building process held until then, where the system tells."""

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> BuiltEngine:
        """An engine from `dataclasses.asdict` of one; raises TypeError where fields are missing, unknown or wrong."""
        engine = cls(**fields)
        check_file_name("file", engine.file)
        counts, texts = dict.fromkeys(("size", "layers"), int), dict.fromkeys(("file", "sha256"), str)
        check_kinds(fields, {**counts, **texts, "seconds": (int, float), "peak_memory": (int, type(None))})
        return engine


@dataclass(frozen=True)
class Build:
    """A finished folder of engines."""

    folder: Path
    """Where it lies."""
    fingerprint: Fingerprint
    """What it was built from and for."""
    engines: dict[Direction, BuiltEngine]
    """encoder / decoder -> engine; empty for a cache of ONNX Runtime."""

    @classmethod
    def load(cls, folder: Path) -> Build:
        """Read a build and check that its files are there at their full size.

        Raises:
            StaleEngineError: it is damaged.
        """
        path = folder / FINGERPRINT_FILE
        try:
            document = json.loads(read_regular(path).decode())
            if document["format"] != FORMAT:
                raise ValueError(f"format {document['format']}")  # noqa: TRY301 one cure for all that can be wrong
            fingerprint = Fingerprint.from_json(document["fingerprint"])
            engines = {
                direction: BuiltEngine.parse(document["engines"][direction]) for direction in document["engines"]
            }
            if engines and set(engines) != {ENCODER, DECODER}:
                raise ValueError("half an autoencoder")  # noqa: TRY301 likewise
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise _damaged(path, f"cannot be read ({error!r})") from None
        build = cls(folder, fingerprint, engines)
        for engine in engines.values():
            build._check_size(engine)
        return build

    def _check_size(self, engine: BuiltEngine) -> None:
        path = self.folder / engine.file
        found = path.stat().st_size if path.is_file() else None
        if found != engine.size:
            raise _damaged(path, "is missing" if found is None else f"has {found} bytes instead of {engine.size}")

    def read(self, direction: Direction) -> bytes:
        """The serialised engine of a half.

        Raises:
            StaleEngineError: its contents are not those that were built.
        """
        engine = self.engines[direction]
        path = self.folder / engine.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error.strerror})") from None
        if hashlib.sha256(data).hexdigest() != engine.sha256:
            raise _damaged(path, "contents have changed since it was built")
        return data

    def to_json(self) -> str:
        """The text of `fingerprint.json`."""
        document = {
            "format": FORMAT,
            "fingerprint": dataclasses.asdict(self.fingerprint),
            "engines": {direction: dataclasses.asdict(engine) for direction, engine in self.engines.items()},
        }
        return json.dumps(document, indent=2) + "\n"


def _damaged(path: Path, what: str) -> StaleEngineError:
    """The error about a file of a build."""
    return StaleEngineError(f"{path}: {what}; run: samekit clean {path.parents[2]}, and build the engine again")


def build_folders(engine: Engine) -> list[Path]:
    """Every finished build of an engine folder, whole or not."""
    return sorted(path.parent for path in (engine.folder / BUILDS_FOLDER).glob(f"[!.]*/{FINGERPRINT_FILE}"))


def is_builds_own(path: Path) -> bool:
    """Return whether it is a build, or what a build left that failed or was killed."""
    unfinished = path.is_dir() and _BUILD_NAME.fullmatch(path.name)
    return bool(unfinished) or path.name.endswith(FAILED_LOG_SUFFIX) or (path / FINGERPRINT_FILE).is_file()


def unfinished_builds(engine: Engine) -> list[Path]:
    """Return the folders of builds that were killed, or are running."""
    folders = (engine.folder / BUILDS_FOLDER).glob("*/")
    return sorted(f for f in folders if _BUILD_NAME.fullmatch(f.name) and not (f / FINGERPRINT_FILE).exists())


def why_stale(fingerprint: Fingerprint, spec: EngineSpec, versions: Mapping[str, str]) -> str | None:
    """Why nothing here will ever run a build, or None if it is current.

    Args:
        fingerprint: of the build.
        spec: of the engine folder that it lies in.
        versions: of what keeps engines and is installed; what others keep is not judged by its version.
    """
    if fingerprint.precision not in spec.graphs:
        return f"there is no {fingerprint.precision} graph any more"
    version = versions.get(fingerprint.flavour, fingerprint.version)
    today = fingerprint_of(spec, fingerprint.precision, fingerprint.flavour, version, fingerprint.target)
    return ", ".join(fingerprint.differences(today)) or None


def builds_of(engine: Engine, precision: str) -> tuple[list[Build], list[str]]:
    """The builds of one precision, and what is wrong with those that are damaged, of whatever precision they are."""
    builds, damaged = [], []
    for folder in build_folders(engine):
        try:
            build = Build.load(folder)
        except StaleEngineError as error:
            damaged.append(str(error))
            continue
        if build.fingerprint.precision == precision and build.engines:
            builds.append(build)
    return builds, damaged


def build_command(engine: Engine, precision: str) -> str:
    """The command that builds TensorRT engines of a precision."""
    return engine.export_command("--precision", precision, "--tensorrt", "auto")


def choose_build(engine: Engine, precision: str, capability: tuple[int, int], versions: Mapping[str, str]) -> Build:
    """The build to run on a GPU.

    Args:
        engine: the engine folder.
        precision: of the graphs.
        capability: compute capability of the GPU, (major, minor).
        versions: of the flavours that are installed, the preferred one first.

    Raises:
        BackendUnavailableError: there is no build of this precision.
        StaleEngineError: there are, but none that can run here.
    """
    engine.graph(ENCODER, precision)
    builds, refusals = builds_of(engine, precision)
    usable = []
    for build in builds:
        reason = _why_not_here(build.fingerprint, engine.spec, capability, versions)
        if reason:
            refusals.append(f"{build.folder.name}: {reason}")
        else:
            usable.append(build)
    cure = f"run: {build_command(engine, precision)}"
    if not usable and refusals:
        raise StaleEngineError(f"{engine.folder}: no TensorRT engine can be used ({'; '.join(refusals)}); {cure}")
    if not usable:
        raise BackendUnavailableError(f"{engine.folder}: no TensorRT engine of {precision}; {cure}")
    order = list(versions)
    return min(usable, key=lambda build: order.index(build.fingerprint.flavour))


def _why_not_here(
    fingerprint: Fingerprint, spec: EngineSpec, capability: tuple[int, int], versions: Mapping[str, str]
) -> str | None:
    """Why a build cannot run on this machine today, or None."""
    if fingerprint.flavour not in versions:
        return f"needs {fingerprint.flavour} {fingerprint.version}, which is not installed"
    if not runs_on(fingerprint.target, capability):
        return f"was built for {fingerprint.target}, this GPU is {capability_name(capability)}"
    return why_stale(fingerprint, spec, versions)


@contextmanager
def new_build(folder: Path) -> Iterator[None]:
    """Create the empty folder of a build, in place of a damaged one; delete it if the block fails.

    The block writes the engines and then calls `write_document`. The caller holds the engine folder's lock.

    Raises:
        OutputError: the folder cannot be written.
    """
    with output_errors(folder):
        # First what makes it a build, so that it is never one with half of its files.
        (folder / FINGERPRINT_FILE).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a build whose every byte is as it was built."""
    try:
        build = Build.load(folder)
        for direction in build.engines:
            build.read(direction)
    except StaleEngineError:
        return False
    return True


def remove_stale(engine: Engine, versions: Mapping[str, str]) -> list[tuple[Path, int]]:
    """Delete the builds that nothing here will ever run, and what killed and failed exports and builds left.

    Waits while another process writes to the engine folder.

    Args:
        engine: the engine folder.
        versions: of the flavours that are installed.

    Returns:
        What was deleted, and how many bytes it held.

    Raises:
        OutputError: something cannot be deleted.
    """
    # Without the lock first, which cannot be had in a folder that is read-only.
    if not (_removable(engine, versions) or leftovers(engine.folder)):
        return []
    with folder_lock(engine.folder):
        # Again: the process that held the lock may have exported other graphs.
        return remove_stale_builds(Engine.load(engine.folder), versions) + remove_leftovers(engine.folder)


def remove_stale_builds(engine: Engine, versions: Mapping[str, str]) -> list[tuple[Path, int]]:
    """Delete stale, damaged and unfinished builds; as `remove_stale`, but the caller holds the engine folder's lock."""
    removed = []
    for path in _removable(engine, versions):
        with output_errors(path), suppress(FileNotFoundError):
            removed.append((path, remove(path)))
    return removed


def _removable(engine: Engine, versions: Mapping[str, str]) -> list[Path]:
    """Return the folders and files of builds that nothing needs, running builds included."""
    stale = [folder for folder in build_folders(engine) if _stale_reason(folder, engine.spec, versions)]
    logs = sorted((engine.folder / BUILDS_FOLDER).glob(f"*{FAILED_LOG_SUFFIX}"))
    return [*stale, *unfinished_builds(engine), *logs]


def _stale_reason(folder: Path, spec: EngineSpec, versions: Mapping[str, str]) -> str | None:
    """Why a folder is stale or damaged, or None."""
    try:
        return why_stale(Build.load(folder).fingerprint, spec, versions)
    except StaleEngineError as error:
        return str(error)


def describe_builds(engine: Engine, versions: Mapping[str, str]) -> Iterator[str]:
    """A line for each build: what it is, its layers and size, and whether it is current."""
    for folder in build_folders(engine):
        reason = _stale_reason(folder, engine.spec, versions)
        state = f"STALE: {reason}" if reason else "current"
        try:
            engines = Build.load(folder).engines
        except StaleEngineError:
            engines = {}
        sizes = "; ".join(f"{direction} {e.layers} layers, {e.size / 1e6:.0f} MB" for direction, e in engines.items())
        yield f"{folder.name}: {f'{sizes}; ' if sizes else ''}{state}"


def write_document(build: Build) -> None:
    """Write `fingerprint.json`, which makes a folder a build, once its engines are on disk.

    Raises:
        OutputError: it cannot be written.
    """
    with output_errors(build.folder):
        sync_files(build.folder / engine.file for engine in build.engines.values())
    with atomic_path(build.folder / FINGERPRINT_FILE) as temporary, output_errors(build.folder):
        temporary.write_text(build.to_json(), encoding="utf-8")


def open_cache(engine: Engine, precision: str, flavour: str, version: str) -> Path:
    """Return a folder in which a runtime keeps engines of its own, under the same fingerprint as ours.

    It is created if it is missing. That takes no lock: several processes may do so at once, and an export that is
    running does not block those that open the model.

    Raises:
        OutputError: it cannot be written.
    """
    fingerprint = fingerprint_of(engine.spec, precision, flavour, version, target="any")
    folder = engine.folder / BUILDS_FOLDER / fingerprint.name
    if not (folder / FINGERPRINT_FILE).is_file():
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_document(Build(folder, fingerprint, {}))
    return folder
