"""Command-line options that select a model, its backend, and how it runs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from samekit.engine.hub import with_revision
from samekit.engine.spec import DEVICES, RUN_PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.model import AutoencoderModel


MODEL_HELP = "A name, an engine folder, owner/name on the hub, or a checkpoint folder."
"""Help of `--model` where a checkpoint can run in PyTorch."""
ENGINE_HELP = "A name, an engine folder, or owner/name on the hub."
"""Help of `--model` where only engines can be used."""


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--model`, `--revision` and the options of `backend_options` to a command."""
    return model_option(MODEL_HELP)(backend_options(command))


def model_option(description: str, *, required: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add `--model`, which has no default in any command, and `--revision`; the command gets `NAME@REVISION`."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.option("--model", required=required, help=description)
        @click.option("--revision", help="Branch, tag or commit of owner/name.")
        @functools.wraps(command)
        def with_model(*args: Any, model: str | None, revision: str | None, **options: Any) -> Any:
            return command(*args, model=with_revision(model, revision) if model else model, **options)

        return with_model

    return add


BACKEND_OPTIONS = ("backend", "precision", "device", "threads", "providers", "provider_options", "window")
"""The arguments that `backend_options` adds, as `AutoencoderModel.from_pretrained` takes them."""


def backend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where and how a model runs."""
    for option in reversed(
        (
            click.option(
                "--backend", default="auto", show_default=True, help="auto, tensorrt, onnxruntime, openvino or torch."
            ),
            click.option("--precision", default="fp32", show_default=True, type=click.Choice(RUN_PRECISIONS)),
            click.option("--device", type=click.Choice(DEVICES), help="cpu or cuda, unless given."),
            click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: all cores]"),
            click.option(
                "--provider",
                "providers",
                metavar="NAME",
                multiple=True,
                callback=lambda _ctx, _parameter, names: names or None,
                help="ONNX Runtime's execution provider, also of an installed plugin; repeat it for the next best.",
            ),
            click.option(
                "--provider-option",
                "provider_options",
                metavar="NAME=VALUE",
                multiple=True,
                callback=_as_mapping,
                help="Option of ONNX Runtime's provider; can be repeated.",
            ),
            click.option("--window", type=click.IntRange(min=1), help="Latents computed at once; bounds the memory."),
        )
    ):
        command = option(command)
    return command


def _as_mapping(_ctx: click.Context, _parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str] | None:
    """Return the values of `--provider-option` by name, None if there are none."""
    for pair in pairs:
        if not pair.partition("=")[0].strip() or "=" not in pair:
            raise click.BadParameter(f"{pair!r} is not of the form NAME=VALUE.")
    return dict(pair.split("=", 1) for pair in pairs) or None


def open_model(model: str, **options: Any) -> AutoencoderModel:
    """Open the model that the options of `model_options` select."""
    from samekit.model import AutoencoderModel

    return AutoencoderModel.from_pretrained(model, **options)
