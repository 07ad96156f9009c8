"""The class that Triton's Python backend runs for a repository of `samekit triton --backend python`.

The server starts a process for each instance, and imports `model.py` of the repository there, which imports this
module. Clients send whole clips; windows, sample rates and batches are the work of this process.
"""

from __future__ import annotations

import ctypes
import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from samekit.arrays import LATENTS, to_float32
from samekit.backends.cpu import available_cpus
from samekit.engine.spec import DECODER, ENCODER, INPUT_NAMES, opposite
from samekit.errors import InputError, SamekitError
from samekit.model import AutoencoderModel
from samekit.serving.triton import ENGINE_FOLDER, FACTS, MAX_SECONDS, MODEL_BACKEND, SAMPLE_RATE
from samekit.streaming import run_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from samekit.arrays import Array
    from samekit.engine.spec import Direction
    from samekit.windows import Window

T = TypeVar("T")
R = TypeVar("R")

# The prototype is our own, because attributes of `ctypes.pythonapi` are shared with other packages.
_set_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_SetName", ctypes.pythonapi)
)
# The capsule keeps a pointer to these bytes.
_USED: Final = b"used_dltensor"


class TritonPythonModel:
    """Encodes or decodes requests of the server; the server calls `initialize`, `execute` and `finalize`.

    Encoder: `audio` `[batch, channels, samples]` and optionally `sample_rate` `[batch, 1]` to `latents`
    `[batch, latent_width, T]`. Decoder: `latents` to `audio` `[batch, channels, T * hop]`. The numbers are those of
    `AutoencoderModel.encode` and `decode`. A streaming (decoupled) model answers in parts, one for each window.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine of the repository; `args` is described in the documentation of Triton's Python backend.

        Raises:
            SamekitError: the model cannot be opened, which the server reports as the model's state.
        """
        # The server provides this module.
        self._utils = import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._direction: Direction = ENCODER if config["input"][0]["name"] == INPUT_NAMES[ENCODER] else DECODER
        self._streams = self._utils.using_decoupled_model_transaction_policy(config)
        self._max_seconds = int(parameters[MAX_SECONDS])
        on_gpu = args["model_instance_kind"] == "GPU"
        # Instances on the CPU share its cores.
        instances = sum(group["count"] for group in config["instance_group"])
        self._model = AutoencoderModel.from_pretrained(
            Path(args["model_repository"], args["model_version"], ENGINE_FOLDER),
            f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu",
            backend=parameters[MODEL_BACKEND],
            precision=json.loads(parameters[FACTS])["precision"],
            threads=max(1, available_cpus() // instances),
        )
        self._codec = self._model.autoencoder
        backend = self._codec.backend
        backend.use_packed_weights(self._direction)
        # Backends open their files at the first call. The server must not report a model as ready before that.
        backend.run(self._direction, np.zeros(backend.spec.input_shape(self._direction, 1, 1), np.float32))

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests that the server has joined. An unusable request does not affect the others."""
        if self._streams:
            for request in requests:
                self._stream(request)
            return None
        inputs = [_attempt(self._input, request) for request in requests]
        good = [array for array in inputs if not isinstance(array, SamekitError)]
        joined = _attempt(self._run, good)
        if isinstance(joined, SamekitError):
            # One of the requests made the model overflow, or took too much memory.
            results = [_attempt(self._run, [array]) for array in good]
            outputs = iter([result if isinstance(result, SamekitError) else result[0] for result in results])
        else:
            outputs = iter(joined)
        return [self._response(each if isinstance(each, SamekitError) else next(outputs)) for each in inputs]

    def finalize(self) -> None:
        """Free what the model holds."""
        self._model.close()

    def _input(self, request: Any) -> Array:
        """Return the input of a request as the model takes it: `[batch, features, whole latents]`."""
        tensor = self._utils.get_input_tensor_by_name(request, INPUT_NAMES[self._direction])
        # `as_numpy` gives zeros in servers before 24.11 with NumPy 2 (triton-inference-server/python_backend#384).
        array = np.from_dlpack(tensor)
        if self._direction == DECODER:
            self._check_length(len(array) * array.shape[-1], self._model.sample_rate / self._model.downsampling_ratio)
            return to_float32(array, LATENTS)
        given = self._utils.get_input_tensor_by_name(request, SAMPLE_RATE)
        rates: list[int] = [self._model.sample_rate] * len(array)
        if given is not None:
            rates = [int(rate) for rate in np.from_dlpack(given).ravel()]
        # The shorter clips are padded to the longest one.
        self._check_length(len(array) * array.shape[-1], min(rates, default=1))
        batch: Array = self._codec.preprocess_audio_list_for_encoder(list(array), rates)
        return batch

    def _check_length(self, values: int, rate: float) -> None:
        """Refuse audio that is too long before memory for it is allocated. A rate out of range is refused later."""
        if values > self._max_seconds * max(rate, 1):
            raise InputError(
                f"{values / max(rate, 1):.0f} s of audio are more than {self._max_seconds} s, the limit of this "
                "server; send shorter clips"
            )

    def _windows(self, array: Array) -> Iterator[tuple[Window, Array]]:
        """Yield the windows of an input, each with its part of the array."""
        _, unit = self._model.spec.layout(self._direction)
        for window in self._codec.windows(self._direction).over(array.shape[-1] // unit):
            yield window, array[:, :, window.start * unit : window.stop * unit]

    def _run(self, inputs: list[Array]) -> list[Array]:
        """Encode or decode several inputs; windows of one shape can be in one batch."""
        spec = self._model.spec
        _, unit_in = spec.layout(self._direction)
        features, unit = spec.layout(opposite(self._direction))
        outputs = [np.empty((len(each), features, each.shape[-1] // unit_in * unit), np.float32) for each in inputs]
        pieces = [
            (output, *piece) for output, array in zip(outputs, inputs, strict=True) for piece in self._windows(array)
        ]
        pieces.sort(key=lambda piece: piece[2].shape)
        results = run_windows(self._codec.backend, self._direction, ((window, part) for _, window, part in pieces))
        for (output, window, _), kept in zip(pieces, results, strict=True):
            output[:, :, window.core_start * unit : window.core_stop * unit] = kept
        return outputs

    def _stream(self, request: Any) -> None:
        """Send the results of the windows of a request, in order, as the model computes them."""
        sender = request.get_response_sender()
        try:
            for kept in run_windows(self._codec.backend, self._direction, self._windows(self._input(request))):
                if request.is_cancelled():
                    break
                sender.send(self._response(kept))
        except (SamekitError, MemoryError) as error:
            sender.send(self._response(_reported(error)))
        finally:
            sender.send(flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _response(self, result: Array | SamekitError) -> Any:
        """Return the server's form of an output or of an error."""
        utils = self._utils
        if isinstance(result, SamekitError):
            code = utils.TritonError.INVALID_ARG if isinstance(result, InputError) else utils.TritonError.INTERNAL
            return utils.InferenceResponse(error=utils.TritonError(str(result), code))
        capsule = np.ascontiguousarray(result).__dlpack__()
        tensor = utils.Tensor.from_dlpack(INPUT_NAMES[opposite(self._direction)], capsule)
        # The server owns the data now, but names the capsule so that NumPy reports an error when it is deleted.
        _set_capsule_name(capsule, _USED)
        return utils.InferenceResponse([tensor])


def _attempt(function: Callable[[T], R], argument: T) -> R | SamekitError:
    """Return the result of a function, or the error that it raised."""
    try:
        return function(argument)
    except (SamekitError, MemoryError) as error:
        return _reported(error)


def _reported(error: SamekitError | MemoryError) -> SamekitError:
    """Return the error that the client gets."""
    return (
        error if isinstance(error, SamekitError) else InputError("too long for the server's memory; send less at once")
    )
