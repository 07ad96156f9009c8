"""Run engine folders in ONNX Runtime: on CPUs, on NVIDIA GPUs (CUDA, TensorRT), on any GPU (WebGPU), and by plugins."""

from __future__ import annotations

import functools
import logging
import shlex
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from samekit.backends.base import Backend, BackendOptions, has_driver, keep_for_ever
from samekit.backends.cpu import available_cpus
from samekit.backends.providers import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    TENSORRT_PROVIDER,
    WEBGPU_PROVIDER,
    describe_device,
    is_built_in,
    plugin_device,
)
from samekit.backends.webgpu import check_adapter, check_results, with_portable_sine
from samekit.engine.builds import open_cache
from samekit.engine.fingerprint import NARROW, profiles_of
from samekit.engine.spec import DECODER, GPU_PRECISIONS, INPUT_NAMES, Direction
from samekit.errors import (
    BackendError,
    BackendUnavailableError,
    EngineError,
    HubError,
    OutputError,
    SamekitError,
    first_line,
)
from samekit.files.paths import utf8_path
from samekit.packages import import_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from samekit.arrays import Array
    from samekit.engine.folder import Engine

logger = logging.getLogger(__name__)

# Packing SAME-L's weights for the CPU takes seconds. A session that maps the file instead opens in 0.1 s, but packs in
# every call, which costs a tenth of the call's time. So the first calls run on the mapped file, and a direction that is
# called more often gets packed weights.
MAPPED_CALLS = 2
"""Calls of a direction that run on the mapped file, before its weights are packed."""

# Severities in ONNX Runtime's log.
_ERROR = 3
_FATAL = 4

# WebGPU sessions share one device, and ONNX Runtime does not say that several may use it at a time.
_webgpu_is_busy = threading.Lock()

# A graph of one MatMulInteger: `x`, uint8 [1, 4], times a column of four 127, int8. A test builds the same graph.
_PROBE = (
    b'\x08\x08:\\\n\x18\n\x01x\n\x01w\x12\x01y"\rMatMulInteger\x12\x05probe*\x0f\x08\x04\x08\x01\x10\x03B\x01wJ\x04\x7f\x7f\x7f\x7f'
    b"Z\x13\n\x01x\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x01\n\x02\x08\x04b\x13\n\x01y\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08\x01\n\x02\x08\x01B\x04\n\x00\x10\n"
)


class OnnxRuntimeBackend(Backend):
    """Runs the ONNX graphs of an engine folder; each is opened when it is first used."""

    name: ClassVar[str] = "onnxruntime"

    def __init__(self, engine: Engine, options: BackendOptions) -> None:
        super().__init__(engine.spec, options.precision, options.window_batch)
        self._runtime = import_onnxruntime()
        self._engine = engine
        self._threads = options.threads or available_cpus()
        # A missing precision or a damaged folder is an error of opening, not of the first call.
        engine.check(options.precision)
        self._gpu_was_requested = options.device not in (None, "cpu") or options.providers is not None
        # Devices of the providers that come from plugins, by the name of the provider.
        self._plugin_devices: dict[str, Any] = {}
        self._providers = self._choose_providers(options)
        self.device_id = options.device_id
        first = self._providers[0][0]
        self.device = self._device_of(first)
        if first in (TENSORRT_PROVIDER, WEBGPU_PROVIDER):
            # The fast profile of TensorRT ends here, and many GPUs allow only small buffers in WebGPU.
            self.longest_window = NARROW.latents[2]
        self._busy: AbstractContextManager[object] = nullcontext()
        if self.device == "webgpu":
            self._busy = _webgpu_is_busy
            with self._busy:
                check_adapter(lambda graph: self._new_session(graph, self._new_options()), options.precision)
        self._sessions: dict[str, Any] = {}
        self._calls: dict[str, int] = {}
        self._opening = threading.Lock()

    def _choose_providers(self, options: BackendOptions) -> list[tuple[str, dict[str, Any]]]:
        """Return providers and their settings; this build of ONNX Runtime has all of them."""
        known = self._runtime.get_available_providers()
        if options.precision not in GPU_PRECISIONS:
            if options.device not in (None, "cpu") or options.providers not in (None, (CPU_PROVIDER,)):
                raise BackendUnavailableError(
                    f"{options.precision} graphs are for CPUs; choose precision fp16, or device cpu and no providers"
                )
            return [(CPU_PROVIDER, dict(options.provider_options or {}))]
        if options.providers is not None:
            wanted = options.providers
        elif options.device == "webgpu":
            if options.device_id:
                raise BackendUnavailableError(
                    f"device_id is {options.device_id}, and WebGPU chooses the GPU itself; leave out device_id"
                )
            wanted = (WEBGPU_PROVIDER, CPU_PROVIDER)
        elif options.device == "cuda" or (options.device is None and _finds_cuda(known)):
            wanted = (CUDA_PROVIDER, CPU_PROVIDER)
        else:
            wanted = (CPU_PROVIDER,)
        for provider in wanted:
            if not is_built_in(self._runtime, provider):
                self._plugin_devices[provider] = plugin_device(self._runtime, provider, options.device_id)
        # TF32 is on by default and has 10 bits of mantissa.
        settings: dict[str, dict[str, Any]] = {CUDA_PROVIDER: {"device_id": options.device_id, "use_tf32": "0"}}
        if TENSORRT_PROVIDER in wanted:
            settings[TENSORRT_PROVIDER] = {"device_id": options.device_id, **self._engine_cache()}
        chosen = [(provider, settings.get(provider, {})) for provider in wanted]
        chosen[0][1].update(options.provider_options or {})
        return chosen

    def _device_of(self, provider: str) -> str:
        """Return where a provider computes: `cpu`, `cuda`, `webgpu`, or `gpu` or `npu` of a plugin."""
        if provider == WEBGPU_PROVIDER:
            return "webgpu"
        if provider in self._plugin_devices:
            device = self._plugin_devices[provider]
            logger.info("%s on %s", provider, describe_device(device))
            return str(device.device.type.name).lower()
        return "cpu" if provider == CPU_PROVIDER else "cuda"

    def _engine_cache(self) -> dict[str, Any]:
        """Return where the TensorRT provider keeps engines, whose names include the compute capability."""
        try:
            folder = open_cache(self._engine, self.precision, self.name, self._runtime.__version__)
        except OutputError as error:
            logger.warning("engines of %s are not kept: %s", TENSORRT_PROVIDER, error)
            return {}
        return {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
        }

    def _providers_of(self, direction: Direction) -> list[tuple[str, dict[str, Any]]]:
        """Add the shapes of one direction; without them TensorRT would build an engine for every new length."""
        shapes = {}
        narrow, _ = profiles_of(self.spec, direction)
        for name, batch, latents in zip(("min", "opt", "max"), narrow.batch, narrow.latents, strict=True):
            shape = "x".join(map(str, self.spec.input_shape(direction, batch, latents)))
            shapes[f"trt_profile_{name}_shapes"] = f"{INPUT_NAMES[direction]}:{shape}"
        return [
            (provider, settings | shapes if provider == TENSORRT_PROVIDER else settings)
            for provider, settings in self._providers
        ]

    def use_packed_weights(self, direction: Direction) -> None:
        """Pack the weights at the next call, because packed and mapped weights round sums differently."""
        with self._opening:
            self._calls[direction] = max(self._calls.get(direction, 0), MAPPED_CALLS)

    def _session(self, direction: Direction) -> Any:
        """Return the session for the next call of a direction."""
        with self._opening:
            # Checked again, so that no session outlives a `close` in another thread.
            self._check_open()
            calls = self._calls[direction] = self._calls.get(direction, 0) + 1
            # No local name may hold a session here: `_pack` frees the old one before it opens the new one.
            if direction not in self._sessions:
                packed = calls > MAPPED_CALLS or self.device != "cpu"
                self._sessions[direction] = self._open(self._graph(direction), direction, packed=packed)
            elif calls == MAPPED_CALLS + 1 and self.device == "cpu":
                self._pack(direction)
            return self._sessions[direction]

    def _graph(self, direction: Direction) -> Path:
        """Return a graph, if it is still that of the export which was opened; otherwise raise EngineError."""
        self._engine.check_not_replaced(self.precision)
        return self._engine.graph(direction, self.precision)

    def _pack(self, direction: Direction) -> None:
        """Open a session again with packed weights, or keep the mapped ones if the file has gone."""
        try:
            path = self._graph(direction)
        except (EngineError, HubError) as error:
            logger.warning("weights of the %s are not packed, which costs a tenth of the speed: %s", direction, error)
            return
        # The old session is freed first, because both together would hold the weights twice.
        del self._sessions[direction]
        self._sessions[direction] = self._open(path, direction, packed=True)

    def _open(self, graph: Path, direction: Direction, *, packed: bool) -> Any:
        if (direction, self.precision) == (DECODER, "int8") and int8_saturates(self._runtime):
            # ONNX Runtime has no exact products for weights that two nodes share, as they do in the decoder.
            raise BackendUnavailableError(
                "int8 decoding needs a processor with VNNI instructions, and this one has none; choose precision fp32"
            )
        options = self._new_options()
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        path = utf8_path(graph)
        try:
            if self.device == "webgpu":
                return self._open_on_webgpu(graph, direction, options)
            session = self._new_session(path, options, self._providers_of(direction))
        except SamekitError:
            raise
        except Exception as error:  # noqa: BLE001 the runtime's exceptions share no base class
            self._engine.check_not_replaced(self.precision)
            cure = "export it again, or update ONNX Runtime if it is older than 1.24"
            if self._plugin_devices:
                cure = f"check the options of {self._providers[0][0]} and its plugin, or choose device cpu"
            raise BackendError(
                self._refused_link(graph, direction, str(error))
                or f"{path}: ONNX Runtime {self._runtime.__version__} cannot open it ({first_line(error)}); {cure}"
            ) from None
        # If a provider cannot start, ONNX Runtime only warns and uses the CPU.
        wanted = self._providers[0][0]
        name = self._plugin_devices[wanted].ep_name if wanted in self._plugin_devices else wanted
        if name not in session.get_providers():
            if not self._gpu_was_requested:
                logger.warning("%s did not start, see ONNX Runtime's log: running on the CPU", wanted)
                self._providers = [(CPU_PROVIDER, {})]
                self.device = "cpu"
                return session
            raise BackendUnavailableError(
                f"{wanted} did not start, see ONNX Runtime's log; install CUDA and cuDNN as its documentation says, "
                "or choose device cpu"
            )
        return session

    def _new_options(self) -> Any:
        options = session_options(self._runtime, self._threads, self.precision)
        # Errors are raised too, so the log adds nothing. With CUDA and TensorRT it says more than the error.
        if self.device != "cuda":
            options.log_severity_level = _FATAL if self.device == "cpu" else _ERROR
        return options

    def _new_session(
        self, graph: str | bytes, options: Any, providers: Sequence[tuple[str, dict[str, Any]]] | None = None
    ) -> Any:
        """Open a graph on `providers`, by default those of this backend; raises the runtime's exceptions."""
        providers = self._providers if providers is None else providers
        if self._plugin_devices:
            for name, settings in providers:
                if name in self._plugin_devices:
                    options.add_provider_for_devices([self._plugin_devices[name]], settings)
                elif name != CPU_PROVIDER:
                    options.add_provider(name, {key: str(value) for key, value in settings.items()})
            return self._runtime.InferenceSession(graph, options)
        # Otherwise a failing WebGPU provider would give way to the CPU unnoticed, when it opens or runs a graph.
        strict = {"enable_fallback": 0} if self.device == "webgpu" else {}
        return self._runtime.InferenceSession(graph, options, providers=providers, **strict)

    def _open_on_webgpu(self, path: Path, direction: Direction, options: Any) -> Any:
        """Open a graph that the GPU runs as a whole, and compare its results with those of the CPU."""
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", utf8_path(path.parent))
        with self._busy:
            session = self._new_session(with_portable_sine(path.read_bytes()), options)
            on_cpu = session_options(self._runtime, self._threads, self.precision)
            on_cpu.log_severity_level = _FATAL
            on_cpu.add_session_config_entry("session.disable_prepacking", "1")
            reference = self._runtime.InferenceSession(utf8_path(path), on_cpu, providers=[CPU_PROVIDER])
            gpu, cpu = (functools.partial(run_session, each) for each in (session, reference))
            check_results(self.spec, direction, self.precision, gpu, cpu)
        return session

    def _refused_link(self, graph: Path, direction: Direction, error: str) -> str | None:
        """Return a message if ONNX Runtime refused a graph because its weights are a link that leaves the folder.

        Every version refuses weights whose real path lies neither in the graph's folder nor beside the graph's real
        path. Versions 1.24.0 and 1.24.1 also refuse weights beside the real path, where the cache of `huggingface_hub`
        stores them. There the error's text decides, because other versions accept such links.
        """
        for name in self._engine.spec.graphs[self.precision][direction].sizes:
            weights = graph.with_name(name)
            target = weights.resolve()
            if target.is_relative_to(graph.parent.resolve()) or name == graph.name:
                continue
            cure = f"run: {shlex.join(['cp', '-rL', str(graph.parent), f'{graph.parent}-copy'])}, and open the copy"
            if target.is_relative_to(graph.resolve().parent):
                if "escapes" not in error:
                    continue
                cure = f"update ONNX Runtime to 1.24.2 or later, or {cure}"
            return (
                f"{weights}: is a link that leaves the folder ({target}), and ONNX Runtime {self._runtime.__version__} "
                f"does not follow it; {cure}"
            )
        return None

    def _run(self, direction: Direction, array: Array) -> Array:
        session = self._session(direction)
        with self._busy:
            return run_session(session, array)

    def after_fork(self) -> None:
        """Drop the sessions, whose threads exist in the parent only; the next call opens new ones."""
        if self._sessions:
            keep_for_ever(self._sessions)
            self._lost_to_fork = self.device != "cpu"
        self._sessions = {}
        # A thread of the parent may have held the old lock.
        self._opening = threading.Lock()

    def close(self) -> None:
        """Free both sessions."""
        with self._opening:
            super().close()
            self._sessions.clear()


def run_session(session: Any, array: Array) -> Array:
    """Return the output of a graph with one input and one output; raises BackendError."""
    try:
        (result,) = session.run(None, {session.get_inputs()[0].name: array})
    except Exception as error:  # noqa: BLE001 the runtime's exceptions share no base class
        raise BackendError(
            f"ONNX Runtime failed on {list(array.shape)} ({first_line(error)}); try a smaller window"
        ) from None
    output: Array = result
    return output


def _finds_cuda(known: Sequence[str]) -> bool:
    """Return whether this build has the CUDA provider and the machine has a driver, which builds do not check."""
    if CUDA_PROVIDER not in known:
        return False
    if not has_driver():
        logger.warning("%s needs an NVIDIA driver, and there is none: running on the CPU", CUDA_PROVIDER)
        return False
    return True


def session_options(runtime: Any, threads: int, precision: str) -> Any:
    """Return the options of every session; `runtime` is the module `onnxruntime`."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # Subnormal products cost hundreds of cycles each and do not change fp32 results. The first session of a process
    # decides for the thread that opens it and the threads which that one starts, so every session sets it.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if precision == "int8" and int8_saturates(runtime):
        # Products with unsigned weights, which are exact and half as fast.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


@functools.cache
def int8_saturates(runtime: Any) -> bool:
    """Return whether ONNX Runtime adds pairs of int8 products in 16 bits, which can overflow: on x86 without VNNI."""
    options = session_options(runtime, 1, "fp32")
    session = runtime.InferenceSession(_PROBE, options, providers=[CPU_PROVIDER])
    (total,) = session.run(None, {"x": np.full((1, 4), 255, np.uint8)})
    return int(total.item()) != 4 * 255 * 127
