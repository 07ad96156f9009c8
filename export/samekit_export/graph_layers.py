"""Linear layers and norms of the exported graphs, and which of their steps stay float32 in a float16 graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np

    from samekit_export.model import DynamicTanh


@dataclass(frozen=True)
class Fp32Ops:
    """Which steps of a float16 graph stay in float32.

    The defaults are what `benchmarks/islands.py` shows to pay, with every operation rounded: the ends and the residual
    stream are worth 7 dB together, each of the others less than 1 dB on random weights. Softmax is kept because trained
    attentions cancel more than random ones.
    """

    ends: bool = True
    """The mapping of patches and the layer at the latents: half a percent of the arithmetic."""
    residual: bool = True
    """The residual stream and the tanh of the norms that read it."""
    heads: bool = False
    """The norm of queries and keys."""
    rotary: bool = False
    """Rotary embedding."""
    softmax: bool = True
    """Both softmaxes and their difference."""
    gate: bool = False
    """The activation of the gate and its product with the value."""


ISLANDS = Fp32Ops()
"""What float16 graphs are exported with."""


def to_float32_if(x: Tensor, island: bool) -> Tensor:
    """Float32 on an island, as it is elsewhere."""
    return x.float() if island else x


def constant(value: Tensor | np.ndarray) -> nn.Parameter:
    """A float32 weight of the graph, from float64."""
    return nn.Parameter(torch.as_tensor(value).float().contiguous(), requires_grad=False)


class Linear(nn.Module):
    """rows @ weight + bias, from a weight `[out, in]` and perhaps a bias `[out]` in float64."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = constant(weight.T)
        # A row, not a vector: TensorRT turns vectors into rows first, one layer each.
        self.bias = None if bias is None else constant(bias[None])

    @property
    def dtype(self) -> torch.dtype:
        """Of the product."""
        return self.weight.dtype

    def forward(self, rows: Tensor) -> Tensor:
        """`[rows, in]` to `[rows, out]`, in the dtype of the weight."""
        rows = rows.to(self.weight.dtype)
        return rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)


class Branch(Linear):
    """The end of a residual branch: scale * residual + rows @ weight + bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        super().__init__(weight, bias)
        self.scale = scale
        self.one_step = True

    def forward(self, rows: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """`[rows, in]` and `[rows, out]` to `[rows, out]`, in the dtype of the residual."""
        rows = rows.to(self.weight.dtype)
        if self.one_step:
            total = torch.addmm(residual, rows, self.weight, beta=self.scale)
        else:
            total = residual * self.scale + (rows @ self.weight).to(residual.dtype)
        return total if self.bias is None else total + self.bias.to(total.dtype)


class Norm(nn.Module):
    """A norm before linear layers, of which folding left a bare tanh: `[rows, width]` to the same."""

    def __init__(self) -> None:
        super().__init__()
        # Perhaps a factor for each feature, `[1, width]`, that the next layers undo: see `int8.scale_features_`.
        self.scale: nn.Parameter | None = None

    def forward(self, residual: Tensor) -> Tensor:
        """The norm of the scaled residual."""
        x = torch.tanh(residual)
        return x if self.scale is None else x * self.scale


class NormedHeads(nn.Module):
    """The queries or keys of one attention, all heads: linear layer and per-head norm, without rotary embedding."""

    def __init__(self, weight: Tensor, bias: Tensor, norm: DynamicTanh, scale: float = 1.0) -> None:
        super().__init__()
        heads = weight.shape[0] // norm.gamma.shape[0]
        self.linear = Linear(weight * norm.alpha.double(), bias * norm.alpha.double())
        self.gamma = constant(scale * norm.gamma.double().repeat(1, heads))
        self.beta = constant(scale * norm.beta.double().repeat(1, heads))

    def forward(self, rows: Tensor, island: bool) -> Tensor:
        """`[rows, width]` to the same, the norm in float32 if it is an island."""
        x = self.linear(rows)
        x = torch.tanh(to_float32_if(x, island))
        return x * self.gamma.to(x.dtype) + self.beta.to(x.dtype)
