"""Run one TensorRT engine: optimisation profiles, execution contexts and CUDA graphs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from samekit.engine.fingerprint import PROFILES
from samekit.errors import BackendError, InputError, StaleEngineError
from samekit.files.atomic import atomic_path
from samekit.tensorrt.flavours import make_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from samekit.tensorrt.gpu import Gpu


logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Rows of a batch that run at once."""

    profile: int
    """Index into `PROFILES`."""
    rows: slice


def split(batch: int, latents: int) -> list[Piece]:
    """Split a batch of rows into pieces that a profile accepts; raise InputError if none accepts so many latents."""
    for index, profile in enumerate(PROFILES):
        if latents <= profile.latents[2]:
            most = profile.batch[2]
            return [Piece(index, slice(start, min(start + most, batch))) for start in range(0, batch, most)]
    longest = max(profile.latents[2] for profile in PROFILES)
    raise InputError(f"a TensorRT engine takes 1 to {longest} latents at once, got {latents}; choose a smaller window")


def _must(done: object, what: str) -> None:
    """Raise BackendError unless a call of TensorRT returned success."""
    if not done:
        raise BackendError(f"TensorRT could not {what}; see its messages in the log, or use backend onnxruntime")


# CUDA graphs that an engine keeps. A dataset mostly has one shape; the memory of each stays allocated.
_MOST_RECORDINGS: Final = 4


class _Recording(NamedTuple):
    """A CUDA graph for one shape."""

    input: Any
    output: Any
    replay: Callable[[], None]
    used: tuple[Any, ...]
    """What the graph uses and does not keep alive itself."""


class EngineRunner:
    """One deserialised engine, with an execution context for each profile that is in use.

    All its work is enqueued on `gpu.engines`, which must be the current stream.

    Args:
        module: the module of TensorRT.
        data: the engine.
        origin: its path, for messages.
        gpu: the device.
        cuda_graph: whether a shape that repeats is recorded as a CUDA graph.
        host_code: whether the engine may run code on the CPU, as one for later versions of TensorRT does.
        cache: file for the kernels that TensorRT-RTX compiles when it runs a shape for the first time.

    Raises:
        StaleEngineError: this version of TensorRT cannot load the engine.
    """

    def __init__(
        self,
        module: Any,
        data: bytes,
        origin: str,
        gpu: Gpu,
        *,
        cuda_graph: bool,
        host_code: bool = False,
        cache: Path | None = None,
    ) -> None:
        self._cache_path = cache
        self._cached = b""
        self._cache: Any = None
        self._module = module
        self._gpu = gpu
        self._cuda_graph = cuda_graph
        self._logger = make_logger(module, _log)
        self._runtime = module.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = host_code
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise StaleEngineError(
                f"{origin}: {module.__name__} {module.__version__} cannot load it, see its messages in the log; "
                "update the GPU's driver, or build the engine again"
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {self._engine.get_tensor_mode(name): name for name in names}
        self._input = modes[module.TensorIOMode.INPUT]
        self._output = modes[module.TensorIOMode.OUTPUT]
        # Profile -> context, and its configuration, which must live as long.
        self._contexts: dict[int, tuple[Any, Any]] = {}
        # The shapes of the last calls, the latest one last. None: it has been run once, without a graph.
        self._recordings: OrderedDict[tuple[int, ...], _Recording | None] = OrderedDict()

    def run(self, profile: int, tensor: Any, output: Any) -> None:
        """Enqueue a run with one of `PROFILES`, between contiguous float32 tensors in device memory.

        Raises:
            BackendError: TensorRT fails.
        """
        shape = tuple(tensor.shape)
        if self._cuda_graph and shape in self._recordings:
            recording = self._recordings[shape] or self._record(profile, tensor, output)
            self._recordings[shape] = recording
            self._gpu.copy(recording.input, tensor)
            recording.replay()
            self._gpu.copy(output, recording.output)
        else:
            if profile not in self._contexts:
                self._contexts[profile] = self._new_context(profile)
            context, _ = self._contexts[profile]
            # PyTorch reuses the scratch memory on this stream only, so after this run.
            _scratch = self._bind(context, profile, tensor, output)
            self._launch(context)
            if self._cuda_graph:
                self._recordings[shape] = None
        if self._cuda_graph:
            self._recordings.move_to_end(shape)
            if len(self._recordings) > _MOST_RECORDINGS:
                self._drop_recording()

    def __del__(self) -> None:
        # A backend may be dropped without `close`, for example after an error, while another batch runs. If an error
        # comes here, the engine was not loaded, or the driver has ended with the process.
        with suppress(AttributeError, RuntimeError):
            self.close()

    def close(self) -> None:
        """Wait for the work of the engine, and free it."""
        # TensorRT must not destroy a context that is in use.
        self._gpu.engines.synchronize()
        self._recordings.clear()
        self._contexts.clear()
        self._keep_cache()

    def _drop_recording(self) -> None:
        """Drop the shape that was used least recently."""
        _, recording = self._recordings.popitem(last=False)
        if recording:
            # Its work may still run.
            self._gpu.engines.synchronize()

    def _new_context(self, profile: int, *, records: bool = False) -> tuple[Any, Any]:
        """Create an execution context that allocates no memory; return it and its configuration.

        By default a context allocates what the largest shape of any profile needs. TensorRT-RTX compiles kernels late:
        it can keep them in a cache, and `records` lets it record CUDA graphs by itself.
        """
        config = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(self._module, "CudaGraphStrategy"):
            strategy, config = config, self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if records:
                config.cuda_graph_strategy = self._module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._attach_cache(config)
        context = self._engine.create_execution_context(config)
        _must(context is not None, "create an execution context")
        stream = self._gpu.engines.cuda_stream
        _must(context.set_optimization_profile_async(profile, stream), f"select profile {profile}")
        return context, config

    def _attach_cache(self, config: Any) -> None:
        """Use the kernels that were compiled before; a cache that does not fit this driver counts as empty."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                self._cached = self._cache_path.read_bytes() if self._cache_path else b""
            if self._cached and not self._cache.deserialize(self._cached):
                logger.info("%s: does not fit this machine, so kernels are compiled again", self._cache_path)
                self._cache.reset()
        config.set_runtime_cache(self._cache)

    def _keep_cache(self) -> None:
        """Write the compiled kernels to disk if there are new ones; without them, only the next start is slower."""
        if self._cache is None or self._cache_path is None:
            return
        data = bytes(memoryview(self._cache.serialize()))
        self._cache = None
        if data == self._cached:
            return
        try:
            with atomic_path(self._cache_path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            logger.info("the compiled kernels are not kept: %s", error)

    def _bind(self, context: Any, profile: int, tensor: Any, output: Any) -> Any:
        """Give a context its shapes and memory; return the scratch memory, to be kept until the work is done."""
        shape = tuple(tensor.shape)
        _must(context.set_input_shape(self._input, shape), f"take the shape {shape}")
        unknown = context.infer_shapes()
        _must(not unknown, f"infer the shapes of {unknown}")
        inferred = tuple(context.get_tensor_shape(self._output))
        _must(inferred == tuple(output.shape), f"give {tuple(output.shape)}: it infers {inferred}")
        # Zero means failure or that no memory is needed.
        size = context.update_device_memory_size_for_shapes()
        scratch = self._gpu.scratch(size or self._engine.get_device_memory_size_for_profile_v2(profile))
        context.set_device_memory(scratch.data_ptr(), scratch.shape[0])
        _must(context.set_tensor_address(self._input, tensor.data_ptr()), "bind the input")
        _must(context.set_tensor_address(self._output, output.data_ptr()), "bind the output")
        return scratch

    def _launch(self, context: Any) -> None:
        _must(context.execute_async_v3(self._gpu.engines.cuda_stream), "launch the engine")

    def _record(self, profile: int, tensor: Any, output: Any) -> _Recording:
        """Record the shapes of these tensors, in a context that will not be given others."""
        by_itself = hasattr(self._module, "CudaGraphStrategy")
        context, config = self._new_context(profile, records=by_itself)
        source, target = self._gpu.empty(tuple(tensor.shape)), self._gpu.empty(tuple(output.shape))
        self._gpu.copy(source, tensor)
        scratch = self._bind(context, profile, source, target)
        # The first launch after a change of shape does more than a graph may contain.
        self._launch(context)

        def launch() -> None:
            self._launch(context)

        replay = launch if by_itself else self._gpu.capture(launch)
        return _Recording(source, target, replay, used=(scratch, context, config))


def _log(severity: str, message: str) -> None:
    """Write a message of TensorRT to the log."""
    level = {"WARNING": logging.WARNING, "INFO": logging.DEBUG}.get(severity, logging.ERROR)
    logger.log(level, "TensorRT: %s", message)
