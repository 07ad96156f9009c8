"""What the benchmarks share: options, sessions, honest timing, pictures, and the last line of JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
import onnxruntime

from samekit.backends.ort import CPU_PROVIDER, session_options
from samekit.cli import Command
from samekit.spec import ENCODER
from samekit_export.measure import interleaved, machine, summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from samekit.autoencoder import Autoencoder

__all__ = ["counts", "finish", "half_of", "interleaved", "machine", "open_session", "plot_lines", "question", "summary"]

question = click.command(cls=Command)
"""Makes a benchmark of a function; its errors are one line each."""


def counts(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:  # noqa: ARG001 click's shape
    """Whole numbers from 1, separated by commas."""
    parts = value.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is no list of whole numbers from 1")
    return [int(part) for part in parts]


def half_of(codec: Autoencoder, half: str) -> Callable[[Any], Any]:
    """The call that users make."""
    return codec.encode_audio if half == ENCODER else codec.decode_audio


def open_session(
    graph: bytes | Path, threads: int, precision: str, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session as the runtime opens it, with a profiler if it has a place to write to."""
    options = session_options(onnxruntime, threads, precision)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(graph, options, providers=[CPU_PROVIDER])


def plot_lines(path: Path, points: Iterable[tuple[str, str, float, float]], x: str, y: str) -> None:
    """Write a picture of points (panel, line, abscissa, ordinate); needs matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise click.UsageError("--plot needs matplotlib; run: pip install matplotlib") from None

    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for panel, line, abscissa, ordinate in points:
        panels.setdefault(panel, {}).setdefault(line, []).append((abscissa, ordinate))
    figure, row = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), sharey=True, squeeze=False)
    for axes, (title, lines) in zip(row[0], panels.items(), strict=True):
        for name, line_points in lines.items():
            axes.plot(*zip(*line_points, strict=True), marker="o", label=name)
        axes.set(title=title, xlabel=x, xscale="log")
        axes.legend()
    row[0][0].set_ylabel(y)
    row[0][0].set_ylim(bottom=0)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def finish(question: str, results: object) -> None:
    """The last line: everything, for machines."""
    print(json.dumps({"benchmark": question, "machine": machine(), "results": results}))
