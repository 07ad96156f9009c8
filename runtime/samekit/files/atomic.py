"""Atomic writes: a temporary file or folder beside the target takes its name once its contents are on disk.

Its name is `.NAME.PID-SPACERANDOM.tmp`. SPACE identifies the machine, the boot and the container in which the process
id PID is valid, so that the leftovers of killed processes can be told from the files of running ones.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samekit.errors import InputError, OutputError, SamekitError
from samekit.files.paths import checked_path, remove

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

# File names end at 255 bytes on common file systems. All but NAME takes at most 33 bytes.
_NAME_BYTES: Final = 200
_TEMPORARY: Final = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,9})-(?P<space>[0-9a-f]{8})[0-9a-f]*\.tmp", re.DOTALL)
# Temporary files whose process id cannot be checked here count as abandoned after a day without a change.
_ABANDONED_SECONDS: Final = 24 * 60 * 60
# On a busy disk, waiting for many files in eight threads takes a fifth of the time of waiting for one after another.
_SYNC_THREADS: Final = 8


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, follow_links: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`, which replaces `path` when the `with` block ends without an error.

    The contents are on disk (fsync) before the file is renamed. Its permissions follow the umask. If the block raises,
    the temporary file is deleted, `path` stays as it was, and the exception passes unchanged.

    With `follow_links`, for outputs that the user names, the target of a symbolic link is replaced. Otherwise the link
    itself is replaced, because a folder that was downloaded may hold links to any file of the user.

    Raises:
        OutputError: `path` is not a regular file, or its folder is missing, not writable or full.
        InputError: no file can have this name.
    """
    path = checked_path(path)
    with output_errors(path):
        # Renaming over a device such as /dev/null would replace the device. This also asks the system whether the link
        # may be followed: Linux refuses to follow links that others have placed in a folder such as /tmp.
        if (follow_links or not path.is_symlink()) and path.exists() and not path.is_file():
            raise _not_regular(path)
        target = _link_target(path) if follow_links else path
        if follow_links and target.is_symlink():
            raise OutputError(f"{path}: is a link that leads in a circle; remove it, or choose another name")
    temporary = _temporary_path(target)
    with output_errors(target):
        temporary.touch(exist_ok=False)
    try:
        yield temporary
        with output_errors(target):
            _sync(temporary)
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


class AtomicFiles:
    """Write many files atomically, with few waits for the disk: write all, sync all, then rename.

    Use it in a `with` statement, which deletes the temporary files that were not renamed. A link is replaced, not
    followed. The methods raise OutputError, with the name of the file.
    """

    def __init__(self) -> None:
        self._temporaries: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for temporary in self._temporaries.values():
            with suppress(OSError):
                os.unlink(temporary)

    def write(self, path: str, data: bytes) -> None:
        """Write the temporary file of `path`."""
        with output_errors(path):
            with suppress(FileNotFoundError):
                mode = os.lstat(path).st_mode
                if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
                    raise _not_regular(path)
            temporary = os.path.join(os.path.dirname(path), _temporary_name(os.path.basename(path)))
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            descriptor = os.open(temporary, flags, 0o666)
            self._temporaries[path] = temporary
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(descriptor, left) :]
            finally:
                os.close(descriptor)

    def sync(self) -> None:
        """Wait until the contents of all temporary files are on disk."""
        paths = list(self._temporaries)
        shares = [paths[first::_SYNC_THREADS] for first in range(min(_SYNC_THREADS, len(paths)))]
        # A system without threads left raises RuntimeError. Reading the results raises the errors of the threads.
        with output_errors(paths[0] if paths else "", RuntimeError), ThreadPoolExecutor(_SYNC_THREADS) as pool:
            list(pool.map(self._sync_share, shares))

    def _sync_share(self, paths: list[str]) -> None:
        for path in paths:
            with output_errors(path):
                _sync(self._temporaries[path])

    def rename(self, paths: Iterable[str]) -> None:
        """Give the temporary files of these paths their names, and wait until the names are on disk."""
        paths = list(paths)
        for path in paths:
            with output_errors(path):
                os.replace(self._temporaries[path], path)
            del self._temporaries[path]
        sync_folders(paths)


def remove_files(paths: Iterable[str]) -> None:
    """Delete files, and wait until the changes are on disk; files that do not exist are left out.

    Raise OutputError if a file cannot be deleted.
    """
    removed = []
    for path in paths:
        with output_errors(path), suppress(FileNotFoundError):
            os.unlink(path)
            removed.append(path)
    sync_folders(removed)


def sync_folders(paths: Iterable[str]) -> None:
    """Wait until the names of these files are on disk, but not those of the folders above them."""
    for folder in sorted({os.path.dirname(path) or os.curdir for path in paths}):
        with output_errors(folder):
            _sync(folder)


def require_absent(folder: Path) -> None:
    """Raise InputError if a folder, a file or a link has this name."""
    if os.path.lexists(folder):
        raise _exists(folder)


def _exists(folder: Path) -> InputError:
    return InputError(f"{folder}: exists; remove it, or choose another name")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, which becomes `folder` when the `with` block ends without an error.

    The contents are on disk before the folder is renamed. If the block raises, the temporary folder is deleted.

    Raises:
        InputError: `folder` exists.
        OutputError: the folder cannot be written; errors of the operating system in the block count too.
    """
    require_absent(folder)
    with output_errors(folder):
        temporary = _temporary_path(folder)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
            try:
                temporary.rename(folder)
            except OSError as error:
                # Another process has created `folder` meanwhile.
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise _exists(folder) from None
                raise
            _sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def atomic_commit(path: Path, text: str, files: Iterable[Path]) -> None:
    """Write a file that makes other files of its folder valid, once their contents and names are on disk.

    Raise OutputError if a file cannot be written; then `path` stays as it was.
    """
    with output_errors(path.parent):
        for file in files:
            _sync(file)
        _sync(path.parent)
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def make_parents(folder: Path, name: str) -> None:
    """Create the folders of a file below `folder`, so that they survive a power failure; `name` uses `/`.

    Raise OutputError if one cannot be created or is a link, because a folder that was downloaded may hold links to any
    folder of the user.
    """
    for part in name.split("/")[:-1]:
        parent, folder = folder, folder / part
        with output_errors(folder):
            if folder.is_symlink():
                raise OutputError(f"{folder}: is a link; remove it, or choose another output")
            with suppress(FileExistsError):
                folder.mkdir()
                _sync(parent)


def remove_abandoned(folder: Path, wanted: str | Callable[[str], bool]) -> None:
    """Delete the temporary files and folders that killed processes left in a folder.

    `wanted` is the name of an output, whose temporaries are deleted if their process has ended. Or it is a predicate of
    such names: the caller holds the folder's lock, so every matching temporary is deleted.
    """
    name = None
    if isinstance(wanted, str):
        output = _link_target(folder / wanted)
        folder, name = output.parent, _shortened(output.name)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None:
                continue
            # Another process may delete or complete the file at any time.
            with suppress(OSError):
                if callable(wanted):
                    abandoned = wanted(match["name"])
                else:
                    abandoned = match["name"] == name and _has_ended(entry, match)
                if abandoned:
                    remove(Path(entry.path))


def temporary_target(name: str) -> str | None:
    """Return the name of the output, cut to 200 bytes, for which a temporary file has this name; None for others."""
    match = _TEMPORARY.fullmatch(name)
    return match["name"] if match else None


def _has_ended(entry: os.DirEntry[str], match: re.Match[str]) -> bool:
    """Return whether the process that created a temporary file has ended."""
    if match["space"] != _process_space():
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_SECONDS
    pid = int(match["pid"])
    # On Windows, only this process can have these digits, and `os.kill(pid, 0)` would send it Ctrl-C.
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        # It runs as another user.
        pass
    return False


@cache
def _process_space() -> str:
    """Return eight hex digits that are equal for processes of one boot, host name and PID namespace.

    On other systems than Linux the digits are random.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return secrets.token_hex(4)
    # A sandbox may report the same boot and namespace to every container, but hardly the same host name.
    return hashlib.sha256(os.fsencode(f"{boot} {namespace} {platform.node()}")).hexdigest()[:8]


def _temporary_path(path: Path) -> Path:
    return path.with_name(_temporary_name(path.name))


def _temporary_name(name: str) -> str:
    """Return a new name of a temporary file for an output of this name."""
    return f".{_shortened(name)}.{os.getpid()}-{_process_space()}{secrets.token_hex(4)}.tmp"


def _not_regular(path: str | Path) -> OutputError:
    return OutputError(f"{path}: is not a regular file; choose another name for the output")


@contextmanager
def output_errors(
    path: str | os.PathLike[str],
    library_error: type[Exception] = OSError,
    cause: str = "cannot be written",
    cure: str = "choose a folder that exists, is writable and has room",
) -> Iterator[None]:
    """Raise an OSError or a `library_error` of the `with` block as an OutputError about the output `path`.

    The message is `PATH: CAUSE (REASON); CURE`, with the reason of the system or the library.
    """
    try:
        yield
    except SamekitError:
        raise
    except (OSError, library_error) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise OutputError(f"{path}: {cause} ({reason}); {cure}") from error


def _link_target(path: Path) -> Path:
    """Return the path that a link leads to, which need not exist; it is a link only where links lead in a circle."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _shortened(name: str) -> str:
    """Cut a file name to `_NAME_BYTES` bytes without splitting a character."""
    return name.encode("utf-8", "ignore")[:_NAME_BYTES].decode("utf-8", "ignore")


def _sync(path: str | Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on disk."""
    # Read access is enough except on Windows: a graph that an older export shares may be read-only.
    try:
        descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        # Windows cannot open folders, and some network file systems cannot sync them.
        if not os.path.isdir(path):
            raise
