"""Measure on a real server which options of a model repository give the highest throughput on this machine."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samekit.backends.cpu import available_cpus
from samekit.engine.spec import DIRECTIONS, INPUT_NAMES, Direction
from samekit.errors import BackendError, first_line
from samekit.packages import import_package
from samekit.serving.triton import TritonOptions, model_name, write_repository
from samekit.serving.triton_server import TritonServer, find_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from samekit.engine.folder import Engine

# Each field is varied with the best values of those before it.
_VALUES: Final = {"instances": (1, 2, 4), "max_batch": (1, 4, 8), "queue_delay": (0, 2000, 10_000)}
# Latents of a request, 6 s of audio at 44.1 kHz. Every server takes a window of this length.
_LATENTS: Final = 64
_SECONDS: Final = 4.0
# If the process of a model dies, for example for want of memory, the server never answers its requests.
_ANSWER_SECONDS: Final = 300
_LEAST_CLIENTS: Final = 4
_MOST_CLIENTS: Final = 32


def sweep(engine: Engine, options: TritonOptions) -> Iterator[tuple[TritonOptions, float]]:
    """Measure `instances`, `max_batch` and `queue_delay`, one after the other, on the server of this machine.

    Nine repositories at most are served for a few seconds each, on the loopback interface.

    Args:
        engine: the engine folder.
        options: the options that are not measured.

    Yields:
        Options and what they gave: seconds of audio that are encoded or decoded in a second, with as many clients of
        the encoder as of the decoder. It is 0 if the server did not start or failed.

    Raises:
        BackendUnavailableError: there is no server, or tritonclient is not installed.
        BackendError: the server failed with the first options already.
        SamekitError: as `write_repository`.
    """
    find_server()
    import_package("tritonclient.grpc", "pip install 'samekit[triton]'")
    best, measured = options, dict[TritonOptions, float]()
    for field, values in _VALUES.items():
        for value in values:
            change: dict[str, Any] = {field: value}
            candidate = replace(best, **change)
            if candidate in measured or (field == "instances" and value > available_cpus()):
                continue
            try:
                measured[candidate] = _throughput(engine, candidate)
            except BackendError:
                if not measured:
                    raise
                measured[candidate] = 0.0
            yield candidate, measured[candidate]
        best = max(measured, key=lambda each: measured[each])
        if not options.joins_requests or (field == "max_batch" and best.max_batch == 1):
            # The other fields have no effect.
            return


def _throughput(engine: Engine, options: TritonOptions) -> float:
    """Serve a repository with these options for a few seconds."""
    with tempfile.TemporaryDirectory(prefix="samekit-") as scratch:
        repository = Path(scratch, "models")
        # Parts of an answer come from the same windows, so a streaming model has the same throughput.
        write_repository(engine, repository, replace(options, streaming=False))
        clients = min(max(_LEAST_CLIENTS, 2 * options.max_batch * options.instances), _MOST_CLIENTS)
        # After an error or Ctrl-C the server is stopped first. That ends the requests for which the pool waits.
        with ThreadPoolExecutor(clients) as pool, TritonServer(repository) as server:
            jobs = [_Job(server.grpc, engine, direction) for direction in DIRECTIONS]
            for job in jobs:
                job.run(until=0.0)
            turns = [jobs[client % len(jobs)] for client in range(clients)]
            start = time.monotonic()
            requests: int = sum(pool.map(lambda job: job.run(start + _SECONDS), turns))
            seconds = time.monotonic() - start
    return requests * engine.spec.samples(_LATENTS) / engine.spec.sample_rate / seconds


class _Job:
    """Requests of one direction that are sent again and again."""

    def __init__(self, url: str, engine: Engine, direction: Direction) -> None:
        self._client = import_package("tritonclient.grpc", "")
        self._url = url
        self._model = model_name(engine.spec.name, direction)
        array = np.random.RandomState(0).standard_normal(engine.spec.input_shape(direction, 1, _LATENTS))
        self._input = self._client.InferInput(INPUT_NAMES[direction], list(array.shape), "FP32")
        self._input.set_data_from_numpy((0.2 * array).astype(np.float32))

    def run(self, until: float) -> int:
        """Send requests one after the other until a time is past; return how many were answered."""
        with self._client.InferenceServerClient(self._url) as client:
            requests = 0
            while not requests or time.monotonic() < until:
                self._ask(client)
                requests += 1
        return requests

    def _ask(self, client: Any) -> None:
        try:
            client.infer(self._model, [self._input], client_timeout=_ANSWER_SECONDS)
        except self._client.InferenceServerException as error:
            raise BackendError(f"{self._model}: {first_line(error)}; check the engine with: samekit verify") from None
