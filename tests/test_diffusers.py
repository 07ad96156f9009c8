"""The `diffusers` format, with the independent `AutoencoderSAME` of `diffusers` as the reference."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from samekit import AutoencoderModel
from samekit.errors import CheckpointError
from samekit_export.checkpoint import load_folder
from samekit_export.graph import GraphDecoder, GraphEncoder
from samekit_export.model import Same
from samekit_export.verify import snr_db


@pytest.fixture
def changed(same_of_diffusers, tmp_path):
    """Return a function that copies the saved folder with changed configuration fields."""

    def change(**fields):
        folder = shutil.copytree(same_of_diffusers[1], tmp_path / "vae")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    return change


@pytest.mark.parametrize("latents", [1, 2, 9])
def test_model_and_graphs_equal_the_oracle(same_of_diffusers, latents):
    theirs, folder = same_of_diffusers
    ours = Same.from_checkpoint(load_folder(folder))
    noise = np.random.default_rng(latents)
    audio = torch.from_numpy(noise.standard_normal((2, 2, latents * 4096), np.float32) * np.float32(0.2))
    z = torch.from_numpy(noise.standard_normal((2, 32, latents), np.float32))
    with torch.inference_mode():
        encoded, decoded = theirs.encode(audio).latents.numpy(), theirs.decode(z).sample.numpy()
        for encode, decode in ((ours.encode, ours.decode), (GraphEncoder(ours), GraphDecoder(ours))):
            assert snr_db(encoded, encode(audio).numpy()) >= 100
            assert snr_db(decoded, decode(z).numpy()) >= 100


def test_runs_by_folder(same_of_diffusers):
    theirs, folder = same_of_diffusers
    audio = np.random.default_rng(0).standard_normal((2, 5 * 4096), np.float32) * np.float32(0.2)
    with AutoencoderModel.from_pretrained(folder, backend="torch") as model, torch.inference_mode():
        expected = theirs.encode(torch.from_numpy(audio)[None]).latents.numpy()
        assert snr_db(expected, model.encode(audio, 44100)) >= 100


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"_class_name": "AutoencoderKL"}, "AutoencoderSAME"),
        ({"dim_heads": 32}, "dim_heads"),
        ({"use_differential_attention": False}, "differential"),
        ({"encoder_strides": [4, 4], "encoder_c_mults": [4, 4], "encoder_transformer_depths": [2, 2]}, "levels"),
        ({"latent_dim": 64}, "shape"),
        ({"patch_size": None}, "config.json"),
        ({"gizmo": 2}, "gizmo = 2 is not implemented"),
    ],
)
def test_what_is_not_implemented_is_named(changed, fields, named):
    folder = changed(**fields)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_folder(folder)
    message = str(caught.value)
    assert message.startswith((f"{folder / 'config.json'}", f"{folder / 'diffusion_pytorch_model.safetensors'}"))
    assert "; " in message


def test_missing_field_is_named(changed):
    folder = changed()
    config = json.loads((folder / "config.json").read_text())
    del config["sliding_window"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="sliding_window"):
        load_folder(folder)
