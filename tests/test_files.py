"""Files appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import fcntl
import os
import re

import pytest

from samekit.errors import OutputError
from samekit.files import atomic as _files
from samekit.files.atomic import atomic_path, output_errors


def test_target_changes_only_when_the_block_ends(tmp_path):
    target = tmp_path / "song.wav"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_locks_of_network_file_systems(tmp_path, monkeypatch):
    """NFS locks only what is open for writing, see flock(2)."""
    flock = fcntl.flock

    def strict(file, operation):
        descriptor = file if isinstance(file, int) else file.fileno()
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", strict)
    (tmp_path / ".song.wav.12-0123abcd.tmp").touch()
    with _files.atomic_path(tmp_path / "other.wav"):
        assert [path.name for path, _ in _files.remove_abandoned(tmp_path)] == [".song.wav.12-0123abcd.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["other.wav"]


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
    # What a killed process left is where it was writing.
    (target.parent / ".the song.wav.12-0123abcd.tmp").touch()
    _files.remove_abandoned(tmp_path, "song.wav")
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
    assert not os.path.isfile(os.devnull)  # noqa: PTH113 it is no path of a test


@pytest.mark.parametrize("target", ["precious", "nowhere", "link.json", "folder", os.devnull])
def test_link_is_replaced_unless_links_are_to_be_followed(tmp_path, target):
    """Folders with names of our own may come from anyone, and so may the links in them."""
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
