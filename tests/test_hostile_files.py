"""Any bytes in place of a file: an error with a name or a result, never a traceback, a crash, a hang, or gigabytes."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections import Counter

import hostile
import pytest
import soundfile as sf
from helpers import HALVES, RATE, FakeBackend, edit, noise, variant
from small import SMALL, write_engine

from samekit import AutoencoderModel, errors
from samekit.dataset import PreEncodeOptions, pre_encode
from samekit.latents import LatentsWriter
from samekit_export.checkpoint import published_config, save_folder
from samekit_export.diffusers_format import CLASS_NAME

# suffix -> format and subtype of soundfile.
_AUDIO = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".aiff": ("AIFF", "PCM_24"),
    ".rf64.wav": ("RF64", "FLOAT"),
    ".w64.wav": ("W64", "PCM_32"),
    ".caf.wav": ("CAF", "ALAC_16"),
    ".au.wav": ("AU", "ULAW"),
    ".adpcm.wav": ("WAV", "MS_ADPCM"),
}


# --- Valid files --------------------------------------------------------------------------------------------


def diffusers_document():
    """A configuration of the other format."""
    return {
        "_class_name": CLASS_NAME,
        "audio_channels": 2,
        "patch_size": 8,
        "sampling_rate": RATE,
        "latent_dim": 4,
        "use_differential_attention": True,
        "dim_heads": 64,
        "ff_mult": 1,
        "sliding_window": 1,
        **{
            f"{half}_{name}": value
            for half in HALVES
            for name, value in {
                "channels": 64,
                "c_mults": [1],
                "strides": [2],
                "transformer_depths": [2],
                "sinusoidal_blocks": [0],
            }.items()
        },
    }


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A folder of valid files, as `hostile.Opener` wants it."""
    folder = tmp_path_factory.mktemp("valid")
    model = AutoencoderModel(FakeBackend())
    (folder / "audio").mkdir()
    for suffix, (container, subtype) in _AUDIO.items():
        rate = 48_000 if subtype == "OPUS" else RATE
        sf.write(folder / "audio" / f"song{suffix}", noise((3000, 2), level=0.1), rate, subtype, format=container)
    (folder / "clip").mkdir()
    shutil.copyfile(folder / "audio" / "song.wav", folder / "clip" / "clip.wav")
    (folder / "clip" / "clip.txt").write_text("a caption, größer", encoding="utf-8")
    pre_encode(model, folder / "clip", folder / "dataset", PreEncodeOptions())
    (folder / "latents").mkdir()
    with LatentsWriter(folder / "latents" / "latents.npy", 4) as writer:
        writer.write(noise((4, 5)))
        writer.metadata = {"model": "fake", "model_sha256": "0", "samples": 39, "latents": 5, "source": "a.wav"}
    write_engine(folder / "engine")
    checkpoint = variant("tiny-s", SMALL)
    document = edit(published_config("tiny-s"), {f"model.{path}": value for path, value in SMALL.items()})
    save_folder(document, checkpoint.tensors, folder / "checkpoint")
    (folder / "diffusers").mkdir()
    (folder / "diffusers" / "config.json").write_text(json.dumps(diffusers_document()))
    (folder / "diffusers" / "diffusion_pytorch_model.safetensors").write_bytes(
        (folder / "checkpoint" / "model.safetensors").read_bytes()
    )
    return folder


# format -> valid file, how it is damaged, part of all inputs.
FORMATS = {
    **{f"audio {suffix}": (f"audio/song{suffix}", hostile.mutated_bytes, 2) for suffix in _AUDIO},
    "caption": ("clip/clip.txt", hostile.mutated_bytes, 1),
    "npy": ("latents/latents.npy", hostile.mutated_npy, 3),
    "latents_json": ("dataset/000000000000.json", hostile.mutated_json, 3),
    "manifest": ("dataset/.samekit/manifest.jsonl", hostile.mutated_lines, 4),
    "spec": ("engine/spec.json", hostile.mutated_json, 4),
    "onnx": ("engine/decoder.onnx", hostile.mutated_bytes, 4),
    "build": (None, hostile.mutated_json, 4),
    "config": ("checkpoint/model_config.json", hostile.mutated_json, 4),
    "diffusers_config": ("diffusers/config.json", hostile.mutated_json, 4),
    "safetensors": ("checkpoint/model.safetensors", hostile.mutated_safetensors, 4),
}


@pytest.fixture(scope="module")
def child(valid, tmp_path_factory):
    """The process that opens files."""
    process = hostile.Child(valid, tmp_path_factory.mktemp("work"))
    yield process
    process.close()


def valid_file(valid, name):
    """The path of a format's valid file."""
    if name == "build":
        (path,) = (valid / "engine" / "tensorrt").glob("*/fingerprint.json")
        return path
    return valid / FORMATS[name][0]


@pytest.mark.parametrize("name", FORMATS)
def test_valid_files_are_accepted(child, valid, name):
    """Otherwise damage would prove nothing."""
    expected = hostile.ACCEPTED if name != "diffusers_config" else "CheckpointError"
    assert child.open(name.split()[0], valid_file(valid, name)) == expected


def attack(child, valid, folder, name, count):
    """Open so many damaged files of a format; what came of them, and what should not have."""
    path, mutate = valid_file(valid, name), FORMATS[name][1]
    contents = path.read_bytes()
    numbers = random.Random(zlib.crc32(name.encode()))  # noqa: S311 no secret
    outcomes, wrong = Counter(), []
    for index in range(count):
        hostile_file = folder / f"{name.split()[0]}-{index}{path.suffix}"
        hostile_file.write_bytes(mutate(numbers, contents))
        outcome = child.open(name.split()[0], hostile_file)
        if outcome in NAMED or outcome == hostile.ACCEPTED:
            outcomes[outcome] += 1
            hostile_file.unlink()
        else:
            wrong.append(f"{hostile_file}: {outcome}")
    return outcomes, wrong


NAMED = {name for name, value in vars(errors).items() if isinstance(value, type)}


def check(child, valid, folder, name, count, record):
    """No file may do anything but be accepted or be refused by name; the counts go to the report (`-rA` shows them)."""
    outcomes, wrong = attack(child, valid, folder, name, count)
    accepted = outcomes.pop(hostile.ACCEPTED, 0)
    record("files", count)
    named = ", ".join(f"{number} {error}" for error, number in outcomes.most_common())
    print(f"{name}: {count} damaged files, {accepted} accepted, {named or 'none refused'}, {len(wrong)} anything else")
    assert not wrong, "\n".join(wrong[:3])


@pytest.mark.parametrize("name", FORMATS)
def test_some_damaged_files(child, valid, tmp_path, name, record_property):
    check(child, valid, tmp_path, name, 8 * FORMATS[name][2], record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_damaged_files(child, valid, tmp_path, name, record_property):
    check(child, valid, tmp_path, name, 200 * FORMATS[name][2], record_property)
