"""How many seconds of audio does a GPU encode in a second, and how busy is it?

The clips are noise in 16-bit WAV files, so that reading them costs what real files cost. nvidia-smi tells how busy the
GPU is, once a second.

    python benchmarks/gpu_pipeline.py engines/same-s --readers 4
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import soundfile
from common import engine_argument, finish, question

from samekit import AutoencoderModel
from samekit.dataset import PreEncodeOptions, pre_encode

if TYPE_CHECKING:
    from samekit.engine.folder import Engine

_BUSY = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")


def watch(busy: list[float], stop: threading.Event) -> None:
    """Add how busy the first GPU is, in per cent, once a second; nothing without nvidia-smi."""
    while not stop.wait(1):
        try:
            done = subprocess.run(_BUSY, capture_output=True, text=True, check=True, timeout=10)
            busy.append(float(done.stdout.split()[0]))
        except (OSError, ValueError, IndexError, subprocess.SubprocessError):
            return


@question
@engine_argument
@click.option("--device", default="cuda", show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--readers", default=4, show_default=True, type=click.IntRange(1), help="Processes that read clips.")
@click.option("--clips", default=64, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=30.0, show_default=True, help="Length of a clip.")
def main(engine: Engine, device: str, precision: str, readers: int, clips: int, seconds: float) -> None:
    """Encode a dataset with one ENGINE folder; the last line is JSON."""
    spec, busy, stop = engine.spec, list[float](), threading.Event()
    with (
        tempfile.TemporaryDirectory() as folder,
        AutoencoderModel.from_pretrained(engine.folder, device, precision=precision) as model,
    ):
        data = Path(folder) / "data"
        data.mkdir()
        samples = np.random.default_rng(0).standard_normal((int(seconds * spec.sample_rate), 2)) * 0.1
        for clip in range(clips):
            soundfile.write(data / f"{clip}.wav", samples, spec.sample_rate)
            (data / f"{clip}.txt").write_text("noise", encoding="utf-8")
        model.encode(samples[: spec.sample_rate].T.astype(np.float32), spec.sample_rate)
        watcher = threading.Thread(target=watch, args=(busy, stop))
        watcher.start()
        start = time.perf_counter()
        pre_encode(model, data, Path(folder) / "latents", PreEncodeOptions(readers=readers))
        elapsed = time.perf_counter() - start
        stop.set()
        watcher.join()
        backend = model.autoencoder.backend.name
    speed = clips * seconds / elapsed
    share = statistics.mean(busy) if busy else None
    print(f"{backend}, {readers} readers: {speed:.0f} s of audio in a second; GPU busy: {share} %")
    finish("gpu_pipeline", {"backend": backend, "audio_seconds_per_second": speed, "gpu_busy_percent": share})


if __name__ == "__main__":
    main()
