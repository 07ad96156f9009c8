"""What does int8 cost in accuracy and give in time, and what does each measure that keeps the error small?

Every variant is written as an ONNX graph, of seeded random weights or of `same-tiny`'s trained ones, and run in ONNX
Runtime, in turn with the others; the yardstick of accuracy is eager PyTorch in float32.

    python benchmarks/int8_trade.py same-s --half encoder --latents 64

With `--threads 1` times are processor time, which other work on the machine hardly disturbs.
"""

from __future__ import annotations

import gc
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from common import finish, interleaved, machine, open_session, summary

from samekit.spec import DECODER, ENCODER
from samekit_export.checkpoint import BUNDLED_FOLDERS, load, random_checkpoint
from samekit_export.export import GRAPHS, spec_of
from samekit_export.int8 import SEEN, examples, feed_apart, migrate_, moments_of, products, quantize_, rotate_heads_
from samekit_export.model import Same
from samekit_export.to_onnx import write_onnx
from samekit_export.verify import example_input, snr_db

if TYPE_CHECKING:
    from samekit_export.graph import GraphDecoder, GraphEncoder

FLOAT32, EXPORTED, ALL = "float32", "as exported", "every product int8"
FLAT, UNTURNED = "inner activations not rotated", "heads not rotated"
UNEVEN, NEAREST, TOGETHER = "features not scaled", "rounded to nearest", "rows not apart"
PLAIN = "none of these measures"

# Variant -> roles that stay float32.
KEPT = {
    ALL: (),
    "feed-forward's end float32": ("ff",),
    "value and gate float32": ("value", "gate"),
    "attention float32": ("q.linear", "k.linear", "v", "out"),
    "attention int8 only": ("value", "gate", "ff"),
    FLAT: (),
    UNTURNED: (),
    UNEVEN: (),
    NEAREST: (),
    TOGETHER: (),
    PLAIN: (),
}


def change(graph: GraphEncoder | GraphDecoder, model: Same, variant: str) -> int:
    """Make a variant of a float32 graph, in place; returns how many of its products are float32."""
    if variant == FLOAT32:
        return len(list(products(graph)))
    if variant == EXPORTED:
        return len(quantize_(graph, model))
    kept = 0
    with torch.no_grad():
        if variant not in (UNTURNED, PLAIN):
            rotate_heads_(graph)
        moments = moments_of(graph, examples(graph, model, SEEN))
        if variant not in (UNEVEN, PLAIN):
            migrate_(graph, moments)
        for product in products(
            graph, None if variant in (NEAREST, PLAIN) else moments, turn_inner=variant not in (FLAT, PLAIN)
        ):
            if product.name.partition(".")[2] in KEPT[variant]:
                kept += 1
            else:
                product.use(product.int8)
    if variant not in (TOGETHER, PLAIN):
        feed_apart(graph)
    return kept


@click.command()
@click.argument("name", type=click.Choice(["tiny-s", "tiny-l", "same-s", "same-l", "same-tiny"]))
@click.option("--half", default=ENCODER, show_default=True, type=click.Choice([ENCODER, DECODER]))
@click.option("--variants", help="Separated by commas. [default: all]")
@click.option("--latents", default=64, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, help="Of the weights.")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1))
@click.option("--threads", type=click.IntRange(1), help="[default: all cores]")
def main(name: str, half: str, variants: str | None, latents: int, seed: int, runs: int, threads: int | None) -> None:
    """Print the table for one half of one model; the last line is JSON."""
    threads = threads or machine()["cores"]
    chosen = variants.split(",") if variants else [FLOAT32, EXPORTED, *KEPT]
    if half == ENCODER and not variants:
        chosen.remove(TOGETHER)
    torch.set_num_threads(threads)
    checkpoint = load(name) if name in BUNDLED_FOLDERS else random_checkpoint(name, seed)
    model = Same.from_checkpoint(checkpoint)
    array = example_input(spec_of(checkpoint), half, 1, latents, seed=1)
    with torch.inference_mode():
        run = model.encode if half == ENCODER else model.decode
        expected = run(torch.from_numpy(array)).numpy()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, variant in enumerate(chosen):
            graph = GRAPHS[half](model)
            rows[variant] = {"float32_products": change(graph, model, variant)}
            write_onnx(graph, Path(folder, f"{number}.onnx"))
            print(f"  written: {variant}", flush=True)
        del model, graph
        gc.collect()
        calls = {}
        for number, variant in enumerate(chosen):
            session = open_session(Path(folder, f"{number}.onnx"), threads)
            calls[variant] = partial(session.run, None, {session.get_inputs()[0].name: array})
            rows[variant]["snr_db"] = round(snr_db(expected, np.asarray(calls[variant]()[0])), 1)
        clock = time.process_time if threads == 1 else time.perf_counter
        for variant, times in interleaved(calls, runs, clock).items():
            rows[variant]["seconds"] = summary(times)
    print(f"\n| {name}, {half}, {latents} latents | float32 products | SNR | fastest run |\n|---|---|---|---|")
    for variant, row in rows.items():
        print(f"| {variant} | {row['float32_products']} | {row['snr_db']} dB | {row['seconds']['min']:.3f} s |")
    settings = {"model": name, "half": half, "latents": latents, "seed": seed, "threads": threads}
    finish("int8_trade", {**settings, "variants": rows})


if __name__ == "__main__":
    main()
