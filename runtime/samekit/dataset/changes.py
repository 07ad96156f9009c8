"""Tell whether the files of a clip have changed: by identity, or by the SHA-256 of their contents.

`samekit.files.paths.file_signature` gives only size and modification time, which a program can set back.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from samekit.dataset.captions import captions_sha256
from samekit.files.paths import file_signature, open_regular

if TYPE_CHECKING:
    from samekit.dataset.manifest import Row
    from samekit.dataset.sources import Source


def file_identity(path: Path) -> tuple[int, ...]:
    """Return values that change whenever a file is written or replaced, even if its modification time is set back."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged_row(row: Row, source: Source) -> Row | None:
    """Return a row with the present sizes, times and digests, or None if the contents of a file have changed."""
    path = Path(source.path)
    try:
        sha256 = sha256_of(path) if source.audio else None
        caption_sha256 = captions_sha256([(file.source, sha256_of(Path(file.path))) for file in source.captions])
    except OSError:
        return None
    # If a file has changed since its folder was listed, the digest may be that of contents that were never encoded.
    files = [(path, source.audio), *((Path(file.path), file.stamp) for file in source.captions)]
    if any(file_signature(file) != stamp for file, stamp in files):
        return None
    # Where the last run computed no digest, size and time decide.
    same_audio = row.audio == source.audio if row.sha256 is None else row.sha256 == sha256
    if row.caption_sha256 is None:
        same_captions = row.captions == source.caption_stamps
    else:
        same_files = [stamp[0] for stamp in row.captions] == [file.source for file in source.captions]
        same_captions = same_files and row.caption_sha256 == caption_sha256
    if not (same_audio and same_captions):
        return None
    return dataclasses.replace(
        row, audio=source.audio, captions=source.caption_stamps, sha256=sha256, caption_sha256=caption_sha256
    )
