"""The encoder and decoder as they are exported: the function of `model.py` in fewer and larger steps.

Every linear layer works on `[rows, features]`. Rows are ordered token first, group second, so row = token * groups +
group, and the rows of one group do not lie together:

    group        0   1   2          a group is a chunk of latents (ChunkSpan) or one latent (BandSpan)
    token 0    [ 0   1   2 ]
    token 1    [ 3   4   5 ]        the learned tokens of all groups are one slab of rows,
    ...                             and a head's `[tokens, groups, heads, features]` turns into the operand
    token 16   [48  49  50 ]        of a batched product by strides alone, without a copy

These rewrites are exact. They are made when the weights are loaded, in float64:

* weight norm, gamma and beta of a norm before a linear layer, alpha of q_norm and k_norm, pi of the sine gate, the
  1 / sqrt(head) of attention and the bottleneck are folded into weights and biases;
* the residual stream is carried multiplied by the alpha of the norm that reads it next, so that a norm is only a tanh
  and the change of alpha is the `beta` of the matrix product that adds the branch;
* v needs no bias: both softmaxes sum to one, so their difference cancels whatever is constant over the keys;
* (softmax1 - softmax2) v instead of softmax1 v - softmax2 v: one product, and no cancellation after rounding;
* the last block computes queries, outputs and feed-forward only for the tokens that are used after it: the encoder's
  learned tokens, the decoder's patches;
* the decoder's first block projects its learned token once instead of once per patch, because all copies are equal.

In a float16 graph these steps stay float32: the layers at both ends, the residual stream with the tanh of its norms,
both softmaxes and their difference. `benchmarks/fp32_ops.py` measures each choice with every operation rounded. The
ends and the residual stream are worth 15 dB together in SAME-S with trained-like random weights, and 1 to 4 dB in small
trained models. Each other step is worth less than 2 dB. The softmaxes stay because trained attentions cancel more.
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
from samekit_export.graph_layers import Branch, Linear, Norm, NormedHeads, constant

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from samekit_export.config import SameConfig, TrunkConfig
    from samekit_export.model import Block, Same, Trunk

GRAPH_REVISION = 2
"""The revision of the exported graphs. Raise it when a change of the code exports other graphs of the same weights.
Engine folders of another revision are exported again."""


class GraphBlock(nn.Module):
    """One transformer block over rows; it takes the residual times `alpha_in` and returns it times `alpha_out`."""

    def __init__(self, block: Block, config: TrunkConfig, alpha_in: float, alpha_out: float) -> None:
        super().__init__()
        self.split_latent_rows = False
        """Whether the feed-forward processes the first token of each latent separately, with its own int8 range."""
        self.heads = config.heads
        self.head_width = config.head_width
        self.width = config.width
        attention = block.self_attn
        qkv = attention.to_qkv.weight.double()
        q1, k1, v, q2, k2 = (qkv * block.pre_norm.gamma.double()).split(config.width)
        bias_q1, bias_k1, _, bias_q2, bias_k2 = (qkv @ block.pre_norm.beta.double()).split(config.width)
        scale = config.head_width**-0.5
        self.norm, self.ff_norm = Norm(), Norm()
        # The heads of both attentions lie side by side, which halves the number of steps.
        self.q = NormedHeads(torch.cat([q1, q2]), torch.cat([bias_q1, bias_q2]), attention.q_norm, scale)
        self.k = NormedHeads(torch.cat([k1, k2]), torch.cat([bias_k1, bias_k2]), attention.k_norm)
        self.v = Linear(v)
        self.softmax = nn.Softmax(dim=-1)
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
        attention: AttentionGroups,
        repeat_rows: Callable[[Tensor], Tensor] | None = None,
        *,
        output_tokens_only: bool = False,
    ) -> Tensor:
        """Return `[rows, width]` from the same shape.

        Args:
            residual: the residual stream times `alpha_in`.
            attention: how rows form groups.
            repeat_rows: given if equal tokens share one row: returns the rows of all tokens.
            output_tokens_only: return only the rows of the tokens that are used after the last block.
        """
        tables, product_dtype = attention.tables, self.v.dtype
        x = self.norm(residual).to(product_dtype)
        select, positions = _same, attention.query_positions
        if output_tokens_only:
            select, positions = partial(output_rows, tables=tables), attention.positions(tables.output_positions)
        # Rows that are not needed are dropped before the product, but a row for several tokens must be repeated first.
        q = select(repeat_rows(self.q(x))) if repeat_rows else self.q(select(x))
        repeat_rows = repeat_rows or _same
        residual = select(repeat_rows(residual))
        q = self._rotary(q, positions, attention).permute(1, 2, 0, 3)
        k = attention.keys(repeat_rows(self.k(x)))
        k = self._rotary(k, attention.key_positions, attention).permute(1, 2, 3, 0)
        v = self._per_head(attention.keys(repeat_rows(self.v(x))), attention).permute(1, 2, 0, 3)
        masked = partial(attention.masked, output_tokens_only=output_tokens_only)
        heads = self.attend(q.to(product_dtype), k.to(product_dtype), v, masked)
        heads = heads.permute(2, 0, 1, 3).reshape(-1, self.width)
        residual = self.out(heads, residual)
        if output_tokens_only or not self.split_latent_rows:
            return self.feed_forward(residual)
        latents = residual.view(tables.latents, tables.tokens // tables.latents, -1, self.width)
        parts = latents.split([1, latents.shape[1] - 1], dim=1)
        fed = [self.feed_forward(part.reshape(-1, self.width)).reshape(part.shape) for part in parts]
        return torch.cat(fed, dim=1).reshape(-1, self.width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masked: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the difference of both attentions, `[groups, heads, queries, head_width]`.

        Args:
            q: scaled queries of both attentions, `[groups, 2 * heads, queries, head_width]`.
            k: keys of both, `[groups, 2 * heads, head_width, keys]`.
            v: values, `[groups, heads, keys, head_width]`.
            masked: lowers the scores of hidden keys.
        """
        both = self.softmax(masked((q @ k).float())).unflatten(1, (2, self.heads))
        weights = (both.select(1, 0) - both.select(1, 1)).to(v.dtype)
        return weights @ v

    def feed_forward(self, residual: Tensor) -> Tensor:
        """Return `[rows, width]` with the second branch added."""
        x = self.ff_norm(residual)
        gate = self.gate(x)
        gate = torch.sin(gate) if self.sine else functional.silu(gate)
        return self.ff(self.value(x) * gate, residual)

    def _rotary(self, rows: Tensor, positions: Tensor, attention: AttentionGroups) -> Tensor:
        """Apply rotary embedding, then `_per_head`."""
        tables = attention.tables
        # Each row is one sequence, because ONNX Runtime takes no sequence that is longer than the tables.
        rotated = torch.onnx.ops.rotary_embedding(
            rows.view(-1, 2 * self.heads, 1, self.head_width),
            tables.cos.to(rows.dtype),
            tables.sin.to(rows.dtype),
            positions,
            rotary_embedding_dim=tables.rotated,
        )
        return self._per_head(rotated, attention)

    def _per_head(self, rows: Tensor, attention: AttentionGroups) -> Tensor:
        """Return the rows of one or both attentions as `[tokens, groups, heads, head_width]`."""
        return rows.reshape(-1, attention.total, rows.shape[1:].numel() // self.head_width, self.head_width)


def _same(rows: Tensor) -> Tensor:
    return rows


def _pad_to(x: Tensor, dim: int, padding: int, length: int) -> Tensor:
    """Append `padding` zeros to `x` along `dim`, and return the first `length` entries.

    This needs no condition on `length`. TensorRT needs a tenth of the layers for an index that it needs for a slice.
    """
    shape = list(x.shape)
    shape[dim] = padding
    return torch.cat([x, x.new_zeros(shape)], dim=dim).index_select(dim, torch.arange(length))


def output_rows(rows: Tensor, tables: AttentionTables) -> Tensor:
    """Return the rows of the tokens that are used after the last block."""
    # An index instead of a slice, see `_pad_to`.
    width = rows.shape[-1]
    latents = rows.view(tables.latents, tables.tokens // tables.latents, -1, width)
    return latents.index_select(1, tables.output_tokens).reshape(-1, width)


class GraphTrunk(nn.Module):
    """All blocks of the encoder or the decoder over rows."""

    def __init__(self, trunk: Trunk, first_output: int) -> None:
        super().__init__()
        config = trunk.config
        self.tables = AttentionTables(config, first_output, mask_value(trunk))
        self.shift_at = config.depth // 2 if getattr(config.span, "shifted", False) else None
        alphas = [float(block.pre_norm.alpha) for block in trunk.blocks] + [1.0]
        for i, block in enumerate(trunk.blocks):
            if min(abs(float(block.pre_norm.alpha)), abs(float(block.ff_norm.alpha))) < 1e-4:
                raise CheckpointError(
                    f"block {i}: a norm's alpha is (nearly) zero, so the block ignores its input, which cannot be "
                    "exported; use backend torch, or download the checkpoint again"
                )
        self.alpha_in = alphas[0]
        self.blocks = nn.ModuleList(
            GraphBlock(block, config, alphas[i], alphas[i + 1]) for i, block in enumerate(trunk.blocks)
        )

    def forward(
        self, rows: Tensor, batch: int, groups: int, repeat_rows: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return the rows of the output tokens from rows times `alpha_in`; arguments as in `GraphBlock`."""
        attention = AttentionGroups(self.tables, batch, groups)
        for i, block in enumerate(self.blocks):
            if i == self.shift_at:
                rows = self._shift(rows, batch, groups)
                attention = AttentionGroups(self.tables, batch, groups + 1)
            last = i == len(self.blocks) - 1
            rows = block(rows, attention, repeat_rows if i == 0 else None, output_tokens_only=last)
        return rows if self.shift_at is None else self._shift_back(rows, batch, groups)

    def _shift(self, rows: Tensor, batch: int, groups: int) -> Tensor:
        """Shift chunks by half a chunk: extend the sequence by copies of its first and its last half chunk."""
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
    """The encoder or the decoder of a model, ready for export; float32 in and out."""

    direction: ClassVar[Direction]
    """`spec.ENCODER` or `spec.DECODER`."""

    def __init__(self, config: SameConfig, trunk: Trunk, first_output: int) -> None:
        super().__init__()
        self.config = config
        self.trunk = GraphTrunk(trunk, first_output)

    def to_float16_(self) -> Self:
        """Turn the products of all blocks into float16, in place; the other steps stay float32."""
        for module in self.trunk.modules():
            if isinstance(module, Linear):
                module.half()
        return self


class GraphEncoder(Graph):
    """Audio `[batch, channels, latents * hop]` to latents `[batch, latent_width, latents]`."""

    direction = ENCODER

    def __init__(self, model: Same) -> None:
        trunk, to_latent = model.encoder_parts
        # A latent's patches come first, then its learned token.
        super().__init__(model.config, trunk, first_output=trunk.config.stride)
        alpha = self.trunk.alpha_in
        self.mapping = Linear(trunk.mapping.weight().double()[..., 0] * alpha, trunk.mapping.bias.double() * alpha)
        self.learned = constant(trunk.new_tokens.double() * alpha)
        std = model.bottleneck["running_std"].double()
        scale = model.bottleneck["scaling_factor"].double().flatten() / std
        shift = model.bottleneck["bias"].double().flatten() / std
        self.to_latent = Linear(to_latent.weight.double() * scale[:, None], to_latent.bias.double() * scale + shift)

    def forward(self, audio: Tensor) -> Tensor:
        """Encode in one pass; any number of latents from 1."""
        config = self.config
        trunk, latents_in_group = config.encoder, self.trunk.tables.latents
        batch, latents = audio.shape[0], audio.shape[2] // config.hop
        groups = (latents + latents_in_group - 1) // latents_in_group
        if latents_in_group > 1:
            # Zeros fill the last chunk, as in the reference.
            pieces = audio.view(batch, config.channels, -1, config.hop)
            audio = _pad_to(pieces, dim=2, padding=latents_in_group - 1, length=groups * latents_in_group)
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

    def __init__(self, model: Same) -> None:
        from_latent, trunk = model.decoder_parts
        # A latent's own token comes first, then its patches.
        super().__init__(model.config, trunk, first_output=1)
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
        """Decode in one pass; any number of latents from 1."""
        config = self.config
        trunk, latents_in_group = config.decoder, self.trunk.tables.latents
        batch, length = latents.shape[0], latents.shape[2]
        groups = (length + latents_in_group - 1) // latents_in_group
        rows = self.from_latent(latents.transpose(1, 2).reshape(-1, config.latent_width)).view(batch, -1, trunk.width)
        if latents_in_group > 1:
            rows = _pad_to(rows, dim=1, padding=latents_in_group - 1, length=groups * latents_in_group)
        rows = rows.reshape(batch, groups, latents_in_group, trunk.width).permute(2, 0, 1, 3).reshape(-1, trunk.width)

        def repeat_rows(rows: Tensor) -> Tensor:
            """Return the rows of all tokens, from the latents' rows followed by one learned row."""
            width = rows.shape[-1]
            own = rows[:-1].view(latents_in_group, 1, -1, width)
            learned = rows[-1:].expand(latents_in_group, trunk.stride, own.shape[2], -1)
            return torch.cat([own, learned], dim=1).reshape(-1, width)

        rows = self.trunk(torch.cat([rows, self.learned]), batch, groups, repeat_rows)
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
        """Add the products of the taps, each moved to its patch: `[batch, patches, patch_width]`."""
        if self.kernel == 1:
            return taps[:, :, 0]
        before = functional.pad(taps[:, :-1, 0], (0, 0, 1, 0))
        after = functional.pad(taps[:, 1:, 2], (0, 0, 0, 1))
        return before + taps[:, :, 1] + after
