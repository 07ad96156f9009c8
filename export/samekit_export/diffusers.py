"""Translate a folder of `diffusers`' `AutoencoderSAME` to the published format: names, order of rows, configuration."""

from __future__ import annotations

import math
import re
import reprlib
from typing import TYPE_CHECKING, Any

from samekit.errors import CheckpointError
from samekit.files.json_fields import check_kind

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "config.json"
"""Name of the configuration in this format."""
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
"""Name of the weights in this format."""
CLASS_NAME = "AutoencoderSAME"
"""The only class of `diffusers` whose configuration is read."""

# The fields of its configuration that are read.
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
# Patterns in its keys -> the published text.
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
    """Return the published name of a tensor."""
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def published_tensor(key: str, tensor: Tensor) -> Tensor:
    """Return a tensor, given with its published key, in the published order of rows: q, k, v, q2, k2."""
    if not key.endswith("to_qkv.weight"):
        return tensor
    import torch  # slow, and not needed to look up names of models

    q1, q2, k1, k2, v = tensor.chunk(5)
    return torch.cat([q1, k1, v, q2, k2])


def published_config(document: Any, source: str = CONFIG_FILE) -> dict[str, Any]:
    """Return the published `model_config.json` for a parsed configuration of `diffusers`.

    Messages name the file `source`.

    Raises:
        CheckpointError: the configuration is of another class, damaged, or has a value that is not implemented.
    """
    if not isinstance(document, dict) or document.get("_class_name") != CLASS_NAME:
        raise CheckpointError(f"{source}: not of {CLASS_NAME}; pass the folder of the autoencoder itself (vae)")
    try:
        return _translated(document, source)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: damaged or incomplete ({error}); download it again") from None


def _translated(given: dict[str, Any], source: str) -> dict[str, Any]:
    # These are multiplied below, and Python can multiply lists and text too.
    for name in ("dim_heads", "patch_size", "audio_channels"):
        check_kind(name, given[name], int)
    for stride in given["encoder_strides"]:
        check_kind("encoder_strides", stride, int)
    if given["dim_heads"] < 64:
        # For small heads, that class rotates half of the features, and the published model rotates 32.
        raise CheckpointError(
            f"{source}: dim_heads = {given['dim_heads']} is not implemented here, 64 or more is; pass the checkpoint "
            "in the published format"
        )
    # A switch that is off changes nothing. Fields that begin with "_" describe the class and its package.
    for key, value in given.items():
        if value and key not in _FIELDS and not key.startswith("_"):
            raise CheckpointError(
                f"{source}: {key} = {reprlib.repr(value)} is not implemented; pass the checkpoint in the published "
                "format"
            )
    features = given["patch_size"] * given["audio_channels"]
    trunk = {
        "channels": given["encoder_channels"],
        "c_mults": list(given["encoder_c_mults"]),
        "strides": list(given["encoder_strides"]),
        "latent_dim": given["latent_dim"],
        "transformer_depths": list(given["encoder_transformer_depths"]),
        "differential": given["use_differential_attention"],
        "dyt": True,
        "dim_heads": given["dim_heads"],
        "ff_mult": given["ff_mult"],
        "variable_stride": True,
        "sliding_window": [given["sliding_window"]] * 2,
    }
    encoder = {"in_channels": features, "sinusoidal_blocks": list(given["encoder_sinusoidal_blocks"]), **trunk}
    decoder = {"out_channels": features, "sinusoidal_blocks": list(given["decoder_sinusoidal_blocks"]), **trunk}
    patched = {"patch_size": given["patch_size"], "channels": given["audio_channels"]}
    return {
        "sample_rate": given["sampling_rate"],
        "model": {
            "pretransform": {"type": "patched", "config": patched},
            "encoder": {"type": "same", "config": encoder},
            "decoder": {"type": "same", "config": decoder},
            "bottleneck": {"type": "softnorm", "config": {"dim": given["latent_dim"], "auto_scale": True}},
            "latent_dim": given["latent_dim"],
            "downsampling_ratio": math.prod(given["encoder_strides"], start=given["patch_size"]),
            "io_channels": given["audio_channels"],
        },
    }
