"""How many seconds of audio a second does `samekit pre-encode` read, with an encoder that costs nothing?

Each format, rate and length is a dataset of music in stereo, as 16-bit WAV, FLAC or MP3. Bare decoding is
`soundfile.read` in as many threads. Both run in turn, and the best round of each counts, because other work on the
machine only adds time. The files lie in TMPDIR; a folder in memory leaves out the time that the disk takes.

    TMPDIR=/dev/shm python benchmarks/pipeline.py --formats wav,flac,mp3 --rates 44100,48000 --clip-seconds 10
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import numpy as np
import soundfile as sf
from common import counts, finish, question
from ray_overhead import cpu_seconds

from samekit import AutoencoderModel
from samekit.backends.cpu import available_cpus
from samekit.dataset.executor import LocalExecutor, default_readers, reads_in_processes
from samekit.dataset.options import PreEncodeOptions
from samekit.dataset.run import pre_encode

for folder in ("tests", "tools"):
    sys.path.append(str(Path(__file__).resolve().parent.parent / folder))

import synthesis  # noqa: E402
from null_encoder import NullEncoder  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.dataset.report import Progress

FORMATS = ("wav", "flac", "mp3")
# Different pieces of music in a dataset; the other clips are links to them.
PIECES = 8
# Seconds of a piece; longer clips repeat it.
PIECE_SECONDS = 10


class Cost(NamedTuple):
    """Seconds of the clock, of the processor, and of the processor in this process alone."""

    wall: float
    cpu: float
    parent: float


def formats(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """Parse names of formats, separated by commas."""
    names = value.split(",")
    if not set(names) <= set(FORMATS):
        raise click.BadParameter(f"{value!r} is no list of {', '.join(FORMATS)}")
    return names


def write_dataset(folder: Path, kind: str, rate: int, seconds: int, clips: int) -> list[Path]:
    """Write clips of one format, rate and length with captions; return their paths."""
    folder.mkdir()
    paths = [folder / f"{index:06d}.{kind}" for index in range(clips)]
    for index, path in enumerate(paths):
        if index < PIECES:
            # At another rate, the same samples sound higher, which changes nothing here.
            sf.write(path, np.resize(music(index), (seconds * rate, 2)), rate, format=kind.upper())
        else:
            os.link(paths[index % PIECES], path)
        path.with_suffix(".txt").write_text(f"caption {index}", encoding="utf-8")
    return paths


@cache
def music(seed: int) -> np.ndarray:
    """Return a piece of music, `[samples, 2]`."""
    return synthesis.clip(np.random.default_rng(seed), PIECE_SECONDS, music=True)


def cost_of(work: Callable[[], object]) -> Cost:
    """Run the work and return what it costs."""
    before = time.perf_counter(), cpu_seconds(), time.process_time()
    work()
    after = time.perf_counter(), cpu_seconds(), time.process_time()
    return Cost(*(end - begin for begin, end in zip(before, after, strict=True)))


def best_of(costs: list[Cost]) -> Cost:
    """Return the least of each."""
    return Cost(*map(min, zip(*costs, strict=True)))


def measure(paths: list[Path], out: Path, options: PreEncodeOptions, rounds: int) -> tuple[Cost, Cost, float]:
    """Return the costs of pre-encoding a dataset and of decoding its files alone, and the peak of a tenth in MiB.

    The peak is that of this process when the first tenth of the first round was encoded.
    """
    executor = LocalExecutor(AutoencoderModel(NullEncoder()).autoencoder)
    peaks: list[float] = []

    def note_peak(progress: Progress) -> None:
        if not peaks and progress.done * 10 >= progress.total:
            peaks.append(peak_mib())

    def whole_pipeline() -> None:
        report = pre_encode(executor, paths[0].parent, out, options, progress=note_peak)
        if report.bad:
            raise click.ClickException(str(report.bad[0]["reason"]))

    def bare_decoding() -> None:
        with ThreadPoolExecutor(options.readers) as pool:
            for _ in pool.map(lambda path: sf.read(path, dtype="float32")[1], paths):
                pass

    ours, bare = [], []
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        ours.append(cost_of(whole_pipeline))
        bare.append(cost_of(bare_decoding))
    executor.close()
    return best_of(ours), best_of(bare), peaks[0]


def peak_mib() -> float:
    """Return the most memory that this process has had so far, in MiB."""
    if sys.platform == "win32":
        return math.nan
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@question
@click.option("--formats", "kinds", default="wav,flac,mp3", show_default=True, callback=formats)
@click.option("--rates", default="44100,48000", show_default=True, callback=counts, help="In Hz.")
@click.option("--clip-seconds", default="10", show_default=True, callback=counts, help="Lengths of the clips.")
@click.option("--clips", default=200, show_default=True, type=click.IntRange(1), help="Clips of each dataset.")
@click.option("--readers", type=click.IntRange(1), help="[default: one a core, at most 4]")
@click.option("--processes/--threads", default=None, help="[default: processes with more than 4 cores]")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
def main(
    kinds: list[str],
    rates: list[int],
    clip_seconds: list[int],
    clips: int,
    readers: int | None,
    processes: bool | None,
    rounds: int,
) -> None:
    """Measure the pipeline of `samekit pre-encode` without an encoder."""
    cores = available_cpus()
    options = PreEncodeOptions(readers=readers or default_readers(cores, "cpu"), reader_processes=processes)
    where = "processes" if reads_in_processes(options, cores, "cpu") else "threads"
    results = []
    print(f"{clips} clips of each kind, {options.readers} readers in {where}")
    heads = ["audio s/s", "CPU ms/clip", "parent ms", "bare s/s", "bare CPU ms", "share of bare"]
    heads += ["tenth MiB", "peak MiB"]
    print(" " * 20 + "".join(f"{head:>15}" for head in heads))
    for seconds, kind, rate in itertools.product(clip_seconds, kinds, rates):
        with tempfile.TemporaryDirectory(prefix="samekit-") as folder:
            paths = write_dataset(Path(folder, "data"), kind, rate, seconds, clips)
            ours, bare, tenth = measure(paths, Path(folder, "out"), options, rounds)
        row = {
            "format": kind,
            "rate": rate,
            "clip_seconds": seconds,
            "audio_seconds_per_second": round(clips * seconds / ours.wall, 1),
            "cpu_ms_per_clip": round(1000 * ours.cpu / clips, 3),
            "parent_ms_per_clip": round(1000 * ours.parent / clips, 3),
            "bare_audio_seconds_per_second": round(clips * seconds / bare.wall, 1),
            "bare_cpu_ms_per_clip": round(1000 * bare.cpu / clips, 3),
            "share_of_bare_decoding": round(bare.wall / ours.wall, 3),
            "peak_mib_after_tenth": round(tenth, 1),
            "peak_mib": round(peak_mib(), 1),
        }
        results.append(row)
        print(
            f"{f'{kind} {rate} Hz {seconds} s':20}{row['audio_seconds_per_second']:15,.0f}"
            f"{row['cpu_ms_per_clip']:15.2f}{row['parent_ms_per_clip']:15.2f}"
            f"{row['bare_audio_seconds_per_second']:15,.0f}{row['bare_cpu_ms_per_clip']:15.2f}"
            f"{row['share_of_bare_decoding']:15.1%}{row['peak_mib_after_tenth']:15,.0f}{row['peak_mib']:15,.0f}"
        )
    finish("pipeline", results)


if __name__ == "__main__":
    main()
