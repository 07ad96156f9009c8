"""`pre-encode --prune`, `--dry-run` and `--reencode`, and what `check-latents` says of a folder without latents."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from faults import contents
from helpers import KINDS, RATE, assert_one_line
from test_dataset import command, fake_model, rows_of, run, write_clip, write_clips

from samekit.cli.main import main
from samekit.dataset import PreEncodeOptions
from samekit.dataset.check import verify
from samekit.dataset.run import plan
from samekit.errors import InputError

LAYOUTS = pytest.mark.parametrize("layout", ["numbered", "mirror"])


@pytest.fixture
def arguments(engine_of, data, out):
    """Arguments of `pre-encode` for a real model."""
    model = ["--model", engine_of(KINDS[0]).folder, "--backend", "onnxruntime", "--threads", 1]
    return [*model, "--data_dir", data, "--output_path", out]


# --- Clips that left the dataset ---------------------------------------------------------------------------


@LAYOUTS
def test_prune_removes_the_latents_of_clips_that_left(arguments, data, out, layout):
    write_clips(data, 3)
    assert command(*arguments, "--layout", layout).exit_code == 0
    # Files of the user, which no run wrote.
    notes = {"notes.json": "{}", "clip00001.notes.npy": "mine", "clip00001.txt": "words"}
    for name, text in notes.items():
        (out / name).write_text(text)
    before = contents(out)
    (data / "clip00001.wav").unlink()
    result = command(*arguments, "--layout", layout)
    assert "latents of 1 clip that left the dataset (clip00001.wav); --prune removes them" in result.stdout
    name = "clip00001" if layout == "mirror" else f"{1:012d}"
    assert (out / f"{name}.npy").is_file()

    result = command(*arguments, "--layout", layout, "--prune")
    assert "; removed the latents of 1 clip that left the dataset" in result.stdout
    removed = {f"{name}.npy", f"{name}.json"}
    assert not removed & set(contents(out))
    kept = {name: data for name, data in contents(out).items() if not name.startswith(".samekit")}
    assert kept == {n: d for n, d in before.items() if n not in removed and not n.startswith(".samekit")}
    assert rows_of(out)["clip00001.wav"].status == "gone"
    report = json.loads((out / ".samekit" / "report.json").read_text(encoding="utf-8"))
    assert report["gone"] == []
    assert "left the dataset" not in command(*arguments, "--layout", layout, "--prune").stdout
    # A clip that comes back has its old number.
    write_clip(data / "clip00001.wav", 100)
    assert "this run encoded 1, " in command(*arguments, "--layout", layout).stdout
    assert (out / f"{name}.npy").is_file()


def test_prune_in_the_mirror_keeps_files_that_another_clip_has_taken(data, out):
    write_clips(data, 2)
    run(data, out, layout="mirror")
    (data / "clip00001.wav").rename(data / "clip00001.wave")
    shutil.copyfile(data / "clip00000.wav", data / "clip00001.flac.wav")
    (data / "clip00001.wave").unlink()
    write_clip(data / "clip00001.aiff", 150, seed=9)
    (data / "clip00001.flac.wav").unlink()
    for _ in range(2):
        report = run(data, out, layout="mirror", prune=True)
        assert report.statuses == {"encoded": 2}
    assert json.loads((out / "clip00001.json").read_text())["src_relpath"] == "clip00001.aiff"
    assert verify(out) == []


@LAYOUTS
def test_prune_can_be_killed_anywhere(data, out, layout):
    """Files go before the line of the manifest, so a run after a killed one completes the work."""
    write_clips(data, 3)
    run(data, out, layout=layout)
    for name in ("clip00001.wav", "clip00002.wav"):
        (data / name).unlink()
    # As after a run that was killed behind its first removed file.
    name = "clip00001" if layout == "mirror" else f"{1:012d}"
    (out / f"{name}.json").unlink()
    report = run(data, out, layout=layout, prune=True)
    assert (report.pruned, report.gone) == (2, [])
    assert [path.suffix for path in out.glob("*0*.*")]
    assert len(list(out.glob("*.json"))) == 1
    assert verify(out) == []


def test_prune_of_one_shard_leaves_the_others(data, out):
    from samekit.dataset.options import Shard

    write_clips(data, 8)
    for index in (1, 2):
        run(data, out, shard=Shard(index, 2))
    before = contents(out)
    mine = [path for path in sorted(data.glob("*.wav")) if Shard(1, 2).contains(path.name, "numbered")]
    other = [path for path in sorted(data.glob("*.wav")) if path not in mine]
    mine[0].unlink()
    other[0].unlink()
    assert run(data, out, shard=Shard(1, 2), prune=True).pruned == 1
    lost = {name for name in set(before) - set(contents(out)) if not name.startswith(".samekit")}
    assert len(lost) == 2
    assert run(data, out, shard=Shard(2, 2)).gone == [other[0].name]


def test_prune_is_refused_where_a_folder_cannot_be_read(data, out, monkeypatch):
    from test_dataset_sources import refuse_listing

    write_clips(data, 1)
    write_clip(data / "deep" / "x.wav", 100)
    run(data, out)
    before = contents(out)
    refuse_listing(monkeypatch, {"deep"}, PermissionError(13, "Permission denied"))
    with pytest.raises(
        InputError, match=r"deep/x\.wav: its folder cannot be read, so it would count as gone; "
    ) as error:
        run(data, out, prune=True)
    assert_one_line(error.value)
    assert contents(out) == before


def test_prune_works_beside_a_folder_that_never_could_be_read(data, out, monkeypatch):
    """Such as `lost+found` at the root of a disk."""
    from test_dataset_sources import refuse_listing

    write_clips(data, 2)
    (data / "lost+found").mkdir()
    refuse_listing(monkeypatch, {"lost+found"}, PermissionError(13, "Permission denied"))
    run(data, out)
    (data / "clip00000.wav").unlink()
    assert run(data, out, prune=True).pruned == 1


def test_prune_is_refused_where_a_folder_is_empty(data, out):
    """The folder of a disk that is not mounted is empty."""
    disk = data.with_name("disk")
    write_clips(data, 1)
    write_clip(disk / "b.wav", 100)
    run([data, disk], out)
    before = contents(out)
    for path in disk.iterdir():
        path.unlink()
    for start in (run, planned):
        with pytest.raises(InputError, match="disk: holds no audio, so its clips would count as gone; mount it, or"):
            start([data, disk], out, prune=True)
    assert contents(out) == before
    assert run(data, out, prune=True).pruned == 1


# --- A dry run ---------------------------------------------------------------------------------------------


@LAYOUTS
def test_dry_run_says_what_would_be_done_and_writes_nothing(arguments, data, out, layout):
    write_clips(data, 3, samples=RATE)
    dry = [*arguments, "--layout", layout, "--dry-run"]
    result = command(*dry)
    assert result.exit_code == 0, result.output
    hours = f"{3 * RATE / RATE / 3600:.2f}"
    told = rf"{re.escape(str(out))}: 3 of 3 clips would be encoded, {hours} hours of audio, in about 0:\d\d:\d\d; "
    assert re.fullmatch(rf"{told}nothing was written\n", result.stdout)
    assert not out.exists() or list(out.iterdir()) == []
    command(*arguments, "--layout", layout)
    before = contents(out)
    (data / "clip00001.wav").unlink()
    write_clip(data / "new.wav", 2 * RATE)
    for prune, fate in (([], "would stay; --prune removes them"), (["--prune"], "would be removed")):
        shown = command(*dry, *prune).stdout
        assert "1 of 3 clips would be encoded" in shown
        assert f"; latents of 1 clip that left the dataset (clip00001.wav) {fate}; " in shown
    found = json.loads(command(*dry, "--json").stdout)
    assert (found["clips"], found["due"], found["gone"], found["unknown"]) == (3, 1, 1, 0)
    assert found["audio_seconds"] == pytest.approx(2, abs=0.2)
    assert found["estimated_seconds"] > 0
    assert contents(out) == before


def planned(data, out, **options):
    return plan(fake_model(), data, out, PreEncodeOptions(**options))


def test_dry_run_into_a_data_folder_is_refused_too(data):
    write_clips(data, 1)
    for start in (planned, run):
        with pytest.raises(InputError, match="is a --data_dir too; pass another --output_path"):
            start(data, data)


@LAYOUTS
@pytest.mark.parametrize("fate", ["stay", "prune", "reencode"])
def test_plan_and_report_agree_on_clips_that_left(data, out, layout, fate):
    write_clips(data, 4)
    run(data, out, layout=layout)
    for index in (1, 2):
        (data / f"clip0000{index}.wav").unlink()
    # A clip that left and whose latents have gone has none that could stay or be removed.
    lost = "clip00002" if layout == "mirror" else f"{2:012d}"
    for suffix in ("npy", "json"):
        (out / f"{lost}.{suffix}").unlink()
    options = {"layout": layout, "prune": fate == "prune"}
    if fate == "reencode":
        options |= {"sample_size": 400, "reencode": True}
    expected = planned(data, out, **options)
    assert (expected.gone, expected.pruned)[fate != "stay"] == ["clip00001.wav"]
    assert (expected.gone, expected.pruned)[fate == "stay"] == []
    report = run(data, out, **options)
    assert (report.gone, report.pruned) == (expected.gone, len(expected.pruned))
    assert ("removed the latents of 1 clip that left the dataset" in report.summary()) == (fate != "stay")


def test_plan_agrees_with_the_run(data, out):
    write_clips(data, 4)
    (data / "clip00002.wav").write_bytes(b"no audio")
    first = planned(data, out, sample_size=800)
    assert (first.clips, first.due, first.unknown) == (4, 4, 1)
    report = run(data, out, sample_size=800)
    assert report.statuses == {"encoded": 3, "unreadable": 1}
    assert first.audio_seconds == pytest.approx(report.audio_seconds, abs=0.05)
    again = planned(data, out, sample_size=800)
    # A clip that could not be read is tried again.
    assert (again.due, again.unknown, again.estimated_seconds) == (1, 1, 0.0)
    with pytest.raises(InputError, match="holds latents of other settings"):
        planned(data, out, sample_size=400)


# --- Folders without latents, and settings that are equal ---------------------------------------------------


def test_folder_without_latents_is_not_sound(data, out):
    write_clips(data, 1)
    (data / "clip00000.wav").write_bytes(b"no audio")
    run(data, out)
    result = CliRunner().invoke(main, ["check-latents", str(out)])
    assert result.exit_code == 2
    assert result.stdout.startswith(f"{out}: holds no latents; ")
    out.with_name("empty").mkdir()
    result = CliRunner().invoke(main, ["check-latents", str(out.with_name("empty"))])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "has no manifest" in result.stderr


def test_reencode_with_equal_settings_says_so(arguments, data):
    write_clips(data, 2)
    notice = "--reencode: the folder has latents of these settings; only new and changed clips were encoded"
    assert notice not in command(*arguments, "--reencode").stderr
    result = command(*arguments, "--reencode")
    assert notice in result.stderr.splitlines()
    # A run that encoded nothing has no speed.
    assert result.stdout == f"{result.stdout.split(': ')[0]}: 2 clips (2 encoded); this run encoded 0\n"


def test_one_clip_is_singular(arguments, data):
    write_clips(data, 1)
    assert ": 1 of 1 clip would be encoded, " in command(*arguments, "--dry-run").stdout
    result = command(*arguments)
    assert ": 1 clip (1 encoded); this run encoded 1, " in result.stdout
    assert "1 of 1 clip, " in result.stderr


def test_json_is_printed_on_request_only(arguments, data):
    write_clips(data, 1)
    assert "{" not in command(*arguments).stdout
    (line,) = command(*arguments, "--json").stdout.splitlines()
    assert json.loads(line)["unchanged"] == 1


def test_start_of_ray_is_announced(data, out):
    write_clips(data, 1)
    options = ["--model", "x", "--data_dir", data, "--output_path", out, "--ray", "127.0.0.1:1"]
    program = [sys.executable, "-m", "samekit", "pre-encode", *map(str, options)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("joining or starting a Ray cluster and opening the model there")
