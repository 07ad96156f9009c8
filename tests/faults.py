"""Fault injection: kill a process at any file system call, fill a disk, run several processes at the same time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

KILLED = -signal.SIGKILL

# Calls that change names or wait for the disk. Every incomplete state on disk lies between two of these calls.
STEPS = tuple((os, name) for name in ("open", "rename", "replace", "fsync", "mkdir", "rmdir", "link", "unlink"))


def in_a_fork(work):
    """Run `work` in a forked process and return its exit code; after a signal it is minus the signal number."""
    with warnings.catch_warnings():
        # Python 3.12 warns if the parent has threads; `work` uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        code = 1
        # Coverage results of this process would be lost, and tracing is slow.
        sys.settrace(None)
        # A lock that another thread held at the fork is never released; the alarm ends a process that waits for it.
        signal.alarm(300)
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 no exception may reach the test in this process
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_this_process(*_arguments, **_options):
    """Send SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(step, work, steps=STEPS, die=kill_this_process):
    """Return a function that runs `work` and calls `die` before the call with the number `step`.

    Args:
        step: number of the call, from 1.
        work: function without arguments.
        steps: object and name of each function whose calls are counted.
        die: gets the arguments of the call. The call is made only if `die` returns.
    """
    left = [step]

    def counting(function):
        def count(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                die(*arguments, **options)
            return function(*arguments, **options)

        return count

    def run():
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in steps:
                patch.setattr(owner, name, counting(getattr(owner, name)))
            work()

    return run


def kill_at_every_step(work, check, prepare, steps=STEPS, most=200):
    """Kill `work` at its first step, then at its second, and so on, until it ends without being killed.

    Returns:
        how often it was killed.
    """
    for step in range(1, most):
        prepare()
        ended = in_a_fork(dying_at(step, work, steps))
        assert ended in (0, KILLED), f"step {step}"
        check(f"killed at step {step}")
        if ended == 0:
            return step - 1
    pytest.fail(f"the work has more than {most - 1} steps")


def together(*works):
    """Run functions at the same time, each in a forked process, and return their exit codes."""
    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(in_a_fork, works))


@contextmanager
def mounted(folder, *options):
    """Mount a tmpfs on a new folder, or skip the test if that is not permitted."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder, options):
    """Change the mount options of a file system, for example to `ro`."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def fill(folder, room=0):
    """Fill a disk with one file, except for `room` bytes.

    Other processes may write at the same time, so an OSError for lack of space is ignored.
    """
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while (left := shutil.disk_usage(folder).free - room) > 0:
            file.write(bytes(left))


def contents(folder):
    """Return the bytes of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    """Return the sorted names in a folder."""
    return sorted(path.name for path in folder.iterdir())
