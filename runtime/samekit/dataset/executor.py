"""Encode the clips of a run: the contract `Executor`, and its implementation in this process.

`samekit.dataset.devices` implements the contract on several GPUs, and `samekit.dataset.ray` on a Ray cluster.
"""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from samekit.backends.cpu import available_cpus
from samekit.dataset.child_process import can_start
from samekit.dataset.pipeline import Outcome, Pipeline
from samekit.dataset.reader_process import ReaderProcesses
from samekit.engine.spec import ENCODER
from samekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from samekit.arrays import Array
    from samekit.batches import Autoencoder
    from samekit.dataset.options import PreEncodeOptions
    from samekit.dataset.pipeline import Job, Task
    from samekit.engine.spec import EngineSpec
    from samekit.windows import ExactWindows


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the model of an executor. All worker processes of a run must have the same model."""

    spec: EngineSpec
    precision: str
    windows: ExactWindows
    """Windows of the encoder."""
    place: str
    """Machine, backend and device, for the log."""

    def same(self, other: ModelFacts) -> bool:
        """Return whether the latents of both may be in one folder."""
        ours, theirs = ((facts.spec.source_sha256, facts.precision, facts.windows) for facts in (self, other))
        return ours == theirs


class Executor(ABC):
    """Encodes clips and writes their latents to the output."""

    facts: ModelFacts

    @abstractmethod
    def silence(self, latents: int) -> Array:
        """Return the latents of silence, `[latent_width, latents]`."""

    @abstractmethod
    def encode(self, job: Job, tasks: Sequence[Task], finished: Callable[[Sequence[Outcome]], None]) -> None:
        """Encode every clip, and call `finished` with groups of outcomes when the files of the clips are in the output.

        Each clip is in one group. After an error, each clip's files are complete or missing, and nothing writes to
        the output any more.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
            BackendError: the backend failed.
        """


class LocalExecutor(Executor):
    """Encodes in this process. `cores` limits the number of readers; by default these are all its cores."""

    def __init__(self, autoencoder: Autoencoder, cores: int | None = None) -> None:
        backend = autoencoder.backend
        place = f"{socket.gethostname()}, {backend.name} on {backend.torch_device}"
        self.facts = ModelFacts(autoencoder.spec, backend.precision, autoencoder.windows(ENCODER), place)
        self._autoencoder = autoencoder
        self._cores = cores or available_cpus()
        self.readers = default_readers(self._cores, backend.device)
        self._processes: ReaderProcesses | None = None
        self._processes_lock = threading.Lock()
        self._backend_lock = threading.Lock()
        # Otherwise the first calls would differ in rounding, and a run that continues a killed one in bytes.
        backend.use_packed_weights(ENCODER)

    def silence(self, latents: int) -> Array:
        return silence_latents(self._autoencoder, latents)

    def encode(self, job: Job, tasks: Sequence[Task], finished: Callable[[Sequence[Outcome]], None]) -> None:
        """Encode every clip; `finished` is called in another thread.

        Several threads may call this. They take turns with the backend, and read clips while they wait for it.
        """
        backend = self._autoencoder.backend
        readers = max(1, min(job.options.readers or self.readers, len(tasks)))
        processes = None
        if reads_in_processes(job.options, self._cores, backend.device):
            with self._processes_lock:
                processes = self._processes = self._processes or ReaderProcesses(job.rules.window_values)
        Pipeline(backend, self._backend_lock, job, readers, processes, finished).run(tasks)

    def close(self) -> None:
        """End the reader processes."""
        if self._processes is not None:
            self._processes.close()


def default_readers(cores: int, device: str) -> int:
    """Return the number of readers: a few for an encoder on the CPU, where more would only wait for it."""
    return min(4 if device == "cpu" else 16, cores)


def reads_in_processes(options: PreEncodeOptions, cores: int, device: str) -> bool:
    """Return whether clips are read in processes.

    Threads are as fast on up to four cores, and start at once. With a GPU, this process has no time to spare.

    Raises:
        InputError: the options ask for processes, which this system cannot start.
    """
    if options.reader_processes and not can_start():
        raise InputError("reader processes need POSIX and a Python command; pass --worker-threads")
    if options.reader_processes is not None:
        return options.reader_processes
    return can_start() and (cores > 4 or device != "cpu")


def silence_latents(autoencoder: Autoencoder, latents: int) -> Array:
    """Return the latents of silence, `[latent_width, latents]`, by encoding a short silence.

    Away from both ends, the latents repeat from one aligned position to the next. So both edges and one period are
    encoded, and the period is repeated:

        |- edge -|- period -|- period -|  ...  |- period -|- edge -|
    """
    spec = autoencoder.spec
    period = spec.alignment
    edge = -(-spec.contexts[ENCODER] // period) * period
    tail = edge + latents % period
    short = min(latents, edge + period + tail)
    # Only `Autoencoder.half` makes it return float16, and clips are encoded in float32.
    audio = np.zeros((1, spec.channels, spec.samples(short)), np.float32)
    encoded: Array = autoencoder.encode_audio(audio)[0].astype(np.float32, copy=False)
    if short == latents:
        return encoded
    middle = np.tile(encoded[:, edge : edge + period], (latents - edge - tail) // period)
    return np.concatenate([encoded[:, :edge], middle, encoded[:, edge + period :]], axis=1)
