"""Run one TensorRT engine: profiles, execution contexts and CUDA graphs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samekit.errors import BackendError, InputError, StaleEngineError
from samekit.tensorrt.fingerprint import PROFILES
from samekit.tensorrt.flavours import make_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.tensorrt.gpu import Gpu


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Rows of a batch that one profile takes at once."""

    profile: int
    """Its place in `fingerprint.PROFILES`."""
    rows: slice
    """Of the batch."""


def split(batch: int, latents: int) -> list[Piece]:
    """Which rows of a batch to run together, and in which profile.

    Args:
        batch: any number from 1; larger ones than a profile takes are done in several pieces.
        latents: length of each row.

    Raises:
        InputError: no profile takes so many latents.
    """
    for index, profile in enumerate(PROFILES):
        most = profile.batch[2]
        if profile.takes(1, latents):
            return [Piece(index, slice(start, min(start + most, batch))) for start in range(0, batch, most)]
    longest = max(profile.latents[2] for profile in PROFILES)
    raise InputError(f"a TensorRT engine takes 1 to {longest} latents at once, got {latents}; choose a smaller window")


def _must(done: object, what: str) -> None:
    """Raise unless a call of TensorRT says that it worked."""
    if not done:
        raise BackendError(f"TensorRT could not {what}; see its messages in the log, or use backend onnxruntime")


@dataclass(frozen=True)
class _Recording:
    """One shape that is launched as a CUDA graph, with all that the graph uses and does not keep alive itself."""

    shape: tuple[int, ...]
    input: Any
    output: Any
    scratch: Any
    context: Any
    config: Any
    """How the context was made; TensorRT-RTX's is an object of its own."""
    replay: Callable[[], None]


class EngineRunner:
    """One deserialised engine: an execution context for each profile, made when it is first needed."""

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
        """Run one piece.

        Args:
            profile: which of `PROFILES` takes it.
            tensor: contiguous float32 in device memory.
            shape: of the output.

        Returns:
            New device memory, complete for whatever is enqueued next on the caller's stream.

        Raises:
            BackendError: TensorRT refused something or failed.
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
        # Not before the caller's stream waits for the launch.
        del scratch
        return output

    def _new_context(self, profile: int, *, records: bool = False) -> tuple[Any, Any]:
        """A context without memory of its own, and how it was made.

        By default it would take what the largest shape of any profile needs. TensorRT-RTX, which compiles kernels
        late, records CUDA graphs by itself: `records` asks for that.
        """
        how = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._gpu.ordered() as stream:
            if records:
                strategy, how = how, self._engine.create_runtime_config()
                how.set_execution_context_allocation_strategy(strategy)
                how.cuda_graph_strategy = self._module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(how)
            _must(context is not None, "create an execution context")
            _must(context.set_optimization_profile_async(profile, stream), f"select profile {profile}")
        return context, how

    def _bind(self, context: Any, profile: int, tensor: Any, output: Any) -> Any:
        """Tell a context its shapes and memory; returns the scratch memory, which must live until the work is done."""
        shape = tuple(tensor.shape)
        _must(context.set_input_shape(self._input, shape), f"take the shape {shape}")
        unknown = context.infer_shapes()
        _must(not unknown, f"infer the shapes of {unknown}")
        inferred = tuple(context.get_tensor_shape(self._output))
        _must(inferred == tuple(output.shape), f"give {tuple(output.shape)}: it infers {inferred}")
        # Zero stands for failure as well as for none.
        size = context.update_device_memory_size_for_shapes()
        scratch = self._gpu.scratch(size or self._engine.get_device_memory_size_for_profile_v2(profile))
        context.set_device_memory(scratch.data_ptr(), scratch.shape[0])
        _must(context.set_tensor_address(self._input, tensor.data_ptr()), "bind the input")
        _must(context.set_tensor_address(self._output, output.data_ptr()), "bind the output")
        return scratch

    def _launch(self, context: Any, stream: int) -> None:
        _must(context.execute_async_v3(stream), "launch the engine")

    def _replayed(self, profile: int, tensor: Any, shape: tuple[int, ...]) -> Any:
        """Run a shape that has just been run, as a CUDA graph."""
        if self._recording is None or self._recording.shape != tuple(tensor.shape):
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
            # The first launch after a change of shape does more than a graph may hold.
            self._launch(context, stream)

        def launch() -> None:
            with self._gpu.ordered() as stream:
                self._launch(context, stream)

        replay = launch if by_itself else self._gpu.capture(lambda stream: self._launch(context, stream))
        return _Recording(tuple(tensor.shape), source, output, scratch, context, config, replay)


def _log(severity: str, message: str) -> None:
    """A message of TensorRT to our log."""
    level = {"WARNING": logging.WARNING, "INFO": logging.DEBUG}.get(severity, logging.ERROR)
    logger.log(level, "TensorRT: %s", message)
