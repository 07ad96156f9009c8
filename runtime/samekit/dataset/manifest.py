"""The manifest of an output: the number of each clip and the result of encoding it.

    .samekit/manifest-000001.jsonl        first line: the settings and the number of clips; then one line per clip
    .samekit/manifest-000002.jsonl, ...   lines that a run adds; the last line of a clip counts
    .samekit/manifest.lock                held by the process that writes

A run writes the first part with the numbers of all clips before it encodes anything, so numbers never change. It adds
a line for each finished clip. At its end it writes the first part again and removes the others. A process that is
killed leaves at most an incomplete last line, which is ignored. Each shard (`--shard I/N`) has its own manifest
(`manifest-I-of-N-000001.jsonl`) and its own lock, and uses every N-th number.

Some file systems behind a URL keep half of an interrupted upload. So the first part is written twice: under the next
free number, then under number 1. A part that begins with settings replaces all parts before it. It is ignored if its
number of lines is not the one that its first line gives.
"""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from samekit.dataset.file_names import STATE_FOLDER, Layout, clip_name, is_clip_file, mirrored_key, mirrored_name
from samekit.dataset.options import Settings, Shard
from samekit.errors import InputError
from samekit.files.json_fields import check_kinds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    from samekit.dataset.output import Output

# To be raised when an older samekit could misread the files. Format 1 had one caption file for each clip, in `.txt`.
_FORMAT: Final = 2
_HEADER_START: Final = b'{"format"'
_MOST_HEADER_BYTES: Final = 2**16
_RESTORE: Final = "restore it from a copy, or encode into another folder"

Status = Literal["encoded", "unreadable", "empty", "silent", "no_caption", "failed", "gone"]
"""`gone`: the clip left the dataset and has no latents. A clip that left and has latents stays `encoded`."""
Stamp = tuple[int, int]
"""Size in bytes and modification time in ns of a file."""
CaptionStamp = tuple[str, int, int]
"""Source of a caption file (`json` or `txt`), its size and its time."""


@dataclass
class Row:
    """The record of one clip."""

    number: int
    relpath: str
    """Path below its data folder. Bytes that are not valid text are kept as surrogates."""
    status: Status | None = None
    """None before the first attempt."""
    reason: str | None = None
    audio: Stamp | None = None
    """Size and time of the audio file at the last attempt; None if it was not a regular file."""
    captions: tuple[CaptionStamp, ...] = ()
    """The files that could hold the caption at the last attempt."""
    sha256: str | None = None
    """SHA-256 of the audio file, if the run computed it."""
    caption_sha256: str | None = None
    """SHA-256 of the caption file, or of the digests of several files."""
    caption_source: str | None = None
    """Where the caption was found."""
    latents: int = 0
    """Latents of audio, without padding."""
    seconds: float = 0.0
    """Seconds of audio that were encoded."""
    cut: bool = False
    """Whether the clip is longer than the part that was encoded."""

    def name(self, layout: Layout) -> str:
        """Return the name of the clip's files without the suffix."""
        return clip_name(self.number) if layout == "numbered" else mirrored_name(self.relpath)

    def files(self, layout: Layout) -> tuple[str, str]:
        """Return the names of both files, in the order in which they must be removed."""
        name = self.name(layout)
        return f"{name}.json", f"{name}.npy"

    def to_line(self) -> bytes:
        """Return one line of JSON in ASCII."""
        return f"{json.dumps(vars(self))}\n".encode("ascii")

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Parse a line of a manifest; wrong values raise ValueError, TypeError or KeyError."""
        fields = json.loads(line)
        if "caption" in fields:
            caption = fields.pop("caption")
            fields["captions"] = [["txt", *caption]] if caption else []
        row = cls(**fields)
        row.audio = _parse_stamp(row.audio)
        row.captions = tuple(_parse_caption_stamp(value) for value in row.captions)
        text = (str, type(None))
        texts = dict.fromkeys(("status", "reason", "sha256", "caption_sha256", "caption_source"), text)
        check_kinds(vars(row), {"number": int, "relpath": str, **texts, "latents": int, "seconds": (int, float)})
        check_kinds(vars(row), {"cut": bool})
        if row.status not in (None, *get_args(Status)):
            raise ValueError(f"status = {row.status!r}")
        return row


def _parse_stamp(value: Any) -> Stamp | None:
    if value is None:
        return None
    size, modified = value
    check_kinds({"size": size, "time": modified}, {"size": int, "time": int})
    return size, modified


def _parse_caption_stamp(value: Any) -> CaptionStamp:
    source, size, modified = value
    check_kinds({"source": source, "size": size, "time": modified}, {"source": str, "size": int, "time": int})
    return source, size, modified


class Manifest:
    """The rows of one shard. `read` returns it; `writing` is for a process that has locked the output."""

    def __init__(self, output: Output, shard: Shard, settings: Settings, rows: Iterable[Row]) -> None:
        self.settings = settings
        self.rows = {row.relpath: row for row in rows}
        """Relpath -> row, in the order of the numbers."""
        self._output = output
        self._shard = shard
        self._changed = False
        self._needs_rewriting = False
        # Lines that are not in the output yet, the time at which they must be written, and the part for them.
        self._lines: list[bytes] = []
        self._due = 0.0
        self._next_part = 2

    @classmethod
    def read(
        cls, output: Output, shard: Shard, settings: Settings, relpaths: Iterable[str], *, reencode: bool = False
    ) -> Self:
        """Return the manifest of a shard with the numbers of all clips; write nothing.

        New clips get numbers in the order of `relpaths`. If the output holds latents of other settings, `reencode`
        keeps only the numbers.

        Raises:
            InputError: the output holds latents of other settings or of unknown origin, or files of the user that a
                new clip would replace. Or its manifest is damaged.
        """
        found = find_manifests(output)
        parts = found.pop(shard, [])
        if not parts and not found:
            _require_no_latents(output, settings.layout)
        _require_matching_shards(output, shard, found, None if reencode else settings)
        old, rows = read_manifest(output, parts) if parts else (settings, [])
        if old.layout != settings.layout:
            raise InputError(
                f"{output}: has the layout {old.layout}; pass --layout {old.layout}, or another --output_path"
            )
        if not reencode:
            _require_same(output, settings, old)
        elif settings.differences(old):
            old, rows, parts = settings, [Row(row.number, row.relpath) for row in rows], []
        manifest = cls(output, shard, old, rows)
        new = [relpath for relpath in relpaths if relpath not in manifest.rows]
        if new and settings.layout == "mirror":
            _require_free_names(output, rows, new)
        for relpath in new:
            manifest.rows[relpath] = Row(shard.number(len(manifest.rows)), relpath)
        manifest._needs_rewriting = len(parts) != 1 or len(rows) != len(manifest.rows)
        return manifest

    @contextmanager
    def writing(self) -> Iterator[Self]:
        """Yield the manifest, after the numbers of all clips were written to the output, which must be locked.

        Raises:
            OutputError: the output cannot be written.
        """
        if self._needs_rewriting:
            self._rewrite()
        try:
            yield self
            if self._changed:
                self._rewrite()
        finally:
            self._append()

    def record(self, row: Row) -> None:
        """Record the result of a clip, whose files must be in the output already; `save` writes it."""
        self.rows[row.relpath] = row
        self._changed = True
        self._lines.append(row.to_line())

    def save(self) -> None:
        """Append the recorded results to the output, unless it is too early for it.

        If the process is killed before, the next run encodes the clips again.
        """
        if time.monotonic() >= self._due:
            self._append()

    def _append(self) -> None:
        lines, self._lines = b"".join(self._lines), []
        if lines and not self._output.append(self._part(self._next_part), lines):
            self._next_part += 1
        self._due = time.monotonic() + self._output.seconds_between_appends

    def _rewrite(self) -> None:
        """Write all rows to the first part and remove the other parts."""
        header = {"format": _FORMAT, "clips": len(self.rows), **dataclasses.asdict(self.settings)}
        data = json.dumps(header).encode("ascii") + b"\n" + b"".join(row.to_line() for row in self.rows.values())
        found = map(Shard.of_manifest_part, self._output.names(STATE_FOLDER))
        numbers = {part[1] for part in found if part and part[0] == self._shard}
        copy = max(numbers, default=1) + 1
        self._output.put(self._part(copy), data)
        self._output.put(self._part(1), data)
        # The copy replaces the parts before it until the last of them is gone.
        self._output.remove(self._part(number) for number in sorted(numbers - {1}))
        self._output.remove([self._part(copy)])
        self._lines = []

    def _part(self, number: int) -> str:
        return f"{STATE_FOLDER}/{self._shard.manifest_part(number)}"


def find_manifests(output: Output) -> dict[Shard, list[str]]:
    """Return the parts of each shard's manifest, sorted by number.

    A manifest without its first part is left out, because its shard was stopped before it encoded anything.
    """
    parts: dict[Shard, dict[int, str]] = {}
    for name in sorted(output.names(STATE_FOLDER)):
        if found := Shard.of_manifest_part(name):
            shard, number = found
            parts.setdefault(shard, {})[number] = f"{STATE_FOLDER}/{name}"
    return {shard: [names[number] for number in sorted(names)] for shard, names in parts.items() if 1 in names}


def read_manifest(output: Output, parts: list[str]) -> tuple[Settings, list[Row]]:
    """Return the settings and the last row of each clip, sorted by number, from the parts of a manifest.

    Raises:
        InputError: the manifest cannot be read, or is damaged.
    """
    settings: Settings | None = None
    rows: dict[str, Row] = {}
    for name in parts:
        # The text after the last line break is an incomplete line, or empty.
        lines = output.get(name).split(b"\n")[:-1]
        if lines and (name == parts[0] or lines[0].startswith(_HEADER_START)):
            header, clips = _parse_header(output, name, lines.pop(0))
            if len(lines) != clips:
                continue
            settings, rows = header, {}
        with _damage_errors(output, name):
            rows.update((row.relpath, row) for row in map(Row.parse, lines))
    ordered = sorted(rows.values(), key=lambda row: row.number)
    found = Shard.of_manifest_part(parts[0].rpartition("/")[2])
    with _damage_errors(output, parts[0]):
        if settings is None:
            raise ValueError("it is cut off")
        if not found or [row.number for row in ordered] != [found[0].number(index) for index in range(len(ordered))]:
            raise ValueError("numbers are missing or occur twice")
        for row in ordered:
            # Raises ValueError for names that lead out of the folder.
            row.name(settings.layout)
        return settings, ordered


def _read_settings(output: Output, parts: list[str]) -> Settings:
    """Read the settings of another shard without its rows, which may take gigabytes.

    If the first part is incomplete, the last part is a copy of it.
    """
    for name in (parts[0], parts[-1]):
        header, line_end, _ = output.get(name, _MOST_HEADER_BYTES).partition(b"\n")
        if line_end:
            return _parse_header(output, name, header)[0]
    raise InputError(f"{output}/{parts[0]}: is damaged (its first line is cut off); {_RESTORE}")


def _parse_header(output: Output, name: str, line: bytes) -> tuple[Settings, int]:
    """Return the settings and the number of clips from the first line of a part."""
    with _damage_errors(output, name):
        fields = json.loads(line)
        if 1 <= fields.pop("format") <= _FORMAT:
            clips = fields.pop("clips")
            return Settings.parse(fields), clips
    raise InputError(f"{output}/{name}: was written by another samekit; use that one, or encode into another folder")


@contextmanager
def _damage_errors(output: Output, name: str) -> Iterator[None]:
    """Report an invalid value in a part of the manifest."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{output}/{name}: is damaged ({error}); {_RESTORE}") from None


def _require_no_latents(output: Output, layout: Layout) -> None:
    """Raise InputError if an output holds latents but no manifest."""
    names = output.names() if layout == "numbered" else output.tree()
    if foreign := next(filter(is_clip_file, sorted(names)), None):
        raise _foreign_file(output, foreign)


def _require_free_names(output: Output, rows: Iterable[Row], relpaths: Iterable[str]) -> None:
    """Raise InputError if new clips would replace files of the user, such as captions, in a mirrored folder."""
    names = {mirrored_key(mirrored_name(relpath)) for relpath in relpaths}
    # A clip may take the files of another one, such as a.flac those of a.wav.
    names -= {mirrored_key(row.name("mirror")) for row in rows}
    for name in sorted(output.tree()):
        stem, _, suffix = name.rpartition(".")
        if suffix in ("npy", "json") and mirrored_key(stem) in names:
            raise _foreign_file(output, name)


def _foreign_file(output: Output, name: str) -> InputError:
    return InputError(f"{output}: holds {name}, which no manifest lists; pass another --output_path")


def _require_matching_shards(
    output: Output, shard: Shard, others: dict[Shard, list[str]], settings: Settings | None
) -> None:
    """Raise InputError if other shards of an output have another number of parts, or settings other than `settings`."""
    for other, names in others.items():
        if other.count != shard.count:
            how = f"with --shard I/{other.count}" if other.count > 1 else "without --shard"
            raise InputError(f"{output}: was started {how}; continue in the same way, or pass another --output_path")
        if settings:
            _require_same(output, settings, _read_settings(output, names))


def _require_same(output: Output, settings: Settings, other: Settings) -> None:
    """Raise InputError if settings differ, because one output holds latents of one kind."""
    if differences := settings.differences(other):
        raise InputError(
            f"{output}: holds latents of other settings ({', '.join(differences)}); pass --reencode to encode "
            "everything again under the same numbers, or another --output_path"
        )
