"""Show the progress of long work: a bar on a terminal, lines of text elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.dataset.report import Progress

_SECONDS_BETWEEN_LINES: Final = 10.0


class Display(ExitStack):
    """Shows each `Progress` that it is called with on standard error."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Bar | None = None
        self._shown = 0
        self._next_line = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show the progress."""
        # If standard error cannot be written, the run continues.
        with suppress(OSError):
            if _on_terminal():
                self._advance_bar(progress)
            elif sys.stderr and (time.monotonic() >= self._next_line or progress.done == progress.total):
                self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
                print(progress.describe(), file=sys.stderr, flush=True)  # noqa: T201 shown in logs

    def _advance_bar(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = self.enter_context(bar(total=progress.total, unit="clip", dynamic_ncols=True))
        note = f"{progress.speed:.1f} s of audio/s, {progress.bad} bad"
        self._bar.update(progress.done - self._shown, note)
        self._shown = progress.done


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

    def update(self, count: int, note: str | None = None) -> None:
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


def bar(**options: Any) -> Bar:
    """Return a bar that is shown on a terminal only. `TQDM_DISABLE` switches it off."""
    # The argument disable=False would override the environment.
    return Bar(**options) if _on_terminal() else Bar(disable=True, **options)


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
