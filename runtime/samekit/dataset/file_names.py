"""The names of the files in an output folder."""

from __future__ import annotations

import re
from typing import Final

STATE_FOLDER: Final = ".samekit"
"""Folder of the manifest, the lock and the report, inside the output."""
SILENCE_FILE: Final = "silence.npy"
"""The latents of silence, `[1, latent_width, latents of sample_size]`."""
_DIGITS: Final = 12


def clip_name(number: int) -> str:
    """Return the name, without the suffix, of the files of a clip."""
    return f"{number:0{_DIGITS}d}"


def is_clip_file(name: str) -> bool:
    """Return whether a file may belong to a dataset: any `.npy`, and a `.json` with the name of a clip."""
    return name.endswith(".npy") or re.fullmatch(rf"\d{{{_DIGITS}}}\.json", name) is not None
