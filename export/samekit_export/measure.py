"""Speed, measured honestly, and the machine it was measured on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from samekit.backends.cpu import available_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

PACKAGES = ("samekit", "torch", "onnxruntime", "numpy")
"""Whose versions go with a figure."""

_Name = TypeVar("_Name", bound="Hashable")


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


def interleaved(
    candidates: Mapping[_Name, Callable[[], object]], runs: int, clock: Callable[[], float] = time.perf_counter
) -> dict[_Name, list[float]]:
    """Seconds of each run of each candidate, in turn A B C A B C, after one round that warms up and does not count.

    A machine whose speed drifts slows all of them alike.
    """
    times: dict[_Name, list[float]] = {name: [] for name in candidates}
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
