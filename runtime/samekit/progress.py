"""How far the encoding of a dataset is, for people: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from samekit.dataset import Progress

_SECONDS_BETWEEN_LINES: Final = 10.0


class Display:
    """Shows each `Progress` it is called with, on standard error; a context manager."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._next_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> None:
        """Show how far it is."""
        # Nobody may be there to see it, and a log may be full: that stops no work.
        with suppress(OSError):
            if _on_terminal():
                self._advance_bar(progress)
            elif time.monotonic() >= self._next_line or progress.done == progress.total:
                self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
                print(describe(progress), file=sys.stderr, flush=True)  # noqa: T201 this is its purpose

    def _advance_bar(self, progress: Progress) -> None:
        """Draw the bar; it counts clips, and tells the rest behind them."""
        if self._bar is None:
            self._bar = bar(total=progress.total, unit="clip", dynamic_ncols=True)
        self._bar.set_postfix_str(f"{progress.speed:.1f} s of audio/s, {progress.bad} bad", refresh=False)
        self._bar.update(progress.done - self._bar.n)


def bar(**options: Any) -> Any:
    """A bar of tqdm, on terminals only."""
    from tqdm import tqdm  # noqa: PLC0415

    return tqdm(disable=not _on_terminal(), **options)


def _on_terminal() -> bool:
    """Whether there is a standard error, and it is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def describe(progress: Progress) -> str:
    """One line that says everything."""
    minutes, seconds = divmod(round(progress.remaining), 60)
    hours, minutes = divmod(minutes, 60)
    # Before the first clip is encoded, nobody knows; and at the end there is nothing left.
    known = progress.audio_seconds > 0 and progress.done < progress.total
    left = f"{hours}:{minutes:02d}:{seconds:02d} left, " if known else ""
    return (
        f"{progress.done} of {progress.total} clips, {progress.audio_seconds:.0f} s of audio at "
        f"{progress.speed:.1f} s/s, {left}{progress.bad} bad"
    )
