"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU; PyTorch, imported here only, gives memory and streams.

What goes wrong silently with TensorRT, and what stands here against it:

* Work on streams is ordered: an engine's own stream waits for the caller's, and the caller's for it (`Gpu.ordered`).
* Every call that answers whether it worked is asked (`_must`); a failed launch leaves the old output in place.
* A shape is refused before anything runs, with what would fit (`split`); the shape that TensorRT infers for the output
  must be ours.
* An output is new memory each time, and the caller's own.
* Scratch memory is what the shape at hand needs, not what the largest one would.
* An engine is read when its half is first used.
* A build is chosen by everything that decides about it (`samekit.tensorrt_store`), and the GPU is asked, not guessed.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from samekit._packages import import_package
from samekit.backends.base import Backend, BackendOptions, has_driver, keep_for_ever
from samekit.errors import BackendError, BackendUnavailableError, InputError, StaleEngineError
from samekit.fingerprint import NARROW, PROFILES
from samekit.spec import GPU_PRECISIONS, other
from samekit.tensorrt_api import FLAVOURS, INSTALL, import_flavour, installed_flavours, make_logger
from samekit.tensorrt_store import build_folders, choose_build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from samekit.arrays import Array
    from samekit.spec import EngineSpec
    from samekit.store import Engine
    from samekit.tensorrt_store import Build

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


class Gpu:
    """One CUDA device through PyTorch: memory, and the order of work on streams."""

    def __init__(self, device_id: int) -> None:
        # Asked before PyTorch, whose import takes a second that "auto" should not spend in vain.
        if not has_driver():
            raise BackendUnavailableError("there is no NVIDIA driver, which TensorRT needs; use another backend")
        torch = import_package("torch", "pip install 'samekit[gpu]'")
        if not torch.cuda.is_available():
            raise BackendUnavailableError("PyTorch finds no CUDA device, which TensorRT needs; use another backend")
        if device_id >= torch.cuda.device_count():
            raise BackendUnavailableError(
                f"there is no GPU {device_id}, only {torch.cuda.device_count()}; choose device_id from 0"
            )
        self._torch = torch
        self._device = torch.device("cuda", device_id)
        # TensorRT synchronises the whole device when it runs on the default stream.
        self._stream = torch.cuda.Stream(self._device)

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, (major, minor)."""
        major, minor = self._torch.cuda.get_device_capability(self._device)
        return major, minor

    def holds(self, value: Any) -> bool:
        """Whether a value is a tensor in this device's memory."""
        return isinstance(value, self._torch.Tensor) and value.device == self._device

    def upload(self, array: Array) -> Any:
        """A copy in device memory."""
        # Not `from_numpy`, which warns where an array is read-only.
        return self._torch.tensor(array, device=self._device)

    def download(self, tensor: Any) -> Array:
        """A copy in host memory; waits for everything that writes the tensor."""
        array: Array = tensor.cpu().numpy()
        return array

    def empty(self, shape: tuple[int, ...]) -> Any:
        """New float32 memory."""
        return self._torch.empty(shape, dtype=self._torch.float32, device=self._device)

    def scratch(self, size: int) -> Any:
        """New bytes, aligned as TensorRT wants them: PyTorch aligns to 512."""
        return self._torch.empty(size, dtype=self._torch.uint8, device=self._device)

    def join(self, pieces: list[Any]) -> Any:
        """Rows of a batch in one tensor."""
        return pieces[0] if len(pieces) == 1 else self._torch.cat(pieces)

    @contextmanager
    def ordered(self) -> Iterator[int]:
        """The handle of a stream whose work follows all of the caller's so far and precedes all that comes after.

        It is one stream for all callers, and PyTorch's current one inside the block. So memory that the caller's stream
        wrote may be read, callers with streams of their own do not meet, and memory that is freed is not handed out
        again too early: PyTorch reuses it on the stream on which it was made.
        """
        torch = self._torch
        with torch.cuda.device(self._device):
            callers = torch.cuda.current_stream()
            self._stream.wait_stream(callers)
            try:
                with torch.cuda.stream(self._stream):
                    yield self._stream.cuda_stream
            finally:
                callers.wait_stream(self._stream)

    def capture(self, launch: Callable[[int], None]) -> Callable[[], None]:
        """Record what `launch(stream)` enqueues as a CUDA graph; the result enqueues it on the current stream."""
        torch = self._torch
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                launch(self._stream.cuda_stream)
        replay: Callable[[], None] = graph.replay
        return replay


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


class TensorRTBackend(Backend):
    """Runs a build's engines; each half is read when it is first used."""

    name: ClassVar[str] = "tensorrt"
    device = "cuda"
    # Longer ones would need the wide profile, which takes no batches.
    longest_window = NARROW.latents[2]

    def __init__(
        self,
        spec: EngineSpec,
        build: Build,
        module: Any,
        gpu: Gpu,
        *,
        device_id: int = 0,
        cuda_graph: bool = False,
        window_batch: int | None = None,
    ) -> None:
        super().__init__(spec, build.fingerprint.precision, window_batch)
        self.device_id = device_id
        self._build = build
        self._module = module
        self._gpu = gpu
        self._cuda_graph = cuda_graph
        self._runners: dict[str, EngineRunner] = {}
        # An execution context serves one caller at a time.
        self._busy = threading.Lock()

    def _runner(self, half: str) -> EngineRunner:
        """The half's engine, read once."""
        # Once more, so that no engine outlives a `close` in another thread.
        self._check_open()
        if half not in self._runners:
            data = self._build.read(half)
            origin = f"{self._build.folder / self._build.engines[half].file}"
            self._runners[half] = EngineRunner(self._module, data, origin, self._gpu, cuda_graph=self._cuda_graph)
        return self._runners[half]

    def _run(self, half: str, array: Array) -> Array:
        # Refused before anything is copied.
        self._pieces(half, array.shape)
        return self._gpu.download(self._run_tensor(half, self._gpu.upload(array)))

    def accepts(self, value: Any) -> bool:
        """Whether a value is a float32 tensor on this GPU."""
        return self._gpu.holds(value) and str(value.dtype) == "torch.float32"

    def _run_tensor(self, half: str, tensor: Any) -> Any:
        pieces = self._pieces(half, tensor.shape)
        tensor = tensor.detach().contiguous()
        latents = self._latents(half, tensor.shape)
        with self._busy:
            runner = self._runner(half)
            outputs = []
            for piece in pieces:
                rows = tensor[piece.rows]
                shape = self.spec.input_shape(other(half), rows.shape[0], latents)
                outputs.append(runner.run(piece.profile, rows, shape))
            return self._gpu.join(outputs)

    def _latents(self, half: str, shape: Any) -> int:
        """Length of an input in latents."""
        return int(shape[-1]) // self.spec.layout(half)[1]

    def _pieces(self, half: str, shape: Any) -> list[Piece]:
        return split(int(shape[0]), self._latents(half, shape))

    def after_fork(self) -> None:
        """Give up what lies on the GPU: nothing of it can be used or freed in a forked process."""
        super().after_fork()
        keep_for_ever((self._runners, self._gpu))
        self._runners = {}
        # A thread of the parent may have held the old one.
        self._busy = threading.Lock()

    def close(self) -> None:
        """Free engines, contexts and recordings."""
        with self._busy:
            super().close()
            self._runners.clear()


def open_tensorrt(engine: Engine, options: BackendOptions) -> TensorRTBackend:
    """Open the build of an engine folder that fits this machine.

    Raises:
        BackendUnavailableError: no GPU, no TensorRT, or no engine of this precision.
        BackendError: TensorRT or PyTorch is installed, but cannot be imported.
        StaleEngineError: there are engines, but none that can run here.
    """
    if options.device == "cpu":
        raise BackendUnavailableError("TensorRT runs on GPUs only; choose device cuda or another backend")
    if options.precision not in GPU_PRECISIONS:
        raise BackendUnavailableError(
            f"TensorRT runs {' and '.join(GPU_PRECISIONS)}, {options.precision} is for CPUs; choose precision fp16, "
            "or the onnxruntime backend on the CPU"
        )
    # First of all, as importing PyTorch takes seconds that "auto" should not spend in vain.
    if not build_folders(engine):
        raise BackendUnavailableError(
            f"{engine.folder}: no TensorRT engine, which needs an NVIDIA GPU to run; where there is one, and TensorRT, "
            f"run: {engine.export_command('--tensorrt', 'auto')}"
        )
    gpu = Gpu(options.device_id)
    modules = installed_flavours()
    if not modules:
        for flavour in FLAVOURS:
            with suppress(BackendUnavailableError):
                # Tells what is wrong with one that is installed.
                import_flavour(flavour)
        raise BackendUnavailableError(f"neither flavour of TensorRT is installed; run: {' or '.join(INSTALL.values())}")
    versions = {flavour: module.__version__ for flavour, module in modules.items()}
    build = choose_build(engine, options.precision, gpu.capability, versions)
    module = modules[build.fingerprint.flavour]
    return TensorRTBackend(
        engine.spec,
        build,
        module,
        gpu,
        device_id=options.device_id,
        cuda_graph=options.cuda_graph,
        window_batch=options.window_batch,
    )
