"""The attention of the exported graphs: groups of tokens, the keys that each group sees, positions and masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from samekit_export.config import BandSpan, rotary_frequencies

if TYPE_CHECKING:
    from samekit_export.config import TrunkConfig
    from samekit_export.model import DynamicTanh, Trunk


MASK_MARGIN = 25.0
"""A key whose score lies this far below every one in sight has a weight of e^-25: nothing in float32."""


class AttentionGroups:
    """Which tokens share a group in one stretch of blocks, for `groups` groups: positions, keys in sight, masks."""

    def __init__(self, layout: AttentionTables, batch: int, groups: int) -> None:
        self.layout = layout
        """What is the same for every number of groups."""
        self.batch = batch
        """Sequences."""
        self.groups = groups
        """Of each sequence."""
        self.total = batch * groups
        """Of all sequences."""
        # Made of a range, which takes fewer steps than an expansion to a shape.
        self.zeros = torch.arange(self.total) * 0
        """One for each group."""
        self.query_positions = self.key_positions = self.positions(layout.query_positions)
        if layout.neighbours:
            self.key_positions = self.positions(layout.key_positions)
            self.gather_neighbours()

    def positions(self, of_token: Tensor) -> Tensor:
        """A position for each row, from one for each token: `[rows, 1]`."""
        return (of_token[:, None] + self.zeros).reshape(-1, 1)

    def gather_neighbours(self) -> None:
        """Where the neighbouring groups of each group lie, and which keys do not exist at the ends of a sequence."""
        layout = self.layout
        group = torch.arange(self.groups)[None].expand(self.batch, -1).reshape(-1)
        first = (torch.arange(self.batch)[:, None] * self.groups).expand(-1, self.groups).reshape(-1)
        beside = group + layout.neighbour_offsets[:, None]
        self.key_groups = (beside.clamp(0, self.groups - 1) + first).reshape(-1)
        key_group = group[:, None] + layout.key_offsets
        inside = (key_group >= 0) & (key_group < self.groups)
        self.mask = torch.minimum(torch.where(inside, 0.0, layout.mask_value)[:, None, None], layout.band)

    def keys(self, rows: Tensor) -> Tensor:
        """The rows that each group's queries meet: `[keys * groups, width]`."""
        if not self.layout.neighbours:
            return rows
        width = rows.shape[-1]
        beside = rows.view(self.layout.tokens, -1, width).index_select(1, self.key_groups)
        return beside.reshape(-1, width)

    def masked(self, scores: Tensor, *, output_tokens_only: bool) -> Tensor:
        """Scores `[groups, heads, queries, keys]` with the keys out of sight pushed down."""
        if not self.layout.neighbours:
            return scores
        mask = self.mask.to(scores.dtype)
        return scores + (mask.index_select(2, self.layout.read_tokens) if output_tokens_only else mask)


class AttentionTables(nn.Module):
    """The constants of a trunk's attention: tokens of a group, positions, rotary tables, the band.

    Args:
        config: of the trunk.
        first_read: which of a latent's tokens is the first that is read after the last block; all that follow are.
        out_of_sight: added to the score of a key that is not to be seen.
    """

    key_positions: Tensor
    query_positions: Tensor
    read_positions: Tensor
    read_tokens: Tensor
    neighbour_offsets: Tensor
    key_offsets: Tensor
    band: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: TrunkConfig, first_read: int, mask_value: float) -> None:
        super().__init__()
        span = config.span
        self.mask_value = mask_value
        self.neighbours = span.latents if isinstance(span, BandSpan) else 0
        self.latents = 1 if isinstance(span, BandSpan) else span.latents
        self.tokens = self.latents * config.latent_tokens
        self.rotated = max(config.head_width // 2, 32)
        reach = self.neighbours * self.tokens
        seen = 2 * self.neighbours + 1
        # Keys are ordered token first, group second, as rows are. Positions count from the first key in sight:
        # attention needs only their differences, and the tables stay small and exact for audio of any length.
        key_offsets = np.tile(np.arange(seen) - self.neighbours, self.tokens)
        key_tokens = np.repeat(np.arange(self.tokens), seen)
        key_positions = key_offsets * self.tokens + key_tokens + reach
        query_positions = np.arange(self.tokens) + reach
        read = query_positions.reshape(self.latents, -1)[:, first_read:].flatten()
        distance = np.abs(query_positions[:, None] - key_positions)
        angles = np.outer(np.arange(seen * self.tokens), rotary_frequencies(self.rotated))
        for name, value in {
            "key_positions": key_positions,
            "query_positions": query_positions,
            "read_positions": read,
            "read_tokens": np.arange(first_read, config.latent_tokens),
            "neighbour_offsets": np.arange(seen) - self.neighbours,
            "key_offsets": key_offsets,
        }.items():
            self.register_buffer(name, torch.as_tensor(value))
        self.register_buffer("band", torch.as_tensor(np.where(distance <= reach, 0, mask_value)).float())
        self.register_buffer("cos", torch.as_tensor(np.cos(angles)).float())
        self.register_buffer("sin", torch.as_tensor(np.sin(angles)).float())


def mask_value(trunk: Trunk) -> float:
    """What hides a key, added to its score: no more than it takes, as its exponential should not be subnormal.

    Processors take a hundred cycles for a subnormal number. A score is at most the product of the lengths of query and
    key, and a feature of either, a tanh with gamma and beta, is at most the sum of both; rotation keeps lengths.
    """

    def length(norm: DynamicTanh) -> float:
        return float((norm.gamma.double().abs() + norm.beta.double().abs()).norm())

    attentions = [block.self_attn for block in trunk.blocks]
    largest = max(length(a.q_norm) * length(a.k_norm) for a in attentions) * trunk.config.head_width**-0.5
    return -(2 * largest + MASK_MARGIN)
