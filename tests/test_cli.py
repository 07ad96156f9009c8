"""The `samekit` command: its output, and its errors, which are one line and exit code 2."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
import soundfile as sf
from click.testing import CliRunner
from helpers import HOP, RATE, assert_close, edit, noise
from safetensors.torch import load_file, save_file

from samekit import AutoencoderModel, __version__
from samekit.audio import read_audio
from samekit.cli.main import main
from samekit_export.random_weights import published_config

COMMANDS = main.list_commands(click.Context(main))
SAMPLES = 70 * HOP + 1000


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeeded(*arguments):
    """Run a command that must succeed, and return its standard output."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.stderr
    return result.stdout


def refused(*arguments):
    """Run a command that must fail, and return its error message of one line."""
    result = run(*arguments)
    assert result.exit_code == 2, repr(result.exception)
    assert isinstance(result.exception, SystemExit)
    *progress, line = result.stderr.splitlines()
    # Work that had begun announced itself in one line.
    assert len(progress) <= 1
    assert all(re.match("(en|de)coding ", text) for text in progress)
    assert line.startswith("Error: ")
    assert "; " in line
    return line


@pytest.fixture
def engine(engine_of):
    """Folder of an exported tiny-s. Tests must not change it."""
    return engine_of("tiny-s").folder


@pytest.fixture
def song(tmp_path):
    """Path of a valid audio file."""
    path = tmp_path / "song.wav"
    sf.write(path, noise((SAMPLES, 2), level=0.1), RATE, "PCM_16")
    return path


@pytest.fixture
def latents(tmp_path):
    """Path of a valid latents file without a `.json`."""
    path = tmp_path / "latents.npy"
    np.save(path, noise((32, 5), level=1))
    return path


@pytest.fixture
def folder(tmp_path):
    """Path of an empty folder for outputs."""
    path = tmp_path / "out"
    path.mkdir()
    return path


# --- Valid commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=str)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command, flag):
    text = succeeded(*command, flag)
    assert text.startswith(f"Usage: main {' '.join(command)}".rstrip())
    assert len(text.splitlines()) > 5
    if not command:
        assert all(f"\n  {name} " in text for name in COMMANDS)


def test_commands():
    assert {"decode", "encode", "export", "info", "verify"} <= set(COMMANDS)
    assert __version__ in succeeded("--version")


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "torch"])
def test_encode_and_decode(model_of, engine, song, folder, backend):
    chosen = ["--model", engine, "--backend", backend, "--threads", 1]
    assert succeeded("encode", song, folder / "a.npy", *chosen) == (
        f"{folder / 'a.npy'}: 71 latents of 32 from {SAMPLES / RATE:.2f} s\n"
    )
    model = model_of("tiny-s", "onnxruntime")
    clip, _ = read_audio(song)
    latents = np.load(folder / "a.npy")
    assert_close(model.encode(clip, RATE)[0], latents, 100)
    assert json.loads((folder / "a.json").read_text(encoding="utf-8"))["samples"] == SAMPLES

    options = ["--bits", "float", "--window", 32]
    assert succeeded("decode", folder / "a.npy", folder / "b.wav", *chosen, *options) == (
        f"{folder / 'b.wav'}: {SAMPLES / RATE:.2f} s at {RATE} Hz\n"
    )
    assert_close(model.decode(latents[None])[0, :, :SAMPLES], read_audio(folder / "b.wav")[0], 100)
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.npy", "b.wav"]


@pytest.mark.parametrize(
    ("bits", "suffix", "subtype"),
    [("16", "flac", "PCM_16"), ("24", "wav", "PCM_24"), ("32", "wav", "PCM_32"), ("float", "wav", "FLOAT")],
)
def test_bits(engine, latents, folder, bits, suffix, subtype):
    path = folder / f"song.{suffix}"
    succeeded("decode", latents, path, "--model", engine, "--bits", bits)
    info = sf.info(path)
    assert (info.subtype, info.frames, info.samplerate, info.channels) == (subtype, 5 * HOP, RATE, 2)


@pytest.mark.parametrize(
    ("peak", "highest"), [(None, None), ("raw", None), ("attenuate", 1), ("limit", 0.977), ("clip", 1)]
)
def test_peak(engine, tmp_path, folder, peak, highest):
    np.save(tmp_path / "loud.npy", noise((32, 4), level=5))
    options = ["--model", engine, "--bits", "float", *(["--peak", peak] if peak else [])]
    succeeded("decode", tmp_path / "loud.npy", folder / "a.wav", *options)
    measured = np.abs(read_audio(folder / "a.wav")[0]).max()
    assert measured == pytest.approx(highest) if highest else measured > 1


def test_attenuation_is_said(engine, tmp_path, folder):
    np.save(tmp_path / "loud.npy", noise((32, 4), level=5))
    command = [sys.executable, "-m", "samekit", "decode", tmp_path / "loud.npy", folder / "a.wav", "--model", engine]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert re.search(
        rf"{folder / 'a.wav'}: the peak was \d+\.\d\d dB above full scale; all samples are attenuated", done.stderr
    )
    assert "cannot" not in refused(
        "decode", tmp_path / "loud.npy", folder / "a.wav", "--model", engine, "--peak", "raw"
    )


def test_recordings_are_replaced_only_when_that_is_wanted(engine, song, monkeypatch):
    monkeypatch.chdir(song.parent)
    options = ("--model", engine, "--backend", "onnxruntime", "--threads", 1)
    before = song.read_bytes()
    succeeded("encode", "song.wav", "song.npy", *options)
    line = refused("decode", "song.npy", "song.wav", *options)
    assert line.startswith("Error: song.wav: is the recording that song.json names as the source of these latents; ")
    assert "--force" in line
    # The error comes before the model is searched for.
    assert refused("decode", "song.npy", "song.wav", "--model", "nothing") == line
    assert song.read_bytes() == before
    for _ in range(2):
        succeeded("decode", "song.npy", "other.wav", *options)
    succeeded("decode", "song.npy", "song.wav", "--force", *options)
    assert song.read_bytes() == (song.parent / "other.wav").read_bytes() != before


def test_inputs_are_not_outputs(engine, song, latents):
    before = song.read_bytes()
    (song.parent / "link.html").symlink_to(song)
    for output in (song, song.parent / "link.html"):
        assert "is the input itself; " in refused("report", song, "--model", engine, "--out", output)
    audio = song.rename(song.with_suffix(".npy"))
    assert "is the input itself; " in refused("encode", audio, audio, "--model", engine)
    assert audio.read_bytes() == before
    misnamed = latents.rename(latents.with_suffix(".wav"))
    before = misnamed.read_bytes()
    for force in ([], ["--force"]):
        assert "is the input itself; " in refused("decode", misnamed, misnamed, "--model", engine, *force)
    assert misnamed.read_bytes() == before


def test_checkpoint_folder_in_place_of_an_engine(checkpoint_of, latents, folder):
    succeeded("decode", latents, folder / "a.wav", "--model", checkpoint_of("tiny-s"))
    assert sf.info(folder / "a.wav").frames == 5 * HOP


@pytest.mark.usefixtures("ready_graphs")
def test_home_folder_is_expanded_in_every_path(checkpoint_of, engine, song, tmp_path, monkeypatch):
    """Neither shells nor Python expand the `~` of `--out=~/name`."""
    home, here = tmp_path / "home", tmp_path / "here"
    for path in (home, here):
        path.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    shutil.copyfile(song, home / "song.wav")
    shutil.copytree(checkpoint_of("tiny-s"), home / "checkpoint")
    shutil.copytree(engine, home / "engine")
    succeeded("export", "~/checkpoint", "--out=~/of-a-folder")
    succeeded("export", "mine", "--weights=~/checkpoint", "--out=~/of-weights")
    options = ("--model=~/engine", "--backend=onnxruntime", "--threads=1")
    succeeded("encode", "~/song.wav", "~/song.npy", *options)
    succeeded("decode", "~/song.npy", "~/decoded.wav", *options)
    succeeded("triton", "~/models", "--model=~/engine")
    succeeded("info", "~/engine")
    succeeded("clean", "~/engine")
    with AutoencoderModel.from_pretrained("~/engine", backend="onnxruntime", threads=1) as model:
        model.encode_file("~/song.wav", "~/again.npy")
        model.decode_file("~/again.npy", "~/again.wav")
    assert (home / "again.npy").read_bytes() == (home / "song.npy").read_bytes()
    assert (home / "again.wav").read_bytes() == (home / "decoded.wav").read_bytes()
    made = {"of-a-folder", "of-weights", "song.npy", "song.json", "models", "again.npy", "again.wav", "decoded.wav"}
    assert made <= {path.name for path in home.iterdir()}
    assert list(here.iterdir()) == []
    # `./~` is a folder named `~` in the working folder.
    (here / "~").mkdir()
    succeeded("encode", "~/song.wav", "./~/here.npy", *options)
    assert sorted(path.name for path in (here / "~").iterdir()) == ["here.json", "here.npy"]


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv, with which even root has no rights to a file")
@pytest.mark.parametrize("command", ["encode", "report", "decode"])
def test_file_that_may_not_be_read(song, folder, command):
    path = song.with_suffix(".npy") if command == "decode" else song
    path.touch()
    path.chmod(0)
    arguments = {"report": [path, "--out", folder / "a.html"], "decode": [path, folder / "a.wav"]}
    arguments = arguments.get(command, [path, folder / "a.npy"])
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    program = [*drop, sys.executable, "-m", "samekit", command, *map(str, arguments), "--model", "x"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    if command == "report":
        # This command searches for the model before it opens the file.
        assert done.stderr.startswith("Error: no engine for 'x'")
    else:
        assert done.stderr == f"Error: {path}: cannot be opened (Permission denied); check name and permissions\n"


def test_folder_in_place_of_an_audio_file(song, folder):
    line = refused("encode", song.parent, folder / "a.npy", "--model", "nothing")
    command = f"samekit pre-encode --data_dir {song.parent}"
    assert line == f"Error: {song.parent}: is a folder; pass one audio file, or encode a dataset with: {command}"


def test_model_by_name(engine, latents, folder, monkeypatch):
    monkeypatch.setenv("SAMEKIT_CACHE", str(engine.parent))
    succeeded("decode", latents, folder / "a.wav", "--model", "tiny-s", "--backend", "onnxruntime")
    assert "tiny-s in" in succeeded("info", "tiny-s")


def test_info(engine):
    text = succeeded("info", engine)
    for fact in (f"tiny-s in {engine}", "44100 Hz", "4096 samples", "32 wide", "multiples of 2", "kind random", "fp32"):
        assert fact in text
    (graphs,) = [line for line in text.splitlines() if line.lstrip().startswith("fp32")]
    worst = float(graphs.split("at least ")[1].split(" dB")[0])
    assert worst >= 100


def test_target_of_int8(ready_graphs, folder):
    arguments = ("export", "tiny-s", "--weights", "random", "--out", folder, "--precision", "fp32,int8")
    text = succeeded(*arguments, "--int8-target", 20)
    assert "rounding weights to int8, for an accuracy of 20 dB" in text
    assert "all products of the blocks are int8" in text
    (line,) = [line for line in succeeded("info", folder / "tiny-s").splitlines() if line.lstrip().startswith("int8")]
    assert line.endswith(", the target was 20 dB")
    graphs = json.loads(succeeded("info", folder / "tiny-s", "--json"))["graphs"]
    assert graphs["int8"]["target_db"] == 20
    assert "target_db" not in graphs["fp32"]
    assert len(ready_graphs) == 4


def test_target_without_int8(ready_graphs, folder):
    line = refused("export", "tiny-s", "--weights", "random", "--out", folder, "--int8-target", 20)
    assert line == "Error: --int8-target is for int8; add int8 to --precision"
    assert ready_graphs == []


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("state", ["full", "closed"])
def test_streams_that_take_nothing(engine, song, tmp_path, stream, state):
    """Commands succeed when their output or error stream is full or closed."""
    number = 1 if stream == "stdout" else 2
    redirection = f"{number}>/dev/full" if state == "full" else f"{number}>&-"
    program = Path(sys.executable).with_name("samekit")
    data = tmp_path / "data"
    data.mkdir()
    shutil.copyfile(song, data / "song.wav")
    (data / "song.txt").write_text("caption")
    options = f"--model {engine} --backend onnxruntime --threads 1"
    commands = (
        f"encode {song} {tmp_path}/a.npy {options}",
        f"pre-encode {options} --data_dir {data} --output_path {tmp_path}/out",
        f"info {engine}",
    )
    for command in commands:
        line = f"{program} {command} {redirection}"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "a.json").exists()
    assert (tmp_path / "out" / "000000000000.json").exists()


def test_stop_that_a_library_swallows(monkeypatch):
    """The exit code is that of the signal, also when a library turns KeyboardInterrupt into another exception.

    PyTorch's exporter does so.
    """

    def export(*_arguments, **_options):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise RuntimeError("export failed") from None

    monkeypatch.setattr("samekit_export.export.export", export)
    result = run("export", "tiny-s", "--weights", "random")
    assert result.exit_code == 143
    assert result.stderr.splitlines()[-1] == "stopped; run the same command again"
    assert "Traceback" not in result.stderr


def test_verify(engine):
    *lines, verdict = succeeded("verify", engine).splitlines()
    assert verdict.endswith("every graph computes what eager PyTorch does, within its precision's bounds")
    assert len(lines) >= 10
    assert all(line.startswith("fp32 ") and line.endswith(" dB") for line in lines)


def test_export(ready_graphs, folder):
    text = succeeded("export", "tiny-s", "--weights", "random", "--out", folder)
    assert text.splitlines()[-1] == f"{folder / 'tiny-s'} is ready"
    assert len(ready_graphs) == 2
    assert "is current" in succeeded("export", "tiny-s", "--weights", "random", "--out", folder)
    assert len(ready_graphs) == 2
    succeeded("export", "tiny-s", "--weights", "random", "--out", folder, "--force", "--precision", "fp32")
    assert len(ready_graphs) == 4


def test_export_of_a_folder(ready_graphs, checkpoint_of, folder):
    succeeded("export", checkpoint_of("tiny-s"), "--out", folder)
    succeeded("export", "my-model", "--weights", checkpoint_of("tiny-s"), "--out", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["my-model", "tiny-s"]
    assert len(ready_graphs) == 4


def test_export_writes_to_engines_where_others_look(ready_graphs, latents, folder):
    succeeded("export", "tiny-s", "--weights", "random")
    assert Path("engines", "tiny-s", "spec.json").is_file()
    assert ready_graphs
    succeeded("decode", latents, folder / "a.wav", "--model", "tiny-s")


# --- Bad audio ---------------------------------------------------------------------------------------------


def with_nan(path):
    samples = noise((SAMPLES, 2))
    samples[SAMPLES // 2] = np.nan
    sf.write(path, samples, RATE, "FLOAT")


# By cause: a function that damages a valid file, and text that the message must contain.
BAD_AUDIO = {
    "missing": (Path.unlink, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:50_000]), "is cut off"),
    "text": (lambda path: path.write_text("hello " * 1000), "cannot be read as audio"),
    "NaN": (with_nan, "NaN"),
    "no samples": (lambda path: sf.write(path, np.zeros((0, 2)), RATE), "holds no samples"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder; pass one audio file"),
}


@pytest.mark.parametrize("cause", BAD_AUDIO)
def test_bad_audio(engine, song, folder, cause):
    damage, named = BAD_AUDIO[cause]
    damage(song)
    line = refused("encode", song, folder / "a.npy", "--model", engine)
    assert named in line
    assert str(song) in line
    assert list(folder.iterdir()) == []


# --- Bad latents -------------------------------------------------------------------------------------------


def saving(array):
    return lambda path: np.save(path, array)


BAD_LATENTS = {
    "missing": (Path.unlink, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "no .npy file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:300]), "is cut off"),
    "text": (lambda path: path.write_text("hello " * 1000), "no .npy file"),
    "NaN": (saving(np.full((32, 5), np.nan, np.float32)), "NaN"),
    "rank 1": (saving(np.zeros(32, np.float32)), "has shape (32,)"),
    "rank 3": (saving(np.zeros((2, 32, 5), np.float32)), "has shape (2, 32, 5)"),
    "another width": (saving(np.zeros((64, 5), np.float32)), "64 wide, the model's 32"),
    "no latents": (saving(np.zeros((32, 0), np.float32)), "holds no latents"),
    "int16": (saving(np.zeros((32, 5), np.int16)), "int16"),
    "another model": (
        lambda path: path.with_suffix(".json").write_text('{"model_sha256": "0", "model": "same-l"}'),
        "another model (same-l)",
    ),
    "another length": (lambda path: path.with_suffix(".json").write_text('{"samples": 99999}'), "99999 samples"),
    "damaged .json": (lambda path: path.with_suffix(".json").write_text("{"), "latents.json: is damaged"),
}


@pytest.mark.parametrize("cause", BAD_LATENTS)
def test_bad_latents(engine, latents, folder, cause):
    damage, named = BAD_LATENTS[cause]
    damage(latents)
    assert named in refused("decode", latents, folder / "a.wav", "--model", engine)
    assert list(folder.iterdir()) == []


# --- Bad models --------------------------------------------------------------------------------------------


def spec_with(**changes):
    def change(folder):
        path = folder / "spec.json"
        path.write_text(json.dumps(edit(json.loads(path.read_text(encoding="utf-8")), changes)))

    return change


BAD_ENGINES = {
    "half-written": (lambda folder: (folder / "spec.json").unlink(), "an export or a copy was cut short"),
    "graph missing": (lambda folder: (folder / "encoder.onnx").unlink(), "encoder.onnx: is missing"),
    "graph truncated": (lambda folder: (folder / "encoder.onnx").write_bytes(b"short"), "has 5 bytes instead of"),
    "spec.json truncated": (lambda folder: (folder / "spec.json").write_text('{"format": 1, "na'), "cannot be read"),
    "spec.json of the future": (spec_with(format=2), "not of format 1"),
    "spec.json damaged": (spec_with(hop="4096"), "damaged"),
}
# Arguments of `run`. The tests replace ENGINE, SONG, LATENTS and OUT by paths.
USES = {
    "encode": ["encode", "SONG", "OUT/a.npy", "--model", "ENGINE"],
    "decode": ["decode", "LATENTS", "OUT/a.wav", "--model", "ENGINE"],
    "info": ["info", "ENGINE"],
    "verify": ["verify", "ENGINE"],
}


def place(argument, places):
    """Replace the placeholders of an argument by paths."""
    return functools.reduce(lambda text, word: text.replace(word, places[word]), places, argument)


@pytest.fixture
def using(song, latents, folder):
    """Return a function that fills in the arguments of a command that uses an engine."""
    places = {"SONG": str(song), "LATENTS": str(latents), "OUT": str(folder)}

    def fill(command, engine):
        return [place(argument, places | {"ENGINE": str(engine)}) for argument in USES[command]]

    return fill


@pytest.mark.parametrize("cause", BAD_ENGINES)
@pytest.mark.parametrize("command", USES)
def test_bad_engine(own_engine, folder, using, command, cause):
    damage, named = BAD_ENGINES[cause]
    damage(own_engine.folder)
    line = refused(*using(command, own_engine.folder))
    assert named in line
    assert "export" in line
    assert list(folder.iterdir()) == []


def test_process_says_that_it_fetches(song, folder, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    encoded = command_line("encode", song, folder / "a.npy", "--model", "same-s")
    exported = command_line("export", "same-s", "--out", folder)
    fetching = "samekit: fetching stabilityai/SAME-S from the hub"
    why, *lines = encoded.stderr.splitlines()
    assert why.startswith("samekit: no engine for same-s: opening it in PyTorch")
    for done, shown in ((encoded, lines), (exported, exported.stderr.splitlines())):
        told, error = shown
        assert (done.returncode, told) == (2, fetching)
        assert "unset HF_HUB_OFFLINE" in error


def test_process_does_not_advise_to_export_what_there_is_not(latents, folder):
    decoded = command_line("decode", latents, folder / "a.wav", "--model", "same-x")
    (line,) = decoded.stderr.splitlines()
    assert decoded.returncode == 2
    assert line.startswith("Error: no engine for 'same-x' in . or engines or ")
    assert line.endswith("no folder; pass one of these")


@pytest.mark.parametrize("command", USES)
@pytest.mark.parametrize("name", ["nowhere", "engines/nowhere", "x" * 5000, ""], ids=["name", "path", "long", "empty"])
def test_no_engine(folder, using, command, name):
    refused(*using(command, name))
    assert list(folder.iterdir()) == []


def test_graph_of_the_right_size_and_wrong_contents(own_engine, latents, folder):
    graph = own_engine.folder / "decoder.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    line = refused("decode", latents, folder / "a.wav", "--model", own_engine.folder)
    assert "cannot open it" in line
    assert list(folder.iterdir()) == []
    assert "contents have changed" in refused("verify", own_engine.folder)


def test_verify_without_the_checkpoint(own_engine, checkpoint_of, tmp_path):
    moved = tmp_path / "checkpoint"
    spec_with(source={"kind": "folder", "folder": str(moved), "name": "tiny-s"})(own_engine.folder)
    assert "there is no such folder" in refused("verify", own_engine.folder)
    moved.mkdir()
    assert "model_config.json" in refused("verify", own_engine.folder)
    moved.rmdir()
    shutil.copytree(checkpoint_of("tiny-l"), moved)
    assert "its checkpoint has changed" in refused("verify", own_engine.folder)


def without_a_key(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layers.0.new_tokens"]
    save_file(tensors, path)


def with_a_conformer(folder):
    document = published_config("tiny-s")
    document["model"]["encoder"]["config"]["conformer"] = True
    (folder / "model_config.json").write_text(json.dumps(document))


BAD_CHECKPOINTS = {
    "key missing": (without_a_key, "encoder.layers.0.new_tokens"),
    "not implemented": (with_a_conformer, "conformer = True"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "weights truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"0"),
        "not a readable safetensors",
    ),
    "configuration missing": (lambda folder: (folder / "model_config.json").unlink(), "no model_config.json"),
    "configuration damaged": (lambda folder: (folder / "model_config.json").write_text("{"), "cannot be read as JSON"),
}


@pytest.mark.parametrize("cause", BAD_CHECKPOINTS)
def test_bad_checkpoint(checkpoint_of, tmp_path, song, folder, cause):
    damage, named = BAD_CHECKPOINTS[cause]
    checkpoint = shutil.copytree(checkpoint_of("tiny-s"), tmp_path / "checkpoint")
    damage(checkpoint)
    for arguments in (
        ["export", checkpoint, "--out", folder],
        ["export", "same-s", "--weights", checkpoint, "--out", folder],
        ["encode", song, folder / "a.npy", "--model", checkpoint],
    ):
        assert named in refused(*arguments)
        assert list(folder.iterdir()) == []


def test_export_of_nothing(ready_graphs, folder, tmp_path):
    offline = refused("export", "same-l", "--out", folder)
    assert "stabilityai/SAME-L cannot be fetched from the hub" in offline
    assert "samekit export same-l --weights DIR" in offline
    assert "samekit export same-l --weights random" in offline
    assert "no model_config.json" in refused("export", tmp_path, "--out", folder)
    assert "no random weights for 'same-m'" in refused("export", "same-m", "--weights", "random", "--out", folder)
    # The precision is checked before the model is loaded, because this model does not exist.
    assert "cannot export precision" in refused("export", "same-m", "--out", folder, "--precision", "fp32,fp8")
    assert "is no published model" in refused("export", "same-m", "--out", folder)
    assert ready_graphs == []
    assert list(folder.iterdir()) == []


def test_export_over_a_file(ready_graphs, folder):
    (folder / "engines").write_text("mine")
    refused("export", "tiny-s", "--weights", "random", "--out", folder / "engines")
    assert (folder / "engines").read_text() == "mine"
    assert ready_graphs == []


# --- Bad options -------------------------------------------------------------------------------------------


def test_options_that_cannot_be_used(engine, song, latents, folder):
    encoding = ["encode", song, folder / "a.npy", "--model", engine]
    decoding = ["decode", latents, folder / "a.wav", "--model", engine]
    assert "unknown backend 'tpu'" in refused(*encoding, "--backend", "tpu")
    assert "pass a multiple of 2 from" in refused(*encoding, "--window", 3)
    assert "no fp16" in refused(*encoding, "--backend", "onnxruntime", "--precision", "fp16")
    assert "no int8" in refused(*decoding, "--precision", "int8")
    assert "use .npy" in refused("encode", song, folder / "a.pt", "--model", engine)
    assert "use .wav or .flac" in refused("decode", latents, folder / "a.mp3", "--model", engine)
    assert "use one of" in refused("decode", latents, folder / "a.flac", "--model", engine, "--bits", "float")
    for command, source, name in (("encode", song, "a.npy"), ("decode", latents, "a.wav")):
        assert "cannot be written" in refused(command, source, folder / "nowhere" / name, "--model", engine)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "option", [["--window", "0"], ["--threads", "0"], ["--precision", "fp8"], ["--device", "tpu"], ["--colour", "red"]]
)
def test_options_that_click_refuses(engine, song, folder, option):
    result = run("encode", song, folder / "a.npy", "--model", engine, *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr
    assert list(folder.iterdir()) == []


# --- As a process ------------------------------------------------------------------------------------------


def command_line(*arguments):
    script = Path(sys.executable).with_name("samekit")
    return subprocess.run([script, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


def test_process_prints_one_line(song, own_engine, folder):
    graph = own_engine.folder / "encoder.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    result = command_line("encode", song, folder / "a.npy", "--model", own_engine.folder)
    assert (result.returncode, result.stdout) == (2, "")
    told, _, line = result.stderr.splitlines()
    assert "has random weights" in told
    assert line.startswith("Error: ")
    assert "cannot open it" in line
    assert list(folder.iterdir()) == []


def test_process_says_what_it_chose(song, latents, folder, engine, checkpoint_of):
    told = "samekit: tiny-s has random weights: good for tests and speed only"
    quiet = command_line("encode", song, folder / "a.npy", "--model", engine)
    length = f"{SAMPLES / RATE:.0f} s of audio"
    assert (quiet.returncode, quiet.stderr.splitlines()) == (0, [told, f"encoding song.wav: {length}"])
    verbose = command_line("-v", "encode", song, folder / "a.npy", "--model", engine)
    assert verbose.stderr.splitlines()[-3:-1] == ["samekit: backend onnxruntime on cpu, fp32", told]
    # Floats, because another line tells of integers beyond full scale.
    options = ("--bits", "float", "--model", checkpoint_of("tiny-s"))
    fallback = command_line("decode", latents, folder / "a.wav", *options)
    line, _ = fallback.stderr.splitlines()
    assert fallback.returncode == 0
    assert line.startswith("samekit: no engine for ")
    assert f"samekit export {checkpoint_of('tiny-s')}" in line
