"""Assign batches of clips to worker processes, and retry those of processes that died.

    tasks -> batches -> at most two per worker at a time -> outcomes

If a worker dies, its batches go to the next free worker. Such a batch runs alone on its worker, so if that worker dies
too, this batch is the cause. Then its clips are encoded one by one. The clip with which the last of `_DEATHS` workers
died is reported as a bad clip.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from samekit.dataset.bad_clip import BadClipError
from samekit.dataset.pipeline import Outcome
from samekit.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from samekit.dataset.pipeline import Task

logger = logging.getLogger(__name__)

# Most clips and bytes of one call, per window of an encoder batch. Encoding them takes much longer than the call itself
# (1 ms), and encoding them again costs little.
_BATCH_CLIPS: Final = 8
_BATCH_BYTES: Final = 2**25
BATCHES_PER_WORKER: Final = 2
"""A worker encodes one batch, and reads the clips of the next one meanwhile."""
# A clip with which so many workers died is a bad clip. So often is a worker started that dies before it is ready.
_DEATHS: Final = 3
ALL_LOST: Final = "every worker process is lost, see the log; run the same command again to go on"
"""The message when no worker is left."""
# Seconds to wait until killed workers have ended.
_END_SECONDS: Final = 10


class WorkerDiedError(Exception):
    """A worker process died before it answered a call."""


class Workers(ABC):
    """The worker processes of a run, and how to call them. Calls and workers are objects of the implementation."""

    handles: Sequence[Any]
    """One object per worker."""

    @abstractmethod
    def prepare(self, worker: Any) -> Any:
        """Start a call that returns the `ModelFacts` of a worker; if the worker has died, when it runs again."""

    @abstractmethod
    def encode(self, worker: Any, tasks: list[Task]) -> Any:
        """Start a call that encodes clips and returns their outcomes."""

    @abstractmethod
    def wait(self, calls: Sequence[Any], count: int, seconds: float | None = None) -> Any:
        """Wait until `count` calls have ended, or some seconds have passed; return calls that have ended."""

    @abstractmethod
    def result(self, call: Any) -> Any:
        """Return the result of a call that has ended; raises what the worker raised, or WorkerDiedError."""

    @abstractmethod
    def kill(self, worker: Any) -> None:
        """Kill a worker, so that its calls end."""


@dataclass(eq=False)
class _Batch:
    """The clips of one call, and the number of workers that died while they had them."""

    tasks: list[Task]
    deaths: int = 0


@dataclass
class _Worker:
    """A worker, its batches, whether it has answered since its last start, and how often its start failed."""

    handle: Any
    batches: list[_Batch] = field(default_factory=list)
    place: str | None = None
    failed_starts: int = 0


class Calls:
    """The pending calls of a run, and the batches that are not assigned yet."""

    def __init__(self, workers: Workers, batches: Iterable[_Batch]) -> None:
        self._interface = workers
        self._todo = deque(batches)
        self._left = sum(len(batch.tasks) for batch in self._todo)
        self._workers = [_Worker(handle) for handle in workers.handles]
        # Call -> its worker and batch; None instead of a batch for a worker that is starting.
        self._calls: dict[Any, tuple[_Worker, _Batch | None]] = {}
        # Deaths of workers since a batch was completed.
        self._deaths = 0

    def run(self, finished: Callable[[Sequence[Outcome]], None]) -> None:
        """Encode every clip, and call `finished` with the outcomes of each batch.

        Raises what a worker or `finished` raises, or BackendError if workers keep dying. Then no worker writes any
        more.
        """
        try:
            for outcomes in self._outcomes():
                finished(outcomes)
        except BaseException as error:
            # After Ctrl-C the workers are killed, so that the user does not wait.
            self._end(at_once=not isinstance(error, Exception))
            raise

    def _outcomes(self) -> Iterator[list[Outcome]]:
        for worker in self._workers:
            self._prepare(worker)
        while self._left:
            if not self._calls:
                raise BackendError(ALL_LOST)
            done = self._interface.wait(list(self._calls), 1)[0]
            worker, batch = self._calls.pop(done)
            outcomes: list[Outcome] = []
            try:
                result = self._interface.result(done)
            except WorkerDiedError as error:
                outcomes = self._failed(worker, batch, error)
            else:
                if batch:
                    worker.batches.remove(batch)
                    self._deaths = 0
                    outcomes = [replace(outcome, worker=worker.place) for outcome in result]
                else:
                    worker.place, worker.failed_starts = result.place, 0
                    logger.info("a worker encodes on %s", worker.place)
            self._left -= len(outcomes)
            self._assign()
            if outcomes:
                yield outcomes

    def _end(self, *, at_once: bool) -> None:
        """Wait until no worker writes any more. With `at_once`, kill the workers first."""
        calls = [call for call, (_, batch) in self._calls.items() if batch]
        if at_once:
            for worker in self._workers:
                self._interface.kill(worker.handle)
        if calls:
            self._interface.wait(calls, len(calls), _END_SECONDS if at_once else None)

    def _prepare(self, worker: _Worker) -> None:
        """Call a worker that may be starting. Its answer shows that it runs."""
        self._calls[self._interface.prepare(worker.handle)] = worker, None

    def _assign(self) -> None:
        for worker in self._workers:
            while self._todo and worker.place and self._has_room(worker, self._todo[0]):
                batch = self._todo.popleft()
                worker.batches.append(batch)
                self._calls[self._interface.encode(worker.handle, batch.tasks)] = worker, batch

    def _has_room(self, worker: _Worker, batch: _Batch) -> bool:
        """Return whether a worker may get a batch now. A batch with which a worker died runs alone."""
        alone = any(each.deaths for each in (batch, *worker.batches))
        return len(worker.batches) < (1 if alone else BATCHES_PER_WORKER)

    def _failed(self, worker: _Worker, batch: _Batch | None, error: WorkerDiedError) -> list[Outcome]:
        """Handle the end of a call whose worker died; return the outcome of a clip that is given up."""
        if batch is None:
            worker.failed_starts += 1
            if worker.failed_starts < _DEATHS:
                self._prepare(worker)
            else:
                logger.warning("a worker is lost for good: %s", error)
            return []
        worker.batches.remove(batch)
        if worker.place:
            logger.warning("a worker died on %s (%s); its clips go to others until it runs again", worker.place, error)
            worker.place = None
            self._deaths += 1
            self._prepare(worker)
        # A few such clips, one after another, are no reason to stop.
        if self._deaths >= 2 * _DEATHS * len(self._workers):
            names = ", ".join(repr(task.source.relpath) for task in batch.tasks)
            raise BackendError(
                f"{self._deaths} workers died one after another, the last with one of {names} ({error}); "
                "see the log for the cause, and run the same command again to go on"
            )
        batch.deaths += 1
        # The worker may have written some of the files.
        batch.tasks = [replace(task, replaces=True) for task in batch.tasks]
        if len(batch.tasks) > 1 and batch.deaths >= _DEATHS - 1:
            self._todo.extendleft(_Batch([task], batch.deaths) for task in reversed(batch.tasks))
        elif batch.deaths < _DEATHS:
            self._todo.appendleft(batch)
        else:
            (task,) = batch.tasks
            reason = f"{task.source.path}: {batch.deaths} workers died while they encoded it ({error}); remove the clip"
            return [Outcome(task, None, BadClipError("failed", reason))]
        return []


def batches_of(tasks: Iterable[Task], batch_size: int) -> Iterator[_Batch]:
    """Divide clips into batches of limited number and size."""
    batch, size = _Batch([]), 0
    for task in tasks:
        batch.tasks.append(task)
        size += task.source.audio[0] if task.source.audio else 0
        if len(batch.tasks) >= _BATCH_CLIPS * batch_size or size >= _BATCH_BYTES * batch_size:
            yield batch
            batch, size = _Batch([]), 0
    if batch.tasks:
        yield batch
