"""The linear layers and norms of the exported graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from samekit_export.model import DynamicTanh


def constant(value: Tensor) -> nn.Parameter:
    """Return a float32 weight of the graph, from float64."""
    return nn.Parameter(value.float().contiguous(), requires_grad=False)


class Linear(nn.Module):
    """rows @ weight + bias, from a weight `[out, in]` and an optional bias `[out]` in float64."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = constant(weight.T)
        # A row, not a vector: TensorRT adds a layer that turns a vector into a row.
        self.bias = None if bias is None else constant(bias[None])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the product."""
        return self.weight.dtype

    def forward(self, rows: Tensor) -> Tensor:
        """Return `[rows, out]` from `[rows, in]`, in the dtype of the weight."""
        rows = rows.to(self.weight.dtype)
        return rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)


class Branch(Linear):
    """The end of a residual branch: scale * residual + rows @ weight + bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        super().__init__(weight, bias)
        self.scale = scale

    def forward(self, rows: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """Return `[rows, out]` from `[rows, in]` and `[rows, out]`, in the dtype of the residual."""
        rows = rows.to(self.weight.dtype)
        if self.weight.dtype == torch.float32:
            total = torch.addmm(residual, rows, self.weight, beta=self.scale)
        else:
            # The product is float16 and the sum is not, so they are two steps.
            total = residual * self.scale + (rows @ self.weight).to(residual.dtype)
        return total if self.bias is None else total + self.bias.to(total.dtype)


class Norm(nn.Module):
    """A norm before linear layers, of which only tanh is left: its weights are folded into the other layers."""

    def __init__(self) -> None:
        super().__init__()
        # `int8.scale_features_` sets a factor `[1, width]` here, which the next layers undo.
        self.scale: nn.Parameter | None = None

    def forward(self, residual: Tensor) -> Tensor:
        """Return `[rows, width]` from the scaled residual of the same shape."""
        x = torch.tanh(residual)
        return x if self.scale is None else x * self.scale


class NormedHeads(nn.Module):
    """Queries or keys of all heads: linear layer and per-head norm, without rotary embedding."""

    def __init__(self, weight: Tensor, bias: Tensor, norm: DynamicTanh, scale: float = 1.0) -> None:
        super().__init__()
        heads = weight.shape[0] // norm.gamma.shape[0]
        self.linear = Linear(weight * norm.alpha.double(), bias * norm.alpha.double())
        self.gamma = constant(scale * norm.gamma.double().repeat(1, heads))
        self.beta = constant(scale * norm.beta.double().repeat(1, heads))

    def forward(self, rows: Tensor) -> Tensor:
        """Return `[rows, width]` from the same shape."""
        x = torch.tanh(self.linear(rows))
        return x * self.gamma.to(x.dtype) + self.beta.to(x.dtype)
