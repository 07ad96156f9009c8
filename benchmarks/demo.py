"""The whole way in a minute: export a small model, encode and decode a piece of music, measure what came back.

The model is small and its weights are random, so its audio is noise; what the demo shows is that the engine computes
what PyTorch computes, and how fast.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import soundfile as sf

from samekit import AutoencoderModel
from samekit_export.checkpoint import random_checkpoint
from samekit_export.export import export
from samekit_export.verify import snr_db

FOLDER = Path("demo")
MODEL = "tiny-s"
RATE = 48_000
SECONDS = 20


def synthesize() -> np.ndarray:
    """A stereo piece of plucked chords over a drum, `[samples, 2]`."""
    time_axis = np.arange(RATE * SECONDS) / RATE
    noise = np.random.default_rng(0)
    audio = np.zeros((len(time_axis), 2))
    for beat in range(2 * SECONDS):
        after = time_axis - beat / 2
        struck = after >= 0
        chord = [(220, 277, 330), (196, 247, 294), (175, 220, 262), (165, 208, 247)][beat // 4 % 4]
        pan = 0.5 + 0.4 * np.sin(beat)
        for frequency in chord:
            tone = 0.08 * np.sin(2 * np.pi * frequency * after) * np.exp(-4 * np.clip(after, 0, None)) * struck
            audio += np.outer(tone, [pan, 1 - pan])
        hit = 0.1 * noise.standard_normal(len(time_axis)) * np.exp(-60 * np.clip(after, 0, None)) * struck
        audio += hit[:, None]
    return audio


def main() -> None:
    """Run the demo and print its table."""
    FOLDER.mkdir(exist_ok=True)
    piece, latents, back = FOLDER / "piece.wav", FOLDER / "piece.npy", FOLDER / "decoded.wav"
    sf.write(piece, synthesize(), RATE, subtype="PCM_16")
    engine = export(random_checkpoint(MODEL), FOLDER / "engines", report=print)

    rows = []
    results = {}
    for backend in ("onnxruntime", "torch"):
        with AutoencoderModel.from_pretrained(engine.folder, backend=backend) as model:
            model.encode(np.zeros((2, 3 * model.downsampling_ratio), np.float32), model.sample_rate)
            start = time.perf_counter()
            encoded = model.encode_file(piece, latents)
            middle = time.perf_counter()
            model.decode_file(latents, back, "FLOAT")
            end = time.perf_counter()
        results[backend] = np.load(latents), sf.read(back, dtype="float32")[0]
        rows.append((backend, encoded["latents"], SECONDS / (middle - start), SECONDS / (end - middle)))

    print(f"\n{piece}: {SECONDS} s at {RATE} Hz -> {latents} -> {back}")
    print(f"{'backend':14}{'latents':>8}{'encode':>18}{'decode':>18}")
    for backend, count, encode, decode in rows:
        print(f"{backend:14}{count:>8}{encode:>12.0f} x real{decode:>12.0f} x real")
    snrs = [snr_db(*pair) for pair in zip(results["torch"], results["onnxruntime"], strict=True)]
    print(f"onnxruntime against torch: latents {snrs[0]:.0f} dB, audio {snrs[1]:.0f} dB")
    print(f"({MODEL} has random weights: {back} is no music. For a real model: make export MODEL=same-s)")
    if min(snrs) < 90:
        sys.exit("the engine does not equal PyTorch")


if __name__ == "__main__":
    main()
