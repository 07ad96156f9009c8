"""Sequences that arrive in pieces: exact windows over them, and the encoder and decoder of a stream.

One array, a file and a live stream all go through `WindowedRun`, so all give the same numbers.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from samekit.arrays import AUDIO, LATENTS, as_one_batch, is_tensor, to_float32
from samekit.audio import StreamResampler, pad_to, to_channels
from samekit.engine.spec import DECODER, ENCODER, Direction, opposite
from samekit.errors import BackendError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from samekit.arrays import Array
    from samekit.backends.base import Backend
    from samekit.windows import ExactWindows, Window

# libsndfile's limit, so no file has more.
_MOST_CHANNELS = 1024

# With more channels than this, and fewer samples than channels, samples stand in the place of channels.
_MANY_CHANNELS = 64


class WindowRunner:
    """One half of a model over windows: runs them and keeps their cores.

    Arrays stay arrays; tensors that the backend accepts stay tensors, where they lie.
    """

    def __init__(self, backend: Backend, direction: Direction) -> None:
        spec = backend.spec
        self._backend = backend
        self._direction = direction
        self._most = backend.window_batch
        _, self.unit_in = spec.layout(direction)
        self.features_out, self.unit_out = spec.layout(opposite(direction))
        """Features of an output: the latents' width, or audio channels."""

    def valid_regions(self, pieces: Iterable[tuple[Window, Array]]) -> Iterator[Array]:
        """The kept part of each window's output, in order; equal windows run together where the backend wants that.

        Args:
            pieces: windows and their inputs `[batch, features, latents of the window * unit_in]`.

        Yields:
            `[batch, features_out, latents of the core * unit_out]`.
        """
        together: list[tuple[Window, Array]] = []
        for window, piece in pieces:
            full = together and len(together) * piece.shape[0] >= self._most
            if full or (together and together[0][1].shape != piece.shape):
                yield from self._run_together(together)
                together = []
            together.append((window, piece))
        if together:
            yield from self._run_together(together)

    def _run_together(self, pieces: list[tuple[Window, Array]]) -> Iterator[Array]:
        """The cores of windows of one shape, run as one batch."""
        output = self._run(as_one_batch([piece for _, piece in pieces]))
        outputs = output.reshape(len(pieces), -1, *output.shape[1:])
        for (window, _), out in zip(pieces, outputs, strict=True):
            yield out[:, :, window.core.start * self.unit_out : window.core.stop * self.unit_out]

    def _run(self, batch: Any) -> Any:
        if is_tensor(batch):
            return self._backend.run_tensor(self._direction, batch)
        return self._backend.run(self._direction, batch)

    def cut(self, array: Array, windows: Iterable[Window]) -> Iterator[tuple[Window, Array]]:
        """Windows with their inputs, from a whole array `[batch, features, length]`."""
        for window in windows:
            yield window, array[:, :, window.start * self.unit_in : window.stop * self.unit_in]


class _Steps:
    """The steps of a stream: after one that was left in its middle, another would drop or shift values."""

    def __init__(self) -> None:
        self._broken = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take one step; whatever raises inside ends the stream.

        Raises:
            BackendError: an earlier step was left in its middle.
        """
        if self._broken:
            raise BackendError("an earlier error has cost this stream a part of its input; begin a new stream")
        self._broken = True
        yield
        self._broken = False


class WindowCutter:
    """Cuts a sequence that arrives in pieces into exact windows; memory does not grow with its length."""

    def __init__(self, plan: ExactWindows, unit: int) -> None:
        self._plan = plan
        self._unit = unit
        self._steps = _Steps()
        self._next = 0
        self._offset = 0
        self._waiting: Array | None = None

    def push(self, array: Array, *, final: bool = False) -> Iterator[tuple[Window, Array]]:
        """Take the next piece and yield the windows that it completes.

        Args:
            array: `[batch, features, length]`, of any length, `unit` values a latent.
            final: whether the sequence ends with it, after a whole latent; the next piece begins another one.

        Yields:
            A window and its input, `[batch, features, latents of the window * unit]`.

        Raises:
            BackendError: not all windows of an earlier piece were taken.
        """
        with self._steps.step():
            yield from self._cut(array, final=final)

    def _cut(self, array: Array, *, final: bool) -> Iterator[tuple[Window, Array]]:
        unit = self._unit
        if self._waiting is not None and self._waiting.shape[-1]:
            array = np.concatenate([self._waiting, array], axis=-1)
        available = self._offset + array.shape[-1] // unit
        while (window := self._plan.next(self._next, available, final=final)) is not None:
            begin, end = ((latent - self._offset) * unit for latent in (window.start, window.stop))
            yield window, array[:, :, begin:end]
            self._next += 1
        begin = self._next * self._plan.step
        if final:
            self._next, self._offset, self._waiting = 0, 0, None
            return
        # A copy, so that the caller's block is not kept alive by its tail.
        self._waiting = array[:, :, (begin - self._offset) * unit :].copy()
        self._offset = begin


class WindowedRun:
    """Exact windows over a sequence that arrives in pieces; memory does not grow with its length."""

    def __init__(self, runner: WindowRunner, plan: ExactWindows) -> None:
        self._runner = runner
        self._cutter = WindowCutter(plan, runner.unit_in)

    def push(self, array: Array, *, final: bool = False) -> Iterator[Array]:
        """Take the next piece and yield what it completes.

        Args:
            array: `[batch, features, length]`, whole latents.
            final: whether the sequence ends with it.

        Yields:
            The next values, `[batch, features_out, length]`.
        """
        yield from self._runner.valid_regions(self._cutter.push(array, final=final))


class StreamEncoder:
    """Encodes audio that arrives in blocks of any size; the latents equal those of one pass over everything.

    A latent comes out when the window that holds it is full: at the latest `latency` latents after its samples
    (and what the resampler holds back, a few milliseconds). After `finish` the next block begins a new stream.
    """

    def __init__(self, backend: Backend, plan: ExactWindows, sample_rate: int) -> None:
        spec = backend.spec
        self.latency = plan.size + 1
        """Latents that are held back at most."""
        self.samples = 0
        """Samples of the stream so far, at the model's rate."""
        self._finished = False
        self._steps = _Steps()
        self._channels = spec.channels
        self._resampler = StreamResampler(sample_rate, spec.sample_rate, spec.channels)
        self._run = WindowedRun(WindowRunner(backend, ENCODER), plan)
        self._hop = spec.hop
        self._width = spec.latent_width
        self._rest: Array = np.zeros((spec.channels, 0), np.float32)

    def push(self, audio: Any) -> Array:
        """Take samples `[channels, n]` or `[n]`, return the latents they complete: `[latent_width, t]`, t from 0.

        Raises:
            InputError: wrong shape or dtype, NaN or infinity; the stream goes on.
            NonFiniteError: the model overflowed, which ends the stream.
            BackendError: the backend failed, which ends the stream, or it had ended so.
        """
        block = to_channels(as_clip(audio, empty=True), self._channels)
        with self._steps.step():
            if self._finished:
                self._finished, self.samples = False, 0
            return self._advance(self._resampler.push(block), final=False)

    def finish(self) -> Array:
        """End of the stream: the last latents, `[latent_width, t]`; the last one is padded with silence.

        Raises:
            InputError: no samples were received.
            NonFiniteError, BackendError: as of `push`.
        """
        with self._steps.step():
            rest = self._resampler.finish()
            if not self._finished and self.samples + rest.shape[-1] > 0:
                self._finished = True
                return self._advance(rest, final=True)
        raise InputError("no samples were received; push some before finish")

    def _advance(self, audio: Array, *, final: bool) -> Array:
        self.samples += audio.shape[-1]
        audio = np.concatenate([self._rest, audio], axis=-1)
        if final:
            audio = pad_to(audio, self._hop)
        whole = audio.shape[-1] - audio.shape[-1] % self._hop
        # A copy, as above.
        self._rest = audio[:, whole:].copy()
        return _joined(self._run.push(audio[None, :, :whole], final=final), self._width)


class StreamDecoder:
    """Decodes latents that arrive in blocks of any size; the audio equals that of one pass over everything.

    The audio of a latent comes out when the window that holds it is full: at the latest `latency` latents later.
    After `finish` the next block begins a new stream.
    """

    def __init__(self, backend: Backend, plan: ExactWindows) -> None:
        self.latency = plan.size + 1
        """Latents that are held back at most."""
        self._steps = _Steps()
        self._run = WindowedRun(WindowRunner(backend, DECODER), plan)
        self._width = backend.spec.latent_width
        self._channels = backend.spec.channels
        self._received = 0

    def push(self, latents: Any) -> Array:
        """Take latents `[latent_width, t]`, return the samples they complete: `[channels, n]`, n from 0.

        Raises:
            InputError: wrong shape or dtype, NaN or infinity; the stream goes on.
            NonFiniteError: the model overflowed, which ends the stream.
            BackendError: the backend failed, which ends the stream, or it had ended so.
        """
        array = to_float32(latents, LATENTS, empty=True)
        if array.ndim != 2 or array.shape[0] != self._width:
            raise InputError(
                f"latents must be [{self._width}, length], got {list(array.shape)}; "
                "pass one clip without its batch: latents[0]"
            )
        with self._steps.step():
            self._received += array.shape[-1]
            return _joined(self._run.push(array[None]), self._channels)

    def finish(self) -> Array:
        """End of the stream: the last samples, `[channels, n]`.

        Raises:
            InputError: no latents were received.
            NonFiniteError, BackendError: as of `push`.
        """
        with self._steps.step():
            if self._received > 0:
                self._received = 0
                nothing = np.zeros((1, self._width, 0), np.float32)
                return _joined(self._run.push(nothing, final=True), self._channels)
        raise InputError("no latents were received; push some before finish")


def as_clip(audio: Any, *, empty: bool = False) -> Array:
    """One clip as float32 `[channels, n]`, from that, `[n]` or `[1, channels, n]`; `empty` allows n = 0.

    Raises:
        InputError: another rank, wrong dtype, no samples, NaN or infinity, or samples in the place of channels.
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


def _joined(pieces: Iterator[Array], features: int) -> Array:
    """Pieces `[1, features, n]` as one `[features, n]`, empty where there are none."""
    return np.concatenate([np.zeros((features, 0), np.float32), *(piece[0] for piece in pieces)], axis=-1)
