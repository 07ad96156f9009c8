"""Where the latents of a dataset go: a folder, or a URL that fsspec opens (`s3://`, `gs://`, ...).

Both implement `Output`. A folder and an object store replace a file atomically. Other places behind a URL (sftp, smb)
may keep half of an interrupted upload. `samekit.dataset.manifest` detects that for its own files.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from samekit.dataset.file_names import STATE_FOLDER
from samekit.errors import InputError, OutputError
from samekit.files.atomic import atomic_path, output_errors, remove_abandoned, remove_files, sync_folders
from samekit.files.locks import file_lock
from samekit.files.pairs import write_pairs
from samekit.files.paths import checked_path, expanded, open_regular, read_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from samekit.dataset.file_names import Layout
    from samekit.dataset.options import Shard
    from samekit.files.pairs import Pair

# Larger files are refused. This is enough for the manifest of ten million clips.
_MOST_BYTES: Final = 2**32
# Uploads at a time, with and without an event loop. Without one, each upload opens a connection, which servers limit.
_UPLOADS, _CONNECTIONS = 32, 4


@dataclass(frozen=True)
class GroupLimits:
    """Clips are written in groups. A group ends at the first of these limits, or with the run."""

    clips: int = 64
    size: int = 2**26
    """Bytes of latents."""
    seconds: float = 1.0
    """Time after the first clip of the group was encoded."""


class Output(ABC):
    """A place for the files of a dataset. File names are relative to it and use `/`.

    Every method raises OutputError if the place cannot be written or reached. A file that was written, appended to or
    removed stays so after a power failure.
    """

    group_limits: GroupLimits = GroupLimits()
    """How many clips a writer should collect before it writes them."""
    seconds_between_appends: float = 0.0
    """How long the caller should collect lines before it appends them to a file."""

    def is_at(self, folder: str | os.PathLike[str]) -> bool:
        """Return whether this place is a folder of this machine."""
        return False

    @abstractmethod
    def locked(self, shard: Shard, layout: Layout = "numbered") -> AbstractContextManager[None]:
        """Create the place, and lock it for a shard if it has locks."""

    @abstractmethod
    def names(self, folder: str = "") -> set[str]:
        """List the files directly below a folder of the output."""

    @abstractmethod
    def tree(self) -> set[str]:
        """List the files of clips in all folders of the output, as paths relative to it."""

    @abstractmethod
    def get(self, name: str, most: int | None = None) -> bytes:
        """Read a file, or its first `most` bytes; raises InputError if it cannot be read."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the size of a file in bytes; raises InputError if there is none."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Create or replace a file."""

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove those of the files that exist, in this order."""

    @abstractmethod
    def append(self, name: str, data: bytes) -> bool:
        """Create a file or append to it; return False if the next data need a new file."""

    @abstractmethod
    def pair_writer(self) -> AbstractContextManager[Callable[[Sequence[Pair]], None]]:
        """Yield a function that writes the files of clips; raises InputError if this machine cannot find the output.

        Each `.json` file is written after its `.npy` file, and an older one is removed before. So one that can be seen
        belongs to the `.npy` file beside it.
        """


def find_output(path: str | os.PathLike[str]) -> Output:
    """Return the output for a path or URL; `file://` is a folder. An unknown scheme raises InputError."""
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if scheme == "file":
        return FolderOutput(checked_path(rest))
    return UrlOutput(text) if separator else FolderOutput(expanded(path))


class FolderOutput(Output):
    """A folder of this machine, or one that several machines share under the same path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def is_at(self, folder: str | os.PathLike[str]) -> bool:
        # A folder that does not exist yet raises OSError.
        with suppress(OSError):
            return self._folder.samefile(folder)
        return False

    @contextmanager
    def locked(self, shard: Shard, layout: Layout = "numbered") -> Iterator[None]:
        """Create the folder and hold its lock. Delete unfinished files of this shard before and after the block."""
        state = self._folder / STATE_FOLDER
        with output_errors(self._folder):
            state.mkdir(parents=True, exist_ok=True)
            sync_folders([str(self._folder.absolute()), str(state)])
        with file_lock(state / shard.lock, self._folder):
            self._remove_unfinished(shard, layout)
            try:
                yield
            finally:
                # Worker processes that were killed during this run may have left some.
                self._remove_unfinished(shard, layout)

    def _remove_unfinished(self, shard: Shard, layout: Layout) -> None:
        remove_abandoned(self._folder / STATE_FOLDER, shard.is_written_here)
        for below in [""] if layout == "numbered" else [below for below, _ in self._folders()]:

            def is_mine(name: str, below: str = below) -> bool:
                return shard.is_written_here(below + name, layout)

            remove_abandoned(self._folder / below, is_mine)

    def _folders(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder of clips, as a prefix of paths below the output, and its files. Follow no links."""

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        with output_errors(self._folder, cause="cannot be listed", cure="check its permissions"):
            for folder, folders, files in os.walk(self._folder, onerror=fail):
                below = Path(folder).relative_to(self._folder).as_posix()
                if below == ".":
                    folders[:] = [name for name in folders if name != STATE_FOLDER]
                yield "" if below == "." else f"{below}/", files

    def names(self, folder: str = "") -> set[str]:
        """List a folder; a folder that does not exist is empty."""
        with output_errors(self._folder, cause="cannot be listed", cure="check its permissions"):
            try:
                return set(os.listdir(self._folder / folder))
            except FileNotFoundError:
                return set()

    def tree(self) -> set[str]:
        return {below + name for below, files in self._folders() for name in files}

    def get(self, name: str, most: int | None = None) -> bytes:
        with self._read_errors(name) as path:
            if most is None:
                return read_regular(path, _MOST_BYTES)
            with open_regular(path) as file:
                return file.read(most)

    def size(self, name: str) -> int:
        with self._read_errors(name) as path:
            return path.stat().st_size

    @contextmanager
    def _read_errors(self, name: str) -> Iterator[Path]:
        """Yield the path of a file, and raise errors of the operating system as InputError."""
        path = self._folder / name
        try:
            yield path
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None

    def put(self, name: str, data: bytes) -> None:
        """Write a file atomically. A link is replaced, not followed."""
        path = self._folder / name
        with atomic_path(path) as temporary, output_errors(path):
            temporary.write_bytes(data)

    def remove(self, names: Iterable[str]) -> None:
        remove_files(os.path.join(self._folder, name) for name in names)

    def append(self, name: str, data: bytes) -> bool:
        path = self._folder / name
        with output_errors(path), path.open("ab") as file:
            is_new = file.tell() == 0
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folders([str(path)])
        return True

    @contextmanager
    def pair_writer(self) -> Iterator[Callable[[Sequence[Pair]], None]]:
        if not (self._folder / STATE_FOLDER).is_dir():
            raise InputError(f"{self._folder.absolute()}: does not exist here; give every node access under this path")
        yield partial(write_pairs, self._folder)


class UrlOutput(Output):
    """A place that fsspec opens, such as `s3://bucket/latents`. It has no locks, so only one run may write to it."""

    # If a process is killed, the lines of the last seconds are lost, and the next run encodes their clips again.
    seconds_between_appends = 10.0

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        with self._read_errors():
            try:
                from fsspec.core import url_to_fs

                _, self._root = url_to_fs(self._url)
            except (ImportError, ValueError) as error:
                raise InputError(
                    f"{url}: cannot be used ({error}); install fsspec and the package of this scheme, or pass a folder"
                ) from None

    @property
    def _fs(self) -> Any:
        """The file system. fsspec keeps one for all threads if it has an event loop, otherwise one for each thread."""
        from fsspec.core import url_to_fs

        return url_to_fs(self._url)[0]

    def __str__(self) -> str:
        return self._url

    @contextmanager
    def locked(self, shard: Shard, layout: Layout = "numbered") -> Iterator[None]:
        """Create the folder of the manifest."""
        with self._write_errors():
            self._fs.makedirs(f"{self._root}/{STATE_FOLDER}", exist_ok=True)
        yield

    def names(self, folder: str = "") -> set[str]:
        """List a folder; a folder that does not exist is empty."""
        with self._read_errors():
            self._fs.invalidate_cache()
            try:
                entries: list[dict[str, Any]] = self._fs.ls(f"{self._root}/{folder}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return set()
            return {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries}

    def tree(self) -> set[str]:
        with self._read_errors():
            self._fs.invalidate_cache()
            paths = [name.removeprefix(self._root).lstrip("/") for name in self._fs.find(self._root)]
            return {path for path in paths if not path.startswith(f"{STATE_FOLDER}/")}

    def get(self, name: str, most: int | None = None) -> bytes:
        with self._read_errors(name):
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", end=most)
            return data

    def size(self, name: str) -> int:
        with self._read_errors(name):
            return int(self._fs.size(f"{self._root}/{name}"))

    def put(self, name: str, data: bytes) -> None:
        """Upload a file in one call. After an error, remove what it left of a clip's file."""
        try:
            with self._write_errors(name):
                self._fs.pipe_file(f"{self._root}/{name}", data)
        except OutputError:
            if not name.startswith(STATE_FOLDER):
                with suppress(OutputError):
                    self.remove([name])
            raise

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with self._write_errors(name), suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{name}")

    def append(self, name: str, data: bytes) -> bool:
        """Upload a new file, because object stores cannot append."""
        self.put(name, data)
        return False

    @contextmanager
    def pair_writer(self) -> Iterator[Callable[[Sequence[Pair]], None]]:
        with self._write_errors():
            uploads = _UPLOADS if self._fs.async_impl else _CONNECTIONS
        with ThreadPoolExecutor(uploads) as pool:
            yield partial(self._put_pairs, pool)

    def _put_pairs(self, pool: ThreadPoolExecutor, pairs: Sequence[Pair]) -> None:
        """Upload several files at a time: first all `.npy` files, then all `.json` files."""
        with self._write_errors():
            _call_all(pool, [partial(self.remove, [pair.json_name]) for pair in pairs if pair.replaces])
            _call_all(pool, [partial(self.put, pair.name, pair.npy) for pair in pairs])
            _call_all(pool, [partial(self.put, pair.json_name, pair.json) for pair in pairs])

    def _read_errors(self, name: str = "") -> AbstractContextManager[None]:
        return output_errors(self._named(name), Exception, "cannot be read", "check URL, network and permissions")

    def _write_errors(self, name: str = "") -> AbstractContextManager[None]:
        return output_errors(self._named(name), Exception)

    def _named(self, name: str) -> str:
        return f"{self._url}/{name}" if name else self._url


def _call_all(pool: ThreadPoolExecutor, calls: Sequence[Callable[[], object]]) -> None:
    """Call functions in the threads of a pool. After an error, start no more, wait for the others, and raise it."""
    futures = [pool.submit(call) for call in calls]
    done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
    for future in waiting:
        future.cancel()
    wait(waiting)
    for future in done:
        future.result()
