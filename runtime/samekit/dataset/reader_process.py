"""Read clips in other processes, which share the memory of windows with this one.

    this process    rules and options, sources, numbers of free pieces of memory ->
    reader process  <- for each window its number and layout, and what is known of the clip; then the result of the clip

Reader processes do not import PyTorch or an inference engine. A process that ends while it reads a clip makes this clip
bad, and the next clip gets a new process.
"""

from __future__ import annotations

import os
import subprocess
import weakref
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

from samekit.dataset.bad_clip import BadClipError
from samekit.dataset.child_process import describe_exit, end_with_parent, start_python
from samekit.dataset.clip import open_clip
from samekit.dataset.window_arrays import SharedMemory
from samekit.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from samekit.arrays import Array
    from samekit.dataset.clip import Clip, ClipReader, CuttingRules
    from samekit.dataset.options import PreEncodeOptions
    from samekit.dataset.sources import Source
    from samekit.windows import Window

# Pieces of memory that a process needs at once: a window that is sent, the next one, and a larger one in its place.
_PIECES: Final = 3
# The libraries of matrix products would start a thread for each core in each process.
_ONE_THREAD: Final = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Seconds for a process to end by itself.
_END_SECONDS: Final = 5


@dataclass(frozen=True)
class _Result:
    """The result of reading a clip, in the fields of `ClipReader`; or the error that ends the run."""

    clip: Clip | None
    sha256: str | None
    caption_sha256: str | None
    bad: BadClipError | None
    error: Exception | None


@dataclass(frozen=True)
class _Order:
    """A clip to read, and the factor of its samples."""

    source: Source
    gain: float


class _AbandonedError(Exception):
    """The clip is not needed any more."""


class ReaderProcess:
    """A process that reads one clip at a time. It is started when it is needed, and again after it has ended."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._pieces: set[int] = set()
        self._job: tuple[CuttingRules, PreEncodeOptions] | None = None

    def read(self, source: Source, rules: CuttingRules, options: PreEncodeOptions, gain: float) -> RemoteClip:
        """Return a clip, which this process reads when it is iterated over.

        Raises:
            BackendError: the process does not start.
        """
        if self._process is not None and self._process.poll() is not None:
            self.ended()
        if self._process is None:
            self._start()
        if self._job != (rules, options):
            self._job = rules, options
            self.send(self._job)
        return RemoteClip(self, self._memory, _Order(source, gain))

    def _start(self) -> None:
        try:
            self._process, self._connection = start_python(
                __name__, os.environ | _ONE_THREAD, [self._memory.descriptor]
            )
        except OSError as error:
            raise BackendError(f"no more processes can be started here ({error}); pass fewer --workers") from None
        self._job = None
        try:
            self._connection.send((self._memory.values, self._memory.descriptor))
            self._connection.recv()
            for _ in range(_PIECES):
                self.give_piece()
        except (EOFError, OSError):
            reason = self.ended()
            raise BackendError(f"a reader process died when it started ({reason}); pass --worker-threads") from None

    def give_piece(self) -> None:
        """Let the process fill one more piece of memory."""
        number = self._memory.take()
        self._pieces.add(number)
        self.send(number)

    def send(self, message: object) -> None:
        """Send a message; if the process has ended, `receive` reports it."""
        with suppress(OSError):
            self._connection.send(message)

    def receive(self) -> Any:
        """Return the next message; raises EOFError or OSError if the process has ended."""
        message = self._connection.recv()
        if isinstance(message, tuple):
            self._pieces.discard(message[0])
        return message

    def kill(self) -> None:
        """End the process at once; another thread may be waiting for it."""
        if process := self._process:
            process.kill()
            process.wait()

    def hang_up(self) -> None:
        """Tell the process that no clip follows."""
        if self._process is not None:
            self._connection.close()

    def ended(self) -> str:
        """Take back the memory of a process that has ended, and return how it ended."""
        self._connection.close()
        code = self._wait()
        for number in self._pieces:
            self._memory.give_back(number)
        self._pieces.clear()
        return describe_exit(code)

    def close(self) -> None:
        """End the process, which waits for a clip."""
        if self._process is not None:
            self.ended()

    def _wait(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        try:
            return process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


class RemoteClip:
    """A clip that another process reads, with the interface of `ClipReader`."""

    def __init__(self, process: ReaderProcess, memory: SharedMemory, order: _Order) -> None:
        self._process = process
        self._memory = memory
        self._order = order
        self.clip: Clip | None = None
        self.sha256: str | None = None
        self.caption_sha256: str | None = None

    def __iter__(self) -> Generator[tuple[Window, Array]]:
        """Yield each window with its audio, `[channels, samples]`, as `ClipReader` does."""
        self._process.send(self._order)
        done = False
        try:
            while not done:
                message = self._process.receive()
                done = isinstance(message, _Result)
                if not done:
                    number, window, shape, strides, self.clip = message
                    audio = self._memory.array(number, shape, self._memory.give_back, strides)
                    self._process.give_piece()
                    yield window, audio
        except (EOFError, OSError):
            done = True
            reason = f"{self._order.source.path}: the process that read it died ({self._process.ended()})"
            raise BadClipError("unreadable", f"{reason}; run pre-encode again, or convert the file") from None
        finally:
            if not done:
                self._abandon()
        self._finish(message)

    def _abandon(self) -> None:
        """Stop reading the clip."""
        self._process.send(None)
        with suppress(EOFError, OSError):
            while not isinstance(message := self._process.receive(), _Result):
                self._memory.give_back(message[0])
                self._process.give_piece()
            return
        self._process.ended()

    def _finish(self, result: _Result) -> None:
        self.clip, self.sha256, self.caption_sha256 = result.clip, result.sha256, result.caption_sha256
        if error := result.bad or result.error:
            raise error


class ReaderProcesses:
    """The reader processes of an executor, which several threads share. Idle ones are kept for the next run."""

    def __init__(self, values: int) -> None:
        self._memory = SharedMemory(values)
        self._idle: list[ReaderProcess] = []
        weakref.finalize(self, _close, self._idle)

    @contextmanager
    def one(self) -> Iterator[ReaderProcess]:
        """Yield a process for one thread."""
        try:
            process = self._idle.pop()
        except IndexError:
            process = ReaderProcess(self._memory)
        try:
            yield process
        finally:
            self._idle.append(process)

    def close(self) -> None:
        """End all processes."""
        _close(self._idle)


def _close(processes: list[ReaderProcess]) -> None:
    """End idle processes, all at the same time."""
    for process in processes:
        process.hang_up()
    while processes:
        processes.pop().close()


def serve(descriptor: int) -> None:
    """Read clips for the process that has started this one, on the other side of a connection."""
    end_with_parent()
    with suppress(EOFError, OSError), Connection(descriptor) as connection:
        server = _Server(connection, SharedMemory(*connection.recv()))
        connection.send("ready")
        server.serve()


class _Server:
    """Reads clips for the other side of a connection."""

    def __init__(self, connection: Connection, memory: SharedMemory) -> None:
        self._connection = connection
        self._memory = memory
        self._free: list[int] = []
        # How many arrays here show a piece that was sent away. It is not free when they are gone.
        self._sent: Counter[int] = Counter()

    def serve(self) -> None:
        """Read clips until the connection ends."""
        job: Any = None
        while True:
            message = self._connection.recv()
            if isinstance(message, int):
                self._free.append(message)
            elif isinstance(message, tuple):
                job = message
            elif message is not None:
                rules, options = job
                self._connection.send(self._read(open_clip(message.source, rules, options, message.gain, self._take)))

    def _read(self, reader: ClipReader) -> _Result:
        """Send the windows of a clip, and return its result."""
        bad = error = None
        try:
            for window, audio in reader:
                number = self._memory.number(audio)
                self._sent[number] += 1
                self._connection.send((number, window, audio.shape, audio.strides, reader.clip))
        except _AbandonedError:
            pass
        except BadClipError as raised:
            # A new one, because the traceback would keep the arrays of the clip.
            bad = BadClipError(raised.status, raised.reason, transient=raised.transient)
        except Exception as raised:  # noqa: BLE001 the other side raises it again
            error = raised
        return _Result(reader.clip, reader.sha256, reader.caption_sha256, bad, error)

    def _take(self, shape: tuple[int, ...]) -> Array:
        """Return an array in a free piece of memory; wait for one if there is none."""
        while not self._free:
            message = self._connection.recv()
            if message is None:
                raise _AbandonedError
            self._free.append(message)
        return self._memory.array(self._free.pop(), shape, self._gone)

    def _gone(self, number: int) -> None:
        """Use a piece again, unless it was sent away."""
        if self._sent[number]:
            self._sent[number] -= 1
        else:
            self._free.append(number)
