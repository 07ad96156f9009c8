"""`samekit demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from samekit.cli.group import UserPath, say

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("folder", type=UserPath(), default="samekit-demo")
def demo(folder: Path) -> None:
    """Encode and decode a built-in piece of music, and write a page with the result to FOLDER (samekit-demo)."""
    from samekit.demo import run_demo

    say("encoding and decoding 24 s of music with same-tiny")
    done = run_demo(folder)
    for name, value in done.figures.items():
        say(f"  {name}: {value}")
    say(f"Listen and look: {done.page.resolve().as_uri()}")
