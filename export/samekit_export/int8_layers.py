"""Linear layers with int8 products, in PyTorch and in ONNX, and the rotations before them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from onnxscript import opset18
from torch import Tensor, nn

from samekit_export.gptq import GptqRounder, to_int8

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit_export.graph_layers import Branch, Linear


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
        compensation: of the rows that its weights meet; without, they are rounded to the nearest step.
        rotation: an orthogonal matrix by which rows are rotated first, in blocks of its size.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: Linear, rounder: GptqRounder | None = None, rotation: Tensor | None = None) -> None:
        super().__init__()
        self.rotation = None if rotation is None else nn.Parameter(rotation.float(), requires_grad=False)
        weight = linear.weight if rotation is None else rotated(linear.weight.double().T, rotation).T.float()
        weight, scale = to_int8(weight, rounder)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        # A vector: the fused step takes no other bias.
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias[0], requires_grad=False)
        self.dtype = linear.dtype

    def forward(self, rows: Tensor) -> Tensor:
        """`[rows, in]` to `[rows, out]`, float32."""
        if self.rotation is not None:
            rows = rotated(rows, self.rotation)
        product: Tensor = int8_product(rows, self.weight, self.scale)
        return product if self.bias is None else product + self.bias


class Int8Branch(Int8Linear):
    """A `Branch` with an int8 product."""

    def __init__(self, branch: Branch, rounder: GptqRounder | None = None, rotation: Tensor | None = None) -> None:
        super().__init__(branch, rounder, rotation)
        self.residual_scale = branch.scale

    def forward(self, rows: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """`[rows, in]` and `[rows, out]` to `[rows, out]`, float32."""
        return super().forward(rows) + residual * self.residual_scale


def rotation_for(features: int, most: int | None = None) -> Tensor:
    """A Hadamard matrix, orthogonal, float64, whose size is the largest power of two that divides `features`.

    Args:
        features: of the rows to be rotated.
        most: a power of two that the size does not exceed.
    """
    divisor = features & -features
    size = min(divisor, most or divisor)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / math.sqrt(size)


def rotated(rows: Tensor, rotation: Tensor) -> Tensor:
    """Rows `[rows, features]` times an orthogonal matrix, in blocks of its size, which must divide the features."""
    blocks: Tensor = rows.unflatten(1, (-1, len(rotation))) @ rotation
    return blocks.flatten(1)
