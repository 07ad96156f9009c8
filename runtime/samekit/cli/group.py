"""Code that all commands share: errors and signals become one line and an exit code; output is safe for terminals."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from samekit.errors import SamekitError
from samekit.files.paths import expanded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

STOPPED = "samekit.stopped"
"""Key of `click.Context.meta` for the message that is shown when a command is stopped."""


def escape_control_characters(text: str) -> str:
    """Return text as one line. Control characters, and those that standard output cannot encode, become escapes."""
    shown = (
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in " ".join(text.splitlines())
    )
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return "".join(shown).encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, *, err: bool = False) -> None:
    """Print one line. If it cannot be written, for example because a pipe was closed, the command continues."""
    try:
        click.echo(escape_control_characters(text), err=err)
    except OSError:
        stream = sys.stderr if err else sys.stdout
        # Python would try to write the rest of the stream's buffer again when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_json(fields: Mapping[str, Any]) -> None:
    """Print one JSON object in one line of ASCII. JSON has no infinity and no NaN, so these become null."""
    say(json.dumps(json.loads(json.dumps(fields), parse_constant=lambda _: None)))


def json_option(fields: str) -> Callable[..., Any]:
    """Add `--json` to a command; the help names the fields of the object that it prints in place of text."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print one JSON object: {fields}.")


class EscapingFormatter(logging.Formatter):
    """Format log messages as `escape_control_characters` does."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_control_characters(super().format(record))


class Command(click.Command):
    """A command that prints errors and signals as one line.

    The exit code is 2 after a `SamekitError` or wrong arguments and, as in shells, 130 after Ctrl-C and 143 after
    SIGTERM. The signals raise KeyboardInterrupt, so that unfinished files are deleted first.
    """

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _catch_signals() as received:
            try:
                with _usage_errors():
                    result = super().invoke(ctx)
                # A library may have caught KeyboardInterrupt and continued.
                if not received:
                    return result
            except SamekitError as error:
                if not received:
                    raise _Failure(escape_control_characters(str(error))) from None
            except KeyboardInterrupt:
                # Raised by a library, or in a thread that cannot install signal handlers.
                if not received:
                    received.append(signal.SIGINT)
            # Some libraries turn KeyboardInterrupt into other errors.
            except Exception:
                if not received:
                    raise
        say(ctx.meta.get(STOPPED, "stopped; run the same command again"), err=True)
        sys.exit(128 + received[0])


class UserPath(click.Path):
    """A path whose leading `~` is expanded, which shells leave as it is in `--option=~/name`.

    The functions that open the path check whether it can be read, because they give better messages.
    """

    def __init__(self) -> None:
        super().__init__(readable=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(expanded(value), param, ctx)


class _Failure(click.ClickException):
    exit_code = 2


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Report wrong arguments in one line. click prints its usage line and a hint before the error."""
    try:
        yield
    except click.UsageError as error:
        # This one has the help as its message.
        if error.ctx is None or isinstance(error, click.exceptions.NoArgsIsHelpError):
            raise
        cause = " ".join(error.format_message().split()).removesuffix(".")
        text = f"{cause}; run: {error.ctx.command_path} --help"
        raise _Failure(escape_control_characters(text)) from None


def _set_verbose(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Show messages of level INFO until the command ends."""
    if value:
        logger = logging.getLogger()
        ctx.call_on_close(partial(logger.setLevel, logger.level))
        logger.setLevel(logging.INFO)


def add_verbose(command: click.Command) -> None:
    """Add `-v` and `--verbose` to a command, unless it has options of these names."""
    names = ["-v", "--verbose"]
    if not any(name in param.opts for param in command.params for name in names):
        shown = "Say which backend was chosen, and why not another one."
        option = click.Option(names, is_flag=True, expose_value=False, callback=_set_verbose, help=shown)
        command.params.append(option)


@contextmanager
def _catch_signals() -> Iterator[list[signal.Signals]]:
    """Raise KeyboardInterrupt for SIGINT and SIGTERM, and yield a list of those that were received.

    Signals that are ignored or have a handler of another program keep it.
    """
    received: list[signal.Signals] = []

    def stop(number: int, _frame: object) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    caught = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    # Python installs signal handlers from the main thread only.
    if threading.current_thread() is not threading.main_thread():
        caught = []
    for number in caught:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number in caught:
            signal.signal(number, before[number])
