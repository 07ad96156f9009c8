"""How much slower is Ray than the plain command, on one machine and the same cores?

The same clips are encoded in three ways, each into a new folder: this process with every core; one actor with every
core, which shows the overhead of a cluster; and an actor for each core. The start of the cluster and of the actors is
timed separately as "start". The other times include everything up to the finished manifest.

Rounds run in turn, A B C A B C, and the minimum of each counts, because other work on the machine only adds time. If
there is much of it, compare "cpu": seconds that cores spent on this process and all that it started, including Ray's.

    python benchmarks/ray_overhead.py engines/same-s --clips 500 --seconds 10
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psutil
from common import engine_argument, finish, plot_bars, plot_option, question
from pre_encode import write_dataset

from samekit import AutoencoderModel
from samekit.backends.cpu import available_cpus
from samekit.dataset.ray import RayExecutor, RayOptions
from samekit.dataset.run import pre_encode

if TYPE_CHECKING:
    from samekit.dataset.executor import Executor
    from samekit.engine.folder import Engine


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_executor(stack: ExitStack, engine: str, options: RayOptions) -> tuple[RayExecutor, float]:
    """Start actors that open the model; return their executor and the seconds until all are ready."""
    start = time.perf_counter()
    executor = stack.enter_context(RayExecutor(engine, options, device="cpu", backend="onnxruntime"))
    return executor, time.perf_counter() - start


def cpu_seconds() -> float:
    """Return the processor time of this process and of its living children."""
    # psutil counts in steps of 10 ms, which is too coarse for this process alone.
    total = time.process_time()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def one_run(encoder: AutoencoderModel | Executor, data: Path, out: Path) -> tuple[float, float]:
    """Encode into a new folder; return the seconds and the processor time."""
    shutil.rmtree(out, ignore_errors=True)
    cpu, start = cpu_seconds(), time.perf_counter()
    pre_encode(encoder, data, out)
    return time.perf_counter() - start, cpu_seconds() - cpu


def add_copies(folder: Path, clips: int) -> None:
    """Extend a dataset to `clips` clips by copies of those that it has."""
    sources = sorted(folder.glob("*.wav"))
    for index in range(len(sources), clips):
        path = folder / f"{index:05d}.wav"
        shutil.copyfile(sources[index % len(sources)], path)
        path.with_suffix(".txt").write_text(f"caption {index}", encoding="utf-8")


@question
@engine_argument
@click.option("--clips", default=500, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=10.0, show_default=True, help="Of each clip.")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1))
@plot_option
def main(engine: Engine, clips: int, seconds: float, runs: int, plot_path: Path | None) -> None:
    """Print the table for one ENGINE folder; the last line is JSON."""
    cores = available_cpus()
    # An absolute path, because workers run in other folders.
    folder = str(engine.folder.absolute())
    times: dict[str, list[tuple[float, float]]] = {"one process": [], "Ray, one actor": [], "Ray, an actor a core": []}
    starts: dict[str, Any] = {}
    same = True
    # By default, Ray's workers have a low priority (nice 15). Here all processes must have the same priority.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        data, outs = Path(scratch, "data"), {way: Path(scratch, way) for way in times}
        write_dataset(data, min(clips, 10), seconds)
        add_copies(data, clips)
        for _ in range(runs):
            with AutoencoderModel.from_pretrained(folder, "cpu", backend="onnxruntime") as model:
                times["one process"].append(one_run(model, data, outs["one process"]))
            for way, options in (
                ("Ray, one actor", RayOptions("local", 1, cores)),
                ("Ray, an actor a core", RayOptions("local", cores, 1)),
            ):
                with ExitStack() as stack:
                    executor, start = start_executor(stack, folder, options)
                    starts.setdefault(way, []).append(start)
                    times[way].append(one_run(executor, data, outs[way]))
            folders = [contents(out) for out in outs.values()]
            same = same and all(folder == folders[0] for folder in folders)
    # Seconds and processor time each have their own minimum.
    best = {way: tuple(map(min, zip(*taken, strict=True))) for way, taken in times.items()}
    plain = best["one process"]
    # If the results differ, the work was not the same.
    overhead = {
        way: [value / of - 1 for value, of in zip(pair, plain, strict=True)] for way, pair in best.items() if same
    }
    print(f"{engine.folder.name}, {clips} clips of {seconds:g} s, {cores} cores, minimum of {runs} runs")
    print(f"{'':22}{'start':>8}{'seconds':>10}{'audio s/s':>12}{'overhead':>10}{'cpu':>8}{'overhead':>10}")
    for way, (wall, cpu) in best.items():
        begin = f"{min(starts[way]):.1f}" if way in starts else ""
        more = [f"{value:.1%}" for value in overhead[way]] if same else ["refused"] * 2
        speed = clips * seconds / wall
        print(f"{way:22}{begin:>8}{wall:>10.1f}{speed:>12.1f}{more[0]:>10}{cpu:>8.1f}{more[1]:>10}")
    print(f"the folders are {'equal, byte for byte' if same else 'DIFFERENT'}")
    results = {
        "model": engine.folder.name,
        "clips": clips,
        "seconds_each": seconds,
        "seconds_and_cpu": {way: [[round(v, 2) for v in pair] for pair in taken] for way, taken in times.items()},
        "starts": {way: [round(value, 2) for value in taken] for way, taken in starts.items()},
        "overhead": {way: [round(value, 3) for value in pair] for way, pair in overhead.items()} if same else None,
        "equal": same,
    }
    if plot_path:
        plot_bars(plot_path, {"wall": {way: wall for way, (wall, _) in best.items()}}, x="seconds")
    finish("ray_overhead", results)


if __name__ == "__main__":
    main()
