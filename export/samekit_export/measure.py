"""Measure run times, and describe the machine."""

from __future__ import annotations

import os
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

from samekit.backends.cpu import available_cpus, processor
from samekit_export.progress import logged

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

PACKAGES = ("samekit", "torch", "onnxruntime", "numpy")
"""The packages whose versions are recorded with a measurement."""

_Name = TypeVar("_Name", bound="Hashable")


def machine() -> dict[str, Any]:
    """Return the processor, the number of cores, the load, which Windows does not report, and versions of packages."""
    return {
        "cpu": processor()[0],
        "cores": available_cpus(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
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
    """Return the seconds of each run of each candidate, run in turn: A B C A B C.

    The order spreads changes of the machine's speed over all candidates. The first round is a warm-up and not counted.
    """
    times: dict[_Name, list[float]] = {name: [] for name in candidates}
    calls = [(round_number, *candidate) for round_number in range(runs + 1) for candidate in candidates.items()]
    for round_number, name, run in logged(calls, "measuring the speed, calls"):
        start = clock()
        run()
        elapsed = clock() - start
        if round_number:
            times[name].append(elapsed)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Return the median, the minimum and the maximum."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}
