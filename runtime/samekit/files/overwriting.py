"""Refuse outputs that would replace their own input, or the recording that latents were made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from samekit.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping

_SOURCE_FIELDS: Final = ("source", "path")
"""Fields of a `.json` that name the recording: `encode` writes the first, `pre-encode` the second.

Both are checked, because a field `source` may also come from the caption of a clip.
"""


def require_other_file(output: str | os.PathLike[str], source: str | os.PathLike[str]) -> None:
    """Raise OutputError if the output is the input itself, by the same or another name or through a link."""
    if _is_same(Path(output), Path(source)):
        raise OutputError(f"{output}: is the input itself; choose another name for the output")


def require_no_recording(
    audio_path: str | os.PathLike[str], latents_path: str | os.PathLike[str], metadata: Mapping[str, Any]
) -> None:
    """Refuse to decode onto the recording that the latents were made of, or onto a file that may be it.

    Args:
        audio_path: the output.
        latents_path: the latents.
        metadata: the contents of the `.json` beside them.

    Raises:
        OutputError: the output is the recording that the `.json` names. Or that recording is missing, and the output
            exists under its name.
    """
    output, latents = Path(audio_path), Path(latents_path)
    if not os.path.exists(output):
        return
    for name in _SOURCE_FIELDS:
        if isinstance(value := metadata.get(name), str):
            _require_not(Path(value), output, latents)


def _require_not(source: Path, output: Path, latents: Path) -> None:
    """Raise OutputError if the output is, or may be, the recording `source`, which the `.json` of latents names."""
    described = latents.with_suffix(".json")
    # samekit writes absolute paths. A relative one counts from a folder that is not recorded, so two are tried.
    found = [path for path in (source, latents.parent / source) if os.path.exists(path)]
    if any(_is_same(output, path) for path in found):
        problem = f"is the recording that {described} names as the source of these latents"
    # Some file systems ignore the case of letters in names.
    elif not found and output.name.casefold() == source.name.casefold():
        problem = f"may be the recording {source}, which {described} names and which is not there"
    else:
        return
    raise OutputError(f"{output}: {problem}; choose another name, or pass --force (from Python: force=True)")


def _is_same(output: Path, source: Path) -> bool:
    """Return whether two names lead to one file, also through links."""
    try:
        return output.samefile(source)
    except (OSError, ValueError):
        # A file does not exist, or its name is not possible.
        return False
