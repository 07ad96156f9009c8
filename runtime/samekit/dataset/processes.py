"""A worker process of this machine, which is called over pipes and started again after it has died.

The process is a new Python interpreter, so a script that starts it needs no `if __name__ == "__main__"`. It ends when
its standard input is closed: when this process ends, whatever the cause.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from samekit.dataset.calls import BATCHES_PER_WORKER, WorkerDiedError
from samekit.dataset.reader_process import describe_exit
from samekit.errors import BackendError, SamekitError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# The modules must be found where this process finds them.
_PROGRAM: Final = """\
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from samekit.dataset.processes import serve
serve()
"""


class WorkerProcess:
    """Calls methods of an object in another process, which is started by the first call.

    Args:
        make: a function that the process calls to make the object. It can be pickled.
        arguments: its arguments.
        environment: the environment variables of the process.
    """

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...], environment: Mapping[str, str]) -> None:
        level = logging.getLogger("samekit").getEffectiveLevel()
        self._hello = pickle.dumps(sys.path) + pickle.dumps((make, arguments, level))
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        # The calls that the process has not answered.
        self._pending: dict[int, Future[Any]] = {}
        self._calls = 0

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Start to call a method; the future raises what the method raises, or WorkerDiedError.

        Raises:
            BackendError: no process can be started.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._process is None:
                self._process = self._start()
            self._calls += 1
            self._pending[self._calls] = future
            # If the process has ended, `_receive` ends this call.
            with suppress(OSError):
                _send(self._process.stdin, pickle.dumps((self._calls, method, arguments)))
        return future

    def kill(self) -> None:
        """Kill the process, so that its calls end."""
        # Without the lock, which `call` holds while it waits for the process.
        if process := self._process:
            process.kill()

    def close(self) -> None:
        """Kill the process and wait for its end."""
        if process := self._process:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            # In a session of its own, it does not get the Ctrl-C of a terminal.
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise BackendError(f"no worker process can be started here ({error}); end other programs") from None
        self._pending = {}
        threading.Thread(target=self._receive, args=(process, self._pending), daemon=True).start()
        with suppress(OSError):
            _send(process.stdin, self._hello)
        return process

    def _receive(self, process: subprocess.Popen[bytes], pending: dict[int, Future[Any]]) -> None:
        """Take the answers of a process until it ends, then end its calls."""
        try:
            # A process that is killed can leave a part of an answer.
            with suppress(EOFError, OSError, pickle.UnpicklingError):
                while True:
                    _take(pickle.load(process.stdout), pending)  # type: ignore[arg-type] # noqa: S301 it is our own
        finally:
            process.kill()
            code = process.wait()
            with self._lock:
                if self._process is process:
                    self._process = None
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr] # both are pipes
            for future in list(pending.values()):
                future.set_exception(WorkerDiedError(describe_exit(code)))


def _take(answer: tuple[Any, ...], pending: dict[int, Future[Any]]) -> None:
    """Take one answer of a process: a log record, a result or an error."""
    number, value, error = answer
    if number is None:
        name, level, message = value
        logging.getLogger(name).log(level, "%s", message)
    elif error:
        pending.pop(number).set_exception(error)
    else:
        pending.pop(number).set_result(value)


def _send(pipe: Any, data: bytes) -> None:
    pipe.write(data)
    pipe.flush()


# --- In the worker process -----------------------------------------------------------------------------------


def serve() -> None:
    """Answer the calls of the process that started this one, until that process ends."""
    requests = sys.stdin.buffer
    answers = _Answers(os.fdopen(os.dup(1), "wb"))
    # What libraries print must not get between the answers.
    os.dup2(2, 1)
    make, arguments, level = pickle.load(requests)  # noqa: S301 from the process that started this one
    logging.basicConfig(level=level, handlers=[_Forwarder(answers)])
    worker = make(*arguments)
    pool = ThreadPoolExecutor(BATCHES_PER_WORKER)
    with suppress(EOFError, OSError, pickle.UnpicklingError):
        while True:
            pool.submit(_answer, answers, worker, *pickle.load(requests))  # noqa: S301 as above
    # Threads may be at work, but nothing waits for their results.
    os._exit(0)


class _Answers:
    """Sends answers from several threads."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, number: int | None, value: Any, error: BaseException | None = None) -> None:
        data = pickle.dumps((number, value, error))
        # If the pipe is closed, `serve` ends this process.
        with self._lock, suppress(OSError):
            _send(self._pipe, data)


class _Forwarder(logging.Handler):
    """Forwards log records, because only the main process knows how to show them."""

    def __init__(self, answers: _Answers) -> None:
        super().__init__()
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        self._answers.send(None, (record.name, record.levelno, record.getMessage()))


def _answer(answers: _Answers, worker: Any, number: int, method: str, arguments: tuple[Any, ...]) -> None:
    """Call a method and send its result or its error."""
    try:
        answers.send(number, getattr(worker, method)(*arguments))
    except SamekitError as error:
        answers.send(number, None, error)
    except BaseException as error:  # noqa: BLE001 errors of any type are raised in the main process
        text = "".join(traceback.format_exception(error))
        answers.send(number, None, RuntimeError(f"in a worker process: {text}"))
