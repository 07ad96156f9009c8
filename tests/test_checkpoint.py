"""Checkpoints: both nestings, the message of each refusal, seeded weights, the hub without a network."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import KINDS, REMOVED, assert_one_line, edit, seeded, variant
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from samekit.engine.folder import KNOWN_MODELS
from samekit.errors import CheckpointError
from samekit_export.checkpoint import NESTED_PREFIX, WEIGHTS_FILE, load, load_folder, load_source, save_folder
from samekit_export.config import CONFIG_FILE, BandSpan, ChunkSpan, parse_config
from samekit_export.hub import PUBLISHED
from samekit_export.random_weights import TRAINED_LIKE, published_config, random_checkpoint
from samekit_export.tensors import tensor_shapes


@pytest.fixture
def folder(checkpoint_of, tmp_path):
    """Return a checkpoint folder of tiny-s that the test may change."""
    return shutil.copytree(checkpoint_of("tiny-s"), tmp_path / "my-model")


def rewrite(folder, change):
    """Call `change` with the dict of tensors of a checkpoint folder, and write the changed tensors."""
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def assert_same(checkpoint, other):
    assert checkpoint.sha256 == other.sha256
    assert checkpoint.config == other.config
    assert checkpoint.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in checkpoint.tensors.items())


def refused(call, *arguments):
    """Return the message of a CheckpointError, which is one line."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- Folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_folder(checkpoint_of, name):
    loaded = load(str(checkpoint_of(name)))
    assert_same(loaded, seeded(name))
    assert loaded.name == name
    assert all(tensor.dtype == torch.float32 for tensor in loaded.tensors.values())


def test_folder_under_another_name(folder):
    assert load("same-s", weights=str(folder)).name == "same-s"
    assert load_folder(str(folder)).name == "my-model"


def test_relative_folder_can_be_loaded_again(folder, monkeypatch):
    monkeypatch.chdir(folder)
    loaded = load(".")
    assert loaded.name == "my-model"
    monkeypatch.chdir("/")
    again = load_source(loaded.source)
    assert_same(again, loaded)
    assert again.name == loaded.name


def nested(name):
    """Return configuration and tensors of a full checkpoint that contains an autoencoder and other parts."""
    inner = published_config(name)
    config = {
        "model_type": "diffusion_cond",
        "sample_rate": inner["sample_rate"],
        "model": {
            "pretransform": {"type": "autoencoder", "iterate_batch": True, "config": inner["model"]},
            "diffusion": {"type": "dit", "config": {"conformer": True, "depth": 20}},
        },
    }
    tensors = {NESTED_PREFIX + key: tensor for key, tensor in seeded(name).tensors.items()}
    tensors["model.model.transformer.layers.0.weight"] = torch.full((3, 3), torch.nan)
    tensors["pretransform.scale"] = torch.ones(1)
    tensors["conditioner.embedding"] = torch.ones(2, dtype=torch.int64)
    return config, tensors


@pytest.mark.parametrize("name", KINDS)
def test_inside_a_full_checkpoint(tmp_path, name):
    config, tensors = nested(name)
    save_folder(config, tensors, tmp_path)
    assert_same(load_folder(tmp_path), seeded(name))


def test_inside_a_full_checkpoint_nothing_of_the_autoencoder_is_ignored(tmp_path):
    config, tensors = nested("tiny-s")
    tensors[f"{NESTED_PREFIX}encoder.gizmo"] = torch.ones(1)
    save_folder(config, tensors, tmp_path)
    assert "tensor encoder.gizmo is not part" in refused(load_folder, tmp_path)


@pytest.mark.parametrize("scale", [0.5, 2, "1"])
def test_inside_a_full_checkpoint_latents_are_not_scaled(tmp_path, scale):
    config, tensors = nested("tiny-s")
    config["model"]["pretransform"]["scale"] = 1.0
    save_folder(config, tensors, tmp_path)
    assert_same(load_folder(tmp_path), seeded("tiny-s"))
    config["model"]["pretransform"]["scale"] = scale
    save_folder(config, tensors, tmp_path)
    message = refused(load_folder, tmp_path)
    assert f"config.model.pretransform.scale = {scale!r} is not implemented (only 1 is); pass the" in message


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a full checkpoint"])
def test_fields_beside_the_model_that_the_reference_does_not_read(inside, caplog):
    caplog.set_level(logging.INFO)
    document = nested("tiny-s")[0] if inside else published_config("tiny-s")
    config, _ = parse_config(document | {"audio_channels": 1, "sample_size": 10**6, "training": {"gizmo": 1}})
    assert config == seeded("tiny-s").config
    for field in ("audio_channels", "sample_size", "training"):
        assert f"config.{field}" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load(folder, dtype):
    original = seeded("tiny-s").tensors
    save_folder(published_config("tiny-s"), {key: tensor.to(dtype) for key, tensor in original.items()}, folder)
    for key, tensor in load_folder(folder).tensors.items():
        assert tensor.dtype == torch.float32
        # The frequencies are computed again, because rounded ones would turn the last tokens too far.
        exact = original[key] if key.endswith("inv_freq") else original[key].to(dtype).float()
        assert torch.equal(tensor, exact)


# --- Tensors -----------------------------------------------------------------------------------------------

# One tensor of every part.
WEIGHTS = [
    "encoder.layers.0.mapping.weight_g",
    "encoder.layers.0.new_tokens",
    "encoder.layers.0.transformers.3.ff.ff.0.proj.bias",
    "encoder.layers.2.bias",
    "decoder.layers.1.weight",
    "decoder.layers.3.mapping.weight_v",
    "decoder.layers.3.transformers.1.self_attn.k_norm.alpha",
    "bottleneck.running_std",
]
# These follow from the configuration.
DERIVED = ["encoder.layers.0.transformers.0.rope.inv_freq", "bottleneck.noise_scaling_factor"]


@pytest.mark.parametrize("key", WEIGHTS)
def test_missing_tensor(folder, key):
    rewrite(folder, lambda tensors: tensors.pop(key))
    message = refused(load_folder, folder)
    assert f"tensor {key} [" in message
    assert "is missing; " in message


@pytest.mark.parametrize("key", DERIVED)
def test_missing_tensor_that_can_be_derived(folder, key):
    rewrite(folder, lambda tensors: tensors.pop(key))
    assert_same(load_folder(folder), seeded("tiny-s"))


def test_frequencies_of_another_base(folder):
    rewrite(folder, lambda tensors: tensors[DERIVED[0]].pow_(0.9))
    assert f"tensor {DERIVED[0]} is not what its formula gives" in refused(load_folder, folder)


@pytest.mark.parametrize("key", WEIGHTS + DERIVED)
def test_tensor_of_another_shape(folder, key):
    rewrite(folder, lambda tensors: tensors.update({key: tensors[key][None]}))
    message = refused(load_folder, folder)
    assert f"tensor {key} has shape [" in message
    assert f"asks for {list(tensor_shapes(seeded('tiny-s').config)[key])}" in message


@pytest.mark.parametrize("key", ["encoder.layers.0.transformers.4.pre_norm.alpha", "decoder.gizmo", "model.bias"])
def test_extra_tensor(folder, key):
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(1)}))
    assert f"tensor {key} is not part of a SAME autoencoder" in refused(load_folder, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [*WEIGHTS, DERIVED[0]])
def test_weights_that_are_not_finite(folder, key, value):
    rewrite(folder, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    message = refused(load_folder, folder)
    assert f"tensor {key} holds NaN or infinity" in message
    assert str(folder) in message


# --- Files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file(folder, file):
    (folder / file).unlink()
    message = refused(load_folder, folder)
    assert message.startswith(f"{folder}: no {file} here; ")


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_weights_that_were_cut_off(folder, kept):
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:kept])
    message = refused(load_folder, folder)
    assert message.startswith(f"{weights}: not a readable safetensors file")
    assert message.endswith("; download it again")


def test_weights_of_another_format(folder):
    torch.save({"a": torch.ones(1)}, folder / WEIGHTS_FILE)
    assert "not a readable safetensors file" in refused(load_folder, folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"model": {}'])
def test_configuration_that_is_no_json(folder, content):
    (folder / CONFIG_FILE).write_bytes(content)
    message = refused(load_folder, folder)
    assert message.startswith(f"{folder / CONFIG_FILE}: cannot be read as JSON")


@pytest.mark.parametrize("document", [[], "same", 5, None, {}, {"model": []}, {"model": {"pretransform": 1}}], ids=str)
def test_configuration_of_something_else(folder, document):
    (folder / CONFIG_FILE).write_text(json.dumps(document), encoding="utf-8")
    message = refused(load_folder, folder)
    assert message.startswith(f"{folder / CONFIG_FILE}: config")
    assert "must be an object" in message


# --- What is not implemented -------------------------------------------------------------------------------

# Path from `model`, value, and the text in the message if it is not the name of the field.
NOT_IMPLEMENTED = [
    *[
        (f"{direction}.config.{field}", True)
        for direction in ("encoder", "decoder")
        for field in ("conformer", "layer_scale")
    ],
    ("encoder.config.cross_attn", True),
    ("encoder.config.feat_scale", True),
    ("encoder.config.differential", False),
    ("decoder.config.dyt", False),
    ("encoder.config.variable_stride", False),
    ("decoder.config.mapping_bias", False),
    ("encoder.config.conv_mapping", True),
    ("encoder.config.c_mults", [4, 4]),
    ("decoder.config.c_mults", []),
    ("encoder.config.strides", [4, 4]),
    ("decoder.config.transformer_depths", [2, 2]),
    ("encoder.config.chunk_size", 16),
    ("decoder.config.chunk_size", 48),
    ("encoder.config.chunk_size", 33),
    ("encoder.config.chunk_size", 8),
    ("encoder.config.sliding_window", [1, 2]),
    ("encoder.config.sliding_window", [0, 0]),
    ("decoder.config.sliding_window", [9, 9]),
    ("decoder.config.sliding_window", [1]),
    ("decoder.config.sliding_window", [1, 1, 1]),
    ("decoder.config.sliding_window", [1.0, 1.0]),
    ("decoder.config.sliding_window", [True, True]),
    ("decoder.config.sinusoidal_blocks", [1, 2]),
    ("decoder.config.sinusoidal_blocks", ["all"]),
    ("decoder.config.sinusoidal_blocks", [1.5]),
    ("encoder.config.in_channels", 256),
    ("decoder.config.out_channels", 256),
    ("encoder.config.latent_dim", 64),
    ("pretransform.config.channels", 1),
    ("bottleneck.config.dim", 64),
    ("bottleneck.config.noise_augment_dim", 4),
    ("bottleneck.config.auto_scale", False),
    ("downsampling_ratio", 2048),
]


@pytest.mark.parametrize(("path", "value"), NOT_IMPLEMENTED, ids=lambda part: str(part).removesuffix(".config"))
def test_value_that_is_not_implemented(path, value):
    document = published_config("tiny-s")
    edit(document["model"], {path: value})
    message = refused(parse_config, document)
    assert message.startswith(f"{CONFIG_FILE}: ")
    assert message.endswith("; pass the checkpoint of SAME-S or SAME-L as it was published")
    assert path.rsplit(".", 1)[-1] in message
    assert any(phrase in message for phrase in ("not implemented", "are implemented"))


# Changes that contradict each other or the format, and the text in the message.
CONTRADICTIONS = [
    ({"*.config.dim_heads": 24}, "heads of 24"),
    ({"*.config.dim_heads": 33}, "heads of 33"),
    ({"*.config.dim_heads": 96}, "heads of 96"),
    ({"*.config.channels": 66, "*.config.c_mults": [1], "*.config.dim_heads": 66}, "heads of 66"),
    ({"*.config.chunk_size": 16 * 10**4}, "chunk_size = 160000 is out of range"),
    ({"*.config.transformer_depths": [3]}, "chunk_midpoint_shift needs an even depth"),
    ({"*.config.transformer_depths": [0]}, "depth 0"),
    ({"*.config.transformer_depths": [10**6]}, "depth 1000000"),
    ({"decoder.config.strides": [8], "decoder.config.chunk_size": 16}, "strides"),
    ({"*.config.chunk_size": "32"}, "chunk_size must be of type int"),
    ({"*.config.chunk_size": 32.0}, "chunk_size must be of type int"),
    ({"*.config.chunk_midpoint_shift": "yes"}, "chunk_midpoint_shift must be of type bool"),
    ({"*.config.channels": True}, "channels must be of type int"),
    ({"*.config.channels": 0}, "channels must lie in"),
    ({"*.config.channels": -32}, "channels must lie in"),
    ({"*.config.ff_mult": 10**9}, "ff_mult must lie in"),
    ({"*.config.strides": 16}, "strides must be of type list"),
    ({"*.config.strides": [0]}, "strides = [0] is out of range"),
    ({"*.config.strides": ["16"]}, "strides must be of type int"),
    ({"*.config.sliding_window": 1}, "sliding_window must be of type list"),
    ({"decoder.soft_clip": "no"}, "soft_clip must be of type bool"),
    ({"io_channels": None}, "io_channels is missing"),
    ({"latent_dim": REMOVED}, "latent_dim is missing"),
    ({"*.config.strides": REMOVED}, "strides has 4 levels by default, and only"),
    ({"*.config.variable_stride": REMOVED}, "variable_stride = False (the default)"),
    ({"pretransform.config.patch_size": REMOVED}, "patch_size is missing"),
    ({"decoder": REMOVED}, "decoder must be an object"),
    ({"decoder.config": "same"}, "config must be an object"),
    ({"bottleneck": REMOVED}, "bottleneck must be an object"),
]


@pytest.mark.parametrize(("changes", "named"), CONTRADICTIONS, ids=lambda part: str(part)[:60])
def test_contradictory_configuration(changes, named):
    document = published_config("tiny-s")
    edit(document["model"], changes)
    assert named in refused(parse_config, document)


def test_refusals_reach_the_loader(folder):
    document = published_config("tiny-s")
    edit(document["model"], {"encoder.config.conformer": True})
    (folder / CONFIG_FILE).write_text(json.dumps(document), encoding="utf-8")
    assert "conformer = True is not implemented" in refused(load_folder, folder)


@pytest.mark.parametrize("name", ["same-s", "same-l"])
def test_published_sizes(name):
    config, is_nested = parse_config(published_config(name))
    small = name == "same-s"
    assert not is_nested
    assert (config.sample_rate, config.channels, config.patch, config.hop) == (44_100, 2, 256, 4096)
    assert (config.latent_width, config.soft_clip) == (256, False)
    for trunk in (config.encoder, config.decoder):
        assert (trunk.width, trunk.depth, trunk.heads) == ((768, 6, 12) if small else (1536, 12, 24))
        assert trunk.inner == 3 * trunk.width
        assert trunk.latent_tokens == 17
        assert trunk.span == (ChunkSpan(2, shifted=True) if small else BandSpan(1))
    assert config.encoder.mapping_kernel == 1
    assert config.decoder.mapping_kernel == (3 if small else 1)
    sine = [config.decoder.gates_with_sine(block) for block in range(config.decoder.depth)]
    assert sine == [not small and block >= 5 for block in range(config.decoder.depth)]
    assert not any(config.encoder.gates_with_sine(block) for block in range(config.encoder.depth))
    parameters = sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())
    assert round(parameters / 1e6, 1) == (108.2 if small else 852.1)


# --- Seeded weights ----------------------------------------------------------------------------------------

# Mean and standard deviation of the golden weights, for keys of every kind; tokens are 128 wide, latents 32.
GOLDEN_WEIGHTS = {
    "encoder.layers.0.mapping.weight_v": (0, 1),
    "encoder.layers.0.mapping.weight_g": (1, 0.1),
    "encoder.layers.0.mapping.bias": (0, 0.1),
    "encoder.layers.0.new_tokens": (0, 0.5),
    "encoder.layers.0.transformers.1.pre_norm.alpha": (1.5, 0.15),
    "encoder.layers.0.transformers.2.ff_norm.gamma": (1, 0.1),
    "decoder.layers.3.transformers.3.ff_norm.beta": (0, 0.1),
    "decoder.layers.3.transformers.0.self_attn.q_norm.alpha": (2, 0.2),
    "decoder.layers.3.transformers.0.self_attn.k_norm.alpha": (2, 0.2),
    "encoder.layers.0.transformers.0.self_attn.to_qkv.weight": (0, 128**-0.5),
    "encoder.layers.0.transformers.0.self_attn.to_out.weight": (0, 0.7 * 128**-0.5),
    "encoder.layers.0.transformers.0.ff.ff.0.proj.weight": (0, 128**-0.5),
    "encoder.layers.0.transformers.0.ff.ff.2.weight": (0, 0.7 * 384**-0.5),
    "encoder.layers.0.transformers.0.ff.ff.2.bias": (0, 0.1),
    "encoder.layers.2.weight": (0, 128**-0.5),
    "decoder.layers.1.weight": (0, 32**-0.5),
    "decoder.layers.1.bias": (0, 0.1),
    "bottleneck.scaling_factor": (1, 0.1),
    "bottleneck.bias": (0, 0.1),
}


@pytest.mark.parametrize("name", KINDS)
def test_seeded_weights_are_the_golden_ones(name):
    tensors = seeded(name).tensors
    for key, (mean, deviation) in GOLDEN_WEIGHTS.items():
        draw = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(tensors[key].shape))
        assert np.array_equal(tensors[key].numpy(), (mean + deviation * draw).astype(np.float32)), key
    assert tensors["bottleneck.running_std"].tolist() == [1.25]
    frequencies = tensors["encoder.layers.0.transformers.0.rope.inv_freq"]
    assert np.allclose(frequencies, [10_000 ** (-i / 16) for i in range(16)], rtol=1e-6)


def test_seeds():
    assert_same(random_checkpoint("tiny-s", 7), random_checkpoint("tiny-s", 7))
    other = random_checkpoint("tiny-s", 8)
    assert other.sha256 != random_checkpoint("tiny-s", 7).sha256
    assert_same(load_source(other.source), other)
    assert_same(load("tiny-s", weights="random"), random_checkpoint("tiny-s", version=TRAINED_LIKE))


def test_defaults_of_pytorch_change_no_checkpoint():
    """The user may have set another dtype for new tensors, and another device."""
    expected = [load("same-tiny").sha256, load("tiny-s", "random").sha256]
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        assert [load("same-tiny").sha256, load("tiny-s", "random").sha256] == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("name", ["same-m", "tiny-x", "s", "", "../tiny-s", "big-s"])
def test_names_without_seeded_weights(name):
    assert "choose same-s, same-l, tiny-s or tiny-l" in refused(random_checkpoint, name)


def test_digest_covers_weights_and_configuration(folder):
    digests = {seeded("tiny-s").sha256, variant("tiny-s", {"decoder.soft_clip": True}).sha256}
    for key in WEIGHTS:
        rewrite(folder, lambda tensors, key=key: tensors[key].mul_(1.001))
        digests.add(load_folder(folder).sha256)
    assert len(digests) == 2 + len(WEIGHTS)


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"kind": "tape"},
        {"kind": ["random"]},
        {"kind": "random"},
        {"kind": "random", "name": "tiny-s", "seed": "0"},
        {"kind": "folder", "path": "x"},
        {"kind": "folder", "folder": 5},
    ],
    ids=str,
)
def test_sources_that_are_none(source):
    assert_one_line(refused(load_source, source))


# --- The hub -----------------------------------------------------------------------------------------------


class Hub:
    """Replaces `snapshot_download`: serves folders from a cache and from a network, and records the calls."""

    def __init__(self):
        self.cached = {}
        self.online = {}
        self.calls = []

    def __call__(self, repo_id, *, revision=None, local_files_only=False, **_):
        self.calls.append((repo_id, revision, "cache" if local_files_only else "network"))
        served = self.cached if local_files_only else self.online
        if repo_id not in served:
            raise LocalEntryNotFoundError("Cannot find the requested files\nin the cache, and the network is off.")
        return str(served[repo_id])


@pytest.fixture
def hub(monkeypatch):
    """An empty hub."""
    fake = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    return fake


@pytest.fixture
def snapshot(folder):
    """Return a checkpoint folder that is named after its commit, as in the hub's cache."""
    return folder.rename(folder.with_name("0123abc"))


def test_cached_model(hub, snapshot):
    hub.cached["stabilityai/SAME-S"] = snapshot
    loaded = load("same-s")
    assert_same(loaded, seeded("tiny-s"))
    assert loaded.name == "same-s"
    assert loaded.source["revision"] == "0123abc"
    assert hub.calls == [("stabilityai/SAME-S", PUBLISHED["stabilityai/SAME-S"].revision, "cache")]
    assert_same(load_source(loaded.source), loaded)
    assert hub.calls[1:] == [("stabilityai/SAME-S", "0123abc", "cache")]


def test_pinned_revision_is_passed_on(hub, snapshot):
    hub.online["stabilityai/SAME-S"] = snapshot
    load("same-s", revision="v1.0")
    assert hub.calls == [("stabilityai/SAME-S", "v1.0", "cache"), ("stabilityai/SAME-S", "v1.0", "network")]


def test_cached_full_checkpoint_serves(hub, tmp_path):
    snapshot = tmp_path / "4567def"
    save_folder(*nested("tiny-s"), snapshot)
    hub.cached["stabilityai/stable-audio-3-small-sfx"] = snapshot
    loaded = load("same-s")
    assert_same(loaded, seeded("tiny-s"))
    assert loaded.name == "same-s"
    assert all(where == "cache" for _, _, where in hub.calls)
    # Its source loads the same model again.
    assert_same(load_source(loaded.source), loaded)
    # A revision belongs to one repository, so the cache of another one is not used.
    hub.calls.clear()
    refused(load, "same-s", "hub", "v1.0")
    assert {repository for repository, _, _ in hub.calls} == {"stabilityai/SAME-S"}


def test_download_that_was_cut_short(hub, snapshot, tmp_path):
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / CONFIG_FILE).write_text("{}", encoding="utf-8")
    hub.cached["stabilityai/SAME-S"] = partial
    hub.online["stabilityai/SAME-S"] = snapshot
    assert_same(load("same-s"), seeded("tiny-s"))


def test_any_repository(hub, snapshot):
    hub.online["someone/My-SAME"] = snapshot
    loaded = load("someone/My-SAME")
    assert loaded.name == "my-same"
    assert "/" not in loaded.name


@pytest.mark.parametrize("name", ["same-s", "same-l", "someone/model"])
def test_without_hub_or_cache(name):
    # This is the error of huggingface_hub itself when it is offline, not of the fake.
    message = refused(load, name)
    assert "cannot be fetched from the hub" in message
    assert "--weights DIR" in message
    assert "WEIGHTS=DIR" in message
    assert "WEIGHTS=random" in message


def test_errors_of_the_hub_become_one_line(monkeypatch):
    def deny(*_, **__):
        raise PermissionError("401 Client Error\n\nCannot access gated repo")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", deny)
    assert "(401 Client Error Cannot access gated repo); " in refused(load, "same-l")


@pytest.mark.parametrize("name", ["same-m", "nowhere", ""])
def test_names_that_are_nothing(hub, name):
    assert f"is no published model ({', '.join(KNOWN_MODELS)})" in refused(load, name)
    assert hub.calls == []


# A name on the hub begins with no dot and holds one slash (`huggingface_hub.utils.validate_repo_id`).
@pytest.mark.parametrize("name", ["./foo", "../foo", "/foo", "~/foo", "a/b/c", ".foo"])
def test_paths_are_not_looked_up_on_the_hub(hub, name):
    for revision in (None, "main"):
        shown = str(Path(name).expanduser()) if name.startswith("~") else name
        assert refused(load, name, "hub", revision) == f"{shown}: there is no such folder; check the path"
    assert hub.calls == []


@pytest.mark.parametrize("name", ["my/model.safetensors", "./my/model.safetensors"])
def test_a_file_in_place_of_its_folder(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / name).touch()
    assert refused(load, name) == f"{name}: is no folder; pass the folder of the checkpoint"
    assert hub.calls == []
    # A published name is no path.
    (tmp_path / "same-s").touch()
    assert "cannot be fetched" in refused(load, "same-s")


def test_known_names_in_any_case(hub, snapshot, checkpoint_of):
    hub.online["stabilityai/SAME-S"] = snapshot
    assert load("SAME-S").name == "same-s"
    assert load("Tiny-S", "random").source == {"kind": "random", "name": "tiny-s", "seed": 0, "version": TRAINED_LIKE}
    assert load("Same-Tiny").name == "same-tiny"
    assert load("SAME-S", str(checkpoint_of("tiny-s"))).name == "same-s"
    # Other names do not change.
    assert load("Mine", str(checkpoint_of("tiny-s"))).name == "Mine"
    assert "no random weights for 'Same-M'" in refused(load, "Same-M", "random")


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv, with which root is refused like others")
def test_files_that_may_not_be_read(folder, file):
    """The message is not that of damaged files, because another download would not help."""
    (folder / file).chmod(0)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    program = [*drop, sys.executable, "-m", "samekit", "export", folder]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    expected = f"Error: {folder / file}: cannot be read (Permission denied); check its permissions\n"
    assert (done.returncode, done.stderr) == (2, expected)
