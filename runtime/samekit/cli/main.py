"""The `samekit` command: its subcommands are thin, and import what they need when they run."""

from __future__ import annotations

import logging

import click

from samekit import __version__
from samekit.cli.audio import decode, encode
from samekit.cli.dataset import check_latents, pre_encode
from samekit.cli.export import clean, export, info, report, verify
from samekit.cli.group import EscapingFormatter, Group, say
from samekit.cli.serve import triton


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Say which backend was chosen and why others were not.")
def main(verbose: bool) -> None:
    """Run and export the SAME audio autoencoders of Stable Audio 3."""
    handler = logging.StreamHandler()
    handler.setFormatter(EscapingFormatter("samekit: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    # This library installs a log handler. Without this each of its lines would be shown twice.
    logging.getLogger("huggingface_hub").propagate = False


@click.command()
def doctor() -> None:
    """Show what of samekit works on this machine, and what would have to be installed for the rest."""
    from samekit.doctor import examine  # noqa: PLC0415

    for line in examine():
        say(line)


for command in (encode, decode, pre_encode, check_latents, export, report, info, doctor, triton, clean, verify):
    main.add_command(command)
