"""The example client of Triton servers, against a stand-in that speaks the server's protocol."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import onnxruntime
import pytest
import soundfile as sf
from click.testing import CliRunner
from helpers import RATE, assert_one_line, each_direction, noise, run_direction
from test_triton import parsed

from samekit import AutoencoderModel
from samekit.engine.spec import ENCODER
from samekit.errors import BackendError, InputError
from samekit.serving.triton import TritonOptions, model_name, write_repository


@pytest.fixture
def out(tmp_path):
    return tmp_path / "repository"


@pytest.fixture(scope="module")
def client():
    """The example `triton_client.py` as a module."""
    import triton_client

    return triton_client


@pytest.fixture
def server(out):
    """The address of a fake server of the repository `out`."""
    with stand_in(out) as address:
        yield address


@contextmanager
def stand_in(out):
    """Serve a repository with the protocol of Triton, and refuse requests that do not fit the configuration."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ModelConfig(self, request, context):  # noqa: N802 the protocol's name
            if not (out / request.name).exists():
                context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
            return service_pb2.ModelConfigResponse(config=parsed(out / request.name))

        def ModelInfer(self, request, context):  # noqa: N802 the protocol's name
            folder = out / request.model_name
            config, (tensor,) = parsed(folder), request.inputs
            batch, *dims = tensor.shape
            known = all(want in (-1, got) for want, got in zip(config.input[0].dims, dims, strict=True))
            if tensor.name != config.input[0].name or not known or batch > config.max_batch_size:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"unexpected shape {list(tensor.shape)}")
            array = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tensor.shape)
            session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
            (result,) = session.run([config.output[0].name], {tensor.name: array})
            answer = service_pb2.ModelInferResponse(model_name=config.name, model_version="1")
            answer.outputs.add(name=config.output[0].name, datatype="FP32", shape=result.shape)
            answer.raw_output_contents.append(result.tobytes())
            return answer

    # Triton does the same. The default limit of gRPC is 4 MiB, less than a window of audio.
    sizes = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(2), options=sizes)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(None).wait()


@each_direction
def test_client_equals_the_engine(engine_of, out, client, server, direction):
    engine = engine_of("tiny-s")
    write_repository(engine, out, TritonOptions(max_batch=2))
    features, unit = (2, engine.spec.hop) if direction == ENCODER else (engine.spec.latent_width, 1)
    array = noise((5, features, 9 * unit))
    with AutoencoderModel.from_pretrained(engine.folder, "cpu", backend="onnxruntime", threads=1) as local:
        expected = run_direction(local.autoencoder.backend, direction, array)
    with client.TritonBackend(server, "tiny-s") as backend:
        assert np.allclose(run_direction(backend, direction, array), expected, atol=1e-5)


def test_client_takes_files(engine_of, out, client, server, tmp_path):
    write_repository(engine_of("tiny-s"), out)
    sf.write(tmp_path / "clip.wav", noise((7 * RATE, 2)), RATE)
    for task, source, target in (("encode", "clip.wav", "clip.npy"), ("decode", "clip.npy", "back.wav")):
        arguments = [task, str(tmp_path / source), str(tmp_path / target), "--model", "tiny-s", "--url", server]
        result = CliRunner().invoke(client.main, arguments)
        assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "clip.npy").shape == (32, -(-7 * RATE // 4096))
    assert sf.info(tmp_path / "back.wav").frames == 7 * RATE


def test_client_reports_errors_of_the_server(engine_of, out, client, server):
    write_repository(engine_of("tiny-s"), out)
    with pytest.raises(BackendError, match="absent-encoder") as error:
        client.TritonBackend(server, "absent")
    assert_one_line(error.value)
    config = out / model_name("tiny-s", ENCODER) / "config.pbtxt"
    config.write_text(config.read_text().replace('"samekit"', '"other"'))
    with pytest.raises(InputError, match="was not written by samekit") as error:
        client.TritonBackend(server, "tiny-s")
    assert_one_line(error.value)
