"""Locks of folders: only one process writes at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faults import KILLED, in_a_fork, kill_this_process, together
from helpers import assert_one_line

from samekit.errors import OutputError
from samekit.files.locks import LOCK_FILE, file_lock, folder_lock


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "engines" / "my-model"


def test_folder_and_lock_file_are_there_while_it_is_held(folder):
    with folder_lock(folder):
        assert (folder / LOCK_FILE).read_text() == f"process {os.getpid()}"
    assert not folder.exists()
    with folder_lock(folder):
        (folder / "spec.json").touch()
    assert [path.name for path in folder.iterdir()] == ["spec.json"]


def test_one_at_a_time(folder):
    """Several processes create and delete the folder and the lock file again and again."""
    counter = folder.parent / "counter"
    counter.parent.mkdir()
    counter.write_text("0")

    def count():
        for _ in range(200):
            with folder_lock(folder):
                value = int(counter.read_text())
                counter.write_text(str(value + 1))

    assert together(count, count, count) == [0, 0, 0]
    assert counter.read_text() == "600"
    assert not folder.exists()


def test_waiting_is_logged_once_and_names_the_process(folder, caplog):
    entered = []

    def wait():
        with folder_lock(folder):
            entered.append(time.monotonic())

    with folder_lock(folder):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.5)
        assert entered == []
        left = time.monotonic()
    thread.join()
    assert entered[0] >= left
    (line,) = caplog.messages
    assert line == f"{folder}: process {os.getpid()} is writing there; waiting until it has ended"


def test_not_waiting(folder):
    message = f"^{folder}: process {os.getpid()} is writing there; wait for it, or pass another folder$"
    with folder_lock(folder), pytest.raises(OutputError, match=message), folder_lock(folder, wait=False):
        pass
    with folder_lock(folder, wait=False):
        pass


def test_lock_of_a_file_stays_empty(folder):
    path = folder / "state" / "lock"
    message = f"^{folder}: process {os.getpid()} is writing there; wait for it, or pass another folder$"
    with file_lock(path, folder), pytest.raises(OutputError, match=message), file_lock(path, folder):
        pass
    assert path.read_bytes() == b""
    with file_lock(path, folder):
        assert path.read_text() == f"process {os.getpid()}"


def test_killed_process_holds_no_lock(folder):
    def die():
        with folder_lock(folder):
            kill_this_process()

    assert in_a_fork(die) == KILLED
    assert (folder / LOCK_FILE).exists()
    with folder_lock(folder, wait=False):
        pass
    assert not folder.exists()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks(folder, monkeypatch, caplog, error):
    """Some network file systems have no locks, see flock(2)."""

    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with folder_lock(folder):
        assert folder.exists()
    assert not folder.exists()
    (line,) = caplog.messages
    assert line.startswith(f"{folder}: its file system has no locks ({os.strerror(error)}); start no other export")
    for lock in (folder_lock(folder, wait=False), file_lock(folder / "lock", folder)):
        with pytest.raises(OutputError, match=os.strerror(error)), lock:
            pass


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc is Linux")
@pytest.mark.parametrize("name", ["/proc", "/proc/nowhere"])
def test_file_system_that_takes_no_new_files(name):
    """It reports the same error as a folder that another process has deleted, at every attempt."""
    with pytest.raises(OutputError, match=r"cannot be written \(No such file or directory\)"), folder_lock(Path(name)):
        pass


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_something_else_in_place_of_the_lock_file(folder, tmp_path, what):
    folder.mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    place = folder / LOCK_FILE
    {"link": lambda: place.symlink_to(precious), "folder": place.mkdir, "pipe": lambda: os.mkfifo(place)}[what]()
    if what == "pipe":
        # A pipe can be locked, and opening it does not wait for a reader.
        with folder_lock(folder):
            pass
    else:
        with pytest.raises(OutputError, match="cannot be written") as caught, folder_lock(folder):
            pass
        assert_one_line(caught.value)
    assert precious.read_text() == "mine"


def test_lock_file_with_another_text(folder, caplog):
    """The folder may come from an untrusted source, so only text that samekit writes is shown."""
    folder.mkdir(parents=True)
    (folder / LOCK_FILE).write_text("process 1\x1b[2J")
    with (folder / LOCK_FILE).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.3, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        with folder_lock(folder):
            pass
        timer.join()
    assert caplog.messages == [f"{folder}: another process is writing there; waiting until it has ended"]


# `msvcrt.locking` locks bytes from the position of the file on, which may be behind its end. It raises PermissionError
# if another process has locked them: https://docs.python.org/3/library/msvcrt.html. Locks of POSIX do the same.
AS_ON_WINDOWS = """
import errno, fcntl, os, sys, types
from pathlib import Path

# Modules of Python choose by the platform too when they are imported, so these come first.
import samekit.files.atomic

def locking(descriptor, mode, count):
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, os.lseek(descriptor, 0, os.SEEK_CUR))
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None

sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
sys.platform = "win32"

from samekit.errors import OutputError
from samekit.files.atomic import atomic_path
from samekit.files.locks import folder_lock

folder = Path(sys.argv[1])
try:
    with folder_lock(folder, wait=False):
        with atomic_path(folder / "spec.json") as temporary:
            temporary.write_text("written")
        print(os.getpid(), flush=True)
        sys.stdin.read()
except OutputError as error:
    print(error)
"""


def test_lock_on_windows(folder):
    program = [sys.executable, "-c", AS_ON_WINDOWS, folder]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True) as first:
        holder = first.stdout.readline().strip()
        assert (folder / LOCK_FILE).read_text() == f"process {holder}"
        second = subprocess.run(
            program, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
        )
        assert second.stderr == ""
        assert second.stdout == f"{folder}: process {holder} is writing there; wait for it, or pass another folder\n"
    third = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    assert third.stdout.strip().isdecimal()
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("spec.json", "written")]
