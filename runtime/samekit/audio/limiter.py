"""The look-ahead limiter that the TensorRT, TFLite and MLX decoders of Stable Audio 3 contain, for streams."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from samekit.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from samekit.audio.channels import Audio

CEILING: Final = 0.977
"""Highest sample of limited audio: -0.2 dBFS."""
# Samples that share one gain.
_BLOCK: Final = 64
# The gain falls this long before a peak, rounded up to blocks: 5.8 ms at 44.1 kHz.
_LOOK_AHEAD: Final = 0.005


class Limiter:
    """Limit the peaks of audio that arrives in blocks of any size, all channels by the same gain.

    A block of 64 samples needs the gain `min(1, 0.977 / peak)`. The lowest gain needed within 5.8 ms on both sides is
    smoothed by a Hann window of the same length, and interpolated from the centre of one block to the next. Audio
    without a peak above the ceiling stays as it is, to the bit. The blocks that come in do not change the result.

    Args:
        sample_rate: in Hz.
        channels: of every block.
    """

    def __init__(self, sample_rate: int, channels: int) -> None:
        self._channels = channels
        self._radius = math.ceil(_LOOK_AHEAD * sample_rate / _BLOCK)
        # Blocks on each side on which a gain depends: lowest value, smoothing, interpolation.
        self._context = 2 * self._radius + 1
        self._held: Audio
        self._reset()

    def push(self, block: Audio) -> Audio:
        """Take a block `[channels, samples]`, and return the limited samples that are complete, often none.

        Raises:
            InputError: the block has another shape.
        """
        if block.ndim != 2 or block.shape[0] != self._channels:
            raise InputError(f"block of shape {block.shape} does not fit; give [{self._channels}, samples]")
        self._held = np.concatenate([self._held, block], axis=1)
        return self._advance((self._held.shape[1] // _BLOCK - self._context) * _BLOCK)

    def finish(self) -> Audio:
        """End the audio and return its last samples, `[channels, samples]`. The next `push` begins a new audio."""
        rest = self._advance(self._held.shape[1])
        self._reset()
        return rest

    def _reset(self) -> None:
        self._held = np.zeros((self._channels, 0), np.float32)
        # Samples at the beginning of `_held` that were returned, and are kept as context.
        self._returned = 0

    def _advance(self, stop: int) -> Audio:
        """Return the samples up to `stop` that were not returned yet, and drop those that are not needed any more."""
        if stop <= self._returned:
            return np.zeros((self._channels, 0), np.float32)
        kept = slice(self._returned, stop)
        limited = self._held[:, kept] * self._gains()[kept]
        begin = max(0, stop // _BLOCK - self._context) * _BLOCK
        self._held = self._held[:, begin:].copy()
        self._returned = stop - begin
        return limited

    def _gains(self) -> npt.NDArray[np.float32]:
        """Return the gain of each sample in `_held`."""
        samples, radius = self._held.shape[1], self._radius
        peaks = np.maximum.reduceat(np.abs(self._held).max(axis=0), np.arange(0, samples, _BLOCK))
        needed = CEILING / np.maximum(peaks, CEILING, dtype=np.float64)
        lowest = sliding_window_view(np.pad(needed, radius, constant_values=1), 2 * radius + 1).min(axis=1)
        padded, window = np.pad(lowest, radius, mode="edge"), np.hanning(2 * radius + 1)
        # A matrix product could round differently, depending on the length.
        smooth = sum(weight * padded[at : at + len(lowest)] for at, weight in enumerate(window / window.sum()))
        centres = (np.arange(samples) + 0.5) / _BLOCK - 0.5
        gains: npt.NDArray[np.float32] = np.interp(centres, np.arange(len(lowest)), smooth).astype(np.float32)
        return gains
