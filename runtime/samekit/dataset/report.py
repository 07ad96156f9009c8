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
    from collections.abc import Sequence

    from samekit.dataset.options import Settings

# Workers and clips that a sentence names.
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
        # Before the first clip is encoded, there is no estimate.
        known = self.audio_seconds > 0 and self.done < self.total
        left = f"{describe_seconds(self.remaining)} left, " if known else ""
        return (
            f"{self.done} of {_clips(self.total)}, {self.audio_seconds:.0f} s of audio at "
            f"{self.speed:.1f} x real time, {left}{self.bad} bad"
        )


def describe_seconds(seconds: float) -> str:
    """Return a time as hours, minutes and seconds, such as `0:00:02`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _counted_json(result: Plan | PreEncodeReport) -> str:
    """Return the fields as JSON in one line, with the length of each list instead of its items."""
    fields = dataclasses.asdict(result)
    return json.dumps({name: len(value) if isinstance(value, list) else value for name, value in fields.items()})


def _clips(number: int) -> str:
    return f"{number} clip{'s' * (number != 1)}"


def _clips_that_left(relpaths: Sequence[str]) -> str:
    """Return the number and the first names of clips that left the dataset."""
    shown = [*relpaths[:_MOST_NAMES], *["..."] * (len(relpaths) > _MOST_NAMES)]
    return f"{_clips(len(relpaths))} that left the dataset ({', '.join(shown)})"


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    folder: str
    """Folder or URL of the latents."""
    clips: int
    """Clips of the dataset, or of the shard."""
    due: int
    """Clips that would be encoded."""
    unknown: int
    """Clips of `due` whose headers give no length, or cannot be read."""
    audio_seconds: float
    """Seconds of audio that would be encoded, without clips of unknown length."""
    estimated_seconds: float
    """Time to encode them, according to the speed of one window on this machine."""
    gone: list[str]
    """Relpaths of clips that left the dataset and whose latents would stay."""
    pruned: list[str]
    """Relpaths of clips that left the dataset and whose latents would be removed."""

    def to_json(self) -> str:
        """Return all fields as JSON in one line, with the length of each list instead of its items."""
        return _counted_json(self)

    def summary(self) -> str:
        """Return one sentence for the terminal."""
        unknown = f", and {self.unknown} of unknown length" if self.unknown else ""
        gone = f"; latents of {_clips_that_left(self.gone)} would stay; --prune removes them" if self.gone else ""
        if self.pruned:
            gone += f"; latents of {_clips_that_left(self.pruned)} would be removed"
        return (
            f"{self.folder}: {self.due} of {_clips(self.clips)} would be encoded, "
            f"{self.audio_seconds / 3600:.2f} hours of audio{unknown}, "
            f"in about {describe_seconds(self.estimated_seconds)}{gone}; nothing was written"
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
    gone: list[str]
    """Relpaths of clips that left the dataset and whose latents stay."""
    pruned: int
    """Clips that left the dataset and whose latents this run removed."""
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
        return _counted_json(self)

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
        audio = ""
        if self.encoded:
            speed = self.audio_seconds / self.elapsed if self.elapsed else 0.0
            audio = f", {self.audio_seconds:.1f} s of audio in {self.elapsed:.1f} s ({speed:.1f} x real time)"
        gone = f", and latents of {_clips_that_left(self.gone)}; --prune removes them" if self.gone else ""
        if self.pruned:
            gone += f"; removed the latents of {_clips(self.pruned)} that left the dataset"
        left_out = Found([], Counter(self.passed_over), self.unreadable_folders).describe_left_out("; ")
        return (
            f"{self.folder}: {_clips(self.clips)} ({counts}){gone}; this run encoded {self.encoded}{audio}"
            f"{self._describe_workers()}{left_out}"
        )

    def _describe_workers(self) -> str:
        """Return the number of worker processes, or their names and clips if those are few."""
        if len(self.workers) > _MOST_NAMES:
            return f", on {len(self.workers)} workers"
        return "".join(f"; {name}: {_clips(clips)}" for name, clips in self.workers.items())
