"""Engine folders: where they are looked up, `spec.json`, and damaged folders."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import DIRECTIONS, RATE, REMOVED, assert_one_line, edit, noise
from small import write_engine

from samekit import AutoencoderModel
from samekit.engine.folder import Engine, describe_graph, find_engine
from samekit.engine.spec import DECODER, ENCODER, EngineSpec
from samekit.errors import BackendError, BackendUnavailableError, EngineError, EngineNotFoundError, InputError
from samekit_export.checkpoint import BUNDLED_FOLDERS
from samekit_export.hub import HUB_REPOSITORIES

# --- Looking up --------------------------------------------------------------------------------------------


@pytest.fixture
def spec_text(engine_of):
    return (engine_of("tiny-s").folder / "spec.json").read_text(encoding="utf-8")


def put(folder, text):
    """Create an engine folder without graphs, which can be found but not run."""
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(text, encoding="utf-8")
    return folder


def test_found_by_folder(own_engine):
    assert find_engine(own_engine.folder).spec == own_engine.spec
    assert find_engine(str(own_engine.folder)).folder == own_engine.folder


def test_found_by_name(spec_text, monkeypatch, tmp_path):
    """The order is the working folder, ./engines, the user's cache."""
    at_home = put(Path.home() / ".cache" / "samekit" / "engines" / "my-model", spec_text)
    assert find_engine("my-model").folder == at_home
    in_cache = put(tmp_path / "cache" / "my-model", spec_text)
    monkeypatch.setenv("SAMEKIT_CACHE", str(in_cache.parent))
    assert find_engine("my-model").folder == in_cache
    put(Path("engines", "my-model"), spec_text)
    assert find_engine("my-model").folder == Path("engines", "my-model")
    put(Path("my-model"), spec_text)
    assert find_engine("my-model").folder == Path("my-model")


def test_cache_may_lie_under_home(spec_text, monkeypatch):
    folder = put(Path.home() / "cache" / "my-model", spec_text)
    monkeypatch.setenv("SAMEKIT_CACHE", "~/cache")
    assert find_engine("my-model").folder == folder


@pytest.mark.parametrize(
    "name", ["nowhere", "here/where", "x" * 5000, "here"], ids=["name", "path", "long name", "empty"]
)
def test_not_found(name):
    Path("here").mkdir()
    cure = "check the path"
    if name not in ("here/where", "here"):
        known = ", ".join([*HUB_REPOSITORIES, *BUNDLED_FOLDERS])
        cure = f"check the name (these are known: {known}), or export the folder of a checkpoint: samekit export DIR"
    with pytest.raises(EngineNotFoundError, match=f"; {re.escape(cure)}$") as caught:
        find_engine(name)
    assert_one_line(caught.value)


@pytest.mark.parametrize("name", ["same-s", "same-l", "same-tiny", "SAME-S"])
def test_known_models_are_found_in_any_case(name, spec_text):
    """`samekit export SAME-S` writes a folder called same-s."""
    with pytest.raises(EngineNotFoundError, match=f"; run: samekit export {name}$"):
        find_engine(name)
    folder = put(Path("engines", name.lower()), spec_text)
    assert find_engine(name).folder == folder


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv, with which root is refused like others")
@pytest.mark.parametrize("file", ["spec.json", "encoder.onnx", "."])
def test_unreadable_files(own_engine, file, tmp_path):
    """Nothing is damaged, so the message does not advise another export."""
    np.save(tmp_path / "in.npy", noise((32, 2)))
    (own_engine.folder / file).chmod(0)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    for command in (["decode", tmp_path / "in.npy", tmp_path / "out.wav", "--model"], ["info"], ["clean"]):
        program = [*drop, sys.executable, "-m", "samekit", *command, own_engine.folder]
        done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
        if command == ["clean"] and file == "encoder.onnx":
            # This command reads no graphs.
            assert done.returncode == 0, done.stderr
            continue
        path = own_engine.folder / file
        assert done.stderr == f"Error: {path}: cannot be read (Permission denied); check its permissions\n"
        assert done.returncode == 2
    (own_engine.folder / file).chmod(0o755)


@pytest.mark.parametrize("cache", [None, "~nobody-of-this-name/x"])
def test_user_without_a_home(spec_text, monkeypatch, cache):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", mock.Mock(side_effect=KeyError))
    if cache:
        monkeypatch.setenv("SAMEKIT_CACHE", cache)
    folder = put(Path("engines", "my-model"), spec_text)
    assert find_engine("my-model").folder == folder
    with pytest.raises(EngineNotFoundError):
        find_engine("other")


@pytest.mark.parametrize("name", [None, 7, b"same-s", ["same-s"]], ids=repr)
def test_names_that_are_no_paths(name):
    with pytest.raises(InputError, match=r"pass a str or a pathlib\.Path") as caught:
        find_engine(name)
    assert_one_line(caught.value)


def test_document_that_claims_gigabytes(spec_text):
    folder = put(Path("engines", "large"), spec_text)
    os.truncate(folder / "spec.json", 2**33)
    with pytest.raises(EngineError, match="has more than 67108864 bytes") as caught:
        find_engine("large")
    assert_one_line(caught.value)


def test_checkpoint_is_no_engine(checkpoint_of):
    folder = checkpoint_of("tiny-s")
    with pytest.raises(EngineNotFoundError, match=f"; run: samekit export {folder}$"):
        find_engine(folder)


def test_folder_of_engine_folders(spec_text):
    put(Path("engines", "b"), spec_text)
    put(Path("engines", "a"), spec_text)
    with pytest.raises(
        EngineError, match=r"engines: is no engine .*; pass one of these: engines/a, engines/b$"
    ) as caught:
        find_engine("engines")
    assert_one_line(caught.value)


def test_file_in_place_of_a_folder(tmp_path):
    path = tmp_path / "song.wav"
    path.write_bytes(b"RIFF")
    with pytest.raises(EngineNotFoundError, match="no engine for"):
        find_engine(path)


@pytest.mark.parametrize(
    ("folder", "name", "cure"),
    [
        ("engines/same-s", "same-s", "run: samekit export same-s --force, or copy the whole folder again"),
        ("engines/same-s", "SAME-S", "run: samekit export same-s --force, or copy the whole folder again"),
        ("engines/same-s", "engines/same-s", "run: samekit export same-s --force, or copy the whole folder again"),
        ("a b/same-l", "a b/same-l", "run: samekit export same-l --force --out 'a b', or copy the whole folder again"),
        ("engines/mine", "mine", "export the model again, or copy the whole folder again"),
        ("engines/mine", "engines/mine", "export the model again, or copy the whole folder again"),
        (".", ".", "export the model again, or copy the whole folder again"),
    ],
)
def test_half_written_folder(folder, name, cure):
    """The message names a command that works; `samekit export mine` would not."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "encoder.onnx").touch()
    with pytest.raises(EngineError) as caught:
        find_engine(name)
    assert str(caught.value) == f"{folder}: no spec.json, so an export or a copy was cut short; {cure}"
    assert not isinstance(caught.value, EngineNotFoundError)


def test_folder_without_its_spec(own_engine):
    (own_engine.folder / "spec.json").unlink()
    with pytest.raises(EngineError, match=r"no spec\.json, .*; export the model again"):
        Engine.load(own_engine.folder)


# --- spec.json ---------------------------------------------------------------------------------------------


def test_round_trip(own_engine, tmp_path):
    spec = own_engine.spec
    (tmp_path / "spec.json").write_text(spec.to_json(), encoding="utf-8")
    assert EngineSpec.load(tmp_path) == spec
    assert dataclasses.asdict(EngineSpec.load(tmp_path)) == dataclasses.asdict(spec)
    assert spec.to_json() == (own_engine.folder / "spec.json").read_text(encoding="utf-8")


def test_lengths(own_engine):
    spec = own_engine.spec
    assert [spec.latents(samples) for samples in (0, 1, 4096, 4097, 441_000)] == [0, 1, 1, 2, 108]
    assert spec.samples(108) == 442_368


FIRST = "graphs.fp32.encoder"

# Changes that damage the document, as arguments of `helpers.edit`.
DAMAGED = [
    {"format": REMOVED},
    {"format": 99},
    {"format": "1"},
    {"hop": REMOVED},
    {"hop": "4096"},
    {"hop": 4096.0},
    {"hop": True},
    {"hop": 0},
    {"hop": 10**9},
    {"sample_rate": -44_100},
    {"channels": None},
    {"latent_width": []},
    {"alignment": 0},
    {"graph_revision": -1},
    {"graph_revision": "1"},
    {"soft_clip": 1},
    {"int8_target_db": "38"},
    {"int8_target_db": float("nan")},
    {"int8_target_db": 1000},
    {"contexts": REMOVED},
    {"contexts": [1, 2]},
    {"contexts": {}},
    {"contexts.encoder": -1},
    {"contexts.decoder": 2.5},
    {"contexts.middle": 1},
    {"name": 5},
    {"source_sha256": None},
    {"source": REMOVED},
    {"source": "random"},
    {"tools": ["torch"]},
    {"verification": []},
    {"verification.fp32": "fine"},
    {"verification.fp32": [{}]},
    {"gizmo": 1},
    {"graphs": REMOVED},
    {"graphs": []},
    {"graphs.fp32": "encoder.onnx"},
    {"graphs.fp32": {}},
    {FIRST: None},
    {f"{FIRST}.file": REMOVED},
    {f"{FIRST}.gizmo": 1},
    {f"{FIRST}.file": "decoder.onnx"},
    {f"{FIRST}.file": 5},
    {f"{FIRST}.sizes": []},
    {f"{FIRST}.sizes": ["encoder.onnx"]},
]


def assert_damaged(folder):
    with pytest.raises(EngineError) as caught:
        EngineSpec.load(folder)
    assert_one_line(caught.value)
    assert "export the model again" in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("changes", DAMAGED, ids=str)
def test_damaged_document(own_engine, changes):
    path = own_engine.folder / "spec.json"
    document = edit(json.loads(path.read_text(encoding="utf-8")), changes)
    path.write_text(json.dumps(document), encoding="utf-8")
    assert_damaged(own_engine.folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"spec"', b"\xff\xfe{}", b"[" * 100_000])
def test_document_of_something_else(own_engine, content):
    (own_engine.folder / "spec.json").write_bytes(content)
    assert_damaged(own_engine.folder)


@pytest.mark.parametrize("name", ["../encoder.onnx", "/etc/passwd", "a/b.onnx", "..\\encoder.onnx", "", ".", ".."])
def test_graphs_outside_the_folder(own_engine, name):
    path = own_engine.folder / "spec.json"
    original = json.loads(path.read_text(encoding="utf-8"))
    sizes = original["graphs"]["fp32"]["encoder"]["sizes"]
    for file, more in ((name, {name: 5}), ("encoder.onnx", sizes | {name: 5})):
        document = json.loads(json.dumps(original))
        document["graphs"]["fp32"]["encoder"] |= {"file": file, "sizes": more}
        path.write_text(json.dumps(document), encoding="utf-8")
        assert_damaged(own_engine.folder)


# --- Graph files -------------------------------------------------------------------------------------------


def test_graphs(own_engine):
    for direction in DIRECTIONS:
        assert own_engine.graph(direction, "fp32") == own_engine.folder / f"{direction}.onnx"
    own_engine.check_digests()
    with pytest.raises(
        BackendUnavailableError,
        match=r"no int8 graph \(there is: fp32\); run: samekit export tiny-s --weights random .* --precision int8$",
    ):
        own_engine.graph(ENCODER, "int8")


@pytest.mark.parametrize(
    ("folder", "source", "arguments"),
    [
        ("engines/same-s", {"kind": "random", "name": "same-s", "seed": 0}, "same-s --weights random"),
        ("engines/same-s", {"kind": "hub", "name": "stabilityai/SAME-S"}, "stabilityai/SAME-S"),
        ("engines/same-s", {"kind": "hub", "name": "stabilityai/stable-audio-3-small-sfx"}, "same-s"),
        ("engines/same-s", {"kind": "bundled", "name": "same-s"}, "same-s"),
        ("engines/same-s", {"kind": "folder", "folder": "/my weights"}, "same-s --weights '/my weights'"),
        ("demo/same-s", {"kind": "bundled", "name": "same-s"}, "same-s --out demo"),
        ("demo/renamed", {}, "same-s"),
    ],
)
def test_command_that_exports_again(own_engine, folder, source, arguments):
    engine = Engine(Path(folder), dataclasses.replace(own_engine.spec, name="same-s", source=source))
    assert engine.export_command() == f"samekit export {arguments}"
    assert engine.export_command("--force") == f"samekit export {arguments} --force"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "longer", "a folder"])
def test_incomplete_graph_file(own_engine, direction, damage):
    path = own_engine.folder / f"{direction}.onnx"
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut off": content[:-1], "longer": content + b"\0"}[damage])
    for check in (lambda: own_engine.graph(direction, "fp32"), own_engine.check_digests):
        with pytest.raises(EngineError, match=rf"{direction}\.onnx: .*; export the model again with --force") as caught:
            check()
        assert_one_line(caught.value)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("position", [0, -1])
def test_digests_see_a_flipped_bit(own_engine, direction, position):
    path = own_engine.folder / f"{direction}.onnx"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    own_engine.graph(direction, "fp32")
    with pytest.raises(EngineError, match=rf"{direction}\.onnx: contents have changed since the export") as caught:
        own_engine.check_digests()
    assert_one_line(caught.value)


def test_external_data_belongs_to_the_graph(tmp_path):
    (tmp_path / "decoder.onnx").write_bytes(b"graph")
    alone = describe_graph(tmp_path, "decoder.onnx")
    (tmp_path / "decoder.onnx.data").write_bytes(b"weights")
    both = describe_graph(tmp_path, "decoder.onnx")
    assert alone.sizes == {"decoder.onnx": 5}
    assert both.sizes == {"decoder.onnx": 5, "decoder.onnx.data": 7}
    assert both.sha256 != alone.sha256
    (tmp_path / "decoder.onnx.data").write_bytes(b"Weights")
    assert describe_graph(tmp_path, "decoder.onnx").sha256 != both.sha256


def test_missing_external_data(own_engine):
    data = own_engine.folder / "decoder.onnx.data"
    data.write_bytes(b"weights")
    graphs = {"fp32": {direction: describe_graph(own_engine.folder, f"{direction}.onnx") for direction in DIRECTIONS}}
    engine = Engine(own_engine.folder, dataclasses.replace(own_engine.spec, graphs=graphs))
    (engine.folder / "spec.json").write_text(engine.spec.to_json())
    engine.check_digests()
    data.unlink()
    with pytest.raises(EngineError, match=r"decoder\.onnx\.data: is missing"):
        engine.graph(DECODER, "fp32")


def test_folder_can_be_moved(own_engine, tmp_path):
    shutil.move(own_engine.folder, tmp_path / "elsewhere")
    Engine.load(tmp_path / "elsewhere").check_digests()


# --- Links -------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path):
    """Create an engine folder with weights beside the encoder; return a function that replaces files by links."""
    folder = tmp_path / "engine"
    write_engine(folder)

    def link(places):
        for name, place in places.items():
            target = tmp_path / place
            target.parent.mkdir(exist_ok=True)
            (folder / name).rename(target)
            (folder / name).symlink_to(target)
        return folder

    return link


def encoded(folder):
    with AutoencoderModel.from_pretrained(folder, backend="onnxruntime", threads=1) as model:
        return model.encode(noise((1, 2, 16)), RATE)


# The layouts were tried with ONNX Runtime 1.24.1, 1.24.2, 1.25.0 and 1.32.0. All of them refuse weights whose real path
# is not in the folder. From 1.24.2 on (github.com/microsoft/onnxruntime/pull/27374) they accept weights beside the real
# path of the graph.
@pytest.mark.parametrize("data_only", [True, False], ids=["weights", "graph and weights, into two folders"])
def test_weights_behind_a_link_that_leaves_the_folder(linked, data_only):
    links = {"encoder.onnx.data": "elsewhere/weights"} | ({} if data_only else {"encoder.onnx": "graphs/encoder"})
    folder = linked(links)
    with pytest.raises(
        BackendError, match=r"encoder\.onnx\.data: is a link that leaves the folder .*; run: cp -rL .* and open"
    ) as caught:
        encoded(folder)
    assert_one_line(caught.value)
    assert "export it again" not in str(caught.value)
    command = str(caught.value).partition("run: ")[2].partition(", and open")[0]
    assert command.startswith("cp ")
    subprocess.run(shlex.split(command), check=True)
    assert encoded(shlex.split(command)[-1]).shape == (1, 4, 2)


def test_cache_of_the_hub(linked, monkeypatch):
    """Graph and weights are links into one folder of blobs, as in the cache of `huggingface_hub`."""
    folder = linked({"encoder.onnx": "blobs/0a1b", "encoder.onnx.data": "blobs/2c3d"})
    assert encoded(folder).shape == (1, 4, 2)

    def refuse(*_, **__):
        # The message of 1.24.1 for this layout.
        raise RuntimeError('External data path: "encoder.onnx.data" escapes model directory')

    monkeypatch.setattr("onnxruntime.__version__", "1.24.1")
    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(
        BackendError, match=r"is a link that leaves .*; update ONNX Runtime to 1\.24\.2 or later, or run: cp -rL"
    ) as caught:
        encoded(folder)
    assert_one_line(caught.value)


def test_links_inside_the_folder(linked):
    folder = linked({"encoder.onnx.data": "engine/weights"})
    assert encoded(folder).shape == (1, 4, 2)
    (folder / "weights").write_bytes(bytes((folder / "weights").stat().st_size))
    (folder / "encoder.onnx").write_bytes(bytes((folder / "encoder.onnx").stat().st_size))
    with pytest.raises(BackendError, match=r"cannot open it .*; export it again"):
        encoded(folder)


def test_graph_of_an_engine_that_was_exported_again(own_engine):
    """A missing graph is reported as missing only if no other export has replaced it."""
    document = json.loads((own_engine.folder / "spec.json").read_text(encoding="utf-8"))
    document["graphs"]["fp32"]["encoder"] |= {"file": "encoder.2.onnx", "sizes": {"encoder.2.onnx": 5}}
    (own_engine.folder / "spec.json").write_text(json.dumps(document), encoding="utf-8")
    (own_engine.folder / "encoder.onnx").rename(own_engine.folder / "encoder.2.onnx")
    with pytest.raises(EngineError, match="was exported again since it was opened; open the model again") as caught:
        own_engine.graph(ENCODER, "fp32")
    assert_one_line(caught.value)
