"""Encode clips with reader threads ahead of the encoder and a writer thread behind it.

    reader threads -> a few windows -> calling thread: batches, encoder -> complete clips -> writer thread

Readers are threads, because libsndfile, matrix products and the encoder release Python's lock. That lock limits them
where there are many cores. Then each thread waits for a process that reads (`reader_process.py`).

A batch consists of windows of one length, from one or several clips. Windows of a rare length wait for others of that
length, but only a few batches of windows wait. After that, some backends run windows of several lengths as one batch
(`Backend.padding`). The last window of a clip can be padded with the zeros that follow the clip anyway.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit.dataset.bad_clip import BadClipError
from samekit.dataset.clip import open_clip
from samekit.dataset.clip_writer import ClipWriter, CompleteClip, CompleteClips, groups_of
from samekit.dataset.loudness import Loudness, latent_rms
from samekit.dataset.waiting_windows import WaitingWindows
from samekit.dataset.window_arrays import PrivateMemory
from samekit.engine.spec import ENCODER
from samekit.errors import BackendError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from samekit.arrays import Array
    from samekit.backends.base import Backend
    from samekit.dataset.clip import Clip, ClipReader, CuttingRules
    from samekit.dataset.options import PreEncodeOptions
    from samekit.dataset.output import Output
    from samekit.dataset.reader_process import ReaderProcess, ReaderProcesses, RemoteClip
    from samekit.dataset.sources import Source
    from samekit.files.pairs import Pair
    from samekit.windows import Window

_POLL_SECONDS: Final = 0.01


@dataclass(frozen=True)
class Task:
    """A clip to be encoded, and the name of its `.npy` file."""

    source: Source
    target: str
    replaces: bool = True
    """Whether the output may hold an older `.json` file of the clip."""
    loudness: Loudness = field(default_factory=Loudness)
    """The gain to encode the clip with, if its loudness is corrected."""


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
    """The result of a task: a clip whose files are written, or an error; and the digests if they were computed."""

    task: Task
    clip: Clip | None
    bad: BadClipError | None = None
    sha256: str | None = None
    caption_sha256: str | None = None
    worker: str | None = None
    """The worker process that encoded the clip; None for this process."""


class _Tasks:
    """The clips that readers take. If the loudness is corrected, each clip may come back with another gain."""

    def __init__(self, tasks: Sequence[Task], *, return_: bool) -> None:
        self._waiting = deque(tasks)
        # Clips that are waiting or may come back.
        self._open = len(tasks) if return_ else 0
        self._changed = threading.Condition()

    def take(self) -> Task | None:
        """Return the next clip, or None if none is waiting."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    @property
    def may_return(self) -> bool:
        """Whether a clip may still come back."""
        with self._changed:
            return self._open > 0

    def wait(self) -> None:
        """Wait until a clip comes back, or none will."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._open <= 0)

    def put_back(self, task: Task) -> None:
        with self._changed:
            self._waiting.append(task)
            self._changed.notify()

    def close(self, clips: int = 1) -> None:
        """Expect this number of clips no more."""
        with self._changed:
            self._open -= clips
            self._changed.notify_all()


@dataclass
class _Work:
    """A clip that is not written yet. Only the encoding thread changes it."""

    task: Task
    windows: dict[int, Array] = field(default_factory=dict)
    """Index of a window -> its latents, in the dtype of the file."""
    pieces: int | None = None
    """Number of windows; None until the clip is read completely."""
    outcome: Outcome | None = None
    failed: bool = False
    """Whether the clip cannot be encoded. Then its other windows are neither read nor encoded."""


@dataclass(frozen=True)
class _Piece:
    """One window of a clip on the way to the encoder."""

    work: _Work
    index: int
    window: Window
    audio: Array


@dataclass(frozen=True)
class _End:
    """The end of a clip, after its last window."""

    work: _Work
    pieces: int
    outcome: Outcome


@dataclass(frozen=True)
class _Idle:
    """A reader waits for clips that come back, so no batch can be filled up now."""


@dataclass
class Pipeline:
    """Encodes clips and writes their latents.

    The files of a clip are opened when it is complete, because a batch of 100 windows may be from 100 clips.
    """

    backend: Backend
    backend_lock: AbstractContextManager[object]
    """Held while the backend is used, so that several pipelines can share it."""
    job: Job
    readers: int
    """Number of threads that read, or wait for a reader process each."""
    processes: ReaderProcesses | None
    """Processes that read; None reads in threads."""
    finished: Callable[[Sequence[Outcome]], None]
    """Called in the writer thread with the outcomes of a group of clips, when their files are in the output."""

    def __post_init__(self) -> None:
        # The first error of a reader or of the writer.
        self._error: BaseException | None = None
        self._stopped = False
        # Each reader puts None when it ends.
        self._read: queue.Queue[_Piece | _End | _Idle | None] = queue.Queue(self.job.options.batch_size + self.readers)
        # Batches that the backend runs, and the functions that return their latents.
        self._pending: deque[tuple[list[_Piece], Callable[[], Array]]] = deque()
        self._complete = CompleteClips(self.job.output.group_limits)
        # Reader processes that this pipeline has used.
        self._processes: list[ReaderProcess] = []

    def run(self, tasks: Sequence[Task]) -> None:
        """Encode every clip; raises what `Executor.encode` raises."""
        self._tasks = _Tasks(tasks, return_=self.job.options.target_latent_rms is not None)
        # Daemon threads, so that a second Ctrl-C, which interrupts `_end_threads`, ends the process.
        readers = [threading.Thread(target=self._read_clips, daemon=True) for _ in range(self.readers)]
        with self.job.output.pair_writer() as write_pairs:
            writer = threading.Thread(target=self._write_clips, args=(write_pairs,), daemon=True)
            try:
                for thread in (writer, *readers):
                    _start(thread)
                with self.backend_lock:
                    self._encode()
            except BaseException as error:
                self._error = error
                raise
            finally:
                self._stopped = True
                self._tasks.close(len(tasks))
                self._end_threads(readers, writer)
        if self._error is not None:
            raise self._error

    def _end_threads(self, readers: list[threading.Thread], writer: threading.Thread) -> None:
        if self._error is not None:
            for process in self._processes:
                process.kill()
        # This makes room in the queue for readers that wait for it.
        while any(reader.is_alive() for reader in readers):
            with suppress(queue.Empty):
                self._read.get(timeout=_POLL_SECONDS)
        if writer.is_alive():
            self._complete.put(None)
            writer.join()

    def _read_clips(self) -> None:
        """Read clips until none is left."""
        try:
            with self._opener() as open_reader:
                while not self._stopped:
                    if task := self._tasks.take():
                        reader = open_reader(task.source, self.job.rules, self.job.options, task.loudness.gain)
                        self._read_clip(task, reader)
                    elif self._tasks.may_return:
                        self._read.put(_Idle())
                        self._tasks.wait()
                    else:
                        break
        except BaseException as error:  # noqa: BLE001 it is raised again by `run`
            self._error = self._error or error
        self._read.put(None)

    @contextmanager
    def _opener(self) -> Iterator[Callable[[Source, CuttingRules, PreEncodeOptions, float], ClipReader | RemoteClip]]:
        """Yield a function that opens a clip, in this thread or in a process."""
        if self.processes is None:
            rules = self.job.rules
            memory = PrivateMemory(rules.window_values)
            yield partial(open_clip, allocate=memory.take)
            return
        with self.processes.one() as process:
            self._processes.append(process)
            yield process.read

    def _read_clip(self, task: Task, reader: ClipReader | RemoteClip) -> None:
        work = _Work(task)
        pieces, bad = 0, None
        try:
            with closing(iter(reader)) as windows:
                for window, audio in windows:
                    if work.failed or self._stopped:
                        return
                    self._read.put(_Piece(work, pieces, window, audio))
                    pieces += 1
        except BadClipError as error:
            bad = error
        clip = None if bad else reader.clip
        self._read.put(_End(work, pieces, Outcome(task, clip, bad, reader.sha256, reader.caption_sha256)))

    def _encode(self) -> None:
        """Encode the windows from the readers until all readers have ended."""
        options, spec, active = self.job.options, self.job.rules.spec, self.readers
        waiting = WaitingWindows(options.batch_size, spec.samples(self.backend.padding), self._room)
        while active and not self._error:
            item = self._read.get()
            if item is None:
                active -= 1
            elif isinstance(item, _End):
                self._end(item)
            elif isinstance(item, _Idle):
                self._encode_all(waiting)
            else:
                self._encode_batch(waiting.add(item, item.audio.shape[-1]))
        self._encode_all(waiting)

    def _encode_all(self, waiting: WaitingWindows[_Piece]) -> None:
        """Encode the windows that wait, and fetch all latents."""
        while batch := waiting.take():
            self._encode_batch(batch)
        while self._pending:
            self._fetch_batch()

    def _room(self, piece: _Piece) -> int:
        """Return the most samples that a window can have with zeros appended: more than it has at the end of a clip."""
        clip = piece.work.outcome and piece.work.outcome.clip
        return self.job.rules.spec.samples(self.job.rules.room(piece.window, clip.extent)) if clip else 0

    def _encode_batch(self, batch: list[_Piece]) -> None:
        """Start to encode windows as one batch. Fetch the latents of an earlier batch, unless more can be pending."""
        batch = [piece for piece in batch if not piece.work.failed]
        if not batch or self._error:
            return
        self._pending.append((batch, self.backend.submit(ENCODER, [piece.audio[None] for piece in batch])))
        if len(self._pending) >= self.backend.most_pending:
            self._fetch_batch()

    def _fetch_batch(self) -> None:
        """Wait for the latents of the oldest pending batch, and keep those of the cores."""
        batch, fetch = self._pending.popleft()
        try:
            out = fetch()
        except NonFiniteError as error:
            if len(batch) > 1:
                # One window at a time, to find the clip that fails.
                for piece in batch:
                    self._encode_batch([piece])
            elif not batch[0].work.failed:
                self._fail(batch[0].work, str(error))
            return
        for piece, latents in zip(batch, out, strict=True):
            self._keep(piece, latents)

    def _keep(self, piece: _Piece, latents: Array) -> None:
        """Keep the latents of a window in the dtype of the file."""
        work, dtype = piece.work, self.job.options.dtype
        if work.failed:
            return
        # Always copied: the encoder's array holds the latents of the whole batch.
        with np.errstate(over="ignore"):
            values = np.array(latents[:, piece.window.core], dtype, order="C")
        if not np.isfinite(values).all():
            self._fail(work, f"{work.task.source.path}: a latent is too large for {dtype}; write float32 files")
            return
        work.windows[piece.index] = values
        if work.outcome and len(work.windows) == work.pieces:
            self._finish(work, work.outcome)

    def _end(self, end: _End) -> None:
        """Handle the end of a clip, which was read or could not be read."""
        work = end.work
        if not work.failed:
            work.pieces, work.outcome, work.failed = end.pieces, end.outcome, end.outcome.bad is not None
            if work.failed or len(work.windows) == work.pieces:
                self._finish(work, end.outcome)

    def _fail(self, work: _Work, reason: str) -> None:
        work.failed = True
        self._finish(work, Outcome(work.task, None, BadClipError("failed", reason)))

    def _finish(self, work: _Work, outcome: Outcome) -> None:
        """Pass a clip to the writer, or back to the readers if it has to be encoded with another gain."""
        windows = [] if work.failed else [latents for _, latents in sorted(work.windows.items())]
        target = self.job.options.target_latent_rms
        if target is not None and outcome.clip:
            loudness = replace(work.task.loudness, rms=latent_rms(windows, outcome.clip.extent.latents))
            if corrected := loudness.corrected(target):
                self._tasks.put_back(replace(work.task, loudness=corrected))
                return
            outcome = replace(outcome, clip=replace(outcome.clip, loudness=loudness))
        self._tasks.close()
        self._complete.put(CompleteClip(outcome, windows))

    def _write_clips(self, write_pairs: Callable[[Sequence[Pair]], None]) -> None:
        """Write complete clips until there are no more. After an error of the writer, they are dropped."""
        writer, failed = ClipWriter(self.job, write_pairs, self.finished), False
        for group in groups_of(self._complete, self.job.output.group_limits):
            try:
                if not failed:
                    writer.write(group)
            except BaseException as error:  # noqa: BLE001 it is raised again by `run`
                self._error, failed = self._error or error, True


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError as error:
        raise BackendError(f"no more threads can be started here ({error}); pass fewer --workers") from None
