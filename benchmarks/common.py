"""What the benchmarks share: the machine's description, honest timing, and the last line of JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from samekit.backends.ort import available_cpus
from samekit.spec import ENCODER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from samekit.autoencoder import Autoencoder

PACKAGES = ("samekit", "torch", "onnxruntime", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, load and versions: what a figure means nothing without."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": available_cpus(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def half_of(codec: Autoencoder, half: str) -> Callable[[Any], Any]:
    """The call that users make."""
    return codec.encode_audio if half == ENCODER else codec.decode_audio


def interleaved(
    candidates: Mapping[str, Callable[[], object]], runs: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run of each candidate, in turn A B C A B C, after one round that warms up and does not count.

    A machine whose speed drifts slows all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(runs + 1):
        for name, run in candidates.items():
            start = clock()
            run()
            elapsed = clock() - start
            if round_number:
                times[name].append(elapsed)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and spread, in seconds."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


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
