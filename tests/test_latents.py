"""Latents on disk: NumPy reads them, the two files of a pair belong together, and damaged files are refused."""

from __future__ import annotations

import errno
import json
import mmap
import os
import pickle
import re
import tracemalloc
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from samekit.errors import InputError, LatentsFileError, OutputError
from samekit.files.latents import LatentsWriter, read_latents, require_replaceable

WIDTH = 8


def latents_of(count, seed=0):
    return np.random.RandomState(seed).standard_normal((WIDTH, count)).astype(np.float32)


def write(path, latents, metadata=None, dtype="float32", block=7, **options):
    with LatentsWriter(path, WIDTH, dtype, **options) as writer:
        for start in range(0, latents.shape[1], block):
            writer.write(latents[:, start : start + block])
        writer.metadata.update(metadata or {})


def assert_refused(path, match, width=None):
    with pytest.raises(LatentsFileError, match=match) as caught:
        read_latents(path, width)
    message = str(caught.value)
    assert str(path.with_suffix("")) in message
    assert "\n" not in message


# --- Writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 100])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plain_numpy_reads_what_was_appended(tmp_path, count, dtype):
    path = tmp_path / "song.npy"
    latents = latents_of(count)
    write(path, latents, dtype=dtype)
    stored = np.load(path, allow_pickle=False)
    assert stored.dtype == dtype
    assert np.array_equal(stored, latents.astype(dtype))


def sa3_array(path):
    """Read latents by the rules of sa3.cpp, which are stricter than those of NumPy.

    Source: `train_load_npy_f32_2d` in `src/train_latents.h` of github.com/betweentwomidnights/sa3.cpp. The header must
    contain these texts, and the values must be little-endian float32 in C order.
    """
    data = path.read_bytes()
    assert data[:6] == b"\x93NUMPY"
    size = 2 if data[6] == 1 else 4
    begin = 8 + size
    end = begin + int.from_bytes(data[8:begin], "little")
    header = data[begin:end].decode()
    assert "'<f4'" in header
    assert "'fortran_order': False" in header
    after = header[header.index("'shape':") :]
    width, latents = map(int, re.match(r"[^(]*\((\d+), (\d+)", after).groups())
    assert width > 0
    assert latents > 0
    assert len(data) >= end + 4 * width * latents
    return np.frombuffer(data, "<f4", width * latents, end).reshape(width, latents)


@pytest.mark.parametrize("transposed_values", [2**18, 3 * WIDTH, 1])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_files_are_read_by_the_rules_of_sa3(tmp_path, monkeypatch, transposed_values, count):
    """Blocks of latents are appended, then transposed a part at a time."""
    monkeypatch.setattr("samekit.files.latents._TRANSPOSED_VALUES", transposed_values)
    path = tmp_path / "song.npy"
    write(path, latents_of(count))
    assert np.array_equal(sa3_array(path), latents_of(count))
    # The file is the one that NumPy would write.
    np.save(tmp_path / "numpy.npy", latents_of(count))
    assert path.read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["numpy.npy", "song.json", "song.npy"]


def test_metadata_round_trip(tmp_path):
    path = tmp_path / "song.v2.npy"
    metadata = {
        "sample_rate": 44100,
        "samples": 12345,
        "model": "same-s",
        "source": "é.flac",
        "precision": "fp32",
    }
    write(path, latents_of(3), metadata)
    assert json.loads((tmp_path / "song.v2.json").read_text()) == metadata
    latents, read_back = read_latents(path, WIDTH)
    assert read_back == metadata
    assert np.array_equal(latents, latents_of(3))


def test_json_is_never_beside_another_npy(tmp_path, monkeypatch):
    path = tmp_path / "song.npy"
    write(path, latents_of(3, seed=1), {"take": 1})
    seen = []
    replace = Path.replace

    def recording_replace(self, target):
        result = replace(self, target)
        take = np.load(path).shape[1]
        metadata = path.with_suffix(".json")
        seen.append((take, json.loads(metadata.read_text()) if metadata.exists() else None))
        return result

    monkeypatch.setattr(Path, "replace", recording_replace)
    write(path, latents_of(5, seed=2), {"take": 2})
    assert seen == [(5, None), (5, {"take": 2})]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_exception_leaves_the_old_pair(tmp_path, fault):
    path = tmp_path / "song.npy"
    write(path, latents_of(3), {"take": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted():
        with LatentsWriter(path, WIDTH) as writer:
            writer.write(latents_of(5))
            raise fault

    with pytest.raises(fault):
        interrupted()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), np.float32(1)])
def test_metadata_that_are_no_json_leave_the_old_pair(tmp_path, value):
    path = tmp_path / "song.npy"
    write(path, latents_of(3), {"take": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match="metadata are no JSON"):
        write(path, latents_of(5), {"value": value})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("shape", [(WIDTH + 1, 4), (WIDTH,), (1, WIDTH, 4)])
def test_block_of_another_shape(tmp_path, shape):
    with (
        pytest.raises(InputError, match=rf"give \[{WIDTH}, latents\]"),
        LatentsWriter(tmp_path / "a.npy", WIDTH) as writer,
    ):
        writer.write(np.zeros(shape, np.float32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "value"), [("float32", np.nan), ("float32", np.inf), ("float16", 70000)])
def test_value_that_the_file_cannot_hold(tmp_path, dtype, value):
    latents = latents_of(4)
    latents[2, 3] = value
    with pytest.raises(InputError, match=f"NaN or too large for {dtype}"):
        write(tmp_path / "a.npy", latents, dtype=dtype)


def test_options_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"use \.npy"):
        LatentsWriter(tmp_path / "song.pt", WIDTH)
    with pytest.raises(InputError, match="use one of float32, float16"):
        LatentsWriter(tmp_path / "song.npy", WIDTH, "int8")


def test_missing_folder(tmp_path):
    with pytest.raises(OutputError, match="choose a folder that exists"):
        write(tmp_path / "nowhere" / "song.npy", latents_of(3))


@pytest.mark.parametrize("limit", [10_000, 32_010], ids=["collecting blocks", "transposing them"])
def test_full_disk_leaves_the_old_pair(tmp_path, limit):
    """Only the `.npy` file exceeds the second limit, because its header makes it longer than the collected blocks."""
    write(tmp_path / "song.npy", latents_of(3), {"take": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with file_size_limit(limit), pytest.raises(OutputError, match=r"song\.npy: cannot be written \(File too large\)"):
        write(tmp_path / "song.npy", latents_of(1000), {"take": 2})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@contextmanager
def file_size_limit(size):
    """Make writes past a size fail, as on a full disk. The limit also applies to the log of the tests."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- Reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(WIDTH, 5), (1, WIDTH, 5)])
def test_arrays_that_others_saved(tmp_path, dtype, order, shape):
    path = tmp_path / "song.npy"
    latents = latents_of(5).astype(dtype)
    np.save(path, np.asarray(latents.reshape(shape), order=order))
    read_back, metadata = read_latents(path, WIDTH)
    assert read_back.shape == (WIDTH, 5)
    assert read_back.dtype == dtype
    assert np.array_equal(read_back, latents)
    assert type(read_back) is np.ndarray
    assert metadata == {}


def test_memory_stays_flat(tmp_path):
    path = tmp_path / "song.npy"
    tracemalloc.start()
    try:
        with LatentsWriter(path, WIDTH) as writer:
            for _ in range(100):
                writer.write(np.zeros((WIDTH, 10**4), np.float32))
        read_latents(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 8


@pytest.mark.parametrize("kept", [1, 64, 127, 128, 200, -1])
def test_file_that_was_cut_off(tmp_path, kept):
    path = tmp_path / "song.npy"
    write(path, latents_of(10))
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(path, "damaged" if abs(kept) < 128 and kept > 0 else "is cut off")


def test_length_in_the_header_is_checked(tmp_path):
    path = tmp_path / "song.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": True, "shape": (WIDTH, 10**30)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1000))
    assert_refused(path, "is cut off")


def test_pickles_are_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was loaded",))

    path = tmp_path / "song.npy"
    path.write_bytes(pickle.dumps(Bomb()))
    assert_refused(path, r"is no \.npy file")
    np.save(path, np.array([[Bomb()]], dtype=object), allow_pickle=True)
    assert_refused(path, "holds object values")


def test_files_that_are_no_arrays(tmp_path):
    path = tmp_path / "song.npy"
    assert_refused(path, "No such file")
    path.write_bytes(b"")
    assert_refused(path, r"is no \.npy file")
    path.write_text("hello " * 100)
    assert_refused(path, r"is no \.npy file")
    with path.open("wb") as file:
        np.savez(file, latents=latents_of(4))
    assert_refused(path, r"is no \.npy file")
    path.unlink()
    path.mkdir()
    assert_refused(path, "Is a directory|Permission denied")


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros(WIDTH, np.float32), r"has shape \(8,\)"),
        (np.zeros((2, WIDTH, 3), np.float32), r"has shape \(2, 8, 3\)"),
        (np.zeros((1, 1, WIDTH, 3), np.float32), r"has shape \(1, 1, 8, 3\)"),
        (np.float32(3), "holds no latents"),
        (np.zeros((WIDTH, 0), np.float32), "holds no latents"),
        (np.zeros((WIDTH, 3), np.int16), "holds int16 values"),
        (np.zeros((WIDTH, 3), np.complex64), "holds complex64 values"),
        (np.zeros((WIDTH, 3), [("a", "<f4")]), "holds "),
    ],
)
def test_arrays_that_are_no_latents(tmp_path, array, match):
    path = tmp_path / "song.npy"
    np.save(path, array)
    assert_refused(path, match)


def test_file_system_that_maps_no_files(tmp_path, monkeypatch):
    """Some file systems have no mmap, see mmap(2)."""
    path = tmp_path / "song.npy"
    write(path, latents_of(3))

    def refuse(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert_refused(path, r"cannot be opened \(No such device\)")


def test_another_width_names_both(tmp_path):
    path = tmp_path / "song.npy"
    write(path, latents_of(3))
    assert_refused(path, f"{WIDTH} wide, the model's 256", width=256)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite(tmp_path, monkeypatch, value):
    monkeypatch.setattr("samekit.files.latents._CHECKED_VALUES", 16)
    path = tmp_path / "song.npy"
    for position in ((0, 0), (WIDTH - 1, 9), (3, 4)):
        latents = latents_of(10)
        latents[position] = value
        np.save(path, latents)
        assert_refused(path, "holds NaN or infinity")


def test_damaged_headers_raise_nothing_else(tmp_path):
    path = tmp_path / "song.npy"
    write(path, latents_of(3))
    sound = path.read_bytes()
    random = np.random.RandomState(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(sound)
        damaged[random.randint(0, 80)] = random.choice([0, 255, *b"([{'<>-,0129afOV#\\"])
        path.write_bytes(damaged)
        try:
            read_latents(path)
        except LatentsFileError:
            refused += 1
    assert refused > 300


def test_second_version_of_the_format(tmp_path):
    path = tmp_path / "song.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, latents_of(5), version=(2, 0))
    assert np.array_equal(read_latents(path)[0], latents_of(5))
    with path.open("wb") as file:
        np.lib.format.write_array(file, latents_of(5), version=(3, 0))
    assert_refused(path, "is no .npy file, or a damaged one")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe{}", b"[" * 100_000])
def test_damaged_json(tmp_path, content):
    path = tmp_path / "song.npy"
    write(path, latents_of(3))
    path.with_suffix(".json").write_bytes(content)
    assert_refused(path, r"song\.json: ")


def test_header_that_claims_gigabytes(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(np.lib.format.magic(2, 0) + (3 * 10**9).to_bytes(4, "little") + b"{")
    os.truncate(path, 4 * 10**9)
    tracemalloc.start()
    assert_refused(path, "is no .npy file, or a damaged one")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_links_are_written_through(tmp_path):
    """Both files of a pair may be on another disk. The links stay, and their targets are replaced."""
    big = tmp_path / "big"
    big.mkdir()
    for suffix in ("npy", "json"):
        (tmp_path / f"song.{suffix}").symlink_to(big / f"elsewhere.{suffix}")
    # The targets do not exist yet, so nothing is replaced.
    require_replaceable(tmp_path / "song.npy")
    for seed in range(2):
        latents = latents_of(5, seed)
        write(tmp_path / "song.npy", latents, {"seed": seed}, follow_links=True)
        read, metadata = read_latents(tmp_path / "song.npy")
        assert np.array_equal(read, latents)
        assert metadata == {"seed": seed}
    assert sorted(path.name for path in big.iterdir()) == ["elsewhere.json", "elsewhere.npy"]
    assert all((tmp_path / f"song.{suffix}").is_symlink() for suffix in ("npy", "json"))


def test_links_are_replaced_unless_they_are_to_be_followed(tmp_path):
    """A dataset folder may come from an untrusted source and contain links to any file."""
    for suffix in ("npy", "json"):
        (tmp_path / f"precious.{suffix}").write_text("mine")
        (tmp_path / f"song.{suffix}").symlink_to(f"precious.{suffix}")
    write(tmp_path / "song.npy", latents_of(5), {"seed": 1})
    assert read_latents(tmp_path / "song.npy")[1] == {"seed": 1}
    for suffix in ("npy", "json"):
        assert (tmp_path / f"precious.{suffix}").read_text() == "mine"
        assert not (tmp_path / f"song.{suffix}").is_symlink()


@pytest.mark.parametrize(
    ("metadata", "replaceable"),
    [({"model_sha256": "0"}, True), ({}, False), ({"model_sha256": "0", "padding_mask": [1]}, False)],
    ids=["a file", "something else", "a clip of a dataset"],
)
def test_metadata_that_encoding_may_replace(tmp_path, metadata, replaceable):
    write(tmp_path / "song.npy", latents_of(5), metadata)
    with nullcontext() if replaceable else pytest.raises(OutputError, match="is of something else, and is not"):
        require_replaceable(tmp_path / "song.npy")
