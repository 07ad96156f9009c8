"""Files are written atomically. Leftovers of killed processes are deleted, files of running processes are not."""

from __future__ import annotations

import os
import re

import pytest
from faults import KILLED, in_a_fork, kill_this_process, names

from samekit.errors import InputError, OutputError
from samekit.files.atomic import atomic_folder, atomic_path, output_errors, remove_abandoned, temporary_target


def dying_writer(path):
    """Begin to write a file, then end this process as `kill -9` does."""
    with atomic_path(path):
        kill_this_process()


def test_target_changes_only_when_the_block_ends(tmp_path):
    target = tmp_path / "song.wav"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_contents_are_on_disk_before_the_name(tmp_path, monkeypatch):
    target = tmp_path / "song.wav"
    seen = []
    fsync = os.fsync

    def recording_fsync(descriptor):
        seen.append((os.fstat(descriptor).st_size, target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert seen[0] == (3, False)


def test_temporary_name_is_recognisable_and_in_the_same_folder(tmp_path):
    with atomic_path(tmp_path / "song.wav") as temporary:
        assert temporary.parent == tmp_path
        assert re.fullmatch(rf"\.song\.wav\.{os.getpid()}-[0-9a-f]+\.tmp", temporary.name)


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, KeyboardInterrupt])
def test_exception_passes_unchanged_and_leaves_nothing(tmp_path, error):
    target = tmp_path / "song.wav"
    target.write_text("old")

    def write():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error("raised in the block")

    with pytest.raises(error, match="raised in the block") as caught:
        write()
    assert type(caught.value) is error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["n" * 246 + ".wav", "é" * 123 + ".wav"])
def test_name_of_250_bytes(tmp_path, name):
    target = tmp_path / name
    assert len(os.fsencode(name)) == 250
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o000, 0o666)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    target = tmp_path / "song.wav"
    before = os.umask(umask)
    try:
        with atomic_path(target) as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == mode


def test_missing_folder(tmp_path):
    with (
        pytest.raises(OutputError, match=r"No such file or directory\); choose a folder"),
        atomic_path(tmp_path / "nowhere" / "song.wav"),
    ):
        pass


def test_folder_as_target(tmp_path):
    with pytest.raises(OutputError, match="is not a regular file"), atomic_path(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="named pipes in folders are POSIX")
def test_special_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="is not a regular file"), atomic_path(pipe):
        pass
    assert pipe.is_fifo()


def test_failing_rename_is_an_output_error_and_leaves_nothing(tmp_path):
    target = tmp_path / "song.wav"

    def write():
        with atomic_path(target):
            target.mkdir()

    with pytest.raises(OutputError, match=re.escape(str(target))):
        write()
    assert list(tmp_path.iterdir()) == [target]


def test_output_errors_names_the_file_and_the_cause():
    with (
        pytest.raises(OutputError, match=r"^song\.wav: cannot be written \(No space left on device\); "),
        output_errors("song.wav"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(OutputError, match=r"\(codec failed\)"), output_errors("song.wav", ArithmeticError):
        raise ArithmeticError("codec failed.")
    with (
        pytest.raises(OutputError, match=r"^song\.wav: cannot be read \(Forbidden\); sign in$"),
        output_errors("song.wav", cause="cannot be read", cure="sign in"),
    ):
        raise OSError(13, "Forbidden")


def test_output_errors_passes_what_it_does_not_know():
    own = OutputError("already explained")
    with pytest.raises(OutputError) as caught, output_errors("song.wav"):
        raise own
    assert caught.value is own
    with pytest.raises(ArithmeticError), output_errors("song.wav"):
        raise ArithmeticError


@pytest.mark.parametrize("there", [True, False])
def test_link_is_written_through(tmp_path, there):
    link, target = tmp_path / "song.wav", tmp_path / "big" / "the song.wav"
    target.parent.mkdir()
    if there:
        target.write_text("old")
    link.symlink_to(target)
    # A killed process leaves its temporary file beside the target of the link.
    assert in_a_fork(lambda: dying_writer(target)) == KILLED
    assert len(names(target.parent)) == 1 + there
    remove_abandoned(tmp_path, "song.wav")
    with pytest.raises(FileNotFoundError), atomic_path(link, follow_links=True):
        (tmp_path / "nothing").read_text()
    assert list(target.parent.iterdir()) == [target] * there
    with atomic_path(link, follow_links=True) as temporary:
        temporary.write_text("new")
    assert link.readlink() == target
    assert target.read_text() == "new"
    assert not target.is_symlink()
    assert sorted(tmp_path.rglob("*")) == [target.parent, target, link]


def test_link_that_leads_nowhere_to_write(tmp_path):
    (tmp_path / "circle.wav").symlink_to("circle.wav")
    (tmp_path / "lost.wav").symlink_to("no folder/song.wav")
    (tmp_path / "device.wav").symlink_to(os.devnull)
    reasons = {"circle": "leads in a circle", "lost": "No such file or directory", "device": "not a regular file"}
    for name, reason in reasons.items():
        with (
            pytest.raises(OutputError, match=f"{reason}.*; ") as caught,
            atomic_path(tmp_path / f"{name}.wav", follow_links=True),
        ):
            pass
        assert str(caught.value).count("\n") == 0
        assert (tmp_path / f"{name}.wav").is_symlink()
    assert not os.path.isfile(os.devnull)


@pytest.mark.parametrize("target", ["precious", "nowhere", "link.json", "folder", os.devnull])
def test_link_is_replaced_unless_links_are_to_be_followed(tmp_path, target):
    """A folder that was downloaded may contain links to any file of the user."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(target)
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert (tmp_path / "precious").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link.json", "precious"]


# --- Leftovers ----------------------------------------------------------------------------------------------


def test_what_is_being_written_is_not_deleted(tmp_path):
    with atomic_path(tmp_path / "a.wav") as file, atomic_folder(tmp_path / "b") as folder:
        (folder / "inside").touch()
        for temporary in (file, folder):
            # The time of the last change does not matter while the process runs.
            os.utime(temporary, (0, 0))
        for name in ("a.wav", "b"):
            remove_abandoned(tmp_path, name)
            assert in_a_fork(lambda name=name: remove_abandoned(tmp_path, name)) == 0
        assert file.exists()
        assert (folder / "inside").exists()
    assert names(tmp_path) == ["a.wav", "b"]


def test_this_process_is_sent_no_signal(tmp_path, monkeypatch):
    """On Windows, `os.kill(pid, 0)` sends Ctrl-C, see the documentation of `os.kill`."""
    sent = []
    monkeypatch.setattr("os.kill", lambda *arguments: sent.append(arguments))
    with atomic_path(tmp_path / "song.wav") as temporary:
        remove_abandoned(tmp_path, "song.wav")
        assert temporary.exists()
    assert sent == []


def test_only_the_leftovers_of_one_output_are_deleted(tmp_path):
    mine = {".hidden.tmp", "song.wav", ".song.wav.12.tmp", ".git"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    assert in_a_fork(lambda: dying_writer(tmp_path / "song.wav")) == KILLED
    assert in_a_fork(lambda: dying_writer(tmp_path / "other.wav")) == KILLED
    (other,) = tmp_path.glob(".other.wav.*")
    assert temporary_target(other.name) == "other.wav"
    remove_abandoned(tmp_path, "song.wav")
    assert set(names(tmp_path)) == mine | {other.name}
    remove_abandoned(tmp_path / "nowhere", "song.wav")


def test_leftovers_of_other_machines_are_deleted_after_a_day(tmp_path):
    """Process ids of another machine, container or boot cannot be checked."""
    recent, old = tmp_path / ".song.wav.12-0123abcd01234567.tmp", tmp_path / ".song.wav.13-0123abcd01234567.tmp"
    for path in (recent, old):
        path.touch()
    os.utime(old, (0, 0))
    remove_abandoned(tmp_path, "song.wav")
    assert names(tmp_path) == [recent.name]


def test_holder_of_the_lock_deletes_every_matching_leftover(tmp_path):
    other = tmp_path / ".other.wav.12-0123abcd.tmp"
    with atomic_path(tmp_path / "song.wav") as temporary:
        other.touch()
        remove_abandoned(tmp_path, lambda name: name == "song.wav")
        assert not temporary.exists()
        temporary.touch()
    assert names(tmp_path) == sorted([other.name, "song.wav"])


# --- Folders ------------------------------------------------------------------------------------------------


def test_folder_appears_when_the_block_ends(tmp_path):
    folder = tmp_path / "new" / "models"
    with atomic_folder(folder) as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "file").write_text("new")
        assert not folder.exists()
    assert (folder / "inside" / "file").read_text() == "new"
    assert names(folder.parent) == ["models"]


def test_folder_that_exists(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        path = tmp_path / name
        if name == "file":
            path.touch()
        elif name == "folder":
            path.mkdir()
        with pytest.raises(InputError, match=r"exists; remove it, or choose another name$"), atomic_folder(path):
            pass
    assert names(tmp_path) == ["file", "folder", "link"]


def test_failed_folder_leaves_nothing(tmp_path):
    def fail(error):
        with atomic_folder(tmp_path / "models") as temporary:
            (temporary / "half").touch()
            raise error

    with pytest.raises(OutputError, match=r"models: cannot be written \(No space left"):
        fail(OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt)
    assert names(tmp_path) == []
