"""`samekit triton`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from samekit.cli.group import UserPath, say
from samekit.cli.model_options import ENGINE_HELP, model_option
from samekit.engine.spec import PRECISIONS

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("out", type=UserPath())
@model_option(ENGINE_HELP)
@click.option("--backend", default="onnxruntime", show_default=True, type=click.Choice(["onnxruntime", "tensorrt"]))
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(PRECISIONS))
@click.option(
    "--max-batch", default=8, show_default=True, type=click.IntRange(min=1), help="Requests of one length run at once."
)
@click.option(
    "--queue-delay", default=2000, show_default=True, type=click.IntRange(min=0), help="Microseconds to wait for more."
)
@click.option("--instances", default=1, show_default=True, type=click.IntRange(min=1), help="Copies on each device.")
@click.option("--kind", default="auto", show_default=True, type=click.Choice(["auto", "gpu", "cpu"]))
def triton(out: Path, model: str, **options: Any) -> None:
    """Write a model repository OUT for the Triton Inference Server."""
    from samekit.engine.folder import find_engine
    from samekit.serving.triton import TritonOptions, write_repository

    for folder in write_repository(find_engine(model), out, TritonOptions(**options)):
        say(str(folder))
