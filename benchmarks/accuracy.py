"""How accurate is each precision against eager PyTorch, on noise, music and speech, by length?

Music and speech are synthesized. Each length encodes and decodes the same content: the audio or its latents, cut into
pieces of that length. So lengths can be compared. `samekit verify` compares the SNR with a floor. No floor applies
here, because not all rounding errors of a graph shrink with its input.

For trained weights, the loss of the round trip is printed too: the SNR of the decoded against the original audio with
eager PyTorch, minus that of the precision.

    python benchmarks/accuracy.py engines/same-s --latents 1,32,128
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from common import call_of, counts, engine_argument, finish, open_codec, plot_bars, plot_option, question

from samekit.engine.spec import BF16, DECODER, DIRECTIONS, ENCODER, Direction
from samekit.errors import InputError
from samekit_export.verify import example_input, snr_db

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import synthesis

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.random import Generator

    from samekit.arrays import Array
    from samekit.batches import Autoencoder
    from samekit.engine.folder import Engine

QUIET = 0.01
"""Level of quiet noise, as a factor of the usual level."""
SOUNDS: dict[str, Callable[[Generator, float], Array]] = {
    "music": partial(synthesis.clip, music=True),
    "speech": synthesis.speech,
}
"""Content that is no noise -> function of a generator and a length in seconds."""


def contents(eager: Autoencoder, latents: int, seed: int) -> dict[str, dict[Direction, Array]]:
    """Return each content as audio and as latents of one length. The latents of a sound are those of its audio."""
    spec = eager.spec
    noise = {direction: example_input(spec, direction, 1, latents, 1000 + seed) for direction in DIRECTIONS}
    found = {"noise": noise, "quiet noise": {d: array * np.float32(QUIET) for d, array in noise.items()}}
    for name, make in SOUNDS.items():
        # Longer than necessary, because resampling rounds.
        clip = make(np.random.default_rng(seed), spec.samples(latents + 1) / spec.sample_rate)
        audio = eager.preprocess_audio_for_encoder(clip.T, synthesis.RATE)[..., : spec.samples(latents)]
        found[name] = {ENCODER: audio, DECODER: eager.encode_audio(audio)}
    return found


def run_pieces(codec: Autoencoder, direction: Direction, array: Array, latents: int) -> Array:
    """Encode or decode an array in pieces of this many latents, and return the results side by side."""
    length = codec.spec.input_shape(direction, 1, latents)[2]
    pieces = [array[..., start : start + length] for start in range(0, array.shape[-1], length)]
    return np.concatenate([call_of(codec, direction)(piece) for piece in pieces], axis=-1)


def measure(
    eager: Autoencoder, tested: dict[str, Autoencoder], lengths: list[int], seeds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row for each direction, content, length and precision, and one for each round trip of a sound."""
    rows, trips = [], []
    for seed in range(seeds):
        for content, arrays in contents(eager, max(lengths), seed).items():
            for direction, array in arrays.items():
                for latents in lengths:
                    expected = run_pieces(eager, direction, array, latents)
                    for precision, codec in tested.items():
                        snr = snr_db(expected, run_pieces(codec, direction, array, latents))
                        row = {"direction": direction, "content": content, "latents": latents, "seed": seed}
                        rows.append({**row, "precision": precision, "snr_db": round(snr, 1)})
            if content in SOUNDS and not eager.spec.is_random:
                audio = arrays[ENCODER]
                best = snr_db(audio, eager.decode_audio(arrays[DECODER]))
                for precision, codec in tested.items():
                    reached = snr_db(audio, codec.decode_audio(codec.encode_audio(audio)))
                    trip = {"content": content, "seed": seed, "precision": precision}
                    trips.append({**trip, "snr_db": round(reached, 2), "loss_db": round(best - reached, 3)})
    return rows, trips


def grouped(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return the rows by their values of some fields."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


@question
@engine_argument
@click.option("--latents", default="1,32,128", show_default=True, callback=counts, help="Lengths, by commas.")
@click.option("--precision", help="Separated by commas; bf16 runs in OpenVINO. [default: all that were exported]")
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(1), help="Inputs of each content.")
@click.option("--threads", type=click.IntRange(1), help="[default: all cores]")
@plot_option
def main(
    engine: Engine, latents: list[int], precision: str | None, seeds: int, threads: int | None, plot_path: Path | None
) -> None:
    """Print the table for one ENGINE folder; the last line is JSON."""
    precisions = precision.split(",") if precision else list(engine.spec.graphs)
    if not precisions:
        raise InputError(f"{engine.folder}: holds no graph; export the model again")
    eager = open_codec(engine.folder, "torch", "fp32", threads)
    tested = {
        of: open_codec(engine.folder, "openvino" if of == BF16 else "onnxruntime", of, threads) for of in precisions
    }
    rows, trips = measure(eager, tested, latents, seeds)
    panels: dict[str, dict[str, float]] = {ENCODER: {}, DECODER: {}}
    print(f"{'':10}{'':6}{'':13}{'latents':>8}{'least SNR':>12}")
    for (direction, of, content, length), alike in grouped(
        rows, "direction", "precision", "content", "latents"
    ).items():
        least = min(row["snr_db"] for row in alike)
        panels[direction][f"{of}, {content}, {length} latents"] = least
        print(f"{direction:10}{of:6}{content:13}{length:>8}{least:>9.1f} dB")
    for (of, content), alike in grouped(trips, "precision", "content").items():
        best = " ".join(f"{trip['snr_db'] + trip['loss_db']:.1f}" for trip in alike)
        loss = max(trip["loss_db"] for trip in alike)
        print(f"round trip of {content}, {of}: at most {loss:.3f} dB less than the {best} dB of eager PyTorch")
    if plot_path:
        plot_bars(plot_path, panels, x="least SNR of all inputs, in dB")
    finish("accuracy", {"rows": rows, "round_trips": trips})


if __name__ == "__main__":
    main()
