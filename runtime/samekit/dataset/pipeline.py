"""Clips to latents files, with reading ahead of the encoder and writing behind it. Knows no manifest.

    reader threads -> windows, at most a few -> the calling thread: batches, encoder -> latents -> writer thread

Reading runs in threads: libsndfile, matrix products and the encoder all release Python's lock, so two threads read 1.9
times as fast as one, while two processes gain a seventh: most of what they win goes into copying the samples from one
process to the other (measured on 2 cores, 10 s clips in four formats).

A batch holds windows of one length, of one clip or of several, so nothing is padded. Windows of a length that too few
share wait, but never more than `_WAITING_BATCHES` batches of them.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import numpy as np

from samekit.dataset.clip import BadClipError, ClipReader
from samekit.errors import BackendError, InputError, NonFiniteError
from samekit.files.latents import LatentsWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from samekit.arrays import Array
    from samekit.backends.base import Backend
    from samekit.dataset.clip import Clip, CuttingRules
    from samekit.dataset.output import Output
    from samekit.dataset.sources import Source
    from samekit.windows import Window

_WAITING_BATCHES: Final = 4
# Latents of so many windows may wait for the disk.
_WRITES_WAITING: Final = 64
# Seconds after which a thread that waits for another looks whether the run was stopped.
_PATIENCE: Final = 0.2


@dataclass(frozen=True)
class Task:
    """A clip to be encoded."""

    source: Source
    """Its files."""
    target: str
    """Name of the `.npy` file; the `.json` gets the same one."""


@dataclass(frozen=True)
class Job:
    """What a run does to every clip, wherever it is encoded."""

    rules: CuttingRules
    """How clips are cut."""
    dtype: str
    """Of the files, `float32` or `float16`."""
    silence: Array | None
    """`[width, latents of sample_size]`, what padded clips end with; None without padding."""
    batch_size: int
    """Windows that are encoded at once."""
    readers: int
    """Threads that read; 0 leaves it to whoever reads."""
    output: Output
    """Where the files go."""
    checksum: bool = False
    """Whether to compute digests of the files that are read."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    task: Task
    """What was to be done."""
    clip: Clip | None
    """None if it was not encoded."""
    bad: BadClipError | None = None
    """Why it was not."""
    sha256: str | None = None
    """Digest of the audio file that was read, if the job asks for one."""
    caption_sha256: str | None = None
    """Digest of the caption that was read, likewise."""


@dataclass(frozen=True)
class _Piece:
    """A window of a clip, on its way to the encoder."""

    task: Task
    index: int
    """Counts the windows of the clip."""
    window: Window
    audio: Array


@dataclass(frozen=True)
class _Ending:
    """Nothing more comes of a clip."""

    task: Task
    pieces: int
    outcome: Outcome


@dataclass(frozen=True)
class _Latents:
    """What the encoder made of a piece."""

    task: Task
    index: int
    values: Array


class _StoppedError(Exception):
    """The run ends; whoever waits need not wait any longer."""


_Item = TypeVar("_Item")


class _Channel(Generic[_Item]):
    """A bounded queue that nobody waits for once the run is stopped."""

    def __init__(self, size: int, stopped: threading.Event) -> None:
        self._queue: queue.Queue[_Item] = queue.Queue(size)
        self._stopped = stopped

    def put(self, item: _Item) -> None:
        """Hand an item on as soon as there is room."""
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_PATIENCE)
                return
        raise _StoppedError

    def get(self) -> _Item:
        """Take the next item as soon as there is one."""
        while not self._stopped.is_set():
            with suppress(queue.Empty):
                return self._queue.get(timeout=_PATIENCE)
        raise _StoppedError


class Pipeline:
    """Encodes clips and writes their latents.

    Args:
        backend: encodes.
        turn: held while the backend is used, so that several pipelines can share it.
        job: what is done to every clip.
        folder: into which the files are written.
        readers: threads that read.
        finished: called in the writer's thread with each outcome, once the files of the clip are on disk.
    """

    def __init__(
        self,
        backend: Backend,
        turn: AbstractContextManager[object],
        job: Job,
        folder: Path,
        readers: int,
        finished: Callable[[Outcome], None],
    ) -> None:
        self._backend = backend
        self._turn = turn
        self._rules = job.rules
        self._batch_size = job.batch_size
        self._checksum = job.checksum
        self._readers = readers
        self._finished = finished
        self._files = _Files(job, folder)
        # Targets of clips that have failed: their other windows are neither read nor encoded.
        self._given_up: set[str] = set()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._read: _Channel[_Piece | _Ending | None] = _Channel(job.batch_size + readers, self._stopped)
        self._encoded: _Channel[_Latents | _Ending | None] = _Channel(_WRITES_WAITING, self._stopped)

    def run(self, tasks: Iterable[Task]) -> None:
        """Encode every clip.

        When this raises, each clip is on disk as a whole or not at all.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
            BackendError: the backend failed.
        """
        supply = _Supply(tasks)
        threads = [
            threading.Thread(target=self._guarded, args=(self._read_clips, supply)) for _ in range(self._readers)
        ]
        threads.append(threading.Thread(target=self._guarded, args=(self._write,)))
        started = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            with suppress(_StoppedError):
                with self._turn:
                    self._encode()
                threads[-1].join()
        except RuntimeError as error:
            if len(started) == len(threads):
                raise
            raise BackendError(f"no more threads can be started here ({error}); pass fewer --workers") from None
        finally:
            self._stopped.set()
            for thread in started:
                thread.join()
        if self._error is not None:
            raise self._error

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        """Run a thread's work; an error stops the run and is raised where it was started."""
        try:
            work(*arguments)
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 it is raised again by `run`
            self._error = self._error or error
            self._stopped.set()

    def _read_clips(self, supply: _Supply) -> None:
        """Read one clip after the other, as long as there are some."""
        for task in supply:
            reader, pieces, bad = ClipReader(task.source, self._rules, checksum=self._checksum), 0, None
            try:
                with closing(iter(reader)) as windows:
                    for window, audio in windows:
                        if task.target in self._given_up:
                            break
                        self._read.put(_Piece(task, pieces, window, audio))
                        pieces += 1
            except BadClipError as error:
                bad = error
            clip = None if bad else reader.clip
            self._read.put(_Ending(task, pieces, Outcome(task, clip, bad, reader.sha256, reader.caption_sha256)))
        self._read.put(None)

    def _encode(self) -> None:
        """Encode what the readers read until all of them are done."""
        waiting: dict[int, list[_Piece]] = defaultdict(list)
        at_work = self._readers
        while at_work:
            item = self._read.get()
            if item is None:
                at_work -= 1
            elif isinstance(item, _Piece):
                same = waiting[item.audio.shape[-1]]
                same.append(item)
                if len(same) >= self._batch_size:
                    self._encode_batch(waiting.pop(item.audio.shape[-1]))
                elif sum(map(len, waiting.values())) > _WAITING_BATCHES * self._batch_size:
                    self._encode_batch(waiting.pop(next(iter(waiting))))
            else:
                if item.outcome.bad:
                    self._given_up.add(item.task.target)
                self._encoded.put(item)
        for batch in list(waiting.values()):
            self._encode_batch(batch)
        self._encoded.put(None)

    def _encode_batch(self, batch: list[_Piece]) -> None:
        """Run windows of one length, and hand their cores on."""
        batch = [piece for piece in batch if piece.task.target not in self._given_up]
        if not batch:
            return
        try:
            out = self._backend.encode(np.stack([piece.audio for piece in batch]))
        except NonFiniteError as error:
            if len(batch) == 1:
                task, bad = batch[0].task, BadClipError("failed", str(error))
                self._given_up.add(task.target)
                self._encoded.put(_Ending(task, 0, Outcome(task, None, bad)))
                return
            # One clip at a time shows which of them it was.
            for piece in batch:
                self._encode_batch([piece])
            return
        for piece, latents in zip(batch, out, strict=True):
            self._encoded.put(_Latents(piece.task, piece.index, latents[:, piece.window.core]))

    def _write(self) -> None:
        """Write what the encoder made until there is no more."""
        while (item := self._encoded.get()) is not None:
            outcome = self._files.end(item) if isinstance(item, _Ending) else self._files.add(item)
            if outcome:
                if outcome.bad:
                    self._given_up.add(outcome.task.target)
                self._finished(outcome)


class _Supply:
    """An iterator that several threads share."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks: Iterator[Task] = iter(tasks)
        self._taking = threading.Lock()

    def __iter__(self) -> _Supply:
        return self

    def __next__(self) -> Task:
        with self._taking:
            return next(self._tasks)


@dataclass
class _Held:
    """What is known of a clip that is not complete yet."""

    windows: dict[int, Array] = field(default_factory=dict)
    """Index of a window -> its latents, in the dtype of the file."""
    ending: _Ending | None = None


class _Files:
    """Holds the latents of each clip until it is complete, and then writes its files.

    No file is open while a clip is in work: a batch of a hundred windows may be of a hundred clips.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._folder = folder
        self._held: dict[str, _Held] = {}
        self._refused: set[str] = set()

    def add(self, latents: _Latents) -> Outcome | None:
        """Take the latents of a window; returns the outcome if that completes the clip, or if it cannot be written."""
        if latents.task.target in self._refused:
            return None
        held = self._held.setdefault(latents.task.target, _Held())
        # A copy in any case: what the encoder gave is a part of its whole batch.
        with np.errstate(over="ignore"):
            values = np.array(latents.values, self._job.dtype, order="F")
        if not np.isfinite(values).all():
            reason = f"{latents.task.source.path}: a latent is too large for {self._job.dtype}; write float32 files"
            return self._refuse(latents.task, Outcome(latents.task, None, BadClipError("failed", reason)))
        held.windows[latents.index] = values
        return self._complete(latents.task, held)

    def end(self, ending: _Ending) -> Outcome | None:
        """Note that a clip has no more windows; returns the outcome if it is complete, or never will be."""
        if ending.task.target in self._refused:
            return None
        if ending.outcome.bad:
            return self._refuse(ending.task, ending.outcome)
        held = self._held.setdefault(ending.task.target, _Held())
        held.ending = ending
        return self._complete(ending.task, held)

    def _complete(self, task: Task, held: _Held) -> Outcome | None:
        """Write the files of a clip if it has all of its windows."""
        if held.ending is None or len(held.windows) < held.ending.pieces:
            return None
        outcome, rules = held.ending.outcome, self._job.rules
        if outcome.clip is None:
            return None
        del self._held[task.target]
        try:
            with LatentsWriter(self._folder / task.target, rules.spec.latent_width, self._job.dtype) as writer:
                for index in range(held.ending.pieces):
                    writer.write(held.windows[index])
                if self._job.silence is not None:
                    writer.write(self._job.silence[:, outcome.clip.extent.computed :])
                writer.metadata = outcome.clip.metadata(task.source, rules)
        except InputError as error:
            return self._refuse(task, replace(outcome, clip=None, bad=BadClipError("failed", str(error))))
        return outcome

    def _refuse(self, task: Task, outcome: Outcome) -> Outcome:
        """Give a clip up."""
        self._refused.add(task.target)
        self._held.pop(task.target, None)
        return outcome
