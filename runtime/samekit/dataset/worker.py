"""Encode clips in a worker process: an actor of Ray, or a process of this machine."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samekit.dataset.executor import LocalExecutor, ModelFacts
from samekit.errors import InputError

if TYPE_CHECKING:
    from samekit.arrays import Array
    from samekit.dataset.pipeline import Job, Outcome, Task


class Worker:
    """The code of a worker process.

    The first call opens the model, because Ray changes the type of errors in `__init__`.

    Args:
        model: a name, an engine folder or a checkpoint folder.
        backend: arguments of `AutoencoderModel.from_pretrained`.
        cores: the cores of this process, which limit its reader threads.
        folder: where relative paths start: the working folder of the process that started the run.
        name: the name of this worker in the log and the report; by default that of its machine.
    """

    def __init__(self, model: str, backend: dict[str, Any], cores: int, folder: str, name: str | None = None) -> None:
        with suppress(OSError):
            os.chdir(folder)
        self._model = model
        self._backend = backend
        self._cores = cores
        self._name = name
        self._opening = threading.Lock()
        self._executor: LocalExecutor | None = None

    def _opened(self) -> LocalExecutor:
        from samekit.model import AutoencoderModel

        with self._opening:
            if self._executor is None:
                model = AutoencoderModel.from_pretrained(self._model, **self._backend)
                executor = LocalExecutor(model.autoencoder, self._cores)
                if self._name:
                    place = f"{self._name}, {model.autoencoder.backend.name}"
                    executor.facts = dataclasses.replace(executor.facts, place=place)
                self._executor = executor
            return self._executor

    def facts(self) -> ModelFacts:
        """Open the model if it is not open yet, and return its facts."""
        return self._opened().facts

    def silence(self, latents: int) -> Array:
        """Return the latents of silence, `[latent_width, latents]`."""
        return self._opened().silence(latents)

    def encode(self, facts: ModelFacts, job: Job, tasks: list[Task]) -> list[Outcome]:
        """Encode clips; raises InputError if this worker has another model, or lacks a folder of the dataset."""
        node = socket.gethostname()
        if not facts.same(self.facts()):
            raise InputError(f"{node}: {self._model} is not the model of the first node; give all nodes the same one")
        for folder in {task.source.path.removesuffix(task.source.relpath) for task in tasks}:
            # Without this check, every clip would be reported as unreadable.
            if not Path(folder).is_dir():
                raise InputError(f"{folder}: does not exist on {node}; give every node access under this path")
        outcomes: list[Outcome] = []
        self._opened().encode(job, tasks, outcomes.extend)
        return outcomes
