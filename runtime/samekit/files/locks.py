"""Locks of engine folders and dataset folders: a process that writes holds one, and readers need none."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from samekit.errors import OutputError
from samekit.files.atomic import output_errors

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
"""Name of the lock file, in the folder. It is there while a process holds the lock, or was killed while it did."""

_POLL_SECONDS = 0.1
# More than this module writes; a file of another program may be of any size.
_HOLDER_BYTES = 64


@contextmanager
def folder_lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Create a folder if it is missing, and hold its lock.

    The system releases the lock when the process ends, however it ends. Afterwards the lock file is deleted, and the
    folder too if nothing else is in it. A file system without locks is named in a warning, and the block runs.

    Args:
        folder: the folder.
        wait: whether to wait, with one line in the log, while another process holds the lock.

    Raises:
        OutputError: the folder cannot be created or written.
        OSError: `wait` is false, and another process holds the lock, or the file system has no locks.
    """
    path = folder / LOCK_FILE
    descriptor = _acquire(path, wait=wait)
    try:
        yield
    finally:
        # Deleted while the lock is held. A process that has opened this file meanwhile finds that it is no longer the
        # one in the folder, and opens the next one.
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):
            folder.rmdir()
        os.close(descriptor)


@contextmanager
def file_lock(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock of a file that stays after it, empty.

    The system releases the lock when the process ends, however it ends.

    Args:
        path: the lock file; its folder must exist.
        folder: the folder that the lock is about, for messages.

    Raises:
        OutputError: another process holds the lock, the file cannot be written, or the file system has no locks.
    """
    with output_errors(folder):
        descriptor = _open(path)
    try:
        with output_errors(folder):
            if not _try_lock(descriptor):
                raise OutputError(
                    f"{folder}: {_holder(descriptor)} is writing there; wait for it, or pass another folder"
                )
            _write_holder(descriptor)
        try:
            yield
        finally:
            with output_errors(folder):
                os.truncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(path: Path, *, wait: bool) -> int:
    """Return the descriptor of the lock file, locked if the file system can do that."""
    folder, waiting = path.parent, False
    while True:
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = _open(path)
            except FileNotFoundError:
                # The process that held the lock has just deleted the folder.
                continue
        try:
            locked = _try_lock(descriptor)
        except OSError as error:
            if not wait:
                os.close(descriptor)
                raise
            logger.warning(
                "%s: its file system has no locks (%s); start no other export there before this one has ended",
                folder,
                error.strerror,
            )
            return descriptor
        if locked and _is_at(descriptor, path):
            with suppress(OSError):
                _write_holder(descriptor)
            return descriptor
        holder = "" if locked else _holder(descriptor)
        os.close(descriptor)
        if locked:
            continue
        if not wait:
            raise BlockingIOError(f"{folder}: {holder} is writing there")
        if not waiting:
            logger.warning("%s: %s is writing there; waiting until it has ended", folder, holder)
            waiting = True
        time.sleep(_POLL_SECONDS)


def _open(path: Path) -> int:
    """Open or create a lock file, but not through a link, which would make this write to a file elsewhere."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags, 0o666)


def _write_holder(descriptor: int) -> None:
    """Write into a lock file which process holds its lock."""
    os.truncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, f"process {os.getpid()}".encode("ascii"))


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one that has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Return which process holds the lock, as far as the file tells."""
    with suppress(OSError):
        os.lseek(descriptor, 0, os.SEEK_SET)
        text = os.read(descriptor, _HOLDER_BYTES).decode("ascii", "replace")
        if re.fullmatch(r"process \d+", text):
            return text
    return "another process"


def _try_lock(descriptor: int) -> bool:
    """Lock a file and return true, or return false if another process has locked it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        if sys.platform == "win32":
            # A byte far behind the end, so that others can still read what the file holds.
            os.lseek(descriptor, 2**30, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        # Windows reports a lock of another process as a denied permission.
        return False
    return True
