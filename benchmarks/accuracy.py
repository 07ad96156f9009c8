"""How near is each precision to eager PyTorch, by length, level and seed?

`samekit verify` holds one usual input of a few lengths to a floor; this measures others, to the same definition of SNR.
Quiet inputs have none: what a graph rounds does not all shrink with its input.

    python benchmarks/accuracy.py engines/same-s --latents 1,32,128
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from common import counts, engine_argument, finish, half_of, plot_bars, plot_option, question

from samekit import AutoencoderModel
from samekit.errors import InputError
from samekit.spec import DECODER, ENCODER
from samekit.store import Engine
from samekit_export.verify import example_input, snr_db

if TYPE_CHECKING:
    from pathlib import Path

    from samekit.autoencoder import Autoencoder

LEVELS = (1.0, 0.01)
"""Times the usual level of an input."""


def measure(
    eager: Autoencoder, tested: dict[str, Autoencoder], half: str, lengths: list[int], seeds: int
) -> list[dict[str, Any]]:
    """A row for each precision and input."""
    rows = []
    for latents in lengths:
        for seed in range(seeds):
            usual = example_input(eager.spec, half, 1, latents, seed=1000 + seed)
            for level in LEVELS:
                given = usual * np.float32(level)
                expected = half_of(eager, half)(given)
                for precision, codec in tested.items():
                    snr = round(snr_db(expected, half_of(codec, half)(given)), 1)
                    row = {"half": half, "latents": latents, "seed": seed, "level": level}
                    rows.append({**row, "precision": precision, "snr_db": snr})
    return rows


@question
@engine_argument
@click.option("--latents", default="1,32,128", show_default=True, callback=counts, help="Lengths, by commas.")
@click.option("--precision", help="Separated by commas. [default: all that were exported]")
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(1), help="Inputs of each length and level.")
@click.option("--threads", type=click.IntRange(1), help="[default: all cores]")
@plot_option
def main(
    engine: Path, latents: list[int], precision: str | None, seeds: int, threads: int | None, plot_path: Path | None
) -> None:
    """Print the table for one ENGINE folder; the last line is JSON."""
    found = Engine.load(engine)
    precisions = precision.split(",") if precision else list(found.spec.graphs)
    if not precisions:
        raise InputError(f"{engine}: holds no graph; export the model again")

    def opened(backend: str, of: str) -> Autoencoder:
        return AutoencoderModel.from_pretrained(
            engine, "cpu", backend=backend, precision=of, threads=threads
        ).autoencoder

    eager, tested = opened("torch", "fp32"), {of: opened("onnxruntime", of) for of in precisions}
    rows: list[dict[str, Any]] = []
    for half in (ENCODER, DECODER):
        rows += measure(eager, tested, half, latents, seeds)
    least: dict[str, dict[str, float]] = defaultdict(dict)
    print(f"{'':10}{'':10}{'latents':>8}{'level':>8}{'least SNR':>12}")
    for half in (ENCODER, DECODER):
        for of in precisions:
            for length, level in product(latents, LEVELS):
                asked = (half, of, length, level)
                alike = [r["snr_db"] for r in rows if (r["half"], r["precision"], r["latents"], r["level"]) == asked]
                least[half][f"{of}, {length} latents, level {level:g}"] = min(alike)
                print(f"{half:10}{of:10}{length:>8}{level:>8g}{min(alike):>9.1f} dB")
    if plot_path:
        plot_bars(plot_path, least, x="SNR in dB, the least of all inputs")
    finish("accuracy", rows, engine)


if __name__ == "__main__":
    main()
