"""The contract of every backend, and the checks that all of them share.

A backend runs the two halves of one model on whole windows. It knows nothing of files, rates or windows. In and out are
float32 NumPy arrays; an output is the caller's own, never a buffer that the next call writes to; every number of
latents and every batch size from 1 works, or is refused before anything runs; NaN and infinity are errors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from samekit.errors import InputError, NonFiniteError
from samekit.spec import DECODER, ENCODER, EngineSpec

if TYPE_CHECKING:
    from types import TracebackType

    import numpy.typing as npt
    from typing_extensions import Self

    Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BackendOptions:
    """How to open a backend; what a backend has no use for, it ignores."""

    precision: str = "fp32"
    """One of `spec.PRECISIONS`."""
    device: str | None = None
    """`cpu` or `cuda`; None takes the best there is."""
    device_id: int = 0
    """Which GPU."""
    threads: int | None = None
    """CPU threads; None takes every core that this process may use."""
    providers: tuple[str, ...] | None = None
    """ONNX Runtime's execution providers, most wanted first; None chooses by `device`."""


class Backend(ABC):
    """Runs the two halves of one model; a context manager."""

    name: ClassVar[str]
    """What users pass as `backend=`."""
    device: str = "cpu"
    """Where it computes: `cpu` or `cuda`."""

    def __init__(self, spec: EngineSpec, precision: str) -> None:
        self.spec = spec
        self.precision = precision

    def encode(self, audio: Array) -> Array:
        """Audio `[batch, channels, latents * hop]` to latents `[batch, latent_width, latents]`.

        Raises:
            InputError: wrong shape or dtype.
            NonFiniteError: the model produced NaN or infinity.
            BackendError: the backend failed.
        """
        spec = self.spec
        return self._checked(ENCODER, audio, (spec.channels, spec.hop), (spec.latent_width, 1))

    def decode(self, latents: Array) -> Array:
        """Latents `[batch, latent_width, latents]` to audio `[batch, channels, latents * hop]`.

        Raises:
            InputError: wrong shape or dtype.
            NonFiniteError: the model produced NaN or infinity.
            BackendError: the backend failed.
        """
        spec = self.spec
        return self._checked(DECODER, latents, (spec.latent_width, 1), (spec.channels, spec.hop))

    def _checked(self, half: str, array: Array, inward: tuple[int, int], outward: tuple[int, int]) -> Array:
        """Run one half between checks; `inward` and `outward` are features and length of one latent."""
        features, unit = inward
        if array.dtype != np.float32 or array.ndim != 3 or array.shape[1] != features:
            raise InputError(
                f"the {half} takes float32 [batch, {features}, length], got {array.dtype} {list(array.shape)}"
            )
        if array.shape[0] == 0 or array.shape[2] == 0 or array.shape[2] % unit:
            raise InputError(
                f"the {half} takes a batch and a length of at least one latent of {unit}, got {list(array.shape)}"
            )
        result = self._run(half, np.ascontiguousarray(array))
        expected = (array.shape[0], outward[0], array.shape[2] // unit * outward[1])
        if result.shape != expected:
            raise NonFiniteError(f"the {half} returned {list(result.shape)} instead of {list(expected)}")
        if not np.isfinite(result).all():
            cure = "check the input for extreme values"
            if self.precision != "fp32":
                cure = 'use precision "fp32", which cannot overflow here'
            raise NonFiniteError(f"the {self.precision} {half} ({self.name}) produced NaN or infinity; {cure}")
        return result

    @abstractmethod
    def _run(self, half: str, array: Array) -> Array:
        """Run `spec.ENCODER` or `spec.DECODER` on a checked, contiguous array."""

    def close(self) -> None:  # noqa: B027 a backend may have nothing to free
        """Free what the backend holds; it cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
