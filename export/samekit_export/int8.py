"""Graphs with int8 products, for CPUs: weights int8 per column, activations uint8 with the range of each call.

A product becomes ONNX's DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime runs as one step. Everything else
stays float32. What keeps the error small:

* the inner activations of the feed-forward, products of two activations with rare large values, are rotated by an
  orthogonal matrix in blocks first (QuaRot, arXiv 2404.00456): large values spread, and the range halves. The weights
  are rotated with them, so no calibration decides what is accurate;
* the decoder's own rows of latents are larger than its learned rows, so both feed forward apart, each with its range;
* products that cost a model too much accuracy stay float32: as few as reach a target, by measurement. See `quantize_`.

Ranges are those of everything in a call, so another window or batch rounds differently; the same call gives the same
numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnxscript import opset18
from torch import Tensor, nn

from samekit_export.graph import Branch, GraphDecoder, GraphEncoder, Linear
from samekit_export.verify import snr_db

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from samekit_export.graph import GraphBlock

TARGET_DB = 38.0
"""What an export aims at, on the inputs of `examples`; what every case must hold is `verify.FLOOR_DB`."""

ROTATED = 64
"""Inner activations that are rotated together. Longer blocks cost more and gain little."""

FLOAT = 1
"""ONNX's number for float32."""


@torch.library.custom_op("samekit::int8_product", mutates_args=())
def int8_product(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`rows @ (weight * scale)` with rows `[rows, in]` rounded to 256 steps, weight int8 `[in, out]`, scale `[out]`.

    The arithmetic of DynamicQuantizeLinear and MatMulInteger; the sums are float32, where a runtime's are int32.
    """
    low, high = rows.amin().clamp(max=0), rows.amax().clamp(min=0)
    step = (high - low) / 255
    if step == 0:
        return rows.new_zeros(rows.shape[0], weight.shape[1])
    zero = torch.round(-low / step)
    steps = torch.clamp(torch.round(rows / step) + zero, 0, 255) - zero
    return (steps @ weight.float()) * (step * scale)


@int8_product.register_fake
def _(rows: Tensor, weight: Tensor, _scale: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _int8_product_onnx(rows: Any, weight: Any, scale: Any) -> Any:
    """The form that ONNX Runtime fuses, a bias added to it included."""
    # The exporter writes opset 18 first, and converts all of it to the graph's.
    steps, step, zero = opset18.DynamicQuantizeLinear(rows)
    total = opset18.Cast(opset18.MatMulInteger(steps, weight, zero), to=FLOAT)
    return opset18.Mul(total, opset18.Mul(step, scale))


ONNX_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.samekit.int8_product.default: _int8_product_onnx
}
"""How the operators of this module are written."""


class Int8Linear(nn.Module):
    """A `Linear` with an int8 product.

    Args:
        linear: what is replaced.
        rotated: whether its rows are rotated first.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: Linear, *, rotated: bool = False) -> None:
        super().__init__()
        weight = linear.weight.double()
        self.rotation = rotation(ROTATED) if rotated else None
        if self.rotation is not None:
            weight = (self.rotation.double().T @ weight.view(-1, ROTATED, weight.shape[1])).reshape(weight.shape)
        scale = weight.abs().amax(dim=0).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", torch.round(weight / scale).to(torch.int8))
        self.register_buffer("scale", scale.float())
        # A vector: the fused step takes no other bias.
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias[0], requires_grad=False)
        self.dtype = linear.dtype

    def forward(self, rows: Tensor) -> Tensor:
        """`[rows, in]` to `[rows, out]`, float32."""
        if self.rotation is not None:
            rows = (rows.reshape(-1, ROTATED) @ self.rotation).reshape(rows.shape)
        product: Tensor = int8_product(rows, self.weight, self.scale)
        return product if self.bias is None else product + self.bias


class Int8Branch(Int8Linear):
    """A `Branch` with an int8 product."""

    def __init__(self, branch: Branch, *, rotated: bool = False) -> None:
        super().__init__(branch, rotated=rotated)
        self.residual_scale = branch.scale

    def forward(self, rows: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """`[rows, in]` and `[rows, out]` to `[rows, out]`, float32."""
        return super().forward(rows) + residual * self.residual_scale


def rotation(size: int) -> nn.Parameter:
    """A Hadamard matrix, orthogonal, `[size, size]`; the size is a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return nn.Parameter(matrix / math.sqrt(size), requires_grad=False)


@dataclass(frozen=True, eq=False)
class Product:
    """One product of a graph, and both of its forms."""

    name: str
    """Of the module in the graph."""
    parent: nn.Module
    """The module that holds it."""
    float32: Linear
    """As it was."""
    int8: Int8Linear
    """What may take its place."""

    def use(self, form: nn.Module) -> None:
        """Put one of the forms into the graph."""
        setattr(self.parent, self.name.rpartition(".")[2], form)


def products(graph: GraphEncoder | GraphDecoder, *, rotate: bool = True) -> Iterator[Product]:
    """The products of the blocks; the ends are a hundredth of the work and stay float32."""
    modules = dict(graph.named_modules())
    for name, module in modules.items():
        if name.startswith("trunk.blocks.") and isinstance(module, Linear):
            block, _, role = name.removeprefix("trunk.blocks.").partition(".")
            parent = modules[name.rpartition(".")[0]]
            rotated = rotate and role == "ff"
            form: Int8Linear
            if isinstance(module, Branch):
                form = Int8Branch(module, rotated=rotated)
            else:
                form = Int8Linear(module, rotated=rotated)
            yield Product(f"{block}.{role}", parent, module, form)


def examples(graph: GraphEncoder | GraphDecoder, latents: int) -> list[Tensor]:
    """Inputs of several kinds and levels, seeded: the first is noise of a usual level."""
    noise = np.random.default_rng(0)
    config = graph.config
    if isinstance(graph, GraphDecoder):
        z = noise.standard_normal((1, config.latent_width, latents), np.float32)
        # Latents of real audio move slowly.
        arrays = [z, 0.5 * z, np.cumsum(z, axis=2) / np.sqrt(np.arange(1, latents + 1))]
    else:
        hiss = noise.standard_normal((1, config.channels, latents * config.hop), np.float32)
        seconds = np.arange(hiss.shape[-1]) / config.sample_rate
        chord = sum(np.sin(2 * np.pi * pitch * seconds) for pitch in (110, 277.2, 659.3, 2637))
        arrays = [0.2 * hiss, 0.01 * hiss, 0.2 * chord + 0.002 * hiss]
    return [torch.from_numpy(np.asarray(array, np.float32)) for array in arrays]


def quantize_(graph: GraphEncoder | GraphDecoder, target_db: float = TARGET_DB, latents: int = 8) -> list[str]:
    """Turn the products of the blocks into int8, but for those that keep the graph from `target_db`; in place.

    Where not all can be int8, each is tried alone, and those that add most noise for their size stay float32.

    Args:
        graph: as it was made, float32.
        target_db: against the float32 graph, on the worst of `examples`.
        latents: in an example.

    Returns:
        Names of the products that stay float32, such as `11.ff`.
    """
    given = examples(graph, latents)
    # Each product alone is tried on a little only: there are dozens of them, of ten megabytes each.
    little = examples(graph, max(1, latents // 4))[:1]
    with torch.inference_mode():
        wanted, wanted_of_little = ([graph(x).numpy() for x in inputs] for inputs in (given, little))
        found = list(products(graph))

        def use(int8: Sequence[Product]) -> None:
            for product in found:
                product.use(product.int8 if product in int8 else product.float32)
            feed_apart(graph)

        def suffices(int8: Sequence[Product]) -> bool:
            use(int8)
            return all(snr_db(y, graph(x).numpy()) >= target_db for x, y in zip(given, wanted, strict=True))

        def harm(product: Product) -> float:
            """Noise for each weight that becomes int8."""
            use([product])
            return 10 ** (-snr_db(wanted_of_little[0], graph(little[0]).numpy()) / 10) / product.int8.weight.numel()

        if suffices(found):
            return []
        harmless = sorted(found, key=harm)
        # The most that reach the target, by halving.
        enough, too_many = 0, len(harmless)
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if suffices(harmless[:middle]):
                enough = middle
            else:
                too_many = middle
        use(harmless[:enough])
    return [product.name for product in found if product in harmless[enough:]]


def feed_apart(graph: GraphEncoder | GraphDecoder) -> None:
    """Let the rows of the decoder's latents feed forward apart where the inner activations are int8."""
    if isinstance(graph, GraphDecoder):
        block: GraphBlock
        for block in graph.trunk.blocks:  # type: ignore[assignment]
            block.apart = isinstance(block.ff, Int8Linear)
