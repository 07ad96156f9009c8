"""Finding the clips of a dataset: audio files, their captions, lists of files, and files that are passed over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from faults import contents
from helpers import KINDS, assert_one_line
from test_dataset import command, fake_model, pair, rows_of, run, write_clip, write_clips

from samekit.dataset.check import verify
from samekit.dataset.options import PreEncodeOptions
from samekit.dataset.run import pre_encode
from samekit.errors import InputError, OutputError

NFC, NFD = unicodedata.normalize("NFC", "Café Ångström"), unicodedata.normalize("NFD", "Café Ångström")


def encoded(out):
    """Return the relpaths of the clips that have latents."""
    return sorted(relpath for relpath, row in rows_of(out).items() if row.status == "encoded")


# --- Captions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"one\r\ntwo\r\n", "one\ntwo"),
        (b"one\rtwo", "one\ntwo"),
        (b"\xef\xbb\xbfone\r\n\r\ntwo", "one\n\ntwo"),
        (b"\r\n one\ntwo \r\n", "one\ntwo"),
    ],
)
def test_line_ends_of_captions_are_those_of_text_files(data, out, content, prompt):
    """The reference reads captions with `Path.read_text`, which turns every line end into a newline."""
    write_clip(data / "a.wav", 100).with_suffix(".txt").write_bytes(content)
    run(data, out)
    assert pair(out, 0)[1]["prompt"] == prompt


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_caption_with_zero_bytes_is_bad(data, out, encoding):
    """Without a byte order mark, UTF-16 of plain English is valid UTF-8 with a zero byte after each letter."""
    write_clips(data, 1)
    write_clip(data / "wide.wav", 100).with_suffix(".txt").write_bytes("a guitar".encode(encoding))
    (row,) = run(data, out).bad
    assert (row["relpath"], row["status"]) == ("wide.wav", "no_caption")
    assert "wide.txt: holds zero bytes, as UTF-16 does; save it as UTF-8" in row["reason"]


@pytest.mark.parametrize(("audio", "caption"), [(NFD, NFC), (NFC, NFD)], ids=["audio NFD", "caption NFD"])
@pytest.mark.parametrize("checksum", [False, True])
def test_names_of_other_normal_forms_belong_together(data, out, audio, caption, checksum):
    """Apple's systems write names in NFD. Editors on other systems write the same names in NFC."""
    write_clip(data / f"{audio}.wav", 100, caption=None)
    text = data / f"{caption}.txt"
    text.write_text("first")
    assert run(data, out, checksum=checksum).encoded == 1
    assert pair(out, 0)[1]["relpath"] == f"{audio}.wav"
    assert run(data, out, checksum=checksum).unchanged == 1
    text.write_text("second")
    assert run(data, out, checksum=checksum).encoded == 1
    assert pair(out, 0)[1]["prompt"] == "second"


def test_caption_of_the_very_name_comes_before_its_twin(data, out):
    for name in (NFC, NFD):
        write_clip(data / f"{name}.wav", 100, caption=name)
    assert run(data, out).encoded == 2
    for number in range(2):
        metadata = pair(out, number)[1]
        assert metadata["relpath"] == f"{metadata['prompt']}.wav"


# --- A list of files --------------------------------------------------------------------------------------------


def test_list_of_files_is_taken_as_the_reference_takes_it(data, out):
    """The reference is `get_audio_filenames` of stable_audio_3/data/dataset.py, at commit 7fb8916.

    A `filelist.txt` at the root of a folder replaces the search: each line is stripped and joined to the folder,
    whatever its suffix is, hidden or not. A line without a file cannot be loaded.
    """
    for name in ("a.wav", "deep/er/b.flac", "unlisted.wav", ".hidden.wav", "sp ace.wav"):
        write_clip(data / name, 100, seed=len(name))
    write_clip(data / "listed.aiff", 100).rename(data / "listed.sound")
    (data / "filelist.txt").write_bytes(
        b"deep/er/b.flac\r\n  a.wav \n\n./a.wav\n.hidden.wav\nsp ace.wav\nlisted.sound\nnowhere.wav\n"
        + os.fsencode(data / "deep" / ".." / "a.wav")
    )
    report = run(data, out)
    assert encoded(out) == [".hidden.wav", "a.wav", "deep/er/b.flac", "listed.sound", "sp ace.wav"]
    assert [(row["relpath"], row["status"]) for row in report.bad] == [("nowhere.wav", "unreadable")]
    assert verify(out) == []
    # After the list is changed, new entries are encoded, and removed ones keep their latents.
    (data / "filelist.txt").write_text("unlisted.wav\na.wav\n")
    report = run(data, out)
    assert (report.clips, report.encoded, len(report.gone)) == (2, 1, 4)


def test_list_of_one_folder_is_not_that_of_another(tmp_path, out):
    for folder in ("one", "two"):
        for name in ("a", "b"):
            write_clip(tmp_path / folder / f"{folder} {name}.wav", 100)
    (tmp_path / "one" / "filelist.txt").write_text("one a.wav\n")
    # A list counts only at the root of a data folder.
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "deep")
    run([tmp_path / "one", tmp_path / "two"], out)
    assert encoded(out) == ["deep/one a.wav", "deep/one b.wav", "one a.wav", "two a.wav", "two b.wav"]


def test_list_of_a_folder_that_is_reached_by_a_detour(data, tmp_path, monkeypatch):
    """A list may contain absolute paths, also if `--data_dir` names the folder in another way."""
    write_clips(data, 4)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    monkeypatch.chdir(tmp_path / "far")
    lines = ["clip00000.wav", "x/../clip00001.wav", str(data / "clip00002.wav")]
    (data / "filelist.txt").write_text("\n".join(lines))
    for index, detour in enumerate(("../data", tmp_path / "link" / ".." / ".." / "data", f"{data}/")):
        run(detour, tmp_path / str(index))
        assert encoded(tmp_path / str(index)) == ["clip00000.wav", "clip00001.wav", "clip00002.wav"]


def test_list_in_another_normal_form_finds_its_files(data, out):
    write_clip(data / NFD / f"{NFD}.wav", 100)
    write_clip(data / "unlisted.wav", 100)
    (data / "filelist.txt").write_text(f"{NFC}/{NFC}.wav\n", encoding="utf-8")
    run(data, out)
    assert encoded(out) == [f"{NFD}/{NFD}.wav"]


@pytest.mark.parametrize(
    "line",
    [
        "../outside/a.wav",
        "x/../../outside/a.wav",
        "{tmp}/outside/a.wav",
        "..",
        ".",
        "/",
        pytest.param("a/" * 10**6, id="long"),
    ],
)
def test_list_that_leads_out_of_its_folder_is_refused(data, tmp_path, out, line):
    """The reference reads such files. samekit reads only files below the data folder."""
    write_clip(tmp_path / "outside" / "a.wav", 100)
    write_clip(data / "inside.wav", 100)
    (data / "filelist.txt").write_text(f"inside.wav\n{line.format(tmp=tmp_path)}\n")
    with pytest.raises(
        InputError, match=r"filelist\.txt: line 2 names .*, which is no file below this folder; "
    ) as error:
        run(data, out)
    assert_one_line(error.value)
    assert len(str(error.value)) < 1000
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"a\0.wav\n"])
def test_list_that_names_no_file_is_refused(data, out, content):
    write_clip(data / "a.wav", 100)
    (data / "filelist.txt").write_bytes(content)
    with pytest.raises(InputError) as error:
        run(data, out)
    assert_one_line(error.value)
    assert "filelist.txt" in str(error.value)


def test_list_that_is_a_pipe_is_refused_and_a_folder_is_none(data, out):
    write_clip(data / "filelist.txt" / "a.wav", 100)
    assert run(data, out).encoded == 1
    shutil.rmtree(data / "filelist.txt")
    os.mkfifo(data / "filelist.txt")
    write_clip(data / "a.wav", 100)
    with pytest.raises(InputError, match=r"filelist\.txt: cannot be read .*; ") as error:
        run(data, out)
    assert_one_line(error.value)


# --- What is passed over ----------------------------------------------------------------------------------------


def test_files_that_are_passed_over_are_counted(data, out):
    write_clips(data, 2)
    for name in ("a.mid", "a.txt", "deep/b.MID", "cover.jpg", "noext", ".hidden"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).touch()
    report = run(data, out)
    counts = {"": 1, ".jpg": 1, ".mid": 2, ".txt": 1}
    assert report.passed_over == counts
    assert json.loads(report.to_json())["passed_over"] == counts
    assert json.loads((out / ".samekit" / "report.json").read_text())["passed_over"] == counts
    assert "passed over 5 files (2 .mid, 1 .jpg, 1 .txt, 1 without a suffix)" in report.summary()
    # A file beside the clips changes no latents.
    assert run(data, out).unchanged == 2


def test_dataset_of_unknown_suffixes_alone_is_refused_with_their_count(engine_of, data, out):
    data.mkdir()
    for name in ("a.mid", "b.mid", "a.txt"):
        (data / name).write_text("a caption")
    result = command("--model", engine_of(KINDS[0]).folder, "--data_dir", data, "--output_path", out)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "passed over 3 files" in result.stderr
    with pytest.raises(InputError, match=r"holds no audio .*passed over 3 files \(2 \.mid, 1 \.txt\); ") as error:
        run(data, out)
    assert_one_line(error.value)
    assert not out.exists()


def test_dataset_without_any_caption_is_refused_and_loses_nothing(data, out):
    write_clips(data, 3)
    run(data, out)
    before = contents(out)
    for path in data.glob("*.txt"):
        path.rename(path.with_suffix(".caption"))
    with pytest.raises(InputError, match=r"none of 3 audio files has a caption, .*3 \.caption.*; ") as error:
        run(data, out)
    assert_one_line(error.value)
    assert contents(out) == before
    # With at least one caption, the run goes on, and the report lists the clips without.
    (data / "clip00001.caption").rename(data / "clip00001.txt")
    assert run(data, out).statuses == {"encoded": 1, "no_caption": 2}


def refuse_listing(monkeypatch, refused, error):
    """Make listing of folders with some names fail."""
    scandir = os.scandir

    def scan(path="."):
        # pytest lists the folder of the test by its descriptor when it removes it.
        if not isinstance(path, int) and os.path.basename(os.fspath(path)) in refused:
            raise error
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)


def test_unreadable_folders_are_counted(data, out, monkeypatch, caplog):
    """For example, ext4 file systems have a folder `lost+found` that only the administrator may list."""
    write_clips(data, 2)
    write_clip(data / "deep" / "private" / "x.wav", 100)
    (data / "lost+found").mkdir()
    run(data, out)
    refuse_listing(monkeypatch, {"lost+found", "private"}, PermissionError(13, "Permission denied"))
    report = run(data, out)
    assert sorted(report.unreadable_folders) == ["deep/private", "lost+found"]
    assert (report.statuses, len(report.gone)) == ({"encoded": 2}, 1)
    assert json.loads(report.to_json())["unreadable_folders"] == 2
    assert "2 folders cannot be read" in report.summary()
    assert "lost+found" in caplog.text
    assert (out / "000000000002.npy").exists()
    assert verify(out) == []


def test_name_that_no_folder_can_have(out):
    with pytest.raises(InputError, match="cannot be read") as caught:
        run("x" * 300, out)
    assert_one_line(caught.value)


def test_data_folder_itself_and_failing_disks_still_stop_the_run(data, out, monkeypatch):
    write_clips(data, 2)
    (data / "deep").mkdir()
    for name, error in (("data", PermissionError(13, "Permission denied")), ("deep", OSError(5, "Input/output error"))):
        with monkeypatch.context() as patch:
            refuse_listing(patch, {name}, error)
            with pytest.raises(InputError, match="cannot be read") as caught:
                run(data, out)
        assert_one_line(caught.value)
    assert not out.exists()


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv, with which even root may not list a folder")
def test_folder_without_permissions(data, out):
    write_clips(data, 1)
    (data / "lost+found").mkdir(mode=0)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_dataset import run;"
        "print(run(sys.argv[2], sys.argv[3]).unreadable_folders)"
    )
    program = [sys.executable, "-c", code, os.path.dirname(__file__), data, out]
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    shown = subprocess.run([*drop, *program], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "['lost+found']"


RUN_WITHOUT_RIGHTS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_dataset import run
from samekit import SamekitError
try:
    report = run(sys.argv[2], sys.argv[3])
except SamekitError as error:
    print(error)
else:
    print(report.unreadable_folders, [row["reason"] for row in report.bad])
"""


def run_without_rights(data, out):
    """Return what a run prints that has only the rights of an ordinary user."""
    program = [sys.executable, "-c", RUN_WITHOUT_RIGHTS, os.path.dirname(__file__), data, out]
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    return subprocess.run([*drop, *program], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv, with which even root has no rights to a file")
def test_folders_and_files_that_may_not_be_read_are_named_as_such(data, out):
    """A folder with `chmod 744` can be listed by other users, but its files cannot be opened."""
    write_clips(data, 2)
    write_clips(data / "deep", 1)
    (data / "clip00001.wav").chmod(0)
    (data / "deep").chmod(0o644)
    shown = run_without_rights(data, out)
    (data / "deep").chmod(0o755)
    assert shown.startswith("['deep'] ")
    assert "clip00001.wav: cannot be opened (Permission denied); check " in shown
    assert "deep/" not in shown
    data.chmod(0o644)
    shown = run_without_rights(data, out.with_name("other"))
    data.chmod(0o755)
    assert shown == f"{data}: cannot be read (Permission denied); check its name and permissions"


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv, with which even root has no rights to a file")
def test_listed_file_in_a_folder_that_may_not_be_entered(data, out):
    write_clips(data, 1)
    write_clips(data / "deep", 1)
    (data / "filelist.txt").write_text("clip00000.wav\ndeep/clip00000.wav\n")
    (data / "deep").chmod(0o644)
    shown = run_without_rights(data, out)
    (data / "deep").chmod(0o755)
    assert "deep/clip00000.wav: cannot be opened (Permission denied); check the permissions of it and its fold" in shown


def test_listed_file_that_is_not_there(data, out):
    write_clips(data, 1)
    (data / "lost.wav").symlink_to("nowhere")
    (data / "pipe.wav").mkdir()
    (data / "filelist.txt").write_text("clip00000.wav\nmissing.wav\nlost.wav\npipe.wav\n")
    reasons = {row["relpath"]: row["reason"] for row in run(data, out).bad}
    assert reasons == {
        "missing.wav": f"{data / 'missing.wav'}: does not exist; "
        "copy the audio there, or remove its line from filelist.txt",
        "lost.wav": f"{data / 'lost.wav'}: is a link to a file that does not exist; copy the audio there",
        "pipe.wav": f"{data / 'pipe.wav'}: is no regular file; copy the audio there",
    }


# --- Where the latents go ---------------------------------------------------------------------------------------


def test_home_folder_is_expanded(data, out, monkeypatch, tmp_path):
    """Shells do not expand `~` in `--output_path=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_clips(data, 1)
    pre_encode(fake_model(), "~/data", "~/out", PreEncodeOptions())
    assert pair(out, 0)[1]["path"] == str(data / "clip00000.wav")
    assert verify("~/out") == []
    assert not os.path.lexists("~")


@pytest.mark.parametrize("typed", ["~/data", "~"])
def test_data_folder_in_the_home_folder_is_no_output(data, monkeypatch, typed):
    """Both names lead to one folder after `~` is expanded."""
    monkeypatch.setenv("HOME", str(data if typed == "~" else data.parent))
    write_clips(data, 1)
    before = contents(data)
    with pytest.raises(InputError, match="is a --data_dir too; pass another --output_path") as error:
        pre_encode(fake_model(), typed, typed, PreEncodeOptions())
    assert_one_line(error.value)
    assert contents(data) == before


def test_files_of_a_dataset_are_never_looked_up_in_the_home_folder(data, out, monkeypatch, tmp_path):
    """Datasets are untrusted, so `~` is expanded only in paths that the user gives."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    secret = write_clip(tmp_path / "home" / "a.wav", 100, caption="secret")
    write_clip(data / "~" / "a.wav", 90, seed=1, caption="theirs")
    monkeypatch.chdir(data)
    run(".", out)
    assert pair(out, 0)[1]["prompt"] == "theirs"
    (data / "filelist.txt").write_text("~/a.wav\n")
    run(".", out.with_name("listed"))
    assert pair(out.with_name("listed"), 0)[1]["prompt"] == "theirs"
    assert secret.exists()


def test_files_that_are_links_are_replaced(data, out, tmp_path):
    """Output folders are untrusted, so their links must not decide which files are overwritten."""
    write_clips(data, 2)
    out.symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    run(data, out)
    precious = tmp_path / "precious"
    precious.mkdir()
    state = (".samekit/manifest-000001.jsonl", ".samekit/manifest.lock", ".samekit/report.json")
    for name in ("000000000000.npy", "000000000000.json", "silence.npy", *state):
        target = precious / name.removeprefix(".samekit/")
        (out / name).rename(target)
        (out / name).symlink_to(target)
    np.save(precious / "silence.npy", np.zeros(3))
    # A lock file that is a link is an error.
    with pytest.raises(OutputError, match="cannot be written") as error:
        run(data, out)
    assert_one_line(error.value)
    (out / ".samekit" / "manifest.lock").unlink()
    before = contents(precious)
    (data / "clip00000.txt").write_text("other words")
    write_clip(data / "new.wav", 100)
    assert run(data, out).encoded == 2
    assert contents(precious) == before
    assert out.is_symlink()
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert pair(out, 0)[1]["prompt"] == "other words"
    assert verify(out) == []


def test_report_that_is_a_link_to_a_device_is_replaced(data, out):
    """The report must not be read, because reading /dev/zero never ends."""
    write_clips(data, 1)
    run(data, out)
    (out / ".samekit" / "report.json").unlink()
    (out / ".samekit" / "report.json").symlink_to("/dev/zero")
    run(data, out)
    assert json.loads((out / ".samekit" / "report.json").read_text())["clips"] == 1
