"""NumPy arrays and PyTorch tensors in, the same kind out; PyTorch is never imported, only recognised."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit.errors import InputError, first_line

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]


AUDIO = "audio"
"""What messages call samples."""
LATENTS = "latents"
"""What messages call latents."""


def is_tensor(value: Any) -> bool:
    """Whether `value` is a PyTorch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_float32(value: Any, name: str, *, empty: bool = False) -> Array:
    """A finite float32 NumPy array of the same values.

    Args:
        value: a NumPy array or PyTorch tensor of float16, bfloat16, float32 or float64, on any device, of any layout.
        name: `AUDIO` or `LATENTS`, for messages.
        empty: whether it may hold no values.

    Raises:
        InputError: another type or dtype, an empty array, masked values, NaN or infinity.
    """
    if is_tensor(value):
        value = _from_tensor(value, name)
    if isinstance(value, (str, os.PathLike)):
        raise InputError(
            f"{name} must be a NumPy array or a PyTorch tensor, it is a path; pass files to encode_file or decode_file"
        )
    if not isinstance(value, np.ndarray):
        raise InputError(
            f"{name} must be a NumPy array or a PyTorch tensor, it is {type(value).__name__}; "
            "convert it with numpy.asarray"
        )
    if np.ma.is_masked(value):
        raise InputError(f"{name} has masked values, which stand for nothing; pass array.filled(0)")
    if value.dtype.kind != "f":
        if name != AUDIO:
            raise InputError(f"{name} must be floating point, it is {value.dtype}; pass them as float32")
        raise InputError(f"audio must be floating point in -1 ... 1, it is {value.dtype}; {_scaling(value.dtype)}")
    if value.size == 0 and not empty:
        raise InputError(f"{name} is empty: its shape is {list(value.shape)}; pass at least one value")
    with np.errstate(over="ignore"):
        # Not `ascontiguousarray`, which makes a clip of one sample out of a single number.
        array = np.asarray(value, dtype=np.float32, order="C")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN, infinity or values beyond float32; repair the input")
    return array


def sample_rates(value: Any, clips: int) -> list[Any]:
    """The sample rates of clips, one for all or one each; whole numbers of any kind become integers.

    Args:
        value: a number, or a list, tuple, NumPy array or PyTorch tensor of numbers.
        clips: how many.

    Returns:
        A rate for each clip. What is no whole number stays as it is, for the resampler to refuse.

    Raises:
        InputError: there are no clips, numbers of clips and rates differ, or a tensor has no values.
    """
    value = _plain_numbers(value)
    rates = [_plain_numbers(rate) for rate in value] if isinstance(value, (list, tuple)) else [value] * clips
    if not clips or len(rates) != clips:
        raise InputError(f"{clips} clips and {len(rates)} sample rates; pass one rate for all or one each")
    return [int(rate) if isinstance(rate, float) and rate.is_integer() else rate for rate in rates]


def _plain_numbers(value: Any) -> Any:
    """Numbers of Python's own in place of NumPy's and PyTorch's."""
    if is_tensor(value):
        value = _from_tensor(value, "a sample rate")
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _from_tensor(value: Any, name: str) -> Any:
    """The values of a tensor in a NumPy array, those of bfloat16 as float32.

    Raises:
        InputError: it has no values, or is of a kind that NumPy cannot hold.
    """
    try:
        dense = value.detach().cpu().to_dense().resolve_conj().resolve_neg()
        return (dense.float() if dense.is_floating_point() else dense).numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError(
            f"{name} cannot be read from this tensor ({first_line(error)}); pass a dense one with values"
        ) from None


def _scaling(dtype: np.dtype[Any]) -> str:
    """How audio of another dtype becomes floating point in -1 ... 1."""
    if dtype.kind not in "iu":
        return "convert it first"
    full_scale = 1 << (8 * dtype.itemsize - 1)
    if dtype.kind == "i":
        return f"divide by {full_scale} first"
    return f"convert it to float32, subtract {full_scale}, then divide by it"


def as_one_batch(pieces: list[Any]) -> Any:
    """Batches of one kind as one batch of it."""
    if len(pieces) == 1:
        return pieces[0]
    return sys.modules["torch"].cat(pieces) if is_tensor(pieces[0]) else np.concatenate(pieces)


def to_kind_of(array: Array, example: Any, torch_device: str) -> Any:
    """Return `array` as the kind of array that `example` is.

    A tensor is put on `torch_device`, or on the device of `example` if PyTorch has no GPU.
    """
    if not is_tensor(example):
        return array
    torch = sys.modules["torch"]
    reachable = torch_device == "cpu" or torch.cuda.is_available()
    return torch.from_numpy(array).to(torch_device if reachable else example.device)
