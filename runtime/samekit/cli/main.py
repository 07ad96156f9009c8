"""The `samekit` command. Its subcommands import what they need when they run."""

from __future__ import annotations

import logging

import click

from samekit import __version__
from samekit.cli.audio import decode, encode
from samekit.cli.dataset import check_latents, pre_encode
from samekit.cli.engine import clean, info
from samekit.cli.group import Command, EscapingFormatter, say
from samekit.cli.serve import serve, triton
from samekit.errors import SamekitError
from samekit.packages import load_registered, registered

GROUP = "samekit.commands"
"""The entry points that add commands; samekit_export registers `export`, `report` and `verify`."""


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
        return loaded


def _unavailable(name: str, error: SamekitError) -> click.Command:
    """Return a command that raises an error, so that the list of commands can be shown."""

    def fail() -> None:
        raise error

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, anything, fail, help=f"Unavailable: {error}")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Say which backend was chosen, and why not another one.")
def main(verbose: bool) -> None:
    """Run and export the SAME audio autoencoders of Stable Audio 3."""
    handler = logging.StreamHandler()
    handler.setFormatter(EscapingFormatter("samekit: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    # This library installs its own log handler, so each of its lines would be shown twice.
    logging.getLogger("huggingface_hub").propagate = False


@click.command()
def doctor() -> None:
    """Show which parts of samekit work on this machine, and what to install for the others."""
    from samekit.doctor import examine

    for line in examine():
        say(line)


for command in (encode, decode, pre_encode, check_latents, info, doctor, triton, serve, clean):
    main.add_command(command)
