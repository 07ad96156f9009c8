"""Run a model over windows, and over streams that arrive in blocks.

Arrays, files and streams all go through `run_windows`, so they give the same numbers.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit.arrays import LATENTS, as_clip, to_float32
from samekit.audio import StreamResampler, to_channels
from samekit.engine.spec import DECODER, ENCODER, Direction, opposite
from samekit.errors import BackendError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from samekit.arrays import Array
    from samekit.backends.base import Backend
    from samekit.windows import ExactWindows, Window


def new_array(shape: tuple[int, ...]) -> Array:
    """Return a float32 array with any values."""
    return np.empty(shape, np.float32)


_NO_VALUES: Final = new_array((1, 1, 0))


def run_windows(backend: Backend, direction: Direction, pieces: Iterable[tuple[Window, Array]]) -> Iterator[Array]:
    """Run windows and yield the part of each output that is kept, in order.

    Windows of one shape run together, up to `backend.window_batch` of them.

    Args:
        backend: runs the model.
        direction: `spec.ENCODER` or `spec.DECODER`.
        pieces: windows and their inputs `[batch, features, length]`: arrays, or tensors that the backend accepts.

    Yields:
        `[batch, features of the output, length of the core]`, of the kind of the input.
    """
    pending: deque[tuple[list[Window], Callable[[], Any]]] = deque()
    for windows, inputs in _batches(pieces, backend.window_batch):
        pending.append((windows, backend.submit(direction, inputs)))
        # While the backend runs the last batch, the caller gets the one before it, and cuts the next windows.
        if len(pending) >= backend.most_pending:
            yield from _kept(backend, direction, *pending.popleft())
    while pending:
        yield from _kept(backend, direction, *pending.popleft())


def _batches(pieces: Iterable[tuple[Window, Array]], window_batch: int) -> Iterator[tuple[list[Window], list[Array]]]:
    """Yield windows of one shape, with their inputs, that run as one batch."""
    windows: list[Window] = []
    inputs: list[Array] = []
    for window, piece in pieces:
        is_full = len(inputs) * piece.shape[0] >= window_batch
        if inputs and (is_full or inputs[0].shape != piece.shape):
            yield windows, inputs
            windows, inputs = [], []
        windows.append(window)
        inputs.append(piece)
    if inputs:
        yield windows, inputs


def _kept(backend: Backend, direction: Direction, windows: list[Window], fetch: Callable[[], Any]) -> Iterator[Array]:
    """Wait for the outputs of a batch of windows, and yield the part of each that is kept."""
    output = fetch()
    _, unit = backend.spec.layout(opposite(direction))
    for window, rows in zip(windows, output.reshape(len(windows), -1, *output.shape[1:]), strict=True):
        yield rows[:, :, window.core.start * unit : window.core.stop * unit]


class WindowCutter:
    """Cut a sequence that arrives in pieces into exact windows; memory does not grow with its length.

    Each piece is copied once, into the arrays of the windows that it is a part of.

    Args:
        plan: the windows.
        unit: values of the sequence per latent.
        expected: latents of the sequence if they are known. At another length, arrays are larger or copied once more.
        allocate: returns a float32 array of a shape, with any values.
    """

    def __init__(
        self,
        plan: ExactWindows,
        unit: int,
        expected: int | None = None,
        allocate: Callable[[tuple[int, ...]], Array] = new_array,
    ) -> None:
        self._plan = plan
        self._unit = unit
        self._expected = expected
        self._allocate = allocate
        self._next = 0
        # The array of the next window, and how many values of each feature it holds so far.
        self._window = _NO_VALUES
        self._filled = 0

    def push(self, array: Array, *, final: bool = False) -> Iterator[tuple[Window, Array]]:
        """Take the next piece and yield the windows that it completes. The iterator must be read to its end.

        Args:
            array: `[batch, features, length]`, of any length.
            final: whether the sequence ends with this piece, after a whole latent; the next piece begins a new one.

        Yields:
            Windows and their inputs, `[batch, features, latents of the window * unit]`.
        """
        size = self._plan.size * self._unit
        while array.shape[-1]:
            if self._filled == size:
                yield from self._cut(final=False)
            taken = size - self._filled
            self._append(array[:, :, :taken])
            array = array[:, :, taken:]
        if final:
            yield from self._cut(final=True)

    def _cut(self, *, final: bool) -> Iterator[tuple[Window, Array]]:
        """Yield the window in work, after which the sequence ends or goes on; the next begins with what both share."""
        plan, array = self._plan, self._window[:, :, : self._filled]
        known = self._next * plan.step + self._filled // self._unit
        window = plan.next(self._next, known if final else known + 1, final=final)
        self._filled, self._window = 0, _NO_VALUES
        self._next = 0 if final else self._next + 1
        if not final:
            # Before the window is yielded, because its array may be used again at once.
            self._append(array[:, :, plan.step * self._unit :])
        if window is not None:
            yield window, array

    def _append(self, values: Array) -> None:
        """Copy values to the array of the window in work, and allocate a larger one if they have no room there."""
        if not values.shape[-1]:
            return
        filled, old = self._filled, self._window
        self._filled += values.shape[-1]
        if self._filled > old.shape[-1]:
            latents = self._plan.size
            if self._expected is not None and not filled:
                latents = min(latents, self._expected - self._next * self._plan.step)
            self._window = self._allocate((*values.shape[:-1], max(self._filled, latents * self._unit)))
            self._window[:, :, :filled] = old[:, :, :filled]
        self._window[:, :, filled : self._filled] = values


class Stream:
    """One direction of a model over a sequence that arrives in blocks."""

    def __init__(self, backend: Backend, direction: Direction, plan: ExactWindows) -> None:
        self.latency = plan.size + 1
        """Most latents that are held back."""
        self._backend = backend
        self._direction = direction
        self._cutter = WindowCutter(plan, backend.spec.layout(direction)[1])
        self._received = 0
        self._is_broken = False

    def _begin_step(self) -> None:
        """Mark the stream as broken until `_advance` returns. After an error the next values would be shifted."""
        if self._is_broken:
            raise BackendError("an earlier error lost a part of this stream's input; begin a new stream")
        self._is_broken = True

    def _advance(self, array: Array, *, final: bool = False) -> Array:
        """Take the next values `[features, n]` and return the outputs that they complete."""
        windows = self._cutter.push(array[None], final=final)
        nothing = np.zeros((1, self._backend.spec.layout(opposite(self._direction))[0], 0), np.float32)
        output: Array = np.concatenate([nothing, *run_windows(self._backend, self._direction, windows)], axis=-1)[0]
        if final:
            self._received = 0
        self._is_broken = False
        return output


class StreamEncoder(Stream):
    """Encode audio that arrives in blocks of any size. The latents equal those of one pass over everything.

    A latent is returned when the window that holds it is full, at the latest `latency` latents after its samples.
    The resampler holds back a few more milliseconds. After `finish` the next block begins a new stream.
    """

    def __init__(self, backend: Backend, plan: ExactWindows, sample_rate: int) -> None:
        super().__init__(backend, ENCODER, plan)
        self.samples = 0
        """Samples of the stream so far, at the model's rate."""
        self._resampler = StreamResampler(sample_rate, backend.spec.sample_rate, backend.spec.channels)

    def push(self, audio: Any) -> Array:
        """Take samples `[channels, n]` or `[n]` and return the latents that they complete, `[latent_width, t]`.

        Both n and t may be 0.

        Raises:
            InputError: wrong shape or dtype, NaN or infinity. The stream can go on.
            NonFiniteError: the model overflowed, which ends the stream.
            BackendError: the backend failed, now or in an earlier call, which ends the stream.
        """
        return self.push_checked(as_clip(audio, empty=True))

    def push_checked(self, block: Array) -> Array:
        """Do the work of `push` with finite float32 samples `[channels, n]`, such as those of `AudioReader`.

        Raises:
            InputError, NonFiniteError, BackendError: as `push`.
        """
        block = to_channels(block, self._backend.spec.channels)
        self._begin_step()
        if self._received == 0:
            self.samples = 0
        self._received += block.shape[-1]
        audio = self._resampler.push(block)
        self.samples += audio.shape[-1]
        return self._advance(audio)

    def finish(self) -> Array:
        """End the stream and return its last latents, `[latent_width, t]`; the last one is padded with silence.

        Raises:
            InputError: no samples were received.
            NonFiniteError, BackendError: as `push`.
        """
        if self._received == 0:
            raise InputError("no samples were received; push some before finish")
        self._begin_step()
        audio = self._resampler.finish()
        self.samples += audio.shape[-1]
        padding = -self.samples % self._backend.spec.hop
        return self._advance(np.pad(audio, [(0, 0), (0, padding)]), final=True)


class StreamDecoder(Stream):
    """Decode latents that arrive in blocks of any size. The audio equals that of one pass over everything.

    The audio of a latent is returned when the window that holds it is full, at the latest `latency` latents later.
    After `finish` the next block begins a new stream.
    """

    def __init__(self, backend: Backend, plan: ExactWindows) -> None:
        super().__init__(backend, DECODER, plan)

    def push(self, latents: Any) -> Array:
        """Take latents `[latent_width, t]` and return the samples that they complete, `[channels, n]`.

        Both t and n may be 0.

        Raises:
            InputError, NonFiniteError, BackendError: as `StreamEncoder.push`.
        """
        array, width = to_float32(latents, LATENTS, empty=True), self._backend.spec.latent_width
        if array.ndim != 2 or array.shape[0] != width:
            raise InputError(
                f"latents must be [{width}, length], got {list(array.shape)}; "
                "pass one clip without its batch: latents[0]"
            )
        self._begin_step()
        self._received += array.shape[-1]
        return self._advance(array)

    def finish(self) -> Array:
        """End the stream and return its last samples, `[channels, n]`.

        Raises:
            InputError: no latents were received.
            NonFiniteError, BackendError: as `push`.
        """
        if self._received == 0:
            raise InputError("no latents were received; push some before finish")
        self._begin_step()
        return self._advance(np.zeros((self._backend.spec.latent_width, 0), np.float32), final=True)
