"""The calls to Ray actors that encode clips: batches, retries, and actors that died."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from samekit.errors import BackendError, SamekitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from samekit.dataset.pipeline import Job, Outcome, Task
    from samekit.engine.spec import EngineSpec
    from samekit.windows import ExactWindows


logger = logging.getLogger(__name__)

# What one call hands to an actor, for each window of a batch of the encoder: much against the millisecond that a call
# takes, little to encode again.
_BATCH_CLIPS: Final = 8
_BATCH_BYTES: Final = 2**25
BATCHES_IN_HAND: Final = 2
"""Batches that an actor has at a time: it encodes one and reads the other."""
# So often may actors die over a batch.
_DEATHS: Final = 3
ALL_LOST: Final = "every actor is lost, see Ray's log; run the same command again to go on"
"""The message when no actor is left."""
# Seconds that killed actors have to be gone.
_END_PATIENCE: Final = 10


@dataclass(frozen=True)
class Facts:
    """What an actor encodes with; all of it but the place must be that of the first one."""

    spec: EngineSpec
    """Of the model."""
    precision: str
    """That it computes in."""
    windows: ExactWindows
    """How audio is cut for it."""
    place: str
    """The machine and the device, for people."""

    def same(self, other: Facts) -> bool:
        """Whether the latents of both can lie in one folder."""
        ours, theirs = ((facts.spec.source_sha256, facts.precision, facts.windows) for facts in (self, other))
        return ours == theirs


@dataclass
class _Batch:
    """Clips for one call."""

    tasks: list[Task]
    deaths: int = 0
    """Actors that died with it in hand."""


@dataclass
class _Actor:
    """An actor as it is seen from here."""

    handle: Any
    joined: bool = False
    """Whether it has answered since it was started last."""
    in_hand: int = 0
    """Batches that it was given."""


class Calls:
    """The pending calls of one run, and the batches that are not assigned yet."""

    def __init__(self, ray: Any, handles: list[Any], facts: Facts, job: Job, batches: Iterable[_Batch]) -> None:
        self._ray = ray
        self._facts = facts
        self._job = ray.put(job)
        self._todo = deque(batches)
        self._left = len(self._todo)
        self._actors = [_Actor(handle) for handle in handles]
        # Whose call it is, and its batch, or None for an actor that joins.
        self._calls: dict[Any, tuple[_Actor, _Batch | None]] = {}

    def outcomes(self) -> Iterator[Outcome]:
        """Yield the outcome of each clip once, as they come.

        Raises:
            BackendError: actors die again and again, or all of them are lost.
            SamekitError: what an actor raised.
        """
        for actor in self._actors:
            self._wait_ready(actor)
        while self._left:
            if not self._calls:
                raise BackendError(ALL_LOST)
            (done,), _ = self._ray.wait(list(self._calls), num_returns=1)
            actor, batch = self._calls.pop(done)
            actor.in_hand -= batch is not None
            outcomes: list[Outcome] = []
            try:
                result = result_of(self._ray, done)
            except self._ray.exceptions.RayError as error:
                if isinstance(error, self._ray.exceptions.RayTaskError):
                    raise
                self._failed(actor, batch, error)
            else:
                if batch:
                    self._left -= 1
                    outcomes = result
                else:
                    actor.joined = True
                    logger.info("an actor encodes on %s", result.place)
            self._assign()
            yield from outcomes

    def end(self, *, at_once: bool) -> None:
        """Wait until no actor writes any more, whatever comes of it; at once by killing them, and Ray starts others."""
        calls = [call for call, (_, batch) in self._calls.items() if batch]
        if at_once:
            for actor in self._actors:
                self._ray.kill(actor.handle, no_restart=False)
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=_END_PATIENCE if at_once else None)

    def _wait_ready(self, actor: _Actor) -> None:
        """Have an actor answer as soon as it runs."""
        self._calls[retry_until_restarted(actor.handle.facts).remote()] = actor, None

    def _assign(self) -> None:
        """Assign waiting batches to actors that have room."""
        for actor in self._actors:
            while self._todo and actor.joined and actor.in_hand < BATCHES_IN_HAND:
                batch = self._todo.popleft()
                actor.in_hand += 1
                self._calls[actor.handle.encode.remote(self._facts, self._job, batch.tasks)] = actor, batch

    def _failed(self, actor: _Actor, batch: _Batch | None, error: Exception) -> None:
        """Take a batch back from an actor that died; Ray starts that again, unless joining itself has failed."""
        if batch is None:
            logger.warning("an actor is lost for good: %s", last_line(error))
            return
        batch.deaths += 1
        if batch.deaths == _DEATHS:
            names = ", ".join(repr(task.source.relpath) for task in batch.tasks)
            raise BackendError(f"{_DEATHS} actors died while they encoded one of {names}; see Ray's log for the cause")
        self._todo.appendleft(batch)
        if actor.joined:
            logger.warning("an actor died; its clips go to others until Ray has started it again")
            actor.joined = False
            self._wait_ready(actor)


def retry_until_restarted(method: Any) -> Any:
    """A call that waits for an actor that is started again."""
    return method.options(max_task_retries=-1)


def result_of(ray: Any, call: Any) -> Any:
    """What a call returned; an error that samekit raised there is raised here."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SamekitError):
            raise error.cause from None
        raise


def batches_of(tasks: Iterable[Task], batch_size: int) -> Iterator[_Batch]:
    """Clips together until they are many or large."""
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
    """What a message of Ray ends with: the error, after where it was raised."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
