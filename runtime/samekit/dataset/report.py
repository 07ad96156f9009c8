"""The progress of a pre-encoding run and its report."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samekit.dataset.file_names import STATE_FOLDER
from samekit.dataset.sources import Found
from samekit.files.atomic import atomic_path, output_errors

if TYPE_CHECKING:
    from samekit.dataset.manifest import Manifest


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    done: int
    """Clips that were tried."""
    total: int
    """Clips that have to be tried."""
    bad: int
    """Clips that could not be encoded."""
    audio_seconds: float
    """Of the clips that were encoded."""
    elapsed: float
    """Seconds since the first clip was begun."""

    @property
    def speed(self) -> float:
        """Seconds of audio a second."""
        return self.audio_seconds / max(self.elapsed, 1e-9)

    @property
    def remaining(self) -> float:
        """Seconds that the rest will take, if it goes on like this."""
        return self.elapsed / max(self.done, 1) * (self.total - self.done)


@dataclass(frozen=True)
class PreEncodeReport:
    """What a run did, and what the folder holds now."""

    folder: str
    """Where the latents are."""
    clips: int
    """Clips of the dataset, or of the shard of it."""
    encoded: int
    """Encoded by this run."""
    unchanged: int
    """Left as they were: encoded before, or known to be bad."""
    statuses: dict[str, int]
    """How many clips have which status, whichever run found that."""
    bad: list[dict[str, Any]]
    """number, relpath, status and reason of each clip that has no latents, or none of how its files are now."""
    gone: int
    """Clips that were encoded once and are no longer in the dataset; their latents stay."""
    passed_over: dict[str, int]
    """Suffix in lower case -> how many files with it are neither audio nor a caption, in all shards together."""
    unreadable_folders: list[str]
    """Folders of the dataset that this process may not list, by their relpath; what they hold is left out."""
    audio_seconds: float
    """Seconds of audio that this run encoded."""
    elapsed: float
    """Seconds from the first clip to the last."""

    def to_json(self) -> str:
        """Return everything on one line, with the length of each list in its place."""
        fields = dataclasses.asdict(self)
        return json.dumps({name: len(value) if isinstance(value, list) else value for name, value in fields.items()})

    def summary(self) -> str:
        """A sentence for people."""
        counts = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        speed = self.audio_seconds / self.elapsed if self.elapsed else 0.0
        left_out = Found([], Counter(self.passed_over), self.unreadable_folders).describe_left_out("; ")
        return (
            f"{self.folder}: {self.clips} clips ({counts}); this run encoded {self.encoded}, "
            f"{self.audio_seconds:.1f} s of audio in {self.elapsed:.1f} s ({speed:.1f} s/s)"
            f"{left_out}"
        )


def write_report(manifest: Manifest, report: PreEncodeReport) -> None:
    """Write the part of a report that describes the folder, whatever number of runs it took."""
    fields = {"settings": dataclasses.asdict(manifest.settings), "clips": report.clips, "statuses": report.statuses}
    fields |= {"gone": report.gone, "passed_over": report.passed_over, "unreadable_folders": report.unreadable_folders}
    fields |= {"bad": report.bad}
    path = manifest.folder / STATE_FOLDER / manifest.shard.report
    text = json.dumps(fields, indent=2) + "\n"
    with output_errors(path):
        # Links are not followed: the folder may come from anyone, and reading a device never ends.
        written = not path.is_symlink() and path.is_file() and path.read_bytes() == text.encode("ascii")
    if not written:
        with atomic_path(path) as temporary, output_errors(path):
            temporary.write_text(text, encoding="ascii")
