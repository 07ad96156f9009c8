"""The progress and the report of a pre-encoding run."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from samekit.dataset.options import TRAINING_SAMPLES
from samekit.dataset.sources import Found

if TYPE_CHECKING:
    from samekit.dataset.options import Settings

# Workers that the summary names.
_MOST_NAMES: Final = 8


@dataclass(frozen=True)
class Progress:
    """The progress of a run."""

    done: int
    """Clips that are encoded or could not be encoded, with those of earlier runs."""
    total: int
    """Clips of the dataset, or of the shard."""
    bad: int
    """Clips that this run could not encode."""
    audio_seconds: float
    """Seconds of audio that this run encoded."""
    elapsed: float
    """Seconds since the start of encoding."""
    earlier: int = 0
    """Clips of `done` that earlier runs have finished."""

    @property
    def speed(self) -> float:
        """Seconds of audio that are encoded in a second: a multiple of real time."""
        return self.audio_seconds / max(self.elapsed, 1e-9)

    @property
    def remaining(self) -> float:
        """Estimated seconds until the end."""
        return self.elapsed / max(self.done - self.earlier, 1) * (self.total - self.done)

    def describe(self) -> str:
        """Return the progress as one line of text."""
        minutes, seconds = divmod(round(self.remaining), 60)
        hours, minutes = divmod(minutes, 60)
        # Before the first clip is encoded, there is no estimate.
        known = self.audio_seconds > 0 and self.done < self.total
        left = f"{hours}:{minutes:02d}:{seconds:02d} left, " if known else ""
        return (
            f"{self.done} of {self.total} clips, {self.audio_seconds:.0f} s of audio at "
            f"{self.speed:.1f} x real time, {left}{self.bad} bad"
        )


@dataclass(frozen=True)
class PreEncodeReport:
    """What a run did, and what the folder holds now."""

    folder: str
    """Folder or URL of the latents."""
    clips: int
    """Clips of the dataset, or of the shard."""
    encoded: int
    """Clips that this run encoded."""
    unchanged: int
    """Clips that an earlier run encoded or found to be bad."""
    statuses: dict[str, int]
    """Status -> number of clips, after this run."""
    bad: list[dict[str, Any]]
    """number, relpath, status and reason of each clip without latents of its present files."""
    gone: int
    """Clips that left the dataset and whose latents stay."""
    passed_over: dict[str, int]
    """Suffix in lower case -> number of files that are neither audio nor a caption, in all shards together."""
    unreadable_folders: list[str]
    """Relpaths of dataset folders that this process may not list."""
    workers: dict[str, int]
    """Clips that each worker process encoded in this run; empty if this process encoded them."""
    cut: int
    """Clips that are longer than `sample_size`, of which a part was encoded."""
    audio_seconds: float
    """Seconds of audio that this run encoded."""
    elapsed: float
    """Seconds from the first clip to the last."""

    def to_json(self) -> str:
        """Return all fields as JSON in one line, with the length of each list instead of its items."""
        fields = dataclasses.asdict(self)
        return json.dumps({name: len(value) if isinstance(value, list) else value for name, value in fields.items()})

    def folder_json(self, settings: Settings) -> bytes:
        """Return the contents of `report.json`: the fields that describe the folder, not this run."""
        names = ("clips", "statuses", "gone", "passed_over", "unreadable_folders", "cut", "bad")
        fields = {"settings": dataclasses.asdict(settings), **{name: getattr(self, name) for name in names}}
        return f"{json.dumps(fields, indent=2)}\n".encode("ascii")

    def cut_notice(self, sample_size: int) -> str | None:
        """Return one sentence about clips that were cut to `sample_size` samples; None if there are none."""
        if not self.cut:
            return None
        clips = f"{self.cut} of {self.clips} clips are longer than --sample_size and were cut"
        more = f", or --sample_size {TRAINING_SAMPLES} for the 380 s that training uses"
        return f"{clips}; to keep more, pass --full{more if sample_size < TRAINING_SAMPLES else ''}"

    def summary(self) -> str:
        """Return one sentence for the terminal."""
        counts = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        speed = self.audio_seconds / self.elapsed if self.elapsed else 0.0
        gone = f", and latents of {self.gone} clips that are gone" if self.gone else ""
        left_out = Found([], Counter(self.passed_over), self.unreadable_folders).describe_left_out("; ")
        return (
            f"{self.folder}: {self.clips} clips ({counts}){gone}; this run encoded {self.encoded}, "
            f"{self.audio_seconds:.1f} s of audio in {self.elapsed:.1f} s ({speed:.1f} x real time)"
            f"{self._describe_workers()}{left_out}"
        )

    def _describe_workers(self) -> str:
        """Return the number of worker processes, or their names and clips if those are few."""
        if len(self.workers) > _MOST_NAMES:
            return f", on {len(self.workers)} workers"
        return "".join(f"; {name}: {clips} clips" for name, clips in self.workers.items())
