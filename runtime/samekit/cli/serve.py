"""`samekit triton` and `samekit serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from samekit.cli.group import STOPPED, UserPath, say
from samekit.cli.model_options import ENGINE_HELP, model_option
from samekit.engine.spec import PRECISIONS, RUN_PRECISIONS

if TYPE_CHECKING:
    from pathlib import Path

    from samekit.engine.folder import Engine
    from samekit.serving.triton import TritonOptions


@click.command()
@click.argument("out", type=UserPath())
@model_option(ENGINE_HELP)
@click.option(
    "--backend", default="onnxruntime", show_default=True, type=click.Choice(["onnxruntime", "tensorrt", "python"])
)
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(PRECISIONS))
@click.option(
    "--max-batch",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="Clips of a request, and of requests run at once.",
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
    from samekit.files.atomic import require_absent
    from samekit.serving.triton import TritonOptions, write_repository

    engine, chosen = find_engine(model), TritonOptions(**options)
    if tune:
        # Before the minutes that the measurement takes.
        require_absent(out)
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


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--backend", default="auto", show_default=True, help="auto, tensorrt, onnxruntime, openvino or torch.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(RUN_PRECISIONS))
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(min=1), help="Processes with a model.")
@click.option("--cpus-per-replica", type=click.IntRange(min=1), help="[default: all cores, divided by the replicas]")
@click.option("--gpus-per-replica", default=0.0, show_default=True, help="1, or a share of one GPU.")
@click.option("--max-batch", default=8, show_default=True, type=click.IntRange(min=1), help="Windows in a GPU batch.")
@click.option("--max-wait-ms", default=5, show_default=True, type=click.IntRange(min=0), help="Wait for such a batch.")
@click.option("--max-queue", default=64, show_default=True, type=click.IntRange(min=1), help="Requests of a replica.")
@click.option("--max-seconds", default=600, show_default=True, type=click.IntRange(min=1), help="Audio of a request.")
@click.option("--max-bytes", default=2**28, show_default=True, type=click.IntRange(min=1), help="Body of a request.")
def serve(model: str, host: str, port: int, **options: Any) -> None:
    """Serve MODEL over HTTP with Ray Serve, until Ctrl-C or SIGTERM."""
    from samekit.serving.options import ServeOptions
    from samekit.serving.server import run, watch

    click.get_current_context().meta[STOPPED] = "stopped"
    with run(ServeOptions(model, **options), host, port) as url:
        say(f"samekit serves {model} on {url}")
        watch()
