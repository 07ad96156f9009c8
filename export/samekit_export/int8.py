"""Graphs with int8 products, for CPUs: weights int8 per column, activations uint8 with the range of each call.

A product becomes ONNX's DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime runs as one step. Everything else
stays float32. What keeps the error small:

* the inner activations of the feed-forward, products of two activations with rare large values, are rotated by an
  orthogonal matrix in blocks (QuaRot, arXiv 2404.00456): large values spread, and the range shrinks. So are the heads'
  outputs, for which the rotation is folded into the layers on either side;
* features that are large at every product's input are made smaller, and their weights larger (SmoothQuant, arXiv
  2211.10438): folded into the layer before, or a factor after a norm;
* weights are rounded so that their errors cancel over the rows of examples: see `gptq.py`;
* the decoder's own rows of latents are larger than its learned rows, so both feed forward apart, each with its range;
* products that cost a model too much accuracy stay float32: few, found by measurement. See `quantize_`.

Ranges are those of everything in a call, so another window or batch rounds differently; the same call gives the same
numbers.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from samekit.errors import CheckpointError
from samekit_export.gptq import GptqRounder
from samekit_export.graph import GraphDecoder, GraphEncoder
from samekit_export.graph_layers import Branch, Linear
from samekit_export.int8_layers import Int8Branch, Int8Linear, rotated, rotation_for
from samekit_export.verify import snr_db

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from samekit_export.graph import GraphBlock
    from samekit_export.graph_layers import Norm
    from samekit_export.model import Same

TARGET_DB = 38.0
"""What an export aims at, on examples that nothing was fitted to; what every case must hold is `verify.FLOOR_DB`."""

CALIBRATION_SEED, EVALUATION_SEED = 0, 1
"""Seeds of `examples`: those that weights are rounded for, and those that accuracy is measured on."""

FITTED_LATENTS = 24
"""Latents of each example that weights are rounded for."""

INNER_ROTATION = 16
"""Most inner activations that are rotated together. Longer blocks take longer and gain little."""

QUANTIZED_INPUTS = {
    "norm": ("k.linear", "q.linear", "v"),
    "heads": ("out",),
    "ff_norm": ("value", "gate"),
    "inner": ("ff",),
}
"""Where rows are rounded in a block, and the products that read them there; the first of them sees all rows."""

FAINTEST = 1e-3
"""How far below the mean size a feature may lie and still be made larger for it."""


@dataclass(frozen=True)
class QuantizationOptions:
    """What keeps the error of int8 products small; exports take all of it, `benchmarks/int8_trade.py` measures each."""

    rotate_heads: bool = True
    """Spread large values of the heads' outputs."""
    rotate_inner: bool = True
    """Spread large inner activations of the feed-forward."""
    scale_features: bool = True
    """Make large features smaller."""
    compensate: bool = True
    """Round weights so that errors cancel."""
    split_latent_rows: bool = True
    """Give the rows of the decoder's latents a range of their own in the feed-forward."""


MEASURES = QuantizationOptions()
"""What graphs are exported with."""


def rotate_heads_(graph: GraphEncoder | GraphDecoder) -> None:
    """Rotate every head's output, and undo it in the layer that reads it: the same function; in place."""
    block: GraphBlock
    for block in graph.trunk.blocks:  # type: ignore[assignment]
        rotation = rotation_for(block.head_width)
        v, out = block.v.weight.double(), block.out.weight.double()
        block.v.weight.copy_(rotated(v, rotation))
        block.out.weight.copy_(rotated(out.T, rotation).T)


def moments_of(graph: GraphEncoder | GraphDecoder, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Second moments `[in, in]` of the rows at each of `QUANTIZED_INPUTS`, by block and name such as `11.inner`.

    Every input counts alike, however quiet it is.
    """
    moments: dict[str, Tensor] = {}

    def listen(key: str, stride: int | None) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0]
            if stride is not None:
                # One learned row stands for those of all patches.
                rows = torch.cat([rows[:-1], rows[-1:] * math.sqrt(stride * (len(rows) - 1))])
            # A power of two, so that squares of large values stay in float32 and all others the same.
            rows = torch.ldexp(rows, -torch.frexp(rows.abs().max()).exponent)
            moment = rows.T @ rows
            moment /= moment.trace().clamp(min=torch.finfo(torch.float32).tiny)
            moments[key] = moment + moments[key] if key in moments else moment

        return hook

    with ExitStack() as hooks:
        for i, block in enumerate(graph.trunk.blocks):
            for place, readers in QUANTIZED_INPUTS.items():
                once = isinstance(graph, GraphDecoder) and (i, place) == (0, "norm")
                hook = listen(f"{i}.{place}", graph.config.decoder.stride if once else None)
                hooks.callback(block.get_submodule(readers[0]).register_forward_pre_hook(hook).remove)
        for x in inputs:
            graph(x)
    _check_finite(moments.values())
    return moments


def _check_finite(tensors: Iterable[Tensor]) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise CheckpointError("the model makes NaN or infinity of ordinary audio; download the checkpoint again")


def scale_features_(graph: GraphEncoder | GraphDecoder, moments: dict[str, Tensor]) -> None:
    """Divide features by the root of their size at each of `QUANTIZED_INPUTS`, and multiply weights by it; in place.

    The factors are powers of two, so that float32 products stay the same to the bit.

    Args:
        graph: float32.
        moments: of `moments_of`; become those of the scaled rows.
    """
    block: GraphBlock
    for i, block in enumerate(graph.trunk.blocks):  # type: ignore[assignment]
        for place, readers in QUANTIZED_INPUTS.items():
            moment = moments[f"{i}.{place}"]
            size = moment.diagonal().sqrt()
            # All sizes are zero where a block adds nothing.
            relative = size / size.mean().clamp(min=torch.finfo(torch.float32).tiny)
            factor = torch.exp2(relative.clamp(min=FAINTEST).log2().mul(-0.5).round())
            if (factor == 1).all():
                continue
            moments[f"{i}.{place}"] = moment * factor * factor[:, None]
            for reader in readers:
                weight: Tensor = block.get_submodule(reader).weight  # type: ignore[assignment]
                weight /= factor[:, None]
            if place in ("norm", "ff_norm"):
                norm: Norm = block.get_submodule(place)  # type: ignore[assignment]
                scale = factor[None] if norm.scale is None else norm.scale * factor
                norm.scale = nn.Parameter(scale, requires_grad=False)
            else:
                before = block.v if place == "heads" else block.value
                before.weight.mul_(factor)
                if before.bias is not None:
                    before.bias.mul_(factor)


@dataclass(frozen=True, eq=False)
class Product:
    """One product of a graph, and both of its forms."""

    block: int
    """Its block's number."""
    role: str
    """Its name in the block, such as `ff`."""
    parent: nn.Module
    """The module that holds it."""
    float32: Linear
    """As it was."""
    int8: Int8Linear
    """What may take its place."""

    def use(self, form: nn.Module) -> None:
        """Put one of the forms into the graph."""
        setattr(self.parent, self.role.rpartition(".")[2], form)


def products(
    graph: GraphEncoder | GraphDecoder, moments: dict[str, Tensor] | None = None, *, rotate_inner: bool = True
) -> Iterator[Product]:
    """Make both forms of the products of the blocks; the ends are a hundredth of the work and stay float32.

    Args:
        graph: float32.
        moments: of `moments_of`, to round weights for such rows, each freed after its use; without, weights are
            rounded to the nearest step.
        rotate_inner: rotate the inner activations where they become int8.
    """
    for i, block in enumerate(graph.trunk.blocks):
        for place, readers in QUANTIZED_INPUTS.items():
            linears: list[Linear] = [block.get_submodule(reader) for reader in readers]  # type: ignore[misc]
            moment = moments.pop(f"{i}.{place}") if moments else None
            rotation = None
            if rotate_inner and place == "inner":
                rotation = rotation_for(len(linears[0].weight), INNER_ROTATION)
                if moment is not None:
                    moment = rotated(rotated(moment, rotation.float()).T, rotation.float())
            rounder = None if moment is None else GptqRounder(moment)
            for reader, linear in zip(readers, linears, strict=True):
                form = Int8Branch if isinstance(linear, Branch) else Int8Linear
                parent = block.get_submodule(reader.rpartition(".")[0])
                yield Product(i, reader, parent, linear, form(linear, rounder, rotation))  # type: ignore[arg-type]


def examples(graph: GraphEncoder | GraphDecoder, model: Same, latents: int, seed: int) -> Iterator[Tensor]:
    """Inputs of several kinds and levels: the first is noise of a usual level, those that take a model last.

    Args:
        graph: the half they are for.
        model: what it was made of, for examples of latents.
        latents: of each.
        seed: of the noise and the pitches of the chord.
    """
    generator = np.random.default_rng(seed)
    config = graph.config
    hiss = generator.standard_normal((1, config.channels, latents * config.hop), np.float32)
    seconds = np.arange(hiss.shape[-1]) / config.sample_rate
    # In hertz, spread over the keys of a piano.
    pitches = 27.5 * 2 ** generator.uniform((0, 2, 4, 6), (2, 4, 6, 7))
    chord = sum(np.sin(2 * np.pi * pitch * seconds) for pitch in pitches)
    audio = [_tensor(array) for array in (0.2 * hiss, 0.01 * hiss, 0.3 * hiss, 0.2 * chord + 0.002 * hiss)]
    if isinstance(graph, GraphEncoder):
        yield from audio
        return
    z = generator.standard_normal((1, config.latent_width, latents), np.float32)
    # Latents of real audio move slowly.
    slow = np.cumsum(z, axis=2) / np.sqrt(np.arange(1, latents + 1))
    yield from map(_tensor, (z, 0.5 * z, slow))
    for clip in audio:
        with torch.no_grad():
            encoded = model.encode(clip)
        yield encoded


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))


def prepare_(graph: GraphEncoder | GraphDecoder, model: Same, options: QuantizationOptions = MEASURES) -> list[Product]:
    """Make a graph bear int8 products, with the same function still, and give both forms of each; in place."""
    with torch.no_grad():
        if options.rotate_heads:
            rotate_heads_(graph)
        moments = moments_of(graph, examples(graph, model, FITTED_LATENTS, CALIBRATION_SEED))
        if options.scale_features:
            scale_features_(graph, moments)
        return list(products(graph, moments if options.compensate else None, rotate_inner=options.rotate_inner))


def use_(
    graph: GraphEncoder | GraphDecoder,
    found: Iterable[Product],
    int8: Collection[Product],
    options: QuantizationOptions = MEASURES,
) -> None:
    """Put the int8 form of some products into a graph, and float32 of the others; in place.

    Args:
        graph: what `prepare_` was given.
        found: what it returned.
        int8: those of them that are to be int8.
        measures: as for `prepare_`.
    """
    for product in found:
        product.use(product.int8 if product in int8 else product.float32)
    if isinstance(graph, GraphDecoder):
        block: GraphBlock
        for block in graph.trunk.blocks:  # type: ignore[assignment]
            block.split_latent_rows = options.split_latent_rows and isinstance(block.ff, Int8Linear)


def quantize_(
    graph: GraphEncoder | GraphDecoder, model: Same, target_db: float = TARGET_DB, latents: int = 8
) -> list[str]:
    """Turn the products of the blocks into int8, but for those that keep the graph from `target_db`; in place.

    Where not all can be int8, each is tried alone, and those that add most noise for their size stay float32: how many
    is found by halving, so that one more in int8 misses the target.

    Args:
        graph: as it was made, float32.
        model: what it was made of, for examples of latents.
        target_db: against the float32 graph, on the worst of `examples`.
        latents: in an example.

    Returns:
        Names of the products that stay float32, such as `11.ff`.

    Raises:
        CheckpointError: the model makes NaN or infinity of the examples.
    """
    given = list(examples(graph, model, latents, EVALUATION_SEED))
    # Each product alone is tried on a little only: there are dozens of them, of ten megabytes each.
    probe_input = next(examples(graph, model, max(1, latents // 4), EVALUATION_SEED))
    with torch.no_grad():
        outputs = [graph(x) for x in given]
        _check_finite(outputs)
        wanted = [y.numpy() for y in outputs]
        wanted_of_little = graph(probe_input).numpy()
        found = prepare_(graph, model)

        def suffices(int8: Collection[Product]) -> bool:
            use_(graph, found, int8)
            return all(snr_db(y, graph(x).numpy()) >= target_db for x, y in zip(given, wanted, strict=True))

        def noise_per_weight(product: Product) -> float:
            """Noise for each weight that becomes int8."""
            use_(graph, found, [product])
            return 10 ** (-snr_db(wanted_of_little, graph(probe_input).numpy()) / 10) / product.int8.weight.numel()

        if suffices(found):
            return []
        by_harm = sorted(found, key=noise_per_weight)
        enough, too_many = 0, len(by_harm)
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if suffices(by_harm[:middle]):
                enough = middle
            else:
                too_many = middle
        use_(graph, found, by_harm[:enough])
    return [f"{product.block}.{product.role}" for product in found if product in by_harm[enough:]]
