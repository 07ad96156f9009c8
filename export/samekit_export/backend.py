"""The PyTorch backend: it runs models that were not exported, and is the reference for all other backends."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from samekit.backends.base import Backend, BackendOptions, keep_for_ever
from samekit.backends.cpu import available_cpus
from samekit.engine.spec import ENCODER, Direction
from samekit.errors import BackendError, BackendUnavailableError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.arrays import Array
    from samekit.engine.spec import EngineSpec
    from samekit_export.model import Same


class EagerBackend(Backend):
    """Runs the modules of a checkpoint in PyTorch."""

    name: ClassVar[str] = "torch"

    def __init__(self, spec: EngineSpec, model: Same, options: BackendOptions) -> None:
        super().__init__(spec, options.precision, options.window_batch)
        if options.precision == "int8":
            raise BackendUnavailableError('the torch backend has no int8; use backend="onnxruntime"')
        cuda = torch.cuda.is_available()
        if options.device == "cuda" and not cuda:
            raise BackendUnavailableError("PyTorch finds no CUDA device; choose device cpu")
        self.device = options.device or ("cuda" if cuda else "cpu")
        self.device_id = options.device_id
        self._dtype = torch.float16 if options.precision == "fp16" else torch.float32
        self._model: Any = model.to(self.torch_device, self._dtype)
        # PyTorch counts the cores of its affinity mask, but does not respect a CPU quota.
        threads = options.threads or min(torch.get_num_threads(), available_cpus())
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _run(self, direction: Direction, array: Array) -> Array:
        run = self._model.encode if direction == ENCODER else self._model.decode
        with torch.inference_mode(), torch.autocast(self.device, enabled=False), _exact_products.held():
            try:
                # A copy: PyTorch warns if it shares read-only memory.
                tensor = torch.tensor(array, dtype=self._dtype, device=self.torch_device)
                result: Array = run(tensor).float().cpu().numpy()
            except RuntimeError as error:
                raise BackendError(
                    f"PyTorch failed on {list(array.shape)} ({first_line(error)}); try a smaller window"
                ) from error
        return result

    def after_fork(self) -> None:
        """Compute in one thread: the OpenMP of PyTorch's builds hangs in a forked process that asks for more."""
        _exact_products.after_fork()
        if self.device == "cpu":
            torch.set_num_threads(1)
        else:
            super().after_fork()
            keep_for_ever(self._model)

    def close(self) -> None:
        """Release the weights."""
        super().close()
        self._model = None


@contextmanager
def pytorch_defaults() -> Iterator[None]:
    """Compute in float32 on the CPU, even if the user has set other defaults or autocast in PyTorch."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)


class _ExactProducts:
    """Compute float32 products exactly while any thread is in `held`.

    PyTorch's settings apply to the whole process. The user's settings, such as
    `torch.set_float32_matmul_precision("medium")`, and the default for convolutions on GPUs allow bfloat16 or TF32,
    whose significands have 8 and 11 bits.
    """

    SETTINGS = (("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
    """Backend and kind of each setting in `torch.backends`; PyTorch requires those of `rnn` and `conv` to be equal."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[tuple[Any, str]] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the exact settings, and restore the user's when the last thread leaves."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                settings = [getattr(getattr(torch.backends, backend), kind) for backend, kind in self.SETTINGS]
                self._before = [(setting, setting.fp32_precision) for setting in settings]
                for setting in settings:
                    setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()

    def after_fork(self) -> None:
        """Restore the user's settings in a forked process, where the threads that held them do not exist."""
        self._lock = threading.Lock()
        if self._users:
            self._users = 0
            self._restore()

    def _restore(self) -> None:
        for setting, precision in self._before:
            # "none" makes a setting follow the wider one again, if it did so before.
            setting.fp32_precision = "none"
            if setting.fp32_precision != precision:
                setting.fp32_precision = precision


_exact_products = _ExactProducts()
