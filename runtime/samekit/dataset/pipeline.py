"""Encode clips with reader threads ahead of the encoder and a writer thread behind it.

    reader threads -> a few windows -> calling thread: batches, encoder -> latents -> writer thread

Readers are threads, because libsndfile, matrix products and the encoder release Python's lock. Two threads read 1.9
times as fast as one; two processes gain a seventh, as copying the samples costs the rest (measured on 2 cores, 10 s
clips in four formats).

A batch holds windows of one length, of one clip or several, so nothing is padded. Windows of a rare length wait for
more of that length, but at most `_WAITING_BATCHES` batches of windows wait.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict, deque
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import numpy as np

from samekit.dataset.clip import BadClipError, ClipReader
from samekit.errors import BackendError, InputError, NonFiniteError
from samekit.files.latents import LatentsWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from samekit.arrays import Array
    from samekit.backends.base import Backend
    from samekit.dataset.clip import Clip, CuttingRules
    from samekit.dataset.options import PreEncodeOptions
    from samekit.dataset.output import Output
    from samekit.dataset.sources import Source
    from samekit.windows import Window

_WAITING_BATCHES: Final = 4
# The latents of so many windows may wait for the disk.
_WRITES_WAITING: Final = 64
# Seconds after which a waiting thread checks whether the run was stopped.
_POLL_SECONDS: Final = 0.2


@dataclass(frozen=True)
class Task:
    """A clip to be encoded."""

    source: Source
    target: str
    """Name of the `.npy` file. The `.json` file has the same stem."""


@dataclass(frozen=True)
class Job:
    """What a run does with every clip; sent to the actors of a cluster."""

    rules: CuttingRules
    options: PreEncodeOptions
    silence: Array | None
    """`[width, latents of sample_size]`, appended to padded clips; None without padding."""
    output: Output


@dataclass(frozen=True)
class Outcome:
    """The result of a task: a clip whose files are written, or an error."""

    task: Task
    clip: Clip | None
    bad: BadClipError | None = None
    sha256: str | None = None
    """Digest of the audio file that was read, if the options ask for digests."""
    caption_sha256: str | None = None
    """Digest of the caption that was read, likewise."""


@dataclass(frozen=True)
class _Piece:
    """One window of a clip: audio on the way to the encoder, latents on the way to the writer."""

    task: Task
    index: int
    window: Window
    values: Array


@dataclass(frozen=True)
class _End:
    """The end of a clip after so many pieces."""

    pieces: int
    outcome: Outcome


class _StoppedError(Exception):
    """The run was stopped by an error in another thread."""


_Item = TypeVar("_Item")


class _Channel(Generic[_Item]):
    """A bounded queue whose methods raise _StoppedError once the run is stopped."""

    def __init__(self, size: int, stopped: threading.Event) -> None:
        self._queue: queue.Queue[_Item] = queue.Queue(size)
        self._stopped = stopped

    def put(self, item: _Item) -> None:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_SECONDS)
                return
        raise _StoppedError

    def get(self) -> _Item:
        while not self._stopped.is_set():
            with suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_SECONDS)
        raise _StoppedError


class Pipeline:
    """Encodes clips and writes their latents.

    Args:
        backend: encodes windows.
        backend_lock: held while the backend is used, so that several pipelines can share it.
        job: what to do with every clip.
        folder: where the files are written.
        readers: number of reader threads.
        finished: called in the writer thread with each outcome, when the files of the clip are on disk.
    """

    def __init__(
        self,
        backend: Backend,
        backend_lock: AbstractContextManager[object],
        job: Job,
        folder: Path,
        readers: int,
        finished: Callable[[Outcome], None],
    ) -> None:
        self._backend = backend
        self._backend_lock = backend_lock
        self._job = job
        self._batch_size = job.options.batch_size
        self._readers = readers
        self._finished = finished
        self._writer = _ClipWriter(job, folder)
        # Targets of clips that have failed. Their other windows are neither read nor encoded.
        self._failed: set[str] = set()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        # None marks the end of one reader, or of all latents.
        self._read: _Channel[_Piece | _End | None] = _Channel(self._batch_size + readers, self._stopped)
        self._encoded: _Channel[_Piece | _End | None] = _Channel(_WRITES_WAITING, self._stopped)

    def run(self, tasks: Iterable[Task]) -> None:
        """Encode every clip. After an error, each clip's files are complete or missing.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
            BackendError: the backend failed, or the system starts no more threads.
        """
        waiting = deque(tasks)
        threads = [
            threading.Thread(target=self._guarded, args=(self._read_clips, waiting)) for _ in range(self._readers)
        ]
        threads.append(threading.Thread(target=self._guarded, args=(self._write,)))
        started = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            with suppress(_StoppedError):
                with self._backend_lock:
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
        """Do the work of a thread. An error stops the run, and `run` raises it."""
        try:
            work(*arguments)
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 it is raised again by `run`
            self._error = self._error or error
            self._stopped.set()

    def _read_clips(self, waiting: deque[Task]) -> None:
        """Read clips until none is left."""
        while True:
            try:
                task = waiting.popleft()
            except IndexError:
                break
            self._read_clip(task)
        self._read.put(None)

    def _read_clip(self, task: Task) -> None:
        reader = ClipReader(task.source, self._job.rules, checksum=self._job.options.checksum)
        pieces, bad = 0, None
        try:
            with closing(iter(reader)) as windows:
                for window, audio in windows:
                    if task.target in self._failed:
                        break
                    self._read.put(_Piece(task, pieces, window, audio))
                    pieces += 1
        except BadClipError as error:
            bad = error
        clip = None if bad else reader.clip
        self._read.put(_End(pieces, Outcome(task, clip, bad, reader.sha256, reader.caption_sha256)))

    def _encode(self) -> None:
        """Encode what the readers read until all of them have ended."""
        waiting: dict[int, list[_Piece]] = defaultdict(list)
        active = self._readers
        while active:
            item = self._read.get()
            if item is None:
                active -= 1
            elif isinstance(item, _End):
                if item.outcome.bad:
                    self._failed.add(item.outcome.task.target)
                self._encoded.put(item)
            else:
                length = item.values.shape[-1]
                waiting[length].append(item)
                if len(waiting[length]) >= self._batch_size:
                    self._encode_batch(waiting.pop(length))
                elif sum(map(len, waiting.values())) > _WAITING_BATCHES * self._batch_size:
                    self._encode_batch(waiting.pop(next(iter(waiting))))
        for batch in waiting.values():
            self._encode_batch(batch)
        self._encoded.put(None)

    def _encode_batch(self, batch: list[_Piece]) -> None:
        """Encode windows of one length, and pass their cores to the writer."""
        batch = [piece for piece in batch if piece.task.target not in self._failed]
        if not batch:
            return
        try:
            out = self._backend.encode(np.stack([piece.values for piece in batch]))
        except NonFiniteError as error:
            if len(batch) == 1:
                task = batch[0].task
                self._failed.add(task.target)
                self._encoded.put(_End(0, Outcome(task, None, BadClipError("failed", str(error)))))
                return
            # One clip at a time, to find the one that fails.
            for piece in batch:
                self._encode_batch([piece])
            return
        for piece, latents in zip(batch, out, strict=True):
            self._encoded.put(replace(piece, values=latents[:, piece.window.core]))

    def _write(self) -> None:
        """Write clips until there are no more latents."""
        while (item := self._encoded.get()) is not None:
            outcome = self._writer.end(item) if isinstance(item, _End) else self._writer.add(item)
            if outcome:
                if outcome.bad:
                    self._failed.add(outcome.task.target)
                self._finished(outcome)


@dataclass
class _Unfinished:
    """A clip whose latents are not complete yet."""

    windows: dict[int, Array] = field(default_factory=dict)
    """Index of a window -> its latents, in the dtype of the file."""
    end: _End | None = None


class _ClipWriter:
    """Holds the latents of each clip until it is complete, then writes its files.

    No file is open before, because a batch of a hundred windows may be of a hundred clips.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._folder = folder
        self._unfinished: dict[str, _Unfinished] = defaultdict(_Unfinished)
        self._failed: set[str] = set()

    def add(self, piece: _Piece) -> Outcome | None:
        """Take the latents of a window; return the outcome if the clip is now complete or cannot be written."""
        task = piece.task
        if task.target in self._failed:
            return None
        # Always copied: the encoder's array holds the latents of the whole batch.
        with np.errstate(over="ignore"):
            values = np.array(piece.values, self._job.options.dtype, order="F")
        if not np.isfinite(values).all():
            reason = f"{task.source.path}: a latent is too large for {self._job.options.dtype}; write float32 files"
            return self._fail(Outcome(task, None, BadClipError("failed", reason)))
        self._unfinished[task.target].windows[piece.index] = values
        return self._complete(task)

    def end(self, end: _End) -> Outcome | None:
        """Take the end of a clip; return the outcome if the clip is now complete or has failed."""
        task = end.outcome.task
        if task.target in self._failed:
            return None
        if end.outcome.bad:
            return self._fail(end.outcome)
        self._unfinished[task.target].end = end
        return self._complete(task)

    def _complete(self, task: Task) -> Outcome | None:
        """Write the files of a clip if all of its windows are here."""
        unfinished, rules, options = self._unfinished[task.target], self._job.rules, self._job.options
        end = unfinished.end
        if end is None or len(unfinished.windows) < end.pieces:
            return None
        clip = end.outcome.clip
        if clip is None:
            return None
        del self._unfinished[task.target]
        try:
            with LatentsWriter(self._folder / task.target, rules.spec.latent_width, options.dtype) as writer:
                for index in range(end.pieces):
                    writer.write(unfinished.windows[index])
                if self._job.silence is not None:
                    writer.write(self._job.silence[:, clip.extent.computed :])
                writer.metadata = clip.metadata(task.source, rules)
        except InputError as error:
            return self._fail(replace(end.outcome, clip=None, bad=BadClipError("failed", str(error))))
        return end.outcome

    def _fail(self, outcome: Outcome) -> Outcome:
        """Drop what is held of a clip; its later windows are ignored."""
        self._failed.add(outcome.task.target)
        self._unfinished.pop(outcome.task.target, None)
        return outcome
