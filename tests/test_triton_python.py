"""Repositories for Triton's Python backend, and the class that runs there, with a stand-in for the server."""

from __future__ import annotations

import json
import sys

import fake_triton
import numpy as np
import pytest
from click.testing import CliRunner
from fake_triton import Request, TritonError
from google.protobuf import json_format
from helpers import DIRECTIONS, RATE, assert_one_line, each_direction, noise
from test_triton import parsed

from samekit import AutoencoderModel
from samekit.cli.main import main
from samekit.engine.folder import Engine
from samekit.engine.spec import ENCODER, INPUT_NAMES, opposite
from samekit.errors import BackendUnavailableError, InputError, SamekitError
from samekit.serving.triton import TritonOptions, write_repository
from samekit.serving.triton_model import TritonPythonModel
from samekit.serving.triton_server import find_server

PYTHON = TritonOptions(backend="python")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "repository"


@pytest.fixture
def serve(small_engine, out, monkeypatch):
    """Return a function that writes a repository and opens encoder or decoder of it, as the server does."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton)
    opened = []

    def open_model(direction=ENCODER, edit=None, **options):
        write_repository(Engine.load(small_engine), out, TritonOptions(backend="python", **options))
        folder = out / f"fake-{direction}"
        if edit:
            edit(folder / "1" / "engine")
        config = json_format.MessageToDict(parsed(folder), preserving_proto_field_name=True)
        model = TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
                "model_repository": str(folder),
                "model_version": "1",
            }
        )
        opened.append(model)
        return model

    yield open_model
    for model in opened:
        model.finalize()


@pytest.fixture
def library(small_engine):
    with AutoencoderModel.from_pretrained(small_engine, "cpu", backend="onnxruntime", threads=1) as model:
        for direction in DIRECTIONS:
            model.autoencoder.backend.use_packed_weights(direction)
        yield model


def request_to_encode(audio, rate=None):
    rates = {} if rate is None else {"sample_rate": np.full((len(audio), 1), rate, np.int32)}
    return Request({"audio": audio} | rates)


def output(response, name="latents"):
    """Return the array of a response, which must be no error."""
    assert response.error() is None, response.error().message()
    (tensor,) = response.output_tensors()
    assert tensor.name() == name
    return np.from_dlpack(tensor)


@each_direction
def test_damaged_graph_is_found_before_the_first_request(serve, direction):
    def damage(engine):
        graph = engine / f"{direction}.onnx"
        size = graph.stat().st_size
        # The file is a second name of one that other tests use.
        graph.unlink()
        graph.write_bytes(bytes(size))

    with pytest.raises(SamekitError, match=f"{direction}.onnx: ") as error:
        serve(direction, damage)
    assert_one_line(error.value)


@each_direction
def test_configuration(small_engine, out, direction):
    write_repository(Engine.load(small_engine), out, PYTHON)
    folder = out / f"fake-{direction}"
    config = parsed(folder)
    assert (config.name, config.backend, config.max_batch_size) == (folder.name, "python", 8)
    array, *rates = config.input
    assert (array.name, array.data_type, array.allow_ragged_batch) == (INPUT_NAMES[direction], 11, True)
    assert list(array.dims) == ([-1, -1] if direction == ENCODER else [4, -1])
    # TYPE_INT32 is 8.
    rates = [(rate.name, rate.data_type, list(rate.dims), rate.optional) for rate in rates]
    assert rates == ([("sample_rate", 8, [1], True)] if direction == ENCODER else [])
    assert list(config.output[0].dims) == ([4, -1] if direction == ENCODER else [2, -1])
    assert not config.model_transaction_policy.decoupled
    assert (folder / "1" / "model.py").read_text().startswith("from samekit.serving.triton_model import")


@pytest.mark.parametrize(("kind", "joins"), [("auto", True), ("gpu", True), ("cpu", False)])
def test_requests_are_not_joined_on_cpus(small_engine, out, kind, joins):
    """A request can have several clips all the same."""
    write_repository(Engine.load(small_engine), out, TritonOptions(backend="python", kind=kind, max_batch=4))
    config = parsed(out / "fake-encoder")
    assert (config.HasField("dynamic_batching"), config.max_batch_size) == (joins, 4)


def test_streaming_models_are_decoupled(small_engine, out):
    write_repository(Engine.load(small_engine), out, TritonOptions(backend="python", streaming=True))
    assert parsed(out / "fake-encoder").model_transaction_policy.decoupled


def test_repository_has_only_the_graphs_of_its_precision(half_engine, out):
    write_repository(Engine.load(half_engine), out, TritonOptions(backend="python", precision="fp16"))
    copied = Engine.load(out / "tiny-s-encoder" / "1" / "engine")
    assert list(copied.spec.graphs) == ["fp16"]
    copied.check_digests()
    names = {path.name for path in copied.folder.iterdir()}
    assert names == {"spec.json", "encoder.fp16.onnx", "decoder.fp16.onnx"}
    assert (copied.folder / "encoder.fp16.onnx").samefile(half_engine / "encoder.fp16.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnxruntime", "streaming": True}, "pass backend python"),
        ({"backend": "tensorrt", "model_backend": "torch"}, "pass backend python"),
        ({"model_backend": "jax"}, "unknown model_backend 'jax'; choose one of auto, "),
        ({"model_backend": "tensorrt", "kind": "cpu"}, "needs a GPU"),
        ({"model_backend": "tensorrt", "precision": "int8"}, "int8 graphs are for CPUs"),
        ({"max_seconds": 0}, "max_seconds is 0"),
        ({"streaming": 1}, "streaming is 1"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(InputError, match=message) as error:
        TritonOptions(**{"backend": "python"} | options)
    assert_one_line(error.value)


def test_joined_requests_equal_the_library(serve, library):
    model = serve()
    clips = [
        (noise((1, 2, 5000), 1), None),
        (noise((1, 1, 3000), 2), 16_000),
        (noise((2, 2, 5000), 3), 48_000),
        (noise((1, 6, 7), 4), 8_000),
        (noise((1, 2, 5000), 5), RATE),
    ]
    responses = model.execute([request_to_encode(*clip) for clip in clips])
    for (audio, rate), response in zip(clips, responses, strict=True):
        assert np.array_equal(output(response), library.encode(audio, rate or RATE))


def test_clips_of_one_request_have_their_own_rates(serve, library):
    audio, rates = noise((2, 2, 4000)), [22_050, 48_000]
    request = Request({"audio": audio, "sample_rate": np.array(rates, np.int32)[:, None]})
    (response,) = serve().execute([request])
    assert np.array_equal(output(response), library.encode(audio, rates))


def test_decoder_equals_the_library(serve, library):
    model, latents = serve("decoder"), [noise((1, 4, length), length) for length in (700, 1, 300)]
    responses = model.execute([Request({"latents": array}) for array in latents])
    for array, response in zip(latents, responses, strict=True):
        assert np.array_equal(output(response, "audio"), library.decode(array))


@each_direction
def test_streams_equal_the_library(serve, library, direction):
    model = serve(direction, streaming=True)
    features, unit = library.spec.layout(direction)
    array = noise((1, features, 1000 * unit))
    request = Request({INPUT_NAMES[direction]: array})
    assert model.execute([request]) is None
    *parts, end = request.sent
    assert end is None
    assert len(parts) > 3
    arrays = [output(part, INPUT_NAMES[opposite(direction)]) for part in parts]
    expected = library.encode(array, RATE) if direction == ENCODER else library.decode(array)
    assert np.array_equal(np.concatenate(arrays, axis=2), expected)


def test_stream_ends_when_its_client_is_gone(serve):
    request = Request({"audio": noise((1, 2, 8000))}, cancelled_after=2)
    serve(streaming=True).execute([request])
    assert len(request.sent) == 3
    assert request.sent[-1] is None


BAD = {
    "holds NaN": Request({"audio": np.full((1, 2, 100), np.nan, np.float32)}),
    "is empty": Request({"audio": np.zeros((1, 2, 0), np.float32)}),
    "no channels": Request({"audio": np.zeros((1, 0, 100), np.float32)}),
    "no clips": Request({"audio": np.zeros((0, 2, 100), np.float32)}),
    "out of range": request_to_encode(noise((1, 2, 100)), 0),
    "-5 Hz": request_to_encode(noise((1, 2, 100)), -5),
    "more than 600 s": request_to_encode(noise((1, 1, 601_000)), 1000),
    "clips and rates": Request({"audio": noise((2, 2, 100)), "sample_rate": np.full((3, 1), RATE, np.int32)}),
}


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [((1, 4, 0), 0, "is empty"), ((0, 4, 5), 0, "is empty"), ((1, 4, 5), np.nan, "holds NaN")],
)
def test_bad_latents(serve, shape, value, message):
    (response,) = serve("decoder").execute([Request({"latents": np.full(shape, value, np.float32)})])
    assert message in response.error().message()
    assert response.error().code() == TritonError.INVALID_ARG


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_requests_are_answered_alone(serve, library, streaming):
    model, good = serve(streaming=streaming), noise((1, 2, 5000))
    requests = [Request({"audio": good}), *(Request(each.arrays) for each in BAD.values()), Request({"audio": good})]
    responses = model.execute(requests) or [request.sent[0] for request in requests]
    for response, kind in zip(responses[1:-1], BAD, strict=True):
        error = response.error()
        assert error is not None, kind
        assert error.code() == TritonError.INVALID_ARG
        assert_one_line(error.message())
    for response in (responses[0], responses[-1]):
        assert output(response).shape[2] <= library.spec.latents(5000)
        assert response.error() is None


def test_overflow_of_one_request_leaves_the_others(serve, library):
    good, loud = noise((1, 2, 5000)), np.full((1, 2, 5000), 3e38, np.float32)
    first, second, third = serve().execute([Request({"audio": audio}) for audio in (good, loud, good)])
    assert (second.error().code(), "NaN or infinity; " in second.error().message()) == (TritonError.INTERNAL, True)
    for response in (first, third):
        assert np.array_equal(output(response), library.encode(good, RATE))


def test_limit_counts_all_clips_and_the_longest_rate(serve):
    model = serve(max_seconds=1)
    fits, too_long = noise((2, 1, 22_050)), noise((2, 1, 22_051))
    assert output(model.execute([request_to_encode(fits)])[0]).shape[0] == 2
    (response,) = model.execute([request_to_encode(too_long)])
    assert "are more than 1 s" in response.error().message()


def test_limit_of_the_decoder(serve):
    (response,) = serve("decoder", max_seconds=1).execute([Request({"latents": noise((1, 4, RATE // 8 + 2))})])
    assert "are more than 1 s" in response.error().message()


def test_server_that_is_missing(tmp_path, monkeypatch, small_engine, out):
    monkeypatch.setenv("PATH", str(tmp_path))
    # A package that is None in `sys.modules` counts as missing.
    monkeypatch.setitem(sys.modules, "pytriton", None)
    with pytest.raises(BackendUnavailableError, match="there is no tritonserver") as error:
        find_server()
    assert_one_line(error.value)
    result = CliRunner().invoke(main, ["triton", str(out), "--model", str(small_engine), "--tune"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert not out.exists()


def test_tuning_looks_for_the_output_first(small_engine, out):
    out.mkdir()
    result = CliRunner().invoke(main, ["triton", str(out), "--model", str(small_engine), "--tune"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"{out}: exists; " in result.stderr
