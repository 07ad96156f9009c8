"""The contract of every backend, and the checks that all backends share.

A backend runs the encoder and the decoder of one model on whole windows. Inputs and outputs are float32 NumPy arrays.
The caller owns each output: the next call does not write to it. Every batch size and every number of latents from 1
works, or is refused before anything runs. NaN and infinity in an output are errors.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from samekit.arguments import MOST_THREADS, check_flag, check_whole
from samekit.arrays import as_one_batch, batch_shape, is_tensor
from samekit.engine.gpu_cost import GPU_WINDOW, gpu_cost
from samekit.engine.spec import DECODER, DEVICES, ENCODER, RUN_PRECISIONS, Direction, EngineSpec, opposite
from samekit.errors import BackendError, BackendUnavailableError, InputError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from samekit.arrays import Array

_CUDA_ERROR_NO_DEVICE: Final = 100

# Default windows on CPUs have at least this many latents.
_LEAST_WINDOW: Final = 128


@dataclass(frozen=True)
class BackendOptions:
    """How to open a backend. A backend ignores the fields that do not apply to it.

    Raises:
        InputError: a value that no backend can use.
    """

    precision: str = "fp32"
    """One of `spec.RUN_PRECISIONS`."""
    device: str | None = None
    """One of `spec.DEVICES`; None takes the best of `cpu` and `cuda` that is available."""
    device_id: int = 0
    """The number of the GPU, or of the device of a plugin's provider."""
    threads: int | None = None
    """CPU threads; None takes every core that this process may use. PyTorch has one setting for the whole process."""
    providers: tuple[str, ...] | None = None
    """ONNX Runtime's execution providers, the preferred one first; None chooses by `device`. Those of installed
    packages `onnxruntime-ep-*` can be named too."""
    provider_options: Mapping[str, str] | None = None
    """Options of the first provider, as its documentation names them."""
    window_batch: int | None = None
    """Most windows that run as one batch, which bounds the memory. None takes 1 on CPUs, where more is no faster, and
    4 or 8 on GPUs, see `samekit.engine.gpu_cost`."""
    cuda_graph: bool = False
    """TensorRT only: run a shape that repeats as one CUDA graph, whose memory stays allocated."""

    def __post_init__(self) -> None:
        if self.precision not in RUN_PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}; choose one of {', '.join(RUN_PRECISIONS)}")
        if self.device not in (None, *DEVICES):
            raise InputError(
                f"device {self.device!r} is not supported; choose one of {', '.join(DEVICES)}, "
                "and which GPU by device_id"
            )
        check_whole("device_id", self.device_id, least=0)
        if self.threads is not None:
            check_whole("threads", self.threads, least=1, most=MOST_THREADS)
        if self.window_batch is not None:
            check_whole("window_batch", self.window_batch, least=1)
        if self.providers is not None:
            is_list = isinstance(self.providers, (tuple, list)) and len(self.providers) > 0
            if not (is_list and all(isinstance(name, str) for name in self.providers)):
                raise InputError(f"providers is {self.providers!r}; pass a tuple of names, or None to choose by device")
            object.__setattr__(self, "providers", tuple(self.providers))
        if self.provider_options is not None:
            options = self.provider_options
            if not (isinstance(options, Mapping) and all(isinstance(x, str) for pair in options.items() for x in pair)):
                raise InputError(f"provider_options is {options!r}; pass a dict of texts, such as {{'device_id': '0'}}")
            object.__setattr__(self, "provider_options", dict(options))
        check_flag("cuda_graph", self.cuda_graph)


def _driver() -> Any:
    """Load the library of NVIDIA's driver; return None if that is impossible."""
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None


def has_driver() -> bool:
    """Return whether the library of NVIDIA's driver can be loaded."""
    return _driver() is not None


def driver_version() -> int:
    """Return the newest version of CUDA that NVIDIA's driver supports, such as 13000; 0 without a driver."""
    driver, version = _driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return 0
    return version.value


def count_gpus() -> int:
    """Return how many GPUs CUDA offers this process; `CUDA_VISIBLE_DEVICES` can hide some.

    A process that is forked from this one afterwards cannot use CUDA.

    Raises:
        BackendUnavailableError: the driver does not work.
    """
    driver, count = _driver(), ctypes.c_int()
    if driver is None:
        return 0
    # Both return a CUresult; the second one is only called after success.
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error not in (0, _CUDA_ERROR_NO_DEVICE):
        raise BackendUnavailableError(f"NVIDIA's driver does not work (CUDA error {error}); see what nvidia-smi says")
    return count.value


def keep_for_ever(value: Any) -> None:
    """Keep an object from being destroyed, even when Python ends.

    The sessions of a forked process need this: their destructors wait for threads that exist in the parent only.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


_backends: weakref.WeakSet[Backend] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for backend in list(_backends):
        # A backend whose opening failed lacks attributes, and lives on in the traceback of the error.
        with suppress(AttributeError):
            backend.after_fork()


# Python has this function only on systems that can fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Backend(ABC):
    """Runs the encoder and the decoder of one model; a context manager.

    A backend that `open_backend` opened can be pickled and copied: the copy opens the same files again.
    """

    name: ClassVar[str]
    """The name that users pass as `backend=`."""
    device: str = "cpu"
    """Where it computes: one of `spec.DEVICES`, or `gpu` or `npu` of a plugin of ONNX Runtime."""
    device_id: int = 0
    """The number of the GPU."""
    longest_window: int | None = None
    """Longest default window in latents; None for no limit."""
    most_pending: int = 1
    """How many results of `submit` a caller should leave pending; more than 1 if copies and work overlap."""
    reopening: tuple[Callable[..., Backend], tuple[Any, ...]] | None = None
    """A function and its arguments that open this backend again; None if that is impossible."""

    def __init__(self, spec: EngineSpec, precision: str, window_batch: int | None = None) -> None:
        self.spec = spec
        """Every fact about the model."""
        self.precision = precision
        """The precision that it computes in, one of `spec.RUN_PRECISIONS`."""
        self._window_batch = window_batch
        self._closed = False
        self._lost_to_fork = False
        _backends.add(self)

    @property
    def window_batch(self) -> int:
        """Most windows that run as one batch."""
        return self._window_batch or (1 if self.device == "cpu" else gpu_cost(self.spec).window_batch)

    def default_window(self, direction: Direction) -> int:
        """Latents of a window of a direction if the user chooses none; the caller rounds it to `spec.alignment`."""
        if self.device != "cpu":
            # Longer only for models whose context is a large part of it.
            return max(GPU_WINDOW, 8 * self.spec.contexts[direction])
        # At this length the context, which is computed and dropped, costs at most a sixteenth.
        return max(_LEAST_WINDOW, 32 * self.spec.contexts[direction])

    @property
    def padding(self) -> int:
        """By how many latents a window may be padded with zeros, so that windows of different lengths share a batch.

        0 on CPUs, where a batch is no faster than its windows one by one. On GPUs a call takes as long as some more
        latents, see `samekit.engine.gpu_cost`; the padding is at most the least of these.
        """
        return 0 if self.device == "cpu" else 32

    @property
    def torch_device(self) -> str:
        """Where returned tensors lie, as PyTorch names it: `cpu`, or `cuda:N`."""
        return f"cuda:{self.device_id}" if self.device == "cuda" else "cpu"

    def encode(self, audio: Array) -> Array:
        """Encode audio `[batch, channels, latents * hop]` to latents `[batch, latent_width, latents]`; see `run`."""
        return self.run(ENCODER, audio)

    def decode(self, latents: Array) -> Array:
        """Decode latents `[batch, latent_width, latents]` to audio `[batch, channels, latents * hop]`; see `run`."""
        return self.run(DECODER, latents)

    def run(self, direction: Direction, array: Array) -> Array:
        """Encode (`spec.ENCODER`) or decode (`spec.DECODER`) an array.

        Raises:
            InputError: wrong shape or dtype.
            NonFiniteError: the model produced NaN or infinity.
            BackendError: the backend failed, or is closed.
        """
        return self._submit_arrays(direction, [array])()

    def submit(self, direction: Direction, pieces: Sequence[Any]) -> Callable[[], Any]:
        """Start to encode or decode several pieces as one batch.

        The default starts when the result is fetched, because a CPU gains nothing from a second batch.

        Args:
            direction: `spec.ENCODER` or `spec.DECODER`.
            pieces: arrays as `run` takes them, or tensors of one length as `run_tensor` takes them. Arrays that are
                shorter than the longest one are padded with zeros at the end. They must not change before the result
                is fetched.

        Returns:
            A function that waits for the result and returns it. Call it once, in the order of the submissions.

        Raises:
            InputError, NonFiniteError, BackendError: as `run`; this method and the returned function raise them.
        """
        if is_tensor(pieces[0]):
            return self._submit_tensor(direction, as_one_batch(pieces))
        return self._submit_arrays(direction, pieces)

    def _submit_arrays(self, direction: Direction, pieces: Sequence[Array]) -> Callable[[], Array]:
        self._check_open()
        for piece in pieces:
            self._check_input(direction, str(piece.dtype), piece.shape)
        shape = batch_shape(pieces)
        fetch = self._submit(direction, pieces, shape)

        def result() -> Array:
            self._check_open()
            array = fetch()
            self._check_output(direction, shape, array.shape, finite=bool(np.isfinite(array).all()))
            return array

        return result

    def accepts(self, value: Any) -> bool:
        """Return whether `run_tensor` takes a value: a float32 tensor in the memory of this backend's device."""
        return False

    def run_tensor(self, direction: Direction, tensor: Any) -> Any:
        """Encode or decode a tensor that the backend `accepts`, without a copy through the host.

        Returns:
            A new tensor on the same device.

        Raises:
            InputError, NonFiniteError: as `run`.
            BackendError: as `run`, or the backend does not accept the tensor.
        """
        return self._submit_tensor(direction, tensor)()

    def _submit_tensor(self, direction: Direction, tensor: Any) -> Callable[[], Any]:
        self._check_open()
        if not self.accepts(tensor):
            raise BackendError(f"the {self.name} backend cannot read this tensor; pass it as a NumPy array")
        self._check_input(direction, "float32", tensor.shape)
        output = self._run_tensor(direction, tensor)
        finite = output.isfinite().all()

        def result() -> Any:
            # Only this waits for the device.
            self._check_output(direction, tensor.shape, output.shape, finite=bool(finite))
            return output

        return result

    def use_packed_weights(self, direction: Direction) -> None:  # noqa: B027 most backends run every call alike
        """Prepare a direction for many calls. From now on equal inputs give equal outputs, bit for bit."""

    def after_fork(self) -> None:
        """Prepare for use in a forked process, where only the calling thread exists.

        The default refuses every later call, because CUDA does not work in forked processes.
        """
        self._lost_to_fork = True

    def close(self) -> None:
        """Free what the backend holds; it cannot be used afterwards."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Backend], tuple[Any, ...]]:
        """Pickle the call that opens it again.

        Raises:
            BackendError: it is closed, or was not opened from a path or a name.
        """
        self._check_open()
        if self.reopening is None:
            raise BackendError(
                f"this {self.name} backend was not opened by a path or a name, so it cannot be copied, sent to "
                "another process or converted; open the model there, or with another precision"
            )
        return self.reopening

    def with_precision(self, precision: str) -> Backend:
        """Open the same model again, with the same options except for the precision.

        Raises:
            BackendError: this backend is closed, or was not opened by a path or a name.
            SamekitError: as `open_backend`.
        """
        function, arguments = self.__reduce__()
        return function(
            *(replace(each, precision=precision) if isinstance(each, BackendOptions) else each for each in arguments)
        )

    def _submit(self, direction: Direction, pieces: Sequence[Array], shape: tuple[int, ...]) -> Callable[[], Array]:
        """Start to run checked arrays as one batch of this shape."""
        batch = np.ascontiguousarray(as_one_batch(pieces))
        return partial(self._run, direction, batch)

    @abstractmethod
    def _run(self, direction: Direction, array: Array) -> Array:
        """Run a checked, contiguous array."""

    def _run_tensor(self, direction: Direction, tensor: Any) -> Any:
        """Run a checked tensor in device memory; only for backends that accept tensors."""
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(f"this {self.name} backend is closed; open the model again")
        if self._lost_to_fork:
            raise BackendError(
                f"this {self.name} backend was opened on a GPU before this process was forked, and GPUs do not work "
                "in forked processes; start them by spawn, or open the model in each of them"
            )

    def _check_input(self, direction: Direction, dtype: str, shape: Sequence[int]) -> None:
        features, unit = self.spec.layout(direction)
        is_batch = len(shape) == 3 and shape[1] == features and 0 not in shape
        if dtype != "float32" or not is_batch or shape[2] % unit:
            raise InputError(
                f"the {direction} takes float32 [batch, {features}, length], not empty and with a length that is a "
                f"multiple of {unit}, got {dtype} {list(shape)}; pass such an array"
            )

    def _check_output(self, direction: Direction, before: Sequence[int], after: Sequence[int], *, finite: bool) -> None:
        expected = self.spec.input_shape(opposite(direction), before[0], before[2] // self.spec.layout(direction)[1])
        if tuple(after) != expected:
            raise BackendError(
                f"the {direction} returned {list(after)} instead of {list(expected)}; export the model again"
            )
        if not finite:
            cure = "check the input for extreme values"
            if self.precision != "fp32":
                cure = 'use precision "fp32", which cannot overflow here'
            raise NonFiniteError(f"the {self.precision} {direction} ({self.name}) produced NaN or infinity; {cure}")
