"""Command-line options that select a model, its backend, and how it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from samekit.engine.spec import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.model import AutoencoderModel


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--model` and the options of `backend_options` to a command."""
    model = click.option("--model", required=True, help="A name, an engine folder or a checkpoint folder.")
    return model(backend_options(command))


def backend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where and how a model runs."""
    for option in reversed(
        (
            click.option("--backend", default="auto", show_default=True, help="auto, tensorrt, onnxruntime or torch."),
            click.option("--precision", default="fp32", show_default=True, type=click.Choice(PRECISIONS)),
            click.option("--device", type=click.Choice(["cpu", "cuda"]), help="The best there is, unless given."),
            click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all cores]"),
            click.option("--window", type=click.IntRange(min=1), help="Latents computed at once; bounds the memory."),
        )
    ):
        command = option(command)
    return command


def open_model(model: str, **options: Any) -> AutoencoderModel:
    """Open the model that the options of `model_options` select."""
    from samekit.model import AutoencoderModel

    return AutoencoderModel.from_pretrained(model, **options)
