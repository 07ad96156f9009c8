"""`samekit push` and `samekit pull`: engines on the Hugging Face hub."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from samekit.cli.group import UserPath, say
from samekit.engine.spec import DIRECTIONS, RUN_PRECISIONS, Direction, graph_precision
from samekit.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("engine", type=UserPath())
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Create a private repository.")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to, created if it does not exist.")
@click.option("--yes", is_flag=True, help="Accept the conditions of the weights' licence without a question.")
def push(engine: Path, repository: str, private: bool, revision: str | None, yes: bool) -> None:
    """Upload an ENGINE folder (or a model's name) to a repository on the hub, with a model card.

    TensorRT engines are left out.
    """
    from samekit.engine.exchange import publish
    from samekit.engine.folder import find_engine
    from samekit.engine.model_card import duties

    found = find_engine(engine)
    conditions = duties(found.spec)
    for sentence in conditions:
        say(sentence)
    if conditions and not yes:
        if not sys.stdin.isatty():
            raise InputError(
                f"{found.folder}: publishing these weights has conditions, and there is no terminal to ask on; read "
                "them above, and pass --yes"
            )
        if not click.confirm("Do you meet these conditions?"):
            raise InputError("nothing was uploaded; meet the conditions first, or push another engine")
    name = publish(found, repository, branch=revision, private=private)
    say(f"uploaded; use it with --model {name}")


@click.command()
@click.argument("repository", metavar="OWNER/NAME")
@click.argument("folder", required=False, type=UserPath())
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--precision", default="fp32", show_default=True, help="fp32, fp16 or int8; several separated by commas.")
@click.option("--only", type=click.Choice(DIRECTIONS), help="Fetch one half of the engine.")
def pull(repository: str, folder: Path | None, revision: str | None, precision: str, only: Direction | None) -> None:
    """Fetch an engine from the hub, to use it later without a network. Print what to pass as --model.

    The files go to the hub's cache, and are copied to FOLDER if it is given.
    """
    from samekit.engine import hub
    from samekit.engine.exchange import copy_engine, fetch
    from samekit.engine.folder import engine_on_hub

    base, given = hub.split_revision(repository)
    if not hub.REPOSITORY.fullmatch(base):
        raise InputError(f"{repository!r} is no repository of the hub; pass owner/name")
    wanted, directions = precision.replace(" ", "").split(","), (only,) if only else DIRECTIONS
    for name in wanted:
        if name not in RUN_PRECISIONS:
            raise InputError(f"--precision {name!r} is not known; pass some of {', '.join(RUN_PRECISIONS)}")
    precisions = list(dict.fromkeys(map(graph_precision, wanted)))
    engine = engine_on_hub(base, revision or given)
    if folder is None:
        fetch(engine, precisions, directions)
        say(engine.name)
    else:
        copy_engine(engine, folder, precisions, directions)
        say(str(folder))
