"""Where the latents of a dataset go: a folder, or a place that fsspec knows by its URL (`s3://`, `gs://`, ...).

Files appear there whole or not at all, wherever they are written: into a folder by renaming, elsewhere by an upload of
a finished file. A manifest cannot be appended to on an object store, so it grows there by parts:

    .samekit/manifest.jsonl                      as it was when the run began, or when it ended
    .samekit/manifest.jsonl.DIGEST-NNNNNN        what came since; DIGEST is that of the manifest it follows
    .samekit/manifest.jsonl.whole-DIGEST         its next version, while that is written; DIGEST is its own

Object stores show an upload whole or not at all. Other places may keep half of one that was cut short: half of a clip's
file is encoded again, as its line in the manifest is missing, and half a manifest has a copy beside it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from samekit.dataset.file_names import SILENCE_FILE, STATE_FOLDER, is_clips
from samekit.errors import InputError, OutputError, SamekitError
from samekit.files.atomic import output_errors
from samekit.files.paths import checked_path, expanded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

    from samekit.dataset.options import Shard
MOST_HEADER_BYTES: Final = 2**16
"""Most bytes of the first line of a manifest, which holds the settings."""
# What a driver that is killed forgets, at most; the clips of that time are encoded again.
_SECONDS_BETWEEN_PARTS: Final = 10.0
_WHOLE: Final = ".whole-"


def find_output(path: str | os.PathLike[str]) -> Output:
    """The output of a path or URL; `file://` is a folder.

    Raises:
        InputError: no such scheme, or its package is not installed.
    """
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if scheme == "file":
        return Output(checked_path(rest))
    return RemoteOutput(text) if separator else Output(expanded(path))


class Output:
    """A folder that whoever writes reaches under the same path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def require_reachable(self) -> None:
        """Raise unless this machine sees the folder of a run that has begun.

        Raises:
            InputError: it is not there.
        """
        if not (self._folder / STATE_FOLDER).is_dir():
            raise InputError(f"{self._folder.absolute()}: is not there; share it under the same path with every node")

    def require_apart(self, folders: Iterable[str | os.PathLike[str]]) -> None:
        """Raise if the output is one of these folders, whose files would be among its own.

        Raises:
            InputError: it is.
        """
        for folder in folders:
            # What is not there yet is none of them.
            with suppress(OSError):
                if self._folder.samefile(folder):
                    raise InputError(f"{self}: is a --data_dir too; pass another --output_path")

    @contextmanager
    def opened(self, shard: Shard) -> Iterator[Path]:  # noqa: ARG002 there its manifest lies
        """Yield the folder with the manifest of a shard, and with the silence latents, for the whole run."""
        yield self._folder

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """Yield a folder into which clips are encoded."""
        yield self._folder

    def upload(self, folder: Path, name: str) -> None:
        """Bring a finished `.npy`, and after it the `.json` if there is one, from a folder that was yielded here."""

    def names(self) -> set[str]:
        """Every file of the output."""
        with output_errors(self._folder):
            return {entry.name for entry in os.scandir(self._folder)}

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with output_errors(self._folder):
            (self._folder / name).unlink(missing_ok=True)

    def sync_manifest(self, *, whole: bool = False) -> None:
        """Make sure that the manifest is in the output: as one file, or what came since."""


class RemoteOutput(Output):
    """A place behind fsspec; only one run at a time may write there, which nobody checks.

    Args:
        url: scheme, bucket and folder, such as `s3://bucket/latents`.

    Raises:
        InputError: no such scheme, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        super().__init__(Path())
        self._url = url.rstrip("/")
        # Some clients connect at once.
        with self._read_errors():
            try:
                from fsspec.core import url_to_fs  # noqa: PLC0415

                self._fs, self._root = url_to_fs(self._url)
            except (ImportError, ValueError) as error:
                raise InputError(
                    f"{url}: cannot be used ({error}); install fsspec and the package of this scheme, or pass a folder"
                ) from None
        self._manifest = Path()
        self._report = Path()
        self._local = Path()
        self._digest = ""
        self._size = 0
        self._parts = 0
        self._next_part = 0.0

    def __str__(self) -> str:
        return self._url

    def require_reachable(self) -> None:
        """Nothing: the first upload will tell."""

    def require_apart(self, folders: Iterable[str | os.PathLike[str]]) -> None:
        """Nothing: data folders have no URL."""

    @contextmanager
    def opened(self, shard: Shard) -> Iterator[Path]:
        """Yield a temporary folder with a copy of the manifests and the silence latents."""
        with tempfile.TemporaryDirectory(prefix="samekit-") as scratch:
            self._local = Path(scratch)
            self._manifest, self._report = Path(STATE_FOLDER, shard.manifest), Path(STATE_FOLDER, shard.report)
            try:
                with output_errors(self._url, Exception):
                    self._fs.makedirs(f"{self._root}/{STATE_FOLDER}", exist_ok=True)
                self._fetch()
                yield self._local
            except SamekitError as error:
                raise type(error)(str(error).replace(scratch, self._url)) from error

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """Yield a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="samekit-") as scratch:
            yield Path(scratch)

    def upload(self, folder: Path, name: str) -> None:
        """Upload a `.npy` and its `.json`, which tells that the pair is complete, and free their room."""
        metadata = Path(name).with_suffix(".json").name
        keep = folder == self._local
        if not keep:
            self.remove(metadata)
        for file in (name, metadata):
            if (folder / file).exists():
                try:
                    self._put((folder / file).read_bytes(), file)
                except OutputError:
                    with suppress(OutputError):
                        self.remove(file)
                    raise
                if not keep:
                    (folder / file).unlink()

    def names(self) -> set[str]:
        """Every file of the output."""
        return self._list(self._root)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with output_errors(self._url, Exception), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def sync_manifest(self, *, whole: bool = False) -> None:
        """Upload the manifest, or a part of it every few seconds."""
        if not whole and time.monotonic() < self._next_part:
            return
        path = self._local / self._manifest
        with path.open("rb") as file:
            file.seek(0 if whole else self._size)
            data = file.read()
        if whole:
            self._replace_manifest(data)
            for name in self._list(f"{self._root}/{STATE_FOLDER}"):
                if name.startswith(f"{self._manifest.name}."):
                    self.remove(f"{STATE_FOLDER}/{name}")
            if (self._local / self._report).exists():
                self._put((self._local / self._report).read_bytes(), self._report.as_posix())
        elif data:
            self._parts += 1
            self._put(data, f"{self._manifest.as_posix()}.{self._digest}-{self._parts:06d}")
            self._size += len(data)
        self._next_part = time.monotonic() + _SECONDS_BETWEEN_PARTS

    def _replace_manifest(self, data: bytes) -> None:
        """Upload a manifest in place of another; at every moment one of them, or a copy, is whole."""
        name = self._manifest.as_posix()
        self._put(data, f"{name}{_WHOLE}{_digest(data)}")
        self._put(data, name)
        self._follow(data)

    def _whole_manifest(self, name: str, state: set[str]) -> bytes:
        """A manifest, or the copy of the one that was being written when a run was cut short."""
        for copy in sorted(state):
            if copy.startswith(f"{name}{_WHOLE}"):
                data = self._get(f"{STATE_FOLDER}/{copy}")
                if copy == f"{name}{_WHOLE}{_digest(data)}":
                    return data
        return self._get(f"{STATE_FOLDER}/{name}")

    def _settings_of(self, name: str, state: set[str]) -> bytes:
        """The first line of another shard's manifest, which is all that this run needs of it."""
        if any(copy.startswith(f"{name}{_WHOLE}") for copy in state):
            data = self._whole_manifest(name, state)
        else:
            data = self._get(f"{STATE_FOLDER}/{name}", MOST_HEADER_BYTES)
        return data[: data.find(b"\n") + 1]

    def _fetch(self) -> None:
        """Copy what the run goes on from."""
        (self._local / STATE_FOLDER).mkdir()
        state = self._list(f"{self._root}/{STATE_FOLDER}")
        names = self.names()
        for name in sorted(state):
            if name.endswith(".jsonl"):
                if name == self._manifest.name:
                    data = self._whole_manifest(name, state)
                    self._follow(data)
                    parts = sorted(part for part in state if part.startswith(f"{name}.{self._digest}-"))
                    data += b"".join(self._get(f"{STATE_FOLDER}/{part}") for part in parts)
                else:
                    data = self._settings_of(name, state)
                (self._local / STATE_FOLDER / name).write_bytes(data)
        if SILENCE_FILE in names:
            (self._local / SILENCE_FILE).write_bytes(self._get(SILENCE_FILE))
        elif foreign := next(filter(is_clips, sorted(names)), None):
            # Shows whoever opens the manifest that there are latents.
            (self._local / foreign).touch()

    def _follow(self, manifest: bytes) -> None:
        """Let the next parts be those of this manifest."""
        self._digest = _digest(manifest)
        self._size, self._parts = len(manifest), 0

    def _list(self, folder: str) -> set[str]:
        """Names of the files in a folder of the output; none if there is no such folder."""
        with self._read_errors():
            self._fs.invalidate_cache()
            try:
                entries: list[dict[str, Any]] = self._fs.ls(folder, detail=True)
            except FileNotFoundError:
                return set()
            return {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries}

    def _get(self, name: str, most: int | None = None) -> bytes:
        """Read a file, or its first `most` bytes."""
        with self._read_errors():
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", end=most)
            return data

    def _put(self, data: bytes, name: str) -> None:
        """Write a file at once; object stores show it whole or not at all."""
        with output_errors(self._url, Exception):
            self._fs.pipe_file(f"{self._root}/{name}", data)

    def _read_errors(self) -> AbstractContextManager[None]:
        return output_errors(self._url, Exception, "cannot be read", "check URL, network and permissions")


def _digest(manifest: bytes) -> str:
    """Short, of a manifest."""
    return hashlib.sha256(manifest).hexdigest()[:12]
