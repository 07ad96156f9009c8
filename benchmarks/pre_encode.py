"""How fast do `samekit pre-encode`, the encoder alone, and the reference's method encode a dataset?

The reference pads every clip to 12,582,912 samples (3,072 latents) and encodes it in one pass in eager PyTorch. That
takes minutes for each clip on a CPU, so a few clips are measured and the time is scaled to all; the table says so. A
ratio is reported only if its latents equal those of `samekit pre-encode`.

    python benchmarks/pre_encode.py engines/same-s --clips 100 --seconds 10
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import soundfile as sf
from common import engine_argument, finish, plot_bars, plot_option, question

from samekit import AutoencoderModel
from samekit.dataset.options import SAMPLE_SIZE, PreEncodeOptions
from samekit.dataset.run import pre_encode
from samekit_export.verify import FLOOR_DB, snr_db

if TYPE_CHECKING:
    from samekit.engine.folder import Engine

RATE = 44_100
OURS, BARE, REFERENCE = "samekit pre-encode", "bare encoder", "reference"


def write_dataset(folder: Path, clips: int, seconds: float) -> list[np.ndarray]:
    """Write stereo noise of -20 dBFS as 16-bit WAV with captions; return the clips as they are read back."""
    folder.mkdir()
    audio = []
    for index in range(clips):
        noise = np.random.default_rng(index).standard_normal((round(seconds * RATE), 2)) * 0.1
        path = folder / f"{index:05d}.wav"
        sf.write(path, noise, RATE)
        path.with_suffix(".txt").write_text(f"caption {index}", encoding="utf-8")
        audio.append(sf.read(path, dtype="float32")[0].T)
    return audio


def bare_encoder(model: AutoencoderModel, audio: list[np.ndarray]) -> float:
    """Return the seconds for encoding clips that are in memory, without writing files."""
    start = time.perf_counter()
    for clip in audio:
        model.autoencoder.encode_audio(clip[None])
    return time.perf_counter() - start


def whole_pipeline(model: AutoencoderModel, data: Path, out: Path, batch_size: int) -> float:
    """Return the seconds that `samekit pre-encode` takes for the dataset."""
    return pre_encode(model, data, out, PreEncodeOptions(batch_size=batch_size)).elapsed


def reference_method(engine: Path, audio: list[np.ndarray], threads: int | None) -> tuple[float, list[np.ndarray]]:
    """Pad clips to the reference's length, encode each in one pass of eager PyTorch, return seconds and latents."""
    latents = []
    with AutoencoderModel.from_pretrained(engine, "cpu", backend="torch", threads=threads) as eager:
        eager.autoencoder.backend.encode(np.zeros((1, 2, 2 * eager.downsampling_ratio), np.float32))
        start = time.perf_counter()
        for clip in audio:
            padded = np.zeros((1, 2, SAMPLE_SIZE), np.float32)
            padded[0, :, : clip.shape[1]] = clip
            latents.append(eager.autoencoder.backend.encode(padded)[0])
        return time.perf_counter() - start, latents


def least_snr_db(latents: list[np.ndarray], out: Path) -> float:
    """Return the least SNR of the files of a run against the latents of its first clips."""
    written = [np.load(out / f"{index:012d}.npy") for index in range(len(latents))]
    return min(snr_db(clip[:, : ours.shape[1]], ours) for clip, ours in zip(latents, written, strict=True))


@question
@engine_argument
@click.option("--clips", default=100, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0.001), help="Of each clip.")
@click.option("--batch_size", default=1, show_default=True, type=click.IntRange(1))
@click.option("--threads", type=click.IntRange(1), help="[default: all cores]")
@click.option(
    "--reference_clips",
    default=1,
    show_default=True,
    type=click.IntRange(0),
    help="Clips for the reference's method; 0 leaves it out.",
)
@plot_option
def main(
    engine: Engine,
    clips: int,
    seconds: float,
    batch_size: int,
    threads: int | None,
    reference_clips: int,
    plot_path: Path | None,
) -> None:
    """Print the table for one ENGINE folder, whose checkpoint must be loadable; the last line is JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        audio = write_dataset(folder / "data", clips, seconds)
        with AutoencoderModel.from_pretrained(engine.folder, "cpu", threads=threads) as model:
            model.autoencoder.backend.use_packed_weights("encoder")
            bare_encoder(model, audio[:2])
            # The bare encoder runs before and after, so that other work on the machine affects both.
            half = math.ceil(clips / 2)
            bare = bare_encoder(model, audio[:half])
            ours = whole_pipeline(model, folder / "data", folder / "out", batch_size)
            bare += bare_encoder(model, audio[half:])
            name = model.spec.name
        times, measured = {OURS: ours, BARE: bare}, {OURS: clips, BARE: clips}
        snr = None
        if reference_clips:
            measured[REFERENCE] = min(reference_clips, clips)
            taken, latents = reference_method(engine.folder, audio[:reference_clips], threads)
            times[REFERENCE] = taken / measured[REFERENCE] * clips
            snr = least_snr_db(latents, folder / "out")

    total = clips * seconds
    print(f"{name}, {clips} clips of {seconds:g} s")
    print(f"{'':20}{'seconds':>10}{'audio s/s':>12}{'measured':>10}")
    for way, taken in times.items():
        scaled = "" if measured[way] == clips else f", scaled to {clips}"
        print(f"{way:20}{taken:>10.1f}{total / taken:>12.2f}{measured[way]:>10}{scaled}")
    result = {
        "model": name,
        "clips": clips,
        "seconds_each": seconds,
        "batch_size": batch_size,
        "seconds": {way: round(taken, 2) for way, taken in times.items()},
        "clips_measured": measured,
        "of_bare_encoder": round(bare / ours, 3),
    }
    if snr is not None:
        agrees = snr >= FLOOR_DB["fp32"]
        result |= {"snr_db": round(snr, 1), "times_reference": round(times[REFERENCE] / ours, 1) if agrees else None}
        print(f"against the reference: {snr:.1f} dB, {result['times_reference'] or 'refused'} times as fast")
    if plot_path:
        plot_bars(
            plot_path, {name: {way: total / taken for way, taken in times.items()}}, x="seconds of audio a second"
        )
    finish("pre_encode", result)


if __name__ == "__main__":
    main()
