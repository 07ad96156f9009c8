"""One CUDA device, used through PyTorch: its memory, and the order of work on its streams."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from samekit.backends.base import has_driver
from samekit.errors import BackendError, BackendUnavailableError, SamekitError, first_line
from samekit.packages import import_package

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from samekit.arrays import Array


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

    def contains(self, value: Any) -> bool:
        """Return whether a value is a tensor in this device's memory."""
        return isinstance(value, self._torch.Tensor) and value.device == self._device

    def upload(self, array: Array) -> Any:
        """Copy an array to device memory."""
        # `from_numpy` warns of arrays that are read-only.
        return self._torch.tensor(array, device=self._device)

    def download(self, tensor: Any) -> Array:
        """Copy a tensor to host memory; waits for all work that writes it."""
        array: Array = tensor.cpu().numpy()
        return array

    def empty(self, shape: tuple[int, ...]) -> Any:
        """Allocate float32 memory."""
        return self._torch.empty(shape, dtype=self._torch.float32, device=self._device)

    def scratch(self, size: int) -> Any:
        """Allocate bytes. PyTorch aligns them to 512, which TensorRT needs."""
        return self._torch.empty(size, dtype=self._torch.uint8, device=self._device)

    @contextmanager
    def ordered(self) -> Iterator[int]:
        """Yield the handle of a stream whose work follows the caller's earlier work and precedes its later work.

        All callers share this stream, and it is PyTorch's current stream in the `with` block. So memory that the
        caller's stream wrote may be read, and callers with different streams do not overlap. PyTorch reuses freed
        memory on the stream on which it was allocated, so none is handed out too early.
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
        """Record the work that `launch(stream)` enqueues as a CUDA graph.

        The returned function enqueues this work on the current stream.
        """
        torch = self._torch
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                launch(self._stream.cuda_stream)
        replay: Callable[[], None] = graph.replay
        return replay
