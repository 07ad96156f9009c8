"""Folders of latents in the mirror layout, and readers written after the rules of the programs that read them.

The facts and where they are from:

* services/sa3/dataset_processing/pre_encode.py of betweentwomidnights/gary-localhost-installer at commit 6081cab, and
  optimized/mlx/scripts/pre_encode_mlx.py of Stability-AI/stable-audio-3 at commit cf8194c, write mirrored folders.
  `relpath` is that of the .npy file, `src_relpath` that of the audio. `audio_samples` and `seconds_total`, rounded to
  three decimals, are of the part that was encoded. `latent_shape` is that of the file.
* `train_load_latent_dir` in train_latents.h of sa3.cpp reads them: `<f4` in C order, [width, latents]; it skips
  silence.npy and names that begin with a dot; the last 1 of the mask is the last latent of the clip.
* `get_latent_filenames` and `PreEncodedDataset` of stable_audio_3/data/dataset.py at commit 7fb8916 read any folder:
  each .npy whose name does not begin with a dot, except silence.npy, in hidden folders too; the metadata is found by
  replacing each `.npy` in the path with `.json`; `padding_mask`, `seconds_total` and `prompt` are required.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from faults import KILLED, contents
from helpers import HOP, KINDS, RATE, assert_one_line
from test_dataset import command, prepared, rows_of, run, write_clip, write_clips

from samekit.dataset.check import verify
from samekit.dataset.file_names import mirrored_name
from samekit.dataset.options import Shard
from samekit.dataset.output import FolderOutput
from samekit.errors import InputError, OutputError

MIRROR = {"layout": "mirror"}


def files_below(folder):
    """Return the relative paths of all files that are not hidden."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not path.parts[0].startswith("."))


def as_trainers_read(folder):
    """Read a mirrored folder as sa3.cpp does; yield the relative path, the latents of the clip and the metadata."""
    for path in sorted(folder.rglob("*.npy")):
        if path.stem == "silence" or path.name.startswith(".") or not path.with_name(f"{path.stem}.json").exists():
            continue
        latents = np.load(path, allow_pickle=False)
        assert latents.dtype == np.dtype("<f4")
        assert latents.flags.c_contiguous
        info = json.loads(path.with_name(f"{path.stem}.json").read_text())
        valid = max(index for index, one in enumerate(info["padding_mask"]) if one) + 1
        yield path.relative_to(folder).as_posix(), latents[:, :valid], info


def as_reference_reads(folder):
    """Read a folder as the reference's dataset does; yield the path, the latents, the mask and the prompt."""
    for path in sorted(folder.rglob("*.npy")):
        if path.name.startswith(".") or path.name == "silence.npy":
            continue
        latents = np.load(path)
        info = json.loads(Path(str(path).replace(".npy", ".json")).read_text())
        assert len(info["padding_mask"]) == latents.shape[1]
        assert info["padding_mask"][::-1].index(1) >= 0
        assert info["seconds_total"] > 0
        yield path, latents, info["padding_mask"], info["prompt"]


@pytest.fixture
def songs(data):
    for index, name in enumerate(("a.wav", "sub/b.c.flac", "sub/deep/x y.ogg", "ünder/d.WAV")):
        path = data / name
        write_clip(path.with_suffix(path.suffix.lower()), 20_000 + 3000 * index, seed=index, caption=f"song {index}")
        if path.suffix.isupper():
            path.with_suffix(".wav").rename(path)
    return data


# --- What is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [False, True])
def test_folder_is_what_trainers_read(model_of, songs, out, pad):
    (songs / "sub" / "b.c.json").write_text(json.dumps({"prompt": "from json", "bpm": 120, "artist": "Someone"}))
    model = model_of(KINDS[0], "onnxruntime")
    run(songs, out, model, sample_size=7 * HOP, pad=pad, **MIRROR)
    run(songs, out.with_name("numbers"), model, sample_size=7 * HOP, pad=pad)
    found = {name: (latents, info) for name, latents, info in as_trainers_read(out)}
    sources = {f"{mirrored_name(relpath)}.npy": relpath for relpath in rows_of(out)}
    assert set(found) == set(sources) == {"a.npy", "sub/b.c.npy", "sub/deep/x y.npy", "ünder/d.npy"}
    numbered = {info["relpath"]: (path, info) for path, info in numbered_pairs(out.with_name("numbers"))}
    for name, (latents, info) in found.items():
        samples = min(prepared(songs / sources[name]).shape[1], 7 * HOP)
        assert info["relpath"] == name
        assert info["src_relpath"] == sources[name]
        assert info["path"] == str(songs / sources[name])
        assert info["audio_samples"] == samples
        assert info["seconds_total"] == round(samples / RATE, 3)
        assert info["seconds_start"] == 0
        assert latents.shape[1] == math.ceil(samples / HOP)
        assert info["latent_shape"] == [latents.shape[0], 7 if pad else latents.shape[1]]
        path, other = numbered[sources[name]]
        assert (out / name).read_bytes() == path.read_bytes()
        assert (info["prompt"], info["padding_mask"]) == (other["prompt"], other["padding_mask"])
    fields = found["sub/b.c.npy"][1]
    assert (fields["prompt"], fields["bpm"], fields["artist"]) == ("from json", 120, "Someone")
    assert verify(out) == []


def numbered_pairs(folder):
    for path, *_ in as_reference_reads(folder):
        yield path, json.loads(path.with_suffix(".json").read_text())


@pytest.mark.parametrize("layout", ["numbered", "mirror"])
def test_folder_is_what_the_reference_reads(model_of, songs, out, layout):
    run(songs, out, model_of(KINDS[0], "onnxruntime"), sample_size=20 * HOP, layout=layout)
    found = list(as_reference_reads(out))
    assert sorted(prompt for *_, prompt in found) == [f"song {index}" for index in range(4)]
    silence = np.load(out / "silence.npy").squeeze(0)
    for _, latents, mask, _ in found:
        assert latents.shape[0] == silence.shape[0]
        assert mask == [1] * latents.shape[1]
    assert silence.shape[1] == 20


# --- Continue, change and check ---------------------------------------------------------------------------------


def test_second_run_encodes_only_what_is_new_changed_or_lost(songs, out):
    assert run(songs, out, **MIRROR).encoded == 4
    before = contents(out)
    assert run(songs, out, **MIRROR).unchanged == 4
    assert contents(out) == before
    (out / "sub" / "b.c.json").unlink()
    (out / "sub" / "deep" / "x y.npy").unlink()
    write_clip(songs / "new" / "e.wav", 500)
    assert run(songs, out, **MIRROR).encoded == 3
    assert {name: data for name, data in contents(out).items() if name in before and ".samekit" not in str(name)} == {
        name: data for name, data in before.items() if ".samekit" not in str(name)
    }
    assert verify(out) == []


def test_clip_that_turned_bad_or_left_leaves_no_half_of_a_pair(songs, out):
    run(songs, out, **MIRROR)
    (songs / "sub" / "b.c.flac").write_bytes(b"this is no audio")
    (songs / "sub" / "deep" / "x y.ogg").unlink()
    (out / "sub" / "deep" / "x y.json").unlink()
    assert run(songs, out, **MIRROR).statuses == {"encoded": 2, "unreadable": 1}
    assert files_below(out) == ["a.json", "a.npy", "silence.npy", "ünder/d.json", "ünder/d.npy"]
    assert verify(out) == []


@pytest.mark.parametrize("shards", [1, 3])
def test_clip_that_takes_the_place_of_another_takes_its_files(data, out, shards):
    """For example, the audio was converted. The old clip must not make training see two."""
    for index in range(12):
        write_clip(data / f"{index}.wav", 100 + index, seed=index)

    def run_all():
        return [run(data, out, shard=Shard(index, shards), **MIRROR) for index in range(1, shards + 1)]

    run_all()
    for index in range(12):
        (data / f"{index}.wav").unlink()
        write_clip(data / f"{index}.flac", 300 + index, seed=index)
    assert sum(report.encoded for report in run_all()) == 12
    assert verify(out) == []
    assert sum(report.unchanged for report in run_all()) == 12
    write_clip(data / "0.flac", 100, level=1e-6)
    run_all()
    assert not (out / "0.npy").exists()
    assert verify(out) == []


@pytest.mark.parametrize("names", [("a.wav", "a.flac"), ("a.wav", "A.ogg"), ("sub/a.wav", "Sub/a.wav"), "NFC and NFD"])
def test_clips_that_would_share_their_files_are_refused(data, out, names):
    if names == "NFC and NFD":
        names = [f"{unicodedata.normalize(form, 'é')}.wav" for form in ("NFC", "NFD")]
    for name in names:
        write_clip(data / name, 100)
    with pytest.raises(InputError, match="would have the same files in the mirror layout; rename one") as error:
        run(data, out, **MIRROR)
    assert_one_line(error.value)
    assert all(name in str(error.value) for name in names)
    assert not out.exists()
    # The numbered layout takes them.
    assert run(data, out).encoded == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("silence.wav", "means the latents of silence"),
        ("sub/Silence.flac", "means the latents of silence"),
        ("a.npy.wav", "takes .npy in a path"),
        ("x.npy/a.wav", "takes .npy in a path"),
        ("x.json/a.wav", "takes .npy in a path"),
        (".hidden.wav", "skips hidden files"),
        (".samekit/a.wav", "skips hidden files"),
        (f"{'n' * 251}.wav", "too long"),
    ],
)
def test_names_that_have_another_meaning_are_refused(data, out, name, reason):
    write_clip(data / "ok.wav", 100)
    write_clip(data / name, 100, caption=None)
    (data / "filelist.txt").write_text(f"ok.wav\n{name}\n")
    with pytest.raises(InputError, match=reason) as error:
        run(data, out, **MIRROR)
    assert_one_line(error.value)
    assert "--layout numbered" in str(error.value)
    assert not out.exists()


def test_long_names_that_begin_alike(data, out):
    stems = [f"{'n' * 240}{end}" for end in "ab"]
    for stem in stems:
        write_clip(data / f"{stem}.wav", 100)
    assert run(data, out, **MIRROR).encoded == 2
    names = {name for name in contents(out) if name.startswith("n")}
    assert names == {f"{stem}.{suffix}" for stem in stems for suffix in ("npy", "json")}


@pytest.mark.parametrize("relpath", ["../a.wav", "/tmp/a.wav", "x/../../a.wav"])
def test_manifest_that_leads_out_of_the_folder_is_damaged(data, out, relpath):
    write_clips(data, 2)
    run(data, out, **MIRROR)
    manifest = out / ".samekit" / "manifest-000001.jsonl"
    manifest.write_text(manifest.read_text().replace('"clip00000.wav"', json.dumps(relpath)))
    for attempt in (
        lambda: run(data, out, **MIRROR),
        lambda: run(data, out, reencode=True, **MIRROR),
        lambda: verify(out),
    ):
        with pytest.raises(InputError, match="is damaged") as error:
            attempt()
        assert_one_line(error.value)


def test_layout_of_a_folder_cannot_change(songs, out):
    run(songs, out, **MIRROR)
    before = contents(out)
    for options in ({}, {"reencode": True}):
        with pytest.raises(
            InputError, match="has the layout mirror; pass --layout mirror, or another --output_path"
        ) as error:
            run(songs, out, **options)
        assert_one_line(error.value)
    assert contents(out) == before
    with pytest.raises(InputError, match=r"other settings \(sample_size 12582912 there, 800 here"):
        run(songs, out, sample_size=800, **MIRROR)
    assert run(songs, out, sample_size=800, reencode=True, **MIRROR).encoded == 4
    assert verify(out) == []


def test_folder_with_latents_of_others_is_refused(songs, out):
    (out / "sub").mkdir(parents=True)
    np.save(out / "sub" / "theirs.npy", np.zeros((4, 3), np.float32))
    with pytest.raises(InputError, match=r"holds sub/theirs\.npy, which no manifest lists"):
        run(songs, out, **MIRROR)


@pytest.mark.parametrize("begun", [False, True])
def test_files_of_the_user_are_not_replaced(data, begun):
    """The folder `json` beside the audio holds captions. A bad clip would delete its caption there."""
    wav, captions = data / "wav", data / "json"
    write_clip(wav / "a.wav", 100)
    captions.mkdir()
    if begun:
        run(wav, captions, **MIRROR)
    (wav / "b.wav").write_bytes(b"no audio")
    (captions / "b.json").write_text('{"prompt": "words", "list": [1]}')
    (captions / "notes.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(InputError, match=r"json: holds b\.json, which no manifest lists; pass another") as error:
            run(wav, captions, **MIRROR)
    assert_one_line(error.value)
    assert (captions / "b.json").read_text() == '{"prompt": "words", "list": [1]}'
    (captions / "b.json").unlink()
    assert run(wav, captions, **MIRROR).statuses == {"encoded": 1, "no_caption": 1}
    assert (captions / "notes.json").read_text() == "{}"


def test_folder_that_is_a_link_is_not_written_into(songs, out, tmp_path):
    """Output folders are untrusted, so their links must not decide which files are overwritten."""
    (tmp_path / "precious").mkdir()
    out.mkdir()
    (out / "sub").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="sub: is a link; remove it") as error:
        run(songs, out, **MIRROR)
    assert_one_line(error.value)
    assert list((tmp_path / "precious").iterdir()) == []


def test_verify_finds_damage_in_mirrored_folders(songs, out):
    run(songs, out, **MIRROR)
    assert verify(out) == []
    (out / "notes.json").write_text("{}")
    assert verify(out) == []
    path = out / "sub" / "b.c.json"
    info = json.loads(path.read_text())
    changes = {
        "src_relpath": "other.flac",
        "relpath": "sub/b.c.flac",
        "audio_samples": 5,
        "seconds_total": 1,
        "latent_shape": [4, 5],
        "padding_mask": [1],
        "seconds_start": 3,
        "model_sha256": "other",
        "prompt": " ",
    }
    for name, value in changes.items():
        path.write_text(json.dumps({**info, name: value}))
        (problem,) = verify(out)
        assert problem.startswith(f"{path}: ")
    path.write_text(json.dumps(info))
    np.save(out / "sub" / "foreign.npy", np.zeros((4, 3), np.float32))
    (out / "sub" / ".b.c.npy.1-abcdef01ab.tmp").touch()
    (out / "sub" / "deep" / "x y.npy").unlink()
    problems = "\n".join(verify(out))
    for text in ("foreign.npy: belongs to no clip", "tmp: is an unfinished file", "x y.npy: is missing"):
        assert text in problems
    (out / "sub" / "foreign.npy").unlink()
    run(songs, out, **MIRROR)
    assert verify(out) == []


def test_random_parts_and_flips_of_mirrored_clips_are_verified(data, out):
    for index in range(6):
        write_clip(data / f"{index}.wav", 3 * RATE, seed=index)
    run(data, out, sample_size=RATE, crop="random", flip="random", seed=4, **MIRROR)
    assert verify(out) == []
    info = json.loads((out / "0.json").read_text())
    assert (info["audio_samples"], info["seconds_total"]) == (RATE, 1.0)


# --- Shards, clusters, URLs, kills ------------------------------------------------------------------------------


def test_shards_make_up_the_whole_in_the_mirror_layout(data, out):
    for index in range(20):
        write_clip(data / f"sub{index % 3}" / f"{index}.wav", 100 + index, seed=index)
    whole = out.with_name("whole")
    run(data, whole, **MIRROR)
    for index in (2, 1, 3):
        # What a killed shard left is removed by that shard alone.
        (out / "sub0").mkdir(parents=True, exist_ok=True)
        (out / "sub0" / ".0.npy.1-abcdef01ab.tmp").touch()
        run(data, out, shard=Shard(index, 3), **MIRROR)
    owner = next(index for index in (1, 2, 3) if Shard(index, 3).contains("sub0/0.wav", "mirror"))
    run(data, out, shard=Shard(owner, 3), **MIRROR)
    assert verify(out) == []
    assert files_below(out) == files_below(whole)
    for name in files_below(out):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_url_holds_what_a_folder_holds_in_the_mirror_layout(songs, out, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    bucket = f"memory://{tmp_path.name}"
    assert run(songs, bucket, **MIRROR).encoded == 4
    assert run(songs, bucket, **MIRROR).unchanged == 4
    run(songs, out, **MIRROR)
    files, root = fsspec.core.url_to_fs(bucket)
    found = {name.removeprefix(root).lstrip("/"): files.cat_file(name) for name in files.find(root)}
    found = {name: data for name, data in found.items() if not name.startswith(".samekit")}
    assert found == {name: (out / name).read_bytes() for name in files_below(out)}
    (songs / "sub" / "b.c.flac").write_bytes(b"no audio")
    assert run(songs, bucket, **MIRROR).statuses == {"encoded": 3, "unreadable": 1}
    assert not files.exists(f"{root}/sub/b.c.npy")


def test_killed_runs_leave_the_same_mirrored_folder(engine_of, songs, tmp_path, faults):
    for index in range(6):
        write_clip(songs / "more" / f"{index}.wav", RATE // 2, seed=9 + index)
    arguments = ["--model", engine_of(KINDS[0]).folder, "--data_dir", songs, "--layout", "mirror"]
    arguments += ["--target-latent-rms", "0.9", "--output_path"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command(*arguments, whole).exit_code == 0
    program = [sys.executable, "-m", "samekit", "pre-encode", *map(str, [*arguments, out])]
    for kills in range(5):
        process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(out.rglob("*.npy"))) > 1 + 2 * kills:
                break
            time.sleep(0.002)
        process.kill()
        if process.wait() == KILLED:
            faults["kills"] += 1
    assert command(*arguments, out).exit_code == 0
    for name in files_below(whole):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert files_below(out) == files_below(whole)
    assert verify(out) == []


def test_listing_of_many_folders_is_cheap(tmp_path):
    for folder in range(100):
        below = tmp_path / f"artist{folder // 10}" / f"album{folder}"
        below.mkdir(parents=True)
        for index in range(20):
            (below / f"{index}.npy").touch()
    (tmp_path / ".samekit").mkdir()
    (tmp_path / ".samekit" / "report.json").touch()
    begin = time.process_time()
    assert len(FolderOutput(tmp_path).tree()) == 2000
    assert time.process_time() - begin < 0.1
