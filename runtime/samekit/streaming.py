"""Sequences that arrive in pieces: exact windows over them, and the encoder and decoder of a stream.

One array, a file and a live stream all go through `WindowedRun`, so all give the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from samekit.arrays import as_float32
from samekit.audio import StreamResampler, pad_to, to_channels
from samekit.errors import InputError
from samekit.spec import DECODER, ENCODER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from samekit.arrays import Array
    from samekit.backends.base import Backend
    from samekit.chunking import ExactWindows, Window


class HalfRunner:
    """One half of a model over windows of a longer array: cuts the input, runs it, keeps the core."""

    def __init__(self, backend: Backend, half: str) -> None:
        spec = backend.spec
        self._run: Callable[[Array], Array] = backend.encode if half == ENCODER else backend.decode
        self.unit_in, self.unit_out = (spec.hop, 1) if half == ENCODER else (1, spec.hop)
        self.features_out = spec.latent_width if half == ENCODER else spec.channels

    def core(self, array: Array, window: Window, offset: int = 0) -> Array:
        """The kept part of a window's output.

        Args:
            array: `[batch, features, length]`, `unit_in` values a latent.
            window: counted in latents of the whole sequence.
            offset: latents of the sequence that lie before `array`.

        Returns:
            `[batch, features_out, latents of the core * unit_out]`.
        """
        begin, end = ((latent - offset) * self.unit_in for latent in (window.start, window.stop))
        out = self._run(np.ascontiguousarray(array[:, :, begin:end]))
        return out[:, :, window.core.start * self.unit_out : window.core.stop * self.unit_out]


class WindowedRun:
    """Exact windows over a sequence that arrives in pieces; memory does not grow with its length."""

    def __init__(self, runner: HalfRunner, plan: ExactWindows) -> None:
        self._runner = runner
        self._plan = plan
        self._next = 0
        self._offset = 0
        self._waiting: Array | None = None

    def push(self, array: Array, *, final: bool = False) -> Iterator[Array]:
        """Take the next piece and yield what it completes.

        Args:
            array: `[batch, features, length]`, whole latents.
            final: whether the sequence ends with it.

        Yields:
            The next values, `[batch, features_out, length]`.
        """
        unit = self._runner.unit_in
        if self._waiting is not None and self._waiting.shape[-1]:
            array = np.concatenate([self._waiting, array], axis=-1)
        available = self._offset + array.shape[-1] // unit
        while (window := self._plan.next(self._next, available, final=final)) is not None:
            yield self._runner.core(array, window, self._offset)
            self._next += 1
        begin = min(self._next * self._plan.step, available)
        # A copy, so that the caller's block is not kept alive by its tail.
        self._waiting = array[:, :, (begin - self._offset) * unit :].copy()
        self._offset = begin


class StreamEncoder:
    """Encodes audio that arrives in blocks of any size; the latents equal those of one pass over everything.

    A latent comes out when the window that holds it is full: at the latest `latency` latents after its samples
    (and what the resampler holds back, a few milliseconds).
    """

    def __init__(self, backend: Backend, plan: ExactWindows, sample_rate: int) -> None:
        spec = backend.spec
        self.latency = plan.size + 1
        self._channels = spec.channels
        self._resampler = StreamResampler(sample_rate, spec.sample_rate, spec.channels)
        self._run = WindowedRun(HalfRunner(backend, ENCODER), plan)
        self._hop = spec.hop
        self._width = spec.latent_width
        self._rest: Array = np.zeros((spec.channels, 0), np.float32)
        self.samples = 0
        """Samples received so far, at the model's rate."""

    def push(self, audio: Any) -> Array:
        """Take samples `[channels, n]` or `[n]`, return the latents they complete: `[latent_width, t]`, t from 0.

        Raises:
            InputError: wrong shape or dtype, NaN or infinity.
        """
        return self._advance(self._resampler.push(to_channels(as_clip(audio), self._channels)), final=False)

    def finish(self) -> Array:
        """End of the stream: the last latents, `[latent_width, t]`; the last one is padded with silence.

        Raises:
            InputError: no samples were received.
        """
        return self._advance(self._resampler.finish(), final=True)

    def _advance(self, audio: Array, *, final: bool) -> Array:
        self.samples += audio.shape[-1]
        if final and self.samples == 0:
            raise InputError("no samples were received; there is nothing to encode")
        audio = np.concatenate([self._rest, audio], axis=-1)
        if final:
            audio = pad_to(audio, self._hop)
        whole = audio.shape[-1] - audio.shape[-1] % self._hop
        self._rest = audio[:, whole:]
        return _joined(self._run.push(audio[None, :, :whole], final=final), self._width)


class StreamDecoder:
    """Decodes latents that arrive in blocks of any size; the audio equals that of one pass over everything.

    The audio of a latent comes out when the window that holds it is full: at the latest `latency` latents later.
    """

    def __init__(self, backend: Backend, plan: ExactWindows) -> None:
        self.latency = plan.size + 1
        self._run = WindowedRun(HalfRunner(backend, DECODER), plan)
        self._width = backend.spec.latent_width
        self._channels = backend.spec.channels
        self._received = False

    def push(self, latents: Any) -> Array:
        """Take latents `[latent_width, t]`, return the samples they complete: `[channels, n]`, n from 0.

        Raises:
            InputError: wrong shape or dtype, NaN or infinity.
        """
        array = as_float32(latents, "latents")
        if array.ndim != 2 or array.shape[0] != self._width:
            raise InputError(f"latents must be [{self._width}, length], got {list(array.shape)}")
        self._received = True
        return _joined(self._run.push(array[None]), self._channels)

    def finish(self) -> Array:
        """End of the stream: the last samples, `[channels, n]`.

        Raises:
            InputError: no latents were received.
        """
        if not self._received:
            raise InputError("no latents were received; there is nothing to decode")
        return _joined(self._run.push(np.zeros((1, self._width, 0), np.float32), final=True), self._channels)


def as_clip(audio: Any) -> Array:
    """One clip as float32 `[channels, n]`, from that, `[n]` or `[1, channels, n]`.

    Raises:
        InputError: another rank, wrong dtype, NaN or infinity.
    """
    array = as_float32(audio, "audio")
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise InputError(f"a clip must be [channels, samples] or [samples], got {list(array.shape)}")
    return array


def _joined(pieces: Iterator[Array], features: int) -> Array:
    """Pieces `[1, features, n]` as one `[features, n]`, empty where there are none."""
    return np.concatenate([np.zeros((features, 0), np.float32), *(piece[0] for piece in pieces)], axis=-1)
