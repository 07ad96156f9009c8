"""The TensorRT builds of an engine folder: finding, checking, choosing, committing and deleting them.

    engines/same-l/tensorrt/
      tensorrt_rtx-1.7.1.116-portable-fp16-0123456789ab/     a build: both engines of one precision
        encoder.engine decoder.engine
        check-8.9.json                                       measured on such GPUs, see `samekit.engine.records`
        fingerprint.json                                     what it was built from, and its files
        build.log                                            the builder's log
      onnxruntime-1.32.0-any-fp16-fedcba987654/              engines that ONNX Runtime's TensorRT provider keeps

`fingerprint.json` is written last and makes a folder a build. A folder of such a name without that file is being built,
or a killed build left it; the process that holds the engine folder's lock deletes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from samekit.engine.contents import compiled_files, leftovers, remove_leftovers
from samekit.engine.fingerprint import Fingerprint, capability_name, fingerprint_of, runs_with, why_not_on
from samekit.engine.folder import Engine
from samekit.engine.records import Check
from samekit.engine.spec import DECODER, ENCODER, PRECISIONS, Direction, check_file_name
from samekit.errors import BackendUnavailableError, StaleEngineError
from samekit.files.atomic import atomic_commit, output_errors
from samekit.files.json_fields import check_kinds
from samekit.files.locks import folder_lock
from samekit.files.paths import file_signature, read_regular, remove

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from samekit.engine.spec import EngineSpec

BUILDS_FOLDER: Final = "tensorrt"
"""Folder of the builds in an engine folder."""
FINGERPRINT_FILE: Final = "fingerprint.json"
"""Name of the file that makes a folder a build."""
LOG_FILE: Final = "build.log"
"""Name of the builder's log in a build."""
FAILED_LOG_SUFFIX: Final = ".failed.log"
"""Suffix of the log of a build that failed, which is beside the builds."""
FORMAT: Final = 1
"""Format of `fingerprint.json`. Raise it when an older samekit could misread the file."""

# As `Fingerprint.name` forms them.
_BUILD_NAME: Final = re.compile(rf".+-({'|'.join(PRECISIONS)})-[0-9a-f]{{12}}", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class BuiltEngine:
    """One engine file of a build."""

    file: str
    """Name in the build's folder."""
    size: int
    """Bytes."""
    sha256: str
    layers: int
    """Layers of the network after parsing, before TensorRT fused them."""
    seconds: float
    """Time from reading the graph to the finished engine."""
    peak_memory: int | None
    """Bytes: the peak of the building process until then; None where the system does not tell."""

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> BuiltEngine:
        """Return the engine of parsed JSON; raise TypeError or ValueError if a field is missing, unknown or wrong."""
        counts, texts = dict.fromkeys(("size", "layers"), int), dict.fromkeys(("file", "sha256"), str)
        check_kinds(fields, {**counts, **texts, "seconds": (int, float), "peak_memory": (int, type(None))})
        engine = cls(**fields)
        check_file_name("file", engine.file)
        return engine


@dataclass(frozen=True)
class Build:
    """A finished folder of engines."""

    folder: Path
    fingerprint: Fingerprint
    engines: dict[Direction, BuiltEngine]
    """encoder / decoder -> engine; empty for a cache of ONNX Runtime."""

    @classmethod
    def load(cls, folder: Path) -> Build:
        """Read a build, and check that its files have their full size; raise StaleEngineError if it is damaged."""
        path = folder / FINGERPRINT_FILE
        try:
            document = json.loads(read_regular(path).decode())
            if document["format"] != FORMAT:
                raise ValueError(f"format {document['format']}")
            fingerprint = Fingerprint.from_json(document["fingerprint"])
            engines = {direction: BuiltEngine.parse(fields) for direction, fields in document["engines"].items()}
            if engines and set(engines) != {ENCODER, DECODER}:
                raise ValueError(f"engines of {', '.join(engines)} only")
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise _damaged(path, f"cannot be read ({error!r})") from None
        for engine in engines.values():
            path = folder / engine.file
            signature = file_signature(path)
            if signature is None:
                raise _damaged(path, "is missing")
            if signature[0] != engine.size:
                raise _damaged(path, f"has {signature[0]} bytes instead of {engine.size}")
        return cls(folder, fingerprint, engines)

    def read(self, direction: Direction) -> bytes:
        """Return the serialised engine of a direction; raise StaleEngineError if it is not the one that was built."""
        engine = self.engines[direction]
        path = self.folder / engine.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error.strerror})") from None
        if hashlib.sha256(data).hexdigest() != engine.sha256:
            raise _damaged(path, "contents have changed since it was built")
        return data

    @property
    def digests(self) -> dict[Direction, str]:
        """The sha256 of each engine."""
        return {direction: engine.sha256 for direction, engine in self.engines.items()}

    def check(self, capability: tuple[int, int]) -> Check | None:
        """Return the check of the engines on GPUs of a compute capability, (major, minor), or None."""
        return Check.read(self.folder, capability_name(capability), self.digests)


def _damaged(path: Path, what: str) -> StaleEngineError:
    command = shlex.join(["samekit", "clean", str(path.parents[2])])
    return StaleEngineError(f"{path}: {what}; run: {command}, and build the engine again")


def build_folders(engine: Engine) -> list[Path]:
    """Return the folders of all finished builds of an engine folder, damaged ones included."""
    return sorted(path.parent for path in (engine.folder / BUILDS_FOLDER).glob(f"[!.]*/{FINGERPRINT_FILE}"))


def unfinished_builds(engine: Engine) -> list[Path]:
    """Return the folders of builds that were killed or are running."""
    folders = (engine.folder / BUILDS_FOLDER).glob("*/")
    return sorted(f for f in folders if _BUILD_NAME.fullmatch(f.name) and not (f / FINGERPRINT_FILE).exists())


def is_builds_own(path: Path) -> bool:
    """Return whether a path is a build, or was left by a build that failed or was killed."""
    unfinished = path.is_dir() and _BUILD_NAME.fullmatch(path.name)
    return bool(unfinished) or path.name.endswith(FAILED_LOG_SUFFIX) or (path / FINGERPRINT_FILE).is_file()


def builds_of(engine: Engine, precision: str) -> tuple[list[Build], list[str]]:
    """Return the builds of one precision, and a message about each damaged build of any precision."""
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


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds a build whose engines are as they were built; reads all of them."""
    try:
        build = Build.load(folder)
        for direction in build.engines:
            build.read(direction)
    except StaleEngineError:
        return False
    return True


def why_stale(fingerprint: Fingerprint, spec: EngineSpec, versions: Mapping[str, str]) -> str | None:
    """Return why a build can never run on this machine, or None if it is current.

    `versions` are those of the installed flavours. The versions of other flavours do not count.
    """
    if fingerprint.precision not in spec.graphs:
        return f"there is no {fingerprint.precision} graph any more"
    version = versions.get(fingerprint.flavour, fingerprint.version)
    if runs_with(fingerprint, version):
        version = fingerprint.version
    today = fingerprint_of(
        spec, fingerprint.precision, fingerprint.flavour, version, fingerprint.target, fingerprint.options
    )
    return ", ".join(fingerprint.differences(today)) or None


def build_command(engine: Engine, precision: str) -> str:
    """Return the command that builds TensorRT engines of a precision."""
    return engine.export_command("--precision", precision, "--tensorrt", "auto")


def choose_build(engine: Engine, precision: str, capability: tuple[int, int], versions: Mapping[str, str]) -> Build:
    """Return the build of a precision to run on a GPU of this compute capability, (major, minor).

    Of several builds it is the one of the preferred flavour that suits this machine best, see `BuilderOptions.rank`.
    `versions` are those of the installed flavours, the preferred one first.

    Raises:
        BackendUnavailableError: there is no build or no graph of this precision.
        EngineError: the encoder's graph is damaged.
        StaleEngineError: there are builds, but none can run here.
    """
    # Raises if the model has no graph of this precision, from which engines could be built.
    engine.graph(ENCODER, precision)
    builds, refusals = builds_of(engine, precision)
    usable = []
    for build in builds:
        check = build.check(capability)
        reason = why_not_here(build, engine.spec, capability, versions) or (check.failure if check else None)
        if reason:
            refusals.append(f"{build.folder.name}: {reason}")
        else:
            usable.append(build)
    if not usable:
        cure = f"run: {build_command(engine, precision)}"
        if refusals:
            raise StaleEngineError(f"{engine.folder}: no TensorRT engine can be used ({'; '.join(refusals)}); {cure}")
        raise BackendUnavailableError(f"{engine.folder}: no TensorRT engine of {precision}; {cure}")
    order = list(versions)
    return min(usable, key=lambda build: (order.index(build.fingerprint.flavour), build.fingerprint.options.rank))


def why_not_here(
    build: Build, spec: EngineSpec, capability: tuple[int, int], versions: Mapping[str, str]
) -> str | None:
    """Return why a build cannot run on this GPU with the installed flavours, or None."""
    fingerprint = build.fingerprint
    if fingerprint.flavour not in versions:
        return f"needs {fingerprint.flavour} {fingerprint.version}, which is not installed"
    return why_not_on(fingerprint.target, capability) or why_stale(fingerprint, spec, versions)


@contextmanager
def new_build(folder: Path) -> Iterator[None]:
    """Create the empty folder of a build, in place of a damaged one; delete it if the `with` block raises.

    The block writes the engines and then calls `write_document`. The caller holds the engine folder's lock.
    Raise OutputError if the folder cannot be written.
    """
    with output_errors(folder):
        # This file goes first, so that a folder with half of its files never counts as a build.
        (folder / FINGERPRINT_FILE).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_document(build: Build) -> None:
    """Write `fingerprint.json`, which makes a folder a build, once its engines are on disk; may raise OutputError."""
    document = {
        "format": FORMAT,
        "fingerprint": dataclasses.asdict(build.fingerprint),
        "engines": {direction: dataclasses.asdict(engine) for direction, engine in build.engines.items()},
    }
    files = [build.folder / engine.file for engine in build.engines.values()]
    atomic_commit(build.folder / FINGERPRINT_FILE, json.dumps(document, indent=2) + "\n", files)


def open_cache(engine: Engine, precision: str, flavour: str, version: str) -> Path:
    """Return the folder, created if missing, in which ONNX Runtime keeps the engines that it builds.

    This takes no lock: several processes may do it at once, and an export that is running does not delay it.
    Raise OutputError if the folder cannot be written.
    """
    fingerprint = fingerprint_of(engine.spec, precision, flavour, version, target="any")
    folder = engine.folder / BUILDS_FOLDER / fingerprint.name
    if not (folder / FINGERPRINT_FILE).is_file():
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_document(Build(folder, fingerprint, {}))
    return folder


def remove_stale(engine: Engine, versions: Mapping[str, str]) -> list[tuple[Path, int]]:
    """Delete stale and damaged builds, and what killed and failed exports and builds left.

    Wait while another process writes to the engine folder. Return the deleted paths, each with the bytes that it held.
    Raise OutputError if something cannot be deleted.
    """
    # First without the lock, which cannot be taken in a read-only folder.
    if not (_removable(engine, versions) or leftovers(engine.folder)):
        return []
    with folder_lock(engine.folder):
        # Read again: the process that held the lock may have exported other graphs.
        return remove_stale_builds(Engine.load(engine.folder), versions) + remove_leftovers(engine.folder)


def remove_stale_builds(engine: Engine, versions: Mapping[str, str]) -> list[tuple[Path, int]]:
    """Delete stale, damaged and unfinished builds as `remove_stale`; the caller holds the engine folder's lock."""
    removed = []
    for path in _removable(engine, versions):
        with output_errors(path), suppress(FileNotFoundError):
            removed.append((path, remove(path)))
    return removed


def _removable(engine: Engine, versions: Mapping[str, str]) -> list[Path]:
    """Return the paths that `remove_stale_builds` deletes, which include running builds."""
    stale = [folder for folder, _, reason in inspect_builds(engine, versions) if reason]
    logs = sorted((engine.folder / BUILDS_FOLDER).glob(f"*{FAILED_LOG_SUFFIX}"))
    # Compiled graphs of other versions and processors cannot be told from current ones here.
    return [*stale, *unfinished_builds(engine), *logs, *compiled_files(engine.folder)]


def inspect_builds(engine: Engine, versions: Mapping[str, str]) -> Iterator[tuple[Path, Build | None, str | None]]:
    """Yield the folder of each build, what it holds unless it is damaged, and why it is stale or damaged."""
    for folder in build_folders(engine):
        try:
            build = Build.load(folder)
        except StaleEngineError as error:
            yield folder, None, str(error)
        else:
            yield folder, build, why_stale(build.fingerprint, engine.spec, versions)


def describe_builds(engine: Engine, versions: Mapping[str, str]) -> Iterator[str]:
    """Yield a line about each build: its name, layers and size, its checks, and whether it is current."""
    for folder, build, reason in inspect_builds(engine, versions):
        engines = build.engines if build else {}
        sizes = [f"{direction} {e.layers} layers, {e.size / 1e6:.0f} MB; " for direction, e in engines.items()]
        checks = f"{describe_checks(build)}; " if build and engines else ""
        yield f"{folder.name}: {''.join(sizes)}{checks}{f'STALE: {reason}' if reason else 'current'}"


def describe_checks(build: Build) -> str:
    """Return in words on which kinds of GPU the engines of a build were checked, and with which result."""
    checks = [
        f"WRONG on {check.capability}: {check.failure}"
        if check.failure
        else f"at least {check.least_snr_db} dB on {check.capability} ({check.gpu})"
        for check in Check.all_of(build.folder, build.digests)
    ]
    return ", ".join(checks) or "not checked on a GPU"
