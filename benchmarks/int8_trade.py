"""What does int8 cost in accuracy and save in time, and what does each step contribute that keeps the error small?

Every variant is written as an ONNX graph: of same-s, same-l, tiny-s or tiny-l with random weights, of same-tiny, or of
a checkpoint folder. ONNX Runtime runs all of them in turn. Accuracy is measured against eager PyTorch in float32.

    python benchmarks/int8_trade.py same-s --direction encoder --latents 64

With `--threads 1`, times are processor time, which other work on the machine hardly changes.
"""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from common import checkpoint_of, finish, open_session, plot_bars, plot_option, question

from samekit.arguments import MOST_THREADS
from samekit.audio import read_audio, to_channels
from samekit.backends.cpu import available_cpus
from samekit.engine.spec import DECODER, ENCODER, INT8_TARGET_DB, Direction
from samekit_export.export import GRAPHS
from samekit_export.gptq import GptqRounder
from samekit_export.int8 import (
    CALIBRATION_LATENTS,
    CALIBRATION_SEED,
    examples,
    moments_of,
    products,
    quantize_,
    rotate_heads_,
    scale_features_,
    select_int8_,
)
from samekit_export.int8_layers import Int8Branch, Int8Linear
from samekit_export.measure import interleaved, summary
from samekit_export.model import Same
from samekit_export.model_spec import spec_of
from samekit_export.to_onnx import write_onnx
from samekit_export.verify import example_input, snr_db

if TYPE_CHECKING:
    from samekit_export.graph import GraphDecoder, GraphEncoder


@dataclass(frozen=True)
class QuantizationOptions:
    """The steps that keep the error of int8 products small, and the layers that stay float32."""

    rotate_heads: bool = True
    """Rotate the outputs of heads."""
    rotate_inner: bool = True
    """Rotate the inner activations of the feed-forward."""
    scale_features: bool = True
    """Make large features smaller."""
    compensate: bool = True
    """Round weights so that rounding errors cancel (GPTQ)."""
    split_latent_rows: bool = True
    """Give the rows of the decoder's latents their own range in the feed-forward."""
    float32: tuple[str, ...] = ()
    """Roles of the products that stay float32."""


FLOAT32, EXPORTED, NOT_SPLIT = "float32", "as exported", "rows not split"

VARIANTS = {
    "every product int8": QuantizationOptions(),
    "feed-forward's end float32": QuantizationOptions(float32=("ff",)),
    "value and gate float32": QuantizationOptions(float32=("value", "gate")),
    "attention float32": QuantizationOptions(float32=("q.linear", "k.linear", "v", "out")),
    "attention int8 only": QuantizationOptions(float32=("value", "gate", "ff")),
    "inner activations not rotated": QuantizationOptions(rotate_inner=False),
    "heads not rotated": QuantizationOptions(rotate_heads=False),
    "features not scaled": QuantizationOptions(scale_features=False),
    "rounded to nearest": QuantizationOptions(compensate=False),
    NOT_SPLIT: QuantizationOptions(split_latent_rows=False),
    "none of these steps": QuantizationOptions(
        rotate_heads=False, rotate_inner=False, scale_features=False, compensate=False, split_latent_rows=False
    ),
}


def variant_names(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    """Parse names of variants, separated by commas."""
    known = [FLOAT32, EXPORTED, *VARIANTS]
    chosen = value.split(",") if value else known
    if unknown := [name for name in chosen if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}")
    return chosen


@torch.no_grad()
def quantize_with_(graph: GraphEncoder | GraphDecoder, model: Same, options: QuantizationOptions) -> None:
    """Turn the products of a float32 graph into int8, in place, without the steps that the options leave out."""
    if options.rotate_heads:
        rotate_heads_(graph)
    moments = moments_of(graph, examples(graph, model, CALIBRATION_LATENTS, CALIBRATION_SEED))
    if options.scale_features:
        scale_features_(graph, moments)
    if not options.compensate:
        # For rows that are not correlated, every weight is rounded to the nearest step.
        moments = {key: torch.eye(len(moment)) for key, moment in moments.items()}
    inner = {key: moment for key, moment in moments.items() if key.endswith(".inner")}
    prepared = list(products(graph, moments))
    if not options.rotate_inner:
        for i, product in enumerate(prepared):
            if product.role == "ff":
                rounder = GptqRounder(inner[f"{product.block}.inner"])
                prepared[i] = replace(product, int8=Int8Branch(product.float32, rounder))  # type: ignore[arg-type]
    select_int8_(graph, prepared, [product for product in prepared if product.role not in options.float32])
    if not options.split_latent_rows:
        block: Any
        for block in graph.trunk.blocks:
            block.split_latent_rows = False


def apply_(graph: GraphEncoder | GraphDecoder, model: Same, variant: str, target_db: float) -> int:
    """Turn a float32 graph into a variant, in place; return how many products of its blocks are int8."""
    if variant == EXPORTED:
        quantize_(graph, model, target_db)
    elif variant != FLOAT32:
        quantize_with_(graph, model, VARIANTS[variant])
    return sum(isinstance(module, Int8Linear) for module in graph.modules())


def from_file(path: Path, model: Same, direction: Direction, latents: int) -> np.ndarray[Any, Any]:
    """Return the start of an audio file for an encoder, or the latents of it for a decoder."""
    config, length = model.config, latents * model.config.hop
    samples, rate = read_audio(path)
    if rate != config.sample_rate or samples.shape[1] < length:
        raise click.UsageError(f"{path}: not {length} samples at {config.sample_rate} Hz")
    clip = np.ascontiguousarray(to_channels(samples[:, :length], config.channels)[None])
    if direction == ENCODER:
        return clip
    with torch.inference_mode():
        return model.encode(torch.from_numpy(clip)).numpy()


@question
@click.argument("name")
@click.option("--direction", default=ENCODER, show_default=True, type=click.Choice([ENCODER, DECODER]))
@click.option("--variants", callback=variant_names, help="Separated by commas. [default: all]")
@click.option("--latents", default=64, show_default=True, type=click.IntRange(1))
@click.option(
    "--audio", type=click.Path(path_type=Path, exists=True), help="Use the start of this file instead of noise."
)
@click.option("--seed", default=0, show_default=True, help="Of the weights.")
@click.option("--int8-target", default=INT8_TARGET_DB, show_default=True, help=f"In dB, for {EXPORTED!r}.")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1))
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="[default: all cores]")
@plot_option
def main(
    name: str,
    direction: Direction,
    variants: list[str],
    latents: int,
    audio: Path | None,
    seed: int,
    int8_target: float,
    runs: int,
    threads: int | None,
    plot_path: Path | None,
) -> None:
    """Print the table for the encoder or decoder of one model; the last line is JSON."""
    threads = threads or available_cpus()
    # Encoders never split rows.
    chosen = [variant for variant in variants if direction == DECODER or variant != NOT_SPLIT]
    if not chosen:
        raise click.UsageError(f"{NOT_SPLIT!r} is a variant of decoders")
    torch.set_num_threads(threads)
    checkpoint = checkpoint_of(name, seed)
    model = Same.from_checkpoint(checkpoint)
    array = (
        from_file(audio, model, direction, latents)
        if audio
        else example_input(spec_of(checkpoint), direction, 1, latents, seed=1)
    )
    with torch.inference_mode():
        run = model.encode if direction == ENCODER else model.decode
        expected = run(torch.from_numpy(array)).numpy()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, variant in enumerate(chosen):
            graph = GRAPHS[direction](model)
            rows[variant] = {"int8_products": apply_(graph, model, variant, int8_target)}
            write_onnx(graph, Path(folder, f"{number}.onnx"))
            print(f"  written: {variant}", flush=True)
        del model, graph
        gc.collect()
        calls = {}
        for number, variant in enumerate(chosen):
            session = open_session(Path(folder, f"{number}.onnx"), threads, "int8")
            calls[variant] = partial(session.run, None, {session.get_inputs()[0].name: array})
            rows[variant]["snr_db"] = round(snr_db(expected, np.asarray(calls[variant]()[0])), 1)
        clock = time.process_time if threads == 1 else time.perf_counter
        for variant, times in interleaved(calls, runs, clock).items():
            rows[variant]["seconds"] = summary(times)
    print(f"\n| {name}, {direction}, {latents} latents | int8 products | SNR | fastest run |\n|---|---|---|---|")
    for variant, row in rows.items():
        print(f"| {variant} | {row['int8_products']} | {row['snr_db']} dB | {row['seconds']['min']:.3f} s |")
    if plot_path:
        panels = {
            "SNR in dB": {variant: row["snr_db"] for variant, row in rows.items()},
            "seconds": {variant: row["seconds"]["min"] for variant, row in rows.items()},
        }
        plot_bars(plot_path, panels, x=f"{name}, {direction}")
    settings = {
        "model": name,
        "direction": direction,
        "latents": latents,
        "seed": seed,
        "target": int8_target,
        "threads": threads,
    }
    finish("int8_trade", {**settings, "variants": rows})


if __name__ == "__main__":
    main()
