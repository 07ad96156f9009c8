"""Published configurations: as published, with additions that change nothing, and with values that are refused."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import REMOVED, edit, seeded

from samekit.cli.main import main
from samekit.errors import CheckpointError
from samekit_export.checkpoint import NESTED_PREFIX, load_folder, save_folder
from samekit_export.config import CONFIG_FILE, parse_config
from samekit_export.export import export
from samekit_export.random_weights import published_config, random_checkpoint

FOLDER = Path(__file__).with_name("published")
FILES = ("SAME-S", "small-music", "medium")
# Path of the autoencoder's fields, and the model that they describe.
INNER = {"SAME-S": "model", "small-music": "model.pretransform.config", "medium": "model.pretransform.config"}
KIND = {"SAME-S": "s", "small-music": "s", "medium": "l"}
# Changes that make a published configuration one of the tiny models.
TINY = {
    "*.config.channels": 32,
    "*.config.c_mults": [4],
    "*.config.latent_dim": 32,
    "*.config.transformer_depths": [4],
    "bottleneck.config.dim": 32,
    "latent_dim": 32,
}


def published(file):
    return json.loads((FOLDER / f"{file}.json").read_bytes())


def autoencoder(document, file):
    """Return the part of a configuration that describes the autoencoder."""
    for key in INNER[file].split("."):
        document = document[key]
    return document


def tiny(file):
    """Return a published configuration with the sizes of the tiny model of its kind."""
    document = published(file)
    edit(autoencoder(document, file), TINY)
    if KIND[file] == "l":
        edit(autoencoder(document, file), {"decoder.config.sinusoidal_blocks": [3]})
    return document


def tensors(file):
    """Return the seeded tensors of the tiny model under the names of this nesting, with tensors of other parts."""
    own = seeded(f"tiny-{KIND[file]}").tensors
    if file == "SAME-S":
        return dict(own)
    return {NESTED_PREFIX + key: tensor for key, tensor in own.items()} | {
        "model.model.transformer.layers.0.self_attn.to_qkv.weight": torch.full((3, 3), torch.nan),
        "model.model.transformer.layers.0.rope.inv_freq": torch.ones(3),
        "conditioner.conditioners.seconds_total.embedder.embedding.1.bias": torch.ones(2, dtype=torch.int64),
    }


def assert_loads_as_the_seeded_model(document, file, folder, found=None):
    save_folder(document, tensors(file) if found is None else found, folder)
    loaded, expected = load_folder(folder), seeded(f"tiny-{KIND[file]}")
    assert loaded.config == expected.config
    assert loaded.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[key]) for key, tensor in loaded.tensors.items())


def test_the_standalone_file_is_the_published_one():
    data = (FOLDER / "SAME-S.json").read_bytes()
    assert len(data) == 2040
    assert hashlib.sha256(data).hexdigest() == "c329dd0a6f61d0b3ea4f23930059a6c00437005692fed4310924eb286253303a"


@pytest.mark.parametrize("file", FILES)
def test_read_as_published(file):
    config, nested = parse_config(published(file))
    assert nested == (file != "SAME-S")
    assert config == parse_config(published_config(f"same-{KIND[file]}"))[0]


def test_random_weights_have_the_published_configuration():
    assert published_config("same-s") == published("SAME-S")
    assert published_config("tiny-s") == tiny("SAME-S")
    for name, document in (("same-l", published("medium")), ("tiny-l", tiny("medium"))):
        assert published_config(name)["model"] == autoencoder(document, "medium")


@pytest.mark.parametrize("file", FILES)
def test_loads_as_published(file, tmp_path):
    assert_loads_as_the_seeded_model(tiny(file), file, tmp_path)


# --- Additions that change nothing -------------------------------------------------------------------------

# Fields that the reference reads, all null: its defaults are those of the published models.
# A null window selects chunks.
NULLS = dict.fromkeys(
    (
        "*.config.conformer",
        "*.config.layer_scale",
        "*.config.causal",
        "*.config.differential",
        "*.config.mask_noise",
        "*.config.freeze_backbone",
        "*.config.checkpointing",
        "*.config.feat_scale",
        "*.config.ff_mult",
        "*.config.mapping_bias",
        "*.config.cross_attn",
        "*.config.dyt",
        "encoder.config.sinusoidal_blocks",
        "encoder.config.conv_mapping",
        "pretransform.config.oversampling",
        "pretransform.config.postfilter_channels",
        "bottleneck.config.noise_augment_dim",
        "bottleneck.config.noise_regularize",
        "bottleneck.config.freeze",
        "in_channels",
        "out_channels",
        "decoder.soft_clip",
    )
)
HARMLESS = [
    NULLS,
    {"*.type": "taae_v3", "bottleneck.type": "vae", "pretransform.type": "pqmf"},
    {"*.type": REMOVED, "bottleneck.type": REMOVED, "pretransform.type": REMOVED},
    {"pretransform.config.oversampling": 1, "pretransform.config.postfilter_channels": 0},
    {"sample_rate": 48_000},
    {"in_channels": 2, "out_channels": 2},
    {"*.config.layer_scale": False, "*.config.conformer": False, "*.config.feat_scale": False},
    {"*.config.cross_attn": False, "*.config.mapping_bias": True, "*.config.ff_mult": 3},
    # The reference reads it and uses False instead.
    {"*.config.causal": True},
    {"*.config.use_flash": False, "*.config.use_snake": True, "*.config.mapping_style": "film"},
    {"*.config.conv_bias": True, "*.config.use_dilated_conv": True, "*.config.enable_inner_layer_dropout": True},
    {"*.config.norm_type": "rms_norm", "*.config.rms_norm": True, "*.config.gizmo": {"on": [1, {"a": "b"}]}},
    {"*.config.checkpointing": True, "*.config.mask_noise": 0.5, "*.config.freeze_backbone": True},
    {"*.requires_grad": True, "*.gizmo": 1, "pretransform.enable_grad": True, "pretransform.gizmo": [1]},
    {"bottleneck.config.noise_regularize": False, "bottleneck.config.freeze": False, "bottleneck.config.momentum": 0.9},
    # It is read only beside the decoder's `config`.
    {"encoder.soft_clip": True, "*.config.soft_clip": True, "soft_clip": True},
    {"decoder.soft_clip": False, "encoder.config.sinusoidal_blocks": 0},
    {"loss_configs": {"spectral": {"weight": 1.0}}, "": 0, "gizmo": "on"},
]


@pytest.mark.parametrize("changes", HARMLESS, ids=lambda changes: str(changes)[:60])
@pytest.mark.parametrize("file", FILES)
def test_additions_that_change_nothing(file, changes, tmp_path):
    document = tiny(file)
    edit(autoencoder(document, file), changes)
    assert_loads_as_the_seeded_model(document, file, tmp_path)


# Fields outside of the autoencoder, and the files that can hold them.
@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"use_ema": True, "conformer": True}, "sample_size": 1, "model_type": "gizmo"},
        {"model_type": REMOVED, "sample_size": REMOVED, "audio_channels": REMOVED},
        {"audio_channels": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("file", FILES)
def test_additions_outside_of_the_autoencoder(file, changes, tmp_path):
    assert_loads_as_the_seeded_model(edit(tiny(file), changes), file, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.pretransform.scale": 1.0},
        {"model.pretransform.scale": None},
        {"model.pretransform.model_half": True, "model.pretransform.enable_grad": True},
        {"model.pretransform.type": REMOVED, "model.pretransform.chunked": REMOVED},
        {"model.diffusion": {"type": "dit", "config": {"conformer": True}}, "model.conditioning": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("file", ["small-music", "medium"])
def test_additions_beside_the_autoencoder(file, changes, tmp_path):
    assert_loads_as_the_seeded_model(edit(tiny(file), changes), file, tmp_path)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        *[(file, {"*.config.sliding_window": None}) for file in ("SAME-S", "small-music")],
        *[(file, {"decoder.config.sinusoidal_blocks": blocks}) for file in FILES[:2] for blocks in (None, REMOVED, 0)],
        ("SAME-S", {"decoder.config.sinusoidal_blocks": [0, 0, 0, 0]}),
        # The reference reads it only if there is no window.
        ("medium", {"*.config.chunk_size": 33, "*.config.chunk_midpoint_shift": True}),
        ("medium", {"*.config.chunk_size": None, "decoder.config.conv_mapping": None}),
    ],
    ids=str,
)
def test_additions_of_one_kind(file, changes, tmp_path):
    document = tiny(file)
    edit(autoencoder(document, file), changes)
    assert_loads_as_the_seeded_model(document, file, tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_the_other_nesting(file, tmp_path):
    """The standalone fields work in a full checkpoint, and the fields of a full checkpoint in a standalone one."""
    inner = autoencoder(tiny(file), file)
    if file == "SAME-S":
        document = edit(tiny("small-music"), {"model.pretransform.config": inner})
        assert_loads_as_the_seeded_model(document, file, tmp_path, tensors("small-music"))
    else:
        document = edit(tiny("SAME-S"), {"model": inner})
        assert_loads_as_the_seeded_model(document, file, tmp_path, dict(seeded(f"tiny-{KIND[file]}").tensors))


def test_fields_that_are_not_read_are_logged(caplog):
    document = tiny("small-music")
    edit(autoencoder(document, "small-music"), {"encoder.config.gizmo": "on", "bottleneck.config.momentum": 0.9})
    with caplog.at_level(logging.INFO, "samekit_export"):
        parse_config(document, "some/model_config.json")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    message = record.getMessage()
    assert message.startswith("some/model_config.json: ")
    inner = "config.model.pretransform.config"
    for field in ("encoder.type", "encoder.config.gizmo", "encoder.config.mapping_style", "bottleneck.config.momentum"):
        assert f"{inner}.{field}" in message
    # Fields that are read are not listed, and the message is one line.
    assert f"{inner}.encoder.config.dyt" not in message
    assert "\n" not in message


# --- Defaults of the reference -----------------------------------------------------------------------------


def test_default_chunk_is_128_patches():
    """The default chunk is 8 latents at the published stride, not shifted."""
    document = tiny("SAME-S")
    for absent in (REMOVED, None):
        changed = edit(copy.deepcopy(document), {"model.encoder.config.chunk_size": absent})
        changed = edit(changed, {"model.encoder.config.chunk_midpoint_shift": absent})
        config, _ = parse_config(changed)
        assert (config.encoder.span.latents, config.encoder.span.shifted) == (8, False)
        assert (config.decoder.span.latents, config.decoder.span.shifted) == (2, True)


def test_default_sizes():
    """The defaults are those of the reference: `channels` 128, heads of 128, latents of 32."""
    sizes = ("channels", "dim_heads", "latent_dim", "ff_mult")
    document = edit(
        tiny("SAME-S"),
        {
            f"model.{direction}.config.{size}": REMOVED
            for direction in ("encoder", "decoder")
            for size in sizes
            if size in ("channels", "dim_heads", "latent_dim")
        },
    )
    config, _ = parse_config(document)
    for trunk in (config.encoder, config.decoder):
        assert (trunk.width, trunk.head_width, trunk.ff_mult) == (4 * 128, 128, 3)
    assert config.latent_width == 32


# --- Refusals ----------------------------------------------------------------------------------------------

# Fields that the reference reads, and values that change what it computes. A default that is not implemented is
# refused where the field is missing.
REFUSED = [
    *[(f"*.config.{switch}", True) for switch in ("conformer", "layer_scale", "feat_scale", "cross_attn")],
    *[(f"*.config.{switch}", False) for switch in ("differential", "dyt", "mapping_bias", "variable_stride")],
    *[("*.config.variable_stride", absent) for absent in (None, REMOVED)],
    ("encoder.config.conv_mapping", True),
    *[("pretransform.config.oversampling", value) for value in (2, 0, "1")],
    ("pretransform.config.postfilter_channels", 32),
    ("pretransform.config.channels", 1),
    ("bottleneck.config.noise_augment_dim", 4),
    *[("bottleneck.config.auto_scale", value) for value in (False, None, REMOVED)],
    *[("bottleneck.config.dim", value) for value in (64, 0)],
    *[
        (f"*.config.{levels}", value)
        for levels in ("c_mults", "strides", "transformer_depths")
        for value in ([4, 4], [], None, REMOVED)
    ],
    ("*.config.latent_dim", 64),
    ("encoder.config.in_channels", REMOVED),
    ("decoder.config.out_channels", None),
    ("in_channels", 1),
    ("out_channels", 4),
    ("downsampling_ratio", 2048),
    ("decoder.config.sinusoidal_blocks", [1, 2]),
    ("decoder.config.sinusoidal_blocks", [True]),
    ("encoder.config.sliding_window", [1, 2]),
    ("encoder.config.sliding_window", []),
]


@pytest.mark.parametrize(("path", "value"), REFUSED, ids=lambda part: str(part).removeprefix("sentinel."))
@pytest.mark.parametrize("file", FILES)
def test_values_that_are_not_implemented(file, path, value):
    document = tiny(file)
    edit(autoencoder(document, file), {path.replace("*", "encoder"): 1 if value is REMOVED else value})
    edit(autoencoder(document, file), {path.replace("*", "encoder"): value})
    with pytest.raises(CheckpointError) as caught:
        parse_config(document)
    message = str(caught.value)
    field = f"config.{INNER[file]}.{path.replace('*', 'encoder')} "
    assert message.startswith(f"{CONFIG_FILE}: {field}"), message
    assert "not implemented" in message or "are implemented" in message
    assert message.endswith("; pass the checkpoint of SAME-S or SAME-L as it was published")


def test_what_is_absent_and_not_implemented_is_told_with_its_default():
    document = edit(tiny("SAME-S"), {"model.decoder.config.variable_stride": REMOVED})
    with pytest.raises(
        CheckpointError, match=r"variable_stride = False \(the default\) is not implemented \(only True"
    ):
        parse_config(document)


@pytest.mark.parametrize("field", ["latent_dim", "downsampling_ratio", "io_channels", "pretransform.config.patch_size"])
@pytest.mark.parametrize("absent", [None, REMOVED], ids=["null", "absent"])
def test_fields_without_a_default(field, absent):
    document = tiny("small-music")
    edit(autoencoder(document, "small-music"), {field: absent})
    with pytest.raises(CheckpointError, match=rf"{field} is missing; download the checkpoint again"):
        parse_config(document)


# --- Keys of tensors ---------------------------------------------------------------------------------------

# If the model lacks a key, the reference tries it without one of its path components, except for the first one
# (`remap_state_dict_keys` in stable_audio_3/loading_utils.py of Stability-AI/stable-audio-3).


def renamed(found, old, new):
    """Return tensors whose keys have the first `old`, at the start or after a dot, replaced by `new`."""
    return {key.replace(old, new, 1) if key.startswith(old) or f".{old}" in key else key: t for key, t in found.items()}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("SAME-S", "encoder.layers", "encoder.model.layers"),
        ("SAME-S", "transformers.", "transformers.blocks."),
        ("SAME-S", "bottleneck.", "bottleneck.soft."),
        ("small-music", "pretransform.model.", "pretransform.model.model."),
        ("small-music", "pretransform.model.", "pretransform.autoencoder.model."),
        ("medium", "pretransform.model.decoder.layers.3.", "pretransform.model.decoder.module.layers.3."),
        ("medium", "running_std", "running_std.data"),
    ],
)
def test_a_component_too_many_is_left_out(file, old, new, tmp_path):
    found = renamed(tensors(file), old, new)
    assert found.keys() != tensors(file).keys()
    assert_loads_as_the_seeded_model(tiny(file), file, tmp_path, found)


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        # The first component is never left out, and two are not.
        ("SAME-S", "encoder.", "model.encoder.", "tensor encoder.layers.0.mapping.weight_v [128, 512, 1] is missing"),
        ("SAME-S", "decoder.", "decoder.a.b.", "tensor decoder.layers.1.weight [128, 32] is missing"),
        ("small-music", "pretransform.model.", "a.pretransform.model.", "tensor encoder.layers.0.mapping.weight_v"),
        ("medium", "pretransform.model.", "pretransform.a.b.model.", "tensor encoder.layers.0.mapping.weight_v"),
    ],
)
def test_other_keys_are_not_guessed(file, old, new, named, tmp_path):
    save_folder(tiny(file), renamed(tensors(file), old, new), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_folder(tmp_path)
    assert named in str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_a_second_copy_of_a_tensor_is_not_chosen_at_random(file, tmp_path):
    found = tensors(file)
    prefix = "" if file == "SAME-S" else NESTED_PREFIX
    bias = f"{prefix}encoder.layers.2.bias"
    # If the exact key is there, the other one is an unexpected tensor.
    save_folder(tiny(file), found | {f"{prefix}encoder.ema.layers.2.bias": torch.ones(32)}, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"tensor encoder\.ema\.layers\.2\.bias is not part of a SAME autoencoder"
    ):
        load_folder(tmp_path)
    # If it is missing, two other keys can both match it.
    copies = {f"{prefix}encoder.{copy}.layers.2.bias": found[bias].clone() for copy in ("a", "b")}
    save_folder(tiny(file), {key: tensor for key, tensor in found.items() if key != bias} | copies, tmp_path)
    with pytest.raises(CheckpointError, match=r"encoder\.a\.layers\.2\.bias and .*encoder\.b\.layers\.2\.bias"):
        load_folder(tmp_path)


def test_copies_outside_of_the_autoencoder_are_other_parts(tmp_path):
    """A full checkpoint may contain averaged weights with the same names under another prefix."""
    found = tensors("small-music")
    copies = {key.replace("pretransform.", "pretransform.ema."): t + 1 for key, t in found.items() if "pretr" in key}
    assert_loads_as_the_seeded_model(tiny("small-music"), "small-music", tmp_path, found | copies)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_the_tensors_of_the_autoencoder_are_strict(file, change, tmp_path):
    found = tensors(file)
    prefix = "" if file == "SAME-S" else NESTED_PREFIX
    key = "decoder.layers.3.transformers.2.ff_norm.gamma"
    if change == "missing":
        del found[prefix + key]
    elif change == "extra":
        key = "decoder.layers.3.transformers.9.ff_norm.gamma"
        found[prefix + key] = torch.ones(128)
    else:
        found[prefix + key] = torch.ones(127)
    save_folder(tiny(file), found, tmp_path)
    with pytest.raises(CheckpointError, match=rf"tensor {key} "):
        load_folder(tmp_path)


def test_a_key_of_a_million_components(tmp_path):
    found = tensors("SAME-S") | {"encoder" + ".a" * 1_000_000: torch.ones(1)}
    save_folder(tiny("SAME-S"), found, tmp_path)
    with pytest.raises(CheckpointError, match="is not part of a SAME autoencoder") as caught:
        load_folder(tmp_path)
    assert len(str(caught.value)) < 1000


BIG = 6 * 2**30


def test_other_parts_of_a_full_checkpoint_are_not_read(tmp_path):
    """A sparse file of 6 GiB is read in a process that may use at most 3 GiB of memory."""
    save_folder(tiny("small-music"), tensors("small-music"), tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    end = len(data) - 8 - size
    header["model.model.transformer.weight"] = {"dtype": "F32", "shape": [BIG // 4], "data_offsets": [end, end + BIG]}
    text = json.dumps(header).encode()
    with weights.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data[8 + size :])
        file.truncate(8 + len(text) + end + BIG)
    program = (
        "import resource, sys; from samekit_export.checkpoint import load_folder; load_folder(sys.argv[1]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * 2**30


# --- Full size ---------------------------------------------------------------------------------------------

# Tensors, and values in them, of the published files of SAME-S and SAME-L.
COUNTS = {"s": (244, 108_244_721), "l": (472, 852_127_457)}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_full_size(file, tmp_path):
    """Seeded weights under the published configuration load, export and verify; `medium` takes 11 GB of memory."""
    name = f"same-{KIND[file]}"
    checkpoint, prefix = random_checkpoint(name), "" if file == "SAME-S" else NESTED_PREFIX
    found = {prefix + key: tensor for key, tensor in checkpoint.tensors.items()}
    assert (len(found), sum(tensor.numel() for tensor in found.values())) == COUNTS[KIND[file]]
    save_folder(published(file), found, tmp_path / "model")
    if file == "SAME-S":
        shutil.copyfile(FOLDER / "SAME-S.json", tmp_path / "model" / CONFIG_FILE)
    digest = checkpoint.sha256
    del checkpoint, found
    loaded = load_folder(tmp_path / "model", name)
    assert loaded.sha256 == digest
    engine = export(loaded, tmp_path / "engines")
    assert min(case["snr_db"] for case in engine.spec.verification["fp32"]) >= 90
    del loaded
    done = CliRunner().invoke(main, ["verify", str(engine.folder)])
    assert done.exit_code == 0, done.output
    assert "every graph computes what eager PyTorch does" in done.stdout
