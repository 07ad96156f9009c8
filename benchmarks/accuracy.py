"""How accurate is each precision against eager PyTorch, by length, level and seed?

`samekit verify` compares the SNR for inputs of a usual level with a floor. This benchmark measures the same SNR for
more inputs. No floor applies to quiet inputs, because not all rounding errors of a graph shrink with its input.

    python benchmarks/accuracy.py engines/same-s --latents 1,32,128
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from common import call_of, counts, engine_argument, finish, open_codec, plot_bars, plot_option, question

from samekit.engine.spec import DECODER, ENCODER, Direction
from samekit.errors import InputError
from samekit_export.verify import example_input, snr_db

if TYPE_CHECKING:
    from pathlib import Path

    from samekit.batches import Autoencoder
    from samekit.engine.folder import Engine

LEVELS = (1.0, 0.01)
"""Factors of the usual level of an input."""


def measure(
    eager: Autoencoder, tested: dict[str, Autoencoder], direction: Direction, lengths: list[int], seeds: int
) -> list[dict[str, Any]]:
    """Return a row for each precision and input."""
    rows = []
    for latents in lengths:
        for seed in range(seeds):
            usual = example_input(eager.spec, direction, 1, latents, seed=1000 + seed)
            for level in LEVELS:
                scaled = usual * np.float32(level)
                expected = call_of(eager, direction)(scaled)
                for precision, codec in tested.items():
                    snr = round(snr_db(expected, call_of(codec, direction)(scaled)), 1)
                    row = {"direction": direction, "latents": latents, "seed": seed, "level": level}
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
    engine: Engine, latents: list[int], precision: str | None, seeds: int, threads: int | None, plot_path: Path | None
) -> None:
    """Print the table for one ENGINE folder; the last line is JSON."""
    precisions = precision.split(",") if precision else list(engine.spec.graphs)
    if not precisions:
        raise InputError(f"{engine.folder}: holds no graph; export the model again")
    eager = open_codec(engine.folder, "torch", "fp32", threads)
    tested = {of: open_codec(engine.folder, "onnxruntime", of, threads) for of in precisions}
    rows = [row for direction in (ENCODER, DECODER) for row in measure(eager, tested, direction, latents, seeds)]
    least: dict[tuple[str, str, int, float], float] = {}
    for row in rows:
        alike = (row["direction"], row["precision"], row["latents"], row["level"])
        least[alike] = min(row["snr_db"], least.get(alike, math.inf))
    print(f"{'':10}{'':10}{'latents':>8}{'level':>8}{'least SNR':>12}")
    panels: dict[str, dict[str, float]] = {ENCODER: {}, DECODER: {}}
    for (direction, of, length, level), snr in least.items():
        panels[direction][f"{of}, {length} latents, level {level:g}"] = snr
        print(f"{direction:10}{of:10}{length:>8}{level:>8g}{snr:>9.1f} dB")
    if plot_path:
        plot_bars(plot_path, panels, x="least SNR of all inputs, in dB")
    finish("accuracy", rows)


if __name__ == "__main__":
    main()
