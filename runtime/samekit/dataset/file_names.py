"""The names of the files in an output folder."""

from __future__ import annotations

import re
from typing import Final

STATE_FOLDER: Final = ".samekit"
"""Folder of manifest, lock and report, in the output."""
SILENCE_FILE: Final = "silence.npy"
"""The latents of silence, `[1, latent_width, latents of sample_size]`."""
# Of a clip's number in the names of its files.
_DIGITS: Final = 12


def clip_name(number: int) -> str:
    """Name of a clip's files, without the suffix."""
    return f"{number:0{_DIGITS}d}"


def is_clips(name: str) -> bool:
    """Whether a file's name is one that a run may give: any `.npy`, and `.json` after a clip's number."""
    return name.endswith(".npy") or re.fullmatch(rf"\d{{{_DIGITS}}}\.json", name) is not None
