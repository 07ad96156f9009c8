"""The command group: errors and stops become one line and an exit code, and what is printed is safe for terminals."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from samekit.errors import SamekitError
from samekit.files.paths import expanded

if TYPE_CHECKING:
    from collections.abc import Iterator


def escape_control_characters(text: str) -> str:
    """One line that any terminal takes and that steers none, although names in files and of files may hold anything."""
    shown = (
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in " ".join(text.splitlines())
    )
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return "".join(shown).encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, *, err: bool = False) -> None:
    """Print one line, if there is somebody to read it; work goes on where there is nobody or no room."""
    try:
        click.echo(escape_control_characters(text), err=err)
    except OSError:
        stream = sys.stderr if err else sys.stdout
        # What waits in its buffer would be tried again when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class EscapingFormatter(logging.Formatter):
    """Messages as `escape_control_characters` gives them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        return escape_control_characters(super().format(record))


class Command(click.Command):
    """Turns every error that samekit raises on purpose into one line and exit code 2, and what stops it into one too.

    Ctrl-C gives exit code 130, SIGTERM 143, as shells say it of programs that these end. Files that were being written
    are cleared away first.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        with _catch_signals() as came:
            try:
                result = super().invoke(ctx)
                # A library may have caught a stop and gone on.
                if not came:
                    return result
            except SamekitError as error:
                if not came:
                    raise _Failure(escape_control_characters(str(error))) from None
            except KeyboardInterrupt:
                # From a library, or a thread that could not ask for signals.
                if not came:
                    came.append(signal.SIGINT)
            # Some libraries turn a stop into errors of their own.
            except Exception:
                if not came:
                    raise
        say(ctx.meta.get(STOPPED, "stopped; run the same command again"), err=True)
        sys.exit(128 + came[0])


class UserPath(click.Path):
    """A path with a leading `~` expanded, which shells leave as it is in `--option=~/name`.

    Whether it can be read is found out by what opens it, in samekit's own message.
    """

    def __init__(self) -> None:
        super().__init__(readable=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        return super().convert(expanded(value), param, ctx)


class _Failure(click.ClickException):
    exit_code = 2


# Key of what a context has to say when its command is stopped.
STOPPED = "samekit.stopped"


@contextmanager
def _catch_signals() -> Iterator[list[signal.Signals]]:
    """Yield the signals that came to stop the program; each raises KeyboardInterrupt, where it would end it at once."""
    came: list[signal.Signals] = []

    def stop(number: int, _frame: object) -> None:
        came.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    # No other thread can ask for that.
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number in ours:
            signal.signal(number, before[number])
