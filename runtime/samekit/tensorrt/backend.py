"""The TensorRT backend: TensorRT and TensorRT-RTX engines on an NVIDIA GPU, with memory and streams of PyTorch.

Mistakes with TensorRT often go unnoticed. These rules prevent them:

* Work on streams is ordered. The engines' stream waits for uploads, and downloads wait for it (`_submit`). For tensors,
  it waits for the caller's stream, and the caller's for it (`Gpu.ordered`).
* Memory that one stream allocates and another one uses is not reused too early (`Gpu.keep_for`).
* The result of every call that reports success is checked (`_must`); a failed launch leaves the old output in place.
* A shape that no profile accepts is refused before anything runs (`split`). The output shape that TensorRT infers must
  equal the expected one.
* Each output is new memory, which belongs to the caller.
* Scratch memory is allocated for the current shape, not for the largest one.
* An engine is read when its direction is first used.
* A build runs only if it fits the graphs, this GPU and the installed TensorRT (`samekit.engine.builds`), and only if
  its results were compared with those of the graphs on such a GPU (`samekit.tensorrt.check`).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar

from samekit.arrays import fill_batch
from samekit.backends.base import Backend, BackendOptions, keep_for_ever
from samekit.engine.fingerprint import NARROW, capability_name
from samekit.engine.spec import Direction, opposite
from samekit.tensorrt.gpu import Gpu, pytorch_errors
from samekit.tensorrt.runner import EngineRunner, Piece, split

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from samekit.arrays import Array
    from samekit.engine.builds import Build
    from samekit.engine.records import Tuning
    from samekit.engine.spec import EngineSpec


class TensorRTBackend(Backend):
    """Runs the engines of a build."""

    name: ClassVar[str] = "tensorrt"
    device = "cuda"
    # Longer windows would need the wide profile, which accepts no batches.
    longest_window: int | None = NARROW.latents[2]
    # The GPU runs one batch while the next one is cut and uploaded, and the last one is downloaded.
    most_pending = 2

    def __init__(
        self,
        spec: EngineSpec,
        build: Build,
        module: Any,
        gpu: Gpu,
        options: BackendOptions,
        tuning: Tuning | None = None,
    ) -> None:
        tuned_batch = tuning.window_batch if tuning else None
        super().__init__(spec, build.fingerprint.precision, options.window_batch or tuned_batch)
        self.device_id = options.device_id
        self.build = build
        """The engines that it runs."""
        self.gpu = gpu
        """Where it runs them."""
        self._windows = tuning.windows if tuning else {}
        if self._windows:
            # Perhaps longer windows are faster, although they run one by one.
            self.longest_window = max(NARROW.latents[2], *self._windows.values())
        self._module = module
        self._cuda_graph = options.cuda_graph
        self._runners: dict[str, EngineRunner] = {}
        # An execution context serves one caller at a time.
        self._busy = threading.Lock()

    def default_window(self, direction: Direction) -> int:
        return self._windows.get(direction) or super().default_window(direction)

    def _runner(self, direction: Direction) -> EngineRunner:
        """Return the engine of a direction; the caller holds `_busy`."""
        # Another thread may have closed the backend meanwhile.
        self._check_open()
        if direction not in self._runners:
            data = self.build.read(direction)
            origin = str(self.build.folder / self.build.engines[direction].file)
            # Kernels are for one GPU and driver.
            cache = f"{direction}-{capability_name(self.gpu.capability)}-cuda{self.gpu.driver}.cache"
            with self.gpu.on(self.gpu.engines):
                self._runners[direction] = EngineRunner(
                    self._module,
                    data,
                    origin,
                    self.gpu,
                    cuda_graph=self._cuda_graph,
                    host_code=self.build.fingerprint.options.later_versions,
                    cache=self.build.folder / cache,
                )
        return self._runners[direction]

    def _run(self, direction: Direction, array: Array) -> Array:
        return self._submit(direction, [array], array.shape)()

    def _submit(self, direction: Direction, pieces: Sequence[Array], shape: tuple[int, ...]) -> Callable[[], Array]:
        """Enqueue upload, run and download of a batch. The lock is held only while work is enqueued."""
        # Shapes are refused before anything is copied.
        latents, parts = self._split(direction, shape)
        output_shape = self.spec.input_shape(opposite(direction), shape[0], latents)
        gpu = self.gpu
        with pytorch_errors(shape):
            staged, result = gpu.pinned(shape), gpu.pinned(output_shape)
            fill_batch(staged.numpy(), pieces)
            with self._busy:
                runner = self._runner(direction)
                with gpu.on(gpu.uploads):
                    source = gpu.empty(shape)
                    gpu.keep_for(source, gpu.engines)
                    gpu.copy(source, staged)
                with gpu.on(gpu.engines):
                    gpu.engines.wait_stream(gpu.uploads)
                    output = gpu.empty(output_shape)
                    gpu.keep_for(output, gpu.downloads)
                    self._enqueue(runner, parts, source, output)
                with gpu.on(gpu.downloads):
                    gpu.downloads.wait_stream(gpu.engines)
                    gpu.copy(result, output)
                    done = gpu.event()

        def fetch() -> Array:
            with pytorch_errors(shape):
                done.synchronize()
            # A copy, because pinned memory is scarce.
            array: Array = result.numpy().copy()
            return array

        return fetch

    @staticmethod
    def _enqueue(runner: EngineRunner, parts: list[Piece], source: Any, output: Any) -> None:
        """Run a batch in the parts that the profiles accept."""
        for part in parts:
            runner.run(part.profile, source[part.rows], output[part.rows])

    def accepts(self, value: Any) -> bool:
        """Return whether a value is a float32 tensor on this GPU, whose memory holds its values as they are."""
        if not self.gpu.contains(value) or value.is_neg():
            return False
        return (str(value.dtype), str(value.layout)) == ("torch.float32", "torch.strided")

    def _run_tensor(self, direction: Direction, tensor: Any) -> Any:
        latents, parts = self._split(direction, tensor.shape)
        with self._busy, pytorch_errors(tensor.shape):
            runner = self._runner(direction)
            # On the caller's stream, because the output is the caller's.
            tensor = tensor.detach().contiguous()
            output = self.gpu.empty(self.spec.input_shape(opposite(direction), tensor.shape[0], latents))
            with self.gpu.ordered():
                self._enqueue(runner, parts, tensor, output)
            return output

    def _split(self, direction: Direction, shape: Any) -> tuple[int, list[Piece]]:
        """Return the latents of an input of this shape, and the pieces in which it runs."""
        latents = int(shape[-1]) // self.spec.layout(direction)[1]
        return latents, split(int(shape[0]), latents)

    def after_fork(self) -> None:
        """Drop everything on the GPU, which can be neither used nor freed in a forked process."""
        super().after_fork()
        keep_for_ever((self._runners, self.gpu))
        self._runners = {}
        # A thread of the parent may have held the old lock.
        self._busy = threading.Lock()

    def close(self) -> None:
        """Free the engines and their memory."""
        with self._busy:
            super().close()
            for runner in self._runners.values():
                runner.close()
            self._runners.clear()
