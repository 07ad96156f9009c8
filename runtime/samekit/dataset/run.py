"""Encode a dataset of audio files with captions into the latents that the training code of Stable Audio 3 reads.

    find the clips -> number them (manifest) -> read, encode, write those that are new or changed (encoder) -> report

Numbers, manifest and report are the business of the process that is here; `executor.py` and `ray.py` encode.

The result for a clip is that of the reference: the clip, followed by zeros up to `sample_size`, encoded, and the
latents of the clip kept. But of the zeros only those are encoded that a latent of the clip sees.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samekit.backends.cpu import available_cpus
from samekit.dataset.clip import CuttingRules, digest_of, expected_latents
from samekit.dataset.executor import Executor, LocalExecutor, default_readers
from samekit.dataset.file_names import SILENCE_FILE, STATE_FOLDER
from samekit.dataset.manifest import Manifest, Row, clear_away
from samekit.dataset.options import PreEncodeOptions, Settings
from samekit.dataset.output import find_output
from samekit.dataset.pipeline import Job, Outcome, Task
from samekit.dataset.report import PreEncodeReport, Progress, write_report
from samekit.dataset.sources import Found, Source, find_sources
from samekit.errors import InputError, LatentsFileError
from samekit.files.atomic import atomic_path, output_errors
from samekit.files.latents import map_array
from samekit.files.paths import expanded_text, file_signature

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from samekit.arrays import Array
    from samekit.dataset.output import Output
    from samekit.model import AutoencoderModel
# What is worth trying again although the file has not changed.
_RETRIED: Final = ("unreadable", "failed", "gone")


def pre_encode(
    model: AutoencoderModel | Executor,
    data_dir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_path: str | os.PathLike[str],
    options: PreEncodeOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> PreEncodeReport:
    """Encode every clip of a dataset that is not encoded yet.

    Writes for each clip `NNNNNNNNNNNN.npy`, `[latent_dim, latents]`, and `NNNNNNNNNNNN.json`; `silence.npy`,
    `[1, latent_dim, latents of sample_size]`; and what it has to remember to `.samekit/`. A run that was stopped at any
    moment is completed by calling this again.

    Args:
        model: an open model; or a `samekit.dataset.ray.RayExecutor`, to encode on a cluster.
        data_dir: folder with audio files, at any depth, each with a caption of the same name in `.txt`; or several. A
            `filelist.txt` at its root names the files to take.
        output_path: folder for the latents, or a URL that fsspec knows; one for each model and kind of settings.
        options: how; `PreEncodeOptions()` unless given.
        progress: called after each clip, maybe in another thread.

    Returns:
        What was done; also in `.samekit/report.json`, as far as it describes the folder.

    Raises:
        InputError: there is no audio or no caption, a list of files cannot be used, the output is a data folder or
            holds latents of other settings, or a clip is bad and `options.strict` is set.
        OutputError: the folder cannot be written or is full, or another process is writing into it.
        BackendError: the backend failed.
    """
    options = options or PreEncodeOptions()
    folders = [data_dir] if isinstance(data_dir, (str, os.PathLike)) else list(data_dir)
    folders = [expanded_text(folder) for folder in folders]
    found = find_sources(folders)
    sources = {s.relpath: s for s in found.sources if options.shard.contains(s.relpath)}
    encoder = model if isinstance(model, Executor) else LocalExecutor(model.autoencoder)
    settings, shard, output = _settings(encoder, options), options.shard, find_output(output_path)
    output.require_apart(folders)
    with (
        output.opened(shard) as folder,
        Manifest.open(folder, shard, settings, reencode=options.reencode) as manifest,
    ):
        manifest.assign(sources)
        output.sync_manifest(whole=True)
        run = _Run(encoder, options, manifest, output, progress)
        run.mark_gone(sources)
        run.encode([source for source in sources.values() if run.is_due(source)])
        manifest.rewrite()
        report = run.report(sources, found)
        write_report(manifest, report)
        output.sync_manifest(whole=True)
    if options.strict and report.bad:
        first = report.bad[0]["reason"]
        kinds = ", ".join(f"{n} {status}" for status, n in sorted(Counter(row["status"] for row in report.bad).items()))
        raise InputError(
            f"{len(report.bad)} of {len(sources)} clips are bad ({kinds}), first: {first}; "
            f"{output}/{STATE_FOLDER}/{shard.report} lists them"
        )
    return report


def _settings(encoder: Executor, options: PreEncodeOptions) -> Settings:
    """What decides the latents of a run."""
    return Settings(
        model=encoder.spec.name,
        model_sha256=encoder.spec.source_sha256,
        precision=encoder.precision,
        dtype="float16" if options.float16 else "float32",
        width=encoder.spec.latent_width,
        sample_size=options.sample_size,
        pad=options.pad,
        full=options.full,
        crop=options.crop,
        seed=options.seed if options.crop == "random" else 0,
    )


class _Run:
    """One run over a dataset, while its folder is locked."""

    def __init__(
        self,
        encoder: Executor,
        options: PreEncodeOptions,
        manifest: Manifest,
        output: Output,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._encoder = encoder
        self._options = options
        self._manifest = manifest
        self._output = output
        self._progress = progress
        self._rules = CuttingRules(
            spec=encoder.spec,
            windows=encoder.windows,
            sample_size=options.sample_size,
            pad=options.pad,
            full=options.full,
            crop=options.crop,
            seed=options.seed,
        )
        self._files = output.names()
        # Clips whose earlier latents stay, as they would be recorded.
        self._kept: list[Row] = []
        self._start = time.perf_counter()
        self._state = Progress(0, 0, 0, 0.0, 0.0)

    def is_due(self, source: Source) -> bool:
        """Whether a clip has to be encoded: it is new, it has changed, its files are not there, or it may work now."""
        row = self._manifest.rows[source.relpath]
        if row.status is None or row.status in _RETRIED:
            return True
        if row.status == "encoded" and not self._files.issuperset(row.files):
            return True
        if not self._options.checksum:
            return (row.audio, row.caption) != (source.audio, source.caption)
        return self._have_contents_changed(row, source)

    def _have_contents_changed(self, row: Row, source: Source) -> bool:
        """Whether audio or caption hold something else than what was encoded; records digests that are new."""
        try:
            sha256, caption_sha256 = _digests_of(source)
        except OSError:
            # Encoding the clip will tell what is wrong with its files.
            return True
        # Changed since its folder was listed: the digests may be of contents that have never been encoded.
        if (file_signature(Path(source.path)), file_signature(source.caption_path)) != (source.audio, source.caption):
            return True
        seen = dataclasses.replace(
            row, audio=source.audio, caption=source.caption, sha256=sha256, caption_sha256=caption_sha256
        )
        # Where no digest was asked for before, size and time have to do.
        if (row.audio != seen.audio) if row.sha256 is None else (row.sha256 != seen.sha256):
            return True
        if (row.caption != seen.caption) if row.caption_sha256 is None else (row.caption_sha256 != seen.caption_sha256):
            return True
        if row != seen:
            self._manifest.record(seen)
        return False

    def mark_gone(self, sources: dict[str, Source]) -> None:
        """Give up the clips that have no sound pair of files and will get none: they are not there.

        Where they were never tried under these settings, files under their numbers are of other settings.
        """
        for row in list(self._manifest.rows.values()):
            if row.relpath in sources:
                continue
            if row.status is None or (row.status == "encoded" and not self._files.issuperset(row.files)):
                if not self._files.isdisjoint(row.files):
                    self._remove_pair(row)
                self._manifest.record(dataclasses.replace(row, status="gone"))

    def encode(self, due: list[Source]) -> None:
        """Encode clips, and the silence."""
        options = self._options
        silence = self._silence(needed=options.pad and bool(due))
        self._state = dataclasses.replace(self._state, total=len(due))
        if options.batch_size > 1:
            due = self._by_length(due)
        tasks = [Task(source, f"{self._manifest.rows[source.relpath].name}.npy") for source in due]
        if not tasks:
            return
        job = Job(
            self._rules,
            self._manifest.settings.dtype,
            silence,
            options.batch_size,
            options.readers,
            self._output,
            options.checksum,
        )
        self._start = time.perf_counter()
        self._encoder.encode(job, tasks, self._finished)
        # A worker that was killed may have left some, while others did its work.
        clear_away(self._manifest.folder, self._options.shard)

    def _by_length(self, due: list[Source]) -> list[Source]:
        """Clips of one length side by side, so that they can share a batch."""
        with ThreadPoolExecutor(self._options.readers or default_readers(available_cpus())) as pool:
            lengths = list(pool.map(partial(expected_latents, rules=self._rules), due))
        return [source for _, source in sorted(zip(lengths, due, strict=True), key=lambda pair: pair[0])]

    def _silence(self, *, needed: bool) -> Array | None:
        """Write `silence.npy` if it is not there; its latents, if they are needed to pad clips."""
        path = self._manifest.folder / SILENCE_FILE
        dtype = np.dtype(self._manifest.settings.dtype)
        shape = (1, self._rules.spec.latent_width, self._rules.limit)
        missing = self._options.shard.is_written_here(SILENCE_FILE) and (
            self._fresh() or not _is_array(path, shape, dtype)
        )
        if not needed and not missing:
            return None
        latents = self._encoder.silence(self._rules.limit)
        if missing:
            with atomic_path(path) as temporary, output_errors(path), temporary.open("wb") as file:
                # NumPy writes to an object of Python's through its `write`, whose errors tell that the disk is full.
                np.save(SimpleNamespace(write=file.write), latents[None].astype(dtype))
            self._output.upload(self._manifest.folder, SILENCE_FILE)
        return latents if needed else None

    def _fresh(self) -> bool:
        """Whether nothing was encoded under these settings yet, so that what is there is of other settings."""
        return all(row.status in (None, "gone") for row in self._manifest.rows.values())

    def _finished(self, outcome: Outcome) -> None:
        """Record an outcome."""
        source, clip, bad = outcome.task.source, outcome.clip, outcome.bad
        old = self._manifest.rows[source.relpath]
        kept = bad is not None and bad.transient and old.status == "encoded" and self._files.issuperset(old.files)
        if bad and not kept:
            self._remove_pair(old)
        seconds = clip.kept / self._rules.spec.sample_rate if clip else 0.0
        row = Row(
            number=old.number,
            relpath=source.relpath,
            status=bad.status if bad else "encoded",
            reason=bad.reason if bad else None,
            audio=source.audio,
            caption=source.caption,
            sha256=outcome.sha256,
            caption_sha256=outcome.caption_sha256,
            latents=clip.extent.latents if clip else 0,
            seconds=seconds,
        )
        if kept:
            # A disk that is away for a while costs no latents; the next run tries again.
            self._kept.append(row)
        else:
            self._manifest.record(row)
        self._output.sync_manifest()
        state = self._state
        self._state = dataclasses.replace(
            state,
            done=state.done + 1,
            bad=state.bad + bool(bad),
            audio_seconds=state.audio_seconds + seconds,
            elapsed=time.perf_counter() - self._start,
        )
        if self._progress:
            self._progress(self._state)

    def _remove_pair(self, row: Row) -> None:
        """Remove the latents of a clip that no longer can or will be encoded."""
        for file in row.files:
            self._output.remove(file)

    def report(self, sources: dict[str, Source], found: Found) -> PreEncodeReport:
        """What was done; the run is over."""
        rows = [self._manifest.rows[relpath] for relpath in sources]
        bad = sorted([*(row for row in rows if row.status != "encoded"), *self._kept], key=lambda row: row.number)
        state = self._state
        return PreEncodeReport(
            folder=str(self._output),
            clips=len(rows),
            encoded=state.done - state.bad,
            unchanged=len(rows) - state.done,
            statuses=dict(Counter(str(row.status) for row in rows)),
            bad=[{name: getattr(row, name) for name in ("number", "relpath", "status", "reason")} for row in bad],
            gone=sum(row.status == "encoded" and row.relpath not in sources for row in self._manifest.rows.values()),
            passed_over=dict(sorted(found.passed_over.items())),
            unreadable_folders=sorted(found.unreadable_folders),
            audio_seconds=round(state.audio_seconds, 3),
            elapsed=round(time.perf_counter() - self._start, 3) if state.done else 0.0,
        )


def _digests_of(source: Source) -> tuple[str | None, str | None]:
    """Return the digests of a clip's audio and caption; None for a file that was not there.

    Raises:
        OSError: a file cannot be read.
    """
    return (
        digest_of(Path(source.path)) if source.audio else None,
        digest_of(source.caption_path) if source.caption else None,
    )


def _is_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether a file holds an array like this."""
    try:
        array = map_array(path)
    except LatentsFileError:
        return False
    return bool(array.shape == shape and array.dtype == dtype)
