"""Assign batches of clips to Ray actors, and retry those of actors that died."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from samekit.errors import BackendError, SamekitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from samekit.dataset.executor import ModelFacts
    from samekit.dataset.pipeline import Job, Outcome, Task

logger = logging.getLogger(__name__)

# Most clips and bytes of one call, per window of an encoder batch. Encoding them takes much longer than the call itself
# (1 ms), and encoding them again costs little.
_BATCH_CLIPS: Final = 8
_BATCH_BYTES: Final = 2**25
BATCHES_PER_ACTOR: Final = 2
"""An actor encodes one batch, and reads the clips of the next one meanwhile."""
# The run stops when so many actors have died with the same batch.
_DEATHS: Final = 3
ALL_LOST: Final = "every actor is lost, see Ray's log; run the same command again to go on"
"""The message when no actor is left."""
# Seconds to wait until killed actors have ended.
_END_SECONDS: Final = 10


@dataclass
class _Batch:
    """The clips of one call, and the number of actors that died while they had them."""

    tasks: list[Task]
    deaths: int = 0


@dataclass
class _Actor:
    """An actor, whether it has answered since its last start, and the number of its batches."""

    handle: Any
    ready: bool = False
    batches: int = 0


class Calls:
    """The pending calls of a run, and the batches that are not assigned yet."""

    def __init__(self, ray: Any, handles: list[Any], facts: ModelFacts, job: Job, batches: Iterable[_Batch]) -> None:
        self._ray = ray
        self._facts = facts
        self._job = ray.put(job)
        self._todo = deque(batches)
        self._left = len(self._todo)
        self._actors = [_Actor(handle) for handle in handles]
        # Call -> its actor and batch; None instead of a batch for an actor that is starting.
        self._calls: dict[Any, tuple[_Actor, _Batch | None]] = {}

    def outcomes(self) -> Iterator[list[Outcome]]:
        """Yield the outcomes of each batch once; raises what an actor raises, or BackendError if actors keep dying."""
        for actor in self._actors:
            self._wait_ready(actor)
        while self._left:
            if not self._calls:
                raise BackendError(ALL_LOST)
            (done,), _ = self._ray.wait(list(self._calls), num_returns=1)
            actor, batch = self._calls.pop(done)
            actor.batches -= batch is not None
            outcomes: list[Outcome] = []
            try:
                result = result_of(self._ray, done)
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError as error:
                self._failed(actor, batch, error)
            else:
                if batch:
                    self._left -= 1
                    outcomes = result
                else:
                    actor.ready = True
                    logger.info("an actor encodes on %s", result.place)
            self._assign()
            if outcomes:
                yield outcomes

    def end(self, *, at_once: bool) -> None:
        """Wait until no actor writes any more. With `at_once`, kill the actors first; Ray restarts them."""
        calls = [call for call, (_, batch) in self._calls.items() if batch]
        if at_once:
            for actor in self._actors:
                self._ray.kill(actor.handle, no_restart=False)
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=_END_SECONDS if at_once else None)

    def _wait_ready(self, actor: _Actor) -> None:
        """Call a method of an actor. Its answer shows that the actor runs."""
        self._calls[retry_until_restarted(actor.handle.facts).remote()] = actor, None

    def _assign(self) -> None:
        for actor in self._actors:
            while self._todo and actor.ready and actor.batches < BATCHES_PER_ACTOR:
                batch = self._todo.popleft()
                actor.batches += 1
                self._calls[actor.handle.encode.remote(self._facts, self._job, batch.tasks)] = actor, batch

    def _failed(self, actor: _Actor, batch: _Batch | None, error: Exception) -> None:
        """Take a batch back from an actor that died. Ray restarts the actor unless its start has failed."""
        if batch is None:
            logger.warning("an actor is lost for good: %s", last_line(error))
            return
        batch.deaths += 1
        if batch.deaths == _DEATHS:
            names = ", ".join(repr(task.source.relpath) for task in batch.tasks)
            raise BackendError(f"{_DEATHS} actors died while they encoded one of {names}; see Ray's log for the cause")
        # The actor may have written some of the files.
        batch.tasks = [replace(task, replaces=True) for task in batch.tasks]
        self._todo.appendleft(batch)
        if actor.ready:
            logger.warning("an actor died; its clips go to others until Ray has started it again")
            actor.ready = False
            self._wait_ready(actor)


def retry_until_restarted(method: Any) -> Any:
    """Return a method of an actor whose calls are repeated when the actor has been restarted."""
    return method.options(max_task_retries=-1)


def result_of(ray: Any, call: Any) -> Any:
    """Return the result of a call, or raise the SamekitError that it raised."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SamekitError):
            raise error.cause from None
        raise


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


def last_line(error: Exception) -> str:
    """Return the last line of Ray's message, which names the error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
