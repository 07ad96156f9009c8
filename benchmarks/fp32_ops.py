"""Which steps of a float16 graph must stay in float32? This measures the accuracy with and without each of them.

PyTorch on a CPU rounds the result of every float16 operation, as a GPU does. ONNX Runtime on a CPU computes float16
graphs in float32, so its figures would be too good. The reference is eager PyTorch in float32. The model is same-s,
same-l, tiny-s or tiny-l with random weights, same-tiny, or a checkpoint folder.

    python benchmarks/fp32_ops.py same-s --latents 6
    python benchmarks/fp32_ops.py same-l --latents 2 --worst-cases
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from common import checkpoint_of, finish, plot_bars, plot_option, question

from samekit_export.graph import GraphDecoder, GraphEncoder
from samekit_export.graph_layers import Linear
from samekit_export.model import Same
from samekit_export.verify import snr_db

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from torch import Tensor

    from samekit_export.graph import Graph

STEPS = {
    "ends": "the mapping of patches and the layer at the latents: half a percent of the arithmetic",
    "residual": "the residual stream, and the tanh of the norms that read it",
    "heads": "the norm of queries and keys",
    "rotary": "rotary embedding",
    "softmax": "both softmaxes and their difference",
    "gate": "the activation of the gate and its product with the value",
}
"""The steps that can stay in float32."""
EXPORTED = frozenset({"ends", "residual", "softmax"})
"""The steps that stay in float32 when a graph is exported."""


def variants() -> Iterator[tuple[str, AbstractSet[str]]]:
    """Yield the exported steps, all, none, and the exported ones with one more or one less."""
    yield "exported", EXPORTED
    yield "all", STEPS.keys()
    yield "none", frozenset()
    for step in STEPS:
        yield f"{'without' if step in EXPORTED else 'with'} {step}", EXPORTED ^ {step}


def _output_to_float32(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def _input_to(dtype: torch.dtype) -> Callable[..., tuple[Any, ...]]:
    return lambda _module, inputs: (inputs[0].to(dtype), *inputs[1:])


def to_float16_(graph: Graph, fp32: AbstractSet[str]) -> None:
    """Turn a graph into float16, in place, with only the steps `fp32` in float32."""
    graph.to_float16_()
    if "ends" not in fp32:
        for module in graph.modules():
            if isinstance(module, Linear):
                module.half()
    residual_dtype = torch.float32 if "residual" in fp32 else torch.float16
    graph.trunk.register_forward_pre_hook(_input_to(residual_dtype))
    block: Any
    for block in graph.trunk.blocks:
        for step, modules in {
            "heads": (block.q.linear, block.k.linear),
            "rotary": (block.q, block.k),
            "gate": (block.gate,),
        }.items():
            for module in modules if step in fp32 else ():
                module.register_forward_hook(_output_to_float32)
        if "softmax" not in fp32:
            block.softmax.register_forward_pre_hook(_input_to(torch.float16))


def usual_inputs(model: Same, latents: int) -> tuple[Tensor, Tensor]:
    """Return noise: audio at -14 dBFS, and latents of unit variance."""
    noise = np.random.default_rng(0)
    config = model.config
    audio = 0.2 * noise.standard_normal((1, config.channels, latents * config.hop), np.float32)
    return torch.from_numpy(audio), torch.from_numpy(
        noise.standard_normal((1, config.latent_width, latents), np.float32)
    )


def worst_inputs(model: Same, latents: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return extreme inputs by name, for the encoder and the decoder."""
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


def accuracy(graph: Graph, expected: Tensor, inputs: Tensor) -> str:
    """Return the SNR in dB, or "refused" for an output that is not finite."""
    out = graph(inputs)
    return f"{snr_db(expected.numpy(), out.numpy()):.1f}" if bool(out.isfinite().all()) else "refused"


def measure(model: Same, fp32: AbstractSet[str], cases: dict[str, tuple[Tensor, Tensor]]) -> dict[str, list[str]]:
    """Return the accuracy of the encoder and the decoder of one variant, for each case."""
    rows: dict[str, list[str]] = {case: [] for case in cases}
    # One graph at a time: at full size each takes gigabytes.
    for index, graph_class in enumerate((GraphEncoder, GraphDecoder)):
        graph = graph_class(model)
        to_float16_(graph, fp32)
        eager = (model.encode, model.decode)[index]
        for case, pair in cases.items():
            rows[case].append(accuracy(graph, eager(pair[index]), pair[index]))
        del graph
    return rows


@question
@click.argument("name")
@click.option("--latents", default=6, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--only", multiple=True, type=click.Choice([name for name, _ in variants()]), help="These variants; several."
)
@click.option("--worst-cases", is_flag=True, help="The exported graphs on extreme inputs instead of the variants.")
@plot_option
def main(name: str, latents: int, seed: int, only: tuple[str, ...], worst_cases: bool, plot_path: Path | None) -> None:
    """Print the table for one model; the last line is JSON."""
    model = Same.from_checkpoint(checkpoint_of(name, seed))
    rows = {}
    with torch.inference_mode():
        if worst_cases:
            rows = measure(model, EXPORTED, worst_inputs(model, latents))
        else:
            for variant, fp32 in variants():
                if only and variant not in only:
                    continue
                rows |= measure(model, fp32, {variant: usual_inputs(model, latents)})
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
    finish("fp32_ops", {"model": name, "latents": latents, "seed": seed, "snr_db": rows})


if __name__ == "__main__":
    main()
