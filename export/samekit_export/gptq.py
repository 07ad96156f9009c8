"""Round weights to int8 so that the rounding errors cancel over the rows that the product reads.

Rounding each weight to the nearest step is best for rows whose features are not correlated. The rows of a model are
correlated, so the weights of other features can compensate for the error of one weight (GPTQ, Frantar et al., arXiv
2210.17323, which builds on Optimal Brain Surgeon).
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""Added to the diagonal of the second moments, as a fraction of its mean; keeps compensation small for other rows."""

BLOCK = 128
"""Features in a block: errors are compensated one by one inside a block, and in all later features by one product."""

STEPS = 127
"""Steps of int8 on each side of zero."""


class GptqRounder:
    """Rounds the weights of all products that read the same rows, from the second moments `[in, in]` of these rows.

    This is step 3 of GPTQ: the upper Cholesky factor of the inverse second moments, features of large moments first.
    """

    def __init__(self, moment: Tensor) -> None:
        # The features that matter most are rounded first, when all others can still compensate.
        self._order = moment.diagonal().argsort(descending=True, stable=True)
        damped = moment[self._order[:, None], self._order].double()
        # The minimum is for rows of zeros, for which weights are rounded to the nearest step.
        mean = damped.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        damped.diagonal().add_(DAMPING * mean)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        self._factor = torch.linalg.cholesky(inverse, upper=True).float()

    def to_int8(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return a float32 weight `[in, out]` as int8 of the same shape and a scale `[out]`."""
        scale = weight.abs().amax(dim=0).clamp(min=torch.finfo(torch.float32).tiny) / STEPS
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
        return steps[self._order.argsort()].to(torch.int8), scale
