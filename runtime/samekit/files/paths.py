"""Paths of files: checks of names, and opening and reading regular files only."""

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


# More than any document that is read at once has: configurations, facts, metadata.
_DOCUMENT_BYTES: Final = 2**26


def remove(path: Path) -> int:
    """Remove a file or a folder; returns how many bytes it held.

    Raises:
        OSError: it cannot be removed, or is not there.
    """
    size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return size


def file_signature(path: Path | os.DirEntry[str]) -> tuple[int, int] | None:
    """Size and time of a regular file, which change when it does; None if it is none, or gone."""
    with suppress(OSError):
        status = path.stat()
        # Whoever opens a pipe is blocked.
        if stat.S_ISREG(status.st_mode):
            return status.st_size, status.st_mtime_ns
    return None


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a file to be read; whoever opens a pipe is blocked, and whoever reads a device never ends.

    Raises:
        OSError: it cannot be opened, or is none.
    """

    def at_once(name: str, flags: int) -> int:
        # Windows knows no such flag, and no such pipes.
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        yield file


def read_regular(path: Path, most: int = _DOCUMENT_BYTES) -> bytes:
    """What a regular file holds.

    Args:
        path: the file.
        most: bytes that it may have; a file may claim any size and hold nothing.

    Raises:
        OSError: it cannot be opened, is none, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes")
        return file.read(size)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for a file, or a copy where the file system has no second names or is another one.

    Raises:
        OSError: the file cannot be read, or the target not written.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path, if a file may have this name.

    Raises:
        InputError: it holds a zero byte, or a character that is none.
    """
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

    Raises:
        InputError: no file can have this name.
    """
    text = expanded_text(path)
    path = Path(text)
    # Path drops the "./" of "./~", without which the name would be expanded by the next function that it is passed to.
    return path.absolute() if text.startswith(".") and str(path).startswith("~") else path


def expanded_text(path: str | os.PathLike[str]) -> str:
    """Return a path with a leading `~` expanded, and else the text as it was given, which may be a model's name.

    Raises:
        InputError: no file can have this name.
    """
    checked_path(path)
    # Not Path.expanduser, which raises for users without a home folder.
    return os.path.expanduser(os.fspath(path))  # noqa: PTH111


def utf8_path(path: Path) -> str:
    """A path for libraries that take UTF-8 only, whatever the locale is.

    Raises:
        InputError: its name is no text.
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: its name is no UTF-8, which this library needs; rename it") from None
