"""Paths: checks of file names, and reading regular files only."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader


# More than any configuration, `spec.json` or metadata has.
_DOCUMENT_BYTES: Final = 2**26


def remove(path: Path) -> int:
    """Delete a file or a folder, and return how many bytes it held; raise OSError if that fails."""
    size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return size


def file_signature(path: Path | os.DirEntry[str]) -> tuple[int, int] | None:
    """Return the size in bytes and the modification time in ns of a regular file; None if there is none."""
    with suppress(OSError):
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            return status.st_size, status.st_mtime_ns
    return None


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; raise OSError for other kinds, as pipes block and devices may never end."""

    def nonblocking(name: str, flags: int) -> int:
        # Windows has no such flag, and no pipes that are files.
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=nonblocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        yield file


def read_regular(path: Path, most: int = _DOCUMENT_BYTES) -> bytes:
    """Return the contents of a regular file of at most `most` bytes; raise OSError for other kinds and larger files."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes")
        return file.read(size)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Create a hard link to a file, or a copy where the file system has no hard links; raise OSError if that fails."""
    try:
        # A link to a symbolic link, as the hub's cache has them, would point elsewhere.
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Return the path; raise InputError if it is no path, or holds a character that file names cannot have."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{path!r} is no path; pass a str or a pathlib.Path")
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise InputError(f"{os.fspath(path)!r}: no file can have this name; choose another")
    return Path(path)


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading `~` expanded, which shells leave as it is in `--option=~/name`.

    Raise InputError if no file can have this name.
    """
    text = expanded_text(path)
    path = Path(text)
    # Path drops the "./" of "./~", without which the name would be expanded by the next function that it is passed to.
    return path.absolute() if text.startswith(".") and str(path).startswith("~") else path


def expanded_text(path: str | os.PathLike[str]) -> str:
    """Return a path with a leading `~` expanded; other text, such as a model's name, stays as it is.

    Raise InputError if no file can have this name.
    """
    checked_path(path)
    # Not Path.expanduser, which raises for users without a home folder.
    return os.path.expanduser(os.fspath(path))


def utf8_path(path: Path) -> str:
    """Return a path as UTF-8 text, for libraries that need it in every locale; raise InputError if it is not UTF-8."""
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: its name is no UTF-8, which this library needs; rename it") from None
