"""Keep what OpenVINO compiles for a CPU in the engine folder, so that the graph opens faster the next time.

A file holds the compiled graph, and the inputs that `openvino_bf16` adds. It does not hold the large weights, which
OpenVINO maps from the graph's `.data` file. It is an `.npz` archive, so damage is found by its checksums.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samekit.engine.folder import compiled_name
from samekit.errors import OutputError
from samekit.files.atomic import atomic_path
from samekit.files.paths import open_regular, utf8_path
from samekit.packages import import_openvino

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from samekit.arrays import Array
    from samekit.engine.folder import Engine
    from samekit.engine.spec import Direction

logger = logging.getLogger(__name__)

# Raise it when `openvino_bf16` or `openvino_rotary` changes graphs in another way.
_REVISION: Final = 1

_WITHOUT_WEIGHTS: Final = {"CACHE_MODE": "OPTIMIZE_SIZE"}
_COMPILED: Final = "compiled"
_DATA_SUFFIX: Final = ".data"


class CompiledFile:
    """The file of one graph for this processor, this version of OpenVINO and these settings, there or not yet there."""

    def __init__(
        self, engine: Engine, direction: Direction, precision: str, core: Any, settings: Mapping[str, Any]
    ) -> None:
        self._openvino, self._core = import_openvino(), core
        self.settings = dict(settings) | _WITHOUT_WEIGHTS
        """The settings to compile the graph with."""
        processor = [str(core.get_property("CPU", name)) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        conditions = json.dumps([_REVISION, self._openvino.__version__, processor, self.settings], sort_keys=True)
        graph = engine.graph_file(direction, "fp32")
        digest = hashlib.sha256(conditions.encode()).hexdigest()
        self._path: Path = engine.folder / compiled_name(direction, precision, graph.sha256, digest)
        self._weights = self._path.with_name(graph.file + _DATA_SUFFIX)

    @staticmethod
    def is_useful(engine: Engine, direction: Direction) -> bool:
        """Return whether a graph has its weights in a file of their own; others are small and open fast."""
        graph = engine.graph_file(direction, "fp32")
        return graph.file + _DATA_SUFFIX in graph.sizes

    def read(self) -> tuple[Any, dict[str, Array]] | None:
        """Return the compiled graph and the values of its added inputs, or None if there is no usable file."""
        if not self._path.is_file():
            return None
        settings = self.settings | {"WEIGHTS_PATH": utf8_path(self._weights)}
        try:
            with open_regular(self._path) as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
            compiled = self._core.import_model(self._openvino.Tensor(arrays.pop(_COMPILED)), "CPU", settings)
        except Exception as error:  # noqa: BLE001 damage shows in errors of many types, and compiling is always possible
            logger.info("%s: cannot be used (%r), so the graph is compiled again", self._path, error)
            return None
        return compiled, arrays

    def write(self, compiled: Any, inputs: Mapping[str, Array]) -> None:
        """Keep a graph that was compiled with `settings`; a folder that cannot be written is left as it is."""
        arrays: dict[str, Any] = dict(inputs) | {_COMPILED: np.frombuffer(compiled.export_model().getvalue(), np.uint8)}
        try:
            with atomic_path(self._path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)
        except (OutputError, OSError) as error:
            logger.info("the compiled graph is not kept: %s", error)
