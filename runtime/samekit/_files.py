"""Files that appear whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samekit.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

# File names end at 255 bytes on common file systems; the process id and the rest take fewer than 55.
_NAME_BYTES: Final = 200


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`, which takes its place when the `with` block ends well.

    The contents are on disk (fsync) before the file is renamed, and its permissions are those that the umask
    leaves. When the block raises, the temporary file is removed, `path` stays as it was, and the exception
    passes unchanged.

    Args:
        path: the file to create or replace; its folder must exist.

    Yields:
        The path of the temporary file, `.NAME.PID-RANDOM.tmp` in the folder of `path`.

    Raises:
        OutputError: `path` is something else than a file, or its folder is missing, not writable or full.
    """
    path = Path(path)
    with output_errors(path):
        # Renaming over a device such as /dev/null would replace the device.
        if path.exists() and not path.is_file():
            raise OutputError(f"{path}: is not a regular file; choose another name for the output")
        temporary = path.with_name(f".{_shortened(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
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
def output_errors(path: str | os.PathLike[str], library_error: type[Exception] = OSError) -> Iterator[None]:
    """Raise what goes wrong with the disk inside the block as an error about `path`.

    Args:
        path: the output that the message names.
        library_error: what a library raises in place of an OSError.

    Raises:
        OutputError: the block raised an OSError or a `library_error`.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, library_error) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise OutputError(
            f"{path}: cannot be written ({reason}); choose a folder that exists, is writable and has room"
        ) from error


def _shortened(name: str) -> str:
    """Cut a file name to `_NAME_BYTES` bytes without splitting a character."""
    return name.encode("utf-8", "ignore")[:_NAME_BYTES].decode("utf-8", "ignore")


def _sync(path: Path) -> None:
    """Wait until the contents of a file are on disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk, where the system can do that."""
    # Windows opens no folders and some network file systems sync none; the file itself is complete by now.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
