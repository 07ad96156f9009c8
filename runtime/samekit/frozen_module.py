"""The methods of `torch.nn.Module` that scripts call on a model that they do not train."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from samekit.arrays import is_tensor, reachable_device
from samekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from samekit.backends.base import Backend


class FrozenModule:
    """A model that scripts use like a `torch.nn.Module` in evaluation mode; it has no gradients.

    As in PyTorch, a method that converts changes this object and returns it. PyTorch is not needed.
    """

    training: Literal[False] = False
    """The model is always in evaluation mode."""

    def __init__(self, backend: Backend) -> None:
        self.returns_half = False
        """Whether results are float16, as those of a model after `half`; otherwise they are float32."""
        self._use(backend)

    if not TYPE_CHECKING:  # A type checker would take every name for an attribute.

        def __getattr__(self, name: str) -> Any:
            """Explain why an attribute of a module, such as `encoder` or `state_dict`, is missing."""
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}: it is an engine without layers and weights of "
                "PyTorch; for these, use the checkpoint in PyTorch"
            )

    def _use(self, backend: Backend) -> None:
        """Compute with this backend from now on."""
        self.backend = backend
        """Runs the model; closing it closes the model."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """Yield one value that has the device and the dtype of the model, for scripts that ask for these.

        It is a tensor of one zero if PyTorch has been imported. Otherwise it is an object with these two attributes.
        The weights themselves are in the engine.
        """
        name = "float16" if self.returns_half else "float32"
        torch: Any = sys.modules.get("torch")
        # Another thread may be importing it.
        if not hasattr(torch, "zeros"):
            yield SimpleNamespace(device=self.backend.torch_device, dtype=np.dtype(name), requires_grad=False)
        else:
            device = reachable_device(self.backend.torch_device, "cpu")
            yield torch.zeros(1, dtype=getattr(torch, name), device=device)

    @property
    def device(self) -> Any:
        """The device of results."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> Any:
        """The type of results: float32, or float16 after `half`."""
        return next(self.parameters()).dtype

    def eval(self) -> Self:
        """Return this object, which is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Return this object if `mode` is False.

        Raises:
            InputError: `mode` is True, because the weights of an engine cannot change.
        """
        if mode:
            raise InputError(
                "the model is an engine, which cannot be trained; train the checkpoint in PyTorch and export it again"
            )
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Return this object if `requires_grad` is False.

        Raises:
            InputError: `requires_grad` is True, because engines compute no gradients.
        """
        if requires_grad:
            raise InputError(
                "the model is an engine, which computes no gradients; call requires_grad_(False), or use the "
                "checkpoint in PyTorch"
            )
        return self

    def half(self) -> Self:
        """Compute in fp16 and return float16 from now on. This opens the fp16 graphs of the same engine folder.

        Raises:
            BackendUnavailableError: the model was not exported in fp16; the message contains the command that does it.
            BackendError: the backend was not opened by a path or a name.
        """
        return self._compute_in("fp16")

    def float(self) -> Self:
        """After `half`, compute in fp32 and return float32 from now on; errors as of `half`.

        A model that returns float32 is not changed, whatever the precision in which it was opened.
        """
        return self._compute_in("fp32")

    def _compute_in(self, precision: Literal["fp16", "fp32"]) -> Self:
        half = precision == "fp16"
        if half != self.returns_half:
            if self.backend.precision != precision:
                self._use(self.backend.with_precision(precision))
            self.returns_half = half
        return self

    def cpu(self) -> Self:
        """Return this object if it is on the CPU; errors as of `to`."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Self:
        """Return this object if it is on that GPU; errors as of `to`."""
        return self.to("cuda" if device is None else device)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert to a dtype, or check the device. Takes a device, a dtype, both, or a tensor that has both.

        Raises:
            InputError: another device than the one that the model is on, or neither float32 nor float16.
            BackendUnavailableError, BackendError: as of `half`.
        """
        wanted = []
        # A third positional argument says whether to copy asynchronously.
        for value in (*args[:2], *(kwargs.get(name) for name in ("device", "dtype", "tensor"))):
            wanted += [value.device, value.dtype] if is_tensor(value) else [value]
        for value in wanted:
            # The text of a dtype begins with the module's name, that of a device does not.
            if str(value).startswith("torch."):
                self._convert(str(value))
            elif value is not None and not isinstance(value, bool):
                self._check_device(f"cuda:{value}" if isinstance(value, int) else str(value))
        return self

    def _convert(self, dtype: str) -> None:
        if dtype not in ("torch.float32", "torch.float16"):
            raise InputError(f"engines compute in float32 or float16, not in {dtype}; pass one of these")
        self._compute_in("fp16" if dtype == "torch.float16" else "fp32")

    def _check_device(self, device: str) -> None:
        here = self.backend.torch_device
        kind = here.partition(":")[0]
        # A GPU that PyTorch does not see is the CPU for scripts.
        if device not in (here, kind, str(self.device)) and (device, here) != ("cpu:0", "cpu"):
            if device.partition(":")[0] not in ("cpu", "cuda"):
                raise InputError(f"engines run on cpu and cuda, not on {device}; leave the model on {here}")
            raise InputError(
                f"the model is on {here} and cannot be moved to {device}; "
                f"open it there: from_pretrained(..., device={device!r})"
            )
