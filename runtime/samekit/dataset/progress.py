"""Show the progress of long work: a bar on a terminal, lines of text elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from samekit.dataset.report import Progress

_SECONDS_BETWEEN_LINES: Final = 10.0


class _Lines:
    """Prints lines on standard error: the first one at once, the others at intervals."""

    def __init__(self) -> None:
        self._next = 0.0

    def show(self, describe: Callable[[], str], *, now: bool = False) -> None:
        """Print a line if it is time for one, or `now`."""
        if sys.stderr and (now or time.monotonic() >= self._next):
            self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
            # If standard error cannot be written, the work continues.
            with suppress(OSError):
                print(describe(), file=sys.stderr, flush=True)  # noqa: T201 shown in logs


class Display(ExitStack):
    """Shows each `Progress` that it is called with on standard error."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Bar | None = None
        self._lines = _Lines()
        self._shown = 0

    def __call__(self, progress: Progress) -> None:
        """Show the progress."""
        if _on_terminal():
            self._advance_bar(progress)
        else:
            self._lines.show(progress.describe, now=progress.done == progress.total)

    def _advance_bar(self, progress: Progress) -> None:
        if self._bar is None:
            self._shown = progress.earlier
            options = {"total": progress.total, "initial": progress.earlier, "unit": "clip", "dynamic_ncols": True}
            self._bar = self.enter_context(Bar(**options))
        self._bar.update(progress.done - self._shown, f"{progress.speed:.1f} x real time, {progress.bad} bad")
        self._shown = progress.done


class AudioDisplay(ExitStack):
    """Shows on standard error how much of one file is done, in seconds of audio and as a multiple of real time.

    Args:
        what: text before the figures, such as `encoding song.wav`.
        seconds: length of the audio; None if it is unknown.
    """

    def __init__(self, what: str, seconds: float | None) -> None:
        super().__init__()
        self._what = what
        self._total = seconds
        self._done = 0.0
        self._start = time.monotonic()
        self._lines = _Lines()
        self._bar: Bar | None = None
        if _on_terminal():
            length = (
                "{desc}: {n:.0f} s of audio" if seconds is None else "{desc}: |{bar}| {n:.0f} of {total:.0f} s of audio"
            )
            style = f"{length} [{{elapsed}}{{postfix}}]"
            self._bar = self.enter_context(Bar(desc=what, total=seconds, bar_format=style, dynamic_ncols=True))
        else:
            self._lines.show(lambda: what if seconds is None else f"{what}: {seconds:.0f} s of audio")

    def advance(self, seconds: float) -> None:
        """Show that this many more seconds of audio are done."""
        self._done += seconds
        if self._bar:
            self._bar.update(seconds, f"{self._speed:.1f} x real time")
        else:
            self._lines.show(self._describe)

    @property
    def _speed(self) -> float:
        return self._done / max(time.monotonic() - self._start, 1e-9)

    def _describe(self) -> str:
        done = f"{self._done:.0f}" if self._total is None else f"{self._done:.0f} of {self._total:.0f}"
        return f"{self._what}: {done} s of audio, {self._speed:.1f} x real time"


class Bar(AbstractContextManager["Bar"]):
    """A progress bar of tqdm whose errors never stop the work.

    Environment variables (`TQDM_ASCII`, `TQDM_NCOLS`, ...) configure tqdm. An invalid value can raise any exception, on
    import or later. Then the bar is no longer shown.

    Args:
        options: arguments of `tqdm.tqdm`.
    """

    def __init__(self, **options: Any) -> None:
        self._bar: Any = None
        with self._attempt():
            from tqdm import tqdm

            self._bar = tqdm(**options)

    def update(self, count: float, note: str | None = None) -> None:
        """Advance by `count` units, and show a note after the bar."""
        with self._attempt():
            if self._bar is not None:
                if note is not None:
                    self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(count)

    def __exit__(self, *_: object) -> None:
        with self._attempt():
            if self._bar is not None:
                self._bar.close()

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Ignore exceptions, and hide the bar after one, unless the terminal cannot be written."""
        try:
            yield
        except OSError:
            pass
        except Exception:  # noqa: BLE001 an unusable setting may raise anything
            if self._bar is not None:
                # Without this, tqdm's destructor draws the bar again.
                self._bar.disable = True
            self._bar = None


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
