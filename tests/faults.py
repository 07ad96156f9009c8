"""Faults on purpose: a process that kills itself at any step of its writing, a disk that is full, several at once."""

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

# What changes names and what waits for the disk; everything that can be half-done lies between two of these.
STEPS = tuple((os, name) for name in ("open", "rename", "replace", "fsync", "mkdir", "rmdir", "link", "unlink"))


def in_a_fork(work):
    """How a copy of this process ended that did the work: 0, or minus the number of a signal."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads; the work uses none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        code = 1
        # Coverage would be slow and in vain: what it counts here is lost.
        sys.settrace(None)
        # It never hangs: a lock that another thread held at the fork stays held.
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
    """End at once, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(step, work, steps=STEPS, die=kill_this_process):
    """The work, but just before its `step`-th step the process dies, or whatever else `die` does happens.

    Args:
        step: which step, from 1.
        work: what is called.
        steps: object and name of each function whose calls are counted.
        die: what happens then, instead of the step if it raises; it gets the step's arguments.
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
    """Kill the work at its first step, its second, ... until it ends by itself; returns how often it was killed."""
    for step in range(1, most):
        prepare()
        ended = in_a_fork(dying_at(step, work, steps))
        assert ended in (0, KILLED), f"step {step}"
        check(f"killed at step {step}")
        if ended == 0:
            return step - 1
    pytest.fail("it never ends")


def together(*works):
    """Start works at once in processes; how each ended."""
    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(in_a_fork, works))


@contextmanager
def mounted(folder, *options):
    """A small file system in memory."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder, options):
    """Mount it again with other options, such as `ro`."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def fill(folder, room=0):
    """Let a file take the room of a disk, but for so many bytes; others may be writing there, and be first."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while (left := shutil.disk_usage(folder).free - room) > 0:
            file.write(bytes(left))


def contents(folder):
    """Relative path -> bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    """Names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())
