"""Encode a dataset on several GPUs of this machine, with one process for each."""

from __future__ import annotations

import os
import re
import socket
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from samekit.backends.base import count_gpus
from samekit.backends.cpu import available_cpus
from samekit.dataset.calls import ALL_LOST, Calls, WorkerDiedError, Workers, batches_of
from samekit.dataset.executor import Executor
from samekit.dataset.processes import WorkerProcess
from samekit.dataset.worker import Worker
from samekit.errors import BackendError, BackendUnavailableError, InputError
from samekit.files.paths import expanded_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from typing import Self

    from samekit.arrays import Array
    from samekit.dataset.executor import ModelFacts
    from samekit.dataset.pipeline import Job, Outcome, Task

ALL: Final = "all"
"""The value of `devices` for every GPU of the machine."""
# Environment variable with the GPUs that CUDA offers a process, separated by commas.
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"


class DevicesExecutor(Executor):
    """Encodes on several GPUs of this machine. A context manager that starts one process per GPU and ends them.

    The GPUs take the next clips as they become free. A process that dies is started again.

    Args:
        model: a name, an engine folder or a checkpoint folder.
        devices: `"all"`, or the numbers of GPUs as CUDA counts them, from 0: `[0, 1]` or `"0,1"`. If the environment
            variable CUDA_VISIBLE_DEVICES is set, only the GPUs that it names are counted.
        backend: arguments of `AutoencoderModel.from_pretrained` for each process, without `device`.

    Raises:
        InputError: a GPU that does not exist, or the same one twice; or `backend` has another device.
        BackendUnavailableError: there is no GPU.
    """

    def __init__(self, model: str | os.PathLike[str], devices: str | Sequence[int] = ALL, **backend: Any) -> None:
        if backend.get("device") not in (None, "cuda"):
            raise InputError(f"device {backend['device']} and devices both choose where to encode; pass one of them")
        self.devices = _checked_devices(devices)
        """The numbers of the GPUs."""
        cores = max(1, available_cpus() // len(self.devices))
        options = backend | {"device": "cuda", "threads": backend.get("threads") or cores}
        arguments = (expanded_text(model), options, cores, str(Path.cwd()))
        host = socket.gethostname()
        self._processes = [
            WorkerProcess(_DeviceWorker, (*arguments, f"{host}, GPU {device}"), _environment(device))
            for device in self.devices
        ]

    def __enter__(self) -> Self:
        """Open the model on each GPU; raises SamekitError if that fails on one of them."""
        try:
            opening = [process.call("facts") for process in self._processes]
            found = [self._opened(device, call) for device, call in zip(self.devices, opening, strict=True)]
            self.facts = found[0]
            for facts in found[1:]:
                if not facts.same(self.facts):
                    raise InputError(f"{facts.place} has other windows than {self.facts.place}; pass the same window")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.close()

    def silence(self, latents: int) -> Array:
        """Return the latents of silence, `[latent_width, latents]`, from the first process that answers."""
        for process in self._processes:
            with suppress(WorkerDiedError):
                array: Array = process.call("silence", latents).result()
                return array
        raise BackendError(ALL_LOST)

    def encode(self, job: Job, tasks: Sequence[Task], finished: Callable[[Sequence[Outcome]], None]) -> None:
        workers = _Processes(self._processes, self.facts, job)
        Calls(workers, batches_of(tasks, job.options.batch_size)).run(finished)

    def _opened(self, device: int, call: Future[ModelFacts]) -> ModelFacts:
        try:
            return call.result()
        except WorkerDiedError as error:
            raise BackendError(
                f"the process of GPU {device} died while it opened the model ({error}); see the messages above"
            ) from None


class _DeviceWorker(Worker):
    """The code of a process. The job is sent once, not with each batch, because it can hold the latents of silence."""

    def prepare(self, facts: ModelFacts, job: Job) -> ModelFacts:
        self._run = facts, job
        return self.facts()

    def encode_tasks(self, tasks: list[Task]) -> list[Outcome]:
        return self.encode(*self._run, tasks)


class _Processes(Workers):
    """The processes of a run."""

    def __init__(self, processes: Sequence[WorkerProcess], facts: ModelFacts, job: Job) -> None:
        self.handles = processes
        self._facts = facts
        self._job = job

    def prepare(self, worker: WorkerProcess) -> Future[ModelFacts]:
        return worker.call("prepare", self._facts, self._job)

    def encode(self, worker: WorkerProcess, tasks: list[Task]) -> Future[list[Outcome]]:
        return worker.call("encode_tasks", tasks)

    def wait(self, calls: Sequence[Future[Any]], count: int, seconds: float | None = None) -> list[Future[Any]]:
        done = wait(calls, seconds, FIRST_COMPLETED if count == 1 else "ALL_COMPLETED").done
        return list(done)

    def result(self, call: Future[Any]) -> Any:
        return call.result()

    def kill(self, worker: WorkerProcess) -> None:
        worker.kill()


def _checked_devices(devices: str | Sequence[int]) -> list[int]:
    """Return the numbers of GPUs; raises InputError unless they exist and differ."""
    cure = 'pass "all", or numbers of GPUs such as 0,1'
    numbers: list[Any] = []
    if devices != ALL:
        parts = devices.split(",") if isinstance(devices, str) else list(devices)
        numbers = [int(part) if re.fullmatch(r" *[0-9]{1,6} *", str(part)) else part for part in parts]
        if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
            raise InputError(f"devices is {devices!r}; {cure}")
    count = count_gpus()
    if not count:
        raise BackendUnavailableError(
            f"devices is {devices!r}, but CUDA offers no GPU on {socket.gethostname()}; leave it out to use the CPU"
        )
    for position, number in enumerate(numbers):
        if number in numbers[:position]:
            raise InputError(f"devices names GPU {number} twice; pass each once")
        if number >= count:
            raise InputError(f"devices names GPU {number}, but only {count} can be used here; count them from 0")
    return numbers or list(range(count))


def _environment(device: int) -> dict[str, str]:
    """Return the environment of a process that sees one GPU.

    Frameworks allocate memory on the first GPU that they see, even if another one was chosen by its number.
    """
    visible = os.environ.get(_VISIBLE)
    name = str(device) if visible is None else visible.split(",")[device]
    return {**os.environ, _VISIBLE: name}
