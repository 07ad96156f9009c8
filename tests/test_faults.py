"""Fault injection: killed processes, full and read-only disks, changing files, concurrent commands, odd names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile as sf
from click.testing import CliRunner
from faults import KILLED, contents, fill, in_a_fork, kill_at_every_step, mounted, names, remount, together
from helpers import RATE, FakeBackend, assert_one_line, noise, seeded
from small import small_graph

from samekit import AutoencoderModel
from samekit.audio import read_audio
from samekit.cli.main import main
from samekit.dataset.check import verify
from samekit.dataset.options import PreEncodeOptions
from samekit.dataset.run import pre_encode
from samekit.engine.builds import BuiltEngine, build_folders, is_whole, open_cache
from samekit.engine.folder import Engine
from samekit.errors import AudioFileError, EngineError, LatentsFileError, OutputError
from samekit.files.latents import LatentsWriter
from samekit.serving import triton as triton_module
from samekit_export import export as export_module
from samekit_export import report as report_module
from samekit_export import to_tensorrt
from samekit_export.export import export

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are injected into forks of this process")

# --- Killed ---------------------------------------------------------------------------------------------------


def samekit(*arguments):
    """Run a command that succeeds, and return its output."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def engine(small_engine):
    return small_engine


@pytest.fixture
def options(engine):
    return ("--model", engine, "--backend", "onnxruntime", "--threads", 1)


@pytest.fixture
def song(tmp_path):
    path = tmp_path / "song.wav"
    sf.write(path, noise((999, 2), level=0.1), RATE, "PCM_16")
    return path


@pytest.fixture
def latents(tmp_path, song, options):
    path = tmp_path / "song.npy"
    samekit("encode", song, path, *options)
    return path


@pytest.fixture
def out(tmp_path):
    """Return an empty folder for outputs."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("older", [False, True])
def test_killed_encode(song, out, options, older, faults):
    whole = out.parent / "whole"
    whole.mkdir()
    samekit("encode", song, whole / "a.npy", *options)
    new, old = contents(whole), {"a.npy": b"an older", "a.json": b'{"model_sha256": "0"}'} if older else {}

    def prepare():
        shutil.rmtree(out)
        out.mkdir()
        for name, data in old.items():
            (out / name).write_bytes(data)

    def check(moment):
        found = {name: data for name, data in contents(out).items() if not name.startswith(".")}
        # The .json is deleted first and written last, so that it is never beside another .npy.
        between = [{name: pair["a.npy"]} for pair in (old, new) for name in ("a.npy",) if pair]
        assert found in ([old, new, *between]), f"{moment}: {names(out)}"
        samekit("encode", song, out / "a.npy", *options)
        assert contents(out) == new, moment

    kills = kill_at_every_step(lambda: samekit("encode", song, out / "a.npy", *options), check, prepare)
    faults["processes killed"] += kills
    assert kills >= 8


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_killed_decode(latents, out, options, suffix, faults):
    target = out / f"a.{suffix}"

    def prepare():
        target.write_bytes(b"an older file")

    def check(moment):
        assert target.read_bytes() in (b"an older file", new), moment
        samekit("decode", latents, target, *options)
        assert contents(out) == {target.name: new}, moment

    samekit("decode", latents, target, *options)
    new = target.read_bytes()
    kills = kill_at_every_step(lambda: samekit("decode", latents, target, *options), check, prepare)
    faults["processes killed"] += kills
    assert kills >= 4


@pytest.fixture
def quick_graphs(monkeypatch):
    """Make exports write small graphs without verification."""
    monkeypatch.setattr(
        export_module, "write_onnx", lambda _, path: small_graph(path.name.split(".")[0], path.parent, path.name)
    )
    monkeypatch.setattr(export_module, "verify", lambda *_: [])
    monkeypatch.setattr(export_module.Same, "from_checkpoint", lambda _: None)
    for direction in export_module.GRAPHS:
        monkeypatch.setitem(export_module.GRAPHS, direction, lambda _: QuickGraph())


class QuickGraph:
    """Replaces the graph modules."""

    def to_float16_(self):
        return self


@pytest.fixture
def quick_page(monkeypatch, engine):
    """Make reports show invented measurements."""
    row = report_module.Row("torch", "fp32", 0, np.inf, np.inf, 1.0, 0.0, 2.0, 3.0)
    measured = report_module.Report(
        source="song.wav",
        engine=Engine.load(engine),
        rows=[row],
        left_out=[],
        original=noise((2, 999)),
        decoded=noise((2, 999), 1),
        latents=noise((4, 125)),
        shown="torch fp32",
    )
    monkeypatch.setattr(report_module, "measure", lambda *_, **__: measured)


def engine_files(engine):
    """Return the names of all files of an engine folder, without TensorRT builds."""
    halves = engine.spec.graphs.values()
    return sorted({"spec.json", *(name for graphs in halves for graph in graphs.values() for name in graph.sizes)})


KILLED_EXPORTS = {
    "the same precision": ("tiny-s", 0, ["fp32"]),
    "another precision": ("tiny-s", 0, ["fp16"]),
    "other weights": ("tiny-s", 1, ["fp32", "fp16"]),
}


@pytest.mark.parametrize("what", KILLED_EXPORTS)
@pytest.mark.usefixtures("quick_graphs")
def test_killed_export(out, what, faults):
    """After each kill, the older or the newer export can be used. The next export deletes everything else."""
    folder = out / "tiny-s"
    name, seed, precisions = KILLED_EXPORTS[what]
    old = []

    def run():
        export(seeded(name, seed), out, precisions, force=True)

    def prepare():
        shutil.rmtree(out)
        out.mkdir()
        old[:] = [export(seeded("tiny-s"), out).spec]
        (folder / "tensorrt" / "some").mkdir(parents=True)
        (folder / "tensorrt" / "some" / "fingerprint.json").write_text("{}")

    def check(moment):
        engine = Engine.load(folder)
        engine.check_digests()
        assert engine.spec == old[0] or set(precisions) <= set(engine.spec.graphs), moment
        assert names(out) == ["tiny-s"], moment
        # A repeated command deletes the leftovers, even if the export is current.
        repeated = export(seeded(name, seed), out, precisions)
        repeated.check_digests()
        assert set(precisions) <= set(repeated.spec.graphs), moment
        assert names(out) == ["tiny-s"], moment
        # An export that is killed after its commit leaves stale builds, which `samekit clean` deletes.
        assert names(folder) == sorted([*engine_files(repeated), "tensorrt"]), moment
        if what != "other weights":
            assert names(folder / "tensorrt") == ["some"], moment

    kills = kill_at_every_step(run, check, prepare)
    faults["processes killed"] += kills
    assert kills >= 10


@pytest.mark.usefixtures("quick_graphs")
def test_killed_first_export(out, faults):
    def check(moment):
        assert not (out / "tiny-s" / "spec.json").exists() or Engine.load(out / "tiny-s").check_digests() is None
        engine = export(seeded("tiny-s"), out)
        assert engine_files(engine) == ["decoder.onnx", "encoder.onnx", "spec.json"], moment
        assert names(out) == ["tiny-s"], moment
        assert names(engine.folder) == engine_files(engine), moment

    def prepare():
        shutil.rmtree(out, ignore_errors=True)

    kills = kill_at_every_step(lambda: export(seeded("tiny-s"), out), check, prepare)
    faults["processes killed"] += kills
    assert kills >= 4


class QuickBuilder:
    """A fake TensorRT module."""

    __name__ = "tensorrt_rtx"
    __version__ = "1.7.1.116"


def quick_engines(engine, fingerprint, module, folder):
    """Write files in place of engines."""
    del engine, fingerprint, module
    for direction in ("encoder", "decoder"):
        (folder / f"{direction}.engine").write_bytes(direction.encode())
    (folder / "build.log").touch()
    digests = {direction: hashlib.sha256(direction.encode()).hexdigest() for direction in ("encoder", "decoder")}
    return {direction: BuiltEngine(f"{direction}.engine", 7, digests[direction], 1, 1.0, None) for direction in digests}


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_build(engine, tmp_path, monkeypatch, damaged, faults):
    folder = tmp_path / "engine"
    monkeypatch.setattr(to_tensorrt, "_build_engines", quick_engines)

    def run():
        to_tensorrt.build_engines(Engine.load(folder), "fp32", QuickBuilder(), "portable")

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(engine, folder)
        (build,) = (folder / "tensorrt").iterdir()
        if damaged:
            (build / "encoder.engine").write_bytes(b"")
        else:
            shutil.rmtree(build)
        build.with_name(f"{build.name}.failed.log").touch()

    def check(moment):
        run()
        (build,) = (folder / "tensorrt").iterdir()
        assert is_whole(build), moment

    kills = kill_at_every_step(run, check, prepare)
    faults["processes killed"] += kills
    assert kills >= 5


def test_killed_dataset(tmp_path, out, faults):
    data = tmp_path / "data"
    data.mkdir()
    for index in range(2):
        sf.write(data / f"{index}.wav", noise((300 + index, 2), index, 0.1), RATE, "PCM_16")
        (data / f"{index}.txt").write_text(f"caption {index}")

    def run(folder):
        pre_encode(AutoencoderModel(FakeBackend()), data, folder, PreEncodeOptions(sample_size=400, readers=1))

    def prepare():
        shutil.rmtree(out)
        out.mkdir()

    def check(moment):
        run(out)
        assert contents(out) == contents(tmp_path / "whole"), moment
        assert verify(out) == []

    run(tmp_path / "whole")
    kills = kill_at_every_step(lambda: run(out), check, prepare)
    faults["processes killed"] += kills
    assert kills >= 30


@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
def test_killed_repository(engine, out, monkeypatch, links, faults):
    if not links:
        monkeypatch.setattr(triton_module, "link_or_copy", shutil.copyfile)
    models = out / "models"

    def run():
        triton_module.write_repository(Engine.load(engine), models)

    def prepare():
        shutil.rmtree(models, ignore_errors=True)

    def check(moment):
        if models.exists():
            assert contents(models) == new, moment
            shutil.rmtree(models)
        run()
        # Neither the killed command nor the repeated one leaves other files.
        assert names(out) == ["models"], moment

    run()
    new = contents(models)
    kills = kill_at_every_step(run, check, prepare)
    faults["processes killed"] += kills
    assert kills >= 8


@pytest.mark.usefixtures("quick_page")
def test_killed_report(song, engine, out, monkeypatch, faults):
    page = out / "page.html"
    command = ("report", song, "--model", engine, "--out", page)
    # Drawing takes time, and happens before anything is written.
    monkeypatch.setattr(report_module, "page_of", lambda _: "a new page" * 10_000)

    def check(moment):
        assert page.read_text() in ("an older page", "a new page" * 10_000), moment
        samekit(*command)
        assert contents(out) == {"page.html": b"a new page" * 10_000}, moment

    kills = kill_at_every_step(lambda: samekit(*command), check, lambda: page.write_text("an older page"))
    faults["processes killed"] += kills
    assert kills >= 4


# --- The disk ------------------------------------------------------------------------------------------------


def long_song(path):
    sf.write(path, noise((60_000, 2), level=0.1), RATE, "PCM_16")
    return path


# Commands that write to a folder that holds their older result.
def _writers(work, options, engine):
    song = long_song(work / "song.wav")
    samekit("encode", song, work / "song.npy", *options)
    shutil.copytree(engine, work / "engine")
    (build,) = (work / "engine" / "tensorrt").iterdir()
    (build / "encoder.engine").write_bytes(b"")
    (work / "data").mkdir()
    for index in range(40):
        shutil.copyfile(song, work / "data" / f"{index}.wav")
        (work / "data" / f"{index}.txt").write_text("caption")
    return {
        "encode": lambda disk: ["encode", song, disk / "a.npy", *options],
        "decode": lambda disk: ["decode", work / "song.npy", disk / "a.wav", *options],
        "pre-encode": lambda disk: [
            "pre-encode",
            *options,
            "--sample_size",
            "8000",
            "--data_dir",
            work / "data",
            "--output_path",
            disk / "out",
        ],
        "export": lambda disk: ["export", "tiny-s", "--weights", "random", "--out", disk, "--force"],
        "triton": lambda disk: ["triton", disk / "models", "--model", engine],
        "report": lambda disk: ["report", song, "--model", engine, "--out", disk / "page.html"],
    }


WRITERS = ("encode", "decode", "pre-encode", "export", "triton", "report")
# Free bytes on the full disk. Repositories of small graphs are small.
ROOM = dict.fromkeys(WRITERS, 40_000) | {"triton": 0}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fault", ["full", "read-only"])
@pytest.mark.usefixtures("quick_graphs", "quick_page")
def test_disk_that_cannot_be_written(tmp_path, options, engine, monkeypatch, writer, fault, faults):
    command = _writers(tmp_path, options, engine)[writer]
    small = export_module.write_onnx

    def larger(graph, path):
        small(graph, path)
        path.with_name(f"{path.name}.data").write_bytes(bytes(300_000))

    with mounted(tmp_path / "disk", "-o", "size=1m") as disk:
        if writer == "pre-encode":
            (disk / "out" / ".samekit").mkdir(parents=True)
        elif writer != "triton":
            samekit(*command(disk))
        fill(disk, ROOM[writer])
        before = contents(disk)
        monkeypatch.setattr(export_module, "write_onnx", larger)
        if fault == "read-only":
            remount(disk, "ro")
        result = CliRunner().invoke(main, list(map(str, command(disk))))
        faults["disks full" if fault == "full" else "disks read-only"] += 1
        assert result.exit_code == 2, result.output
        full = ("No space left", "Not enough free space")
        assert any(reason in result.stderr for reason in (full if fault == "full" else ("Read-only file system",)))
        assert "choose a folder that exists, is writable and has room" in result.stderr
        assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1
        if writer != "pre-encode":
            assert contents(disk) == before
        assert not list(disk.rglob(".*.tmp"))
        # With free space the command succeeds.
        remount(disk, "rw,size=20m")
        samekit(*command(disk))
        assert not list(disk.rglob(".*.tmp"))


def test_cleaning_on_a_read_only_disk(tmp_path, engine, faults):
    with mounted(tmp_path / "disk") as disk:
        shutil.copytree(engine, disk / "engine")
        (build,) = (disk / "engine" / "tensorrt").iterdir()
        (build / "encoder.engine").write_bytes(b"")
        before = contents(disk)
        remount(disk, "ro")
        result = CliRunner().invoke(main, ["clean", str(disk / "engine")])
        faults["disks read-only"] += 1
        assert result.exit_code == 2
        assert "Read-only file system" in result.stderr
        assert contents(disk) == before
        samekit("info", disk / "engine")


# --- Files that change while they are read --------------------------------------------------------------------


def shrink(path):
    os.truncate(path, path.stat().st_size // 3)


def grow(path):
    with path.open("ab") as file:
        file.write(bytes(100_000))


def replace(path):
    other = path.with_name(f"other{path.suffix}")
    sf.write(other, noise((70_000, 2), 1, 0.1), RATE)
    other.replace(path)


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(1000))


def remove(path):
    path.unlink()


CHANGES = {change.__name__: change for change in (shrink, grow, replace, overwrite, remove)}


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
@pytest.mark.parametrize("change", CHANGES)
def test_audio_that_changes_while_it_is_encoded(tmp_path, monkeypatch, suffix, change, faults):
    path = tmp_path / f"song.{suffix}"
    sf.write(path, noise((200_000, 2), level=0.1), RATE)
    os.utime(path, (1, 1))
    monkeypatch.setattr("samekit.audio.reader._BLOCK_VALUES", 40_000)
    model, blocks = AutoencoderModel(FakeBackend()), []

    def progress(frames):
        blocks.append(frames)
        if len(blocks) == 2:
            CHANGES[change](path)

    (tmp_path / "out").mkdir()
    with pytest.raises(AudioFileError) as caught:
        model.encode_file(path, tmp_path / "out" / "a.npy", progress)
    faults["files changed while they were read"] += 1
    assert_one_line(caught.value)
    assert len(blocks) >= 2
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("change", CHANGES)
def test_audio_that_changes_while_a_dataset_is_encoded(tmp_path, out, change, faults):
    """The first run may encode either contents or fail. After the next run, the clip must be right."""
    data = tmp_path / "data"
    data.mkdir()
    for index in range(4):
        sf.write(data / f"{index}.wav", noise((50_000, 2), index, 0.1), RATE, "PCM_16")
        (data / f"{index}.txt").write_text(f"caption {index}")
        os.utime(data / f"{index}.wav", (1, 1))
    changed = []

    def answer(direction, array):
        if not changed:
            changed.append(CHANGES[change](data / "2.wav"))
        return FakeBackend().zeros(direction, array) + array[:, :1, ::8][:, :, : array.shape[-1] // 8]

    model = AutoencoderModel(FakeBackend(answer))
    pre_encode(model, data, out, PreEncodeOptions(readers=1))
    faults["files changed while they were read"] += len(changed)
    (data / "other.wav").unlink(missing_ok=True)
    pre_encode(model, data, out)
    pre_encode(model, data, tmp_path / "whole")
    if change == "remove":
        # No other clip gets the number of the removed one.
        found = {name for name in contents(out) if name.endswith(".npy")}
        assert len(found) >= 4
        return
    assert contents(out).get("000000000002.npy") == contents(tmp_path / "whole").get("000000000002.npy")
    assert verify(out) == []


@pytest.mark.parametrize("change", ["shrink", "remove", "overwrite"])
def test_latents_that_change_while_they_are_decoded(tmp_path, out, change, faults):
    path = tmp_path / "song.npy"
    with LatentsWriter(path, 4) as writer:
        writer.write(noise((4, 100_000)))
    calls = []

    def answer(direction, array):
        calls.append(direction)
        if len(calls) == 3:
            CHANGES[change](path)
        return FakeBackend().zeros(direction, array)

    def decode():
        try:
            AutoencoderModel(FakeBackend(answer)).decode_file(path, out / "a.wav")
        except LatentsFileError as error:
            assert_one_line(error)
            assert names(out) == []

    # In a fork, because reading a map of a file that has shrunk ends a process.
    assert in_a_fork(decode) == 0
    faults["files changed while they were read"] += 1


# --- Pipes and devices -----------------------------------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def device(path):
    """Return a device, whose size is 0 and which never ends."""
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", [pipe, device])
@pytest.mark.parametrize(
    "place",
    [
        "song.wav",
        "song.npy",
        "song.json",
        "engine/spec.json",
        "build/fingerprint.json",
        "out/.samekit/manifest-000001.jsonl",
        "checkpoint/model_config.json",
        "checkpoint/model.safetensors",
    ],
)
def test_what_is_no_file_is_refused_at_once(engine, latents, checkpoint_of, tmp_path, kind, place, faults):
    """Opening a pipe would block, and reading a device would never end."""
    shutil.copytree(engine, tmp_path / "engine")
    (build,) = (tmp_path / "engine" / "tensorrt").iterdir()
    (tmp_path / "build").symlink_to(build)
    (tmp_path / "out" / ".samekit").mkdir(parents=True)
    shutil.copytree(checkpoint_of("tiny-s"), tmp_path / "checkpoint")
    (tmp_path / place).unlink(missing_ok=True)
    kind(tmp_path / place)
    options = ("--model", engine, "--backend", "onnxruntime", "--threads", 1)
    command = {
        "song.wav": ("encode", tmp_path / "song.wav", tmp_path / "new.npy", *options),
        "song.npy": ("decode", latents, tmp_path / "new.wav", *options),
        "song.json": ("decode", latents, tmp_path / "new.wav", *options),
        "engine": ("info", tmp_path / "engine"),
        "build": ("info", tmp_path / "engine"),
        "out": ("pre-encode", *options, "--data_dir", tmp_path / "data", "--output_path", tmp_path / "out"),
        "checkpoint": ("export", tmp_path / "checkpoint", "--out", tmp_path / "engines"),
    }[place.split("/")[0]]
    (tmp_path / "data").mkdir()
    sf.write(tmp_path / "data" / "a.wav", noise((300, 2), level=0.1), RATE)
    (tmp_path / "data" / "a.txt").write_text("a clip", encoding="utf-8")

    def run():
        result = CliRunner().invoke(main, [str(argument) for argument in command])
        # `info` lists damaged builds and succeeds.
        assert result.exit_code == (0 if place.startswith("build") else 2), result.output
        assert "no regular file" in result.output or f"no {Path(place).name} here" in result.output

    assert in_a_fork(run) == 0
    faults["pipes and devices in place of files"] += 1


# --- Concurrent processes ----------------------------------------------------------------------------------------


def quietly(error, work):
    """Return a function that does the work, and ignores `error` if another process was faster."""

    def run():
        try:
            work()
        except error as caught:
            assert_one_line(caught)

    return run


@pytest.mark.usefixtures("quick_graphs")
def test_exports_into_one_folder_at_once(out):
    for _ in range(10):
        assert together(*[lambda: export(seeded("tiny-s"), out, force=True)] * 3) == [0, 0, 0]
        assert names(out) == ["tiny-s"]
        engine = Engine.load(out / "tiny-s")
        engine.check_digests()
        assert names(engine.folder) == engine_files(engine)


@pytest.mark.usefixtures("quick_graphs")
def test_exports_of_different_precisions_into_one_folder_at_once(out, monkeypatch):
    """Both exports succeed, and the folder holds both precisions."""
    quick = export_module.write_onnx

    def write_slowly(graph, path):
        time.sleep(0.2)
        quick(graph, path)

    monkeypatch.setattr(export_module, "write_onnx", write_slowly)
    for _ in range(3):
        works = [partial(export, seeded("tiny-s"), out, [precision]) for precision in ("fp32", "fp16")]
        assert together(*works) == [0, 0]
        engine = Engine.load(out / "tiny-s")
        assert set(engine.spec.graphs) == {"fp32", "fp16"}
        engine.check_digests()
        assert names(engine.folder) == engine_files(engine)
        shutil.rmtree(out / "tiny-s")


def test_builds_into_one_folder_at_once(engine, tmp_path, monkeypatch):
    """One process builds, and the others use its build. `samekit clean` does not delete a running build."""
    folder = shutil.copytree(engine, tmp_path / "engine")
    (build,) = (folder / "tensorrt").iterdir()
    built = tmp_path / "built"

    def slow_engines(*arguments):
        with built.open("a") as file:
            file.write("built\n")
        engines = quick_engines(*arguments)
        time.sleep(0.3)
        return engines

    monkeypatch.setattr(to_tensorrt, "_build_engines", slow_engines)
    work = partial(to_tensorrt.build_engines, Engine.load(folder), "fp32", QuickBuilder(), "portable")
    for before in ("no build", "a damaged build"):
        built.write_text("")
        if before == "no build":
            shutil.rmtree(build)
        else:
            (build / "encoder.engine").write_bytes(b"")
        assert together(work, work, partial(samekit, "clean", folder)) == [0, 0, 0]
        # The damaged build is either deleted by `clean` or replaced.
        assert names(folder / "tensorrt") == [build.name]
        assert is_whole(build)
        assert built.read_text() == "built\n"


def test_caches_of_onnxruntime_are_opened_at_once(engine, tmp_path):
    folder = shutil.copytree(engine, tmp_path / "engine")
    for _ in range(5):
        shutil.rmtree(folder / "tensorrt")
        work = partial(open_cache, Engine.load(folder), "fp32", "onnxruntime", "1.32.0")
        assert together(work, work, work) == [0, 0, 0]
        (cache,) = build_folders(Engine.load(folder))
        assert names(cache) == ["fingerprint.json"]
        assert is_whole(cache)


@pytest.mark.usefixtures("quick_graphs")
def test_reading_while_it_is_exported_again(out, monkeypatch):
    """A reader runs one of the exports, or gets the error that the folder was exported again."""

    def small_spec(checkpoint):
        facts = {"name": checkpoint.name, "source": checkpoint.source, "source_sha256": checkpoint.sha256}
        return dataclasses.replace(FakeBackend().spec, **facts)

    monkeypatch.setattr(export_module, "spec_of", small_spec)
    export(seeded("tiny-s"), out)
    done = out.parent / "done"

    def write():
        try:
            for seed in range(40):
                export(seeded("tiny-s", seed), out, force=True)
        finally:
            done.touch()

    def read():
        opened = 0
        while not done.exists():
            try:
                with AutoencoderModel.from_pretrained(out / "tiny-s", backend="onnxruntime", threads=1) as model:
                    assert model.autoencoder.backend.encode(noise((1, 2, 16))).shape == (1, 4, 2)
                opened += 1
            except EngineError as error:
                if not str(error).endswith("was exported again since it was opened; open the model again"):
                    raise
        assert opened >= 10

    assert together(write, read) == [0, 0]


def test_encodes_and_decodes_to_one_file_at_once(song, latents, out, options):
    encode, decode = ("encode", song, out / "a.npy", *options), ("decode", latents, out / "a.wav", *options)
    for _ in range(5):
        assert together(*[lambda: samekit(*encode), lambda: samekit(*decode)] * 2) == [0] * 4
        assert names(out) == ["a.json", "a.npy", "a.wav"]
        assert np.array_equal(np.load(out / "a.npy"), np.load(latents))


def test_repositories_into_one_folder_at_once(engine, out):
    """One process writes it, and the others report that it exists."""
    ended = out.parent / "ended"
    ended.mkdir()

    def run(index):
        result = CliRunner().invoke(main, ["triton", str(out / "models"), "--model", str(engine)])
        (ended / str(index)).write_text(f"{result.exit_code} {result.stderr}")

    for _ in range(10):
        assert together(*[partial(run, index) for index in range(3)]) == [0, 0, 0]
        first, *others = sorted(path.read_text() for path in ended.iterdir())
        assert first == "0 "
        assert all(line.startswith("2 ") and "exists" in line for line in others), others
        assert names(out) == ["models"]
        shutil.rmtree(out / "models")


@pytest.mark.usefixtures("quick_page")
def test_reports_into_one_file_at_once(song, engine, out):
    command = ("report", song, "--model", engine, "--out", out / "page.html")
    assert together(*[lambda: samekit(*command)] * 3) == [0, 0, 0]
    assert names(out) == ["page.html"]
    assert (out / "page.html").read_text().rstrip().endswith("</html>")


def test_cleaning_and_looking_at_once(engine, tmp_path):
    for index in range(10):
        folder = tmp_path / str(index)
        shutil.copytree(engine, folder)
        (build,) = (folder / "tensorrt").iterdir()
        for copy in range(5):
            shutil.copytree(build, build.with_name(f"stale{copy}"))
            (build.with_name(f"stale{copy}") / "encoder.engine").write_bytes(b"")
            build.with_name(f"{copy}.failed.log").touch()
        clean, info = partial(samekit, "clean", folder), partial(samekit, "info", folder)
        assert together(clean, info, clean, info) == [0] * 4
        assert names(folder / "tensorrt") == [build.name]


def test_datasets_into_one_folder_at_once(tmp_path, out):
    data = tmp_path / "data"
    data.mkdir()
    for index in range(20):
        sf.write(data / f"{index}.wav", noise((300, 2), index, 0.1), RATE, "PCM_16")
        (data / f"{index}.txt").write_text("caption")

    def run():
        pre_encode(AutoencoderModel(FakeBackend()), data, out, PreEncodeOptions(readers=1))

    assert together(*[quietly(OutputError, run)] * 3) == [0, 0, 0]
    assert verify(out) == []


# --- Threads ---------------------------------------------------------------------------------------------------


def test_sixteen_threads_share_a_model(engine):
    """Results are equal, and memory does not grow with the number of calls."""
    clips = [noise((2, 8 * (1 + index)), index) for index in range(16)]
    with AutoencoderModel.from_pretrained(engine, backend="onnxruntime", threads=1) as model:
        model.autoencoder.backend.use_packed_weights("encoder")
        model.autoencoder.backend.use_packed_weights("decoder")
        expected = [model.decode(model.encode(clip, RATE)) for clip in clips]

        def run(index):
            for _ in range(65):
                assert np.array_equal(model.decode(model.encode(clips[index], RATE)), expected[index])
            return 65

        process = psutil.Process()
        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(run, range(16))) == 1040
            before = process.memory_info().rss
            assert sum(pool.map(run, range(16))) == 1040
            grown = process.memory_info().rss - before
    assert grown < 8e6, f"{grown / 1e6:.1f} MB after 1,040 more calls of both halves"


# --- The clock, the locale, names ------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_clock_that_jumps(tmp_path, out, monkeypatch, jump):
    """The wall clock does not decide which clips are encoded."""
    data = tmp_path / "data"
    data.mkdir()
    for index in range(3):
        sf.write(data / f"{index}.wav", noise((300, 2), index, 0.1), RATE, "PCM_16")
        (data / f"{index}.txt").write_text("caption")
        os.utime(data / f"{index}.wav", (2e9 * (index % 2), 2e9 * (index % 2)))
    model, real = AutoencoderModel(FakeBackend()), time.time
    monkeypatch.setattr(time, "time", lambda: real() + random.choice((0, jump)))
    assert pre_encode(model, data, out).encoded == 3
    start = time.monotonic()
    report = pre_encode(model, data, out)
    assert (report.encoded, report.unchanged) == (0, 3)
    assert 0 <= report.elapsed <= time.monotonic() - start


# File names as bytes.
ODD_NAMES = {
    "spaces": b" a  song ",
    "quotes": b'it\'s "quoted"',
    "newline": b"two\nlines\ttab\x1b[2J",
    "emoji": "größe 🎵".encode(),
    "no text": b"caf\xe9 \xff",
    "long": b"n" * 246,
    "long text": "é".encode() * 123,
    "shell": b"$(touch pwned) `touch pwned`; touch pwned & *",
    "dash": b"-v --help",
    "pattern": b"[a-z]*?",
}


@pytest.mark.parametrize("kind", ODD_NAMES)
@pytest.mark.usefixtures("quick_graphs")
def test_odd_names(engine, song, tmp_path, kind):
    name = os.fsdecode(ODD_NAMES[kind])
    work = tmp_path / name
    work.mkdir()
    # ONNX Runtime accepts UTF-8 paths only, see `test_engine_whose_name_is_no_text`.
    model = shutil.copytree(engine, tmp_path / "model" if kind == "no text" else work / name)
    audio = shutil.copyfile(song, work / f"{name}.wav")
    (work / f"{name}.txt").write_text("caption")
    options = ("--model", model, "--backend", "onnxruntime", "--threads", 1)
    samekit("info", model)
    samekit("clean", model)
    samekit("encode", audio, work / f"{name}.npy", *options)
    samekit("decode", work / f"{name}.npy", tmp_path / f"{name}.wav", *options)
    assert read_audio(tmp_path / f"{name}.wav")[0].shape == read_audio(audio)[0].shape
    samekit("pre-encode", *options, "--data_dir", work, "--output_path", tmp_path / "out")
    samekit("check-latents", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "000000000000.json").read_text())["relpath"] == f"{name}.wav"
    samekit("export", "tiny-s", "--weights", "random", "--out", work / "engines")
    assert names(work / "engines") == ["tiny-s"]
    assert not list(tmp_path.rglob("pwned"))


def test_engine_whose_name_is_no_text(engine, latents, tmp_path):
    folder = shutil.copytree(engine, tmp_path / os.fsdecode(b"caf\xe9"))
    samekit("info", folder)
    arguments = ["decode", latents, tmp_path / "a.wav", "--model", folder, "--backend", "onnxruntime"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 2
    # The line before it says what was begun.
    assert result.stderr.splitlines()[-1].endswith("its name is no UTF-8, which this library needs; rename it")


def test_checkpoint_whose_name_is_no_text(checkpoint_of, tmp_path):
    folder = shutil.copytree(checkpoint_of("tiny-s"), tmp_path / os.fsdecode(b"caf\xe9"))
    result = CliRunner().invoke(main, ["export", str(folder), "--out", str(tmp_path / "engines")])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.endswith("its name is no UTF-8, which this library needs; rename it")


@pytest.mark.usefixtures("quick_graphs")
def test_model_with_a_long_name(out):
    """A checkpoint folder may have a long name."""
    name = "m" * 250
    for _ in range(2):
        export(dataclasses.replace(seeded("tiny-s"), name=name), out, force=True)
        assert names(out) == [name]


def test_locale_that_is_not_utf_8(engine, tmp_path):
    """Containers and cron jobs may have such a locale. All names and messages must still work."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    name = os.fsencode(tmp_path / "größe 🎵")
    sf.write(name + b".wav", noise((999, 2), level=0.1), RATE, "PCM_16", format="WAV")
    script = """
import sys
from samekit.cli.main import main
name, engine = sys.argv[1:]
options = ["--model", engine, "--backend", "onnxruntime", "--threads", "1"]
for arguments in (
    ["encode", name + ".wav", name + ".npy", *options],
    ["decode", name + ".npy", name + "2.wav", *options],
    ["info", engine],
    ["pre-encode", *options, "--data_dir", name + "data", "--output_path", name + "out"],
    ["check-latents", name + "out"],
    ["encode", name + "nowhere.wav", name + ".npy", *options],
):
    try:
        main(arguments)
    except SystemExit as end:
        print(end.code)
"""
    data = Path(os.fsdecode(name + b"data"))
    data.mkdir()
    shutil.copyfile(name + b".wav", os.fsencode(data / "ü.wav"))
    (data / "ü.txt").write_text("größer", encoding="utf-8")
    own = tmp_path / "größe"
    shutil.copytree(engine, own)
    done = subprocess.run(
        [sys.executable, "-c", script, name, os.fsencode(own)],
        capture_output=True,
        check=False,
        env=environment,
        timeout=120,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert codes == [b"0"] * 5 + [b"2"], (done.stdout, done.stderr)
    assert done.stdout.isascii()
    assert sf.info(name + b"2.wav").frames == 999


@pytest.mark.slow
def test_killed_builds_of_tensorrt(engine, tmp_path):
    """The real compiler is killed at random moments."""
    pytest.importorskip("tensorrt_rtx")
    folder = shutil.copytree(engine, tmp_path / "engine")
    shutil.rmtree(folder / "tensorrt")
    script = """
import sys
from pathlib import Path
from samekit.engine.folder import Engine
from samekit_export.to_tensorrt import add_engines
add_engines(Engine.load(Path(sys.argv[1])), ["fp32"], "rtx")
"""
    command = [sys.executable, "-c", script, folder]
    begun = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds, died = time.monotonic() - begun, 0
    moments = random.Random(0)
    for _ in range(12):
        shutil.rmtree(folder / "tensorrt", ignore_errors=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds * (0.3 + 0.7 * moments.random()))
        process.kill()
        died += process.wait() == KILLED
        assert all(is_whole(build) for build in build_folders(Engine.load(folder)))
    subprocess.run(command, check=True, capture_output=True)
    (build,) = (folder / "tensorrt").iterdir()
    assert is_whole(build)
    assert died >= 6
