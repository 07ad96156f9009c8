"""Give graphs int8 products, for CPUs: int8 weights with a scale per column, uint8 activations with a range per call.

A product becomes ONNX's DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime runs as one step. Everything else
stays float32. These measures keep the error small:

* The inner activations of the feed-forward, products of two activations with rare large values, are rotated by an
  orthogonal matrix in blocks (QuaRot, arXiv 2404.00456). This spreads large values, so the range shrinks. The outputs
  of heads are rotated too; that rotation is folded into the layers on either side.
* Features that are large at the input of a product are divided by a factor, and their weights are multiplied by it
  (SmoothQuant, arXiv 2211.10438). The division is folded into the layer before, or follows a norm.
* Weights are rounded so that rounding errors cancel over the rows of examples, see `gptq.py`.
* The decoder's rows of latents have larger values than its learned rows, so the feed-forward processes the two
  separately, each with its own range.
* Products that reduce the accuracy too much stay float32. `quantize_` finds them by measurement.

Activation ranges are computed on each call (dynamic quantization), so another window or batch rounds differently. The
same call gives the same numbers.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from samekit.engine.spec import INT8_TARGET_DB
from samekit.errors import CheckpointError
from samekit_export.gptq import GptqRounder
from samekit_export.graph import GraphDecoder, GraphEncoder
from samekit_export.graph_layers import Branch, Linear
from samekit_export.int8_layers import Int8Branch, Int8Linear, rotated, rotation_for
from samekit_export.music import music
from samekit_export.progress import logged
from samekit_export.verify import snr_db

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from samekit_export.graph import GraphBlock
    from samekit_export.graph_layers import Norm
    from samekit_export.model import Same

CALIBRATION_SEED, EVALUATION_SEED = 0, 1
"""Seeds of `examples`: of those for which weights are rounded, and of those on which accuracy is measured."""

CALIBRATION_LATENTS = 24
"""Latents of each calibration example."""

INNER_ROTATION = 16
"""Most inner activations that are rotated together. Larger blocks take longer and hardly improve accuracy."""

QUANTIZED_INPUTS = {
    "norm": ("k.linear", "q.linear", "v"),
    "heads": ("out",),
    "ff_norm": ("value", "gate"),
    "inner": ("ff",),
}
"""Inputs that are quantized in a block, and the layers that read each; the first layer reads all rows."""

FAINTEST = 1e-3
"""Features smaller than this fraction of the mean size are scaled as if they had it."""


def rotate_heads_(graph: GraphEncoder | GraphDecoder) -> None:
    """Rotate the output of every head, and undo it in the layer that reads it; in place. The function is the same."""
    block: GraphBlock
    for block in graph.trunk.blocks:  # type: ignore[assignment]
        rotation = rotation_for(block.head_width)
        v, out = block.v.weight.double(), block.out.weight.double()
        block.v.weight.copy_(rotated(v, rotation))
        block.out.weight.copy_(rotated(out.T, rotation).T)


def moments_of(graph: GraphEncoder | GraphDecoder, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return second moments `[in, in]` of the rows at each of `QUANTIZED_INPUTS`, under keys such as `11.inner`.

    Every example has the same weight, whatever its level.
    """
    moments: dict[str, Tensor] = {}

    def add_moment_to(key: str, learned_copies: int | None) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0]
            if learned_copies is not None:
                # One learned row represents those of all patches.
                rows = torch.cat([rows[:-1], rows[-1:] * math.sqrt(learned_copies * (len(rows) - 1))])
            # Large values are divided by a power of two, so that their squares are finite and nothing is rounded.
            rows = torch.ldexp(rows, -torch.frexp(rows.abs().max()).exponent)
            moment = rows.T @ rows
            moment /= moment.trace().clamp(min=torch.finfo(torch.float32).tiny)
            moments[key] = moment + moments[key] if key in moments else moment

        return hook

    with ExitStack() as hooks:
        for i, block in enumerate(graph.trunk.blocks):
            for name, layers in QUANTIZED_INPUTS.items():
                learned_once = isinstance(graph, GraphDecoder) and (i, name) == (0, "norm")
                hook = add_moment_to(f"{i}.{name}", graph.config.decoder.stride if learned_once else None)
                hooks.callback(block.get_submodule(layers[0]).register_forward_pre_hook(hook).remove)
        for x in inputs:
            graph(x)
    _check_finite(moments.values())
    return moments


def _check_finite(tensors: Iterable[Tensor]) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise CheckpointError("the model computes NaN or infinity for ordinary audio; download the checkpoint again")


def scale_features_(graph: GraphEncoder | GraphDecoder, moments: dict[str, Tensor]) -> None:
    """Divide features by the root of their size at each of `QUANTIZED_INPUTS`, and multiply weights by it; in place.

    The factors are powers of two, so float32 products do not change by a bit. The moments of `moments_of` are
    replaced by those of the scaled rows.
    """
    block: GraphBlock
    for i, block in enumerate(graph.trunk.blocks):  # type: ignore[assignment]
        for name, layers in QUANTIZED_INPUTS.items():
            moment = moments[f"{i}.{name}"]
            size = moment.diagonal().sqrt()
            # All sizes are zero where a block adds nothing.
            relative = size / size.mean().clamp(min=torch.finfo(torch.float32).tiny)
            factor = torch.exp2(relative.clamp(min=FAINTEST).log2().mul(-0.5).round())
            if (factor == 1).all():
                continue
            moments[f"{i}.{name}"] = moment * factor * factor[:, None]
            for layer in layers:
                weight: Tensor = block.get_submodule(layer).weight  # type: ignore[assignment]
                weight /= factor[:, None]
            if name in ("norm", "ff_norm"):
                norm: Norm = block.get_submodule(name)  # type: ignore[assignment]
                scale = factor[None] if norm.scale is None else norm.scale * factor
                norm.scale = nn.Parameter(scale, requires_grad=False)
            else:
                before = block.v if name == "heads" else block.value
                before.weight.mul_(factor)
                if before.bias is not None:
                    before.bias.mul_(factor)


@dataclass(frozen=True, eq=False)
class Product:
    """One product of a graph, in both forms."""

    block: int
    """Number of its block."""
    role: str
    """Its name in the block, such as `ff`."""
    parent: nn.Module
    """The module that holds it."""
    float32: Linear
    """The original layer."""
    int8: Int8Linear
    """The layer that can replace it."""

    def use(self, form: nn.Module) -> None:
        """Put one of the forms into the graph."""
        setattr(self.parent, self.role.rpartition(".")[2], form)


def products(graph: GraphEncoder | GraphDecoder, moments: dict[str, Tensor]) -> Iterator[Product]:
    """Yield both forms of the products of the blocks. Layers outside of the blocks are a hundredth of the work.

    The graph is float32. The moments of `moments_of` are removed from the dict, so that their memory is freed.
    """
    for i, block in enumerate(graph.trunk.blocks):
        for name, layers in QUANTIZED_INPUTS.items():
            linears: list[Linear] = [block.get_submodule(layer) for layer in layers]  # type: ignore[misc]
            moment, rotation = moments.pop(f"{i}.{name}"), None
            if name == "inner":
                rotation = rotation_for(len(linears[0].weight), INNER_ROTATION)
                moment = rotated(rotated(moment, rotation.float()).T, rotation.float())
            rounder = GptqRounder(moment)
            for layer, linear in zip(layers, linears, strict=True):
                form = Int8Branch if isinstance(linear, Branch) else Int8Linear
                parent = block.get_submodule(layer.rpartition(".")[0])
                yield Product(i, layer, parent, linear, form(linear, rounder, rotation))  # type: ignore[arg-type]


def examples(graph: GraphEncoder | GraphDecoder, model: Same, latents: int, seed: int) -> Iterator[Tensor]:
    """Yield noise and music of several levels: noise of a usual level first, latents of encoded audio last.

    Args:
        graph: the encoder or decoder that gets the inputs.
        model: the model that the graph was made from.
        latents: length of each example.
        seed: of the noise, of the chord's pitches and of the part of the music.
    """
    generator = np.random.default_rng(seed)
    config = graph.config
    hiss = generator.standard_normal((1, config.channels, latents * config.hop), np.float32)
    seconds = np.arange(hiss.shape[-1]) / config.sample_rate
    # In hertz, spread over the keys of a piano.
    pitches = 27.5 * 2 ** generator.uniform((0, 2, 4, 6), (2, 4, 6, 7))
    chord = sum(np.sin(2 * np.pi * pitch * seconds) for pitch in pitches)
    piece = music(config, latents, start=2 + 10 * seed)
    audio = [_tensor(array) for array in (0.2 * hiss, 0.01 * hiss, 0.3 * hiss, 0.2 * chord + 0.002 * hiss, piece)]
    if isinstance(graph, GraphEncoder):
        yield from audio
        return
    z = generator.standard_normal((1, config.latent_width, latents), np.float32)
    # Latents of real audio change slowly.
    slow = np.cumsum(z, axis=2) / np.sqrt(np.arange(1, latents + 1))
    yield from map(_tensor, (z, 0.5 * z, slow))
    for clip in audio:
        with torch.no_grad():
            encoded = model.encode(clip)
        yield encoded


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))


def prepare_(graph: GraphEncoder | GraphDecoder, model: Same) -> list[Product]:
    """Prepare a graph for int8 products, in place, and return both forms of each; its function stays the same."""
    with torch.no_grad():
        rotate_heads_(graph)
        moments = moments_of(graph, examples(graph, model, CALIBRATION_LATENTS, CALIBRATION_SEED))
        scale_features_(graph, moments)
        return list(logged(products(graph, moments), "rounding the weights of products"))


def select_int8_(graph: GraphEncoder | GraphDecoder, prepared: Iterable[Product], int8: Collection[Product]) -> None:
    """Put the int8 form of the products `int8` into a prepared graph, and the float32 form of the others; in place."""
    for product in prepared:
        product.use(product.int8 if product in int8 else product.float32)
    if isinstance(graph, GraphDecoder):
        block: GraphBlock
        for block in graph.trunk.blocks:  # type: ignore[assignment]
            block.split_latent_rows = isinstance(block.ff, Int8Linear)


def quantize_(
    graph: GraphEncoder | GraphDecoder, model: Same, target_db: float = INT8_TARGET_DB, latents: int = 8
) -> list[str]:
    """Turn the products of the blocks into int8, in place, as long as the accuracy is at least `target_db`.

    If not all can be int8, each product is measured alone. Those that add the most noise for their size stay float32.
    Bisection finds their number: with one more product in int8, the accuracy would be below the target.

    Args:
        graph: float32, not prepared.
        model: the model that the graph was made from.
        target_db: least accuracy against the float32 graph, on the worst of `examples`. Verification requires less, see
            `samekit.engine.accuracy.floor_db`.
        latents: length of each example.

    Returns:
        Names of the products that stay float32, such as `11.ff`.

    Raises:
        CheckpointError: the outputs for the examples are not finite.
    """
    inputs = list(examples(graph, model, latents, EVALUATION_SEED))
    # Dozens of products are measured alone, so one short example has to suffice for each.
    probe_input = next(examples(graph, model, max(1, latents // 4), EVALUATION_SEED))
    with torch.no_grad():
        expected = [graph(x) for x in inputs]
        _check_finite(expected)
        probe_output = graph(probe_input).numpy()
        prepared = prepare_(graph, model)

        def reaches_target(int8: Collection[Product]) -> bool:
            select_int8_(graph, prepared, int8)
            return all(snr_db(y.numpy(), graph(x).numpy()) >= target_db for x, y in zip(inputs, expected, strict=True))

        def noise_per_weight(product: Product) -> float:
            select_int8_(graph, prepared, [product])
            return 10 ** (-snr_db(probe_output, graph(probe_input).numpy()) / 10) / product.int8.weight.numel()

        if reaches_target(prepared):
            return []
        noises = [noise_per_weight(product) for product in logged(prepared, "measuring the noise of products")]
        by_noise = [product for _, product in sorted(zip(noises, prepared, strict=True), key=lambda pair: pair[0])]
        enough, too_many = 0, len(by_noise)
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if reaches_target(by_noise[:middle]):
                enough = middle
            else:
                too_many = middle
        select_int8_(graph, prepared, by_noise[:enough])
    return [f"{product.block}.{product.role}" for product in prepared if product in by_noise[enough:]]
