"""Encode a dataset of audio files with captions into the latents that the training code of Stable Audio 3 reads.

    sources -> manifest (numbers) -> executor (reads, encodes and writes what is new or changed) -> report

The latents are those of the reference, which pads each clip with zeros to `sample_size`, encodes it, and keeps the
latents of the clip. samekit encodes only as many zeros as influence the latents of the clip.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from samekit.backends.cpu import available_cpus
from samekit.dataset.changes import unchanged_row
from samekit.dataset.clip import CuttingRules, expected_extent
from samekit.dataset.dataset import Dataset
from samekit.dataset.executor import Executor, LocalExecutor, default_readers
from samekit.dataset.file_names import SILENCE_FILE, STATE_FOLDER, mirrored_key, mirrored_name
from samekit.dataset.manifest import Manifest, Row
from samekit.dataset.options import PreEncodeOptions
from samekit.dataset.pipeline import Job, Outcome, Task
from samekit.dataset.report import Plan, PreEncodeReport, Progress
from samekit.engine.spec import ENCODER
from samekit.errors import InputError
from samekit.files.pairs import DTYPES, npy_header, stored_values

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from typing import Self

    from samekit.arrays import Array
    from samekit.dataset.clip import Extent
    from samekit.dataset.sources import Source
    from samekit.model import AutoencoderModel

# Clips with such a status are tried again, because they may succeed although their files have not changed.
_RETRIED: Final = ("unreadable", "failed", "gone")


def pre_encode(
    model: AutoencoderModel | Executor,
    data_dir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_path: str | os.PathLike[str],
    options: PreEncodeOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> PreEncodeReport:
    """Encode every clip of a dataset that is not encoded yet.

    Writes for each clip `NNNNNNNNNNNN.npy`, `[latent_dim, latents]`, and `NNNNNNNNNNNN.json`; also `silence.npy`,
    `[1, latent_dim, latents of sample_size]`, and the manifest and report in `.samekit/`. In the mirror layout, the
    files of `sub/clip.wav` are `sub/clip.npy` and `sub/clip.json`. Call it again to complete a run that was stopped.

    Args:
        model: an open model, a `samekit.dataset.DevicesExecutor` to encode on several GPUs of this machine, or a
            `samekit.dataset.RayExecutor` to encode on a cluster.
        data_dir: one or several folders with audio files, at any depth, each with a caption of the same name in
            `.json` or `.txt`, see `samekit.dataset.captions`. A `filelist.txt` at the root of a folder names the files
            to take.
        output_path: folder for the latents, or a URL that fsspec opens. All its latents must have the same model and
            settings.
        options: `PreEncodeOptions()` if not given.
        progress: called for each clip when its group of clips is recorded, possibly in another thread.

    Returns:
        The results of the run. Those that describe the folder are also in `.samekit/report.json`.

    Raises:
        InputError: there is no audio or no caption, or a list of files cannot be used. Two clips would have the same
            files. The output is a data folder or holds latents of other settings. A clip is bad, and `options.strict`
            is set.
        OutputError: the folder cannot be written or is full, or another process is writing into it.
        BackendError: the backend failed.
    """
    if not isinstance(model, Executor):
        with closing(LocalExecutor(model.autoencoder)) as executor:
            return pre_encode(executor, data_dir, output_path, options, progress)
    options = options or PreEncodeOptions()
    dataset = Dataset.find(model.facts, data_dir, output_path, options)
    sources, shard, output = dataset.sources, options.shard, dataset.output
    with output.locked(shard, options.layout):
        run = _Run.read(model, options, dataset, progress)
        with run.manifest.writing() as manifest:
            run.mark_gone()
            run.encode([source for source in sources.values() if run.is_due(source)])
        report = run.report()
        output.put(f"{STATE_FOLDER}/{shard.report}", report.folder_json(manifest.settings))
    if options.strict and report.bad:
        first = report.bad[0]["reason"]
        kinds = ", ".join(f"{n} {status}" for status, n in sorted(Counter(row["status"] for row in report.bad).items()))
        raise InputError(
            f"{len(report.bad)} of {len(sources)} clips are bad ({kinds}), first: {first}; "
            f"{output}/{STATE_FOLDER}/{shard.report} lists them"
        )
    return report


def plan(
    model: AutoencoderModel,
    data_dir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_path: str | os.PathLike[str],
    options: PreEncodeOptions | None = None,
) -> Plan:
    """Return what `pre_encode` would do with the same arguments, without writing anything.

    Lengths come from the headers of the audio files. The time is estimated from the speed of this model for one window.

    Raises:
        InputError: as `pre_encode`.
        BackendError: the backend failed.
    """
    options = options or PreEncodeOptions()
    with closing(LocalExecutor(model.autoencoder)) as executor:
        dataset = Dataset.find(executor.facts, data_dir, output_path, options)
        sources = dataset.sources
        run = _Run.read(executor, options, dataset)
        due = [source for source in sources.values() if run.is_due(source)]
        extents = run.expected_extents(due)
        kept, gone = run.left()
        spec = dataset.spec
        each = spec.hop / spec.sample_rate
        sequences = sum(extent.sequence for extent in extents)
        return Plan(
            folder=str(dataset.output),
            clips=len(sources),
            due=len(due),
            unknown=sum(not extent.latents for extent in extents),
            audio_seconds=round(sum(extent.latents for extent in extents) * each, 1),
            estimated_seconds=round(sequences * each / _encoder_speed(model), 3) if sequences else 0.0,
            gone=[row.relpath for row in kept],
            pruned=[row.relpath for row in gone if run.has_latents(row)],
        )


def _encoder_speed(model: AutoencoderModel) -> float:
    """Return how many seconds of audio the encoder computes in a second, measured on one window."""
    inner, spec = model.autoencoder, model.spec
    window = np.zeros((1, spec.channels, spec.samples(inner.windows(ENCODER).size)), np.float32)
    times = []
    # The first call opens the graph.
    for _ in range(2):
        start = time.perf_counter()
        inner.backend.encode(window)
        times.append(time.perf_counter() - start)
    return window.shape[-1] / spec.sample_rate / max(min(times), 1e-9)


@dataclass
class _Run:
    """One run over a dataset while its output is locked, or the plan of one."""

    executor: Executor
    options: PreEncodeOptions
    dataset: Dataset
    manifest: Manifest
    progress: Callable[[Progress], None] | None

    @classmethod
    def read(
        cls,
        executor: Executor,
        options: PreEncodeOptions,
        dataset: Dataset,
        progress: Callable[[Progress], None] | None = None,
    ) -> Self:
        """Read the manifest; raises InputError as `pre_encode`."""
        output, settings, sources = dataset.output, dataset.settings, dataset.sources
        manifest = Manifest.read(output, options.shard, settings, sources, reencode=options.reencode)
        if options.prune:
            dataset.require_visible(relpath for relpath, row in manifest.rows.items() if row.status == "encoded")
        return cls(executor, options, dataset, manifest, progress)

    def __post_init__(self) -> None:
        facts = self.executor.facts
        self._layout = self.options.layout
        self._output = self.dataset.output
        self._rules = CuttingRules(facts.spec, facts.windows, self.options.cut, self._layout)
        self._files = self._output.names() if self._layout == "numbered" else self._output.tree()
        names = map(mirrored_name, self.dataset.sources) if self._layout == "mirror" else ()
        self._taken = set(map(mirrored_key, names))
        # Failed attempts to encode clips whose earlier latents stay.
        self._failed_attempts: list[Row] = []
        # Clips that left the dataset and whose latents were removed.
        self._pruned = 0
        self._workers: Counter[str] = Counter()
        self._start = time.perf_counter()
        self._state = Progress(0, 0, 0, 0.0, 0.0)

    def is_due(self, source: Source) -> bool:
        """Return whether a clip is new, changed, incomplete, or worth another attempt."""
        row = self.manifest.rows[source.relpath]
        if row.status is None or row.status in _RETRIED:
            return True
        if row.status == "encoded" and not self._has_files(row):
            return True
        if row.status == "no_caption" and "tags" in self.options.captions:
            # Tags are in the audio file, so no change of a caption file shows that they may be read now.
            return True
        if not self.options.checksum:
            return (row.audio, row.captions) != (source.audio, source.caption_stamps)
        seen = unchanged_row(row, source)
        if seen and seen != row:
            self.manifest.record(seen)
        return seen is None

    def left(self) -> tuple[list[Row], list[Row]]:
        """Return the rows of clips that left the dataset: those that keep their latents, and those that do not.

        A clip keeps them if both files are there, of these settings, and it is not pruned.
        """
        kept: list[Row] = []
        gone: list[Row] = []
        for row in self.manifest.rows.values():
            if row.relpath not in self.dataset.sources and row.status in (None, "encoded"):
                keeps = row.status == "encoded" and not self.options.prune and self._has_files(row)
                (kept if keeps and self.has_latents(row) else gone).append(row)
        return kept, gone

    def has_latents(self, row: Row) -> bool:
        """Return whether there are latents of a clip that left the dataset."""
        # In the mirror layout, another clip may have taken its name.
        return row.files(self._layout)[1] in self._files and mirrored_key(row.name(self._layout)) not in self._taken

    def mark_gone(self) -> None:
        """Remove the latents of clips that left the dataset and do not keep them."""
        _, gone = self.left()
        self._pruned = sum(map(self.has_latents, gone))
        self._remove_files(gone)
        for row in gone:
            self.manifest.record(dataclasses.replace(row, status="gone"))

    def _has_files(self, row: Row) -> bool:
        return self._files.issuperset(row.files(self._layout))

    def encode(self, due: list[Source]) -> None:
        """Encode the clips that are due, and the silence if it is missing."""
        options, total = self.options, len(self.dataset.sources)
        silence = self._silence(needed=options.pad and bool(due))
        earlier = total - len(due)
        self._state = dataclasses.replace(self._state, done=earlier, total=total, earlier=earlier)
        if options.batch_size > 1:
            due = self._sorted_by_length(due)
        tasks = [self._task(source) for source in due]
        if tasks:
            self._start = time.perf_counter()
            self.executor.encode(Job(self._rules, options, silence, self._output), tasks, self._finished)

    def _task(self, source: Source) -> Task:
        metadata, latents = self.manifest.rows[source.relpath].files(self._layout)
        return Task(source, latents, replaces=metadata in self._files)

    def expected_extents(self, due: list[Source]) -> list[Extent]:
        """Return the lengths of clips according to their headers."""
        with ThreadPoolExecutor(self.options.readers or default_readers(available_cpus(), "cpu")) as pool:
            return list(pool.map(partial(expected_extent, rules=self._rules), due))

    def _sorted_by_length(self, due: list[Source]) -> list[Source]:
        """Sort clips by length, so that clips of one length share a batch."""
        pairs = zip(self.expected_extents(due), due, strict=True)
        return [source for _, source in sorted(pairs, key=lambda pair: pair[0].sequence)]

    def _silence(self, *, needed: bool) -> Array | None:
        """Write `silence.npy` if it is missing or wrong; return its latents if clips are padded with them."""
        shape, dtype = (1, self._rules.spec.latent_width, self._rules.limit), DTYPES[self.options.dtype]
        header = npy_header(dtype, shape)
        size = len(header) + math.prod(shape) * dtype.itemsize
        missing = self.options.shard.is_written_here(SILENCE_FILE) and not self._has_silence(header, size)
        if not needed and not missing:
            return None
        latents = self.executor.silence(self._rules.limit)
        if missing:
            data = stored_values(f"{self._output}/{SILENCE_FILE}", latents, dtype)
            self._output.put(SILENCE_FILE, header + data.tobytes())
        return latents if needed else None

    def _has_silence(self, header: bytes, size: int) -> bool:
        """Return whether there is a `silence.npy` of these settings, with this header and size."""
        # Before a clip of these settings was encoded, the file may be of other settings.
        if all(row.status in (None, "gone") for row in self.manifest.rows.values()):
            return False
        try:
            return (
                SILENCE_FILE in self._files
                and self._output.size(SILENCE_FILE) == size
                and self._output.get(SILENCE_FILE, len(header)) == header
            )
        except InputError:
            return False

    def _finished(self, outcomes: Sequence[Outcome]) -> None:
        """Record the outcomes of a group of clips, then show the progress."""
        rows = [self._record(outcome) for outcome in outcomes]
        self.manifest.save()
        for row in rows:
            self._show(row)

    def _record(self, outcome: Outcome) -> Row:
        """Record the outcome of a clip, and return its row."""
        source, clip, bad = outcome.task.source, outcome.clip, outcome.bad
        old = self.manifest.rows[source.relpath]
        row = Row(
            number=old.number,
            relpath=source.relpath,
            status=bad.status if bad else "encoded",
            reason=bad.reason if bad else None,
            audio=source.audio,
            captions=source.caption_stamps,
            sha256=outcome.sha256,
            caption_sha256=outcome.caption_sha256,
            caption_source=clip.caption.source if clip else None,
            latents=clip.extent.latents if clip else 0,
            seconds=clip.kept / self._rules.spec.sample_rate if clip else 0.0,
            cut=clip is not None and clip.kept < clip.samples,
        )
        if bad and bad.transient and old.status == "encoded" and self._has_files(old):
            # The files may be unavailable for a while only, so the earlier latents stay, and the next run tries again.
            self._failed_attempts.append(row)
        else:
            if bad:
                self._remove_files([old])
            self.manifest.record(row)
        if outcome.worker and not bad:
            self._workers[outcome.worker] += 1
        return row

    def _show(self, row: Row) -> None:
        """Add a clip to the progress."""
        state = self._state
        self._state = dataclasses.replace(
            state,
            done=state.done + 1,
            bad=state.bad + (row.status != "encoded"),
            audio_seconds=state.audio_seconds + row.seconds,
            elapsed=time.perf_counter() - self._start,
        )
        if self.progress:
            self.progress(self._state)

    def _remove_files(self, rows: Sequence[Row]) -> None:
        """Remove the files of clips that were there when the run began."""
        # All .json files first, because each call waits for the disk: a .json file never remains without its .npy file.
        for files in zip(*(row.files(self._layout) for row in rows), strict=True):
            self._output.remove(file for file in files if file in self._files)

    def report(self) -> PreEncodeReport:
        """Return the results after the end of the run."""
        found, rows = self.dataset.found, [self.manifest.rows[relpath] for relpath in self.dataset.sources]
        kept, _ = self.left()
        bad = [*(row for row in rows if row.status != "encoded"), *self._failed_attempts]
        bad.sort(key=lambda row: row.number)
        state = self._state
        return PreEncodeReport(
            folder=str(self._output),
            clips=len(rows),
            encoded=state.done - state.earlier - state.bad,
            unchanged=len(rows) - (state.done - state.earlier),
            statuses=dict(Counter(str(row.status) for row in rows)),
            bad=[{name: getattr(row, name) for name in ("number", "relpath", "status", "reason")} for row in bad],
            gone=[row.relpath for row in kept],
            pruned=self._pruned,
            passed_over=dict(sorted(found.passed_over.items())),
            unreadable_folders=sorted(found.unreadable_folders),
            workers=dict(sorted(self._workers.items())),
            cut=sum(row.cut for row in rows),
            audio_seconds=round(state.audio_seconds, 3),
            elapsed=round(time.perf_counter() - self._start, 3) if state.done > state.earlier else 0.0,
        )
