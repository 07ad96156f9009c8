"""The caption of a clip: a JSON or text file, or the tags of the audio file.

The sources of captions are `json`, `txt` and `tags`, in an order that the user chooses. The files of `sub/clip.wav`:

    json    sub/clip.json, json/clip.json (a folder beside `sub`)
    txt     sub/clip.txt, txt/clip.txt

The prompt comes from the first of them that has one. A JSON object may also give other fields, strings and numbers,
which are copied to the metadata. If no file has a prompt or a tag, the tags of the audio file are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from samekit.dataset.bad_clip import BadClipError
from samekit.errors import InputError
from samekit.files.paths import file_signature, open_regular
from samekit.packages import install_command

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from samekit.dataset.manifest import CaptionStamp, Stamp

CAPTION_SOURCES: Final = ("json", "txt", "tags")
MOST_CAPTION_BYTES: Final = 2**20
"""A larger file is not a caption."""
# Larger than the pictures in most tags.
_MOST_TAG_BYTES: Final = 2**24
TAGS: Final = {
    "title": "Title",
    "artist": "Artist",
    "album": "Album",
    "genre": "Genre",
    "label": "Label",
    "date": "Year",
    "composer": "Composer",
    "bpm": "BPM",
}
"""The tags that trainers use -> their names in a prompt."""
RESERVED_FIELDS: Final = frozenset(
    (
        *("path", "relpath", "src_relpath", "timestamps", "seconds_start", "seconds_total", "sample_rate"),
        *("padding_mask", "latent_shape", "audio_samples", "audio_gain_applied", "latent_rms_achieved"),
        *("phase_flipped", "caption_source", "decoder", "model", "model_sha256", "samples"),
    )
)
"""Fields that samekit writes, or reads when it decodes. A caption's field of the same name is left out."""


@dataclass(frozen=True)
class CaptionFile:
    """A file that may hold the caption of a clip."""

    source: str
    """`json` or `txt`."""
    path: str
    stamp: Stamp

    @property
    def identity(self) -> CaptionStamp:
        """What the manifest records of the file."""
        return self.source, *self.stamp


@dataclass(frozen=True)
class Caption:
    """The caption of a clip."""

    source: str
    """Where the prompt comes from, or the fields if there is no prompt."""
    prompt: str | None
    fields: Mapping[str, str | float] = field(default_factory=dict)

    @property
    def tag_prompt(self) -> str:
        """The tags as a prompt, in the form that trainers use."""
        return ", ".join(f"{name}: {self.fields[tag]}" for tag, name in TAGS.items() if tag in self.fields)


class Names:
    """The names in a folder, for searches that ignore the Unicode normal form.

    macOS writes names in decomposed form (NFD). Other systems keep the form that a program uses, mostly the composed
    one (NFC), and treat the two as different names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self.taken: set[str] = set()
        """Names that were found."""

    def find(self, name: str) -> str | None:
        """Return the name if the folder has it, else the same name in another normal form, else None."""
        found = name if name in self._names else self._composed.get(unicodedata.normalize("NFC", name))
        if found:
            self.taken.add(found)
        return found

    @cached_property
    def _composed(self) -> dict[str, str]:
        return {unicodedata.normalize("NFC", name): name for name in sorted(self._names, reverse=True)}


class CaptionFinder:
    """Finds the caption files of clips, and lists each folder once."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = [source for source in sources if source != "tags"]
        self._listed: dict[tuple[int, int], Names] = {}
        self._places: dict[str, list[tuple[str, str, Names | None]]] = {}

    def names(self, folder: str, listing: Iterable[str] | None = None) -> Names | None:
        """Return the names in a folder; None if it cannot be listed. `listing` saves listing it again."""
        with suppress(OSError):
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity not in self._listed:
                self._listed[identity] = Names(os.listdir(folder) if listing is None else listing)
            return self._listed[identity]
        return None

    def find(self, audio: Path) -> tuple[CaptionFile, ...]:
        """Return the files that may hold the caption of an audio file, in the order of the sources."""
        return tuple(self._find(audio))

    def _find(self, audio: Path) -> Iterator[CaptionFile]:
        folder = str(audio.parent)
        if folder not in self._places:
            self._places[folder] = list(self._places_of(folder))
        for source, place, names in self._places[folder]:
            wanted = f"{audio.stem}.{source}"
            # The files of a folder that cannot be listed may still be opened.
            name = names.find(wanted) if names else wanted
            if name and (stamp := file_signature(path := Path(place, name))):
                yield CaptionFile(source, str(path), stamp)

    def _places_of(self, folder: str) -> Iterator[tuple[str, str, Names | None]]:
        for source in self._sources:
            yield source, folder, self.names(folder)
            beside = os.path.join(folder, os.pardir, source)
            if os.path.isdir(beside):
                yield source, beside, self.names(beside)


def captions_sha256(digests: Sequence[tuple[str, str]]) -> str | None:
    """Return one SHA-256 for the caption files of a clip, given the source and the digest of each."""
    if len(digests) < 2:
        return digests[0][1] if digests else None
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def choose_caption(
    audio: str, files: Sequence[CaptionFile], contents: Sequence[bytes], sources: Sequence[str]
) -> Caption:
    """Return the caption of an audio file.

    Args:
        audio: path of the audio file.
        files: what `CaptionFinder` found for it.
        contents: the contents of these files.
        sources: the sources in use.

    Raise BadClipError if there is no caption, or a file is damaged.
    """
    fields: dict[str, str | float] = {}
    origin = "tags"
    for file, content in zip(files, contents, strict=True):
        if file.source == "txt":
            prompt = _text(file.path, content)
        else:
            found = _json_fields(file.path, content)
            prompt = str(found.pop("prompt", ""))
            if not fields:
                fields, origin = found, file.source
        if prompt:
            return Caption(file.source, prompt, fields)
    if fields.keys().isdisjoint(TAGS) and "tags" in sources:
        fields, origin = {**fields, **read_tags(audio)}, "tags"
    if fields.keys().isdisjoint(TAGS):
        raise BadClipError("no_caption", _why_no_caption(audio, files, sources))
    return Caption(origin, None, fields)


def _why_no_caption(audio: str, files: Sequence[CaptionFile], sources: Sequence[str]) -> str:
    """Return cause and cure for a clip whose files, if there are any, hold no caption."""
    if files:
        path, source = files[0].path, files[0].source
        return f"{path}: {'is empty' if source == 'txt' else 'has no prompt'}; write the caption there"
    if sources == ("tags",):
        return f"{audio}: has none of the tags {', '.join(TAGS)}; add one, or pass more --captions"
    stem = Path(audio).stem
    searched = (f"{stem}.{source}, ../{source}/{stem}.{source}" if source != "tags" else "tags" for source in sources)
    suffix = ".txt" if "txt" in sources else ".json"
    return f"{audio}: has no caption ({', '.join(searched)}); write one to {Path(audio).with_suffix(suffix)}"


def _text(path: str, content: bytes) -> str:
    """Return the text of a file, stripped, and with the line ends that `Path.read_text` gives in the reference."""
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").strip()
    except UnicodeDecodeError as error:
        raise BadClipError("no_caption", f"{path}: cannot be read as UTF-8 ({error}); write it again") from error
    if "\0" in text:
        raise BadClipError("no_caption", f"{path}: holds zero bytes, as UTF-16 does; save it as UTF-8")
    return text


def _json_fields(path: str, content: bytes) -> dict[str, str | float]:
    """Return the strings and numbers of a JSON object; none of another JSON value. Of equal names, the last counts."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        cure = "write it again, or leave json out of --captions"
        raise BadClipError("no_caption", f"{path}: cannot be read as JSON ({error}); {cure}") from error
    return _usable_fields(value) if isinstance(value, dict) else {}


def _usable_fields(fields: Mapping[str, Any]) -> dict[str, str | float]:
    """Return the fields that metadata may have: strings that are not blank, and numbers that are finite."""
    return {
        name: value
        for name, value in fields.items()
        # The reference's dataset acts on names such as `__reject__`.
        if name not in RESERVED_FIELDS and not name.startswith("__") and _is_text(name) and _is_usable(value)
    }


def _is_usable(value: Any) -> bool:
    if isinstance(value, str):
        return _is_text(value)
    # Comparing also excludes NaN, and integers for which a float is too small.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(text: str) -> bool:
    """Return whether every program can read a text: not blank, no zero bytes, no halves of surrogate pairs."""
    return bool(text.strip()) and "\0" not in text and text.encode("utf-8", "ignore").decode() == text


class _TagFile:
    """A file whose reads are limited, because damaged tags announce sizes of gigabytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size if 0 <= size < _MOST_TAG_BYTES else _MOST_TAG_BYTES)


def require_tag_reader() -> None:
    """Raise InputError if the package that reads tags is missing."""
    try:
        import tinytag  # noqa: F401
    except ImportError as error:
        raise InputError(f"tags cannot be read ({error}); run: {install_command('tags')}") from None


def read_tags(path: str) -> dict[str, str | float]:
    """Return the tags of an audio file that trainers use; none if it has no readable tags."""
    from tinytag import TinyTag

    # Damaged tags raise any kind of error. The audio may be sound.
    with suppress(Exception), open_regular(Path(path)) as file:
        source: Any = _TagFile(file)
        tags = TinyTag.get(filename=path, file_obj=source, duration=False)
        found: dict[str, Any] = {name: values[0] for name, values in tags.other.items() if values}
        found |= {name: getattr(tags, name) for name in TAGS if hasattr(tags, name)}
        found |= {"date": tags.year, "label": found.get("label") or found.get("publisher")}
        return _usable_fields({name: found[name] for name in TAGS if name in found})
    return {}
