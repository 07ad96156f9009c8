"""Metrics of all replicas on a machine, in the text format of Prometheus.

The replicas share files in one folder, which is how `prometheus_client` counts over several processes. It reads the
name of the folder when it is imported. So this module is imported after the name is set.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable that names the folder."""
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

REQUESTS: Final = Counter("samekit_requests", "Requests that ended", ["route", "status"])
SECONDS: Final = Histogram(
    "samekit_request_seconds",
    "Time from the first byte of a request to the last one of its answer",
    ["route"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600),
)
AUDIO: Final = Counter("samekit_audio_seconds", "Seconds of audio encoded or decoded", ["direction"])
IN_WORK: Final = Gauge(
    "samekit_requests_in_work", "Requests that are received, wait or run", multiprocess_mode="livesum"
)
BATCHES: Final = Histogram(
    "samekit_batch_windows", "Windows in a batch of the model", ["direction"], buckets=(1, 2, 4, 8, 16, 32, 64)
)


def batch_ran(direction: str, windows: int) -> None:
    """Count a batch of the model."""
    BATCHES.labels(direction).observe(windows)


def ended(route: str, status: int, seconds: float) -> None:
    """Count a request that has ended."""
    REQUESTS.labels(route, str(status)).inc()
    SECONDS.labels(route).observe(seconds)


def page() -> bytes:
    """Return the metrics of all replicas that share the folder, or of this process if no folder is set."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        return generate_latest()
    for name in os.listdir(folder):
        if name.startswith("gauge_live"):
            process = int(name.removesuffix(".db").rpartition("_")[2])
            try:
                os.kill(process, 0)
            except OSError:
                # A replica that was killed has not removed its gauges.
                with suppress(OSError):
                    multiprocess.mark_process_dead(process, folder)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, folder)
    return generate_latest(registry)
