"""Find the audio files of a dataset, and the files that may hold their captions."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samekit.audio import AV_SUFFIXES, INSTALL_AV, readable_suffixes
from samekit.dataset.captions import CaptionFile, CaptionFinder, Names
from samekit.errors import InputError
from samekit.files.paths import expanded_text, file_signature, open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from samekit.dataset.manifest import CaptionStamp, Stamp


logger = logging.getLogger(__name__)

_USUAL_SUFFIXES: Final = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff")
SUFFIXES: Final = (*_USUAL_SUFFIXES, *readable_suffixes())
"""Suffixes of audio files; with PyAV, those of videos too."""
# Longest line in a list of files: twice the longest path on Linux.
_LONGEST_LINE: Final = 2**13
# Characters of such a line that a message shows.
_SHOWN_CHARACTERS: Final = 200
_LIST_FILE: Final = "filelist.txt"
# Number of suffixes in a message.
_LISTED_SUFFIXES: Final = 6
# Files that are not audio, each with the names in its folder.
_Others = list[tuple[Names, str]]


@dataclass(frozen=True)
class Source:
    """An audio file of a dataset, and the files that may hold its caption."""

    path: str
    """Path of the file: the data folder as it was given, and `relpath`."""
    relpath: str
    """Path of the file relative to its data folder."""
    audio: Stamp | None
    """Size and time of the audio; None if it is not a regular file."""
    captions: tuple[CaptionFile, ...] = ()
    """In the order of their priority."""

    @property
    def caption_stamps(self) -> tuple[CaptionStamp, ...]:
        """What the manifest records of the caption files."""
        return tuple(file.identity for file in self.captions)


@dataclass
class Found:
    """The result of searching data folders."""

    sources: list[Source] = field(default_factory=list)
    """The audio files, sorted by relpath."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Suffix in lower case -> number of files that are neither audio nor the caption of an audio file."""
    unreadable_folders: list[str] = field(default_factory=list)
    """Relpaths of folders that this process may not list or enter."""

    def describe_left_out(self, separator: str) -> str:
        """Return a text about files and folders that were left out, each part after a separator."""
        counts = sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0] or "~"))
        kinds = [f"{count} {suffix or 'without a suffix'}" for suffix, count in counts[:_LISTED_SUFFIXES]]
        kinds += ["..."] * (len(counts) > _LISTED_SUFFIXES)
        text = ""
        if total := self.passed_over.total():
            text = f"{separator}passed over {total} file{'s' * (total > 1)} ({', '.join(kinds)})"
        if count := sum(self.passed_over[suffix] for suffix in AV_SUFFIXES):
            text += f"{separator}{count} of them can be read after {INSTALL_AV}"
        if count := len(self.unreadable_folders):
            text += f"{separator}{count} folder{'s' * (count > 1)} cannot be read"
        return text


def find_sources(folders: Sequence[str | os.PathLike[str]], captions: Sequence[str] = ("txt",)) -> Found:
    """Find every audio file below some folders.

    If a folder has a `filelist.txt` at its root, the files in that list are taken. Otherwise the folder is searched:
    hidden files and folders are passed over, links to folders are followed, and no folder is entered twice.

    Args:
        folders: the data folders.
        captions: the sources of captions, in the order of their priority, see `samekit.dataset.captions`.

    Raises:
        InputError: a folder or its list cannot be read, two files have the same relpath, there is no audio, or no
            audio file can have a caption.
    """
    found, finder, others, sources = Found(), CaptionFinder(captions), _Others(), dict[str, Source]()
    names = [os.fspath(folder) for folder in folders]
    for folder in names:
        listed = _listed_files(folder, finder)
        for source in _walk(folder, found, finder, others) if listed is None else listed:
            if source.relpath in sources:
                twice = f"{sources[source.relpath].path} and {source.path}"
                cure = "rename one, or encode them separately"
                if len(set(map(os.path.realpath, names))) < len(names):
                    cure = "pass each folder once"
                raise InputError(f"{twice} have the same path below --data_dir; {cure}")
            sources[source.relpath] = source
    # Only now is it known which files are captions.
    found.passed_over.update(Path(name).suffix.lower() for folder, name in others if name not in folder.taken)
    where = ", ".join(names)
    if not sources:
        cure = "check --data_dir"
        if found.passed_over:
            cure = "convert these, or check --data_dir"
        raise InputError(
            f"{where}: holds no audio ({' '.join(_USUAL_SUFFIXES)}){found.describe_left_out(', ')}; {cure}"
        )
    if "tags" not in captions and not any(source.captions for source in sources.values()):
        suffix = captions[-1]
        raise InputError(
            f"{where}: none of {len(sources)} audio files has a caption{found.describe_left_out(', ')}; "
            f"write one beside each, NAME.{suffix} for NAME.wav"
        )
    found.sources = sorted(sources.values(), key=lambda source: os.fsencode(source.relpath))
    return found


def require_folders(folders: Sequence[str | os.PathLike[str]]) -> None:
    """Raise InputError if one of the folders cannot be listed."""
    for folder in map(expanded_text, folders):
        with _listing_errors(folder), os.scandir(folder):
            pass


@contextmanager
def _listing_errors(folder: str) -> Iterator[None]:
    """Raise InputError if a data folder, or a folder below it, cannot be listed."""
    try:
        yield
    except OSError as error:
        cure = "check its name and permissions"
        if "://" in folder:
            cure = "--data_dir takes folders only, mount it"
        raise InputError(f"{folder}: cannot be read ({error.strerror}); {cure}") from None


def _walk(top: str, found: Found, finder: CaptionFinder, others: _Others) -> Iterator[Source]:
    """Yield the audio files below a folder. Add unreadable folders to `found`, and files of other kinds to `others`.

    Links are followed after all other folders are searched. So a file has its own path, not one through a link.
    """
    folders, links, seen = [(top, "")], deque[tuple[str, str]](), set()
    while folders or links:
        folder, below = folders.pop() if folders else links.popleft()
        with _listing_errors(folder):
            try:
                # The path "FOLDER/." needs the right to enter the folder. Without it, no file could be opened.
                status = os.stat(os.path.join(folder, "."))
                entries = {entry.name: entry for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)}
            except PermissionError as error:
                if not below:
                    raise
                logger.warning("%s: cannot be read (%s), its contents are left out", folder, error.strerror)
                found.unreadable_folders.append(below)
                continue
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            continue
        seen.add(identity)
        listed = finder.names(folder, entries)
        for name, entry in entries.items():
            if name.startswith("."):
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append((entry.path, str(Path(below, name))))
            elif Path(name).suffix.lower() in SUFFIXES:
                yield _source(entry.path, str(Path(below, name)), finder)
            elif listed:
                others.append((listed, name))


def _source(path: str, relpath: str, finder: CaptionFinder) -> Source:
    """Return the source of an audio file."""
    audio = Path(path)
    return Source(path, relpath, file_signature(audio), finder.find(audio))


def _listed_files(folder: str, finder: CaptionFinder) -> list[Source] | None:
    """Return the files in the list at the root of a data folder, or None if there is no list.

    As in the reference, each line is stripped and names a file with any suffix. Unlike there, the file must be below
    the folder, because a downloaded dataset must not decide which files of this machine are read.
    """
    path = Path(folder, _LIST_FILE)
    with _listing_errors(folder):
        if not path.exists() or path.is_dir():
            return None
    absolute = Path(folder).absolute()
    roots = (absolute, Path(os.path.normpath(absolute)), absolute.resolve())
    sources: dict[str, Source] = {}
    for number, name in _list_lines(path):
        below = _below(name, roots)
        if below is None:
            raise InputError(
                f"{path}: line {number} names {name[:_SHOWN_CHARACTERS]!r}, which is no file below this folder; "
                "remove the line, or pass that folder as another --data_dir"
            )
        source = _listed_source(folder, below, finder)
        sources[source.relpath] = source
    if not sources:
        raise InputError(f"{path}: lists no file; remove it, or write a line for each audio file")
    return list(sources.values())


def _list_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the stripped text of each line that is not blank."""
    try:
        # Names that are not valid UTF-8 are kept as Python represents them in paths.
        with open_regular(path) as file, TextIOWrapper(file, "utf-8-sig", "surrogateescape") as text:
            for number, line in enumerate(iter(partial(text.readline, _LONGEST_LINE), ""), 1):
                if name := line.strip():
                    yield number, name
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions, or remove it") from None


def _below(name: str, roots: Sequence[Path]) -> Path | None:
    """Return a line of a list as a path relative to the data folder, or None if it names no file below the folder.

    Args:
        name: relative to the folder, or an absolute path.
        roots: the absolute path of the folder, with and without links.
    """
    if "\0" in name or len(name) >= _LONGEST_LINE - 1:
        return None
    path = Path(os.path.normpath(name))
    if path.is_absolute():
        return next((path.relative_to(root) for root in roots if root in path.parents), None)
    return None if path.parts[:1] in ((), ("..",)) else path


def _listed_source(folder: str, below: Path, finder: CaptionFinder) -> Source:
    """Return the source for a path relative to a data folder; its names may be in any Unicode normal form."""
    path = Path(folder, below)
    if not os.path.lexists(path):
        path = Path(folder)
        for part in below.parts:
            names = finder.names(str(path))
            path /= (names.find(part) if names else None) or part
    return _source(str(path), str(path.relative_to(folder)), finder)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    # Links that lead in a circle raise OSError.
    with suppress(OSError):
        return entry.is_dir()
    return False
