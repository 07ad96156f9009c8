"""Run one TensorRT engine: optimisation profiles, execution contexts and CUDA graphs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from samekit.engine.fingerprint import PROFILES
from samekit.errors import BackendError, InputError, StaleEngineError
from samekit.tensorrt.flavours import make_logger

if TYPE_CHECKING:
    from collections.abc import Callable

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


class _Recording(NamedTuple):
    """A CUDA graph for one shape."""

    input: Any
    output: Any
    replay: Callable[[], None]
    used: tuple[Any, ...]
    """What the graph uses and does not keep alive itself."""


class EngineRunner:
    """One deserialised engine, with an execution context for each profile that is in use.

    With `cuda_graph`, a shape that repeats is recorded as a CUDA graph. `origin` is the engine's path, for messages.
    Raise StaleEngineError if this version of TensorRT cannot load the engine.
    """

    def __init__(self, module: Any, data: bytes, origin: str, gpu: Gpu, *, cuda_graph: bool) -> None:
        self._module = module
        self._gpu = gpu
        self._cuda_graph = cuda_graph
        self._logger = make_logger(module, _log)
        self._runtime = module.Runtime(self._logger)
        with gpu.ordered():
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
        self._contexts: dict[int, Any] = {}
        self._last_shape: tuple[int, ...] | None = None
        self._recording: _Recording | None = None

    def run(self, profile: int, tensor: Any, shape: tuple[int, ...]) -> Any:
        """Run a contiguous float32 tensor in device memory with one of `PROFILES`; `shape` is that of the output.

        Return new device memory, ready for the caller's stream. Raise BackendError if TensorRT fails.
        """
        if self._cuda_graph and tuple(tensor.shape) == self._last_shape:
            return self._replayed(profile, tensor, shape)
        self._last_shape = tuple(tensor.shape)
        if profile not in self._contexts:
            self._contexts[profile], _ = self._new_context(profile)
        output = self._gpu.empty(shape)
        with self._gpu.ordered() as stream:
            scratch = self._bind(self._contexts[profile], profile, tensor, output)
            self._launch(self._contexts[profile], stream)
        # Freed only now, when the caller's stream waits for the launch.
        del scratch
        return output

    def _new_context(self, profile: int, *, records: bool = False) -> tuple[Any, Any]:
        """Create an execution context that allocates no memory; return it and its configuration.

        By default a context allocates what the largest shape of any profile needs. `records` lets TensorRT-RTX, which
        compiles kernels late, record CUDA graphs by itself.
        """
        config = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._gpu.ordered() as stream:
            if records:
                strategy, config = config, self._engine.create_runtime_config()
                config.set_execution_context_allocation_strategy(strategy)
                config.cuda_graph_strategy = self._module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
            _must(context is not None, "create an execution context")
            _must(context.set_optimization_profile_async(profile, stream), f"select profile {profile}")
        return context, config

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

    def _launch(self, context: Any, stream: int) -> None:
        _must(context.execute_async_v3(stream), "launch the engine")

    def _replayed(self, profile: int, tensor: Any, shape: tuple[int, ...]) -> Any:
        """Run the shape of the last call as a CUDA graph."""
        if self._recording is None or self._recording.input.shape != tensor.shape:
            self._recording = None
            self._recording = self._record(profile, tensor, shape)
        output = self._gpu.empty(shape)
        with self._gpu.ordered():
            self._recording.input.copy_(tensor)
            self._recording.replay()
            output.copy_(self._recording.output)
        return output

    def _record(self, profile: int, tensor: Any, shape: tuple[int, ...]) -> _Recording:
        """Record a shape, in a context that will not be given another."""
        by_itself = hasattr(self._module, "CudaGraphStrategy")
        context, config = self._new_context(profile, records=by_itself)
        with self._gpu.ordered() as stream:
            source, output = tensor.clone(), self._gpu.empty(shape)
            scratch = self._bind(context, profile, source, output)
            # The first launch after a change of shape does more than a graph may contain.
            self._launch(context, stream)

        def launch() -> None:
            with self._gpu.ordered() as stream:
                self._launch(context, stream)

        replay = launch if by_itself else self._gpu.capture(lambda stream: self._launch(context, stream))
        return _Recording(source, output, replay, used=(scratch, context, config))


def _log(severity: str, message: str) -> None:
    """Write a message of TensorRT to the log."""
    level = {"WARNING": logging.WARNING, "INFO": logging.DEBUG}.get(severity, logging.ERROR)
    logger.log(level, "TensorRT: %s", message)
