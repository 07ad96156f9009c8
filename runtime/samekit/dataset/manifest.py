"""What an output folder remembers of a dataset: which number each clip has, and what became of it. Knows no audio.

    out/.samekit/
      manifest.jsonl            first line: the settings; then a line for each clip, sorted by number
      manifest.jsonl.lock       held by the process that writes into the folder

While a run goes on, a line is appended for each clip that is finished; the last line about a clip counts, and the run
ends by writing one line a clip again. A process that is killed leaves at most an incomplete last line, which the next
run drops. The numbers are on disk before the first clip is encoded, so they are the same however often a run is cut
short. With `--shard I/N` every shard has its own manifest and lock, and every N-th number.
"""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from samekit.dataset.file_names import STATE_FOLDER, clip_name, is_clips
from samekit.dataset.options import Settings, Shard
from samekit.dataset.output import MOST_HEADER_BYTES
from samekit.errors import InputError
from samekit.files.atomic import atomic_path, output_errors, remove_abandoned
from samekit.files.json_fields import check_kinds
from samekit.files.locks import file_lock
from samekit.files.paths import open_regular, read_regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO, Self

# Of a manifest: ten million clips.
_MOST_BYTES: Final = 2**32
_RESTORE: Final = "restore it from a copy, or encode into another folder"
# Raised when an older samekit could misread the files.
_FORMAT: Final = 1

Status = Literal["encoded", "unreadable", "empty", "silent", "no_caption", "failed", "gone"]
"""`gone` is a clip that left the dataset and has no latents; one that has some stays `encoded`."""
Stamp = tuple[int, int]
"""Size in bytes and time of modification in ns: what changes when a file does."""


@dataclass
class Row:
    """What is known of one clip."""

    number: int
    """Names its files."""
    relpath: str
    """Path below its data folder; bytes that are no valid text are kept as surrogates."""
    status: Status | None = None
    """What became of it; None until it was tried."""
    reason: str | None = None
    """Why it was not encoded."""
    audio: Stamp | None = None
    """Of the audio file that was tried."""
    caption: Stamp | None = None
    """Of its caption; None if there is none."""
    sha256: str | None = None
    """Digest of the audio file, if one was asked for."""
    caption_sha256: str | None = None
    """Digest of the caption, likewise."""
    latents: int = 0
    """Latents of audio."""
    seconds: float = 0.0
    """Seconds of audio that were encoded."""

    @property
    def name(self) -> str:
        """Name of its files, without the suffix."""
        return clip_name(self.number)

    @property
    def files(self) -> tuple[str, str]:
        """Names of both; a clip is encoded where both are there, and the `.json` goes first where they are removed."""
        return f"{self.name}.json", f"{self.name}.npy"

    def to_line(self) -> str:
        """One line of JSON; it holds no line break whatever the file's name is."""
        return json.dumps(vars(self)) + "\n"

    @classmethod
    def parse(cls, line: bytes) -> Row:
        """Read a line of a manifest; raises what a wrong value raises."""
        row = cls(**json.loads(line))
        row.audio, row.caption = _stamp(row.audio), _stamp(row.caption)
        text = (str, type(None))
        texts = dict.fromkeys(("status", "reason", "sha256", "caption_sha256"), text)
        check_kinds(vars(row), {"number": int, "relpath": str, **texts, "latents": int, "seconds": (int, float)})
        if row.status not in (None, *get_args(Status)):
            raise ValueError(f"status = {row.status!r}")
        return row


def _stamp(value: Any) -> Stamp | None:
    """A stamp from JSON, which knows no tuples."""
    if value is None:
        return None
    size, modified = value
    check_kinds({"size": size, "time": modified}, {"size": int, "time": int})
    return size, modified


class Manifest:
    """The rows of one output folder, on disk at every moment.

    Use it inside `Manifest.open`, which holds the folder's lock.
    """

    def __init__(self, folder: Path, shard: Shard, settings: Settings, rows: Iterable[Row] = ()) -> None:
        self.folder = folder
        """Where the latents are."""
        self.shard = shard
        """The part of the dataset that it is of."""
        self.settings = settings
        """What decided the latents."""
        self.rows: dict[str, Row] = {row.relpath: row for row in rows}
        """relpath -> row, in the order of the numbers."""
        self._path = folder / STATE_FOLDER / shard.manifest
        self._journal: BinaryIO | None = None

    @classmethod
    @contextmanager
    def open(cls, folder: Path, shard: Shard, settings: Settings, *, reencode: bool = False) -> Iterator[Manifest]:
        """Take an output folder for this process alone, and create it if it is not there.

        Args:
            folder: where the latents are, or will be.
            shard: the part of the dataset that this process works on.
            settings: of this run.
            reencode: if the folder holds latents of other settings, forget them, but for their numbers.

        Yields:
            The folder's manifest. Whatever a killed process left behind is gone.

        Raises:
            OutputError: the folder cannot be written, or another process is writing into it.
            InputError: it holds latents of other settings or of unknown origin, or its manifest is damaged.
        """
        path = folder / STATE_FOLDER / shard.manifest
        with output_errors(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f"{path.name}.lock"), folder):
            clear_away(folder, shard)
            manifest = cls._begun(folder, shard, settings, reencode=reencode)
            try:
                yield manifest
            finally:
                manifest.close()

    @classmethod
    def _begun(cls, folder: Path, shard: Shard, settings: Settings, *, reencode: bool) -> Self:
        """The manifest on disk, or a new one, once it is sure that it fits these settings."""
        paths = {path.name: path for path in sorted((folder / STATE_FOLDER).glob("manifest*.jsonl"))}
        own = paths.pop(shard.manifest, None)
        found = read_manifest(own) if own else None
        if not paths and found is None:
            foreign = next((path.name for path in folder.iterdir() if is_clips(path.name)), None)
            if foreign:
                raise InputError(f"{folder}: holds {foreign}, which no manifest lists; pass another --output_path")
        for name, path in paths.items():
            # Of other shards only the settings count: a dataset of a million clips has gigabytes of rows.
            other = read_settings(path)
            count = Shard.of_manifest(name).count
            if count != shard.count:
                how = f"with --shard I/{count}" if count > 1 else "without --shard"
                raise InputError(f"{folder}: was begun {how}; go on like that, or pass another --output_path")
            if not reencode:
                _check_same(folder, settings, other)
        if found is None:
            manifest = cls(folder, shard, settings)
            manifest.rewrite()
            return manifest
        old, rows = found
        if not settings.differences(old):
            manifest = cls(folder, shard, old, rows)
            if manifest._path.is_symlink():
                # Lines are appended to a file of this folder, never to the one that a link leads to.
                manifest.rewrite()
            return manifest
        if not reencode:
            _check_same(folder, settings, old)
        manifest = cls(folder, shard, settings, [Row(row.number, row.relpath) for row in rows])
        manifest.rewrite()
        return manifest

    def assign(self, relpaths: Iterable[str]) -> None:
        """Give a number to every clip that has none, in the order given; they are on disk when this returns.

        Raises:
            OutputError: the manifest cannot be written.
        """
        rows = []
        for relpath in relpaths:
            if relpath not in self.rows:
                row = self.rows[relpath] = Row(self.shard.number(len(self.rows)), relpath)
                rows.append(row)
        if rows:
            self._append("".join(row.to_line() for row in rows), sync=True)

    def record(self, row: Row) -> None:
        """Append what became of a clip.

        Its files must be on disk already: after a power failure the line may be lost, and then the clip is encoded
        again, but never the other way round.

        Raises:
            OutputError: the manifest cannot be written.
        """
        self.rows[row.relpath] = row
        self._append(row.to_line(), sync=False)

    def _append(self, text: str, *, sync: bool) -> None:
        """Write lines to the end of the file, which ends with a whole line after a run that was cut short too."""
        with output_errors(self._path):
            if self._journal is None:
                _drop_incomplete_line(self._path)
                # Held open for the whole run; `close` ends it.
                self._journal = self._path.open("ab", buffering=0)
            data = text.encode("ascii")
            while data:
                data = data[self._journal.write(data) :]
            if sync:
                os.fsync(self._journal.fileno())

    def rewrite(self) -> None:
        """Write the whole manifest again, one line a clip, if that would change it.

        Raises:
            OutputError: the manifest cannot be written.
        """
        self.close()
        header = json.dumps({"format": _FORMAT, **dataclasses.asdict(self.settings)}) + "\n"
        text = header + "".join(row.to_line() for row in self.rows.values())
        with output_errors(self._path):
            is_file = self._path.is_file() and not self._path.is_symlink()
            if is_file and self._path.read_bytes() == text.encode("ascii"):
                return
        with atomic_path(self._path) as temporary, output_errors(self._path):
            temporary.write_text(text, encoding="ascii")

    def close(self) -> None:
        """End appending."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def read_manifest(path: Path) -> tuple[Settings, list[Row]]:
    """Read a manifest, without its last line if that is incomplete.

    Returns:
        The settings, and the last row of each clip, sorted by number.

    Raises:
        InputError: it cannot be read, or is damaged.
    """
    with _manifest_errors(path):
        header, *lines = read_regular(path, _MOST_BYTES).split(b"\n")[:-1]
        settings = _parse_header(path, header)
        rows = {row.relpath: row for row in map(Row.parse, lines)}
    ordered = sorted(rows.values(), key=lambda row: row.number)
    shard = Shard.of_manifest(path.name)
    if [row.number for row in ordered] != [shard.number(position) for position in range(len(ordered))]:
        raise InputError(f"{path}: is damaged (numbers are missing or double); {_RESTORE}")
    return settings, ordered


def read_settings(path: Path) -> Settings:
    """Read the settings of a manifest, which are its first line, and nothing else.

    Raises:
        InputError: they cannot be read, or are damaged.
    """
    with _manifest_errors(path), open_regular(path) as file:
        header = file.readline(MOST_HEADER_BYTES)
        if not header.endswith(b"\n"):
            raise ValueError("its first line is cut off")
        return _parse_header(path, header)


def _parse_header(path: Path, header: bytes) -> Settings:
    """Return the settings in the first line of a manifest; raises what a wrong value raises."""
    fields = json.loads(header)
    if fields.pop("format") != _FORMAT:
        raise InputError(f"{path}: was written by another samekit; use that one, or encode into another folder")
    return Settings.parse(fields)


@contextmanager
def _manifest_errors(path: Path) -> Iterator[None]:
    """Raise what goes wrong inside the block as an error about a manifest."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is damaged ({error}); {_RESTORE}") from None


def _check_same(folder: Path, settings: Settings, other: Settings) -> None:
    """Refuse to mix latents of two kinds in one folder."""
    if differences := settings.differences(other):
        raise InputError(
            f"{folder}: holds latents of other settings ({', '.join(differences)}); pass --reencode to encode "
            "everything again under the same numbers, or another --output_path"
        )


def _drop_incomplete_line(path: Path) -> None:
    """Cut off what follows the last line break."""
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def clear_away(folder: Path, shard: Shard) -> None:
    """Remove what killed processes of the same shard left half-written in its folder."""
    for place in (folder, folder / STATE_FOLDER):
        remove_abandoned(place, shard.is_written_here)
