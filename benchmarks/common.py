"""What the benchmarks share: the machine's description, honest timing, and the last line of JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from samekit.spec import ENCODER
from samekit_export.measure import interleaved, machine, summary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from samekit.autoencoder import Autoencoder

__all__ = ["finish", "half_of", "interleaved", "machine", "plot_lines", "summary"]


def half_of(codec: Autoencoder, half: str) -> Callable[[Any], Any]:
    """The call that users make."""
    return codec.encode_audio if half == ENCODER else codec.decode_audio


def plot_lines(
    path: Path, panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], x: str, y: str
) -> None:
    """Write a picture: by panel and by line, abscissas and ordinates; needs matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise click.UsageError("--plot needs matplotlib; run: pip install matplotlib") from None

    figure, row = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), sharey=True, squeeze=False)
    for axes, (title, lines) in zip(row[0], panels.items(), strict=True):
        for name, (abscissas, ordinates) in lines.items():
            axes.plot(abscissas, ordinates, marker="o", label=name)
        axes.set(title=title, xlabel=x, xscale="log")
        axes.legend()
    row[0][0].set_ylabel(y)
    row[0][0].set_ylim(bottom=0)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def finish(question: str, results: object) -> None:
    """The last line: everything, for machines."""
    print(json.dumps({"benchmark": question, "machine": machine(), "results": results}))
