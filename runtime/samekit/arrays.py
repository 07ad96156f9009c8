"""NumPy arrays and PyTorch tensors in, the same kind out; PyTorch is never imported, only recognised."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]


def is_tensor(value: Any) -> bool:
    """Whether `value` is a PyTorch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_float32(value: Any, name: str, *, empty: bool = False) -> Array:
    """A finite float32 NumPy array of the same values.

    Args:
        value: a NumPy array or PyTorch tensor of float16, bfloat16, float32 or float64, on any device, of any layout.
        name: what to call it in a message.
        empty: whether it may hold no values.

    Raises:
        InputError: another type or dtype, an empty array, NaN or infinity.
    """
    if is_tensor(value):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray):
        raise InputError(f"{name} must be a NumPy array or a PyTorch tensor, it is {type(value).__name__}")
    if value.dtype.kind != "f":
        scale = f"divide by {np.iinfo(value.dtype).max + 1} first" if value.dtype.kind == "i" else "convert it first"
        raise InputError(f"{name} must be floating point in -1 ... 1, it is {value.dtype}; {scale}")
    if value.size == 0 and not empty:
        raise InputError(f"{name} is empty: its shape is {list(value.shape)}")
    with np.errstate(over="ignore"):
        # Not `ascontiguousarray`, which makes a clip of one sample out of a single number.
        array = np.asarray(value, dtype=np.float32, order="C")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN, infinity or values beyond float32; repair the input")
    return array


def as_one_batch(pieces: list[Any]) -> Any:
    """Batches of one kind as one batch of it."""
    if len(pieces) == 1:
        return pieces[0]
    return sys.modules["torch"].cat(pieces) if is_tensor(pieces[0]) else np.concatenate(pieces)


def like(array: Array, example: Any, place: str) -> Any:
    """The array as the kind that `example` is; a tensor lands at `place`, or by `example` if PyTorch has no GPU."""
    if not is_tensor(example):
        return array
    torch = sys.modules["torch"]
    reachable = place == "cpu" or torch.cuda.is_available()
    return torch.from_numpy(array).to(place if reachable else example.device)
