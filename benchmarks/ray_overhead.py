"""What does Ray cost against the plain command, on one machine and the same cores?

Three ways to encode the same clips, each a new folder: this process with every core; one actor with every core, which
shows what a cluster adds to the same work; and an actor for each core. The cluster and the actors are started once and
timed apart: "start" is what a run pays before its first clip, and no run of hours notices. The rest is counted from
planning to the finished manifest.

Rounds go A B C A B C, the minimum of each counts: other work on the machine only ever adds time.

    python benchmarks/ray_overhead.py engines/same-s --clips 500 --seconds 10
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from common import finish
from pre_encode import write_dataset

from samekit import AutoencoderModel
from samekit.backends.ort import available_cpus
from samekit.dataset import pre_encode
from samekit.distributed import RayEncoder, RayOptions

if TYPE_CHECKING:
    from samekit.encoder import Encoder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def started(stack: ExitStack, engine: str, options: RayOptions) -> tuple[RayEncoder, float]:
    """Actors that have opened the model, and the seconds that took."""
    start = time.perf_counter()
    encoder = stack.enter_context(RayEncoder(engine, options, device="cpu", backend="onnxruntime"))
    return encoder, time.perf_counter() - start


def one_run(encoder: AutoencoderModel | Encoder, data: Path, out: Path) -> float:
    """Seconds of a whole run into a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    pre_encode(encoder, data, out)
    return time.perf_counter() - start


@click.command()
@click.argument("engine")
@click.option("--clips", default=500, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=10.0, show_default=True, help="Of each clip.")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1))
def main(engine: str, clips: int, seconds: float, runs: int) -> None:
    """Print the table for one ENGINE folder; the last line is JSON."""
    cores = available_cpus()
    engine = str(Path(engine).absolute())
    times: dict[str, list[float]] = {"one process": [], "Ray, one actor": [], "Ray, an actor a core": []}
    starts: dict[str, Any] = {}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as scratch:
        data, outs = Path(scratch, "data"), {way: Path(scratch, way) for way in times}
        write_dataset(data, clips, seconds)
        for _ in range(runs):
            with AutoencoderModel.from_pretrained(engine, "cpu", backend="onnxruntime") as model:
                times["one process"].append(one_run(model, data, outs["one process"]))
            for way, options in (
                ("Ray, one actor", RayOptions("local", 1, cores)),
                ("Ray, an actor a core", RayOptions("local", cores, 1)),
            ):
                with ExitStack() as stack:
                    encoder, start = started(stack, engine, options)
                    starts.setdefault(way, []).append(start)
                    times[way].append(one_run(encoder, data, outs[way]))
        folders = [contents(out) for out in outs.values()]
        same = all(folder == folders[0] for folder in folders)
    plain = min(times["one process"])
    print(f"{Path(engine).name}, {clips} clips of {seconds:g} s, {cores} cores, minimum of {runs} runs")
    print(f"{'':22}{'start':>8}{'seconds':>10}{'audio s/s':>12}{'overhead':>10}")
    for way, taken in times.items():
        best = min(taken)
        begin = f"{min(starts[way]):.1f}" if way in starts else ""
        print(f"{way:22}{begin:>8}{best:>10.1f}{clips * seconds / best:>12.1f}{best / plain - 1:>10.1%}")
    print(f"the folders are {'equal, byte for byte' if same else 'DIFFERENT'}")
    results = {
        "model": Path(engine).name,
        "clips": clips,
        "seconds_each": seconds,
        "times": {way: [round(value, 2) for value in taken] for way, taken in times.items()},
        "starts": {way: [round(value, 2) for value in taken] for way, taken in starts.items()},
        "overhead": {way: round(min(taken) / plain - 1, 3) for way, taken in times.items()},
        "equal": same,
    }
    finish("ray_overhead", results)


if __name__ == "__main__":
    main()
