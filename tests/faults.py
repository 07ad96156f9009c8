"""Fault injection: processes that are killed at each step of their writing, small disks, concurrent processes."""

from __future__ import annotations

import os
import shutil
import signal
import stat
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
        except BaseException:  # noqa: BLE001 no exception may reach the test in this process
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
        step: number of the call, from 1.
        work: function without arguments.
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
    pytest.fail(f"the work has more than {most - 1} steps")


class PowerCuts:
    """Simulates a disk that keeps after a power cut only what was synced.

    A file keeps its contents at its last `fsync`; without one it is empty. Each name in a folder is the one at the
    folder's last `fsync`, or the current one: file systems may write changed names at any time and in any order.
    """

    def __init__(self, root, random):
        self._root = root
        self._random = random
        self._contents = {}
        self._names = {}
        # Open files, so that the system uses no inode twice.
        self._held = []
        for folder, _, files in os.walk(root):
            for path in (folder, *(os.path.join(folder, file) for file in files)):
                descriptor = os.open(path, os.O_RDONLY)
                self._record(descriptor)
                os.close(descriptor)

    def _record(self, descriptor):
        """Record a file or folder that was synced."""
        self._held.append(os.dup(descriptor))
        status, path = os.fstat(descriptor), f"/proc/self/fd/{descriptor}"
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = _inodes(path)
        else:
            with open(path, "rb") as file:
                self._contents[status.st_ino] = file.read()

    def outcomes(self, work, moment=lambda: None, tries=3):
        """Do the work, and return what power cuts before each of its steps leave.

        Returns:
            The value of `moment()` at the step and the contents of each file by its relative path; without repetitions.
        """
        found = {}

        def looking(function):
            def look(*arguments, **options):
                for _ in range(tries):
                    now, left = moment(), self._left(self._root, "")
                    found[repr((now, sorted(left.items())))] = now, left
                result = function(*arguments, **options)
                if function is fsync:
                    self._record(*arguments)
                return result

            return look

        fsync = os.fsync
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (*STEPS, (os, "write")):
                patch.setattr(owner, name, looking(getattr(owner, name)))
            work()
        for descriptor in self._held:
            os.close(descriptor)
        return list(found.values())

    def _left(self, folder, prefix):
        synced, now, left = self._names.get(os.stat(folder).st_ino, {}), _inodes(folder), {}
        # Three kinds of power cuts: no changed name, every changed name or some of them were written.
        share = self._random.choice((0, 0.5, 1))
        for name in {**synced, **now}:
            inode = (now if self._random.random() < share else synced).get(name)
            if inode is None:
                continue
            if os.path.isdir(os.path.join(folder, name)):
                left |= self._left(os.path.join(folder, name), f"{prefix}{name}/")
            else:
                left[f"{prefix}{name}"] = self._contents.get(inode, b"")
        return left


def _inodes(folder):
    """Return the inode of each name in a folder."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries}


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
    # Other processes may write at the same time and use the space first.
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while (left := shutil.disk_usage(folder).free - room) > 0:
            file.write(bytes(left))


def contents(folder):
    """Return the bytes of every file by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    """Return the sorted names in a folder."""
    return sorted(path.name for path in folder.iterdir())
