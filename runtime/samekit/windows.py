"""Plan which windows of a sequence to run, and which latents of each to keep.

    exact windows, context 1                         the reference's chunks, overlap 2
    |xxxxxxx.|                                       |xxxxxxx.|
          |.xxxxxx.|          x kept (the core)            |.xxxxxx.|
                |.xxxx|       . context, dropped            |..xxxxxx|  <- anchored at the end

Exact windows give the numbers of one pass over everything, whatever their size. The reference's chunks give the
numbers of its `chunked=True`. This module computes with positions only, not with arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from samekit.arguments import check_whole
from samekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Window:
    """A range of latents to run, and the part of it to keep.

    All positions count from the start of the sequence; the ends are exclusive.
    """

    start: int
    """First latent that runs."""
    stop: int
    """End of the latents that run."""
    core_start: int
    """First latent that is kept."""
    core_stop: int
    """End of the latents that are kept."""

    @property
    def core(self) -> slice:
        """The kept latents, counted from the window's start."""
        return slice(self.core_start - self.start, self.core_stop - self.start)


@dataclass(frozen=True)
class ExactWindows:
    """Windows of one size whose cores tile any sequence and equal one pass over it.

    Every window starts at a multiple of `alignment` and drops `context` latents at each inner edge. Only the last
    window may be shorter than `size`, and only the last one may end at a position that is not aligned.

    Raises:
        InputError: `size` leaves no core.
    """

    size: int
    """Latents in a window."""
    context: int
    """Latents at an inner edge that lack a part of what they attend to."""
    alignment: int
    """Starts and inner ends are multiples of this."""

    def __post_init__(self) -> None:
        if self.size % self.alignment or self.step < self.alignment:
            least = self.alignment * -(-(2 * self.context + self.alignment) // self.alignment)
            raise InputError(
                f"a window of {self.size} latents is not exact here; pass a multiple of {self.alignment} from {least}"
            )

    @property
    def step(self) -> int:
        """Latents from one window's start to the next one's."""
        room = self.size - 2 * self.context
        return room - room % self.alignment

    def over(self, latents: int) -> Iterator[Window]:
        """Yield the windows of a sequence of `latents`."""
        index = 0
        while (window := self.next(index, latents, final=True)) is not None:
            yield window
            index += 1

    def next(self, index: int, available: int, *, final: bool) -> Window | None:
        """Return window number `index`, counted from 0, or None if it is not needed or cannot be run yet.

        `available` latents of the sequence are known so far; `final` says whether the sequence ends there.
        """
        start = index * self.step
        stop = start + self.size
        core_start = start + self.context if index else 0
        if stop < available:
            return Window(start, stop, core_start, start + self.step + self.context)
        needed = available > (start - self.step + self.size if index else 0)
        if final and needed:
            return Window(start, available, core_start, available)
        return None


def reference_chunks(latents: int, chunk_size: int, overlap: int) -> list[Window]:
    """Return the chunks of the reference's `chunked=True`.

    Chunks start every `chunk_size - overlap` latents. If the last one does not end with the sequence, one more chunk
    is anchored at the end. `overlap // 2` latents are dropped at each inner edge. Where two chunks keep the same
    latent, the later chunk wins. A sequence no longer than a chunk is run in one pass.

    Raises:
        InputError: `chunk_size` or `overlap` leaves no step.
    """
    check_whole("chunk_size", chunk_size, least=1)
    check_whole("overlap", overlap, least=0)
    if overlap >= chunk_size:
        raise InputError(f"chunk_size {chunk_size} and overlap {overlap} do not work; pass 0 <= overlap < chunk_size")
    if latents <= chunk_size:
        return [Window(0, latents, 0, latents)]
    starts = list(range(0, latents - chunk_size + 1, chunk_size - overlap))
    if starts[-1] + chunk_size != latents:
        starts.append(latents - chunk_size)
    core_starts = [0] + [start + overlap // 2 for start in starts[1:]]
    core_stops = [*core_starts[1:], latents]
    return [
        Window(start, start + chunk_size, core_start, core_stop)
        for start, core_start, core_stop in zip(starts, core_starts, core_stops, strict=True)
    ]
