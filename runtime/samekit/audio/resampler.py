"""The sample rate conversion of the Stable Audio 3 reference, for whole arrays and for streams."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from samekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.audio.channels import Audio

# The low-pass filter of the reference, the defaults of `torchaudio.functional.resample`.
_ZERO_CROSSINGS: Final = 6
_ROLLOFF: Final = 0.99
# Outputs of one small matrix product. With fewer, the windows overlap more; with more, the matrices hold more zeros.
# 30 to 50 were fastest.
_BLOCK_OUTPUTS: Final = 32
# Inputs that are filtered at a time: they and their windows stay in the processor's cache.
_SPAN: Final = 2**15
# A rate from a damaged header could ask for matrices of any size. Within these limits the worst pair of rates takes
# 150 MB, and the rates of actual recordings take less than 20 MB.
_LOWEST_RATE: Final = 1_000
_HIGHEST_RATE: Final = 768_000


def resampled_length(samples: int, rate_in: int, rate_out: int) -> int:
    """Return the length of resampled audio: `ceil(samples * rate_out / rate_in)`, as in the reference."""
    return -(-samples * rate_out // rate_in)


def resample(audio: Audio, rate_in: int, rate_out: int) -> Audio:
    """Change the sample rate as the reference does: a Hann-windowed sinc, six zero crossings to each side.

    Output m is the sum of `x[i]·h(i - m·r)` over all inputs i, where `r = rate_in / rate_out`,
    `h(u) = s·sinc(s·u)·cos²(π·s·u / 12)` for `|s·u| < 6`, else 0, and `s = 0.99·min(1, 1/r)`. This is the formula of
    `torchaudio.functional.resample` (lowpass_filter_width 6, rolloff 0.99, sinc_interp_hann), with its rounded phases.

    Returns:
        `[..., resampled_length(samples, rate_in, rate_out)]` for `audio` of `[..., samples]`; the input itself if the
        rates are equal.

    Raises:
        InputError: a rate is not an integer from 1,000 to 768,000 Hz.
    """
    *batch, samples = audio.shape
    rows = math.prod(batch)
    resampler = StreamResampler(rate_in, rate_out, rows)
    if rate_in == rate_out:
        return audio
    resampled = np.concatenate([resampler.push(audio.reshape(rows, samples)), resampler.finish()], axis=1)
    return resampled.reshape(*batch, resampled.shape[1])


class StreamResampler:
    """Resample audio that comes in blocks of any size: the same numbers as `resample`, bit for bit, in fixed memory.

    Outputs come for about 2**15 inputs at a time (at least one period of the two rates), and the last ones with
    `finish`. If the rates are equal, the blocks are returned as they are.

    Raises:
        InputError: a rate is not an integer from 1,000 to 768,000 Hz.
    """

    def __init__(self, rate_in: int, rate_out: int, channels: int) -> None:
        self._rate_in = _checked_rate(rate_in)
        self._rate_out = _checked_rate(rate_out)
        self.changes_rate = rate_in != rate_out
        """Whether outputs differ from inputs."""
        self._channels = channels
        if self.changes_rate:
            self._filter = _polyphase_filter(self._rate_in, self._rate_out)
            self._space = _Workspace(self._filter, channels)
            self._reset()

    def _reset(self) -> None:
        """Begin at the first sample, with zeros before it."""
        self._filled = self._filter.before
        self._space.span[:, : self._filled] = 0
        self._received = 0
        self._produced = 0

    def push(self, block: Audio) -> Audio:
        """Take a block, `[channels, samples]`, and return the outputs that are complete, often none.

        Raises:
            InputError: the block has another shape.
        """
        if not self.changes_rate:
            return next(self.outputs(block))
        return self._joined(self.outputs(block))

    def outputs(self, block: Audio) -> Iterator[Audio]:
        """Yield what `push` returns, in pieces of one span.

        Raises:
            InputError: as `push`.
        """
        if block.ndim != 2 or block.shape[0] != self._channels:
            raise InputError(f"block of shape {block.shape} does not fit; give [{self._channels}, samples]")
        if not self.changes_rate:
            yield block
            return
        capacity = self._space.span.shape[1]
        self._received += block.shape[1]
        while block.shape[1]:
            taken = min(block.shape[1], capacity - self._filled)
            self._space.span[:, self._filled : self._filled + taken] = block[:, :taken]
            self._filled += taken
            block = block[:, taken:]
            if self._filled == capacity:
                yield self._next_outputs()

    def finish(self) -> Audio:
        """End the audio and return the remaining outputs, `[channels, samples]`. The next `push` begins a new audio."""
        return self._joined(self.last_outputs())

    def last_outputs(self) -> Iterator[Audio]:
        """Yield what `finish` returns, in pieces of one span."""
        if not self.changes_rate:
            return
        total = resampled_length(self._received, self._rate_in, self._rate_out)
        while (left := total - self._produced) > 0:
            # A full span, because a matrix product of another shape may round differently.
            self._space.span[:, self._filled :] = 0
            self._filled = self._space.span.shape[1]
            yield self._next_outputs()[:, :left]
        self._reset()

    def _joined(self, outputs: Iterator[Audio]) -> Audio:
        return np.concatenate([np.empty((self._channels, 0), np.float32), *outputs], axis=1)

    def _next_outputs(self) -> Audio:
        """Filter the full span, and keep what the next one shares with it."""
        outputs = self._filter.apply(self._space)
        self._produced += outputs.shape[1]
        self._filled -= self._filter.step
        self._space.span[:, : self._filled] = self._space.span[:, self._filter.step :].copy()
        return outputs


@dataclass(frozen=True, eq=False)
class _PolyphaseFilter:
    """The low-pass filter of a pair of rates as small dense matrices, applied to a span of whole periods.

    The phases repeat after a period of rate_out / gcd outputs. A period is cut into blocks of consecutive outputs. The
    window of a block are the inputs that it depends on, and its outputs are window times matrix:

        inputs       x x x x x x x x x x x x x x x x x x
        block 0      |---- window ----|                     @ weights[0] -> outputs 0 to 31
        block 1                |---- window ----|           @ weights[1] -> outputs 32 to 63
    """

    weights: Audio  # [blocks, taps, outputs of a block]
    starts: npt.NDArray[np.int64]  # first input of each window, counted in the span, [blocks, periods]
    before: int  # inputs of a span that lie before its first period
    step: int  # inputs from one span to the next: its whole periods
    span: int  # inputs of a span
    outputs: int  # outputs of a period; the blocks may hold a few more, which are dropped

    def apply(self, space: _Workspace) -> Audio:
        """Filter the span of a workspace to `[channels, periods * outputs]`."""
        blocks, taps, size = self.weights.shape
        channels, periods = len(space.span), self.starts.shape[1]
        if blocks <= periods:
            # This is twice as fast as an index for each window.
            inputs = self.step // periods
            for gathered, start in zip(space.gathered, self.starts[:, 0], strict=True):
                gathered[...] = space.windows[start::inputs][:periods]
        else:
            space.gathered[...] = space.windows[self.starts]
        # Samples beyond float32 become infinite, which later checks report.
        with np.errstate(over="ignore", invalid="ignore"):
            np.matmul(space.gathered.reshape(blocks, -1, taps), self.weights, out=space.products)
        ordered = np.empty((channels, periods, blocks, size), np.float32)
        ordered[...] = space.products.reshape(blocks, periods, channels, size).transpose(2, 1, 0, 3)
        kept = ordered.reshape(channels, periods, blocks * size)[:, :, : self.outputs]
        return kept.reshape(channels, periods * self.outputs)


class _Workspace:
    """Arrays that the filter of a stream uses for each span: new memory is cleared page by page, which takes long."""

    def __init__(self, polyphase: _PolyphaseFilter, channels: int) -> None:
        blocks, taps, size = polyphase.weights.shape
        periods = polyphase.starts.shape[1]
        self.span: Audio = np.empty((channels, polyphase.span), np.float32)
        # The windows that begin at each input, as views `[inputs, channels, taps]`.
        self.windows = sliding_window_view(self.span, taps, axis=1).swapaxes(0, 1)
        self.gathered: Audio = np.empty((blocks, periods, channels, taps), np.float32)
        self.products: Audio = np.empty((blocks, periods * channels, size), np.float32)


@lru_cache(maxsize=4)
def _polyphase_filter(rate_in: int, rate_out: int) -> _PolyphaseFilter:
    """Build the filter of a pair of rates."""
    common = math.gcd(rate_in, rate_out)
    # Short periods are repeated up to the size of a block.
    repeats = max(1, _BLOCK_OUTPUTS * common // rate_out)
    inputs, outputs = repeats * rate_in // common, repeats * rate_out // common
    blocks = max(1, round(outputs / _BLOCK_OUTPUTS))
    size = -(-outputs // blocks)
    # Inputs that a weight reaches to either side.
    radius = _ZERO_CROSSINGS * max(1.0, rate_in / rate_out) / _ROLLOFF

    first_outputs = np.arange(blocks, dtype=np.int64) * size
    starts = np.ceil(first_outputs * (inputs / outputs) - radius).astype(np.int64)
    taps = math.floor((size - 1) * inputs / outputs + 2 * radius) + 1
    weights = np.empty((blocks, taps, size), np.float32)
    for block in range(blocks):
        at_inputs = starts[block] + np.arange(taps, dtype=np.int64)
        at_outputs = first_outputs[block] + np.arange(size, dtype=np.int64)
        weights[block] = _weights(at_inputs, at_outputs, rate_in // common, rate_out // common)

    periods = max(1, _SPAN // inputs)
    starts_in_span = (starts - starts[0])[:, None] + np.arange(periods, dtype=np.int64) * inputs
    return _PolyphaseFilter(
        weights=weights,
        starts=starts_in_span,
        before=int(-starts[0]),
        step=periods * inputs,
        span=int(starts_in_span[-1, -1]) + taps,
        outputs=outputs,
    )


def _weights(
    at_inputs: npt.NDArray[np.int64], at_outputs: npt.NDArray[np.int64], period_in: int, period_out: int
) -> npt.NDArray[np.float64]:
    """Evaluate the formula of `resample`, `[inputs, outputs]`, for rates reduced to their shortest period."""
    cutoff = _ROLLOFF * min(period_in, period_out)
    periods, phases = np.divmod(at_outputs, period_out)
    # torchaudio divides the phases in single precision. With exact phases, long periods differ: 44,056 to 44,100 Hz
    # agrees with it to 75 dB only.
    phase_times = (phases / np.float32(period_out)).astype(np.float32)
    input_times = (at_inputs[:, None] - periods * period_in) / period_in
    crossings = np.clip((input_times - phase_times) * cutoff, -_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = np.cos(np.pi / (2 * _ZERO_CROSSINGS) * crossings) ** 2
    return np.asarray(cutoff / period_in * np.sinc(crossings) * window, np.float64)


def _checked_rate(rate: int) -> int:
    """Return the sample rate if it is an integer in range."""
    try:
        rate = operator.index(rate)
    except TypeError:
        raise InputError(f"sample rate {rate!r} is no integer; give it in whole Hz") from None
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        raise InputError(f"sample rate {rate} Hz is out of range; use {_LOWEST_RATE} to {_HIGHEST_RATE} Hz")
    return rate
