"""What encodes the clips of a run: the contract, and its form in this process. Knows no manifest and no cluster."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from samekit.backends.cpu import available_cpus
from samekit.dataset.pipeline import Outcome, Pipeline
from samekit.engine.spec import ENCODER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from samekit.arrays import Array
    from samekit.batches import Autoencoder
    from samekit.dataset.pipeline import Job, Task
    from samekit.engine.spec import EngineSpec
    from samekit.windows import ExactWindows


class Executor(ABC):
    """Encodes clips and writes their latents, wherever that happens."""

    spec: EngineSpec
    """Of the model."""
    precision: str
    """That it computes in."""
    windows: ExactWindows
    """How audio is cut for it."""

    @abstractmethod
    def silence(self, latents: int) -> Array:
        """The latents of silence, `[latent_width, latents]`."""

    @abstractmethod
    def encode(self, job: Job, tasks: Sequence[Task], finished: Callable[[Outcome], None]) -> None:
        """Encode every clip.

        When this raises an error, each clip is in the output as a whole or not at all, and nobody writes any more.

        Args:
            job: what is done to every clip.
            tasks: the clips.
            finished: called with each outcome, one after the other, once the files of the clip are in the output.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
            BackendError: the backend failed.
        """


class LocalExecutor(Executor):
    """Encodes in this process.

    Args:
        autoencoder: an open model.
        cores: that reading may use; None takes those of this process.
    """

    def __init__(self, autoencoder: Autoencoder, cores: int | None = None) -> None:
        self.spec = autoencoder.spec
        self.precision = autoencoder.backend.precision
        self.windows = autoencoder.windows(ENCODER)
        self.torch_device = f"{autoencoder.backend.name} on {autoencoder.backend.torch_device}"
        """What computes, for people."""
        self._autoencoder = autoencoder
        self._readers = default_readers(cores or available_cpus())
        self._turn = threading.Lock()
        # A run that goes on where another was killed must give the same bytes.
        autoencoder.backend.use_packed_weights(ENCODER)

    def silence(self, latents: int) -> Array:
        """The latents of silence, `[latent_width, latents]`."""
        return silence_latents(self._autoencoder, latents)

    def encode(self, job: Job, tasks: Sequence[Task], finished: Callable[[Outcome], None]) -> None:
        """Encode every clip; `finished` is called in another thread.

        Calls from several threads have the backend in turns, while the clips of the next one are read.
        """
        with job.output.workspace() as folder:

            def written(outcome: Outcome) -> None:
                if outcome.clip:
                    job.output.upload(folder, outcome.task.target)
                finished(outcome)

            backend, readers = self._autoencoder.backend, job.readers or self._readers
            Pipeline(backend, self._turn, job, folder, readers, written).run(tasks)


def default_readers(cores: int) -> int:
    """Threads that read clips: more would wait for the encoder."""
    return min(4, cores)


def silence_latents(autoencoder: Autoencoder, latents: int) -> Array:
    """The latents of silence, `[latent_width, latents]`, at the cost of a few of them.

    What a latent sees is the same from one aligned position to the next, away from both ends:

        |- edge -|- period -|- period -|  ...  |- period -|- edge -|      a short silence holds the first, one
                                                                         period and the last
    """
    spec = autoencoder.spec
    period = spec.alignment
    edge = -(-spec.contexts[ENCODER] // period) * period
    tail = edge + latents % period
    short = min(latents, edge + period + tail)
    encoded: Array = autoencoder.encode_audio(np.zeros((1, spec.channels, spec.samples(short)), np.float32))[0]
    if short == latents:
        return encoded
    middle = np.tile(encoded[:, edge : edge + period], (latents - edge - tail) // period)
    return np.concatenate([encoded[:, :edge], middle, encoded[:, edge + period :]], axis=1)
