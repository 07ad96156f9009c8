"""Keep what OpenVINO compiles for a CPU in the engine folder, so that the graph opens faster the next time.

A file holds the compiled graph, and the weights that `openvino_bf16` turns into inputs. It holds no other large
weights: OpenVINO maps those from the graph's `.data` file. It is an `.npz` archive, which has checksums.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samekit.engine.contents import compiled_name
from samekit.errors import last_line
from samekit.files.atomic import atomic_path
from samekit.files.paths import file_signature, open_regular, utf8_path
from samekit.packages import import_openvino

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from samekit.arrays import Array
    from samekit.engine.spec import GraphFile

logger = logging.getLogger(__name__)

# Raise it when `openvino_bf16` or `openvino_forms` changes graphs in another way.
_REVISION: Final = 3

_WITHOUT_WEIGHTS: Final = {"CACHE_MODE": "OPTIMIZE_SIZE"}


class CompiledFile:
    """The file of one graph for this processor, this version of OpenVINO and these settings, there or not yet there.

    Args:
        folder: the engine folder.
        graph: the graph as `spec.json` describes it; it must have a `weights_file`. Others are small and open fast.
        precision: that OpenVINO computes in.
        core: an `openvino.Core`.
        settings: of OpenVINO.
    """

    def __init__(self, folder: Path, graph: GraphFile, precision: str, core: Any, settings: dict[str, Any]) -> None:
        self._openvino, self._core = import_openvino(), core
        self.settings = settings | _WITHOUT_WEIGHTS
        """The settings to compile the graph with."""
        processor = [str(core.get_property("CPU", name)) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        # Times of change too: the digest is not compared here, and damaged files can have been repaired.
        files = [file_signature(folder / name) for name in sorted(graph.sizes)]
        conditions = json.dumps([_REVISION, self._openvino.__version__, processor, graph.sha256, files, self.settings])
        digest = hashlib.sha256(conditions.encode()).hexdigest()
        self._path = folder / compiled_name(graph, precision, digest)
        self._weights = folder / (graph.weights_file or graph.file)

    def read(self) -> tuple[Any, dict[str, Array]] | None:
        """Return the compiled graph and the values of its added inputs, or None if there is no usable file."""
        if not self._path.is_file():
            return None
        settings = self.settings | {"WEIGHTS_PATH": utf8_path(self._weights)}
        try:
            with open_regular(self._path) as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
            # A file that was renamed holds another graph.
            compiled = self._core.import_model(self._openvino.Tensor(arrays.pop(self._path.name)), "CPU", settings)
            _, *added = (port.get_node().friendly_name for port in compiled.inputs)
            if set(added) != arrays.keys():
                raise ValueError(f"values of the inputs {', '.join(added)} are missing")
        except Exception as error:  # noqa: BLE001 damage shows in errors of many types, and compiling is always possible
            logger.info("%s: cannot be used (%s), so the graph is compiled again", self._path, last_line(error))
            return None
        return compiled, arrays

    def write(self, compiled: Any, inputs: Mapping[str, Array]) -> None:
        """Keep a graph that was compiled with `settings`; if that fails, the next opening compiles again."""
        try:
            data = np.frombuffer(compiled.export_model().getvalue(), np.uint8)
            arrays: dict[str, Any] = {**inputs, self._path.name: data}
            with atomic_path(self._path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)
        except Exception as error:  # noqa: BLE001 OpenVINO raises errors of several types
            logger.info("%s: the compiled graph is not kept (%s)", self._path, last_line(error))
