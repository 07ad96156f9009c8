"""Model repositories for the Triton Inference Server, compared with its protobuf schema and with the graphs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from helpers import DIRECTIONS, KINDS, assert_one_line, each_direction, noise

from samekit.cli.main import main
from samekit.engine.builds import BUILDS_FOLDER, Build, BuiltEngine, write_document
from samekit.engine.fingerprint import TENSORRT, TENSORRT_RTX, fingerprint_of
from samekit.engine.folder import Engine, describe_graph
from samekit.engine.spec import DECODER, ENCODER
from samekit.errors import BackendUnavailableError, InputError, OutputError, StaleEngineError
from samekit.serving.triton import FACTS, TritonOptions, config_text, facts_of, write_repository


@pytest.fixture
def out(tmp_path):
    return tmp_path / "repository"


def parsed(folder):
    """Parse a model's configuration as the server does."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())


def add_build(engine, flavour=TENSORRT, version="10.15.1", target="8.9", precision="fp32"):
    """Add a build whose engine files are texts, because these tests do not run engines."""
    fingerprint = fingerprint_of(engine.spec, precision, flavour, version, target)
    folder = engine.folder / BUILDS_FOLDER / fingerprint.name
    folder.mkdir(parents=True)
    engines = {}
    for direction in DIRECTIONS:
        data = f"{direction} of {target}".encode()
        (folder / f"{direction}.engine").write_bytes(data)
        engines[direction] = BuiltEngine(
            f"{direction}.engine", len(data), hashlib.sha256(data).hexdigest(), 1, 0.0, None
        )
    write_document(Build(folder, fingerprint, engines))
    return folder


@each_direction
@pytest.mark.parametrize("name", KINDS)
def test_configuration_agrees_with_the_graph(engine_of, out, name, direction):
    engine = engine_of(name)
    write_repository(engine, out)
    folder = out / f"{name}-{direction}"
    config, graph = parsed(folder), onnx.load(folder / "1" / "model.onnx", load_external_data=False).graph
    assert (config.name, config.backend, config.max_batch_size) == (folder.name, "onnxruntime", 8)
    for ours, theirs in ((config.input, graph.input), (config.output, graph.output)):
        (tensor,), (value,) = ours, theirs
        kind = value.type.tensor_type
        batch, *dims = kind.shape.dim
        assert tensor.name == value.name
        assert (tensor.data_type, kind.elem_type) == (11, onnx.TensorProto.FLOAT)
        assert batch.dim_param
        assert list(tensor.dims) == [-1 if dim.dim_param else dim.dim_value for dim in dims]
        assert list(tensor.dims).count(-1) == 1
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    (group,) = config.instance_group
    assert (group.kind, group.count) == (group.KIND_AUTO, 1)
    facts = facts_of(config)
    assert facts["contexts"] == engine.spec.contexts
    assert (facts["hop"], facts["precision"]) == (engine.spec.hop, "fp32")


def test_options_reach_the_configuration(engine_of, out):
    options = TritonOptions(max_batch=3, queue_delay=0, instances=2, kind="gpu")
    write_repository(engine_of("tiny-s"), out, options)
    config = parsed(out / "tiny-s-decoder")
    assert (config.max_batch_size, config.dynamic_batching.max_queue_delay_microseconds) == (3, 0)
    assert config.instance_group[0].count == 2
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


@pytest.mark.parametrize("kind", ["auto", "cpu"])
def test_int8_requests_are_never_joined(engine_of, kind):
    """Ranges are measured in each call, so other requests in a batch would change the result."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    text = config_text(engine_of("tiny-s").spec, ENCODER, TritonOptions(precision="int8", kind=kind, max_batch=4))
    config = text_format.Parse(text, ModelConfig())
    assert config.max_batch_size == 1
    assert not config.HasField("dynamic_batching")
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU


def test_odd_names_survive_the_text_format(engine_of):
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    spec = engine_of("tiny-s").spec
    for name in ('a "quoted" one', "back\\slash", "音 é"):
        text = config_text(type(spec)(**vars(spec) | {"name": name}), ENCODER, TritonOptions())
        config = text_format.Parse(text, ModelConfig())
        assert config.name == f"{name}-encoder"
        assert facts_of(config)["name"] == name


def test_files_are_second_names_or_copies(engine_of, out, monkeypatch):
    engine = engine_of("tiny-s")
    folders = write_repository(engine, out)
    assert folders == [out / "tiny-s-encoder", out / "tiny-s-decoder"]
    assert (folders[0] / "1" / "model.onnx").samefile(engine.folder / "encoder.onnx")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    write_repository(engine, out.with_name("copies"))
    copy = out.with_name("copies") / "tiny-s-encoder" / "1" / "model.onnx"
    assert not copy.samefile(engine.folder / "encoder.onnx")
    assert copy.read_bytes() == (engine.folder / "encoder.onnx").read_bytes()


def test_weights_beside_the_graph_are_found(own_engine, out):
    path = own_engine.folder / "encoder.onnx"
    onnx.save_model(
        onnx.load(path), path, save_as_external_data=True, location="encoder.onnx.data", size_threshold=1024
    )
    graphs = own_engine.spec.graphs["fp32"] | {ENCODER: describe_graph(own_engine.folder, "encoder.onnx")}
    spec = dataclasses.replace(own_engine.spec, graphs={"fp32": graphs})
    (own_engine.folder / "spec.json").write_text(spec.to_json())
    engine = Engine.load(own_engine.folder)
    write_repository(engine, out)
    version = out / "tiny-s-encoder" / "1"
    assert sorted(path.name for path in version.iterdir()) == ["encoder.onnx.data", "model.onnx"]
    audio = noise((3, 2, 4 * engine.spec.hop))
    served = onnxruntime.InferenceSession(version / "model.onnx").run(None, {"audio": audio})[0]
    direct = onnxruntime.InferenceSession(engine.graph(ENCODER, "fp32")).run(None, {"audio": audio})[0]
    assert np.array_equal(served, direct)


def test_engine_of_tensorrt_is_served_with_its_profile(own_engine, out):
    add_build(own_engine, TENSORRT_RTX, "1.7.1", "portable")
    add_build(own_engine)
    write_repository(own_engine, out, TritonOptions(backend="tensorrt"))
    config = parsed(out / "tiny-s-encoder")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 8)
    assert list(config.instance_group[0].profile) == ["0"]
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert facts_of(config)["longest_window"] == 256
    assert (out / "tiny-s-encoder" / "1" / "model.plan").read_bytes() == b"encoder of 8.9"


def test_engines_of_tensorrt_that_cannot_be_served(own_engine, out):
    options = TritonOptions(backend="tensorrt")
    add_build(own_engine, TENSORRT_RTX, "1.7.1", "portable")
    with pytest.raises(BackendUnavailableError, match="no fp32 engine of TensorRT") as error:
        write_repository(own_engine, out, options)
    assert_one_line(error.value)
    folder = add_build(own_engine)
    add_build(own_engine, target="9.0")
    with pytest.raises(InputError, match="leave only the one") as error:
        write_repository(own_engine, out, options)
    assert_one_line(error.value)
    (folder / "encoder.engine").write_bytes(b"encoder of 8.0")
    for path in (folder.parent).glob("*9.0*/*"):
        path.unlink()
    with pytest.raises(StaleEngineError, match="have changed"):
        write_repository(own_engine, out, options)
    spec = own_engine.folder / "spec.json"
    spec.write_text(spec.read_text().replace(own_engine.spec.graphs["fp32"][ENCODER].sha256, "0" * 64))
    with pytest.raises(StaleEngineError, match="is stale") as error:
        write_repository(Engine.load(own_engine.folder), out, options)
    assert_one_line(error.value)
    assert not out.exists()


def test_damaged_engine_of_tensorrt_does_not_hide_others(own_engine, out):
    damaged = add_build(own_engine, version="10.13.0")
    (damaged / "encoder.engine").unlink()
    with pytest.raises(StaleEngineError, match=r"is damaged .*run: samekit export tiny-s --weights random") as error:
        write_repository(own_engine, out, TritonOptions(backend="tensorrt"))
    assert_one_line(error.value)
    add_build(own_engine)
    assert write_repository(own_engine, out, TritonOptions(backend="tensorrt"))


def test_engine_file_that_leads_out_of_its_build(own_engine, out, tmp_path):
    folder = add_build(own_engine)
    (tmp_path / "encoder.engine").write_bytes((folder / "encoder.engine").read_bytes())
    path = folder / "fingerprint.json"
    path.write_text(path.read_text().replace('"encoder.engine"', '"../../../../encoder.engine"'))
    with pytest.raises(StaleEngineError, match="is damaged"):
        write_repository(own_engine, out, TritonOptions(backend="tensorrt"))
    assert not out.exists()


def test_repository_is_written_atomically(engine_of, out, monkeypatch):
    written = []

    def fail(source, target):
        written.append(target)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr("samekit.serving.triton.link_or_copy", fail)
    with pytest.raises(OutputError, match="No space left") as error:
        write_repository(engine_of("tiny-s"), out)
    assert_one_line(error.value)
    assert list(out.parent.iterdir()) == []


def test_leftovers_of_killed_commands_are_deleted(engine_of, out):
    left = out.parent / f".{out.name}.12-0123abcd.tmp"
    (left / "tiny-s-encoder").mkdir(parents=True)
    os.utime(left, (0, 0))
    write_repository(engine_of("tiny-s"), out)
    assert list(out.parent.iterdir()) == [out]


def test_folder_that_appears_meanwhile_stays(engine_of, out, monkeypatch):
    def copy_slowly(source, target):
        target.write_bytes(source.read_bytes())
        out.mkdir(exist_ok=True)
        (out / "theirs").touch()

    monkeypatch.setattr("samekit.serving.triton.link_or_copy", copy_slowly)
    with pytest.raises(InputError, match="exists"):
        write_repository(engine_of("tiny-s"), out)
    assert list(out.parent.iterdir()) == [out]
    assert [path.name for path in out.iterdir()] == ["theirs"]


def test_name_that_is_not_utf8(engine_of, out):
    """A checkpoint folder may have such a name, but the server needs UTF-8."""
    engine = engine_of("tiny-s")
    engine = dataclasses.replace(engine, spec=dataclasses.replace(engine.spec, name="caf\udce9"))
    with pytest.raises(InputError, match="is not valid UTF-8") as error:
        write_repository(engine, out)
    assert_one_line(error.value)
    assert list(out.parent.iterdir()) == []


def test_name_that_no_folder_can_have(engine_of, out):
    with pytest.raises(InputError, match="no file can have this name") as error:
        write_repository(engine_of("tiny-s"), out.with_name("a\0b"))
    assert_one_line(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "torch"},
        {"kind": "tpu"},
        {"max_batch": 0},
        {"queue_delay": -1},
        {"instances": 0},
        {"max_batch": 2**31},
        {"queue_delay": 1.5},
        {"backend": "tensorrt", "max_batch": 9},
        {"backend": "tensorrt", "kind": "cpu"},
        {"precision": "fp8"},
        {"precision": "int8", "backend": "tensorrt"},
        {"precision": "int8", "kind": "gpu"},
    ],
    ids=str,
)
def test_options_that_do_not_work(options):
    with pytest.raises(InputError) as error:
        TritonOptions(**options)
    assert_one_line(error.value)


def test_command(engine_of, out):
    arguments = ["triton", str(out), "--model", str(engine_of("tiny-s").folder), "--max-batch", "4"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(out / "tiny-s-encoder"), str(out / "tiny-s-decoder")]
    for refused in (arguments, ["triton", str(out) + "2", "--model", "absent"], [*arguments, "--precision", "fp16"]):
        result = CliRunner().invoke(main, refused)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output


@pytest.mark.parametrize(
    "edit",
    [
        list,
        lambda facts: facts | {"more": 1},
        lambda facts: {name: fact for name, fact in facts.items() if name != "hop"},
        lambda facts: facts | {"hop": "4096"},
        lambda facts: facts | {"channels": True},
        lambda facts: facts | {"precision": None},
        lambda facts: facts | {"longest_window": 2.5},
        lambda facts: facts | {"contexts": [1, 1]},
        lambda facts: facts | {"contexts": {ENCODER: 1}},
        lambda facts: facts | {"contexts": {ENCODER: 1, DECODER: "1"}},
    ],
)
def test_invalid_facts_of_a_server(engine_of, edit):
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    config = text_format.Parse(config_text(engine_of("tiny-s").spec, ENCODER, TritonOptions()), ModelConfig())
    config.parameters[FACTS].string_value = json.dumps(edit(facts_of(config)))
    with pytest.raises(InputError, match="was not written by samekit") as error:
        facts_of(config)
    assert_one_line(error.value)
