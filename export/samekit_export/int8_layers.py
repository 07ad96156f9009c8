"""Linear layers with int8 products, in PyTorch and in ONNX, and the rotations before them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from onnxscript import opset18
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit_export.gptq import GptqRounder
    from samekit_export.graph_layers import Branch, Linear


FLOAT = 1
"""ONNX's number for float32."""


@torch.library.custom_op("samekit::int8_product", mutates_args=())
def int8_product(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return `rows @ (weight * scale)` with rows `[rows, in]` rounded to 256 steps.

    This is the arithmetic of DynamicQuantizeLinear and MatMulInteger, with float32 sums instead of int32 ones. The
    weight is int8 `[in, out]`, the scale `[out]`.
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
    """Write the operators that ONNX Runtime fuses into one step, together with the bias that follows."""
    # The exporter writes opset 18 first, and then converts everything to the opset of the graph.
    steps, step, zero = opset18.DynamicQuantizeLinear(rows)
    total = opset18.Cast(opset18.MatMulInteger(steps, weight, zero), to=FLOAT)
    return opset18.Mul(total, opset18.Mul(step, scale))


ONNX_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.samekit.int8_product.default: _int8_product_onnx
}
"""PyTorch operator of this module -> function that writes it in ONNX."""


class Int8Linear(nn.Module):
    """A `Linear` with an int8 product.

    Args:
        linear: the layer that this one replaces.
        rounder: made from the rows that the layer reads, after the rotation if there is one.
        rotation: an orthogonal matrix that first multiplies the rows, in blocks of its size.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: Linear, rounder: GptqRounder, rotation: Tensor | None = None) -> None:
        super().__init__()
        self.rotation = None if rotation is None else nn.Parameter(rotation.float(), requires_grad=False)
        weight = linear.weight if rotation is None else rotated(linear.weight.double().T, rotation).T.float()
        weight, scale = rounder.to_int8(weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        # A vector, because ONNX Runtime fuses no other bias.
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias[0], requires_grad=False)
        self.dtype = linear.dtype

    def forward(self, rows: Tensor) -> Tensor:
        """Return `[rows, out]` from `[rows, in]`, float32."""
        if self.rotation is not None:
            rows = rotated(rows, self.rotation)
        product: Tensor = int8_product(rows, self.weight, self.scale)
        return product if self.bias is None else product + self.bias


class Int8Branch(Int8Linear):
    """A `Branch` with an int8 product."""

    def __init__(self, branch: Branch, rounder: GptqRounder, rotation: Tensor | None = None) -> None:
        super().__init__(branch, rounder, rotation)
        self.residual_scale = branch.scale

    def forward(self, rows: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """Return `[rows, out]` from `[rows, in]` and `[rows, out]`, float32."""
        return super().forward(rows) + residual * self.residual_scale


def rotation_for(features: int, most: int | None = None) -> Tensor:
    """Return an orthogonal Hadamard matrix, float64.

    Its size is the largest power of two that divides `features` and does not exceed `most`.
    """
    divisor = features & -features
    size = min(divisor, most or divisor)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / math.sqrt(size)


def rotated(rows: Tensor, rotation: Tensor) -> Tensor:
    """Return rows `[rows, features]` times an orthogonal matrix, in blocks of its size, which divides the features."""
    blocks: Tensor = rows.unflatten(1, (-1, len(rotation))) @ rotation
    return blocks.flatten(1)
