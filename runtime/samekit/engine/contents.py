"""The files of an engine folder: their names, committing an export, and deleting what replaced and killed ones left.

    engines/same-l/
      spec.json                          facts about the model, and the names of the valid graph files
      encoder.onnx decoder.onnx          fp32 graphs, with .data files beside them when large
      encoder.fp16.onnx ...              other precisions
      encoder.2.onnx ...                 graphs of an export that replaced an earlier one
      encoder.onnx.bf16-DIGEST.openvino  graphs that OpenVINO has compiled, see `samekit.backends.openvino_cache`
      tensorrt/                          TensorRT engines, see `samekit.engine.builds`
      .export-XXXXXXXX/                  graphs of an export that is running, or was killed
      .lock                              held by the process that exports or deletes, see `samekit.files.locks`

New graphs get names that `spec.json` does not contain. Replacing `spec.json`, which is atomic, makes them valid; the
older export can be used until then. Graph files that `spec.json` does not name are leftovers, which the process that
holds the lock deletes. Readers take no lock, nor do those who add a compiled graph.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samekit.engine.spec import DIRECTIONS, SPEC_FILE, EngineSpec, GraphFile
from samekit.errors import EngineError
from samekit.files.atomic import atomic_commit, temporary_target
from samekit.files.locks import LOCK_FILE
from samekit.files.paths import remove

if TYPE_CHECKING:
    from collections.abc import Iterator

_STAGING_PREFIX: Final = ".export-"
# Direction, precision unless fp32, number unless 1, and the suffix of external data.
_GRAPH_FILE: Final = re.compile(r"(encoder|decoder)(?:\.(fp16|int8))?(?:\.(\d+))?\.onnx(\.data)?", re.ASCII)
# The graph's file, precision, and digest of the conditions in which it was compiled.
_COMPILED_FILE: Final = re.compile(r"((?:encoder|decoder)\.[\w.]*onnx)\.\w+-[0-9a-f]{12}\.openvino", re.ASCII)


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


def compiled_name(graph: GraphFile, precision: str, conditions: str) -> str:
    """Return the name of the file that keeps a compiled graph; `conditions` is a hexadecimal digest (sha256)."""
    return f"{graph.file}.{precision}-{conditions[:12]}.openvino"


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
    valid: set[str] | None
    try:
        pairs = EngineSpec.load(folder).graphs.values()
        valid = {name for pair in pairs for graph in pair.values() for name in graph.sizes}
    except EngineError:
        valid = None if os.path.lexists(folder / SPEC_FILE) else set()

    def is_left(path: Path) -> bool:
        compiled = _COMPILED_FILE.fullmatch(path.name)
        if compiled or _GRAPH_FILE.fullmatch(path.name):
            graph = compiled[1] if compiled else path.name
            return valid is not None and graph not in valid and not path.is_dir()
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
