"""How far the encoding of a dataset is, for people: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from samekit.dataset.report import Progress

_SECONDS_BETWEEN_LINES: Final = 10.0


class Display:
    """Shows each `Progress` it is called with, on standard error; a context manager."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._shown = 0
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
        note = f"{progress.speed:.1f} s of audio/s, {progress.bad} bad"
        self._bar.update(progress.done - self._shown, note)
        self._shown = progress.done


class Bar:
    """A bar of tqdm that stops no work; a context manager.

    Users set up tqdm through environment variables (`TQDM_ASCII`, `TQDM_NCOLS`, ...), and a value that tqdm cannot use
    raises anything, on import or later. Such a bar is not shown.

    Args:
        options: arguments of `tqdm.tqdm`.
    """

    def __init__(self, **options: Any) -> None:
        self._bar: Any = None
        with self._attempt():
            from tqdm import tqdm  # noqa: PLC0415

            self._bar = tqdm(**options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, count: int, note: str | None = None) -> None:
        """Advance by `count` units, and show a note behind the bar."""
        with self._attempt():
            if self._bar is not None:
                if note is not None:
                    self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(count)

    def close(self) -> None:
        """End the bar."""
        with self._attempt():
            if self._bar is not None:
                self._bar.close()

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Give the bar up if the block raises; a terminal that is gone or full is not its fault."""
        try:
            yield
        except OSError:
            pass
        except Exception:  # noqa: BLE001 tqdm raises whatever a wrong setting leads to
            if self._bar is not None:
                # Its destructor draws it once more.
                self._bar.disable = True
            self._bar = None


def bar(**options: Any) -> Bar:
    """Return a bar on a terminal, unless `TQDM_DISABLE` switches it off, and one that shows nothing elsewhere."""
    # Given as an argument, False would overrule the environment.
    return Bar(**options) if _on_terminal() else Bar(disable=True, **options)


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
