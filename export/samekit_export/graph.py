"""The encoder and decoder in the shape in which they are exported: the function of `model.py`, fewer and larger steps.

Rows. Every linear layer works on `[rows, features]`. The rows of a group of tokens do not lie together; rows are
ordered token first, group second, so row = token * groups + group:

    group        0   1   2          a group is a chunk of latents (ChunkSpan) or one latent (BandSpan)
    token 0    [ 0   1   2 ]
    token 1    [ 3   4   5 ]        the learned tokens of all groups are one slab of rows,
    ...                             and a head's `[tokens, groups, heads, features]` turns into the operand
    token 16   [48  49  50 ]        of a batched product by strides alone, without a copy

Exact rewrites, all done here when the weights are loaded, in float64:

* weight norm, gamma and beta of a norm before a linear layer, alpha of q_norm and k_norm, pi of the sine gate, the
  1 / sqrt(head) of attention and the bottleneck are folded into weights and biases;
* the residual stream is carried multiplied by the alpha of the norm that reads it next, so that a norm is a bare tanh
  and the change of alpha is the `beta` of the matrix product that adds the branch;
* v needs no bias: both softmaxes sum to one, so their difference cancels whatever is constant over the keys;
* (softmax1 - softmax2) v instead of softmax1 v - softmax2 v: one product, and no cancellation after rounding;
* the last block computes queries, outputs and feed-forward for the tokens only that are read: the encoder's learned
  ones, the decoder's patches;
* the decoder's first block projects its learned token once, not once per patch: all copies are still equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from samekit.errors import CheckpointError
from samekit.spec import DECODER, ENCODER
from samekit_export.config import BandSpan, rotary_frequencies

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from samekit_export.config import SameConfig, TrunkConfig
    from samekit_export.model import Block, DynamicTanh, Same, Trunk

GRAPH_REVISION = 1
"""Raise it when the same weights are exported to other graphs: after a change here, in `int8.py`, `rounding.py` or
`to_onnx.py`. Engine folders of another revision are exported again."""

INVISIBLE = 25.0
"""A key whose score lies this far below every one in sight has a weight of e^-25: nothing in float32."""


@dataclass(frozen=True)
class Islands:
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


ISLANDS = Islands()
"""What float16 graphs are exported with."""


def _wide(x: Tensor, island: bool) -> Tensor:
    """Float32 on an island, as it is elsewhere."""
    return x.float() if island else x


def _constant(value: Tensor | np.ndarray) -> nn.Parameter:
    """A float32 weight of the graph, from float64."""
    return nn.Parameter(torch.as_tensor(value).float().contiguous(), requires_grad=False)


class Linear(nn.Module):
    """rows @ weight + bias, from a weight `[out, in]` and perhaps a bias `[out]` in float64."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = _constant(weight.T)
        # A row, not a vector: TensorRT turns vectors into rows first, one layer each.
        self.bias = None if bias is None else _constant(bias[None])

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
        self.gamma = _constant(scale * norm.gamma.double().repeat(1, heads))
        self.beta = _constant(scale * norm.beta.double().repeat(1, heads))

    def forward(self, rows: Tensor, island: bool) -> Tensor:
        """`[rows, width]` to the same, the norm in float32 if it is an island."""
        x = self.linear(rows)
        x = torch.tanh(_wide(x, island))
        return x * self.gamma.to(x.dtype) + self.beta.to(x.dtype)


class Grid:
    """Which tokens share a group in one stretch of blocks, for `groups` groups: positions, keys in sight, masks."""

    def __init__(self, layout: Layout, batch: int, groups: int) -> None:
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
            self._look_around()

    def positions(self, of_token: Tensor) -> Tensor:
        """A position for each row, from one for each token: `[rows, 1]`."""
        return (of_token[:, None] + self.zeros).reshape(-1, 1)

    def _look_around(self) -> None:
        """Where the neighbouring groups of each group lie, and which keys do not exist at the ends of a sequence."""
        layout = self.layout
        group = torch.arange(self.groups)[None].expand(self.batch, -1).reshape(-1)
        first = (torch.arange(self.batch)[:, None] * self.groups).expand(-1, self.groups).reshape(-1)
        beside = group + layout.neighbour_offsets[:, None]
        self.key_groups = (beside.clamp(0, self.groups - 1) + first).reshape(-1)
        key_group = group[:, None] + layout.key_offsets
        inside = (key_group >= 0) & (key_group < self.groups)
        self.mask = torch.minimum(torch.where(inside, 0.0, layout.out_of_sight)[:, None, None], layout.band)

    def keys(self, rows: Tensor) -> Tensor:
        """The rows that each group's queries meet: `[keys * groups, width]`."""
        if not self.layout.neighbours:
            return rows
        width = rows.shape[-1]
        beside = rows.view(self.layout.tokens, -1, width).index_select(1, self.key_groups)
        return beside.reshape(-1, width)

    def masked(self, scores: Tensor, *, read_only: bool) -> Tensor:
        """Scores `[groups, heads, queries, keys]` with the keys out of sight pushed down."""
        if not self.layout.neighbours:
            return scores
        mask = self.mask.to(scores.dtype)
        return scores + (mask.index_select(2, self.layout.read_tokens) if read_only else mask)


class Layout(nn.Module):
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

    def __init__(self, config: TrunkConfig, first_read: int, out_of_sight: float) -> None:
        super().__init__()
        span = config.span
        self.out_of_sight = out_of_sight
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
        self.register_buffer("band", torch.as_tensor(np.where(distance <= reach, 0, out_of_sight)).float())
        self.register_buffer("cos", torch.as_tensor(np.cos(angles)).float())
        self.register_buffer("sin", torch.as_tensor(np.sin(angles)).float())


def out_of_sight(trunk: Trunk) -> float:
    """What hides a key, added to its score: no more than it takes, as its exponential should not be subnormal.

    Processors take a hundred cycles for a subnormal number. A score is at most the product of the lengths of query and
    key, and a feature of either, a tanh with gamma and beta, is at most the sum of both; rotation keeps lengths.
    """

    def length(norm: DynamicTanh) -> float:
        return float((norm.gamma.double().abs() + norm.beta.double().abs()).norm())

    attentions = [block.self_attn for block in trunk.blocks]
    largest = max(length(a.q_norm) * length(a.k_norm) for a in attentions) * trunk.config.head_width**-0.5
    return -(2 * largest + INVISIBLE)


class GraphBlock(nn.Module):
    """One transformer block over rows; takes the residual times `alpha_in`, returns it times `alpha_out`."""

    def __init__(self, block: Block, config: TrunkConfig, alpha_in: float, alpha_out: float, islands: Islands) -> None:
        super().__init__()
        self.islands = islands
        # Whether the first token of each latent feeds forward apart from the others, for the sake of their ranges.
        self.apart = False
        self.heads = config.heads
        self.head_width = config.head_width
        self.width = config.width
        attention = block.self_attn
        qkv = attention.to_qkv.weight.double()
        q1, k1, v, q2, k2 = (qkv * block.pre_norm.gamma.double()).split(config.width)
        bias_q1, bias_k1, _, bias_q2, bias_k2 = (qkv @ block.pre_norm.beta.double()).split(config.width)
        scale = config.head_width**-0.5
        self.norm, self.ff_norm = Norm(), Norm()
        # The heads of both attentions side by side: half the steps.
        self.q = NormedHeads(torch.cat([q1, q2]), torch.cat([bias_q1, bias_q2]), attention.q_norm, scale)
        self.k = NormedHeads(torch.cat([k1, k2]), torch.cat([bias_k1, bias_k2]), attention.k_norm)
        self.v = Linear(v)
        alpha_mid = float(block.ff_norm.alpha)
        self.out = Branch(attention.to_out.weight.double() * alpha_mid, None, alpha_mid / alpha_in)

        project, back = block.ff.linears
        weight = project.weight.double()
        bias = project.bias.double() + weight @ block.ff_norm.beta.double()
        value, gate = (weight * block.ff_norm.gamma.double()).split(config.inner)
        bias_value, bias_gate = bias.split(config.inner)
        self.sine = block.ff.sine
        pi = torch.pi if self.sine else 1.0
        self.value = Linear(value, bias_value)
        self.gate = Linear(gate * pi, bias_gate * pi)
        self.ff = Branch(back.weight.double() * alpha_out, back.bias.double() * alpha_out, alpha_out / alpha_mid)

    def forward(
        self,
        residual: Tensor,
        grid: Grid,
        spread: Callable[[Tensor], Tensor] | None = None,
        *,
        read_only: bool = False,
    ) -> Tensor:
        """`[rows, width]` to the same.

        Args:
            residual: the stream, times `alpha_in`.
            grid: how rows form groups.
            spread: where equal tokens are given only once, turns such rows into the full ones.
            read_only: return the rows of the tokens that are read after the last block.
        """
        layout = grid.layout
        islands, product = self.islands, self.v.dtype
        x = self.norm(residual).to(product)
        read, positions = _same, grid.query_positions
        if read_only:
            read, positions = partial(read_rows, layout=layout), grid.positions(layout.read_positions)
        # What is not asked for is left out before the product, but rows that stand for several must be spread first.
        q = read(spread(self.q(x, islands.heads))) if spread else self.q(read(x), islands.heads)
        spread = spread or _same
        residual = read(spread(residual))
        q = self._rotary(q, positions, grid).permute(1, 2, 0, 3)
        k = self._rotary(grid.keys(spread(self.k(x, islands.heads))), grid.key_positions, grid).permute(1, 2, 3, 0)
        scores = _wide(q.to(product) @ k.to(product), islands.softmax)
        both = torch.softmax(grid.masked(scores, read_only=read_only), dim=-1).unflatten(1, (2, self.heads))
        weights = (both.select(1, 0) - both.select(1, 1)).to(product)
        v = self._per_head(grid.keys(spread(self.v(x))), grid).permute(1, 2, 0, 3)
        heads = (weights @ v).permute(2, 0, 1, 3).reshape(-1, self.width)
        residual = self.out(heads, residual)
        if read_only or not self.apart:
            return self.feed_forward(residual)
        latents = residual.view(layout.latents, layout.tokens // layout.latents, -1, self.width)
        parts = latents.split([1, latents.shape[1] - 1], dim=1)
        fed = [self.feed_forward(part.reshape(-1, self.width)).reshape(part.shape) for part in parts]
        return torch.cat(fed, dim=1).reshape(-1, self.width)

    def feed_forward(self, residual: Tensor) -> Tensor:
        """The second branch: `[rows, width]` to the same."""
        islands = self.islands
        x = self.ff_norm(residual)
        gate = _wide(self.gate(x), islands.gate)
        gate = torch.sin(gate) if self.sine else functional.silu(gate)
        return self.ff(self.value(x).to(gate.dtype) * gate, residual)

    def _rotary(self, rows: Tensor, positions: Tensor, grid: Grid) -> Tensor:
        """Rotary embedding, then `_per_head`."""
        layout = grid.layout
        rows = _wide(rows, self.islands.rotary)
        # One row a sequence: ONNX Runtime wants no sequence longer than the tables.
        rotated = torch.onnx.ops.rotary_embedding(
            rows.view(-1, 2 * self.heads, 1, self.head_width),
            layout.cos.to(rows.dtype),
            layout.sin.to(rows.dtype),
            positions,
            rotary_embedding_dim=layout.rotated,
        )
        return self._per_head(rotated, grid)

    def _per_head(self, rows: Tensor, grid: Grid) -> Tensor:
        """Rows of one attention or of both to `[tokens, groups, heads, head_width]`."""
        return rows.reshape(-1, grid.total, rows.shape[1:].numel() // self.head_width, self.head_width)


def _same(rows: Tensor) -> Tensor:
    """Rows that are complete already."""
    return rows


def _filled(x: Tensor, dim: int, most: int, length: int) -> Tensor:
    """The first `length` of `x` followed by `most` zeros, along `dim`; no condition, whatever the length.

    An index takes TensorRT a tenth of the layers of a slice.
    """
    shape = list(x.shape)
    shape[dim] = most
    return torch.cat([x, x.new_zeros(shape)], dim=dim).index_select(dim, torch.arange(length))


def read_rows(rows: Tensor, layout: Layout) -> Tensor:
    """The rows of the tokens that are read after the last block.

    Here too an index: a slice takes TensorRT ten times the layers.
    """
    width = rows.shape[-1]
    latents = rows.view(layout.latents, layout.tokens // layout.latents, -1, width)
    return latents.index_select(1, layout.read_tokens).reshape(-1, width)


class GraphTrunk(nn.Module):
    """All blocks of one direction over rows."""

    def __init__(self, trunk: Trunk, islands: Islands, first_read: int) -> None:
        super().__init__()
        config = trunk.config
        self.islands = islands
        self.layout = Layout(config, first_read, out_of_sight(trunk))
        self.shift_at = config.depth // 2 if getattr(config.span, "shifted", False) else None
        alphas = [float(block.pre_norm.alpha) for block in trunk.blocks] + [1.0]
        for i, block in enumerate(trunk.blocks):
            if min(abs(float(block.pre_norm.alpha)), abs(float(block.ff_norm.alpha))) < 1e-4:
                raise CheckpointError(
                    f"block {i}: a norm's alpha is (nearly) zero, so the block ignores its input, which cannot be "
                    "exported; use backend torch, or download the checkpoint again"
                )
        self.alpha_in = alphas[0]
        self.product_dtype = torch.float32
        self.blocks = nn.ModuleList(
            GraphBlock(block, config, alphas[i], alphas[i + 1], islands) for i, block in enumerate(trunk.blocks)
        )

    def forward(
        self,
        rows: Tensor,
        batch: int,
        groups: int,
        spread: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Rows times `alpha_in` to those of the tokens that are read; arguments as in `GraphBlock`."""
        rows = rows.float() if self.islands.residual else rows.to(self.product_dtype)
        grid = Grid(self.layout, batch, groups)
        for i, block in enumerate(self.blocks):
            if i == self.shift_at:
                rows = self._shift(rows, batch, groups)
                grid = Grid(self.layout, batch, groups + 1)
            rows = block(rows, grid, spread if i == 0 else None, read_only=i == len(self.blocks) - 1)
        return rows if self.shift_at is None else self._shift_back(rows, batch, groups)

    def _shift(self, rows: Tensor, batch: int, groups: int) -> Tensor:
        """Chunks moved by half a chunk: the sequence is extended by copies of its first and its last half chunk."""
        halves = rows.view(2, -1, batch, groups, rows.shape[-1])
        first, second = halves.select(0, 0), halves.select(0, 1)
        first_halves = torch.cat([first.select(2, 0).unsqueeze(2), second], dim=2)
        second_halves = torch.cat([first, second.select(2, -1).unsqueeze(2)], dim=2)
        return torch.stack([first_halves, second_halves]).reshape(-1, rows.shape[-1])

    def _shift_back(self, rows: Tensor, batch: int, groups: int) -> Tensor:
        """Undo `_shift`: drop the copies."""
        halves = rows.view(2, -1, batch, groups + 1, rows.shape[-1])
        kept = torch.arange(groups)
        first = halves.select(0, 1).index_select(2, kept)
        return torch.stack([first, halves.select(0, 0).index_select(2, kept + 1)])


class Graph(nn.Module):
    """One half of a model, ready for export; float32 in and out."""

    half_name: ClassVar[str]
    """`spec.ENCODER` or `spec.DECODER`."""

    def __init__(self, config: SameConfig, trunk: Trunk, islands: Islands, first_read: int) -> None:
        super().__init__()
        self.config = config
        self.trunk = GraphTrunk(trunk, islands, first_read)

    def separate_(self) -> Self:
        """Keep the products that end a branch apart from the sums, as other dtypes than float32 need it; in place."""
        for module in self.modules():
            if isinstance(module, Branch):
                module.one_step = False
        return self

    def to_float16_(self) -> Self:
        """Turn every product into float16, except on the islands; in place."""
        self.separate_()
        self.trunk.product_dtype = torch.float16
        rounded = self.trunk if self.trunk.islands.ends else self
        for module in rounded.modules():
            if isinstance(module, Linear):
                module.half()
        return self


class GraphEncoder(Graph):
    """Audio `[batch, channels, latents * hop]` to latents `[batch, latent_width, latents]`."""

    half_name = ENCODER

    def __init__(self, model: Same, islands: Islands = ISLANDS) -> None:
        trunk, to_latent = model.encoder_parts
        # A latent's patches, then its learned token.
        super().__init__(model.config, trunk, islands, first_read=trunk.config.stride)
        alpha = self.trunk.alpha_in
        self.mapping = Linear(trunk.mapping.weight().double()[..., 0] * alpha, trunk.mapping.bias.double() * alpha)
        self.learned = _constant(trunk.new_tokens.double() * alpha)
        std = model.bottleneck["running_std"].double()
        scale = model.bottleneck["scaling_factor"].double().flatten() / std
        shift = model.bottleneck["bias"].double().flatten() / std
        self.to_latent = Linear(to_latent.weight.double() * scale[:, None], to_latent.bias.double() * scale + shift)

    def forward(self, audio: Tensor) -> Tensor:
        """One pass over everything; any number of latents from 1."""
        config = self.config
        trunk, latents_in_group = config.encoder, self.trunk.layout.latents
        batch, latents = audio.shape[0], audio.shape[2] // config.hop
        groups = (latents + latents_in_group - 1) // latents_in_group
        if latents_in_group > 1:
            # Zeros fill the last chunk, as in the reference.
            pieces = audio.view(batch, config.channels, -1, config.hop)
            audio = _filled(pieces, dim=2, most=latents_in_group - 1, length=groups * latents_in_group)
        patches = audio.reshape(batch, config.channels, groups, latents_in_group, trunk.stride, config.patch)
        rows = patches.permute(3, 4, 0, 2, 1, 5).reshape(-1, config.patch_width)
        rows = self.mapping(rows).view(latents_in_group, trunk.stride, -1, trunk.width)
        learned = self.learned[None].expand(latents_in_group, 1, rows.shape[2], -1)
        rows = torch.cat([rows, learned], dim=1).reshape(-1, trunk.width)
        rows = self.trunk(rows, batch, groups)
        z = self.to_latent(rows.reshape(-1, trunk.width)).view(latents_in_group, batch, groups, -1)
        z = z.float().permute(1, 3, 2, 0).reshape(batch, config.latent_width, -1)
        return z.index_select(2, torch.arange(latents))


class GraphDecoder(Graph):
    """Latents `[batch, latent_width, latents]` to audio `[batch, channels, latents * hop]`."""

    half_name = DECODER

    def __init__(self, model: Same, islands: Islands = ISLANDS) -> None:
        from_latent, trunk = model.decoder_parts
        # A latent's own token, then its patches.
        super().__init__(model.config, trunk, islands, first_read=1)
        alpha = self.trunk.alpha_in
        std = model.bottleneck["running_std"].double()
        self.from_latent = Linear(from_latent.weight.double() * (std * alpha), from_latent.bias.double() * alpha)
        self.learned = _constant(trunk.new_tokens.double()[0] * alpha)
        # One product serves all taps of the convolution along the patches: [kernel * patch_width, width].
        weight = trunk.mapping.weight().double().permute(2, 0, 1)
        self.kernel = weight.shape[0]
        self.mapping = Linear(weight.flatten(0, 1))
        self.mapping_bias = _constant(trunk.mapping.bias.double())

    def forward(self, latents: Tensor) -> Tensor:
        """One pass over everything; any number of latents from 1."""
        config = self.config
        trunk, latents_in_group = config.decoder, self.trunk.layout.latents
        batch, length = latents.shape[0], latents.shape[2]
        groups = (length + latents_in_group - 1) // latents_in_group
        rows = self.from_latent(latents.transpose(1, 2).reshape(-1, config.latent_width)).view(batch, -1, trunk.width)
        if latents_in_group > 1:
            rows = _filled(rows, dim=1, most=latents_in_group - 1, length=groups * latents_in_group)
        rows = rows.reshape(batch, groups, latents_in_group, trunk.width).permute(2, 0, 1, 3).reshape(-1, trunk.width)

        def spread(rows: Tensor) -> Tensor:
            """The latents' rows followed by one learned row, to the rows of all tokens."""
            width = rows.shape[-1]
            own = rows[:-1].view(latents_in_group, 1, -1, width)
            learned = rows[-1:].expand(latents_in_group, trunk.stride, own.shape[2], -1)
            return torch.cat([own, learned], dim=1).reshape(-1, width)

        rows = self.trunk(torch.cat([rows, self.learned]), batch, groups, spread)
        taps = self.mapping(rows.reshape(-1, trunk.width)).view(
            latents_in_group, trunk.stride, batch, groups, self.kernel, config.patch_width
        )
        patches = self._convolve(taps.permute(2, 3, 0, 1, 4, 5).reshape(batch, -1, self.kernel, config.patch_width))
        audio = (
            (patches.float() + self.mapping_bias).reshape(batch, -1, config.channels, config.patch).permute(0, 2, 1, 3)
        )
        pieces = audio.reshape(batch, config.channels, -1, config.hop).index_select(2, torch.arange(length))
        audio = pieces.reshape(batch, config.channels, -1)
        return torch.tanh(audio) if config.soft_clip else audio

    def _convolve(self, taps: Tensor) -> Tensor:
        """Sum of the taps' products, each moved to the patch it belongs to: `[batch, patches, patch_width]`."""
        if self.kernel == 1:
            return taps[:, :, 0]
        before = functional.pad(taps[:, :-1, 0], (0, 0, 1, 0))
        after = functional.pad(taps[:, 1:, 2], (0, 0, 0, 1))
        return before + taps[:, :, 1] + after
