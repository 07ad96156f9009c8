"""The names of the files in an output folder."""

from __future__ import annotations

import os
import re
import unicodedata
from typing import TYPE_CHECKING, Final, Literal

from samekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

Layout = Literal["numbered", "mirror"]
"""Names of a clip's files: `NNNNNNNNNNNN.npy` as in the reference, or `sub/clip.npy` for `sub/clip.wav`."""
STATE_FOLDER: Final = ".samekit"
"""Folder of the manifest, the lock and the report, inside the output."""
SILENCE_FILE: Final = "silence.npy"
"""The latents of silence, `[1, latent_width, latents of sample_size]`."""
_DIGITS: Final = 12
_MOST_NAME_BYTES: Final = 255


def clip_name(number: int) -> str:
    """Return the name, without the suffix, of the files of a clip in the numbered layout."""
    return f"{number:0{_DIGITS}d}"


def is_clip_file(name: str) -> bool:
    """Return whether a file may belong to a dataset: any `.npy`, and a `.json` with the name of a clip."""
    return name.endswith(".npy") or re.fullmatch(rf"\d{{{_DIGITS}}}\.json", name) is not None


def mirrored_name(relpath: str) -> str:
    """Return the name, without the suffix, of the files of a clip in the mirror layout: `sub/clip` for `sub/clip.wav`.

    Raises:
        ValueError: training would not find such files, or they could not be written.
    """
    name = os.path.splitext(relpath)[0].replace(os.sep, "/")
    *folders, stem = name.split("/")
    if os.path.isabs(relpath) or ".." in folders:
        raise ValueError("it leads out of the folder")
    if stem.startswith(".") or name.casefold().startswith(f"{STATE_FOLDER}/"):
        raise ValueError("training skips hidden files")
    if stem.casefold() == "silence":
        raise ValueError(f"the name {SILENCE_FILE} means the latents of silence")
    if name.startswith("filelist.txt/"):
        raise ValueError("training reads a file of the name filelist.txt")
    # The reference finds the metadata by replacing each `.npy` in the path with `.json`.
    if ".npy" in name or any(folder.endswith(".json") for folder in folders):
        raise ValueError("training takes .npy in a path for the suffix of latents")
    if len(os.fsencode(f"{stem}.json")) > _MOST_NAME_BYTES:
        raise ValueError("the name is too long")
    return name


def mirrored_key(name: str) -> str:
    """Return a text that is equal for mirrored names that some disks do not tell apart.

    These disks ignore the case or the Unicode normal form.
    """
    return (
        name.lower() if name.isascii() else unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    )


def require_distinct(relpaths: Iterable[str]) -> None:
    """Raise InputError if clips cannot have files of their own in the mirror layout."""
    seen: dict[str, str] = {}
    for relpath in relpaths:
        try:
            key = mirrored_key(mirrored_name(relpath))
        except ValueError as error:
            raise InputError(f"{relpath}: {error}; rename it, or pass --layout numbered") from None
        if key in seen:
            raise InputError(
                f"{seen[key]} and {relpath} would have the same files in the mirror layout; rename one, or pass "
                "--layout numbered"
            )
        seen[key] = relpath
