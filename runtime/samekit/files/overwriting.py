"""Refuse outputs that would replace what they are made of: inputs themselves, and recordings of which latents tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from samekit.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping

_SOURCE_FIELDS: Final = ("source", "path")
"""Where the `.json` beside latents names the recording: of `encode`, and of `pre-encode`."""


def require_other_file(output: str | os.PathLike[str], source: str | os.PathLike[str]) -> None:
    """Refuse an output that is its own input, by whatever name or link.

    Raises:
        OutputError: they are one file.
    """
    if _is_same(Path(output), Path(source)):
        raise OutputError(f"{output}: is the input itself; choose another name for the output")


def require_no_recording(
    audio_path: str | os.PathLike[str], latents_path: str | os.PathLike[str], metadata: Mapping[str, Any]
) -> None:
    """Refuse to decode onto the recording that the latents were made of, or onto one that may be it.

    Args:
        audio_path: the output.
        latents_path: the latents.
        metadata: what the `.json` beside them holds.

    Raises:
        OutputError: the output exists and is the recording that the `.json` names, or it has the name of that
            recording, which is not at its place any more.
    """
    output, latents = Path(audio_path), Path(latents_path)
    if not _is_there(output):
        return
    told = latents.with_suffix(".json")
    source = next((Path(value) for name in _SOURCE_FIELDS if isinstance(value := metadata.get(name), str)), None)
    if source is None:
        return
    # Absolute in what is written today. A relative path counts from where `encode` ran, which is not recorded.
    found = [place for place in (Path.cwd() / source, latents.absolute().parent / source) if _is_there(place)]
    if any(_is_same(output, place) for place in found):
        problem = f"is the recording that {told} names as the source of these latents"
    elif not found and _alike(output.name, source.name):
        problem = f"may be the recording {source}, which {told} names and which is not there"
    else:
        return
    raise OutputError(f"{output}: {problem}; choose another name, or pass --force (from Python: force=True)")


def _is_there(path: Path) -> bool:
    """Whether there is such a file; names of unknown origin may be ones that no file can have."""
    return os.path.exists(path)  # noqa: PTH110 Path.exists raises for some of them


def _is_same(output: Path, source: Path) -> bool:
    """Whether two names lead to one file; links of both kinds do, and so do names in other letters on some systems."""
    try:
        return output.samefile(source)
    # One is not there, or cannot be a name.
    except (OSError, ValueError):
        return False


def _alike(name: str, other: str) -> bool:
    """Whether two names are the same on systems that ignore the case of letters."""
    return name.casefold() == other.casefold()
