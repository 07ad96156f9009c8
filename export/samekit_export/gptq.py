"""Weights to int8, so that the errors of rounding cancel over the rows that a product meets.

Rounding each weight to the nearest step is best for rows whose features have nothing to do with each other. Rows of a
model are correlated, so what rounding one weight adds can be taken back by the weights of other features (GPTQ, Frantar
et al., arXiv 2210.17323, after Optimal Brain Surgeon). Knows matrices only, nothing of graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""Added to the second moments, as a fraction of the mean one, so that rows of a kind that was not seen do not meet
weights of any size."""

BLOCK = 128
"""Features whose errors are passed on among themselves first, and to all others in one product."""

STEPS = 127
"""Steps of int8 to either side of zero."""


class GptqRounder:
    """How an error in the weights of one feature is made up for by those of the features not yet rounded.

    GPTQ's step 3: the upper Cholesky factor of the inverse second moments, features of large moments first. Serves
    every product of the rows.

    Args:
        moment: second moments of the rows, `[in, in]`.
    """

    def __init__(self, moment: Tensor) -> None:
        # Features that matter most are rounded first, when all others can still make up for them.
        self._order = moment.diagonal().argsort(descending=True, stable=True)
        damped = moment[self._order[:, None], self._order].double()
        # Rows of zeros are met by weights that are rounded to the nearest step.
        mean = damped.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        damped.diagonal().add_(DAMPING * mean)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        self._factor = torch.linalg.cholesky(inverse, upper=True).float()

    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Weights `[in, out]` in whole steps of `scale` `[out]`: int8 `[in, out]`, -127 to 127."""
        left = (weight / scale)[self._order]
        steps = torch.empty_like(left)
        for start in range(0, len(left), BLOCK):
            block, factor = left[start : start + BLOCK], self._factor[start : start + BLOCK]
            errors = torch.empty_like(block)
            own = factor[:, start : start + BLOCK]
            for i in range(len(block)):
                steps[start + i] = torch.round(block[i]).clamp(-STEPS, STEPS)
                errors[i] = (block[i] - steps[start + i]) / own[i, i]
                block[i + 1 :] -= own[i, i + 1 :, None] * errors[i]
            left[start + BLOCK :] -= factor[:, start + BLOCK :].T @ errors
        return steps[self._order.argsort()].to(torch.int8)


def to_int8(weight: Tensor, rounder: GptqRounder | None = None) -> tuple[Tensor, Tensor]:
    """A weight `[in, out]` as int8 of the same shape and a scale `[out]`.

    Args:
        weight: float32.
        compensation: of the rows that meet it; without, every weight is rounded to the nearest step.
    """
    scale = weight.abs().amax(dim=0).clamp(min=torch.finfo(torch.float32).tiny) / STEPS
    if rounder is not None:
        return rounder.rounded(weight, scale), scale
    return torch.round(weight / scale).to(torch.int8), scale
