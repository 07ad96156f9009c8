"""Run engine folders in OpenVINO: on CPUs, where it computes in bfloat16 too, and on Intel's GPUs and NPUs."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from samekit.backends.base import Backend, BackendOptions, keep_for_ever
from samekit.backends.cpu import available_cpus
from samekit.backends.openvino_bf16 import keep_float32
from samekit.backends.openvino_cache import CompiledFile
from samekit.backends.openvino_forms import transpose_keys_in_products, use_float32_rotary, use_fused_rotary
from samekit.engine.spec import INPUT_NAMES, Direction, graph_precision
from samekit.errors import BackendError, BackendUnavailableError, last_line
from samekit.files.paths import link_or_copy, utf8_path
from samekit.packages import import_openvino

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.arrays import Array
    from samekit.engine.folder import Engine

_DEVICES: Final = {"cpu": "CPU", "intel-gpu": "GPU", "npu": "NPU"}
"""OpenVINO's names of devices."""


# The processes that have compiled a graph: this one, or the one that it was forked from.
_compiled_in: set[int] = set()


class _Hint(NamedTuple):
    capability: str
    """What OpenVINO calls it among the capabilities of a device."""
    type: str
    """The type that operations compute in."""


_HINTS: Final = {"fp32": _Hint("FP32", "f32"), "bf16": _Hint("BF16", "bf16"), "fp16": _Hint("FP16", "f16")}


# Held while a graph is read and changed. Two threads that are the first to call the same function of OpenVINO's Python
# API can wait for each other for ever: one holds the GIL, the other initializes a static variable and needs the GIL.
_reading = threading.Lock()


def _renew_lock() -> None:
    """Replace the lock in a forked process, where the thread that may have held it does not exist."""
    global _reading  # noqa: PLW0603
    _reading = threading.Lock()


# Python has this function only on systems that can fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@functools.cache
def _new_core(precision: str) -> Any:
    core = import_openvino().Core()
    (use_float32_rotary if precision == "bf16" else use_fused_rotary)(core)
    # In a forked process, its destructor would wait for threads that exist in the parent only.
    keep_for_ever(core)
    return core


def _core(precision: str) -> Any:
    """Return the one `openvino.Core` of this process for a precision, which is never freed.

    A core loads the plugin for CPUs, which replaces the stack for signal handlers of the thread that loads it, and
    unmaps this stack with the core. If another thread frees the core, or if of two cores the older one is freed first,
    a thread keeps a stack that is not mapped. The next signal that has a handler, such as that of Ctrl-C, then ends
    the process. Source: `SigAltStackSetup` in `src/plugins/intel_cpu/src` of OpenVINO 2026.4.
    """
    with _reading:
        return _new_core(precision)


@contextmanager
def _without_links(graph: Path) -> Iterator[Path]:
    """Yield the path of a graph whose weights OpenVINO reads: it refuses links that leave the folder of the graph.

    The hub's cache consists of such links. The files stay readable for OpenVINO after the `with` block.
    """
    weights = graph.with_name(f"{graph.name}.data")
    if not weights.is_symlink():
        yield graph
        return
    # Links need the file system of the weights. Windows deletes no file that is in use.
    real = weights.resolve().parent
    place = real if os.access(real, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix=".samekit-", dir=place, ignore_cleanup_errors=True) as folder:
        for path in (graph, weights):
            link_or_copy(path, Path(folder, path.name))
        yield Path(folder, graph.name)


class _Compiled:
    """A compiled graph with one infer request, which one thread at a time can use.

    More requests would hold more scratch memory and be no faster: each of them uses all threads.
    """

    def __init__(self, compiled: Any, input_name: str, constants: dict[str, Any], openvino: Any) -> None:
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()
        names = [port.get_node().friendly_name for port in compiled.inputs]
        self._input = names.index(input_name)
        for name, values in constants.items():
            self._request.set_input_tensor(names.index(name), openvino.Tensor(values))

    def run(self, array: Array) -> Array:
        with self._lock:
            # Both the input and the result are copied.
            (output,) = self._request.infer({self._input: array}).values()
        result: Array = output
        return result


class OpenVinoBackend(Backend):
    """Runs the ONNX graphs of an engine folder; each is compiled when it is first used."""

    name: ClassVar[str] = "openvino"

    def __init__(self, engine: Engine, options: BackendOptions) -> None:
        super().__init__(engine.spec, options.precision, options.window_batch)
        if options.device == "cuda":
            raise BackendUnavailableError("OpenVINO runs on no NVIDIA GPU; choose device cpu, or another backend")
        self._openvino = import_openvino()
        self._core = _core(options.precision)
        self._engine = engine
        self._graph_precision = graph_precision(options.precision)
        self._threads = options.threads or available_cpus()
        # A missing precision or a damaged folder is an error of opening, not of the first call.
        engine.check(self._graph_precision)
        self.device = options.device or "cpu"
        self.device_id = options.device_id
        self._device_name = self._choose_device()
        self._models: dict[Direction, _Compiled] = {}
        self._opening = threading.Lock()

    def _choose_device(self) -> str:
        """Return OpenVINO's name of the device, which is there and can compute in this precision."""
        name = _DEVICES[self.device]
        # Every build has the CPU, and looking for the other devices takes 20 ms.
        have = [name] if name == "CPU" else self._core.available_devices
        if f"{name}.{self.device_id}" in have:
            name = f"{name}.{self.device_id}"
        elif name not in have or (self.device_id and name != "CPU"):
            which = f" with number {self.device_id}" if self.device_id else ""
            raise BackendUnavailableError(
                f"OpenVINO finds no {self.device}{which} (it has {', '.join(have)}); install its driver, "
                "or choose device cpu"
            )
        capabilities = self._core.get_property(name, "OPTIMIZATION_CAPABILITIES")
        able = [precision for precision, hint in _HINTS.items() if hint.capability in capabilities]
        if self.precision not in able:
            raise BackendUnavailableError(
                f"OpenVINO does not compute in {self.precision} on this {self.device}, or only slowly; "
                f"choose precision {' or '.join(able)}"
            )
        return name

    def _model(self, direction: Direction) -> _Compiled:
        with self._opening:
            # Checked again, so that no model outlives a `close` in another thread.
            self._check_open()
            if direction not in self._models:
                self._models[direction] = self._open(direction)
            return self._models[direction]

    def _open(self, direction: Direction) -> _Compiled:
        """Compile a graph, if it is still that of the export which was opened; otherwise raise EngineError."""
        if _compiled_in - {os.getpid()}:
            # OpenVINO would wait for ever for threads that the parent had.
            raise BackendError(
                "OpenVINO does not work in a process that was forked after OpenVINO ran; start processes by spawn, or "
                "choose backend onnxruntime"
            )
        _compiled_in.add(os.getpid())
        self._engine.check_not_replaced(self._graph_precision)
        path = self._engine.graph(direction, self._graph_precision)
        graph = self._engine.graph_file(direction, self._graph_precision)
        try:
            if self._device_name != "CPU" or not graph.weights_file:
                compiled, inputs = self._compile(path, self._settings())
            else:
                kept = CompiledFile(path.parent, graph, self.precision, self._core, self._settings())
                found = kept.read()
                compiled, inputs = found or self._compile(path, kept.settings)
                if not found:
                    kept.write(compiled, inputs)
            return _Compiled(compiled, INPUT_NAMES[direction], inputs, self._openvino)
        except Exception as error:  # noqa: BLE001 OpenVINO raises errors of several types
            self._engine.check_not_replaced(self._graph_precision)
            raise BackendError(
                f"{path}: OpenVINO {self._openvino.__version__} cannot open it ({last_line(error)}); export it again, "
                "or choose backend onnxruntime"
            ) from None

    def _compile(self, path: Path, settings: dict[str, Any]) -> tuple[Any, dict[str, Array]]:
        """Return a compiled graph and the values of inputs that were added to it; raises OpenVINO's exceptions."""
        inputs: dict[str, Array] = {}
        with _reading:
            with _without_links(path) as readable:
                model = self._core.read_model(utf8_path(readable))
            transpose_keys_in_products(self._openvino, model)
            if self.precision == "bf16":
                model, inputs = keep_float32(self._openvino, self._core, model)
        return self._core.compile_model(model, self._device_name, settings), inputs

    def _settings(self) -> dict[str, Any]:
        # Without a type, OpenVINO chooses bfloat16 where the processor has it.
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINTS[self.precision].type}
        if self._device_name != "CPU":
            return settings
        return settings | {
            "INFERENCE_NUM_THREADS": self._threads,
            # Pinned threads would compete with other processes for the same cores.
            "ENABLE_CPU_PINNING": False,
            # Subnormal products cost hundreds of cycles each and do not change fp32 results.
            "CPU_DENORMALS_OPTIMIZATION": True,
        }

    def _run(self, direction: Direction, array: Array) -> Array:
        model = self._model(direction)
        try:
            return model.run(array)
        except Exception as error:  # noqa: BLE001 OpenVINO raises errors of several types
            raise BackendError(
                f"OpenVINO failed on {list(array.shape)} ({last_line(error)}); try a smaller window"
            ) from None

    def after_fork(self) -> None:
        """Drop the compiled graphs, whose threads exist in the parent only; the next call raises an error."""
        if self._models:
            keep_for_ever(self._models)
        self._models = {}
        # A thread of the parent may have held the old lock.
        self._opening = threading.Lock()

    def close(self) -> None:
        """Free both compiled graphs."""
        with self._opening:
            super().close()
            self._models.clear()
