"""`samekit triton`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from samekit.cli.group import UserPath, say
from samekit.engine.spec import PRECISIONS

if TYPE_CHECKING:
    from pathlib import Path

    from samekit.engine.folder import Engine
    from samekit.serving.triton import TritonOptions


@click.command()
@click.argument("out", type=UserPath())
@click.option("--model", required=True, help="A name or an engine folder.")
@click.option(
    "--backend", default="onnxruntime", show_default=True, type=click.Choice(["onnxruntime", "tensorrt", "python"])
)
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(PRECISIONS))
@click.option(
    "--max-batch", default=8, show_default=True, type=click.IntRange(min=1), help="Requests of one length run at once."
)
@click.option(
    "--queue-delay", default=2000, show_default=True, type=click.IntRange(min=0), help="Microseconds to wait for more."
)
@click.option("--instances", default=1, show_default=True, type=click.IntRange(min=1), help="Copies on each device.")
@click.option("--kind", default="auto", show_default=True, type=click.Choice(["auto", "gpu", "cpu"]))
@click.option(
    "--model-backend", default="auto", show_default=True, help="Of samekit in the Python backend, as in other commands."
)
@click.option("--streaming", is_flag=True, help="Answer in parts, window by window; for the Python backend and gRPC.")
@click.option(
    "--max-seconds", default=600, show_default=True, type=click.IntRange(min=1), help="Limit of the Python backend."
)
@click.option("--tune", is_flag=True, help="Measure --max-batch, --queue-delay and --instances on this machine.")
def triton(out: Path, model: str, tune: bool, **options: Any) -> None:
    """Write a model repository OUT for the Triton Inference Server."""
    from samekit.engine.folder import find_engine
    from samekit.serving.triton import TritonOptions, write_repository

    engine, chosen = find_engine(model), TritonOptions(**options)
    if tune:
        chosen = _tuned(engine, chosen)
    for folder in write_repository(engine, out, chosen):
        say(str(folder))


def _tuned(engine: Engine, options: TritonOptions) -> TritonOptions:
    """Return the fastest options of a sweep, and print what each of them gave."""
    from samekit.serving.triton_tuning import sweep

    measured = {}
    for candidate, speed in sweep(engine, options):
        measured[candidate] = speed
        say(
            f"--max-batch {candidate.max_batch} --instances {candidate.instances} --queue-delay "
            f"{candidate.queue_delay}: {speed:.1f} s of audio a second",
            err=True,
        )
    return max(measured, key=lambda each: measured[each])
