"""The attention of the exported graphs: the keys that each group of tokens sees, positions and masks."""

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
"""A masked score is at least this much below every visible one: a weight of e^-25 is lost in float32 sums."""


class AttentionGroups:
    """Positions, keys and mask of the groups in consecutive blocks.

    Args:
        tables: the constants, which do not depend on the number of groups.
        batch: the number of sequences.
        groups: the number of groups in each sequence.
    """

    def __init__(self, tables: AttentionTables, batch: int, groups: int) -> None:
        self.tables = tables
        """The constants."""
        self.total = batch * groups
        """Groups of all sequences."""
        # A range times zero takes fewer ONNX operators than an expansion to a shape.
        self._zeros = torch.arange(self.total) * 0
        self.query_positions = self.key_positions = self.positions(tables.query_positions)
        if tables.neighbours:
            self.key_positions = self.positions(tables.key_positions)
            self._gather_neighbours(batch, groups)

    def positions(self, of_token: Tensor) -> Tensor:
        """Return the position of each row, `[rows, 1]`, from that of each token."""
        return (of_token[:, None] + self._zeros).reshape(-1, 1)

    def _gather_neighbours(self, batch: int, groups: int) -> None:
        """Find the neighbours of each group, and mask the keys that lie beyond the ends of a sequence."""
        tables = self.tables
        group = torch.arange(groups)[None].expand(batch, -1).reshape(-1)
        first = (torch.arange(batch)[:, None] * groups).expand(-1, groups).reshape(-1)
        beside = group + tables.neighbour_offsets[:, None]
        self._key_groups = (beside.clamp(0, groups - 1) + first).reshape(-1)
        key_group = group[:, None] + tables.key_offsets
        inside = (key_group >= 0) & (key_group < groups)
        self._mask = torch.minimum(torch.where(inside, 0.0, tables.mask_value)[:, None, None], tables.band)

    def keys(self, rows: Tensor) -> Tensor:
        """Return the rows that the queries of each group see: `[keys * groups, width]`."""
        if not self.tables.neighbours:
            return rows
        width = rows.shape[-1]
        beside = rows.view(self.tables.tokens, -1, width).index_select(1, self._key_groups)
        return beside.reshape(-1, width)

    def masked(self, scores: Tensor, *, output_tokens_only: bool) -> Tensor:
        """Return scores `[groups, heads, queries, keys]` with those of hidden keys lowered."""
        if not self.tables.neighbours:
            return scores
        mask = self._mask.to(scores.dtype)
        return scores + (mask.index_select(2, self.tables.output_tokens) if output_tokens_only else mask)


class AttentionTables(nn.Module):
    """The constants of a trunk's attention: tokens of a group, positions, rotary tables, the band.

    Args:
        config: the trunk's configuration.
        first_output: the first token of a latent that is used after the last block; all that follow it are used too.
        mask_value: added to the score of a hidden key.
    """

    key_positions: Tensor
    query_positions: Tensor
    output_positions: Tensor
    output_tokens: Tensor
    neighbour_offsets: Tensor
    key_offsets: Tensor
    band: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: TrunkConfig, first_output: int, mask_value: float) -> None:
        super().__init__()
        span = config.span
        self.mask_value = mask_value
        self.neighbours = span.latents if isinstance(span, BandSpan) else 0
        self.latents = 1 if isinstance(span, BandSpan) else span.latents
        self.tokens = self.latents * config.latent_tokens
        self.rotated = config.rotated
        reach = self.neighbours * self.tokens
        seen = 2 * self.neighbours + 1
        # Keys are ordered token first, group second, as rows are. Positions count from the first visible key:
        # attention needs only their differences, and the tables stay small and exact for audio of any length.
        key_offsets = np.tile(np.arange(seen) - self.neighbours, self.tokens)
        key_tokens = np.repeat(np.arange(self.tokens), seen)
        key_positions = key_offsets * self.tokens + key_tokens + reach
        query_positions = np.arange(self.tokens) + reach
        output_positions = query_positions.reshape(self.latents, -1)[:, first_output:].flatten()
        distance = np.abs(query_positions[:, None] - key_positions)
        angles = np.outer(np.arange(seen * self.tokens), rotary_frequencies(self.rotated))
        for name, value in {
            "key_positions": key_positions,
            "query_positions": query_positions,
            "output_positions": output_positions,
            "output_tokens": np.arange(first_output, config.latent_tokens),
            "neighbour_offsets": np.arange(seen) - self.neighbours,
            "key_offsets": key_offsets,
        }.items():
            self.register_buffer(name, torch.as_tensor(value))
        self.register_buffer("band", torch.as_tensor(np.where(distance <= reach, 0, mask_value)).float())
        self.register_buffer("cos", torch.as_tensor(np.cos(angles)).float())
        self.register_buffer("sin", torch.as_tensor(np.sin(angles)).float())


def mask_value(trunk: Trunk) -> float:
    """Return what is added to the score of a hidden key.

    Its magnitude is no larger than necessary, because exponentials that are subnormal take a hundred cycles.
    A score is at most the product of the lengths of query and key. A feature of either is a tanh with gamma and beta,
    so it is at most the sum of both; rotation keeps lengths.
    """

    def length(norm: DynamicTanh) -> float:
        return float((norm.gamma.double().abs() + norm.beta.double().abs()).norm())

    attentions = [block.self_attn for block in trunk.blocks]
    largest = max(length(a.q_norm) * length(a.k_norm) for a in attentions) * trunk.config.head_width**-0.5
    return -(2 * largest + MASK_MARGIN)
