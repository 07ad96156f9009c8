"""The loudness of latents, phase flips, and clips that are cut.

The rule of the loudness is that of `encode_with_per_track_norm` in services/sa3/dataset_processing/pre_encode.py of
betweentwomidnights/gary-localhost-installer at commit 6081cab, and of `train_pre_encode_file` in train_latents.h of
sa3.cpp: encode, measure the RMS of the latents without padding, multiply the gain by target / RMS, and encode again,
until the RMS is within 3 % of the target, at most four times. The gain is applied to samples that were clipped before.

The rule of phase flips is that of `PhaseFlipper` in stable_audio_3/data/utils.py: half of the clips are negated.
"""

from __future__ import annotations

import math
import shutil
import threading

import numpy as np
import pytest
import soundfile as sf
from faults import contents
from helpers import KINDS, RATE, assert_one_line
from test_dataset import (
    FAKE_HOP,
    command,
    fake_model,
    first_samples,
    one_pass,
    pair,
    prepared,
    run,
    write_clip,
)

from samekit.dataset.check import verify
from samekit.dataset.loudness import Loudness, latent_rms
from samekit.dataset.options import PreEncodeOptions
from samekit.errors import BackendError, InputError, OutputError


def compressed(direction, array):
    """Return latents that grow more slowly than the audio, as those of the models."""
    return np.tanh(2 * first_samples(direction, array)).astype(np.float32)


def rms(latents):
    return math.sqrt(np.square(latents.astype(np.float64)).mean())


def by_definition(audio, target):
    """Return latents and gain according to the rule, computed on a whole clip of the model `compressed`."""
    gain = 1.0
    for correction in range(5):
        scaled = (np.float32(gain) * audio)[None]
        missing = -scaled.shape[-1] % FAKE_HOP
        latents = compressed("encoder", np.pad(scaled, ((0, 0), (0, 0), (0, missing))))[0]
        measured = max(rms(latents), 1e-6)
        if abs(measured - target) / target <= 0.03 or correction == 4:
            return latents, gain, measured
        gain *= target / measured
    raise AssertionError


# --- Loudness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("pad", [False, True])
def test_loudness_is_corrected_by_the_rule(data, out, batch_size, pad):
    lengths = [90, 1500, 3000, 5000]
    for index in range(12):
        write_clip(data / f"{index:02d}.wav", lengths[index % 4], seed=index, level=0.01 * 2 ** (index / 1.5))
    run(data, out, fake_model(compressed), target_latent_rms=0.5, batch_size=batch_size, pad=pad, sample_size=8000)
    gains = set()
    for index in range(12):
        latents, info = pair(out, index)
        expected, gain, measured = by_definition(prepared(data / f"{index:02d}.wav"), 0.5)
        kept = sum(info["padding_mask"])
        assert kept == expected.shape[1]
        np.testing.assert_allclose(latents[:, :kept], expected, rtol=1e-5, atol=1e-6)
        assert info["audio_gain_applied"] == pytest.approx(gain, rel=1e-5)
        assert info["latent_rms_achieved"] == pytest.approx(measured, rel=1e-5)
        gains.add(gain)
        if pad:
            np.testing.assert_array_equal(latents[:, kept + 64 :], 0)
    assert min(gains) < 1 < max(gains)
    assert verify(out) == []


def test_loudness_of_a_model(model_of, data, out):
    model = model_of(KINDS[0], "onnxruntime")
    write_clip(data / "a.wav", 3 * RATE, level=0.02)
    run(data, out, model)
    target = 1.4 * rms(pair(out, 0)[0])
    run(data, out, model, target_latent_rms=target, reencode=True)
    latents, info = pair(out, 0)
    assert rms(latents) == pytest.approx(info["latent_rms_achieved"], rel=1e-6)
    gain = info["audio_gain_applied"]
    assert gain != 1
    expected = one_pass(model, np.float32(gain) * prepared(data / "a.wav"), latents.shape[1] + 64)[
        :, : latents.shape[1]
    ]
    np.testing.assert_allclose(latents, expected, atol=1e-3)
    assert verify(out) == []


def test_samples_are_clipped_before_they_are_scaled(data, out):
    data.mkdir()
    sf.write(data / "loud.wav", np.full((8000, 2), 1.7), RATE, subtype="FLOAT")
    (data / "loud.txt").write_text("loud")
    run(data, out, target_latent_rms=2)
    latents, info = pair(out, 0)
    assert (latents.max(), info["audio_gain_applied"]) == (2.0, 2.0)


def test_a_clip_is_corrected_at_most_four_times(data, out):
    """The latents of this model do not depend on the audio."""
    calls = []

    def constant(direction, array):
        calls.append(len(array))
        return np.full_like(first_samples(direction, array), 0.25)

    write_clip(data / "a.wav", 200)
    run(data, out, fake_model(constant), target_latent_rms=0.5)
    # The first call is the silence.
    assert len(calls) == 1 + 5
    info = pair(out, 0)[1]
    assert (info["audio_gain_applied"], info["latent_rms_achieved"]) == (16.0, 0.25)


def test_without_the_option_nothing_is_recorded(data, out):
    write_clip(data / "a.wav", 200)
    run(data, out)
    assert pair(out, 0)[1].keys().isdisjoint({"audio_gain_applied", "latent_rms_achieved", "phase_flipped"})


def test_bad_clips_among_corrected_ones(data, out):
    for index in range(8):
        write_clip(data / f"{index}.wav", 200 + index, seed=index)
    write_clip(data / "silent.wav", 200, level=1e-6)
    (data / "broken.wav").write_bytes(b"no audio")
    (data / "broken.txt").write_text("words")
    options = {"target_latent_rms": 0.5, "batch_size": 3}
    report = run(data, out, fake_model(compressed), **options)
    assert report.statuses == {"encoded": 8, "silent": 1, "unreadable": 1}
    assert verify(out) == []
    assert run(data, out, fake_model(compressed), **options).encoded == 0


def test_gain_that_overflows_the_model_fails_the_clip_alone(data, out):
    def answer(direction, array):
        latents = compressed(direction, array)
        # Clip "b" is the only one with three latents; its latents stay so small that the gain becomes infinite.
        return latents * np.float32(0) if array.shape[-1] == 4 * FAKE_HOP else latents

    write_clip(data / "a.wav", 500)
    write_clip(data / "b.wav", 3 * FAKE_HOP)
    report = run(data, out, fake_model(answer), target_latent_rms=900.0)
    assert report.clips == 2
    assert verify(out) == []


@pytest.mark.parametrize("readers", [1, 3])
def test_error_of_the_encoder_ends_a_run_with_corrections(data, out, readers):
    for index in range(6):
        write_clip(data / f"{index}.wav", 500 + index, seed=index)
    calls = []

    def answer(direction, array):
        calls.append(1)
        if len(calls) == 9:
            raise BackendError("the device is gone")
        return compressed(direction, array)

    before = threading.active_count()
    with pytest.raises(BackendError, match="the device is gone"):
        run(data, out, fake_model(answer), target_latent_rms=0.5, readers=readers)
    assert threading.active_count() == before
    whole = out.with_name("whole")
    for folder in (out, whole):
        run(data, folder, fake_model(compressed), target_latent_rms=0.5, readers=readers)
    assert {name: data for name, data in contents(out).items() if "manifest" not in str(name)} == {
        name: data for name, data in contents(whole).items() if "manifest" not in str(name)
    }


def test_error_of_the_disk_ends_a_run_with_corrections(data, out):
    for index in range(6):
        write_clip(data / f"{index}.wav", 500 + index, seed=index)

    def answer(direction, array):
        (out / "000000000002.npy").mkdir(exist_ok=True)
        return compressed(direction, array)

    with pytest.raises(OutputError, match="is not a regular file"):
        run(data, out, fake_model(answer), target_latent_rms=0.5, readers=1)


@pytest.mark.parametrize("value", [0, -1, 1e-320, 1e-30, math.nan, math.inf, "0.9", True, 10**6])
def test_targets_that_do_not_work(value):
    cure = r"pass a number from 0\.001 to 1000, such as 0\.9"
    with pytest.raises(InputError, match=rf"target_latent_rms is .*; {cure}") as error:
        PreEncodeOptions(target_latent_rms=value)
    assert_one_line(error.value)


def test_verify_compares_the_recorded_loudness(data, out):
    write_clip(data / "a.wav", 500)
    run(data, out, fake_model(compressed), target_latent_rms=0.5)
    path = out / "000000000000.json"
    text = path.read_text()
    achieved = str(pair(out, 0)[1]["latent_rms_achieved"])
    for old, new in ((achieved, "0.7"), ("audio_gain_applied", "other"), ("latent_rms_achieved", "other")):
        path.write_text(text.replace(old, new))
        (problem,) = verify(out)
        assert "its loudness fields are not those of the latents; remove it and run pre-encode again" in problem


def test_rms_of_blocks_leaves_out_the_padding():
    blocks = [np.full((2, 3), 3, np.float32), np.full((2, 2), 4, np.float32), np.full((2, 5), 100, np.float32)]
    assert latent_rms(blocks, 4) == math.sqrt((3 * 9 + 16) / 4)
    assert latent_rms([np.zeros((2, 3), np.float32)], 3) == 1e-6
    assert Loudness(2.0, 1, 0.25).corrected(0.5) == Loudness(4.0, 2)
    assert Loudness(2.0, 1, 0.514).corrected(0.5) is None
    assert Loudness(2.0, 4, 0.25).corrected(0.5) is None


# --- Phase flips ------------------------------------------------------------------------------------------------


def test_flips_depend_on_the_seed_and_the_path_alone(data, out):
    for index in range(64):
        write_clip(data / f"{index:02d}.wav", 100 + index % 5, seed=index)
    plain = out.with_name("plain")
    run(data, plain)
    run(data, out, flip="random", seed=1)
    flips = [pair(out, index)[1]["phase_flipped"] for index in range(64)]
    assert 16 < sum(flips) < 48
    for index, is_flipped in enumerate(flips):
        np.testing.assert_array_equal(pair(out, index)[0], pair(plain, index)[0] * (-1 if is_flipped else 1))
    other = out.with_name("other")
    run(data, other, flip="random", seed=2)
    assert [pair(other, index)[1]["phase_flipped"] for index in range(64)] != flips
    # Another clip changes nothing.
    again = out.with_name("again")
    shutil.copytree(data, data.with_name("fewer"))
    (data.with_name("fewer") / "00.wav").unlink()
    run(data.with_name("fewer"), again, flip="random", seed=1)
    assert [pair(again, index)[1]["phase_flipped"] for index in range(63)] == flips[1:]
    assert verify(out) == []


def test_flips_are_a_setting_of_the_folder(data, out):
    write_clip(data / "a.wav", 100)
    run(data, out)
    # Without anything random, the seed has no effect.
    assert run(data, out, seed=5).unchanged == 1
    with pytest.raises(InputError, match=r"\(seed 0 there, 5 here, flip none there, random here\)"):
        run(data, out, flip="random", seed=5)
    with pytest.raises(InputError, match="flip 'always' is not known; pass none or random"):
        PreEncodeOptions(flip="always")


# --- Clips that are cut -----------------------------------------------------------------------------------------


def test_clips_that_were_cut_are_counted(engine_of, data, out):
    for name, samples in (("long", 3 * RATE), ("longer", 4 * RATE), ("exact", RATE), ("short", 500)):
        write_clip(data / f"{name}.wav", samples, seed=samples)
    arguments = ["--model", engine_of(KINDS[0]).folder, "--data_dir", data, "--output_path"]
    for _ in range(2):
        result = command(*arguments, out, "--sample_size", RATE, "--json")
        assert result.exit_code == 0
        (line,) = (line for line in result.stderr.splitlines() if "longer" in line)
        assert line.startswith(
            "2 of 4 clips are longer than --sample_size and were cut; to keep more, pass --full, or "
        )
        assert "--sample_size 16756736" in line
        assert '"cut": 2' in result.stdout
    for more in (["--full"], []):
        result = command(*arguments, out.with_name(f"whole{len(more)}"), "--json", *more)
        assert "longer than" not in result.stderr
        assert '"cut": 0' in result.stdout


def test_size_that_is_in_use_is_no_cure_for_clips_that_were_cut(data, out):
    write_clip(data / "long.wav", 3 * RATE)
    report = run(data, out, sample_size=RATE)
    assert "--sample_size 16756736" in report.cut_notice(RATE)
    for size in (16_756_736, 20_000_000):
        assert (
            report.cut_notice(size)
            == "1 of 1 clips are longer than --sample_size and were cut; to keep more, pass --full"
        )
