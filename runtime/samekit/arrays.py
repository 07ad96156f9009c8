"""Accept NumPy arrays and PyTorch tensors, and return the same kind. PyTorch is recognised, never imported."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from samekit.errors import InputError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Array = npt.NDArray[np.float32]


AUDIO = "audio"
"""The name of samples in messages."""
LATENTS = "latents"
"""The name of latents in messages."""

# libsndfile's limit, so no file has more channels.
_MOST_CHANNELS = 1024
# With more channels than this, and fewer samples than channels, the axes are probably swapped.
_MANY_CHANNELS = 64


def is_tensor(value: Any) -> bool:
    """Return whether `value` is a PyTorch tensor."""
    # The module has no such class yet while another thread imports it.
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def to_float32(value: Any, name: str, *, empty: bool = False) -> Array:
    """Return a finite, contiguous float32 NumPy array of the same values.

    Args:
        value: a NumPy array or PyTorch tensor of float16, bfloat16, float32 or float64, on any device, of any layout.
        name: `AUDIO` or `LATENTS`, for messages.
        empty: whether it may hold no values.

    Raises:
        InputError: another type or dtype, an empty array, masked values, NaN or infinity.
    """
    if is_tensor(value):
        value = _from_tensor(value, name)
    if not isinstance(value, np.ndarray):
        given, cure = type(value).__name__, "convert it with numpy.asarray"
        if isinstance(value, (str, os.PathLike)):
            given, cure = "a path", "pass files to encode_file or decode_file"
        raise InputError(f"{name} must be a NumPy array or a PyTorch tensor, it is {given}; {cure}")
    if np.ma.is_masked(value):
        raise InputError(f"{name} has masked values, which stand for nothing; pass array.filled(0)")
    if value.dtype.kind != "f":
        if name != AUDIO:
            raise InputError(f"{name} must be floating point, it is {value.dtype}; pass them as float32")
        raise InputError(f"audio must be floating point in -1 ... 1, it is {value.dtype}; {_scaling(value.dtype)}")
    if value.size == 0 and not empty:
        raise InputError(f"{name} is empty: its shape is {list(value.shape)}; pass at least one value")
    with np.errstate(over="ignore"):
        # `ascontiguousarray` would turn an array of rank 0 into one of rank 1.
        array = np.asarray(value, dtype=np.float32, order="C")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN, infinity or values beyond float32; repair the input")
    return array


def as_clip(audio: Any, *, empty: bool = False) -> Array:
    """Return one clip as float32 `[channels, n]`, from that shape, `[n]` or `[1, channels, n]`.

    Args:
        audio: as `to_float32` takes it.
        empty: whether n may be 0.

    Raises:
        InputError: as `to_float32`, another rank, or samples in place of channels.
    """
    array = to_float32(audio, AUDIO, empty=empty)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise InputError(
            f"a clip must be [channels, samples] or [samples], got {list(array.shape)}; "
            "pass several as a list or [batch, channels, samples]"
        )
    channels, samples = array.shape
    if channels > _MOST_CHANNELS or (channels > _MANY_CHANNELS and samples < channels):
        raise InputError(f"audio has {channels} channels; pass [channels, samples], such as waveform.T")
    return array


def sample_rates(value: Any, clips: int) -> list[Any]:
    """Return the sample rate of each clip.

    Floats without a fraction become integers. The resampler refuses what is not an integer.

    Args:
        value: one rate for all clips or one each: a number, a list, a tuple, a NumPy array or a PyTorch tensor.
        clips: the number of clips.

    Raises:
        InputError: there are no clips, the numbers of clips and rates differ, or a tensor has no values.
    """
    value = _python_numbers(value)
    rates = [_python_numbers(rate) for rate in value] if isinstance(value, (list, tuple)) else [value] * clips
    if not clips or len(rates) != clips:
        raise InputError(f"{clips} clips and {len(rates)} sample rates; pass one rate for all or one each")
    return [int(rate) if isinstance(rate, float) and rate.is_integer() else rate for rate in rates]


def _python_numbers(value: Any) -> Any:
    """Convert NumPy's and PyTorch's numbers to Python's; leave other values as they are."""
    if is_tensor(value):
        value = _from_tensor(value, "a sample rate")
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _from_tensor(value: Any, name: str) -> Any:
    """Copy a tensor to a NumPy array; bfloat16, which NumPy lacks, becomes float32."""
    try:
        dense = value.detach().cpu().to_dense().resolve_conj().resolve_neg()
        return (dense.float() if dense.is_floating_point() else dense).numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError(
            f"{name} cannot be read from this tensor ({first_line(error)}); pass a dense one with values"
        ) from None


def _scaling(dtype: np.dtype[Any]) -> str:
    """Say how to convert audio of this dtype to floating point in -1 ... 1."""
    if dtype.kind not in "iu":
        return "convert it first"
    full_scale = 1 << (8 * dtype.itemsize - 1)
    if dtype.kind == "i":
        return f"divide by {full_scale} first"
    return f"convert it to float32, subtract {full_scale}, then divide by it"


def as_one_batch(pieces: Sequence[Any]) -> Any:
    """Concatenate batches of the same kind; a single batch is returned as it is.

    Arrays `[batch, features, length]` may differ in length: the shorter ones are padded with zeros at the end.
    """
    if len(pieces) == 1:
        return pieces[0]
    if is_tensor(pieces[0]):
        return sys.modules["torch"].cat(pieces)
    if len({piece.shape[-1] for piece in pieces}) == 1:
        return np.concatenate(pieces)
    batch = np.empty(batch_shape(pieces), np.float32)
    fill_batch(batch, pieces)
    return batch


def batch_shape(pieces: Sequence[Array]) -> tuple[int, ...]:
    """Return the shape of several batches as one, with the longest length."""
    return sum(len(piece) for piece in pieces), *pieces[0].shape[1:-1], max(piece.shape[-1] for piece in pieces)


def fill_batch(batch: Array, pieces: Sequence[Array]) -> None:
    """Write batches one after another to an array of their `batch_shape`; write zeros after the shorter ones."""
    row = 0
    for piece in pieces:
        rows = batch[row : row + len(piece)]
        rows[..., : piece.shape[-1]] = piece
        rows[..., piece.shape[-1] :] = 0
        row += len(piece)


def to_kind_of(array: Array, example: Any, torch_device: str) -> Any:
    """Return `array` as the kind of array that `example` is.

    A tensor is put on `torch_device`, or on the device of `example` if PyTorch has no GPU.
    """
    if not is_tensor(example):
        return array
    return sys.modules["torch"].from_numpy(array).to(reachable_device(torch_device, example.device))


def reachable_device(torch_device: str, otherwise: Any) -> Any:
    """Return a device of PyTorch, or `otherwise` if it is a GPU and PyTorch has none. PyTorch must be imported."""
    return torch_device if torch_device == "cpu" or sys.modules["torch"].cuda.is_available() else otherwise


def without_gradient(value: Any) -> Any:
    """Return a tensor without its history, and any other value as it is."""
    return value.detach() if is_tensor(value) else value


def needs_gradient(value: Any) -> bool:
    """Return whether PyTorch would compute a gradient for this value."""
    return is_tensor(value) and value.requires_grad and sys.modules["torch"].is_grad_enabled()
