"""The exported graphs and engine folders: accuracy, verification, and exports that are current or fail."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os

import numpy as np
import onnx
import pytest
import torch
from helpers import (
    DIRECTIONS,
    HOP,
    KINDS,
    REMOVED,
    assert_close,
    assert_one_line,
    each_direction,
    edit,
    in_one_pass,
    seeded,
    variant,
)
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from samekit.backends.base import BackendOptions
from samekit.backends.onnxruntime import OnnxRuntimeBackend
from samekit.engine.folder import Engine, describe_graph
from samekit.engine.spec import ENCODER, INT8_TARGET_DB
from samekit.errors import EngineError, InputError, OutputError, VerificationError
from samekit_export import export as export_module
from samekit_export.checkpoint import load_folder
from samekit_export.export import export
from samekit_export.graph import GRAPH_REVISION, GraphEncoder
from samekit_export.model import Same
from samekit_export.model_spec import spec_of
from samekit_export.random_weights import random_checkpoint
from samekit_export.to_onnx import OPSET, write_onnx
from samekit_export.verify import FLOOR_DB, example_input, verify

# --- The graphs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph_of(engine_of):
    """Return a function that parses a graph: model, direction -> ModelProto."""
    return lambda name, direction: onnx.load(engine_of(name).folder / f"{direction}.onnx")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def nodes(graph):
    """Return every node, including those of subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from nodes(inner)


@each_direction
class TestGraph:
    def test_standard_operators_only(self, graph_of, kind, direction):
        model = graph_of(kind, direction)
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in nodes(model.graph)} == {""}
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert not model.functions

    def test_names_and_dynamic_axes(self, graph_of, kind, direction):
        def described(value):
            shape = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            return value.name, value.type.tensor_type.elem_type, shape

        graph = graph_of(kind, direction).graph
        audio = ("audio", onnx.TensorProto.FLOAT, ["batch", 2, f"{HOP}*latents"])
        latents = ("latents", onnx.TensorProto.FLOAT, ["batch", 32, "latents"])
        assert [described(value) for value in graph.input] == [audio if direction == ENCODER else latents]
        assert [described(value) for value in graph.output] == [latents if direction == ENCODER else audio]

    def test_every_intermediate_grows_linearly(self, graph_of, engine_of, kind, direction):
        evaluator = ReferenceEvaluator(graph_of(kind, direction))
        sizes = []
        for latents in (4, 8, 12):
            array = example_input(engine_of(kind).spec, direction, 1, latents, seed=0)
            values = evaluator.run(None, {evaluator.input_names[0]: array}, intermediate=True)
            sizes.append({name: np.size(value) for name, value in values.items()})
        short, middle, long = sizes
        assert sum(middle[name] > short[name] for name in short) > 100
        # The size grows linearly with the length, so second differences are zero.
        quadratic = [name for name in short if long[name] - middle[name] != middle[name] - short[name]]
        assert quadratic == []

    def test_reference_evaluator_agrees(self, graph_of, engine_of, eager_of, kind, direction):
        """ONNX's reference implementation gives the same result as ONNX Runtime."""
        evaluator, eager = ReferenceEvaluator(graph_of(kind, direction)), eager_of(kind)
        array = example_input(engine_of(kind).spec, direction, 2, 3, seed=0)
        (output,) = evaluator.run(None, {evaluator.input_names[0]: array})
        assert_close(in_one_pass(eager.encode if direction == ENCODER else eager.decode, array), output, 100)

    def test_weights_are_stored_once(self, graph_of, kind, direction):
        stored = sum(np.prod(tensor.dims) for tensor in graph_of(kind, direction).graph.initializer)
        parameters = sum(tensor.numel() for key, tensor in seeded(kind).tensors.items() if key.startswith(direction))
        assert 0.9 * parameters < stored < 1.2 * parameters


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr("samekit_export.to_onnx.EXTERNAL_DATA_ABOVE", 1000)
    checkpoint = variant("tiny-l", {"*.config.transformer_depths": [1]})
    model = Same.from_checkpoint(checkpoint)
    write_onnx(GraphEncoder(model), tmp_path / "encoder.onnx")
    graph = describe_graph(tmp_path, "encoder.onnx")
    assert graph.sizes["encoder.onnx"] < graph.sizes["encoder.onnx.data"] / 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(graph.sizes)

    spec = dataclasses.replace(spec_of(checkpoint), graphs={"fp32": dict.fromkeys(DIRECTIONS, graph)})
    engine = Engine(tmp_path, spec)
    array = example_input(spec, ENCODER, 1, 5, seed=0)
    with OnnxRuntimeBackend(engine, BackendOptions(device="cpu")) as backend:
        assert_close(in_one_pass(model.encode, array), backend.encode(array), 100)
    (tmp_path / "encoder.onnx.data").unlink()
    with pytest.raises(EngineError, match=r"encoder\.onnx\.data: is missing"):
        OnnxRuntimeBackend(engine, BackendOptions(device="cpu"))


# --- The folder --------------------------------------------------------------------------------------------


def test_exported_folder(engine_of, kind):
    engine = engine_of(kind)
    spec = engine.spec
    assert sorted(path.name for path in engine.folder.iterdir()) == ["decoder.onnx", "encoder.onnx", "spec.json"]
    assert sorted(path.name for path in engine.folder.parent.iterdir() if path.name.startswith(".")) == []
    engine.check_digests()
    assert spec.name == kind
    assert spec.source == {"kind": "random", "name": kind, "seed": 0}
    assert spec.source_sha256 == seeded(kind).sha256
    assert (spec.sample_rate, spec.channels, spec.hop, spec.latent_width) == (44_100, 2, HOP, 32)
    assert spec.alignment == (2 if kind == "tiny-s" else 1)
    assert spec.contexts == ({"encoder": 1, "decoder": 2} if kind == "tiny-s" else {"encoder": 4, "decoder": 4})
    assert {"samekit", "torch", "onnx", "opset"} <= spec.tools.keys()


def test_verification_is_recorded(engine_of, kind):
    (rows,) = engine_of(kind).spec.verification.values()
    for direction in DIRECTIONS:
        cases = [row for row in rows if row["direction"] == direction]
        assert {1, 2} <= {row["latents"] for row in cases}
        assert any(row["latents"] % 2 and row["latents"] > 1 for row in cases)
        assert any(row["batch"] > 1 for row in cases)
        assert any(row["window"] and row["latents"] > row["window"] for row in cases)
        assert {row["content"] for row in cases} == {"noise", "music"}
    assert all(row["snr_db"] >= 100 and 0 < row["max_error"] < 1e-3 for row in rows)


WRITTEN = ["GraphEncoder encoder.onnx", "GraphDecoder decoder.onnx"]
# An export that replaces another one gives its graphs new names, so the older ones can be used until then.
WRITTEN_AGAIN = ["GraphEncoder encoder.2.onnx", "GraphDecoder decoder.2.onnx"]


@pytest.fixture
def exported(ready_graphs, tmp_path):
    """A folder of engine folders that contains tiny-s."""
    export(seeded("tiny-s"), tmp_path / "engines")
    assert ready_graphs == WRITTEN
    ready_graphs.clear()
    return tmp_path / "engines"


def contents(folder):
    """Return every file below a folder with the digest of its contents."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".."])
def test_name_that_leads_out_of_the_folder(ready_graphs, tmp_path, name):
    with pytest.raises(InputError, match="no engine folder can be called") as error:
        export(dataclasses.replace(seeded("tiny-s"), name=name), tmp_path / "engines")
    assert_one_line(error.value)
    assert ready_graphs == []
    assert list(tmp_path.iterdir()) == []


def test_current_folder_is_left_alone(exported, ready_graphs, progress):
    before = contents(exported)
    engine = export(seeded("tiny-s"), exported)
    assert ready_graphs == []
    assert engine.folder == exported / "tiny-s"
    assert progress() == [f"{engine.folder} is current; --force exports it again"]
    assert contents(exported) == before


def files_of(engine):
    """Return the names of `spec.json` and of all files that it names."""
    pairs = engine.spec.graphs.values()
    return sorted({"spec.json", *(name for pair in pairs for graph in pair.values() for name in graph.sizes)})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_force(exported, ready_graphs):
    engine = export(seeded("tiny-s"), exported, force=True)
    assert ready_graphs == WRITTEN_AGAIN
    assert names(exported) == ["tiny-s"]
    assert names(engine.folder) == files_of(engine) == ["decoder.2.onnx", "encoder.2.onnx", "spec.json"]
    # No name is used twice, so a reader of an older spec.json never opens another graph under an old name.
    engine = export(seeded("tiny-s"), exported, force=True)
    assert names(engine.folder) == files_of(engine) == ["decoder.3.onnx", "encoder.3.onnx", "spec.json"]
    engine.check_digests()


def change_spec(folder, **changes):
    path = folder / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_spec(folder, changes):
    path = folder / "spec.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text(encoding="utf-8")), changes)), encoding="utf-8")


def cut_off(folder):
    (folder / "decoder.onnx").write_bytes(b"short")


STALE = {
    "another graph revision": lambda folder: change_spec(folder, graph_revision=GRAPH_REVISION + 1),
    "no graph revision": lambda folder: edit_spec(folder, {"graph_revision": REMOVED}),
    "other source": lambda folder: change_spec(folder, source_sha256="0"),
    "no graphs of that precision": lambda folder: change_spec(folder, graphs={}),
    "no spec.json": lambda folder: (folder / "spec.json").unlink(),
    "damaged spec.json": lambda folder: (folder / "spec.json").write_text("{"),
    "a graph missing": lambda folder: (folder / "encoder.onnx").unlink(),
    "a graph cut off": cut_off,
}


@pytest.mark.parametrize("cause", STALE)
def test_stale_folder_is_exported_again(exported, ready_graphs, cause):
    export(seeded("tiny-s"), exported)
    assert ready_graphs == []
    STALE[cause](exported / "tiny-s")
    engine = export(seeded("tiny-s"), exported)
    written = WRITTEN if cause in ("no spec.json", "no graphs of that precision") else WRITTEN_AGAIN
    assert ready_graphs == written
    engine.check_digests()
    assert names(engine.folder) == files_of(engine)
    export(seeded("tiny-s"), exported)
    assert ready_graphs == written
    assert names(exported) == ["tiny-s"]


def test_other_weights_are_exported(exported, ready_graphs, progress):
    other = random_checkpoint("tiny-s", seed=1)
    assert export(other, exported).spec.source_sha256 == other.sha256
    assert ready_graphs == WRITTEN_AGAIN
    assert progress()[0] == "replaces an export of other weights (kind random, name tiny-s, seed 0)"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_random_weights_replace_others_by_force_only(exported, ready_graphs, checkpoint_of, precision, progress):
    real = dataclasses.replace(load_folder(checkpoint_of("tiny-s"), "tiny-s"), sha256="real")
    export(real, exported)
    assert any("replaces an export of other weights (kind random" in line for line in progress())
    before = contents(exported)
    ready_graphs.clear()
    with pytest.raises(OutputError, match=r"holds other weights \(kind folder.*--force, or another --out") as caught:
        export(seeded("tiny-s"), exported, [precision])
    assert_one_line(caught.value)
    assert (contents(exported), ready_graphs) == (before, [])
    engine = export(seeded("tiny-s"), exported, [precision], force=True)
    assert progress()[-4].startswith("replaces an export of other weights (kind folder")
    assert engine.spec.is_random


def test_versions_of_tools_do_not_count(exported, ready_graphs):
    """Every export is verified against eager PyTorch, so versions of tools are information only."""
    change_spec(exported / "tiny-s", tools={"samekit": "0.0.1", "torch": "1.0"})
    export(seeded("tiny-s"), exported)
    assert ready_graphs == []
    engine = export(seeded("tiny-s"), exported, ["fp16"])
    assert list(engine.spec.graphs) == ["fp32", "fp16"]
    assert engine.spec.tools["samekit"] == importlib.metadata.version("samekit")


def test_what_another_graph_revision_made_does_not_stay(exported, ready_graphs, progress):
    folder = exported / "tiny-s"
    change_spec(folder, graph_revision=GRAPH_REVISION + 1)
    stale = folder / "tensorrt" / "some-build" / "fingerprint.json"
    stale.parent.mkdir(parents=True)
    stale.touch()
    engine = export(seeded("tiny-s"), exported, ["fp16"])
    assert list(engine.spec.graphs) == ["fp16"]
    assert engine.spec.graph_revision == GRAPH_REVISION
    assert names(folder) == sorted([*files_of(engine), "tensorrt"])
    assert names(folder / "tensorrt") == []
    assert progress()[0] == (
        f"replaces an export of graph revision {GRAPH_REVISION + 1} by one of revision {GRAPH_REVISION} and keeps "
        "nothing of it"
    )
    assert len(ready_graphs) == 2


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_another_precision_joins_what_is_there(exported, ready_graphs, precision):
    folder = exported / "tiny-s"
    build = folder / "tensorrt" / "some-build" / "encoder.engine"
    build.parent.mkdir(parents=True)
    build.write_bytes(b"hours of work")
    build.with_name("fingerprint.json").touch()
    before, verified = contents(folder), Engine.load(folder).spec.verification
    engine = export(seeded("tiny-s"), exported, [precision])
    assert ready_graphs == [f"GraphEncoder encoder.{precision}.onnx", f"GraphDecoder decoder.{precision}.onnx"]
    assert list(engine.spec.graphs) == ["fp32", precision]
    assert engine.spec.verification["fp32"] == verified["fp32"]
    after = contents(folder)
    assert {name: after[name] for name in before if name != "spec.json"} == {
        name: digest for name, digest in before.items() if name != "spec.json"
    }
    engine.check_digests()
    export(seeded("tiny-s"), exported, ["fp32", precision])
    assert len(ready_graphs) == 2


def test_target_of_int8(exported, ready_graphs):
    """Graphs of int8 with another target are exported again; other exports keep them and their target."""
    engine = export(seeded("tiny-s"), exported, ["int8"], int8_target_db=20)
    assert (len(ready_graphs), engine.spec.int8_target_db) == (2, 20)
    for precisions in (["fp32"], ["fp16"]):
        engine = export(seeded("tiny-s"), exported, precisions)
        assert Engine.load(engine.folder).spec.int8_target_db == 20
    assert len(ready_graphs) == 4
    export(seeded("tiny-s"), exported, ["fp32", "int8"], int8_target_db=20)
    assert len(ready_graphs) == 4
    engine = export(seeded("tiny-s"), exported, ["fp32", "int8"])
    assert ready_graphs[4:] == ["GraphEncoder encoder.int8.2.onnx", "GraphDecoder decoder.int8.2.onnx"]
    assert engine.spec.int8_target_db == INT8_TARGET_DB == 35


@pytest.mark.parametrize("target", [0, 101, float("nan")])
def test_target_out_of_range(ready_graphs, tmp_path, target):
    with pytest.raises(InputError, match=f"int8 cannot aim at {target} dB; pass a target from 10 to 100 dB") as caught:
        export(seeded("tiny-s"), tmp_path, ["int8"], int8_target_db=target)
    assert_one_line(caught.value)
    assert (ready_graphs, list(tmp_path.iterdir())) == ([], [])


def test_what_is_of_another_checkpoint_does_not_stay(exported, ready_graphs):
    export(seeded("tiny-s"), exported, ["fp16"])
    engine = export(random_checkpoint("tiny-s", seed=1), exported, ["fp16"])
    assert list(engine.spec.graphs) == ["fp16"]
    assert not (engine.folder / "encoder.onnx").exists()
    assert len(ready_graphs) == 4


def test_unknown_precision(ready_graphs, tmp_path):
    with pytest.raises(InputError, match="cannot export precision 'fp8'; choose one of fp32") as caught:
        export(seeded("tiny-s"), tmp_path, ["fp32", "fp8"])
    assert_one_line(caught.value)
    assert ready_graphs == []
    assert list(tmp_path.iterdir()) == []


def test_settings_of_pytorch_change_no_export(engine_of, tmp_path):
    """The user may have set other defaults in PyTorch, and autocast."""
    expected = engine_of("tiny-s").spec
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            engine = export(random_checkpoint("tiny-s"), tmp_path)
            assert torch.get_default_dtype() == torch.float64
            assert torch.is_autocast_enabled("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert engine.spec.source_sha256 == expected.source_sha256
    assert engine.spec.graphs == expected.graphs


# --- An export that fails ----------------------------------------------------------------------------------


def failing(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("step", ["write_onnx", "verify", "describe_graph"])
@pytest.mark.parametrize("error", [VerificationError("too far; report this"), RuntimeError("bug"), KeyboardInterrupt()])
def test_failure_leaves_nothing(ready_graphs, tmp_path, monkeypatch, step, error):
    monkeypatch.setattr(export_module, step, failing(error))
    with pytest.raises(type(error)):
        export(seeded("tiny-s"), tmp_path / "engines")
    assert contents(tmp_path) == {}
    assert not (tmp_path / "engines" / "tiny-s").exists()
    assert list((tmp_path / "engines").iterdir()) == []
    assert len(ready_graphs) <= 2


def test_failure_leaves_the_older_engine(exported, monkeypatch):
    before = contents(exported)
    monkeypatch.setattr(export_module, "verify", failing(VerificationError("too far; report this")))
    with pytest.raises(VerificationError):
        export(seeded("tiny-s"), exported, force=True)
    assert contents(exported) == before


@pytest.mark.parametrize("step", ["rename", "replace"])
def test_failure_to_take_its_place_leaves_the_older_engine(exported, monkeypatch, step):
    """The disk fails while the graphs are moved, or while `spec.json` is replaced."""
    before = contents(exported)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OutputError, match="No space left on device"):
        export(seeded("tiny-s"), exported, force=True)
    assert contents(exported) == before
    assert names(exported / "tiny-s") == ["decoder.onnx", "encoder.onnx", "spec.json"]


def test_spec_of_a_newer_samekit_is_valid_until_it_is_replaced(exported, monkeypatch):
    """The file cannot be read, so its graphs are not known. They are not deleted as leftovers."""
    change_spec(exported / "tiny-s", format=2)
    before = contents(exported)
    monkeypatch.setattr(export_module, "verify", failing(VerificationError("too far; report this")))
    with pytest.raises(VerificationError):
        export(seeded("tiny-s"), exported)
    assert contents(exported) == before
    monkeypatch.setattr(export_module, "verify", lambda *_: [])
    engine = export(seeded("tiny-s"), exported)
    assert names(engine.folder) == files_of(engine)


def test_files_of_the_user_stay_in_an_engine_folder(exported):
    """Only files with names of exported files are deleted."""
    folder = exported / "tiny-s"
    mine = [
        "README.md",
        ".gitattributes",
        "encoder.fp8.onnx",
        "my.encoder.onnx",
        "encoder.onnx.bak",
        "model.safetensors",
    ]
    for name in mine:
        (folder / name).write_text("mine")
    (folder / "encoder.int8.onnx").write_text("left by an export that was killed")
    engine = export(seeded("tiny-s"), exported, force=True)
    assert names(folder) == sorted([*files_of(engine), *mine])


@pytest.mark.parametrize(
    "name", ["encoder.fp16.onnx", "encoder.2.onnx.data", ".lock", ".spec.json.1-0123abcd.tmp", "spec.json"]
)
def test_links_in_an_engine_folder_are_not_written_through(exported, tmp_path, name):
    """Engine folders are treated as untrusted."""
    target = tmp_path / "precious"
    link = exported / "tiny-s" / name
    # The contents of spec.json stay, because without them this would be no engine folder.
    text = link.read_text() if link.exists() else "mine"
    target.write_text(text)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    for precision in ("fp32", "fp16"):
        try:
            export(seeded("tiny-s"), exported, [precision], force=True)
        except OutputError as error:
            assert name == ".lock"
            assert_one_line(error)
    assert target.read_text() == text
    assert Engine.load(exported / "tiny-s").check_digests() is None


@pytest.mark.parametrize("place", ["engines", "engines/tiny-s"])
def test_file_in_the_way(ready_graphs, tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(OutputError, match="tiny-s: ") as caught:
        export(seeded("tiny-s"), tmp_path / "engines")
    assert_one_line(caught.value)
    assert path.read_text() == "mine"
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    assert len(ready_graphs) <= 2


@pytest.mark.parametrize("file", ["model.safetensors", "model.onnx", "encoder.fp8.onnx"])
def test_folder_of_something_else_is_not_replaced(ready_graphs, tmp_path, file):
    """Examples are the checkpoint itself, if `--out` is its parent, and graphs of another program."""
    weights = tmp_path / "tiny-s" / file
    weights.parent.mkdir()
    weights.write_bytes(b"not to be lost")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="tiny-s: ") as caught:
        export(seeded("tiny-s"), tmp_path)
    assert_one_line(caught.value)
    assert contents(tmp_path) == before
    assert len(ready_graphs) <= 2


# --- Verification ------------------------------------------------------------------------------------------


def spoil(path, change):
    """Change the largest weight of a graph on disk."""
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight).copy()), weight.name))
    onnx.save(model, path)


def one_value_off(weight):
    weight.flat[0] += 1
    return weight


SPOILED = {
    "one value off": (
        one_value_off,
        r"is -?\d+\.\d+ dB from eager PyTorch at 1 x \d+ latents of noise, 90.0 dB is the least",
    ),
    "infinite": (lambda weight: weight * np.float32(np.inf), "NaN or infinity"),
}


@each_direction
@pytest.mark.parametrize("cause", SPOILED)
def test_wrong_graph_is_found_out(own_engine, eager_of, direction, cause):
    change, match = SPOILED[cause]
    spoil(own_engine.folder / f"{direction}.onnx", change)
    graphs = {"fp32": {name: describe_graph(own_engine.folder, f"{name}.onnx") for name in DIRECTIONS}}
    spec = dataclasses.replace(own_engine.spec, graphs=graphs)
    (own_engine.folder / "spec.json").write_text(spec.to_json())
    spoiled = Engine(own_engine.folder, spec)
    spoiled.check_digests()
    with pytest.raises(VerificationError, match=match) as caught:
        verify(spoiled, eager_of("tiny-s"), "fp32")
    assert f"fp32 {direction}" in str(caught.value)
    assert_one_line(caught.value)


def test_wrong_graph_is_not_exported(ready_graphs, tmp_path, monkeypatch):
    copied = export_module.write_onnx

    def write_wrong(graph, path):
        copied(graph, path)
        spoil(path, one_value_off)

    monkeypatch.setattr(export_module, "write_onnx", write_wrong)
    monkeypatch.setattr(export_module, "verify", verify)
    with pytest.raises(VerificationError, match="do not use this graph"):
        export(seeded("tiny-s"), tmp_path / "engines")
    assert ready_graphs == WRITTEN
    assert list((tmp_path / "engines").iterdir()) == []


def test_verify_reports_every_case(engine_of, eager_of, progress):
    rows = verify(engine_of("tiny-s"), eager_of("tiny-s"), "fp32")
    lines = progress()
    assert len(lines) == len(rows)
    assert all(line.startswith("fp32 ") and line.endswith(" dB") for line in lines)
    assert min(row["snr_db"] for row in rows) >= FLOOR_DB["fp32"] == 90


@pytest.mark.parametrize("own", ["encoder.onnx/keep", "tensorrt", "tensorrt/notes", "tensorrt/models/keep", "link"])
def test_what_no_export_writes_is_not_replaced(tmp_path, own):
    """A folder is no engine folder because of the names in it alone."""
    folder = tmp_path / "tiny-s"
    if own == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to("elsewhere")
    else:
        (folder / own).parent.mkdir(parents=True)
        (folder / own).write_text("mine")
    with pytest.raises(OutputError, match="is not replaced; ") as caught:
        export(seeded("tiny-s"), tmp_path)
    assert_one_line(caught.value)
    assert folder.is_symlink() or (folder / own).read_text() == "mine"


def test_name_too_long_for_the_disk(tmp_path):
    with pytest.raises(OutputError, match="File name too long") as caught:
        export(seeded("tiny-s"), tmp_path / ("z" * 300))
    assert_one_line(caught.value)
