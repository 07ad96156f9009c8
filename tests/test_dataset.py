"""Pre-encoding a dataset: correct latents, no lost clips, and nothing encoded without need."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import click
import numpy as np
import psutil
import pytest
import soundfile as sf
from click.testing import CliRunner
from faults import KILLED, contents
from helpers import HOP, KINDS, RATE, FakeBackend, assert_close, assert_one_line, noise

from samekit import AutoencoderModel
from samekit.audio import PreparedReader
from samekit.cli.main import main
from samekit.dataset.check import verify
from samekit.dataset.executor import LocalExecutor, silence_latents
from samekit.dataset.manifest import find_manifests, read_manifest
from samekit.dataset.options import PreEncodeOptions, Shard
from samekit.dataset.output import FolderOutput, GroupLimits, Output
from samekit.dataset.run import pre_encode
from samekit.dataset.sources import find_sources
from samekit.errors import BackendError, InputError, LatentsFileError, NonFiniteError, OutputError

FAKE_HOP = 8
EXACT_DB = 100
FIELDS = {
    "path",
    "relpath",
    "decoder",
    "timestamps",
    "seconds_start",
    "seconds_total",
    "padding_mask",
    "sample_rate",
    "prompt",
    "caption_source",
    "model",
    "model_sha256",
}


# --- Helpers ------------------------------------------------------------------------------------------------


def write_clip(path, samples, *, rate=RATE, channels=2, seed=0, level=0.1, caption="a caption"):
    """Write an audio file of noise and its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(os.fsencode(path), noise((samples, channels), seed, level), rate, format=path.suffix[1:].upper())
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_bad_clips(folder):
    """Write clips that cannot be encoded: without a caption, silent, and no audio."""
    write_clip(folder / "mute.wav", 100, caption=None)
    write_clip(folder / "silent.wav", 100, level=1e-5)
    (folder / "text.flac").write_text("no audio")
    (folder / "text.txt").write_text("unreadable")


def write_clips(folder, count, samples=100):
    """Write `count` short clips, all of them different."""
    for index in range(count):
        write_clip(folder / f"clip{index:05d}.wav", samples + index % 50, seed=index, caption=f"caption {index}")
    return folder


def first_samples(direction, array):
    """Return latents that show from which samples they were computed."""
    del direction
    return np.ascontiguousarray(array[:, 0].reshape(len(array), -1, FAKE_HOP)[:, :, :4].swapaxes(1, 2))


def raising(error):
    """Return an answer of a backend that always raises `error`."""

    def answer(direction, array):
        del direction, array
        raise error

    return answer


def fake_model(answer=first_samples):
    return AutoencoderModel(FakeBackend(answer))


def run(data, out, model=None, **options):
    return pre_encode(model or fake_model(), data, out, PreEncodeOptions(**options))


def rows_of(out):
    """Return the rows of the manifest by relpath."""
    output = FolderOutput(out)
    _, rows = read_manifest(output, find_manifests(output)[Shard()])
    return {row.relpath: row for row in rows}


def encoded_lines(out):
    """Return the number of manifest lines of encoded clips during a run."""
    return sum(path.read_bytes().count(b'"encoded"') for path in (out / ".samekit").glob("manifest-*.jsonl"))


def pair(out, number):
    path = out / f"{number:012d}.npy"
    return np.load(path, allow_pickle=False), json.loads(path.with_suffix(".json").read_text())


def prepared(path):
    """Return the samples of a clip as they are encoded, `[2, samples]`."""
    with PreparedReader(path, RATE, 2) as reader:
        return np.clip(np.concatenate(list(reader), axis=1), -1, 1)


def one_pass(model, audio, latents):
    """Encode a clip, padded with zeros to `latents` latents, in one call: the definition of correct latents."""
    sequence = np.zeros((1, 2, latents * model.downsampling_ratio), np.float32)
    sequence[0, :, : audio.shape[1]] = audio
    return model.autoencoder.backend.encode(sequence)[0]


@pytest.fixture
def tiny(model_of, kind):
    """Small models with both kinds of attention span."""
    return model_of(kind, "onnxruntime")


# --- The same latents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_latents_are_those_of_the_definition(tiny, data, out, batch_size):
    lengths = [0.05, 0.3, 1.0, 2.2, 5.9, 6.0, 7.3, 11.0, 23.4, 40.0]
    for index, seconds in enumerate(lengths):
        rate = (44_100, 48_000, 22_050, 32_000)[index % 4]
        suffix = ("wav", "flac", "ogg")[index % 3]
        path = data / f"{index % 2}" / f"{index}.{suffix}"
        write_clip(path, round(seconds * rate), rate=rate, channels=1 + index % 2, seed=index)
    assert run(data, out, tiny, batch_size=batch_size).encoded == len(lengths)
    for number in range(len(lengths)):
        latents, metadata = pair(out, number)
        audio = prepared(metadata["path"])
        kept = math.ceil(audio.shape[1] / HOP)
        assert_close(one_pass(tiny, audio, kept + 64)[:, :kept], latents, EXACT_DB)
    assert verify(out) == []


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("limit", [3, 40, 41])
def test_zeros_end_where_the_sample_size_ends(tiny, data, out, limit, pad):
    lengths = {1, 2, 3, 4, 5, 12, 13, 14, 15, 25, 26, 27, 28, 29, 38, 39, 40, 41, 50}
    for latents in lengths:
        write_clip(data / f"{latents:02d}.wav", latents * HOP - 1000, seed=latents)
    run(data, out, tiny, sample_size=limit * HOP, pad=pad)
    for number in range(len(lengths)):
        latents, metadata = pair(out, number)
        audio = prepared(metadata["path"])[:, : limit * HOP]
        kept = limit if pad else math.ceil(audio.shape[1] / HOP)
        assert_close(one_pass(tiny, audio, limit)[:, :kept], latents, EXACT_DB)
        ones = math.ceil(audio.shape[1] / HOP)
        assert metadata["padding_mask"] == [1] * ones + [0] * (kept - ones)


@pytest.mark.parametrize("latents", [1, 2, 3, 5, 6, 24, 25, 26, 27, 70, 71])
def test_silence_equals_the_directly_computed_one(tiny, latents):
    direct = one_pass(tiny, np.zeros((2, 0), np.float32), latents)
    assert_close(direct, silence_latents(tiny.autoencoder, latents), EXACT_DB)


def test_silence_of_the_default_length_costs_a_few_latents():
    model = fake_model()
    silence = silence_latents(model.autoencoder, 3072)
    assert silence.shape == (4, 3072)
    assert model.autoencoder.backend.calls == [6]


@pytest.mark.parametrize("pad", [False, True])
def test_silence_is_encoded_once(data, out, monkeypatch, pad):
    calls = []
    monkeypatch.setattr(
        "samekit.dataset.executor.silence_latents", lambda *args: calls.append(1) or silence_latents(*args)
    )
    write_clips(data, 2)
    run(data, out, pad=pad, sample_size=800)
    assert len(calls) == 1
    run(data, out, pad=pad, sample_size=800)
    assert len(calls) == 1


def test_whole_clips_are_followed_by_zeros(tiny, data, out):
    write_clip(data / "long.wav", 90 * HOP)
    run(data, out, tiny, sample_size=10 * HOP, full=True)
    latents, metadata = pair(out, 0)
    assert_close(one_pass(tiny, prepared(data / "long.wav"), 154)[:, :90], latents, EXACT_DB)
    assert metadata["timestamps"] == [0.0, 1.0]


def test_no_latent_is_computed_in_vain(data, out):
    model = fake_model()
    for latents in (1, 2, 3, 4, 63, 64, 65, 130):
        write_clip(data / f"{latents:03d}.wav", latents * FAKE_HOP)
    run(data, out, model, readers=1)
    # Context 1, aligned to 2, windows of 128 in steps of 126; the first call is the silence.
    assert model.autoencoder.backend.calls[1:] == [2, 4, 4, 6, 64, 66, 66, 128, 6]


def test_batches_hold_windows_of_one_length(data, out):
    batches = []

    def answer(direction, array):
        batches.append((len(array), array.shape[-1] // FAKE_HOP))
        return first_samples(direction, array)

    for index in range(12):
        write_clip(data / f"{index:02d}.wav", (10, 20)[index % 2] * FAKE_HOP, seed=index)
    run(data, out, fake_model(answer), batch_size=4)
    assert sorted(batches[1:]) == [(2, 12), (2, 22), (4, 12), (4, 22)]
    single = out.with_name("single")
    run(data, single)
    assert contents(single) == contents(out)


def test_samples_past_full_scale_are_clipped(data, out):
    data.mkdir()
    sf.write(data / "loud.wav", np.full((80, 2), 1.7), RATE, subtype="FLOAT")
    (data / "loud.txt").write_text("loud")
    run(data, out)
    assert pair(out, 0)[0].max() == 1.0


# --- The format ---------------------------------------------------------------------------------------------


def test_reader_of_the_format_alone_loads_every_pair(model_of, data, out):
    """Read the files without samekit, as the training code does."""
    for index, seconds in enumerate((0.2, 1.5, 3.0)):
        write_clip(data / "deep" / "er" / f"{index}.flac", round(RATE * seconds), caption=f"  caption {index}\n")
    run(data, out, model_of(KINDS[0], "onnxruntime"), sample_size=20 * HOP)

    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    arrays = [name for name in names if name.endswith(".npy") and name != "silence.npy"]
    assert names == sorted([*arrays, *(name.replace(".npy", ".json") for name in arrays), "silence.npy"])
    assert arrays == ["000000000000.npy", "000000000001.npy", "000000000002.npy"]
    silence = np.load(out / "silence.npy", allow_pickle=False)
    for index, (name, seconds) in enumerate(zip(arrays, (0.2, 1.5, 3.0), strict=True)):
        latents = np.load(out / name, allow_pickle=False)
        info = json.loads((out / name.replace(".npy", ".json")).read_text())
        assert set(info) == FIELDS
        kept = min(20, math.ceil(seconds * RATE / HOP))
        assert latents.dtype == np.float32
        assert latents.shape == (silence.shape[1], kept)
        assert info["path"] == str(data / "deep" / "er" / f"{index}.flac")
        assert info["relpath"] == f"deep/er/{index}.flac"
        assert info["prompt"] == f"caption {index}"
        assert info["padding_mask"] == [1] * kept
        assert info["sample_rate"] == RATE
        assert info["seconds_start"] == 0
        assert info["seconds_total"] == math.ceil(seconds)
        assert info["timestamps"] == [0.0, min(1.0, 20 * HOP / (seconds * RATE))]
    assert silence.shape[0] == 1
    assert silence.shape[2] == 20


def test_half_files_are_float16(data, out):
    write_clips(data, 2)
    run(data, out, float16=True, sample_size=800)
    assert pair(out, 1)[0].dtype == np.float16
    assert np.load(out / "silence.npy").dtype == np.float16
    assert verify(out) == []


def test_sound_of_several_folders(tmp_path, out):
    write_clip(tmp_path / "a" / "x.wav", 100)
    write_clip(tmp_path / "b" / "y.WAV", 100)
    assert run([tmp_path / "a", tmp_path / "b"], out).encoded == 2
    write_clip(tmp_path / "b" / "x.wav", 100)
    with pytest.raises(InputError, match="the same path below --data_dir") as error:
        run([tmp_path / "a", tmp_path / "b"], out)
    assert_one_line(error.value)
    with pytest.raises(InputError, match=r"the same path below --data_dir; pass each folder once$"):
        run([tmp_path / "a", tmp_path / "b" / ".." / "a"], out)


def test_long_clip_is_cut_from_the_start(data, out):
    write_clip(data / "long.wav", 3 * RATE)
    run(data, out, sample_size=RATE)
    latents, metadata = pair(out, 0)
    assert latents.shape[1] == math.ceil(RATE / FAKE_HOP)
    assert np.array_equal(latents[:, 0], prepared(data / "long.wav")[0, :4])
    assert (metadata["seconds_start"], metadata["seconds_total"]) == (0, 3)
    assert metadata["timestamps"] == [0.0, pytest.approx(1 / 3)]


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_random_crop_depends_on_the_seed_alone(data, out, tmp_path, suffix):
    write_clip(data / f"long.{suffix}", 5 * RATE)
    run(data, out, sample_size=RATE, crop="random", seed=3)
    latents, metadata = pair(out, 0)
    begin, end = metadata["timestamps"]
    whole = prepared(data / f"long.{suffix}")
    offset = round(begin * whole.shape[1])
    assert end - begin == pytest.approx(RATE / whole.shape[1])
    assert offset > 0
    assert metadata["seconds_start"] == offset // RATE
    assert np.array_equal(latents[:, 0], whole[0, offset : offset + 4])
    run(data, tmp_path / "again", sample_size=RATE, crop="random", seed=3)
    run(data, tmp_path / "other", sample_size=RATE, crop="random", seed=4)
    assert contents(tmp_path / "again") == contents(out)
    assert pair(tmp_path / "other", 0)[1]["timestamps"] != metadata["timestamps"]


# --- Which clips --------------------------------------------------------------------------------------------


def test_bad_clips_become_rows_and_the_others_are_encoded(data, out):
    write_clips(data, 3)
    write_clip(data / "silent.wav", 4 * RATE, level=1e-5)
    write_clip(data / "mute.wav", 100, caption=None)
    write_clip(data / "blank.wav", 100, caption=" \n")
    write_clip(data / "latin.wav", 100).with_suffix(".txt").write_bytes(b"caf\xe9")
    write_clip(data / "nothing.wav", 0)
    (data / "zero.wav").touch()
    (data / "zero.txt").write_text("empty")
    (data / "text.flac").write_text("this is no audio")
    (data / "text.txt").write_text("unreadable")
    cut = write_clip(data / "cut.wav", 5000)
    cut.write_bytes(cut.read_bytes()[:-4000])
    (data / "dangling.wav").symlink_to("nowhere")
    (data / "dangling.txt").write_text("unreadable")
    report = run(data, out)
    expected = {
        "silent.wav": "silent",
        "mute.wav": "no_caption",
        "blank.wav": "no_caption",
        "latin.wav": "no_caption",
        "nothing.wav": "empty",
        "zero.wav": "empty",
        "text.flac": "unreadable",
        "cut.wav": "unreadable",
        "dangling.wav": "unreadable",
    }
    assert {row["relpath"]: row["status"] for row in report.bad} == expected
    assert report.encoded == 3
    assert report.statuses == {"encoded": 3, "silent": 1, "no_caption": 3, "empty": 2, "unreadable": 3}
    for row in report.bad:
        assert row["relpath"].split(".")[0] in row["reason"]
        assert "\n" not in row["reason"]
    assert json.loads((out / ".samekit" / "report.json").read_text())["bad"] == report.bad
    assert verify(out) == []
    with pytest.raises(InputError, match=r"9 of 12 clips are bad .*; .*report\.json lists them$") as error:
        run(data, out, strict=True)
    assert_one_line(error.value)


def test_silence_before_sound_is_no_silent_clip(data, out):
    data.mkdir()
    audio = np.concatenate([np.zeros((10 * RATE, 2)), noise((100, 2))])
    sf.write(data / "late.wav", audio, RATE)
    (data / "late.txt").write_text("late")
    sf.write(data / "cut away.wav", audio, RATE)
    (data / "cut away.txt").write_text("silent where it is kept")
    assert run(data, out).encoded == 2
    assert run(data, out.with_name("cut"), sample_size=RATE).statuses == {"silent": 2}


def test_file_damaged_in_the_middle_leaves_nothing(data, out):
    path = write_clip(data / "x.flac", 20 * RATE)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 4000] = bytes(4000)
    path.write_bytes(whole)
    assert run(data, out).statuses == {"unreadable": 1}
    assert sorted(path.name for path in out.iterdir()) == [".samekit", "silence.npy"]


@pytest.mark.parametrize(
    "name", [b"new\nline.wav", b"quote\"'.wav", b"caf\xe9 \xff.wav", "音.wav".encode(), b"dot.dot.wav", b"-x .wav"]
)
def test_odd_file_names(data, out, name):
    path = write_clip(data / os.fsdecode(name), 100)
    # A name that is sorted after all others.
    write_clip(data / os.fsdecode(b"\xff\xff.wav"), 100)
    assert run(data, out).encoded == 2
    assert pair(out, 0)[1]["relpath"] == os.fsdecode(name)
    assert run(data, out).unchanged == 2
    path.with_suffix(".txt").unlink()
    result = CliRunner().invoke(main, ["check-latents", str(out)])
    assert result.exit_code == 0, result.output
    assert run(data, out).statuses == {"encoded": 1, "no_caption": 1}


def test_hidden_files_links_and_pipes(data, out):
    write_clip(data / "in" / "x.wav", 100)
    write_clip(data / "in" / "._x.wav", 100)
    write_clip(data / ".Trash-1000" / "files" / "y.wav", 100)
    (data / "in" / "loop").symlink_to(data)
    os.mkfifo(data / "pipe.wav")
    (data / "pipe.txt").write_text("pipe")
    report = run(data, out)
    assert report.statuses == {"encoded": 1, "unreadable": 1}


def test_dataset_without_audio_is_refused(data, out):
    with pytest.raises(InputError, match="cannot be read"):
        run(data, out)
    with pytest.raises(InputError, match=r"s3://bucket/clips: cannot be read .*takes folders only, mount it"):
        run("s3://bucket/clips", out)
    data.mkdir()
    with pytest.raises(InputError, match="no audio") as error:
        run(data, out)
    assert_one_line(error.value)
    assert not out.exists()


def test_clip_that_overflows_the_model_fails_alone(data, out):
    write_clips(data, 5)
    loud = prepared(data / "clip00002.wav")[0, 0]

    def answer(direction, array):
        if (array[:, 0, 0] == loud).any():
            raise NonFiniteError("the encoder produced NaN; use fp32")
        return first_samples(direction, array)

    report = run(data, out, fake_model(answer), batch_size=4)
    assert [(row["relpath"], row["status"]) for row in report.bad] == [("clip00002.wav", "failed")]
    assert report.encoded == 4
    # The next run tries a failed clip again.
    assert run(data, out).encoded == 1


def failing_at(call, value=None):
    """Return a model whose latents are NaN, or `value`, from call number `call` on. The first call is the silence."""
    calls = []

    def answer(direction, array):
        calls.append(len(array))
        if len(calls) < call:
            return first_samples(direction, array)
        if value is None:
            raise NonFiniteError("the encoder produced NaN; use fp32")
        return np.full_like(first_samples(direction, array), value)

    return calls, fake_model(answer)


@pytest.mark.parametrize(("batch_size", "most"), [(1, 4), (3, 5)])
def test_windows_behind_one_that_came_out_nan_are_not_encoded(data, out, batch_size, most):
    write_clip(data / "long.wav", 30 * 126 * FAKE_HOP)
    calls, model = failing_at(4)
    report = run(data, out, model, readers=1, batch_size=batch_size)
    assert report.statuses == {"failed": 1}
    # After the failed batch, at most one of its windows is encoded alone.
    assert len(calls) <= most
    assert sorted(path.name for path in out.iterdir()) == [".samekit", "silence.npy"]


def test_clip_that_failed_takes_no_other_with_it(data, out):
    write_clip(data / "a long.wav", 30 * 126 * FAKE_HOP, seed=99)
    write_clips(data, 5)
    start = prepared(data / "a long.wav")[0, 0]

    def answer(direction, array):
        if (array[:, 0, 0] == start).any():
            raise NonFiniteError("the encoder produced NaN; use fp32")
        return first_samples(direction, array)

    report = run(data, out, fake_model(answer), batch_size=3)
    assert report.statuses == {"encoded": 5, "failed": 1}
    run(data, out.with_name("whole"))
    fine, whole = contents(out), contents(out.with_name("whole"))
    assert all(fine[f"{number:012d}.npy"] == whole[f"{number:012d}.npy"] for number in range(1, 6))


def test_windows_behind_one_too_large_for_float16_are_not_read(data, out):
    write_clip(data / "long.wav", 500 * 126 * FAKE_HOP)
    calls, model = failing_at(2, 1e6)
    report = run(data, out, model, readers=1, float16=True, sample_size=500 * 126 * FAKE_HOP)
    assert report.statuses == {"failed": 1}
    assert "too large for float16" in report.bad[0]["reason"]
    # Most windows are not even read.
    assert len(calls) < 250


def test_latents_too_large_for_float16_fail(data, out):
    write_clips(data, 2)

    def loud(silence=0.0):
        return fake_model(lambda direction, array: first_samples(direction, array) * 1e7 + silence)

    assert run(data, out, loud(), float16=False).encoded == 2
    report = run(data, out.with_name("float16"), loud(), float16=True)
    assert report.statuses == {"failed": 2}
    with pytest.raises(InputError, match=r"silence\.npy: a latent is NaN or too large for float16") as error:
        run(data, out.with_name("silence"), loud(1e6), float16=True)
    assert_one_line(error.value)


# --- Going on -----------------------------------------------------------------------------------------------


def test_second_run_encodes_only_what_is_new_or_changed(data, out):
    write_clips(data, 6)
    run(data, out)
    before = contents(out)
    model = fake_model()
    report = run(data, out, model)
    assert (report.encoded, report.unchanged) == (0, 6)
    assert model.autoencoder.backend.calls == []
    assert contents(out) == before

    write_clip(data / "a first one.wav", 100, seed=50)
    write_clip(data / "clip00001.wav", 130, seed=51)
    (data / "clip00002.txt").write_text("other words")
    (data / "clip00003.wav").unlink()
    (out / f"{4:012d}.json").unlink()
    report = run(data, out)
    assert (report.encoded, report.unchanged, report.gone) == (4, 2, ["clip00003.wav"])
    named = ", and latents of 1 clip that left the dataset (clip00003.wav); --prune removes them; this run encoded 4, "
    assert named in report.summary()
    assert pair(out, 6)[1]["relpath"] == "a first one.wav"
    assert pair(out, 2)[1]["prompt"] == "other words"
    assert pair(out, 1)[0].shape[1] == math.ceil(130 / FAKE_HOP)
    assert {name: data for name, data in contents(out).items() if "00005." in name or "00004." in name} == {
        name: data for name, data in before.items() if "00005." in name or "00004." in name
    }


def test_clip_that_turned_bad_loses_its_files_but_not_its_number(data, out):
    write_clips(data, 2)
    run(data, out)
    (data / "clip00000.txt").unlink()
    assert run(data, out).statuses == {"encoded": 1, "no_caption": 1}
    assert not list(out.glob("000000000000.*"))
    assert run(data, out).unchanged == 2
    (data / "clip00000.txt").write_text("back")
    run(data, out)
    assert pair(out, 0)[1]["prompt"] == "back"


def test_checksum_judges_by_contents(data, out):
    write_clips(data, 2)
    run(data, out, checksum=True)
    first, second = data / "clip00000.wav", data / "clip00001.wav"
    os.utime(first, (1, 1))
    times = second.stat()
    write_clip(second, 101, seed=77, caption=None)
    os.utime(second, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert second.stat().st_size == times.st_size
    assert run(data, out, checksum=True).encoded == 1
    assert np.array_equal(pair(out, 1)[0][:, 0], prepared(second)[0, :4])
    assert run(data, out).encoded == 0


def test_checksum_judges_captions_by_contents_too(data, out):
    write_clips(data, 3)
    run(data, out, checksum=True)
    touched, changed, removed = (data / f"clip0000{index}.txt" for index in range(3))
    os.utime(touched, (1, 1))
    times = changed.stat()
    changed.write_text("caption X")
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed.stat().st_size == times.st_size
    removed.unlink()
    report = run(data, out, checksum=True)
    assert (report.encoded, report.unchanged) == (1, 1)
    assert pair(out, 1)[1]["prompt"] == "caption X"
    assert report.statuses == {"encoded": 2, "no_caption": 1}
    assert run(data, out).unchanged == 3


@pytest.mark.parametrize("suffix", ["wav", "txt"])
def test_file_that_changes_after_it_was_read_is_encoded_again(data, out, suffix):
    """The digest must be that of the encoded contents, not that of the file at the end of the clip."""
    write_clips(data, 2)
    path, changed = data / f"clip00001.{suffix}", []

    def answer(direction, array):
        if len(array[0, 0]) == 112 and not changed:
            # The second clip was read: it has 101 samples, which are 13 latents, and one latent of context.
            changed.append(path.stat())
            if suffix == "wav":
                write_clip(path, 101, seed=77, caption=None)
            else:
                path.write_text("caption X")
            os.utime(path, ns=(changed[0].st_atime_ns, changed[0].st_mtime_ns))
            assert path.stat().st_size == changed[0].st_size
        return first_samples(direction, array)

    (data / "clip00000.wav").unlink()
    run(data, out, fake_model(answer), checksum=True, readers=1)
    assert changed
    assert run(data, out, checksum=True).encoded == 1
    latents, metadata = pair(out, 0)
    assert np.array_equal(latents[:, 0], prepared(data / "clip00001.wav")[0, :4])
    assert metadata["prompt"] == path.with_suffix(".txt").read_text()
    assert run(data, out, checksum=True).unchanged == 1


def test_file_that_changes_while_it_is_read_is_tried_again(data, out):
    """This holds even if its size stays the same and its time is set back."""
    path = write_clip(data / "long.wav", 40 * RATE)
    changed = []

    def answer(direction, array):
        if len(array[0, 0]) > 112 and not changed:
            changed.append(path.stat())
            write_clip(path, 40 * RATE, seed=77)
            os.utime(path, ns=(changed[0].st_atime_ns, changed[0].st_mtime_ns))
        return first_samples(direction, array)

    report = run(data, out, fake_model(answer), checksum=True, readers=1)
    assert changed
    assert report.statuses == {"unreadable": 1}
    assert "was changed while it was read" in report.bad[0]["reason"]
    assert run(data, out, checksum=True).encoded == 1
    assert np.array_equal(pair(out, 0)[0][:, 0], prepared(path)[0, :4])


def test_digests_are_added_without_encoding_again(data, out):
    write_clips(data, 1)
    run(data, out)
    assert run(data, out, checksum=True).unchanged == 1
    os.utime(data / "clip00000.txt", (1, 1))
    assert run(data, out, checksum=True).unchanged == 1


def test_reencoding_removes_the_latents_of_clips_that_are_gone(data, out):
    write_clips(data, 3)
    run(data, out)
    for suffix in ("wav", "txt"):
        (data / f"clip00001.{suffix}").rename(out.with_name(f"away.{suffix}"))
    assert len(run(data, out).gone) == 1
    assert pair(out, 1)[1]["prompt"] == "caption 1"
    report = run(data, out, float16=True, reencode=True)
    assert (report.encoded, report.gone) == (2, [])
    assert not list(out.glob("000000000001.*"))
    assert verify(out) == []
    for suffix in ("wav", "txt"):
        out.with_name(f"away.{suffix}").rename(data / f"clip00001.{suffix}")
    assert run(data, out, float16=True).encoded == 1
    assert pair(out, 1)[1]["prompt"] == "caption 1"
    assert verify(out) == []


def test_clip_that_was_never_tried_and_is_gone_is_no_problem(data, out):
    write_clips(data, 3)

    with pytest.raises(BackendError):
        run(data, out, fake_model(raising(BackendError("out of memory; try again"))))
    assert any("not encoded yet" in problem for problem in verify(out))
    (data / "clip00001.wav").unlink()
    run(data, out)
    assert rows_of(out)["clip00001.wav"].status == "gone"
    assert verify(out) == []
    (data / "clip00001.wav").symlink_to("nowhere")
    assert run(data, out).statuses == {"encoded": 2, "unreadable": 1}


@pytest.mark.parametrize(
    "change", [{"float16": True}, {"sample_size": 500}, {"pad": True}, {"full": True}, {"crop": "random"}]
)
def test_other_settings_are_refused(data, out, change):
    write_clips(data, 2)
    run(data, out, sample_size=1000)
    before = contents(out)
    with pytest.raises(InputError, match="other settings") as error:
        run(data, out, **{"sample_size": 1000} | change)
    assert_one_line(error.value)
    assert contents(out) == before
    report = run(data, out, **{"sample_size": 1000, "reencode": True} | change)
    assert (report.encoded, report.unchanged) == (2, 0)
    fresh = out.with_name("fresh")
    run(data, fresh, **{"sample_size": 1000} | change)
    assert contents(fresh) == contents(out)


def test_other_model_is_refused_and_another_name_is_not(data, out):
    write_clips(data, 1)
    run(data, out)
    renamed, other = fake_model(), fake_model()
    object.__setattr__(renamed.spec, "name", "renamed")
    object.__setattr__(other.spec, "source_sha256", "1" * 64)
    assert run(data, out, renamed).unchanged == 1
    with pytest.raises(InputError, match=r"model fake \(0\) there, fake \(11111111\) here"):
        run(data, out, other)
    # Only what differs is named.
    with pytest.raises(InputError, match=r"settings \(sample_size \d+ there, 8000 here\); "):
        run(data, out, sample_size=8000)


@pytest.mark.parametrize("name", ["latents.npy", "000000000000.json"])
def test_files_of_unknown_origin_are_refused(data, out, name):
    write_clips(data, 1)
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {name}, which no manifest lists") as error:
        run(data, out)
    assert_one_line(error.value)
    assert (out / name).read_text() == "mine"


def test_data_that_is_away_for_a_while_costs_no_latents(data, out):
    write_clips(data, 3)
    run(data, out)
    before = {name: value for name, value in contents(out).items() if name[0].isdigit()}
    model, away = fake_model(), data.with_name("away")

    def leave(direction, array):
        if data.exists():
            data.rename(away)
        return first_samples(direction, array)

    for path in data.glob("*.txt"):
        os.utime(path, (1, 1))
    model.autoencoder.backend.answer = leave
    report = run(data, out, model, readers=1)
    assert {row["status"] for row in report.bad} == {"unreadable"}
    assert len(report.bad) >= 1
    assert report.statuses == {"encoded": 3}
    assert {name: value for name, value in contents(out).items() if name in before} == before
    away.rename(data)
    model.autoencoder.backend.answer = first_samples
    report = run(data, out, model)
    assert (report.statuses, report.bad) == ({"encoded": 3}, [])
    assert report.encoded >= 1
    assert verify(out) == []


def test_strict_counts_clips_whose_latents_stay(data, out):
    write_clips(data, 2)
    run(data, out)
    path = data / "clip00000.wav"
    path.unlink()
    path.symlink_to("away")
    assert run(data, out).statuses == {"encoded": 2}
    with pytest.raises(InputError, match=r"1 of 2 clips are bad \(1 unreadable\), first: ") as error:
        run(data, out, strict=True)
    assert_one_line(error.value)
    assert (out / "000000000000.npy").exists()


def test_caption_that_cannot_be_read_now_is_tried_again(data, out):
    write_clips(data, 1)
    caption = data / "clip00000.txt"
    model = fake_model()
    text = caption.read_bytes()
    caption.unlink()
    caption.write_bytes(b"a" * (2**20 + 1))
    report = run(data, out, model)
    assert report.statuses == {"unreadable": 1}
    assert "more than 1048576 bytes" in report.bad[0]["reason"]
    caption.write_bytes(text)
    assert run(data, out, model).statuses == {"encoded": 1}


def test_deep_folders_and_links_in_circles(data, out):
    write_clips(data / "a", 1)
    with contextlib.chdir(data):
        for _ in range(1100):
            os.mkdir("d")
            os.chdir("d")
    for index in range(10):
        folder = data / f"l{index}"
        folder.mkdir()
        for other in range(10):
            (folder / f"to{other}").symlink_to(data / f"l{other}")
    (data / "0 to a").symlink_to(data / "a")
    try:
        assert [source.relpath for source in find_sources([data]).sources] == ["a/clip00000.wav"]
        assert run(data, out).encoded == 1
    finally:
        # shutil.rmtree would exceed the recursion limit.
        subprocess.run(["rm", "-r", data / "d"], check=True)


def test_other_files_are_left_alone(data, out):
    write_clips(data, 1)
    out.mkdir()
    (out / "licence.json").write_text("mine")
    assert run(data, out).encoded == 1
    assert (out / "licence.json").read_text() == "mine"


def test_second_process_is_told_and_stops(data, out):
    write_clips(data, 1)
    refusals = []

    def meddle(_progress):
        with pytest.raises(OutputError, match=f"process {os.getpid()} is writing there") as error:
            run(data, out)
        refusals.append(error.value)

    pre_encode(fake_model(), data, out, progress=meddle)
    (refusal,) = refusals
    assert_one_line(refusal)
    assert run(data, out).unchanged == 1


def interrupted(data, out, clips):
    """Interrupt a run after `clips` clips, and return the part of the manifest with their lines."""

    def stop(progress):
        if progress.done == clips:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "group_limits", GroupLimits(clips=1))
        with pytest.raises(KeyboardInterrupt):
            pre_encode(fake_model(), data, out, PreEncodeOptions(readers=1), stop)
    return out / ".samekit" / "manifest-000002.jsonl"


def test_incomplete_last_line_is_dropped(data, out):
    """A power failure can leave such a line."""
    write_clips(data, 4)
    whole = out.with_name("whole")
    run(data, whole)
    path = interrupted(data, out, 3)
    assert path.read_bytes().count(b"\n") == 3
    path.write_bytes(path.read_bytes()[:-20])
    assert run(data, out).encoded == 2
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("half", ["the copy", "the first part"])
def test_incomplete_first_part_is_ignored(data, out, half):
    """An interrupted upload may leave half of a part. The other part has the numbers of all clips."""
    write_clips(data, 4)
    whole = out.with_name("whole")
    run(data, whole)
    added = interrupted(data, out, 3)
    first, copy = added.with_name("manifest-000001.jsonl"), added.with_name("manifest-000003.jsonl")
    copy.write_bytes((whole / ".samekit" / "manifest-000001.jsonl").read_bytes() if half == "the first part" else b"")
    broken = first if half == "the first part" else copy
    text = first.read_bytes()
    broken.write_bytes(text[: len(text) // 2])
    assert run(data, out).clips == 4
    assert contents(out) == contents(whole)


def test_file_with_the_name_of_an_impossible_shard_is_ignored(data, out):
    write_clips(data, 2)
    run(data, out)
    (out / ".samekit" / "manifest-3-of-2-000001.jsonl").touch()
    assert run(data, out).unchanged == 2
    assert verify(out) == []


def test_damaged_manifest_is_an_error_of_one_line(data, out):
    write_clips(data, 4)
    run(data, out)
    path = out / ".samekit" / "manifest-000001.jsonl"
    whole = path.read_text()
    for damaged in ("", "[]\n", "{}\n", whole.replace('"number"', '"numbr"'), whole.replace("00001", "00000")):
        path.write_text(damaged)
        with pytest.raises(InputError, match="manifest") as error:
            run(data, out)
        assert_one_line(error.value)


def test_what_a_killed_process_left_is_removed(data, out):
    write_clips(data, 2)
    run(data, out, shard=Shard(2, 2))
    before = contents(out)
    for name in (".000000000001.npy.123-00000000.tmp", ".samekit/.manifest-2-of-2-000001.jsonl.123-00000000.tmp"):
        (out / name).touch()
    others = (".000000000000.npy.9-00000000.tmp", ".silence.npy.9-00000000.tmp", "notes.tmp")
    for name in others:
        (out / name).touch()
    run(data, out, shard=Shard(2, 2))
    assert contents(out) == before | dict.fromkeys(others, b"")


def test_shards_make_up_the_whole(data, out):
    write_clips(data, 30)
    reports = [run(data, out, shard=Shard.parse(f"{index}/3")) for index in (1, 2, 3)]
    assert sum(report.clips for report in reports) == 30
    assert min(report.clips for report in reports) > 3
    relpaths = {json.loads(path.read_text())["relpath"] for path in out.glob("*.json")}
    assert len(relpaths) == len(list(out.glob("0*.npy"))) == 30
    assert verify(out) == []
    assert run(data, out, shard=Shard(2, 3)).encoded == 0
    # The clips and numbers of a shard do not depend on the other shards.
    alone = out.with_name("alone")
    run(data, alone, shard=Shard(3, 3))
    assert contents(alone).items() <= contents(out).items()
    for other in ("1/1", "1/2"):
        with pytest.raises(InputError, match=r"was started with --shard I/3; continue in the same way"):
            run(data, out, shard=Shard.parse(other))
    whole = out.with_name("whole")
    run(data, whole)
    with pytest.raises(InputError, match="was started without --shard; continue in the same way") as error:
        run(data, whole, shard=Shard(1, 2))
    assert_one_line(error.value)


def test_output_that_is_a_data_folder_is_refused(data, tmp_path):
    write_clips(data, 2)
    write_clip(tmp_path / "more" / "other.wav", 100)
    (tmp_path / "link").symlink_to(data)
    before = sorted(tmp_path.rglob("*"))
    for same in (data, tmp_path / "link", tmp_path / "more" / ".." / data.name, f"file://{data}"):
        with pytest.raises(InputError, match="is a --data_dir too") as error:
            run([tmp_path / "more", data], same)
        assert_one_line(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert run(data, data / "latents").encoded == 2


def test_of_other_shards_only_the_settings_are_read(data, out):
    write_clips(data, 20)
    for index in (1, 2):
        run(data, out, shard=Shard(index, 2))
    other = out / ".samekit" / "manifest-2-of-2-000001.jsonl"
    header = other.read_text().split("\n")[0]
    # Invalid rows cause no error, because they are not read.
    other.write_text(f"{header}\nno row\n")
    assert run(data, out, shard=Shard(1, 2)).encoded == 0
    for damaged in (f"{header[:-1]}\n", header, "", "x" * 10**6):
        other.write_text(damaged)
        with pytest.raises(InputError, match=r"manifest-2-of-2-000001\.jsonl: is damaged") as error:
            run(data, out, shard=Shard(1, 2))
        assert_one_line(error.value)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", ""])
def test_shards_that_do_not_exist(text):
    with pytest.raises(InputError, match="does not exist") as error:
        Shard.parse(text)
    assert_one_line(error.value)


@pytest.mark.parametrize(("index", "count"), [(0, 4), (5, 4), (-1, 4), (1, 0), (1.0, 2), (True, 2), (1, 10**6)])
def test_shards_that_cannot_be_made(index, count):
    with pytest.raises(InputError, match="does not exist") as error:
        Shard(index, count)
    assert_one_line(error.value)


def test_verify_misses_the_shards_that_did_not_run(data, out):
    write_clips(data, 12)
    run(data, out, shard=Shard(1, 3))
    (problem,) = verify(out)
    assert "2 of 3 shards are missing" in problem
    assert "--shard 2/3" in problem
    run(data, out, shard=Shard(2, 3))
    run(data, out, shard=Shard(3, 3))
    assert verify(out) == []
    state = out / ".samekit"
    header = json.loads((state / "manifest-1-of-3-000001.jsonl").read_text().split("\n")[0])
    (state / "manifest-2-of-4-000001.jsonl").write_text(json.dumps(header | {"clips": 0}) + "\n")
    assert any("3 and in 4 parts" in problem for problem in verify(out))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"sample_size": 0},
        {"sample_size": 2**63},
        {"readers": -1},
        {"readers": 10**5},
        {"crop": "end"},
        {"full": True, "crop": "random"},
        {"pad": 1},
        {"float16": "yes"},
        {"seed": 1.5},
        {"seed": -1},
        {"shard": None},
        {"shard": "1/2"},
    ],
)
def test_options_that_do_not_work(options):
    with pytest.raises(InputError) as error:
        PreEncodeOptions(**options)
    assert_one_line(error.value)


# --- When it goes wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [BackendError("out of memory; try again"), KeyboardInterrupt(), RuntimeError("bug")])
def test_error_of_the_encoder_ends_the_run_and_leaves_whole_pairs(data, out, error):
    write_clips(data, 12)
    whole = out.with_name("whole")
    run(data, whole)
    calls = []

    def answer(direction, array):
        calls.append(1)
        if len(calls) == 7:
            raise error
        return first_samples(direction, array)

    with pytest.raises(type(error)):
        run(data, out, fake_model(answer))
    assert not list(out.rglob(".*.tmp"))
    arrays = {path.stem for path in out.glob("0*.npy")}
    assert arrays == {path.stem for path in out.glob("*.json")}
    assert run(data, out).encoded == 12 - len(arrays)
    assert contents(out) == contents(whole)


def test_error_that_is_not_of_the_folder_is_not_blamed_on_it(data, out):
    write_clips(data, 1)

    with pytest.raises(FileNotFoundError, match="a library of the backend") as error:
        run(data, out, fake_model(raising(FileNotFoundError("a library of the backend"))))
    assert not isinstance(error.value, OutputError)


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/self/out"])
def test_folder_that_cannot_be_written(data, tmp_path, where):
    write_clips(data, 1)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as error:
        run(data, tmp_path / where)
    assert_one_line(error.value)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 300 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_disk_without_room_for_the_silence(data, small_disk):
    """The message contains the reason. NumPy's message has none: "2097152 requested and 22496 written"."""
    write_clips(data, 1)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); ") as error:
        run(data, small_disk / "out", sample_size=400_000)
    assert_one_line(error.value)


def test_full_disk_stops_with_one_line_and_can_be_resumed(data, small_disk):
    write_clips(data, 60)
    out = small_disk / "out"
    with pytest.raises(OutputError, match="No space left") as error:
        run(data, out, sample_size=800)
    assert_one_line(error.value)
    assert not list(out.rglob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=3m", small_disk], check=True)
    report = run(data, out, sample_size=800)
    assert 0 < report.unchanged < 60
    whole = data.parent / "whole"
    run(data, whole, sample_size=800)
    assert contents(out) == contents(whole)


# Without the limit, the clips of a short run would be one group.
SMALL_GROUPS = "from samekit.dataset.output import GroupLimits, Output; Output.group_limits = GroupLimits(clips=3);"


def kill_and_resume(engine, data, folder, kills):
    """Kill runs after random numbers of clips, then complete one. Return how many were killed before their end."""
    program = f"{SMALL_GROUPS} from samekit.cli.main import main; main()"
    command = [sys.executable, "-c", program, "pre-encode", "--threads", "1"]
    command += ["--backend", "onnxruntime", "--model", engine, "--data_dir", data, "--output_path"]
    subprocess.run([*command, folder / "whole"], check=True, capture_output=True)
    died = 0
    clips = len(list(data.glob("*.wav")))
    # Some runs are killed at their beginning, and none so late that it may have ended.
    for moment in sorted(random.Random(kills).choices(range(clips * 3 // 4), k=kills)):
        process = subprocess.Popen([*command, folder / "out"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not encoded_lines(folder / "out") >= moment:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        died += process.wait() == KILLED
    subprocess.run([*command, folder / "out"], check=True, capture_output=True)
    assert contents(folder / "out") == contents(folder / "whole")
    return died


def test_killed_runs_leave_the_same_folder(engine_of, data, tmp_path, faults):
    write_clips(data, 30, samples=RATE)
    assert kill_and_resume(engine_of(KINDS[0]).folder, data, tmp_path, kills=2) == 2
    faults["processes killed"] += 2


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_twenty_kills_leave_the_same_folder(engine_of, data, tmp_path, name, faults):
    write_clips(data, 300, samples=RATE)
    died = kill_and_resume(engine_of(name).folder, data, tmp_path, kills=20)
    faults["processes killed"] += died
    assert died >= 10


# --- Verifying ----------------------------------------------------------------------------------------------


def test_verify_finds_every_damage(data, out):
    write_clips(data, 9)
    run(data, out, sample_size=800)
    assert verify(out) == []
    name = "{:012d}".format
    (out / f"{name(0)}.npy").unlink()
    (out / f"{name(1)}.json").unlink()
    cut = out / f"{name(2)}.npy"
    cut.write_bytes(cut.read_bytes()[:-1])
    np.save(out / f"{name(3)}.npy", np.full((4, 13), np.nan, np.float32))
    np.save(out / f"{name(4)}.npy", np.zeros((4, 13), np.float16))
    for number, change in ((5, {"prompt": None}), (6, {"relpath": "x"}), (7, {"padding_mask": [1]})):
        path = out / f"{name(number)}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    np.save(out / "silence.npy", np.zeros((1, 5, 3), np.float32))
    (out / f".{name(8)}.npy.1-00000000.tmp").touch()
    np.save(out / f"{name(20)}.npy", np.zeros(3))
    problems = verify(out)
    parts = [f"{name(n)}." for n in (20, 8, 0, 1, 2, 3, 4, 5, 6, 7)] + ["silence"]
    assert len(problems) == len(parts)
    assert all("; " in problem for problem in problems)
    for part in parts:
        assert any(part in problem for problem in problems), part
    run(data, out, sample_size=800)


def test_latents_tell_which_model_encoded_them(data, out, tmp_path):
    write_clips(data, 2)
    run(data, out)
    other = fake_model()
    object.__setattr__(other.spec, "source_sha256", "1" * 64)
    assert AutoencoderModel(FakeBackend()).decode_file(out / "000000000000.npy", tmp_path / "a.wav") > 0
    with pytest.raises(LatentsFileError, match=r"latents of another model \(fake\)") as error:
        other.decode_file(out / "000000000000.npy", tmp_path / "b.wav")
    assert_one_line(error.value)
    path = out / "000000000001.json"
    path.write_text(path.read_text().replace('"model_sha256": "0"', '"model_sha256": "1234567890"'))
    (problem,) = verify(out)
    assert problem == f"{path}: is of model '12345678', the manifest says '0'; remove it and run pre-encode again"
    path.unlink()
    assert run(data, out).encoded == 1
    assert verify(out) == []


def test_encoding_a_file_never_replaces_a_clip_of_a_dataset(data, out):
    write_clips(data, 1)
    run(data, out)
    before = contents(out)
    with pytest.raises(OutputError, match="is of something else, and is not replaced"):
        fake_model().encode_file(data / "clip00000.wav", out / "000000000000.npy")
    assert contents(out) == before


def damage_with_nan(path):
    np.save(path, np.full_like(np.load(path), np.nan))


def damage_width(path):
    np.save(path, np.zeros((5, 13), np.float32))


def damage_length(path):
    np.save(path, np.ones((4, 14), np.float32))


def damage_fields(path):
    path.write_text("{}")


DAMAGES = {
    "npy": (
        damage_with_nan,
        damage_width,
        damage_length,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ),
    "json": (
        damage_fields,
        lambda path: path.write_text("[]"),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_text(path.read_text().replace("clip0", "clip9")),
        lambda path: path.unlink(),
    ),
}


@pytest.mark.parametrize("clips", ["still there", "gone"])
def test_what_verify_says_is_a_cure(data, out, clips):
    """Follow the messages literally. The folder must be sound afterwards."""
    damages = [(suffix, damage) for suffix, kinds in DAMAGES.items() for damage in kinds]
    write_clips(data, len(damages) + 1)
    run(data, out, sample_size=800)
    whole = contents(out)
    for number, (suffix, damage) in enumerate(damages):
        damage(out / f"{number:012d}.{suffix}")
        if clips == "gone":
            (data / f"clip{number:05d}.wav").unlink()
    damage_with_nan(out / "silence.npy")
    problems = verify(out)
    assert len(problems) == len(damages) + 1
    for problem in problems:
        assert problem.endswith(("; remove it and run pre-encode again", " is missing; run pre-encode again")), problem
        if "remove it" in problem:
            (out / problem.split(": ")[0].rsplit("/")[-1]).unlink()
    report = run(data, out, sample_size=800)
    assert verify(out) == []
    if clips == "gone":
        assert (report.encoded, report.gone) == (0, [])
        assert {path.stem for path in out.glob("0*")} == {f"{len(damages):012d}"}
    else:
        assert report.encoded == len(damages)
        assert contents(out) == whole


EDITS = {
    "prompt": ["", " ", None],
    "seconds_total": [7, 0, -1, True, 10**400],
    "seconds_start": [9, -1],
    "timestamps": [[0.0, 0.5], [0.1, 1.0], [0, 0], [1.0, 0.0], [0.0], ["a", "b"], [math.nan, 1.0], [0.0, 1e-320], []],
    "sample_rate": [48000, 22050, 0, -44100, True, 10**400],
}


@pytest.mark.parametrize("field", EDITS)
@pytest.mark.parametrize("kind", ["start", "random", "full", "pad"])
def test_verify_finds_every_edited_field(data, out, field, kind):
    """The clips are shorter than `sample_size`, or longer with a whole number of seconds."""
    write_clip(data / "short.wav", 4000)
    write_clip(data / "other.wav", 4001)
    write_clip(data / "long.wav", 2 * RATE, seed=1)
    options = {"start": {}, "random": {"crop": "random", "seed": 1}, "full": {"full": True}, "pad": {"pad": True}}
    run(data, out, sample_size=RATE // 2, **options[kind])
    assert verify(out) == []
    for path in sorted(out.glob("0*.json")):
        sound = path.read_text()
        for value in EDITS[field]:
            path.write_text(json.dumps(json.loads(sound) | {field: value}))
            (problem,) = verify(out)
            assert problem.startswith(f"{path}: "), value
            assert problem.endswith("; remove it and run pre-encode again")
        path.write_text(sound)
    assert verify(out) == []


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e300, 10**400, 0.30001])
def test_verify_with_any_number_of_seconds_in_the_manifest(data, out, seconds):
    write_clips(data, 1)
    run(data, out)
    path = out / ".samekit" / "manifest-000001.jsonl"
    header, line = path.read_text().splitlines()
    path.write_text(f"{header}\n{json.dumps(json.loads(line) | {'seconds': seconds})}\n")
    (problem,) = verify(out)
    assert problem.startswith(f"{out / '000000000000.json'}: ")


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv, with which even root has no rights to a file")
@pytest.mark.parametrize("name", ["000000000000.npy", "000000000000.json", "silence.npy"])
def test_verify_does_not_ask_to_remove_what_may_only_not_be_read(data, out, name):
    write_clips(data, 1)
    run(data, out)
    (out / name).chmod(0)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    program = [*drop, sys.executable, "-m", "samekit", "check-latents", out]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    expected = f"{out / name}: cannot be opened (Permission denied); check its permissions"
    assert done.stdout.splitlines() == [expected]


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv, with which even root has no rights to a file")
@pytest.mark.parametrize(("name", "mode"), [(".", 0o311), (".", 0), (".samekit", 0)])
def test_verify_of_a_folder_that_cannot_be_listed(data, out, name, mode):
    write_clips(data, 1)
    run(data, out)
    (out / name).chmod(mode)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    program = [*drop, sys.executable, "-m", "samekit", "check-latents", out]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    (out / name).chmod(0o755)
    assert done.returncode == 2
    assert done.stderr == f"Error: {out}: cannot be listed (Permission denied); check its permissions\n"


def test_verify_counts_what_is_not_encoded_yet(data, out):
    write_clips(data, 25)
    with pytest.raises(BackendError):
        run(data, out, fake_model(raising(BackendError("out of memory; try again"))))
    problems = [problem for problem in verify(out) if "not encoded yet" in problem]
    assert len(problems) == 11
    assert "'clip00009.wav'" in problems[9]
    assert "and 15 more" in problems[10]
    run(data, out)
    assert verify(out) == []


def test_verify_without_a_manifest(tmp_path):
    with pytest.raises(InputError, match="no manifest") as error:
        verify(tmp_path)
    assert_one_line(error.value)


# --- The command --------------------------------------------------------------------------------------------


def command(*arguments):
    result = CliRunner().invoke(main, ["pre-encode", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_command(engine_of, data, out):
    write_clips(data, 3)
    (data / "clip00001.txt").unlink()
    options = ["--model", engine_of(KINDS[0]).folder, "--data_dir", data, "--output_path", out, "--threads", 1]
    result = command(*options)
    assert result.exit_code == 0
    (summary,) = result.stdout.splitlines()
    assert "3 clips (2 encoded, 1 no_caption)" in summary
    assert "this run encoded 2, " in summary
    assert "3 of 3 clips" in result.stderr
    assert "clip00001.txt" in result.stderr
    result = command(*options, "--strict")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert command("--verify", out).exit_code == 0
    assert CliRunner().invoke(main, ["check-latents", str(out)]).output == f"{out}: sound\n"
    (out / "000000000000.json").unlink()
    result = command("--verify", out)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "1 problem; see above" in result.stderr


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_stop_ends_with_one_line_and_can_be_resumed(engine_of, data, tmp_path, stop, code):
    write_clips(data, 60, samples=RATE)
    # Shells make background processes ignore Ctrl-C, and child processes inherit that.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    program += f"{SMALL_GROUPS} from samekit.cli.main import main; main()"
    arguments = [sys.executable, "-c", program, "pre-encode", "--threads", "1", "--backend", "onnxruntime"]
    arguments += ["--model", engine_of(KINDS[0]).folder, "--data_dir", data, "--output_path"]
    process = subprocess.Popen(
        [*arguments, tmp_path / "out"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None and not encoded_lines(tmp_path / "out"):
        time.sleep(0.005)
    process.send_signal(stop)
    stdout, stderr = process.communicate()
    assert process.returncode == code
    assert stdout == ""
    assert stderr.splitlines()[-1] == "stopped; run the same command again to go on"
    assert "Traceback" not in stderr
    assert "Aborted" not in stderr
    result = command(*arguments[4:], tmp_path / "out", "--json")
    assert 0 < json.loads(result.stdout)["unchanged"] < 60
    # After a run that was stopped, the total is that of the dataset.
    assert "60 of 60 clips" in result.stderr
    command(*arguments[4:], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


TWO_STOPS = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from test_dataset import fake_model, first_samples, run

calls = []

def answer(direction, array):
    calls.append(1)
    if len(calls) == 1:
        return first_samples(direction, array)
    time.sleep(0.2)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, signal.default_int_handler)
run(sys.argv[2], sys.argv[3], fake_model(answer), checksum=True, readers=2)
"""


def test_second_ctrl_c_ends_the_process(data, out):
    """The second one arrives while a thread computes the digest of a large file, so threads are still running."""
    write_clip(data / "a.wav", 100)
    write_clip(data / "b.wav", 100)
    os.truncate(data / "b.wav", 2**31)
    program = [sys.executable, "-c", TWO_STOPS, os.path.dirname(__file__), data, out]
    done = subprocess.run(program, capture_output=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGINT, done.stderr


def test_command_has_the_flags_and_defaults_of_the_reference():
    options = {option.opts[0]: option for option in main.commands["pre-encode"].params}
    defaults = {
        "--batch_size": 1,
        "--sample_size": 12582912,
        "--model_half": False,
        "--pad": False,
    }
    assert {name: options[name].get_default(click.Context(main)) for name in defaults} == defaults
    assert {"--model", "--data_dir", "--output_path"} <= set(options)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--data_dir", "x"], ["--data_dir", "x", "--output_path", "y", "--shard", "2/1"], ["--verify", "nowhere"]],
)
def test_command_that_lacks_something(arguments):
    result = command(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("paths", [("", "out"), (".", "")])
def test_empty_path_is_not_the_working_folder(tmp_path, monkeypatch, paths):
    """A shell passes an empty path for a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    result = command("--data_dir", paths[0], "--output_path", paths[1])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "needs a dataset and a folder; pass --data_dir and --output_path" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_half_model_without_its_graph_is_refused(engine_of, data, out):
    write_clips(data, 1)
    options = ["--model", engine_of(KINDS[0]).folder, "--data_dir", data, "--output_path", out, "--model_half"]
    result = command(*options, "--backend", "onnxruntime")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "no fp16 graph" in result.stderr


def test_progress_tells_speed_time_left_and_failures(data, out):
    write_clips(data, 3)
    (data / "clip00001.txt").unlink()
    seen = []
    pre_encode(fake_model(), data, out, progress=seen.append)
    assert [(progress.done, progress.total) for progress in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1].bad == 1
    line = seen[-1].describe()
    assert "3 of 3 clips" in line
    assert line.endswith(" x real time, 1 bad")
    half_way = dataclasses.replace(seen[-1], done=2, elapsed=4.0, audio_seconds=8.0)
    assert half_way.describe() == "2 of 3 clips, 8 s of audio at 2.0 x real time, 0:00:02 left, 1 bad"
    # No estimate is possible yet.
    assert "left" not in dataclasses.replace(half_way, audio_seconds=0.0).describe()


def test_torch_is_not_imported(engine_of, data, out):
    write_clips(data, 1)
    code = (
        "import sys; from samekit import AutoencoderModel; from samekit.dataset.run import pre_encode;"
        "model = AutoencoderModel.from_pretrained(sys.argv[1], 'cpu', backend='onnxruntime');"
        "pre_encode(model, sys.argv[2], sys.argv[3]);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, engine_of(KINDS[0]).folder, data, out], check=True)


def test_system_without_threads(data, out, monkeypatch):
    write_clips(data, 1)
    starts, start = [], threading.Thread.start

    def refuse(thread):
        starts.append(thread)
        if len(starts) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(BackendError, match=r"no more threads can be started here .*; pass fewer --workers") as error:
        run(data, out, readers=3)
    assert_one_line(error.value)
    monkeypatch.undo()
    assert run(data, out).encoded == 1


@pytest.mark.parametrize("full", [False, True])
def test_clips_in_work_hold_no_files_open(data, out, full):
    """A batch of 100 windows can be from 100 clips. Open files for all of them would exceed the limit."""
    lengths = [100 + 8 * index for index in range(150)]
    for index, samples in enumerate(lengths):
        write_clip(data / f"{index:03d}.wav", 126 * FAKE_HOP + samples, seed=index)
    code = (
        "import os, resource, sys; sys.path.insert(0, sys.argv[1]); from test_dataset import run;"
        "soft = len(os.listdir('/proc/self/fd')) + 20;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft));"
        "report = run(sys.argv[2], sys.argv[3], batch_size=100, readers=4, full=sys.argv[4] == 'True');"
        "print(report.statuses, report.bad[:1])"
    )
    program = [sys.executable, "-c", code, os.path.dirname(__file__), data, out, str(full)]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.stdout == "{'encoded': 150} []\n", result.stderr
    run(data, out.with_name("single"), full=full)
    assert contents(out.with_name("single")) == contents(out)


def test_readers_are_no_more_than_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5})
    assert LocalExecutor(fake_model().autoencoder).readers == 2


# --- At size ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_clips_cost_the_same_each(engine_of, data, out):
    first = write_clip(data / "clip00000.wav", 2000)
    for index in range(1, 10_000):
        shutil.copyfile(first, data / f"clip{index:05d}.wav")
        (data / f"clip{index:05d}.txt").write_text(f"caption {index}")
    times, memory, process = [], [], psutil.Process()

    def note(progress):
        times.append(progress.elapsed)
        if progress.done % 500 == 0:
            memory.append(process.memory_info().rss)

    model = AutoencoderModel.from_pretrained(engine_of(KINDS[0]).folder, "cpu", threads=1)
    report = pre_encode(model, data, out, PreEncodeOptions(), note)
    assert report.encoded == 10_000
    early, late = times[2999] - times[999], times[9999] - times[7999]
    growth = (memory[-1] - memory[3]) / 2**20
    command = [
        sys.executable,
        "-c",
        "from samekit.cli.main import main; main()",
        "pre-encode",
        "--backend",
        "onnxruntime",
    ]
    command += ["--model", engine_of(KINDS[0]).folder, "--data_dir", data, "--output_path", out]
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    again = time.monotonic() - start
    print(f"2,000 clips: early {early:.2f} s, late {late:.2f} s; memory +{growth:.1f} MiB; done run {again:.2f} s")
    assert late < 1.5 * early
    assert growth < 20
    assert again < 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["same-s", "same-l"])
def test_full_size_latents_are_those_of_the_definition(engine_of, data, out, name):
    model = AutoencoderModel.from_pretrained(engine_of(name).folder, "cpu")
    for index, samples in enumerate((2000, 3 * RATE, 7 * RATE)):
        write_clip(data / f"{index}.wav", samples, seed=index)
    run(data, out, model)
    for number in range(3):
        latents, metadata = pair(out, number)
        audio = prepared(metadata["path"])
        kept = math.ceil(audio.shape[1] / HOP)
        assert_close(one_pass(model, audio, kept + 64)[:, :kept], latents, EXACT_DB)
    silence = np.load(out / "silence.npy")
    assert silence.shape == (1, model.latent_dim, 3072)
    direct = one_pass(model, np.zeros((2, 0), np.float32), 64)
    assert_close(direct[:, :32], silence[0, :, :32], EXACT_DB)
    assert_close(direct[:, -32:], silence[0, :, -32:], EXACT_DB)
