"""A trained model with the attention and the gates of SAME-L: its quality, and the accuracy of every precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import train_tiny
from helpers import in_one_pass, needs_bf16
from test_same_tiny import assert_agrees_on_music, snrs_of_round_trips, unheard
from tiny_recipes import RECIPES

from samekit.engine.spec import PRECISIONS
from samekit_export.checkpoint import load_folder
from samekit_export.config import BandSpan, parse_config
from samekit_export.export import export
from samekit_export.model import Same
from samekit_export.verify import snr_db

NAME = "same-tiny-band"
FOLDER = Path(__file__).parent / NAME


@pytest.fixture(scope="module")
def eager():
    return Same.from_checkpoint(load_folder(FOLDER))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return an engine folder with every precision."""
    return export(load_folder(FOLDER), tmp_path_factory.mktemp("engines"), PRECISIONS).folder


def test_it_is_of_the_kind_of_same_l(eager):
    config, _ = parse_config(RECIPES[NAME].config)
    assert eager.config == config
    assert config.encoder.span == config.decoder.span == BandSpan(1)
    assert [config.decoder.gates_with_sine(block) for block in range(5)] == [False, False, True, True, True]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_round_trip_of_a_few_synthesised_clips(eager):
    snrs = snrs_of_round_trips(eager, unheard())
    assert np.mean(snrs) >= 13
    assert min(snrs) >= 4


def test_latents_tolerate_noise(eager):
    """Noise was added to the latents in training, so the decoder does not amplify it; random weights do."""
    latents = in_one_pass(eager.encode, unheard(2))
    noisy = latents + 1e-3 * latents.std() * np.random.RandomState(0).standard_normal(latents.shape)
    assert snr_db(in_one_pass(eager.decode, latents), in_one_pass(eager.decode, noisy.astype(np.float32))) >= 58


@pytest.mark.parametrize("precision", [*PRECISIONS, pytest.param("bf16", marks=needs_bf16)])
def test_precisions_agree_on_music(folder, eager, precision):
    assert_agrees_on_music(folder, eager, precision, {"fp32": 100, "fp16": 47, "bf16": 33, "int8": 25}[precision])


@pytest.mark.parametrize("trained", ["encoder", "decoder"])
def test_noise_in_training(trained):
    """Noise is added only while gradients are computed, and is the same for the same step."""
    model = Same.from_checkpoint(load_folder(FOLDER))
    noise = train_tiny.Noise(model, RECIPES[NAME].config)
    array = torch.from_numpy(unheard(1)[..., : 384 * 20])
    latents = model.encode(array)
    run = model.encode if trained == "encoder" else model.decode
    given = array if trained == "encoder" else latents
    with torch.no_grad():
        clean = run(given)
    outputs = []
    for step in (25, 100, 100, 0):
        noise.start_step(step, 100)
        outputs.append(run(given))
    assert torch.equal(outputs[1], outputs[2])
    assert torch.equal(outputs[3], clean)
    half, whole = (snr_db(clean.numpy(), output.detach().numpy()) for output in outputs[:2])
    # Half of the noise, at a quarter of the steps.
    assert 3 < half - whole < 9
