"""Files and folders that appear whole or not at all. Knows nothing of what is in them.

Until it is complete, a result is a temporary file or folder beside its place, `.NAME.PID-RANDOM.tmp`. Its process holds
a lock on it, which the system releases when the process ends, however it ends; so what a killed process left can be
told from what is still being written, whatever machine or container wrote it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samekit.errors import OutputError, SamekitError
from samekit.files.paths import checked_path, remove

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# File names end at 255 bytes on common file systems; the process id and the rest take fewer than 55.
_NAME_BYTES: Final = 200


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, follow_links: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`, which takes its place when the `with` block ends well.

    The contents are on disk (fsync) before the file is renamed, and its permissions are those that the umask
    leaves. When the block raises, the temporary file is removed, `path` stays as it was, and the exception
    passes unchanged.

    Args:
        path: the file to create or replace; its folder must exist.
        follow_links: what happens if `path` is a symbolic link. If true, the file that the link leads to is created or
            replaced, and the link stays; this is for outputs that the user names. If false, the link is replaced by
            the file, because a folder that was downloaded may hold links to any file of the user.

    Yields:
        The path of the temporary file, `.NAME.PID-RANDOM.tmp` in the folder of the file.

    Raises:
        OutputError: `path` is something else than a file, or its folder is missing, not writable or full.
        InputError: no file can have this name.
    """
    path = checked_path(path)
    with output_errors(path):
        # Renaming over a device such as /dev/null would replace the device. This also asks the system whether the link
        # may be followed: Linux refuses to follow links that others have placed in a folder such as /tmp.
        if (follow_links or not path.is_symlink()) and path.exists() and not path.is_file():
            raise OutputError(f"{path}: is not a regular file; choose another name for the output")
        target = _link_target(path) if follow_links else path
        if follow_links and target.is_symlink():
            raise OutputError(f"{path}: is a link that leads in a circle; remove it, or choose another name")
    path = target
    with _temporary(
        path, lambda name: os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    ) as temporary:
        try:
            yield temporary
            with output_errors(path):
                _sync(temporary)
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which is gone when the block ends, unless it was renamed.

    Raises:
        OutputError: it cannot be made.
    """
    with _temporary(folder, lambda name: name.mkdir(parents=True)) as temporary:
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(new: Path, folder: Path) -> bool:
    """Give a temporary folder its name; False if a folder that is not empty has that, which stays.

    Raises:
        OSError: it cannot be renamed.
    """
    # Contents before names, as of files: after a power failure too, what is there is whole.
    for path in (*new.rglob("*"), new):
        if path.is_dir():
            _sync_folder(path)
        else:
            _sync(path)
    try:
        new.rename(folder)
    except OSError as error:
        # The codes with which systems refuse to rename over a folder that is not empty.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    _sync_folder(folder.parent)
    return True


def sync_files(paths: Iterable[Path]) -> None:
    """Wait until files are on disk: their contents first, then their names.

    Raises:
        OSError: a file cannot be read, or not written to the disk.
    """
    paths = list(paths)
    for path in paths:
        _sync(path)
    for folder in {path.parent for path in paths}:
        _sync_folder(folder)


def remove_abandoned(folder: Path, wanted: str | Callable[[str], bool] | None = None) -> list[tuple[Path, int]]:
    """Remove what killed processes left half-written in a folder; what others are writing stays.

    Args:
        folder: where to look; it need not be there.
        wanted: the file or folder that they were writing, or what tells of a name whether it counts; all unless given.

    Returns:
        What was removed, and how many bytes it held.
    """
    removed = []
    if isinstance(wanted, str):
        path = _link_target(folder / wanted)
        folder, wanted = path.parent, path.name
    with suppress(OSError), os.scandir(folder) as entries:
        for path in sorted(Path(entry.path) for entry in entries if temporary_target(entry.name)):
            name = temporary_target(path.name) or ""
            if not (wanted(name) if callable(wanted) else wanted is None or name == _shortened(wanted)):
                continue
            # Taken by a process that is alive, or gone by now.
            with suppress(OSError), _locked(path):
                removed.append((path, remove(path)))
    return removed


def temporary_target(name: str) -> str | None:
    """The file or folder (its name may be shortened) whose temporary one has this name; None if it is none."""
    match = re.fullmatch(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp", name, re.DOTALL)
    return match[1] if match else None


def _temporary_name(path: Path) -> Path:
    """A name that nothing has, in the folder of `path`."""
    return path.with_name(f".{_shortened(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextmanager
def _temporary(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Make a temporary file or folder for `path`, and hold its lock, where the system has such locks."""
    with ExitStack() as stack:
        while True:
            temporary = _temporary_name(path)
            with output_errors(path):
                make(temporary)
            try:
                stack.enter_context(_locked(temporary))
            except (FileNotFoundError, BlockingIOError):
                # Whoever clears away came between the two steps and took it for abandoned.
                continue
            except OSError:
                # Some systems lock nothing; so nobody can take the lock either, and nothing is cleared away.
                break
            if temporary.exists():
                break
            stack.close()
        yield temporary


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it is not there, or the system does not lock it.
    """
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, "no locks on folders")
    # Network file systems lock only what is open for writing, which folders never are.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def output_errors(
    path: str | os.PathLike[str],
    library_error: type[Exception] = OSError,
    cause: str = "cannot be written",
    cure: str = "choose a folder that exists, is writable and has room",
) -> Iterator[None]:
    """Raise what goes wrong with the disk inside the block as an error about `path`.

    Args:
        path: the output that the message names.
        library_error: what a library raises in place of an OSError.
        cause: what the message says of the output.
        cure: what it says to do.

    Raises:
        OutputError: the block raised an OSError or a `library_error`.
    """
    try:
        yield
    except SamekitError:
        raise
    except (OSError, library_error) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise OutputError(f"{path}: {cause} ({reason}); {cure}") from error


def _link_target(path: Path) -> Path:
    """Return the path of the file that a link leads to, whether it is there or not; other paths as they are.

    Where links lead in a circle, the path that is returned is a link too.
    """
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _shortened(name: str) -> str:
    """Cut a file name to `_NAME_BYTES` bytes without splitting a character."""
    return name.encode("utf-8", "ignore")[:_NAME_BYTES].decode("utf-8", "ignore")


def _sync(path: Path) -> None:
    """Wait until the contents of a file are on disk."""
    # For reading where that is enough: a graph that an older export shares may be read-only. Windows wants more.
    _flush(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)


def _flush(path: Path, flags: int) -> None:
    """Open and sync a file or a folder."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk, where the system can do that."""
    # Windows opens no folders and some network file systems sync none; the file itself is complete by now.
    with suppress(OSError):
        _flush(folder, os.O_RDONLY)
