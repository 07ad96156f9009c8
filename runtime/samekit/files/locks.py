"""Locks of engine folders and dataset folders: a process that writes holds one; readers take none.

The system releases a lock when its process ends, for whatever reason.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

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

LOCK_FILE: Final = ".lock"
"""Name of the lock file in an engine folder; it exists while a process holds the lock, or after it was killed."""

_POLL_SECONDS: Final = 0.1
# Attempts to open a lock file, whose folder other processes may delete meanwhile. Some file systems, such as /proc,
# report the same error for every new file.
_OPENING_ATTEMPTS: Final = 1000
# More than this module writes; a file of another program may have any size.
_HOLDER_BYTES: Final = 64


@contextmanager
def folder_lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Create a folder if it is missing, and hold its lock. Then delete the lock file, and the folder if it is empty.

    With `wait`, log one warning and wait while another process holds the lock. If the file system has no locks, log a
    warning and run the block without one. Without `wait`, both are an OutputError, as is a folder that is not writable.
    """
    path = folder / LOCK_FILE
    descriptor = _acquire(path, folder, wait=wait)
    try:
        yield
    finally:
        # The file is deleted while the lock is held. A process that has opened it meanwhile finds that it is no longer
        # in the folder, and opens the next one.
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):
            folder.rmdir()
        os.close(descriptor)


@contextmanager
def file_lock(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock of a file, which stays and is empty afterwards; messages name the folder that it protects.

    Raise OutputError if another process holds the lock, the file cannot be written, or the file system has no locks.
    """
    descriptor = _acquire(path, folder, wait=False)
    try:
        yield
    finally:
        with suppress(OSError):
            os.truncate(descriptor, 0)
        os.close(descriptor)


def _acquire(path: Path, folder: Path, *, wait: bool) -> int:
    """Return the descriptor of the lock file, locked if the file system can do that."""
    warned = False
    while True:
        descriptor = _open(path, folder)
        try:
            locked = _try_lock(descriptor)
        except OSError as error:
            if wait:
                logger.warning(
                    "%s: its file system has no locks (%s); start no other export there before this one has ended",
                    folder,
                    error.strerror,
                )
                return descriptor
            os.close(descriptor)
            with output_errors(folder):
                raise
        if locked and _is_at(descriptor, path):
            with suppress(OSError):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()}".encode("ascii"))
            return descriptor
        holder = _holder(descriptor)
        os.close(descriptor)
        if locked:
            continue
        if not wait:
            raise OutputError(f"{folder}: {holder} is writing there; wait for it, or pass another folder")
        if not warned:
            logger.warning("%s: %s is writing there; waiting until it has ended", folder, holder)
            warned = True
        time.sleep(_POLL_SECONDS)


def _open(path: Path, folder: Path) -> int:
    """Open a lock file, after creating it and its folder if they are missing."""
    # Not through a link, which would make this write to a file elsewhere. A pipe must not block.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    attempts = 0
    while True:
        # Both steps are repeated if the process that held the lock has deleted the folder meanwhile.
        attempts += 1
        with output_errors(folder):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return os.open(path, flags, 0o666)
            except (FileNotFoundError, FileExistsError):
                is_no_folder = os.path.lexists(path.parent) and not os.path.isdir(path.parent)
                if is_no_folder or attempts == _OPENING_ATTEMPTS:
                    raise


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one that has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Return the process that holds the lock, as far as the lock file tells."""
    with suppress(OSError):
        text = os.read(descriptor, _HOLDER_BYTES).decode("ascii", "replace")
        if re.fullmatch(r"process \d+", text):
            return text
    return "another process"


def _try_lock(descriptor: int) -> bool:
    """Lock a file and return true, or return false if another process has locked it; raise OSError without locks."""
    try:
        if sys.platform == "win32":
            # A byte far behind the end, so that others can still read what the file holds.
            os.lseek(descriptor, 2**30, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        # Windows reports a lock of another process as a denied permission.
        return False
    return True
