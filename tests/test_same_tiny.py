"""The bundled model: it is found by name, as accurate as its card says, and the same at every precision."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import subprocess

import numpy as np
import pytest
import synthesis
import train_tiny
from helpers import assert_close, assert_one_line, in_one_pass, needs_bf16
from tiny_recipes import RECIPES

from samekit import AutoencoderModel
from samekit.audio import read_audio
from samekit.engine.spec import PRECISIONS
from samekit.errors import CheckpointError
from samekit_export.checkpoint import BUNDLED_FOLDERS, load, load_folder, load_source
from samekit_export.export import export
from samekit_export.model import Same
from samekit_export.verify import snr_db

NAME = "same-tiny"
# Training uses even streams of its seed; stream 1 is for tests.
UNHEARD = 3
MUSIC_PACKAGE = "extremetuxracer-data"


@functools.cache
def unheard(count=8, length=3.0):
    """Return synthesized clips that training has not used, `[count, 2, samples]`, whole latents."""
    clips = np.stack([train_tiny.make_clip((0, UNHEARD, i), length) for i in range(count)])
    return clips[..., : clips.shape[-1] // 384 * 384].astype(np.float32) / 32767


@pytest.fixture(scope="module")
def eager():
    return Same.from_checkpoint(load(NAME))


@pytest.fixture(scope="module")
def folder(bundled_engine, tmp_path_factory):
    """Return an engine folder with every precision."""
    folder = tmp_path_factory.mktemp("engines")
    shutil.copytree(bundled_engine.folder, folder / NAME)
    return export(load(NAME), folder, PRECISIONS).folder


def round_trip(model, audio):
    return in_one_pass(lambda x: model.decode(model.encode(x)), audio)


def test_it_is_found_by_name():
    loaded = load(NAME)
    assert loaded.name == NAME
    assert (loaded.config.hop, loaded.config.latent_width) == (384, 64)
    assert load_source(loaded.source).sha256 == loaded.sha256 == load_folder(BUNDLED_FOLDERS[NAME]).sha256
    with AutoencoderModel.from_pretrained(NAME, backend="torch", threads=1) as model:
        assert model.encode(np.zeros((2, 1000), np.float32), 44_100).shape == (1, 64, 3)


def test_it_is_small():
    files = {path.name: path.stat().st_size for path in BUNDLED_FOLDERS[NAME].iterdir()}
    assert {"README.md", "model_config.json", "model.safetensors"} <= set(files)
    assert sum(files.values()) <= 8_000_000


@pytest.mark.parametrize("source", [{"kind": "bundled", "name": "same-huge"}, {"kind": "bundled"}], ids=str)
def test_others_do_not_come_with_samekit(source):
    with pytest.raises(CheckpointError) as caught:
        load_source(source)
    assert_one_line(caught.value)


def snrs_of_round_trips(model, clips):
    return [snr_db(clip, round_trip(model, clip[None])[0]) for clip in clips]


def test_round_trip_of_a_few_synthesised_clips(eager):
    snrs = snrs_of_round_trips(eager, unheard())
    assert np.mean(snrs) >= 13
    # No codec can predict noise.
    assert min(snrs) >= 4


@pytest.mark.slow
def test_round_trip_of_synthesised_audio(eager):
    snrs = snrs_of_round_trips(eager, unheard(48, 4.0))
    print({"mean": np.mean(snrs), "median": np.median(snrs)})
    assert np.mean(snrs) >= 15
    assert np.median(snrs) >= 15


def test_both_channels_and_the_loudness_come_back(eager):
    back = round_trip(eager, unheard())
    level = np.sqrt((unheard() ** 2).mean(axis=2)), np.sqrt((back**2).mean(axis=2))
    assert np.abs(20 * np.log10(level[1] / level[0])).max() < 2


def test_latents_are_of_unit_size(eager):
    latents = in_one_pass(eager.encode, unheard())
    assert 0.6 < latents.std() < 1.6
    assert latents.std(axis=(0, 2)).min() > 0.3
    assert np.abs(latents.mean(axis=(0, 2))).max() < 0.3


def assert_agrees_on_music(folder, eager, precision, least):
    """Compare a precision of an engine folder with eager PyTorch: its SNR in dB, and what the round trip loses."""
    with AutoencoderModel.from_pretrained(folder, "cpu", precision=precision, threads=1) as model:
        latents = model.encode(unheard(), 44_100)
        audio = model.decode(latents)
    assert_close(in_one_pass(eager.encode, unheard()), latents, least)
    assert_close(round_trip(eager, unheard()), audio, least)
    # The error of a precision must be small against the error of the model.
    lost = snr_db(unheard(), round_trip(eager, unheard())) - snr_db(unheard(), audio)
    assert lost < {"bf16": 0.05, "int8": 0.5}.get(precision, 0.02)


@pytest.mark.parametrize("precision", [*PRECISIONS, pytest.param("bf16", marks=needs_bf16)])
def test_precisions_agree_on_music(folder, eager, precision):
    assert_agrees_on_music(folder, eager, precision, {"fp32": 100, "fp16": 50, "bf16": 36, "int8": 25}[precision])


@pytest.fixture(scope="session")
def music(tmp_path_factory):
    """Return game music from a Debian package by track: 20 s of each that is long enough."""
    folder = tmp_path_factory.mktemp("music")
    if not shutil.which("apt-get"):
        pytest.skip("no apt-get: the music is in a Debian package")
    fetched = subprocess.run(
        ["apt-get", "download", MUSIC_PACKAGE], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    if fetched.returncode:
        pytest.skip(f"{MUSIC_PACKAGE} cannot be downloaded: {fetched.stderr.strip().splitlines()[-1]}")
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", package, folder], check=True, timeout=300)
    tracks = {}
    for path in sorted(folder.glob("usr/share/games/etr/music/*.ogg")):
        audio, rate = read_audio(path)
        if audio.shape[1] >= 30 * rate:
            tracks[path.stem] = audio[:, 10 * rate : 30 * rate], rate
    return tracks


@pytest.mark.slow
def test_round_trip_of_music_never_heard(folder, music):
    assert len(music) >= 4
    with AutoencoderModel.from_pretrained(folder, "cpu", threads=1) as model:
        snrs = {}
        for track, (audio, rate) in music.items():
            ready = model.autoencoder.preprocess_audio_for_encoder(audio, rate)
            snrs[track] = snr_db(ready, model.autoencoder.decode_audio(model.autoencoder.encode_audio(ready)))
    print({track: round(snr, 1) for track, snr in snrs.items()})
    assert min(snrs.values()) >= 10


# --- Training ----------------------------------------------------------------------------------------------


def test_clips_are_a_function_of_their_seed():
    one, again, other = (train_tiny.make_clip((0, 5, i), 1.0) for i in (3, 3, 4))
    assert one.shape == (2, 44_100)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_clips_are_stereo_of_varied_loudness():
    random = np.random.default_rng(0)
    clips = [synthesis.clip(random, 1.0, music=music) for music in (True, True, True, False, False, False)]
    levels = [20 * np.log10(clip.std()) for clip in clips]
    assert max(levels) - min(levels) > 6
    assert all(np.abs(clip).max() <= 1 for clip in clips)
    assert any(np.abs(clip[:, 0] - clip[:, 1]).max() > 0.01 for clip in clips)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_training_can_be_interrupted(monkeypatch, tmp_path, name):
    short = {"steps": 4, "pool_clips": 4, "pool_seconds": 2.0, "pool_steps": 2, "batch": 2, "every": 2}
    recipe = dataclasses.replace(RECIPES[name], **short, held_out_clips=2, held_out_seconds=1.0)
    train_tiny.train(recipe, tmp_path / "whole", threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(train_tiny, "make_batch", stop_at(3, train_tiny.make_batch))
        with pytest.raises(KeyboardInterrupt):
            train_tiny.train(recipe, tmp_path / "halves", threads=1)
    train_tiny.train(recipe, tmp_path / "halves", threads=1)
    assert load_folder(tmp_path / "halves").sha256 == load_folder(tmp_path / "whole").sha256


def stop_at(step, make_batch):
    """Return a `make_batch` that is interrupted."""

    def interrupted(pool, batch, samples, number):
        if number == step:
            raise KeyboardInterrupt
        return make_batch(pool, batch, samples, number)

    return interrupted
