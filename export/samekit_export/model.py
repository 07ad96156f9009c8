"""SAME in plain and readable PyTorch: the model of the PyTorch backend, and the reference for every exported graph.

Parameters have the published names, so a checkpoint loads strictly.

A latent represents `stride` patches. For each latent the transformers see its patch tokens and one more token, in all
`latent_tokens`. Tensors of tokens are `[batch, groups, tokens, width]`. A group is a chunk of latents whose tokens see
each other (`ChunkSpan`), or a single latent whose tokens also see its neighbours (`BandSpan`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from samekit_export.config import BandSpan, ChunkSpan, rotary_frequencies

if TYPE_CHECKING:
    from samekit_export.config import SameConfig, TrunkConfig
    from samekit_export.tensors import Checkpoint


class DynamicTanh(nn.Module):
    """gamma * tanh(alpha * x) + beta, instead of layer norm ("Transformers without Normalization", 2025)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., width]` from the same shape."""
        return self.gamma * torch.tanh(self.alpha * x) + self.beta


class Rotary(nn.Module):
    """Rotary position embedding of the first features of a head; features i and i + rotated / 2 form a pair."""

    inv_freq: Tensor

    def __init__(self, rotated: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.as_tensor(rotary_frequencies(rotated), dtype=torch.float32))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `[..., tokens, head_width]` by `positions` `[tokens]`, in float32; return the same shape and dtype."""
        angles = torch.outer(positions.float(), self.inv_freq)
        cos, sin = angles.cos(), angles.sin()
        half = angles.shape[-1]
        a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([turned.to(x.dtype), rest], dim=-1)


class DifferentialAttention(nn.Module):
    """The difference of two attentions with a common value; the second one has no learned weight."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        self.q_norm = DynamicTanh(config.head_width)
        self.k_norm = DynamicTanh(config.head_width)
        self.to_qkv = nn.Linear(config.width, 5 * config.width, bias=False)
        self.to_out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None) -> Tensor:
        """Return `[batch, groups, tokens, width]` from the same shape; `mask` is that of `band_mask`."""
        tokens = x.shape[2]
        neighbours = self.config.span.latents if isinstance(self.config.span, BandSpan) else 0
        q1, k1, v, q2, k2 = (
            part.unflatten(-1, (self.config.heads, -1)).transpose(2, 3) for part in self.to_qkv(x).chunk(5, dim=-1)
        )
        # Only differences of positions matter, so they count from the first key that the group can see.
        keys = torch.arange((2 * neighbours + 1) * tokens, device=x.device)
        queries = keys[neighbours * tokens :][:tokens]
        v = with_neighbours(v, neighbours)

        def attend(q: Tensor, k: Tensor) -> Tensor:
            q = rotary(self.q_norm(q), queries)
            k = rotary(with_neighbours(self.k_norm(k), neighbours), keys)
            return functional.scaled_dot_product_attention(
                q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask
            ).unflatten(0, x.shape[:2])

        out = attend(q1, k1) - attend(q2, k2)
        return self.to_out(out.transpose(2, 3).flatten(-2))


def with_neighbours(x: Tensor, neighbours: int) -> Tensor:
    """Add the tokens of its neighbours to each group: `[batch, groups, heads, tokens * (2n + 1), width]`."""
    if neighbours == 0:
        return x
    groups = x.shape[1]
    padded = functional.pad(x, (0, 0) * 3 + (neighbours, neighbours))
    return torch.cat([padded[:, i : i + groups] for i in range(2 * neighbours + 1)], dim=3)


def band_mask(batch: int, groups: int, tokens: int, neighbours: int, device: torch.device) -> Tensor:
    """Return which keys each query sees: `[batch * groups, 1, tokens, tokens * (2n + 1)]`, true for visible ones."""
    reach = neighbours * tokens
    query = torch.arange(tokens, device=device)[:, None] + reach
    key = torch.arange(tokens + 2 * reach, device=device)
    in_band = (query - key).abs() <= reach
    position = torch.arange(groups, device=device)[:, None] * tokens - reach + key
    inside = (position >= 0) & (position < groups * tokens)
    return (in_band & inside[:, None]).repeat(batch, 1, 1)[:, None]


class GatedFeedForward(nn.Module):
    """value * act(gate), with SiLU or sin(pi x) as the activation."""

    def __init__(self, width: int, inner: int, *, sine: bool) -> None:
        super().__init__()
        projection = nn.Module()
        projection.proj = nn.Linear(width, 2 * inner)
        self.sine = sine
        self.ff = nn.ModuleList([projection, nn.Identity(), nn.Linear(inner, width)])

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The layer to value and gate, and the layer back."""
        return cast("nn.Linear", self.ff[0].proj), cast("nn.Linear", self.ff[2])

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., width]` from the same shape."""
        project, back = self.linears
        value, gate = project(x).chunk(2, dim=-1)
        gate = torch.sin(torch.pi * gate) if self.sine else functional.silu(gate)
        return back(value * gate)


class Block(nn.Module):
    """x += attention(norm(x)), then x += feed_forward(norm(x))."""

    def __init__(self, config: TrunkConfig, index: int) -> None:
        super().__init__()
        self.pre_norm = DynamicTanh(config.width)
        self.self_attn = DifferentialAttention(config)
        self.ff_norm = DynamicTanh(config.width)
        self.ff = GatedFeedForward(config.width, config.inner, sine=config.gates_with_sine(index))
        self.rope = Rotary(config.rotated)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return `[batch, groups, tokens, width]` from the same shape."""
        x = x + self.self_attn(self.pre_norm(x), self.rope, mask)
        return x + self.ff(self.ff_norm(x))


class WeightNormConv(nn.Module):
    """A convolution along the patches whose weight is g * v / |v| per output channel (weight normalization, 2016)."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(n_out, n_in, kernel))
        self.weight_g = nn.Parameter(torch.empty(n_out, 1, 1))
        self.bias = nn.Parameter(torch.empty(n_out))

    def weight(self) -> Tensor:
        """Return the effective weight, `[n_out, n_in, kernel]`."""
        return self.weight_g * self.weight_v / self.weight_v.norm(dim=(1, 2), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[batch, patches, n_out]` from `[batch, patches, n_in]`, with zeros beyond both ends."""
        return functional.conv1d(x.transpose(1, 2), self.weight(), self.bias, padding="same").transpose(1, 2)


class Trunk(nn.Module):
    """The mapping, the learned token and the transformer blocks of the encoder or the decoder."""

    def __init__(self, config: TrunkConfig, mapping: WeightNormConv) -> None:
        super().__init__()
        self.config = config
        self.mapping = mapping
        self.new_tokens = nn.Parameter(torch.empty(1, 1, config.width))
        self.transformers = nn.ModuleList(Block(config, i) for i in range(config.depth))

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, in order."""
        return cast("list[Block]", list(self.transformers))

    def run(self, x: Tensor) -> Tensor:
        """Run all blocks over `[batch, latents, latent_tokens, width]`; `latents` must fill the last chunk."""
        batch, latents, tokens, width = x.shape
        span = self.config.span
        if isinstance(span, BandSpan):
            mask = band_mask(batch, latents, tokens, span.latents, x.device)
            for block in self.blocks:
                x = block(x, mask)
            return x
        chunk = span.latents * tokens
        half = chunk // 2
        x = x.reshape(batch, -1, chunk, width)
        for i, block in enumerate(self.blocks):
            if span.shifted and 2 * i == self.config.depth:
                x = x.flatten(1, 2)
                x = torch.cat([x[:, :half], x, x[:, -half:]], dim=1).reshape(batch, -1, chunk, width)
            x = block(x, None)
        if span.shifted:
            x = x.flatten(1, 2)[:, half:-half]
        return x.reshape(batch, latents, tokens, width)

    def missing_latents(self, latents: int) -> int:
        """Return the number of latents to append so that the last chunk is full."""
        return -latents % self.config.span.latents if isinstance(self.config.span, ChunkSpan) else 0


class Same(nn.Module):
    """The SAME autoencoder for any number of latents, without the noise that the reference adds at inference."""

    def __init__(self, config: SameConfig) -> None:
        super().__init__()
        self.config = config
        encoder, decoder, latent = config.encoder, config.decoder, config.latent_width
        to_tokens = WeightNormConv(config.patch_width, encoder.width, encoder.mapping_kernel)
        to_patches = WeightNormConv(decoder.width, config.patch_width, decoder.mapping_kernel)
        # Identities, because the published keys count the reference's transposes as layers.
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            [Trunk(encoder, to_tokens), nn.Identity(), nn.Linear(encoder.width, latent)]
        )
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(
            [nn.Identity(), nn.Linear(latent, decoder.width), nn.Identity(), Trunk(decoder, to_patches)]
        )
        self.bottleneck = nn.ParameterDict(
            {
                "scaling_factor": torch.ones(1, latent, 1),
                "bias": torch.zeros(1, latent, 1),
                "running_std": torch.ones(1),
                "noise_scaling_factor": torch.zeros(1, 0, 1),
            }
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Same:
        """Return the model of a checkpoint, float32, ready for inference."""
        with torch.device("meta"):
            model = cls(checkpoint.config)
        model.load_state_dict(checkpoint.tensors, strict=True, assign=True)
        return model.eval().requires_grad_(requires_grad=False)

    @property
    def encoder_parts(self) -> tuple[Trunk, nn.Linear]:
        """The encoder's trunk, and the layer to the latents."""
        trunk, _, to_latent = cast("nn.ModuleList", self.encoder.layers)
        return cast("Trunk", trunk), cast("nn.Linear", to_latent)

    @property
    def decoder_parts(self) -> tuple[nn.Linear, Trunk]:
        """The layer from the latents, and the decoder's trunk."""
        _, from_latent, _, trunk = cast("nn.ModuleList", self.decoder.layers)
        return cast("nn.Linear", from_latent), cast("Trunk", trunk)

    def encode(self, audio: Tensor) -> Tensor:
        """Return latents `[batch, latent_width, latents]` from audio `[batch, channels, latents * hop]`."""
        config, (trunk, to_latent) = self.config, self.encoder_parts
        latents = audio.shape[-1] // config.hop
        audio = functional.pad(audio, (0, trunk.missing_latents(latents) * config.hop))
        # (b, c, l*patch + h) -> (b, l, c*patch + h)
        patches = audio.unflatten(2, (-1, config.patch)).transpose(1, 2).flatten(2)
        tokens = trunk.mapping(patches).unflatten(1, (-1, trunk.config.stride))
        learned = trunk.new_tokens.expand(tokens.shape[0], tokens.shape[1], 1, -1)
        x = trunk.run(torch.cat([tokens, learned], dim=2))
        z = to_latent(x[:, :latents, -1]).transpose(1, 2)
        return (z * self.bottleneck["scaling_factor"] + self.bottleneck["bias"]) / self.bottleneck["running_std"]

    def decode(self, latents: Tensor) -> Tensor:
        """Return audio `[batch, channels, latents * hop]` from latents `[batch, latent_width, latents]`."""
        config, (from_latent, trunk) = self.config, self.decoder_parts
        length = latents.shape[-1]
        x = from_latent((latents * self.bottleneck["running_std"]).transpose(1, 2))
        x = functional.pad(x, (0, 0, 0, trunk.missing_latents(length)))[:, :, None]
        learned = trunk.new_tokens.expand(x.shape[0], x.shape[1], trunk.config.stride, -1)
        x = trunk.run(torch.cat([x, learned], dim=2))
        patches = trunk.mapping(x[:, :, 1:].flatten(1, 2))
        audio = patches.unflatten(2, (config.channels, config.patch)).transpose(1, 2).flatten(2)
        audio = audio[..., : length * config.hop]
        return torch.tanh(audio) if config.soft_clip else audio
