"""Fault injection: processes that are killed at each step of their writing, small disks, concurrent processes."""

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

# Functions that change names or wait for the disk. A process is killed before each of their calls.
STEPS = tuple((os, name) for name in ("open", "rename", "replace", "fsync", "mkdir", "rmdir", "link", "unlink"))


def in_a_fork(work):
    """Do the work in a fork of this process; return its exit code: 0, or minus the number of a signal."""
    with warnings.catch_warnings():
        # Python 3.12 warns of forks with threads. The work does not use those threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        code = 1
        # Coverage would be slow, and its counts in the fork are lost.
        sys.settrace(None)
        # The fork could hang on a lock that another thread held.
        signal.alarm(300)
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 nothing may get back into the test
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_this_process(*_arguments, **_options):
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(step, work, steps=STEPS, die=kill_this_process):
    """Return the work, changed so that `die` is called just before its `step`-th step.

    Args:
        step: which step, from 1.
        work: what is called.
        steps: object and name of each function whose calls are counted.
        die: called with the step's arguments; if it raises, the step is left out.
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
    """Kill the work at its first step, its second, ... until it completes; return how often it was killed."""
    for step in range(1, most):
        prepare()
        ended = in_a_fork(dying_at(step, work, steps))
        assert ended in (0, KILLED), f"step {step}"
        check(f"killed at step {step}")
        if ended == 0:
            return step - 1
    pytest.fail("it never ends")


def together(*works):
    """Run works at the same time in forks; return their exit codes."""
    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(in_a_fork, works))


@contextmanager
def mounted(folder, *options):
    """Mount a small file system in memory."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder, options):
    """Change the options of a mounted file system, such as `ro`."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def fill(folder, room=0):
    """Fill a disk with a file, except for `room` bytes."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while (left := shutil.disk_usage(folder).free - room) > 0:
            file.write(bytes(left))


def contents(folder):
    """Return the bytes of every file by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    """Return the sorted names in a folder."""
    return sorted(path.name for path in folder.iterdir())
