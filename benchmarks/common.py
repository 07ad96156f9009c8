"""Code that the benchmarks share: options, sessions, timing, pictures, and the last line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from samekit import AutoencoderModel
from samekit.backends.onnxruntime import session_options
from samekit.backends.providers import CPU_PROVIDER
from samekit.cli.group import Command
from samekit.engine.folder import Engine, find_engine
from samekit.engine.spec import ENCODER, Direction
from samekit.errors import SamekitError
from samekit.packages import import_onnxruntime
from samekit_export.checkpoint import load
from samekit_export.measure import machine
from samekit_export.random_weights import RANDOM_MODELS, TRAINED_LIKE, random_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from onnxruntime import InferenceSession

    from samekit.batches import Autoencoder
    from samekit_export.tensors import Checkpoint

STARTED = machine()
"""The machine before the measurement, so that its load shows other programs only."""

GPU_LATENTS: Final = (128, 256, 512, 1024, 4096)
"""The lengths that are measured on a GPU: those of the published table of the reference's TensorRT port."""

question = click.command(cls=Command)
"""Decorator that makes a function a benchmark command, which prints every error as one line."""


def counts(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Parse whole numbers from 1, separated by commas."""
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is no list of whole numbers from 1")
    return [int(part) for part in parts]


def listed(numbers: Iterable[int]) -> str:
    """Return numbers as `counts` parses them."""
    return ",".join(map(str, numbers))


class Refusal(click.ClickException):
    """An error in the arguments, shown in one line as `Command` shows errors of samekit."""

    exit_code = 2


def _engine(context: click.Context, parameter: click.Parameter, value: str) -> Engine:
    """Find the engine folder while the command line is parsed."""
    try:
        return find_engine(value)
    except SamekitError as error:
        raise Refusal(str(error)) from None


engine_argument = click.argument("engine", callback=_engine)
"""A model's name or its engine folder, as a `samekit.engine.folder.Engine`."""


backend_option = click.option(
    "--backend", default="onnxruntime", show_default=True, type=click.Choice(["onnxruntime", "openvino"])
)
"""The backend that a benchmark measures."""


def _plottable(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Raise a usage error, before anything is measured, if the picture could not be written."""
    if value is not None:
        try:
            import matplotlib as mpl  # noqa: F401
        except ImportError:
            raise click.UsageError("--plot needs matplotlib; run: pip install matplotlib") from None
        if not os.access(value.parent, os.W_OK):
            raise click.BadParameter(f"{value.parent} is no folder that can be written to")
    return value


plot_option = click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=_plottable,
    help="Write a picture; needs matplotlib.",
)
"""The path of a benchmark's picture."""


def checkpoint_of(model: str, seed: int = 0) -> Checkpoint:
    """Load a model by name: random weights of `same-s`, `same-l`, `tiny-s` and `tiny-l`, and trained ones of others."""
    return random_checkpoint(model, seed, TRAINED_LIKE) if model in RANDOM_MODELS else load(model)


def call_of(codec: Autoencoder, direction: Direction) -> Callable[[Any], Any]:
    """Return the method that encodes or decodes arrays."""
    return codec.encode_audio if direction == ENCODER else codec.decode_audio


def open_codec(engine: Path, backend: str, precision: str, threads: int | None, device: str = "cpu") -> Autoencoder:
    """Open one candidate."""
    return AutoencoderModel.from_pretrained(
        engine, device, backend=backend, precision=precision, threads=threads
    ).autoencoder


def open_session(graph: bytes | Path, threads: int, precision: str, profile: Path | None = None) -> InferenceSession:
    """Open a session as the runtime does, with a profiler that writes to `profile` if given."""
    onnxruntime = import_onnxruntime()
    options = session_options(onnxruntime, threads, precision)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(graph, options, providers=[CPU_PROVIDER])


def child(*command: str | Path) -> str:
    """Run a command and return its output.

    Raises:
        click.ClickException: the command failed; the message is the last line of its errors.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise click.ClickException(said[-1])
    return done.stdout


def plot_lines(
    path: Path, points: Iterable[tuple[str, str, float, float]], x: str, y: str, xscale: str = "log"
) -> None:
    """Write a picture of lines through points; each point is a panel, a line, x and y."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for panel, line, x_value, y_value in points:
        panels.setdefault(panel, {}).setdefault(line, []).append((x_value, y_value))

    def draw(axes: Any, title: str) -> None:
        for name, line_points in panels[title].items():
            axes.plot(*zip(*line_points, strict=True), marker="o", label=name)
        axes.set(xlabel=x, xscale=xscale, ylabel=y)
        axes.set_ylim(bottom=0)
        axes.legend()

    _plot(path, panels, draw)


def plot_bars(path: Path, panels: Mapping[str, Mapping[str, float]], x: str) -> None:
    """Write a picture of panels, which each have one bar for every name."""

    def draw(axes: Any, title: str) -> None:
        bars = axes.barh(list(panels[title]), list(panels[title].values()))
        axes.bar_label(bars, fmt="%.3g")
        axes.invert_yaxis()
        axes.set(xlabel=x)

    _plot(path, panels, draw)


def _plot(path: Path, titles: Iterable[str], draw: Callable[[Any, str], None]) -> None:
    import matplotlib.pyplot as plt

    names = list(titles)
    figure, row = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False, layout="constrained")
    for axes, title in zip(row[0], names, strict=True):
        axes.set_title(title)
        draw(axes, title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def finish(benchmark: str, results: object) -> None:
    """Print the last line: machine, options, engine and results of a benchmark as JSON."""
    options = click.get_current_context().params
    engine: Engine | None = options.get("engine")
    document: dict[str, Any] = {"benchmark": benchmark, "machine": STARTED, "options": options}
    if engine is not None:
        document["options"] = options | {"engine": engine.folder.absolute()}
        spec = engine.spec
        facts = {"name": spec.name, "source": spec.source, "source_sha256": spec.source_sha256, "tools": spec.tools}
        document["engine"] = facts
    load, cores = STARTED["load"], STARTED["cores"]
    if load is not None and load > 1.5 * cores:
        print(f"the load was {load} on {cores} cores when this began: other work makes these figures worthless")
    print(json.dumps(document | {"results": results}, default=str))
