"""Clips are written in groups: a power cut costs the last group, and what is recorded or visible is whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import time

import numpy as np
import pytest
from faults import PowerCuts, contents
from test_dataset import fake_model, first_samples, rows_of, write_clip, write_clips
from test_dataset import run as run_any
from test_latents import sa3_array

from samekit.dataset.check import verify
from samekit.dataset.options import PreEncodeOptions
from samekit.dataset.output import FolderOutput, GroupLimits
from samekit.dataset.run import pre_encode
from samekit.errors import InputError, OutputError
from samekit.files.paths import file_signature

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs the names of open files")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(FolderOutput, "group_limits", GroupLimits(clips=3))


def run(data, out, sample_size=400, **options):
    return run_any(data, out, sample_size=sample_size, **options)


def restored(folder, files):
    """Write files to a folder that is empty or missing."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pairs_of(files):
    """Return the `.npy` and the `.json` of each clip that has a `.json`."""
    return {
        name: (files.get(f"{name[:-5]}.npy"), data)
        for name, data in files.items()
        if name.endswith(".json") and "/" not in name
    }


@pytest.mark.parametrize("begun", [False, True])
def test_power_cut_at_any_step(data, tmp_path, begun):
    out, whole, after = tmp_path / "out", tmp_path / "whole", tmp_path / "after"
    write_clips(data, 7)
    out.mkdir()
    older = {}
    if begun:
        run(data, out)
        older = contents(out)
        # Other latents and other metadata of two clips, a clip that turns bad, and a new clip before the others.
        write_clip(data / "clip00001.wav", 300, seed=50, caption="another caption")
        write_clip(data / "clip00005.wav", 300, seed=51, caption="yet another one")
        (data / "clip00003.txt").unlink()
        write_clip(data / "a.wav", 100)
    run(data, restored(whole, older))
    valid = [*pairs_of(older).items(), *pairs_of(contents(whole)).items()]
    done = [0]

    def work():
        options = PreEncodeOptions(sample_size=400, readers=1)
        pre_encode(fake_model(), data, out, options, lambda progress: done.append(progress.done))

    cuts = PowerCuts(out, random.Random(0)).outcomes(work, moment=lambda: done[-1])
    assert contents(out) == contents(whole)
    assert len(cuts) > 30
    losses = set()
    for finished, files in cuts:
        # A .json file that can be seen belongs to the .npy file beside it.
        assert all(pair in valid for pair in pairs_of(files).items())
        restored(after, files)
        if ".samekit/manifest-000001.jsonl" in files:
            rows = rows_of(after)
            encoded = [row for row in rows.values() if row.status == "encoded"]
            assert begun or all(
                files[name] == contents(whole)[name] for row in encoded for name in row.files("numbered")
            )
            losses.add(finished)
            assert begun or len(encoded) >= finished
        else:
            assert finished == 0
        run(data, after)
        assert contents(after) == contents(whole)
    # Power was cut after each number of clips that progress has shown at the end of a group.
    assert begun or {0, 3, 6} <= losses


def test_groups_are_recorded_when_their_files_are_whole(data, out):
    """Another program that looks into the folder finds whole pairs only, and progress counts whole groups."""
    write_clips(data, 8)
    seen = []

    def look(progress):
        visible = pairs_of(contents(out))
        for npy, text in visible.values():
            assert npy is not None
            assert json.loads(text)["prompt"].startswith("caption ")
        seen.append((progress.done, len(visible), sum(row.status == "encoded" for row in rows_of(out).values())))

    pre_encode(fake_model(), data, out, PreEncodeOptions(sample_size=400, readers=1), look)
    assert seen == [(1, 3, 3), (2, 3, 3), (3, 3, 3), (4, 6, 6), (5, 6, 6), (6, 6, 6), (7, 8, 8), (8, 8, 8)]


@pytest.mark.parametrize(
    ("limits", "groups"),
    [
        (GroupLimits(clips=5), [5, 5, 2]),
        (GroupLimits(size=4 * 13 * 4 * 4), [4, 4, 4]),
        (GroupLimits(seconds=0.0, clips=10), None),
    ],
)
def test_group_ends_at_the_first_limit(data, out, monkeypatch, limits, groups):
    for index in range(12):
        write_clip(data / f"{index:02d}.wav", 100, seed=index)
    monkeypatch.setattr(FolderOutput, "group_limits", limits)
    sizes, append = [], FolderOutput.append

    def count(output, name, lines):
        sizes.append(lines.count(b"\n"))
        return append(output, name, lines)

    monkeypatch.setattr(FolderOutput, "append", count)
    assert run(data, out, readers=1).encoded == 12
    assert sizes == groups or (groups is None and sum(sizes) == 12)


def test_slow_clip_does_not_delay_the_record_of_those_before(data, out, monkeypatch):
    monkeypatch.setattr(FolderOutput, "group_limits", GroupLimits(seconds=0.2))
    write_clips(data, 3)
    progress, moments = [], []

    def answer(direction, array):
        if len(moments) == 3:
            # The first two clips are recorded while the third one is encoded.
            deadline = time.monotonic() + 20
            while len(progress) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert [seen.done for seen in progress] == [1, 2]
        moments.append(1)
        return first_samples(direction, array)

    pre_encode(fake_model(answer), data, out, PreEncodeOptions(sample_size=400, readers=1), progress.append)
    assert len(progress) == 3


@pytest.mark.parametrize(("limits", "clips"), [(GroupLimits(size=1), 1), (GroupLimits(clips=8), 8)])
def test_encoder_waits_for_a_slow_disk(data, out, monkeypatch, limits, clips):
    """While one group is written, the clips of another one are encoded, and one more."""
    monkeypatch.setattr(FolderOutput, "group_limits", limits)
    write_clips(data, 30)
    encoded, at_first = [], []

    def answer(direction, array):
        encoded.append(1)
        return first_samples(direction, array)

    def be_slow(progress):
        if progress.done == 1:
            time.sleep(0.5)
            at_first.append(len(encoded))

    pre_encode(fake_model(answer), data, out, PreEncodeOptions(sample_size=400, readers=1), be_slow)
    silence = 1
    assert at_first[0] - silence == 2 * clips + 1


def test_latents_of_a_dataset_are_read_by_the_rules_of_sa3(data, out):
    """One window and several windows per clip, without and with padding."""
    for pad in (False, True):
        folder = out / str(pad)
        write_clip(data / "short.wav", 100)
        write_clip(data / "long.wav", 8 * 300)
        run(data, folder, pad=pad, sample_size=8 * 300)
        for number in range(2):
            path = folder / f"{number:012d}.npy"
            latents = sa3_array(path)
            assert np.array_equal(latents, np.load(path))
            lines = path.with_suffix(".json").read_text().splitlines()
            fields = json.loads("".join(lines))
            # One line a field, also for the mask.
            assert len(lines) == len(fields) + 2
            assert len(fields["padding_mask"]) == latents.shape[1]


def test_what_is_no_file_is_not_replaced(data, out):
    """The clips before it are recorded, and the error names it."""
    write_clips(data, 6)
    out.mkdir()
    os.mkfifo(out / "000000000004.json")
    (out / "000000000001.json").symlink_to(data / "clip00000.txt")
    with pytest.raises(InputError, match="which no manifest lists"):
        run(data, out)
    for path in out.glob("0*"):
        path.unlink()
    run(data, out)
    whole = contents(out)
    for number in (1, 4):
        (out / f"{number:012d}.json").unlink()
    os.mkfifo(out / "000000000004.npy.new")
    os.replace(out / "000000000004.npy.new", out / "000000000004.npy")
    (out / "000000000001.json").symlink_to(data / "clip00000.txt")
    (data / "clip00001.txt").write_text("another caption")
    # One reader, so that clip 1 is complete before clip 4.
    with pytest.raises(OutputError, match=r"000000000004\.npy: is not a regular file"):
        run(data, out, readers=1)
    assert rows_of(out)["clip00001.wav"].captions == (("txt", *file_signature(data / "clip00001.txt")),)
    # The link was replaced, and its target was not changed.
    assert (data / "clip00000.txt").read_text() == "caption 0"
    (out / "000000000004.npy").unlink()
    (data / "clip00001.txt").write_text("caption 1")
    run(data, out)
    assert contents(out).keys() == whole.keys()
    assert {name: text for name, text in contents(out).items() if name[0] == "0"} == {
        name: text for name, text in whole.items() if name[0] == "0"
    }


@pytest.mark.parametrize("layout", ["numbered", "mirror"])
def test_output_is_the_working_folder(data, out, monkeypatch, layout):
    write_clip(data / "a.wav", 100)
    out.mkdir()
    monkeypatch.chdir(out)
    assert run(data, ".", layout=layout).encoded == 1
    write_clip(data / "b.wav", 100)
    assert run(data, ".", layout=layout).encoded == 1
    assert verify(".") == []
