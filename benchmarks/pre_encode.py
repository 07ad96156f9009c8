"""How fast a dataset is encoded: `samekit pre-encode`, the bare encoder, and the reference's way, on the same clips.

The reference pads every clip to 12,582,912 samples (3,072 latents) and encodes it in one pass in eager PyTorch. That
takes minutes a clip on a CPU, so a few clips are measured and the rest is scaled; the table says so.

    python benchmarks/pre_encode.py --model engines/same-s --clips 100 --seconds 10
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf

from samekit import AutoencoderModel
from samekit.dataset import SAMPLE_SIZE, PreEncodeOptions, pre_encode

RATE = 44_100


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="same-s", help="engine folder or name; its checkpoint must be loadable")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each clip")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--reference_clips", type=int, default=1, help="measured the reference's way; 0 leaves it out")
    return parser.parse_args()


def write_dataset(folder: Path, clips: int, seconds: float) -> list[np.ndarray]:
    """Noise of -20 dB in stereo, as 16-bit WAV with captions; returns the clips as they are read back."""
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
    """Seconds for the clips alone: in memory already, and no file written."""
    start = time.perf_counter()
    for clip in audio:
        model.autoencoder.encode_audio(clip[None])
    return time.perf_counter() - start


def whole_pipeline(model: AutoencoderModel, data: Path, out: Path, batch_size: int) -> float:
    """Seconds from the first clip read to the last one on disk."""
    return pre_encode(model, data, out, PreEncodeOptions(batch_size=batch_size)).elapsed


def reference_way(model_name: str, audio: list[np.ndarray]) -> float:
    """Seconds for clips padded to the reference's length, encoded in one pass of eager PyTorch."""
    with AutoencoderModel.from_pretrained(model_name, "cpu", backend="torch") as eager:
        eager.autoencoder.backend.encode(np.zeros((1, 2, 2 * eager.downsampling_ratio), np.float32))
        start = time.perf_counter()
        for clip in audio:
            padded = np.zeros((1, 2, SAMPLE_SIZE), np.float32)
            padded[0, :, : clip.shape[1]] = clip
            eager.autoencoder.backend.encode(padded)
        return time.perf_counter() - start


def main() -> None:
    """Measure, print a table and one line of JSON."""
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        audio = write_dataset(folder / "data", options.clips, options.seconds)
        with AutoencoderModel.from_pretrained(options.model, "cpu", threads=options.threads) as model:
            model.autoencoder.backend.expect_many_calls("encoder")
            bare_encoder(model, audio[:2])
            # The bare encoder before and after, so that other work on the machine falls on both.
            half = math.ceil(options.clips / 2)
            bare = bare_encoder(model, audio[:half])
            ours = whole_pipeline(model, folder / "data", folder / "out", options.batch_size)
            bare += bare_encoder(model, audio[half:])
            name = model.spec.name
    seconds = {"samekit pre-encode": ours, "bare encoder": bare}
    measured = dict.fromkeys(seconds, options.clips)
    if options.reference_clips:
        way = "reference's way"
        measured[way] = options.reference_clips
        taken = reference_way(options.model, audio[: options.reference_clips])
        seconds[way] = taken / options.reference_clips * options.clips

    total = options.clips * options.seconds
    print(f"{name}, {options.clips} clips of {options.seconds:g} s")
    print(f"{'':20}{'seconds':>10}{'audio s/s':>12}{'measured':>10}")
    for way, taken in seconds.items():
        scaled = "" if measured[way] == options.clips else f", scaled to {options.clips}"
        print(f"{way:20}{taken:>10.1f}{total / taken:>12.2f}{measured[way]:>10}{scaled}")
    result = {
        "model": name,
        "clips": options.clips,
        "seconds_each": options.seconds,
        "batch_size": options.batch_size,
        "seconds": {way: round(taken, 2) for way, taken in seconds.items()},
        "clips_measured": measured,
        "of_bare_encoder": round(bare / ours, 3),
    }
    if options.reference_clips:
        result["times_reference"] = round(seconds["reference's way"] / ours, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
