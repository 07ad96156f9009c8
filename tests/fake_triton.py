"""Stand-in for `triton_python_backend_utils`, the module that Triton's Python backend provides to models.

It has the parts that models of samekit use, with the names and the behaviour of release 24.10. Tests put it into
`sys.modules` under the name of that module. `tests/test_triton_server.py` runs the same models on a real server.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    @classmethod
    def from_dlpack(cls, name, capsule):
        return cls(name, np.from_dlpack(_Capsule(capsule)).copy())

    def name(self):
        return self._name

    def as_numpy(self):
        """Return zeros, as servers before 24.11 do with NumPy 2 (triton-inference-server/python_backend#384)."""
        return np.zeros_like(self._array)

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG = range(4)

    def __init__(self, message, code=INTERNAL):
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self._tensors, self._error = output_tensors, error

    def output_tensors(self):
        return self._tensors

    def error(self):
        return self._error


@dataclass
class Request:
    """A request of a client; a streaming model sends its responses to `sent`, and None for the end."""

    arrays: dict[str, np.ndarray]
    cancelled_after: int | None = None
    """Responses after which the client is gone."""
    sent: list[Any] = field(default_factory=list)

    def inputs(self):
        return [Tensor(name, array) for name, array in self.arrays.items()]

    def is_cancelled(self):
        return self.cancelled_after is not None and len(self.sent) >= self.cancelled_after

    def get_response_sender(self):
        return self

    def send(self, response=None, flags=0):
        if response is not None:
            self.sent.append(response)
        if flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.sent.append(None)


class _Capsule:
    """Give a capsule the interface that `numpy.from_dlpack` takes."""

    def __init__(self, capsule):
        self._capsule = capsule

    def __dlpack__(self, **_options):
        return self._capsule

    def __dlpack_device__(self):
        return (1, 0)


def get_input_tensor_by_name(request, name):
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def using_decoupled_model_transaction_policy(config):
    return config.get("model_transaction_policy", {}).get("decoupled", False)
