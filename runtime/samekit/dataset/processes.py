"""A worker process of this machine, which is called over a connection and started again after it has died."""

from __future__ import annotations

import logging
import os
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from samekit.dataset.calls import BATCHES_PER_WORKER, WorkerDiedError
from samekit.dataset.child_process import describe_exit, end_with_parent, start_python
from samekit.errors import BackendError, SamekitError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping


class WorkerProcess:
    """Calls methods of an object in another process, which is started by the first call.

    Args:
        make: a function that the process calls to make the object. It can be pickled.
        arguments: its arguments.
        environment: the environment variables of the process.
    """

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...], environment: Mapping[str, str]) -> None:
        level = logging.getLogger("samekit").getEffectiveLevel()
        self._hello = make, arguments, level
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
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
            if self._connection is None:
                self._connection = self._start()
            self._calls += 1
            self._pending[self._calls] = future
            # If the process has ended, `_receive` ends this call.
            with suppress(OSError):
                self._connection.send((self._calls, method, arguments))
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

    def _start(self) -> Connection:
        try:
            process, connection = start_python(__name__, self._environment)
        except OSError as error:
            raise BackendError(f"no worker process can be started here ({error}); end other programs") from None
        self._process, self._pending = process, {}
        threading.Thread(target=self._receive, args=(process, connection, self._pending), daemon=True).start()
        with suppress(OSError):
            connection.send(self._hello)
        return connection

    def _receive(
        self, process: subprocess.Popen[bytes], connection: Connection, pending: dict[int, Future[Any]]
    ) -> None:
        """Take the answers of a process until it ends, then end its calls."""
        try:
            with suppress(EOFError, OSError):
                while True:
                    _take(connection.recv(), pending)
        finally:
            process.kill()
            code = process.wait()
            with self._lock:
                if self._connection is connection:
                    self._process = self._connection = None
            connection.close()
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


# --- In the worker process -----------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Answer the calls of the process that started this one, until that process ends."""
    end_with_parent()
    connection = Connection(descriptor)
    answers = _Answers(connection)
    with suppress(EOFError, OSError):
        make, arguments, level = connection.recv()
        logging.basicConfig(level=level, handlers=[_Forwarder(answers)])
        worker = make(*arguments)
        pool = ThreadPoolExecutor(BATCHES_PER_WORKER)
        while True:
            pool.submit(_answer, answers, worker, *connection.recv())
    # Threads may be at work, but nothing waits for their results.
    os._exit(0)


class _Answers:
    """Sends answers from several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, number: int | None, value: Any, error: BaseException | None = None) -> None:
        # If the connection is closed, `serve` ends this process.
        with self._lock, suppress(OSError):
            self._connection.send((number, value, error))


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
