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

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from samekit.engine.spec import DECODER, ENCODER, Direction
from samekit.errors import CheckpointError
from samekit_export.graph_attention import AttentionGroups, AttentionTables, mask_value
from samekit_export.graph_layers import ISLANDS, Branch, Fp32Ops, Linear, Norm, NormedHeads, constant, to_float32_if

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from samekit_export.config import SameConfig, TrunkConfig
    from samekit_export.model import Block, Same, Trunk

GRAPH_REVISION = 1
"""Raise it when the same weights are exported to other graphs: after a change here, in `int8.py`, `gptq.py` or
`to_onnx.py`. Engine folders of another revision are exported again."""


class GraphBlock(nn.Module):
    """One transformer block over rows; takes the residual times `alpha_in`, returns it times `alpha_out`."""

    def __init__(self, block: Block, config: TrunkConfig, alpha_in: float, alpha_out: float, fp32_ops: Fp32Ops) -> None:
        super().__init__()
        self.fp32_ops = fp32_ops
        # Whether the first token of each latent feeds forward apart from the others, for the sake of their ranges.
        self.split_latent_rows = False
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
        grid: AttentionGroups,
        spread: Callable[[Tensor], Tensor] | None = None,
        *,
        output_tokens_only: bool = False,
    ) -> Tensor:
        """`[rows, width]` to the same.

        Args:
            residual: the stream, times `alpha_in`.
            grid: how rows form groups.
            spread: where equal tokens are given only once, turns such rows into the full ones.
            read_only: return the rows of the tokens that are read after the last block.
        """
        layout = grid.layout
        fp32_ops, product = self.fp32_ops, self.v.dtype
        x = self.norm(residual).to(product)
        read, positions = _same, grid.query_positions
        if output_tokens_only:
            read, positions = partial(read_rows, layout=layout), grid.positions(layout.read_positions)
        # What is not asked for is left out before the product, but rows that stand for several must be spread first.
        q = read(spread(self.q(x, fp32_ops.heads))) if spread else self.q(read(x), fp32_ops.heads)
        spread = spread or _same
        residual = read(spread(residual))
        q = self._rotary(q, positions, grid).permute(1, 2, 0, 3)
        k = self._rotary(grid.keys(spread(self.k(x, fp32_ops.heads))), grid.key_positions, grid).permute(1, 2, 3, 0)
        scores = to_float32_if(q.to(product) @ k.to(product), fp32_ops.softmax)
        both = torch.softmax(grid.masked(scores, output_tokens_only=output_tokens_only), dim=-1).unflatten(
            1, (2, self.heads)
        )
        weights = (both.select(1, 0) - both.select(1, 1)).to(product)
        v = self._per_head(grid.keys(spread(self.v(x))), grid).permute(1, 2, 0, 3)
        heads = (weights @ v).permute(2, 0, 1, 3).reshape(-1, self.width)
        residual = self.out(heads, residual)
        if output_tokens_only or not self.split_latent_rows:
            return self.feed_forward(residual)
        latents = residual.view(layout.latents, layout.tokens // layout.latents, -1, self.width)
        parts = latents.split([1, latents.shape[1] - 1], dim=1)
        fed = [self.feed_forward(part.reshape(-1, self.width)).reshape(part.shape) for part in parts]
        return torch.cat(fed, dim=1).reshape(-1, self.width)

    def feed_forward(self, residual: Tensor) -> Tensor:
        """The second branch: `[rows, width]` to the same."""
        fp32_ops = self.fp32_ops
        x = self.ff_norm(residual)
        gate = to_float32_if(self.gate(x), fp32_ops.gate)
        gate = torch.sin(gate) if self.sine else functional.silu(gate)
        return self.ff(self.value(x).to(gate.dtype) * gate, residual)

    def _rotary(self, rows: Tensor, positions: Tensor, grid: AttentionGroups) -> Tensor:
        """Rotary embedding, then `_per_head`."""
        layout = grid.layout
        rows = to_float32_if(rows, self.fp32_ops.rotary)
        # One row a sequence: ONNX Runtime wants no sequence longer than the tables.
        rotated = torch.onnx.ops.rotary_embedding(
            rows.view(-1, 2 * self.heads, 1, self.head_width),
            layout.cos.to(rows.dtype),
            layout.sin.to(rows.dtype),
            positions,
            rotary_embedding_dim=layout.rotated,
        )
        return self._per_head(rotated, grid)

    def _per_head(self, rows: Tensor, grid: AttentionGroups) -> Tensor:
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


def read_rows(rows: Tensor, layout: AttentionTables) -> Tensor:
    """The rows of the tokens that are read after the last block.

    Here too an index: a slice takes TensorRT ten times the layers.
    """
    width = rows.shape[-1]
    latents = rows.view(layout.latents, layout.tokens // layout.latents, -1, width)
    return latents.index_select(1, layout.read_tokens).reshape(-1, width)


class GraphTrunk(nn.Module):
    """All blocks of one direction over rows."""

    def __init__(self, trunk: Trunk, fp32_ops: Fp32Ops, first_read: int) -> None:
        super().__init__()
        config = trunk.config
        self.fp32_ops = fp32_ops
        self.layout = AttentionTables(config, first_read, mask_value(trunk))
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
            GraphBlock(block, config, alphas[i], alphas[i + 1], fp32_ops) for i, block in enumerate(trunk.blocks)
        )

    def forward(
        self,
        rows: Tensor,
        batch: int,
        groups: int,
        spread: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Rows times `alpha_in` to those of the tokens that are read; arguments as in `GraphBlock`."""
        rows = rows.float() if self.fp32_ops.residual else rows.to(self.product_dtype)
        grid = AttentionGroups(self.layout, batch, groups)
        for i, block in enumerate(self.blocks):
            if i == self.shift_at:
                rows = self._shift(rows, batch, groups)
                grid = AttentionGroups(self.layout, batch, groups + 1)
            rows = block(rows, grid, spread if i == 0 else None, output_tokens_only=i == len(self.blocks) - 1)
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

    direction: ClassVar[Direction]
    """`spec.ENCODER` or `spec.DECODER`."""

    def __init__(self, config: SameConfig, trunk: Trunk, fp32_ops: Fp32Ops, first_read: int) -> None:
        super().__init__()
        self.config = config
        self.trunk = GraphTrunk(trunk, fp32_ops, first_read)

    def unfuse_residual_add_(self) -> Self:
        """Keep the products that end a branch apart from the sums, as other dtypes than float32 need it; in place."""
        for module in self.modules():
            if isinstance(module, Branch):
                module.one_step = False
        return self

    def to_float16_(self) -> Self:
        """Turn every product into float16, except on the islands; in place."""
        self.unfuse_residual_add_()
        self.trunk.product_dtype = torch.float16
        rounded = self.trunk if self.trunk.fp32_ops.ends else self
        for module in rounded.modules():
            if isinstance(module, Linear):
                module.half()
        return self


class GraphEncoder(Graph):
    """Audio `[batch, channels, latents * hop]` to latents `[batch, latent_width, latents]`."""

    direction = ENCODER

    def __init__(self, model: Same, fp32_ops: Fp32Ops = ISLANDS) -> None:
        trunk, to_latent = model.encoder_parts
        # A latent's patches, then its learned token.
        super().__init__(model.config, trunk, fp32_ops, first_read=trunk.config.stride)
        alpha = self.trunk.alpha_in
        self.mapping = Linear(trunk.mapping.weight().double()[..., 0] * alpha, trunk.mapping.bias.double() * alpha)
        self.learned = constant(trunk.new_tokens.double() * alpha)
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

    direction = DECODER

    def __init__(self, model: Same, fp32_ops: Fp32Ops = ISLANDS) -> None:
        from_latent, trunk = model.decoder_parts
        # A latent's own token, then its patches.
        super().__init__(model.config, trunk, fp32_ops, first_read=1)
        alpha = self.trunk.alpha_in
        std = model.bottleneck["running_std"].double()
        self.from_latent = Linear(from_latent.weight.double() * (std * alpha), from_latent.bias.double() * alpha)
        self.learned = constant(trunk.new_tokens.double()[0] * alpha)
        # One product serves all taps of the convolution along the patches: [kernel * patch_width, width].
        weight = trunk.mapping.weight().double().permute(2, 0, 1)
        self.kernel = weight.shape[0]
        self.mapping = Linear(weight.flatten(0, 1))
        self.mapping_bias = constant(trunk.mapping.bias.double())

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
