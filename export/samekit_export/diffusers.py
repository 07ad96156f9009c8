"""The other format people have: a folder of `diffusers`' `AutoencoderSAME`, told in terms of the published format.

Knows names, the order of rows and what that class cannot express; `checkpoint.py` reads and checks the result.
"""

from __future__ import annotations

import re
import reprlib
from typing import TYPE_CHECKING, Any

from samekit.errors import CheckpointError
from samekit.files.json_fields import check_kind

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "config.json"
"""Name of the configuration there."""
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
"""Name of the weights there."""
CLASS_NAME = "AutoencoderSAME"
"""The only class of `diffusers` whose configuration is read."""

# Of its configuration.
_FIELDS = (
    "audio_channels",
    "patch_size",
    "encoder_channels",
    "encoder_c_mults",
    "encoder_strides",
    "encoder_transformer_depths",
    "latent_dim",
    "use_differential_attention",
    "dim_heads",
    "ff_mult",
    "sliding_window",
    "encoder_sinusoidal_blocks",
    "decoder_sinusoidal_blocks",
    "sampling_rate",
)
# Its key -> the published key; `{half}` and block numbers are kept.
_RENAMES = (
    (r"encoder\.blocks\.0\.", "encoder.layers.0."),
    (r"encoder\.proj\.", "encoder.layers.2."),
    (r"decoder\.proj\.", "decoder.layers.1."),
    (r"decoder\.blocks\.0\.", "decoder.layers.3."),
    (r"bottleneck\.scale$", "bottleneck.scaling_factor"),
    (r"\.norm_attn\.", ".pre_norm."),
    (r"\.norm_ff\.", ".ff_norm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ff\.proj_in\.", ".ff.ff.0.proj."),
    (r"\.ff\.proj_out\.", ".ff.ff.2."),
)


def published_key(key: str) -> str:
    """The published name of a tensor."""
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def published_tensor(key: str, tensor: Tensor) -> Tensor:
    """A tensor under its published key, with the published order of rows: q, k, v, q2, k2."""
    if not key.endswith("to_qkv.weight"):
        return tensor
    import torch  # noqa: PLC0415

    q1, q2, k1, k2, v = tensor.chunk(5)
    return torch.cat([q1, k1, v, q2, k2])


def diffusers_tensor(key: str, tensor: Tensor) -> Tensor:
    """The way back of `published_tensor`: a published tensor under its key there, with the order of rows there."""
    if not key.endswith("to_qkv.weight"):
        return tensor
    import torch  # noqa: PLC0415

    q1, k1, v, q2, k2 = tensor.chunk(5)
    return torch.cat([q1, q2, k1, k2, v])


def published_config(document: Any, source: str = CONFIG_FILE) -> dict[str, Any]:
    """The published `model_config.json` of a `diffusers` configuration.

    The class knows the band kind only, so that is what comes out.

    Args:
        document: the parsed JSON.
        source: the file that it was read from, for messages.

    Raises:
        CheckpointError: the configuration is of another class, or incomplete.
    """
    if not isinstance(document, dict) or document.get("_class_name") != CLASS_NAME:
        raise CheckpointError(f"{source}: not of {CLASS_NAME}; pass the folder of the autoencoder itself (vae)")
    try:
        return _translated(document, source)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: damaged or incomplete ({error}); download it again") from None


def _translated(its: dict[str, Any], source: str) -> dict[str, Any]:
    """The configuration field by field."""
    for name in ("dim_heads", "patch_size", "audio_channels"):
        # Before they are multiplied: text times a number is a longer text.
        check_kind(name, its[name], int)
    for stride in its["encoder_strides"]:
        check_kind("encoder_strides", stride, int)
    if its["dim_heads"] < 64:
        # That class turns half of a small head, the published model 32 features of it.
        raise CheckpointError(
            f"{source}: dim_heads = {its['dim_heads']} is not implemented here, 64 or more is; pass the checkpoint in "
            "the published format"
        )
    # As in the published format, what is off changes nothing. Those with "_" tell of the class and its package.
    unknown = next(
        (key for key, value in its.items() if value and key not in _FIELDS and not key.startswith("_")), None
    )
    if unknown is not None:
        raise CheckpointError(
            f"{source}: {unknown} = {reprlib.repr(its[unknown])} is not implemented; pass the checkpoint in the "
            "published format"
        )
    features = its["patch_size"] * its["audio_channels"]
    hop = its["patch_size"]
    for stride in its["encoder_strides"]:
        hop *= stride
    trunk = {
        "channels": its["encoder_channels"],
        "c_mults": list(its["encoder_c_mults"]),
        "strides": list(its["encoder_strides"]),
        "latent_dim": its["latent_dim"],
        "transformer_depths": list(its["encoder_transformer_depths"]),
        "differential": its["use_differential_attention"],
        "dyt": True,
        "dim_heads": its["dim_heads"],
        "ff_mult": its["ff_mult"],
        "variable_stride": True,
        "sliding_window": [its["sliding_window"]] * 2,
    }
    encoder = {"in_channels": features, "sinusoidal_blocks": list(its["encoder_sinusoidal_blocks"]), **trunk}
    decoder = {"out_channels": features, "sinusoidal_blocks": list(its["decoder_sinusoidal_blocks"]), **trunk}
    patched = {"patch_size": its["patch_size"], "channels": its["audio_channels"]}
    return {
        "sample_rate": its["sampling_rate"],
        "model": {
            "pretransform": {"type": "patched", "config": patched},
            "encoder": {"type": "same", "config": encoder},
            "decoder": {"type": "same", "config": decoder},
            "bottleneck": {"type": "softnorm", "config": {"dim": its["latent_dim"], "auto_scale": True}},
            "latent_dim": its["latent_dim"],
            "downsampling_ratio": hop,
            "io_channels": its["audio_channels"],
        },
    }
