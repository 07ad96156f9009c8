"""Which steps of a float16 graph must stay in float32? Accuracy with and without each island, every operation rounded.

PyTorch on a CPU rounds the result of every float16 operation, as a GPU does; ONNX Runtime on a CPU computes float16
graphs in float32 and so flatters. The yardstick is eager PyTorch in float32. Weights are seeded and random.

    python benchmarks/islands.py same-s --latents 6
    python benchmarks/islands.py same-l --latents 2 --worst-cases
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from common import finish, plot_bars, plot_option, question

from samekit_export.graph import GraphDecoder, GraphEncoder
from samekit_export.graph_layers import ISLANDS, Fp32Ops
from samekit_export.model import Same
from samekit_export.random_weights import random_checkpoint
from samekit_export.verify import snr_db

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from samekit_export.graph import Graph

NAMES = [field.name for field in dataclasses.fields(Fp32Ops)]


def variants() -> Iterator[tuple[str, Fp32Ops]]:
    """What is exported, all islands, none, and the exported ones with one more or one less."""
    yield "exported", ISLANDS
    yield "all", Fp32Ops(**dict.fromkeys(NAMES, True))
    yield "none", Fp32Ops(**dict.fromkeys(NAMES, False))
    for name in NAMES:
        kept = getattr(ISLANDS, name)
        yield f"{'without' if kept else 'with'} {name}", dataclasses.replace(ISLANDS, **{name: not kept})


def usual_inputs(model: Same, latents: int) -> tuple[Tensor, Tensor]:
    """Noise: audio at -14 dBFS, latents of unit variance."""
    noise = np.random.default_rng(0)
    config = model.config
    audio = 0.2 * noise.standard_normal((1, config.channels, latents * config.hop), np.float32)
    return torch.from_numpy(audio), torch.from_numpy(
        noise.standard_normal((1, config.latent_width, latents), np.float32)
    )


def worst_inputs(model: Same, latents: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Loud, silent, clicking and far-out inputs by name, for the encoder and the decoder."""
    audio, z = usual_inputs(model, latents)
    click_audio = torch.zeros_like(audio)
    click_audio[..., audio.shape[-1] // 2] = 1.0
    return {
        "loud / 5 sigma": (audio.sign(), 5 * z.sign()),
        "silence / zeros": (torch.zeros_like(audio), torch.zeros_like(z)),
        "click / one latent": (click_audio, z * (torch.arange(latents) == latents // 2)),
        "x 1,000": (1e3 * audio, 1e3 * z),
        "x 100,000": (1e5 * audio, 1e5 * z),
    }


def accuracy(graph: Graph, expected: Tensor, given: Tensor) -> str:
    """SNR in dB, or what stops the output from being a number."""
    out = graph(given)
    return f"{snr_db(expected.numpy(), out.numpy()):.1f}" if bool(out.isfinite().all()) else "refused"


def measure(model: Same, islands: Fp32Ops, cases: dict[str, tuple[Tensor, Tensor]]) -> dict[str, list[str]]:
    """Encoder and decoder of one variant on several pairs of inputs."""
    rows: dict[str, list[str]] = {case: [] for case in cases}
    # One half at a time: at full size each takes gigabytes.
    encoder = GraphEncoder(model, islands).to_float16_()
    for case, (audio, _) in cases.items():
        rows[case].append(accuracy(encoder, model.encode(audio), audio))
    del encoder
    decoder = GraphDecoder(model, islands).to_float16_()
    for case, (_, z) in cases.items():
        rows[case].append(accuracy(decoder, model.decode(z), z))
    return rows


@question
@click.argument("name", type=click.Choice(["tiny-s", "tiny-l", "same-s", "same-l"]))
@click.option("--latents", default=6, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--only", multiple=True, type=click.Choice([name for name, _ in variants()]), help="These variants; several."
)
@click.option("--worst-cases", is_flag=True, help="The exported graphs on extreme inputs instead of the islands.")
@plot_option
def main(name: str, latents: int, seed: int, only: tuple[str, ...], worst_cases: bool, plot_path: Path | None) -> None:
    """Print the table for one model; the last line is JSON."""
    model = Same.from_checkpoint(random_checkpoint(name, seed))
    rows = {}
    with torch.inference_mode():
        if worst_cases:
            rows = measure(model, ISLANDS, worst_inputs(model, latents))
        else:
            for variant, islands in variants():
                if only and variant not in only:
                    continue
                rows |= measure(model, islands, {variant: usual_inputs(model, latents)})
                print(f"  {variant:20} {rows[variant][0]:>8} {rows[variant][1]:>8}", flush=True)
    print(f"\n| {name}, {latents} latents | encode dB | decode dB |\n|---|---|---|")
    for row, (encode, decode) in rows.items():
        print(f"| {row} | {encode} | {decode} |")
    if plot_path:
        panels = {
            direction: {row: float(cells[i]) for row, cells in rows.items() if cells[i] != "refused"}
            for i, direction in enumerate(("encode", "decode"))
        }
        plot_bars(plot_path, panels, x="SNR in dB")
    finish("islands", {"model": name, "latents": latents, "seed": seed, "snr_db": rows})


if __name__ == "__main__":
    main()
