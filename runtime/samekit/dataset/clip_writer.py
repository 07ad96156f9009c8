"""Write complete clips in groups.

    complete clips -> a group -> all files of the group are in the output -> `finished`, which records the group

While a group is written, the encoder completes the clips of the next one.

Waiting for a disk costs about the same for one clip and for many. If the process or the machine stops, the clips of the
last group are not recorded, so the next run encodes them again.
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from samekit.dataset.bad_clip import BadClipError
from samekit.errors import InputError, OutputError
from samekit.files.pairs import Pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from samekit.arrays import Array
    from samekit.dataset.output import GroupLimits
    from samekit.dataset.pipeline import Job, Outcome


@dataclass(frozen=True)
class CompleteClip:
    """A clip that was encoded or has failed."""

    outcome: Outcome
    windows: Sequence[Array]
    """Latents, `[width, latents]`, in the dtype of the file; they follow each other in time. Empty if it has failed."""

    @property
    def size(self) -> int:
        """Bytes of the latents, without padding."""
        return sum(window.nbytes for window in self.windows)


class CompleteClips(queue.Queue["CompleteClip | None"]):
    """Clips that wait for the writer, and None behind the last one. It is full when it holds a group."""

    def __init__(self, limits: GroupLimits) -> None:
        super().__init__(limits.size)
        self._least = max(1, limits.size // limits.clips)
        self._filled = 0

    def _qsize(self) -> int:
        """Return how full the queue is: the bytes of the clips, where a short clip counts as its share of a group."""
        return self._filled

    def _put(self, item: CompleteClip | None) -> None:
        self._filled += self._share(item)
        super()._put(item)

    def _get(self) -> CompleteClip | None:
        item = super()._get()
        self._filled -= self._share(item)
        return item

    def _share(self, item: CompleteClip | None) -> int:
        return max(self._least, item.size if item else 0)


def groups_of(complete: queue.Queue[CompleteClip | None], limits: GroupLimits) -> Iterator[list[CompleteClip]]:
    """Yield the clips of a queue in groups, until the queue yields None."""
    clip: CompleteClip | None
    while clip := complete.get():
        group, size = [clip], clip.size
        due = time.monotonic() + limits.seconds
        while len(group) < limits.clips and size < limits.size:
            try:
                clip = complete.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                break
            if clip is None:
                yield group
                return
            group.append(clip)
            size += clip.size
        yield group


@dataclass
class ClipWriter:
    """Writes groups of clips."""

    job: Job
    write_pairs: Callable[[Sequence[Pair]], None]
    """Writes the files of clips durably; raises OutputError if it cannot write all of them."""
    finished: Callable[[Sequence[Outcome]], None]
    """Called with the outcomes of each group, when its files are in the output."""

    def write(self, group: Sequence[CompleteClip]) -> None:
        """Write the files of a group, and report its outcomes.

        Raise OutputError if the output is full or cannot be written. The clips before the failing one are finished.
        """
        results = [self._files(clip) for clip in group]
        try:
            self.write_pairs([pair for _, pair in results if pair])
        except OutputError:
            if len(group) == 1:
                raise
            # One clip at a time, so that the clips before the one that cannot be written are recorded.
            for clip in group:
                self.write([clip])
            return
        self.finished([outcome for outcome, _ in results])

    def _files(self, clip: CompleteClip) -> tuple[Outcome, Pair | None]:
        """Return the outcome of a clip, and its files unless it has failed."""
        outcome, job = clip.outcome, self.job
        if outcome.clip is None:
            return outcome, None
        windows, task = list(clip.windows), outcome.task
        if job.silence is not None:
            windows.append(job.silence[:, outcome.clip.extent.computed :])
        latents = windows[0] if len(windows) == 1 else np.concatenate(windows, axis=1)
        metadata = outcome.clip.metadata(task.source, job.rules)
        try:
            return outcome, Pair.of(task.target, latents, metadata, job.options.dtype, replaces=task.replaces)
        except InputError as error:
            return replace(outcome, clip=None, bad=BadClipError("failed", str(error))), None
