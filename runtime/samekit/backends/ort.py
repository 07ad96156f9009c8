"""ONNX Runtime: the embedded default on any CPU, and a way onto NVIDIA GPUs through its CUDA and TensorRT providers."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, ClassVar

from samekit.backends.base import Backend, BackendOptions
from samekit.errors import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    from samekit.backends.base import Array
    from samekit.store import Engine

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"


class OnnxRuntimeBackend(Backend):
    """Runs an engine folder's ONNX graphs; each half is opened when it is first used."""

    name: ClassVar[str] = "onnxruntime"

    def __init__(self, engine: Engine, options: BackendOptions) -> None:
        super().__init__(engine.spec, options.precision)
        try:
            import onnxruntime  # noqa: PLC0415
        except ImportError as error:
            raise BackendUnavailableError(
                f"onnxruntime cannot be imported ({error}); run: pip install 'samekit[cpu]' or 'samekit[gpu]'"
            ) from None
        self._runtime = onnxruntime
        self._engine = engine
        self._threads = options.threads or available_cpus()
        self._providers = self._choose_providers(options)
        self.device = "cpu" if self._providers[0][0] == CPU_PROVIDER else "cuda"
        self._sessions: dict[str, Any] = {}
        self._opening = threading.Lock()
        # A missing precision or a damaged folder must show now, not at the first clip.
        for half in engine.spec.contexts:
            engine.graph(half, options.precision)

    def _choose_providers(self, options: BackendOptions) -> list[tuple[str, dict[str, Any]]]:
        """Providers with their settings, all of them known to this build."""
        known = self._runtime.get_available_providers()
        if options.providers is not None:
            wanted = options.providers
        elif options.device == "cuda" or (options.device is None and CUDA_PROVIDER in known):
            wanted = (CUDA_PROVIDER, CPU_PROVIDER)
        else:
            wanted = (CPU_PROVIDER,)
        for provider in wanted:
            if provider not in known:
                raise BackendUnavailableError(
                    f"this onnxruntime has no {provider} (it has {', '.join(known)}); "
                    "run: pip install onnxruntime-gpu, or choose another provider"
                )
        return [(p, {} if p == CPU_PROVIDER else {"device_id": options.device_id}) for p in wanted]

    def _session(self, half: str) -> Any:
        """The half's session, opened once."""
        with self._opening:
            if half not in self._sessions:
                self._sessions[half] = self._open(half)
            return self._sessions[half]

    def _open(self, half: str) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        # Subnormal products cost hundreds of cycles each and nothing that fp32 can show.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        path = self._engine.graph(half, self.precision)
        try:
            session = self._runtime.InferenceSession(path, options, providers=self._providers)
        except Exception as error:  # noqa: BLE001 the runtime's exceptions share no base class
            raise BackendError(f"{path}: ONNX Runtime cannot open it ({_first_line(error)}); export it again") from None
        # A provider that cannot start is dropped with a warning only, and the CPU takes its place.
        wanted = self._providers[0][0]
        if wanted not in session.get_providers():
            raise BackendUnavailableError(
                f"{wanted} did not start, see ONNX Runtime's log; install CUDA and cuDNN as its documentation says, "
                "or choose device cpu"
            )
        return session

    def _run(self, half: str, array: Array) -> Array:
        session = self._session(half)
        try:
            (result,) = session.run(None, {session.get_inputs()[0].name: array})
        except Exception as error:  # noqa: BLE001 the runtime's exceptions share no base class
            raise BackendError(
                f"ONNX Runtime failed on {list(array.shape)} ({_first_line(error)}); try a smaller window"
            ) from None
        output: Array = result
        return output

    def close(self) -> None:
        """Free both sessions."""
        self._sessions.clear()


def _first_line(error: Exception) -> str:
    """The first line of a message, or the error's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def available_cpus() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
