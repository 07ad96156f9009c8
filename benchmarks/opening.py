"""How long does it take to open an engine whose files are in the page cache, and to run the whole command?

OpenVINO keeps compiled graphs in the engine folder. All of them are deleted before each opening that must compile.

    python benchmarks/opening.py engines/same-s
    python benchmarks/opening.py engines/same-s --backend openvino --precision bf16
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import soundfile as sf
from common import backend_option, child, engine_argument, finish, plot_bars, plot_option, question

from samekit.engine.contents import compiled_files
from samekit.engine.spec import graph_precision
from samekit_export.measure import summary

if TYPE_CHECKING:
    from samekit.engine.folder import Engine


# Runs in a new process each time, because a second opening in one process is faster.
OPEN = """
import time, sys, numpy as np
from samekit import AutoencoderModel
start = time.perf_counter()
model = AutoencoderModel.from_pretrained(sys.argv[1], "cpu", backend=sys.argv[2], precision=sys.argv[3])
silence = np.zeros((model.spec.channels, model.downsampling_ratio), np.float32)
backend = model.autoencoder.backend
(backend._session if backend.name == "onnxruntime" else backend._model)("encoder")
opened = time.perf_counter()
model.encode(silence, model.sample_rate)
print(opened - start, time.perf_counter() - opened)
"""


def one_second(folder: Path) -> Path:
    """Write a second of noise."""
    path = folder / "clip.wav"
    sf.write(path, 0.1 * np.random.default_rng(0).standard_normal((44100, 2)), 44100)
    return path


@question
@engine_argument
@backend_option
@click.option("--precision", default="fp32", show_default=True)
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1))
@plot_option
def main(engine: Engine, backend: str, precision: str, runs: int, plot_path: Path | None) -> None:
    """Print the table for one ENGINE folder; the last line is JSON."""
    engine.check(graph_precision(precision))
    for file in engine.folder.glob("*.onnx*"):
        file.read_bytes()
    opening, again, first, command = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        clip = one_second(Path(name))
        samekit = (Path(sys.executable).with_name("samekit"), "encode", clip, clip.with_suffix(".npy"))
        options = ("--model", engine.folder, "--precision", precision, "--backend", backend, "--device", "cpu")
        open_encoder = (sys.executable, "-c", OPEN, engine.folder, backend, precision)
        for _ in range(runs):
            for file in compiled_files(engine.folder):
                file.unlink()
            seconds = [float(part) for part in child(*open_encoder).split()]
            opening.append(seconds[0])
            first.append(seconds[1])
            again.append(float(child(*open_encoder).split()[0]))
            start = time.perf_counter()
            child(*samekit, *options)
            command.append(time.perf_counter() - start)
    results = {
        "open the encoder, first time": summary(opening),
        "open the encoder, again": summary(again),
        "encode one latent, first call": summary(first),
        "samekit encode of a 1 s clip, start to finish": summary(command),
    }
    for what, figures in results.items():
        print(f"{what:48}{figures['median']:.2f} s ({figures['min']:.2f} ... {figures['max']:.2f})")
    if plot_path:
        medians = {what: figures["median"] for what, figures in results.items()}
        plot_bars(plot_path, {engine.folder.name: medians}, x="seconds")
    finish("opening", results)


if __name__ == "__main__":
    main()
