"""Read the configuration of a SAME autoencoder, `model_config.json` of either nesting, into a `SameConfig`."""

from __future__ import annotations

import logging
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from samekit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

CONFIG_FILE = "model_config.json"
"""Name of the published configuration."""

MOST_CHUNK_TOKENS = 4096
"""Most tokens in a chunk, because attention holds their square. Published models have 34."""

_NOT_EXPORTABLE = "pass the checkpoint of SAME-S or SAME-L as it was published"
_DAMAGED = "download the checkpoint again"


@dataclass(frozen=True)
class ChunkSpan:
    """Attention inside chunks of whole latents; the second half of the blocks sees them shifted by half a chunk."""

    kind: ClassVar[str] = "chunk"
    """Identifies this span in the checkpoint's digest."""

    latents: int
    """Latents in a chunk; even."""
    shifted: bool
    """Whether the second half of the blocks is shifted."""


@dataclass(frozen=True)
class BandSpan:
    """Attention in a sliding band."""

    kind: ClassVar[str] = "band"
    """Identifies this span in the checkpoint's digest."""

    latents: int
    """A token sees this many latents' worth of tokens to its left and to its right."""


Span = ChunkSpan | BandSpan


@dataclass(frozen=True)
class TrunkConfig:
    """The transformer of the encoder or the decoder."""

    width: int
    """Features of a token, D."""
    depth: int
    """Transformer blocks, N."""
    head_width: int
    """Features of an attention head."""
    ff_mult: int
    """Inner width of the feed-forward, as a multiple of `width`."""
    stride: int
    """Patches per latent."""
    span: Span
    """Which tokens an attention sees."""
    sine_blocks: int
    """Block i of N gates with sin(pi x) instead of SiLU when N - i < sine_blocks."""
    mapping_kernel: int
    """Kernel of the convolution between patches and tokens, along the patches."""

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // self.head_width

    @property
    def rotated(self) -> int:
        """Features of a head that rotary embedding turns: half of them, and at least 32."""
        return max(self.head_width // 2, 32)

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward."""
        return self.width * self.ff_mult

    @property
    def latent_tokens(self) -> int:
        """Tokens per latent: its patches and one learned or latent token."""
        return self.stride + 1

    def gates_with_sine(self, block: int) -> bool:
        """Whether block number `block` gates with sin(pi x)."""
        return self.depth - block < self.sine_blocks


@dataclass(frozen=True)
class SameConfig:
    """Every number of a SAME autoencoder that its checkpoint decides."""

    sample_rate: int
    """In Hz."""
    channels: int
    """Channels of audio."""
    patch: int
    """Samples per patch."""
    latent_width: int
    """Features of a latent."""
    encoder: TrunkConfig
    """The encoder's transformer."""
    decoder: TrunkConfig
    """The decoder's transformer."""
    soft_clip: bool
    """Whether the decoder ends in tanh."""

    @property
    def hop(self) -> int:
        """Samples per latent."""
        return self.patch * self.encoder.stride

    @property
    def patch_width(self) -> int:
        """Features of a patch: its samples, channel after channel."""
        return self.patch * self.channels


class _Fields:
    """A JSON object of the configuration, from which fields are taken; a field that is null counts as absent."""

    def __init__(self, values: Any, path: str, source: str) -> None:
        self._path = path
        self._source = source
        if not isinstance(values, dict):
            raise self.refusal(
                f"{path} must be an object, it is {reprlib.repr(values)}; pass the checkpoint of a SAME autoencoder, "
                "or download it again"
            )
        self._values = {key: value for key, value in values.items() if value is not None}
        self._parts: list[_Fields] = []

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def refusal(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: {problem}")

    def error(self, key: str, problem: str) -> CheckpointError:
        return self.refusal(f"{self._path}.{key} {problem}")

    def unimplemented(self, key: str, value: Any, implemented: str) -> CheckpointError:
        return self.error(key, f"= {reprlib.repr(value)} is not implemented ({implemented}); {_NOT_EXPORTABLE}")

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """Return the field's value, checked for its type; without a default it must be there."""
        value = self._values.pop(key, default)
        if value is None:
            raise self.error(key, f"is missing; {_DAMAGED}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"must be of type {kind.__name__}, it is {reprlib.repr(value)}; {_DAMAGED}")
        return value

    def take_size(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 1 to a million; only a damaged file holds a larger one."""
        value = int(self.take(key, int, default))
        if not 1 <= value <= 1_000_000:
            raise self.error(key, f"must lie in 1 ... 1000000, it is {value}; {_DAMAGED}")
        return value

    def take_level(self, key: str, default: list[int]) -> int:
        """Return the number of a list that holds one number for each level; only one level is implemented."""
        absent = "" if key in self else " by default"
        values = self.take(key, list, default)
        if len(values) != 1:
            raise self.error(
                key,
                f"has {len(values)} levels{absent}, and only autoencoders of one level are implemented; "
                f"{_NOT_EXPORTABLE}",
            )
        return int(_Fields({key: values[0]}, self._path, self._source).take(key, int))

    def require(self, key: str, implemented: Any, default: Any = None) -> None:
        """Refuse any value but the implemented one; an absent field counts as `default`."""
        value = self._values.get(key, default)
        if value is None:
            raise self.error(key, f"is missing; {_DAMAGED}")
        if value != implemented:
            absent = "" if key in self else " (the default)"
            raise self.error(
                key,
                f"= {reprlib.repr(value)}{absent} is not implemented (only {implemented!r} is); {_NOT_EXPORTABLE}",
            )
        self.ignore(key)

    def ignore(self, *keys: str) -> None:
        """Drop fields that the reference reads and that do not change the result here."""
        for key in keys:
            self._values.pop(key, None)

    def sub(self, key: str) -> _Fields:
        part = _Fields(self._values.pop(key, None), f"{self._path}.{key}", self._source)
        self._parts.append(part)
        return part

    def unread(self) -> Iterator[str]:
        """Yield the paths of all fields that were not taken, including those of nested objects."""
        yield from (f"{self._path}.{key}" for key in self._values)
        for part in self._parts:
            yield from part.unread()


def _parse_span(fields: _Fields, stride: int) -> Span:
    if "sliding_window" in fields:
        # The reference reads these only where there is no window.
        fields.ignore("chunk_size", "chunk_midpoint_shift")
        window = fields.take("sliding_window", list)
        if len(window) != 2 or window[0] != window[1] or type(window[0]) is not int or not 1 <= window[0] <= 8:
            raise fields.unimplemented("sliding_window", window, "two equal numbers from 1 to 8 are")
        return BandSpan(window[0])
    chunk = fields.take_size("chunk_size", 128)
    latents = chunk // stride
    if chunk % stride or latents % 2:
        raise fields.unimplemented("chunk_size", chunk, f"an even multiple of the stride {stride} is")
    if latents * (stride + 1) > MOST_CHUNK_TOKENS:
        raise fields.error(
            "chunk_size", f"= {chunk} is out of range, {MOST_CHUNK_TOKENS} tokens are implemented; {_NOT_EXPORTABLE}"
        )
    return ChunkSpan(latents, fields.take("chunk_midpoint_shift", bool, False))


def _parse_sine_blocks(fields: _Fields) -> int:
    # The reference takes a list with one number for each level for decoders and a number for encoders.
    sine = fields.take("sinusoidal_blocks", object, 0)
    levels = sine if isinstance(sine, list) else [sine]
    if not levels or any(type(blocks) is not int or blocks != levels[0] for blocks in levels):
        raise fields.unimplemented("sinusoidal_blocks", sine, "one whole number is")
    return int(levels[0])


def _parse_trunk(fields: _Fields, patch_width: int, latent_width: int, *, decoder: bool) -> TrunkConfig:
    """Read the encoder's or the decoder's `config`; defaults are those of the reference's constructors."""
    fields.require("out_channels" if decoder else "in_channels", patch_width, 2)
    fields.require("latent_dim", latent_width, 32)
    for switch in ("differential", "dyt", "mapping_bias"):
        fields.require(switch, True, True)
    for switch in ("conformer", "layer_scale", "cross_attn", "feat_scale"):
        fields.require(switch, False, False)
    fields.require("variable_stride", True, False)
    # Switches of training, the noise that the reference adds to learned tokens and we do not, and a switch that the
    # reference replaces by False.
    fields.ignore("checkpointing", "mask_noise", "freeze_backbone", "causal")
    stride = fields.take_level("strides", [2, 4, 8, 8])
    if not 1 <= stride <= 1024:
        raise fields.error("strides", f"= [{stride}] is out of range, 1 to 1024 is implemented; {_NOT_EXPORTABLE}")
    conv_mapping = fields.take("conv_mapping", bool, False)
    if conv_mapping and not decoder:
        raise fields.error("conv_mapping", f"= true is not implemented for encoders; {_NOT_EXPORTABLE}")
    trunk = TrunkConfig(
        width=fields.take_size("channels", 128) * fields.take_level("c_mults", [1, 2, 4, 8]),
        depth=fields.take_level("transformer_depths", [3, 3, 3, 3]),
        head_width=fields.take_size("dim_heads", 128),
        ff_mult=fields.take_size("ff_mult", 3),
        stride=stride,
        span=_parse_span(fields, stride),
        sine_blocks=_parse_sine_blocks(fields),
        mapping_kernel=3 if conv_mapping else 1,
    )
    if not (trunk.width > 0 and 1 <= trunk.depth <= 1000):
        raise fields.refusal(f"width {trunk.width} or depth {trunk.depth} is out of range; {_DAMAGED}")
    # Rotary embedding turns pairs of features, see `TrunkConfig.rotated`.
    pairs_fit = trunk.head_width % (4 if trunk.head_width > 64 else 2) == 0
    if trunk.head_width < 32 or not pairs_fit or trunk.width % trunk.head_width:
        raise fields.refusal(
            f"heads of {trunk.head_width} do not fit a width of {trunk.width} (they must be even, above 64 a multiple "
            f"of 4, at least 32, and divide it); {_NOT_EXPORTABLE}"
        )
    if isinstance(trunk.span, ChunkSpan) and trunk.span.shifted and trunk.depth % 2:
        raise fields.refusal(f"chunk_midpoint_shift needs an even depth, it is {trunk.depth}; {_NOT_EXPORTABLE}")
    return trunk


def parse_config(document: Any, source: str = CONFIG_FILE) -> tuple[SameConfig, bool]:
    """Read a `model_config.json` of either nesting.

    The fields that the reference implementation reads are read, with its defaults where they are absent or null. Values
    of these fields that are not implemented are refused. All other fields, `type` included, are logged and ignored,
    except the `scale` of a full checkpoint, which must be 1.

    Args:
        document: the parsed JSON.
        source: the file that it was read from, for messages.

    Returns:
        The configuration, and whether it lay inside a full Stable Audio 3 configuration.

    Raises:
        CheckpointError: a field is missing, has the wrong type, or has a value that is not implemented.
    """
    top = _Fields(document, "config", source)
    outer = top.sub("model")
    nested = "pretransform" in outer and "encoder" not in outer
    model = outer
    if nested:
        wrapped = outer.sub("pretransform")
        # The full model divides latents by it.
        wrapped.require("scale", 1, 1)
        model = wrapped.sub("config")
    sample_rate = top.take_size("sample_rate")

    channels = model.take_size("io_channels")
    for key in ("in_channels", "out_channels"):
        model.require(key, channels, channels)
    patched = model.sub("pretransform").sub("config")
    patch = patched.take_size("patch_size")
    patched.require("channels", channels)
    patched.require("oversampling", 1, 1)
    patched.require("postfilter_channels", 0, 0)
    latent_width = model.take_size("latent_dim")

    encoder = _parse_trunk(model.sub("encoder").sub("config"), patch * channels, latent_width, decoder=False)
    outer_decoder = model.sub("decoder")
    soft_clip = outer_decoder.take("soft_clip", bool, False)
    decoder = _parse_trunk(outer_decoder.sub("config"), patch * channels, latent_width, decoder=True)

    bottleneck = model.sub("bottleneck").sub("config")
    bottleneck.require("dim", latent_width, 32)
    bottleneck.require("noise_augment_dim", 0, 0)
    bottleneck.require("auto_scale", True, False)
    # Noise at inference, which we do not add, and a switch of training.
    bottleneck.ignore("noise_regularize", "freeze")

    config = SameConfig(sample_rate, channels, patch, latent_width, encoder, decoder, soft_clip)
    model.require("downsampling_ratio", config.hop)
    if encoder.stride != decoder.stride:
        raise top.refusal(
            f"strides {encoder.stride} (encoder) and {decoder.stride} (decoder) differ, which is not implemented; "
            f"{_NOT_EXPORTABLE}"
        )
    unread = ", ".join(top.unread())
    if unread:
        logger.info("%s: fields that are not read: %s", source, unread.encode("unicode_escape").decode())
    return config, nested


def rotary_frequencies(rotated: int) -> np.ndarray:
    """Return the frequencies of rotary embedding, base 10000: `[rotated / 2]`, radians per token (RoFormer, eq. 15)."""
    return 1.0 / 10000 ** (np.arange(0, rotated, 2) / rotated)
