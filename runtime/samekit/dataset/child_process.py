"""Start another Python interpreter, with a connection to this process.

It is a new interpreter, not one of `multiprocessing`, which would run the main script again or fork a process with
threads. So a script that starts it needs no `if __name__ == "__main__"`. It ends soon after this process, whatever ends
this process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final

from samekit.errors import BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# The modules must be found where this process finds them.
_PROGRAM: Final = "import sys; sys.path[:] = sys.argv[2:]; from {module} import serve; serve(int(sys.argv[1]))"
_POLL_SECONDS: Final = 1
_STANDARD_ERROR: Final = 2


def can_start() -> bool:
    """Return whether this system can start such a process."""
    return os.name == "posix" and bool(sys.executable) and not getattr(sys, "frozen", False)


def start_python(
    module: str, environment: Mapping[str, str], files: Sequence[int] = ()
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start an interpreter that calls `serve(DESCRIPTOR)` of a module with its end of the connection.

    Args:
        module: its full name.
        environment: the environment variables of the process.
        files: descriptors of open files that the process needs too, under the same numbers.

    Raises:
        BackendUnavailableError: this system cannot start such a process.
        OSError: no process can be started now.
    """
    if not can_start():
        raise BackendUnavailableError("processes need POSIX and a Python command; use one GPU, and --worker-threads")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(module=module), str(theirs.fileno()), *sys.path],
            stdin=subprocess.DEVNULL,
            # What libraries print is no output of the command.
            stdout=_STANDARD_ERROR,
            pass_fds=(theirs.fileno(), *files),
            env=environment,
            # A terminal sends Ctrl-C to all processes of a group, and only this process must receive it.
            process_group=0,
        )
        return process, Connection(ours.detach())


def end_with_parent() -> None:
    """End this process soon after its parent has ended. A fork of the parent may keep the connection open."""
    threading.Thread(target=_wait_for_end, args=(os.getppid(),), daemon=True).start()


def _wait_for_end(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def describe_exit(code: int) -> str:
    """Return how a process ended, for messages."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
