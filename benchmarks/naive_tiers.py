"""How accurate would a model be in lower precision without any of our measures?

bfloat16 and float16: PyTorch with the whole model in that type, which rounds the result of every operation. int8: each
weight of the blocks is rounded to the nearest step of its output, and each input of a product to 256 steps of its
range. The reference is eager PyTorch in float32. Published figures for the latents of trained weights: SAME-S 36 dB in
bfloat16 and 24 dB in int8, SAME-L 46 dB in float16 and 30 dB in int8. So this shows whether random weights behave like
trained ones.

    python benchmarks/naive_tiers.py same-s --latents 16
    python benchmarks/naive_tiers.py tests/same-tiny-band
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import click
import torch
from common import checkpoint_of, finish, question
from torch import nn

from samekit.engine.accuracy import example_input
from samekit.engine.spec import DECODER, DIRECTIONS, ENCODER, Direction
from samekit_export.model import Same
from samekit_export.model_spec import spec_of
from samekit_export.music import music
from samekit_export.verify import snr_db

if TYPE_CHECKING:
    from torch import Tensor

    from samekit_export.tensors import Checkpoint

TIERS = ("bf16", "fp16", "int8 weights", "int8")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 127


def _round_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round the input of a product to 256 steps of its range, as DynamicQuantizeLinear does."""
    x = inputs[0]
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / 255
    zero = torch.round(-low / step)
    return ((torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step, *inputs[1:])


def lowered(model: Same, tier: str) -> Same:
    """Return a copy of a model that computes in a tier."""
    if tier in DTYPES:
        return copy.deepcopy(model).to(DTYPES[tier])
    model = copy.deepcopy(model)
    for trunk in (model.encoder_parts[0], model.decoder_parts[1]):
        for module in trunk.transformers.modules():
            if isinstance(module, nn.Linear):
                step = module.weight.abs().amax(dim=1, keepdim=True) / STEPS
                module.weight.copy_(torch.round(module.weight / step) * step)
                if tier == "int8":
                    module.register_forward_pre_hook(_round_input)
    return model


@torch.inference_mode()
def naive_tiers(checkpoint: Checkpoint, latents: int, tiers: tuple[str, ...] = TIERS) -> list[dict[str, Any]]:
    """Return a row for each tier, direction and content: noise, and music or its latents."""
    model, spec = Same.from_checkpoint(checkpoint), spec_of(checkpoint)

    def run(model: Same, direction: Direction, x: Tensor) -> Tensor:
        x = x.to(model.bottleneck["running_std"].dtype)
        return (model.encode(x) if direction == ENCODER else model.decode(x)).float()

    noise = {d: torch.from_numpy(example_input(spec, d, 1, latents, seed=0)) for d in DIRECTIONS}
    sound = {ENCODER: torch.from_numpy(music(spec, latents))}
    sound[DECODER] = model.encode(sound[ENCODER])
    inputs = {(d, content): given[d] for content, given in (("noise", noise), ("music", sound)) for d in DIRECTIONS}
    expected = {key: run(model, key[0], x).numpy() for key, x in inputs.items()}
    rows = []
    for tier in tiers:
        tested = lowered(model, tier)
        for (direction, content), x in inputs.items():
            output = run(tested, direction, x)
            snr = snr_db(expected[direction, content], output.numpy()) if bool(output.isfinite().all()) else None
            rows.append({"tier": tier, "direction": direction, "content": content, "snr_db": snr})
    return rows


@question
@click.argument("model")
@click.option("--latents", default=16, show_default=True, type=click.IntRange(1))
@click.option("--tiers", default=",".join(TIERS), show_default=True, help="Separated by commas.")
@click.option("--threads", type=click.IntRange(1), help="[default: all cores]")
def main(model: str, latents: int, tiers: str, threads: int | None) -> None:
    """Print the table for same-s, same-l, tiny-s or tiny-l with random weights, same-tiny, or a checkpoint folder."""
    if threads:
        torch.set_num_threads(threads)
    if unknown := set(tiers.split(",")) - set(TIERS):
        raise click.BadParameter(f"{min(unknown)!r} is none of {', '.join(TIERS)}")
    rows = naive_tiers(checkpoint_of(model), latents, tuple(tiers.split(",")))
    print(f"| {model}, {latents} latents | noise: encode dB | decode dB | music: encode dB | decode dB |")
    print("|---|---|---|---|---|")
    for tier in tiers.split(","):
        cells = ["overflow" if r["snr_db"] is None else f"{r['snr_db']:.1f}" for r in rows if r["tier"] == tier]
        print(f"| {tier} | {' | '.join(cells)} |")
    finish("naive_tiers", rows)


if __name__ == "__main__":
    main()
