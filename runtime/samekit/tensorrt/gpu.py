"""One CUDA device, used through PyTorch: its memory, and the order of work on its streams."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from samekit.backends.base import driver_version, has_driver
from samekit.errors import BackendError, BackendUnavailableError, SamekitError, first_line
from samekit.packages import import_package, install_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@contextmanager
def pytorch_errors(shape: Sequence[int]) -> Iterator[None]:
    """Raise what PyTorch raises in the `with` block, such as a lack of memory, as a BackendError about an input."""
    try:
        yield
    except SamekitError:
        raise
    except RuntimeError as error:
        raise BackendError(f"the GPU failed on {list(shape)} ({first_line(error)}); try a smaller window") from error


class Gpu:
    """One CUDA device. The constructor raises BackendUnavailableError if it cannot be used."""

    def __init__(self, device_id: int) -> None:
        # Checked before PyTorch is imported, which takes a second.
        if not has_driver():
            raise BackendUnavailableError("there is no NVIDIA driver, which TensorRT needs; use another backend")
        torch = import_package("torch", install_command("gpu"))
        if not torch.cuda.is_available():
            raise BackendUnavailableError("PyTorch finds no CUDA device, which TensorRT needs; use another backend")
        if device_id >= torch.cuda.device_count():
            raise BackendUnavailableError(
                f"there is no GPU {device_id}, only {torch.cuda.device_count()}; choose device_id from 0"
            )
        self._torch = torch
        self._device = torch.device("cuda", device_id)
        self.device_id = device_id
        """The number of the GPU."""
        # Copies run on streams of their own, so that they overlap with the engines. TensorRT synchronises the whole
        # device when it runs on the default stream.
        self.uploads, self.engines, self.downloads = (torch.cuda.Stream(self._device) for _ in range(3))

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, (major, minor)."""
        major, minor = self._torch.cuda.get_device_capability(self._device)
        return major, minor

    @property
    def name(self) -> str:
        """Name of the GPU, such as `NVIDIA H100 80GB HBM3`."""
        return str(self._torch.cuda.get_device_name(self._device))

    @property
    def driver(self) -> str:
        """The newest version of CUDA that the driver supports, such as `13000`."""
        return str(driver_version())

    def contains(self, value: Any) -> bool:
        """Return whether a value is a tensor in this device's memory."""
        return isinstance(value, self._torch.Tensor) and value.device == self._device

    def pinned(self, shape: tuple[int, ...]) -> Any:
        """Allocate float32 host memory that copies can use while other work runs.

        PyTorch keeps freed blocks for later calls. It does not hand one out again before the copies from and to it that
        were already enqueued are done.
        """
        # Without the device, PyTorch would use memory on the first GPU too.
        with self._torch.cuda.device(self._device):
            return self._torch.empty(shape, dtype=self._torch.float32, pin_memory=True)

    def empty(self, shape: tuple[int, ...]) -> Any:
        """Allocate float32 memory on the current stream."""
        return self._torch.empty(shape, dtype=self._torch.float32, device=self._device)

    def copy(self, target: Any, source: Any) -> None:
        """Enqueue a copy on the current stream."""
        target.copy_(source, non_blocking=True)

    def keep_for(self, tensor: Any, stream: Any) -> None:
        """Keep the memory of a freed tensor from being reused before the work that was enqueued on a stream is done.

        PyTorch by itself waits only for the stream on which the memory was allocated.
        """
        tensor.record_stream(stream)

    def event(self) -> Any:
        """Return an event after all work of the current stream; `synchronize()` waits for it without using the CPU."""
        event = self._torch.cuda.Event(blocking=True)
        event.record()
        return event

    def scratch(self, size: int) -> Any:
        """Allocate bytes on the current stream. PyTorch aligns them to 512, which TensorRT needs."""
        return self._torch.empty(size, dtype=self._torch.uint8, device=self._device)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Make a stream the current one."""
        with self._torch.cuda.device(self._device), self._torch.cuda.stream(stream):
            yield

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Make `engines` the current stream; its work follows the caller's earlier work and precedes its later work.

        All callers share this stream. So memory that the caller's stream wrote may be read, and callers with different
        streams do not overlap.
        """
        with self._torch.cuda.device(self._device):
            callers = self._torch.cuda.current_stream()
            self.engines.wait_stream(callers)
            try:
                with self.on(self.engines):
                    yield
            finally:
                callers.wait_stream(self.engines)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record the work that `launch()` enqueues on `engines` as a CUDA graph.

        The returned function enqueues this work on the current stream.
        """
        graph = self._torch.cuda.CUDAGraph()
        # The default mode fails if another thread allocates memory meanwhile.
        with self._torch.cuda.graph(graph, stream=self.engines, capture_error_mode="thread_local"):
            launch()
        replay: Callable[[], None] = graph.replay
        return replay
