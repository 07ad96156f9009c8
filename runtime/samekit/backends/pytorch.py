"""PyTorch, eager: the fallback where no engine was exported, and the oracle of the others."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from samekit.backends.base import Backend, BackendOptions, keep_for_ever
from samekit.backends.cpu import available_cpus
from samekit.engine.folder import search_path
from samekit.engine.spec import ENCODER, Direction
from samekit.errors import BackendError, BackendUnavailableError, CheckpointError, EngineNotFoundError, first_line
from samekit.packages import import_package

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.arrays import Array
    from samekit.engine.spec import EngineSpec

logger = logging.getLogger(__name__)


class EagerBackend(Backend):
    """Runs the checkpoint itself in PyTorch."""

    name: ClassVar[str] = "torch"

    def __init__(self, spec: EngineSpec, model: Any, options: BackendOptions) -> None:
        super().__init__(spec, options.precision, options.window_batch)
        import torch  # noqa: PLC0415

        if options.precision == "int8":
            raise BackendUnavailableError('the torch backend has no int8; use backend="onnxruntime"')
        cuda = torch.cuda.is_available()
        if options.device == "cuda" and not cuda:
            raise BackendUnavailableError("PyTorch finds no CUDA device; choose device cpu")
        self.device = options.device or ("cuda" if cuda else "cpu")
        self.device_id = options.device_id
        self._torch = torch
        self._where = torch.device(self.torch_device)
        self._dtype = torch.float16 if options.precision == "fp16" else torch.float32
        self._model = model.to(self._where, self._dtype)
        # PyTorch counts the cores of its affinity mask, but not a quota.
        threads = options.threads or min(torch.get_num_threads(), available_cpus())
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _run(self, direction: Direction, array: Array) -> Array:
        run = self._model.encode if direction == ENCODER else self._model.decode
        with self._torch.inference_mode(), _as_asked(self._torch, self._where.type):
            # A copy: PyTorch warns of sharing memory that is read-only.
            try:
                tensor = self._torch.tensor(array, dtype=self._dtype, device=self._where)
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
            self._torch.set_num_threads(1)
        else:
            super().after_fork()
            keep_for_ever(self._model)

    def close(self) -> None:
        """Let the weights go."""
        super().close()
        self._model = None


def load_checkpoint(name: str, source: dict[str, Any] | None) -> Any:
    """The checkpoint of an engine (`source`) or of a name, through the export package.

    Raises:
        EngineNotFoundError: there is no engine and no checkpoint of that name.
        BackendUnavailableError: the export package or what it needs for this is not installed.
        BackendError: a package is installed, but cannot be imported.
        CheckpointError: the checkpoint cannot be loaded.
    """
    install = "pip install 'samekit[export]'"
    checkpoints = import_package("samekit_export.checkpoint", install)
    is_here = os.path.isdir(name) or checkpoints.known_name(name) in checkpoints.BUNDLED_FOLDERS  # noqa: PTH112 see checkpoint.load
    on_hub = source.get("kind") == "hub" if source else not is_here
    if not source and not is_here:
        # Before anything is advised for a name of nothing.
        try:
            checkpoints.hub_repository(checkpoints.known_name(name))
        except CheckpointError as error:
            raise EngineNotFoundError(f"no engine for {name!r} in {search_path()}, and {error}") from None
    # The export package imports these where it needs them, too late to say what is missing.
    for package in ("torch", "safetensors", "onnx", "onnxscript", *(("huggingface_hub",) if on_hub else ())):
        import_package(package, install)
    if source:
        with pytorch_defaults():
            return checkpoints.load_source(source)
    # First, as the hub may let one wait.
    logger.warning("no engine for %s: opening it in PyTorch, slower; for an engine run: samekit export %s", name, name)
    with pytorch_defaults():
        return checkpoints.load(name)


def open_eager(checkpoint: Any, options: BackendOptions) -> EagerBackend:
    """The eager backend of a loaded checkpoint."""
    from samekit_export.model import Same  # noqa: PLC0415
    from samekit_export.model_spec import spec_of  # noqa: PLC0415

    with pytorch_defaults():
        return EagerBackend(spec_of(checkpoint), Same.from_checkpoint(checkpoint), options)


@contextmanager
def pytorch_defaults() -> Iterator[None]:
    """Create tensors as float32 on the CPU unless told otherwise, whatever the user has set for new tensors."""
    import torch  # noqa: PLC0415

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


class _ExactProducts:
    """PyTorch's settings of float32 products, which are the whole process's: exact while any thread asks for it.

    Otherwise the user's choice, such as `torch.set_float32_matmul_precision("medium")`, and a default for convolutions
    on GPUs would let them be computed in bfloat16 or TF32, which have 8 and 11 bits.
    """

    SETTINGS = (("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
    """In `torch.backends`. The settings for recurrent networks must equal those of convolutions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[tuple[Any, str]] = []

    def after_fork(self) -> None:
        """Restore the user's settings in a forked process, where the threads that held them do not exist."""
        self._lock = threading.Lock()
        if self._users:
            self._users = 0
            self._restore()

    @contextmanager
    def held(self, torch: Any) -> Iterator[None]:
        """Hold the settings."""
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

    def _restore(self) -> None:
        """Set what the user had set."""
        for setting, precision in self._before:
            # First as one that follows a wider setting, in case it was one.
            setting.fp32_precision = "none"
            if setting.fp32_precision != precision:
                setting.fp32_precision = precision


_exact_products = _ExactProducts()


@contextmanager
def _as_asked(torch: Any, device: str) -> Iterator[None]:
    """Compute in the dtypes of the model, whatever the user has set for the calling thread or the process."""
    with torch.autocast(device, enabled=False), _exact_products.held(torch):
        yield
