"""PyTorch, eager: the fallback where no engine was exported, and the oracle of the others."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from samekit.backends.base import Backend, BackendOptions
from samekit.errors import BackendError, BackendUnavailableError, CheckpointError, EngineNotFoundError, first_line
from samekit.spec import ENCODER
from samekit.store import places

if TYPE_CHECKING:
    from samekit.arrays import Array
    from samekit.spec import EngineSpec

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
        self._where = torch.device(self.place)
        self._dtype = torch.float16 if options.precision == "fp16" else torch.float32
        self._model = model.to(self._where, self._dtype)
        if options.threads:
            torch.set_num_threads(options.threads)

    def _run(self, half: str, array: Array) -> Array:
        run = self._model.encode if half == ENCODER else self._model.decode
        # TF32 has 10 bits of mantissa, and convolutions would use it unasked.
        with self._torch.inference_mode(), self._torch.backends.cudnn.flags(allow_tf32=False):
            # A copy: PyTorch warns of sharing memory that is read-only.
            try:
                tensor = self._torch.tensor(array, dtype=self._dtype, device=self._where)
                result: Array = run(tensor).float().cpu().numpy()
            except RuntimeError as error:
                raise BackendError(
                    f"PyTorch failed on {list(array.shape)} ({first_line(error)}); try a smaller window"
                ) from error
        return result

    def close(self) -> None:
        """Let the weights go."""
        super().close()
        self._model = None


def load_checkpoint(name: str, source: dict[str, Any] | None) -> Any:
    """The checkpoint of an engine (`source`) or of a name, through the export package.

    Raises:
        EngineNotFoundError: there is no engine and no checkpoint of that name.
        BackendUnavailableError: the export package or what it needs for this is not installed.
        CheckpointError: the checkpoint cannot be loaded.
    """
    try:
        from samekit_export.checkpoint import BUNDLED_FOLDERS, hub_repository, load, load_source  # noqa: PLC0415

        is_here = os.path.isdir(name) or name in BUNDLED_FOLDERS  # noqa: PTH112 see checkpoint.load
        on_hub = source.get("kind") == "hub" if source else not is_here
        if not source and not is_here:
            # Before anything is advised for a name of nothing.
            try:
                hub_repository(name)
            except CheckpointError as error:
                raise EngineNotFoundError(f"no engine for {name!r} in {places()}, and {error}") from None
        # The export package imports these where it needs them, too late to say what is missing.
        for package in ("torch", "safetensors", "onnx", "onnxscript", *(("huggingface_hub",) if on_hub else ())):
            import_module(package)
    except ImportError as error:
        raise BackendUnavailableError(
            f"the torch backend needs PyTorch and what exports need ({error}); run: pip install 'samekit[export]'"
        ) from None
    if source:
        return load_source(source)
    # First, as the hub may let one wait.
    logger.warning("no engine for %s: opening it in PyTorch, slower; for an engine run: samekit export %s", name, name)
    return load(name)


def open_eager(checkpoint: Any, options: BackendOptions) -> EagerBackend:
    """The eager backend of a loaded checkpoint."""
    from samekit_export.export import spec_of  # noqa: PLC0415
    from samekit_export.model import Same  # noqa: PLC0415

    return EagerBackend(spec_of(checkpoint), Same.from_checkpoint(checkpoint), options)
