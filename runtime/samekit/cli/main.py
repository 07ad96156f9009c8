"""The `samekit` command. Its subcommands import what they need when they run."""

from __future__ import annotations

import logging

import click

from samekit import __version__
from samekit.cli.audio import decode, encode
from samekit.cli.dataset import check_latents, pre_encode
from samekit.cli.demo import demo
from samekit.cli.engine import clean, info, tune
from samekit.cli.group import Command, EscapingFormatter, add_verbose, json_option, say, say_json
from samekit.cli.hub import pull, push
from samekit.cli.serve import serve, triton
from samekit.errors import SamekitError
from samekit.packages import load_registered, registered

GROUP = "samekit.commands"
"""The entry points that add commands; samekit_export registers `export`, `report` and `verify`."""

_START = """samekit runs the SAME audio autoencoders of Stable Audio 3. To begin:

  samekit demo                                        encode and decode a piece of music, and listen to it
  samekit encode song.wav song.npy --model same-tiny  encode a file of yours
  samekit doctor                                      see what works on this machine, and what to install

All commands: samekit --help"""

# click does not wrap a paragraph that begins with \b.
_COMPLETION = """\b
The Tab key completes commands and options after this line, in zsh with zsh_source:
  eval "$(_SAMEKIT_COMPLETE=bash_source samekit)\""""


class _Group(Command, click.Group):
    """A group that contains the commands of other packages too, and imports them when they are run or listed."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *registered(GROUP)})

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        entry = registered(GROUP).get(cmd_name)
        if entry is None:
            return None
        try:
            loaded: click.Command = load_registered(entry)
        except SamekitError as error:
            return _unavailable(cmd_name, error)
        add_verbose(loaded)
        return loaded


def _unavailable(name: str, error: SamekitError) -> click.Command:
    """Return a command that raises an error, so that the list of commands can be shown."""

    def fail() -> None:
        raise error

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, anything, fail, help=f"Unavailable: {error}")


@click.group(
    cls=_Group,
    invoke_without_command=True,
    epilog=_COMPLETION,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Run and export the SAME audio autoencoders of Stable Audio 3."""
    handler = logging.StreamHandler()
    handler.setFormatter(EscapingFormatter("samekit: %(message)s"))
    logging.basicConfig(handlers=[handler])
    # This library installs its own log handler, so each of its lines would be shown twice.
    logging.getLogger("huggingface_hub").propagate = False
    if ctx.invoked_subcommand is None:
        click.echo(_START)


@click.command()
@json_option(
    "versions, processor, memory (bytes), disk, packages (version, problem, install and notes of "
    "each), gpus, engines and verdict"
)
def doctor(as_json: bool) -> None:
    """Show which parts of samekit work on this machine, what to install for the others, and a verdict."""
    from samekit.doctor import describe, examine

    if as_json:
        say_json(dict(examine()))
        return
    for section, value in examine():
        for line in describe(section, value):
            say(line)


for command in (demo, encode, decode, pre_encode, check_latents, info, doctor, serve, triton, clean, tune, pull, push):
    add_verbose(command)
    main.add_command(command)
add_verbose(main)
