"""Repositories on a real Triton server, that of the package nvidia-pytriton, on the loopback interface.

That server is release 24.10 with the Python backend only. `make test-slow` installs it.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile as sf
import triton_load
from click.testing import CliRunner
from helpers import RATE, assert_one_line, noise
from test_triton import add_build
from test_triton_python import BAD

from samekit import AutoencoderModel
from samekit.backends.cpu import available_cpus
from samekit.engine.folder import Engine
from samekit.engine.spec import DECODER, DIRECTIONS, ENCODER, INPUT_NAMES, opposite
from samekit.errors import BackendError, BackendUnavailableError
from samekit.serving.triton import TritonOptions, write_repository
from samekit.serving.triton_server import TritonServer, find_server
from samekit.serving.triton_tuning import sweep

pytestmark = pytest.mark.slow

MODEL = "same-tiny"
CLIENTS = 32
SECONDS = 15
PYTHON = TritonOptions(backend="python")

# Samples, channels and sample rate of clips.
CLIPS = ((1, 2, RATE), (5 * RATE, 2, RATE), (16_000, 1, 16_000), (70_001, 2, 48_000), (2000, 6, 22_050))


@pytest.fixture(scope="module")
def program():
    """The server program, or a reason to skip these tests."""
    for module in ("grpc", "http"):
        pytest.importorskip(f"tritonclient.{module}", reason=f"needs tritonclient[{module}]; run: make test-slow")
    try:
        return find_server()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def start(program, tmp_path_factory):
    """Return a function that writes a repository and starts a server of it."""

    def started(engine, options=PYTHON):
        repository = tmp_path_factory.mktemp("models") / "models"
        write_repository(engine, repository, options)
        for config in repository.glob("*/config.pbtxt"):
            # Answers of a GPU would differ from the library's in their last bits.
            config.write_text(config.read_text().replace("KIND_AUTO", "KIND_CPU"))
        return TritonServer(repository, program)

    return started


@pytest.fixture(scope="module", params=["auto", "cpu"])
def server(start, bundled_engine, request):
    """A server that joins requests, and one that does not."""
    with start(bundled_engine, replace(PYTHON, kind=request.param)) as running:
        yield running


@pytest.fixture(scope="module")
def library(bundled_engine):
    """The model in this process, with the threads of the server, so that sums have the same order."""
    model = AutoencoderModel.from_pretrained(bundled_engine.folder, "cpu", threads=available_cpus())
    with model:
        for direction in DIRECTIONS:
            model.autoencoder.backend.use_packed_weights(direction)
        yield model


@pytest.fixture(scope="module")
def clips(library):
    """Clips, their sample rates, and the latents of the library."""
    audio = [(noise((1, channels, samples), seed), rate) for seed, (samples, channels, rate) in enumerate(CLIPS)]
    return [(array, rate, library.encode(array, rate)) for array, rate in audio]


def protocols():
    """Return the two client modules, each with the attribute of TritonServer that is its address."""
    import tritonclient.grpc
    import tritonclient.http

    return {"grpc": tritonclient.grpc, "http": tritonclient.http}


def inputs_of(protocol, arrays):
    """Return the inputs of a request."""
    inputs = []
    for name, array in arrays.items():
        kind = "INT32" if array.dtype == np.int32 else "FP32"
        inputs.append(protocol.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def to_encode(audio, rate):
    return {"audio": audio, "sample_rate": np.full((len(audio), 1), rate, np.int32)}


def ask(protocol, client, direction, arrays):
    """Send a request and return its output."""
    answer = client.infer(f"{MODEL}-{direction}", inputs_of(protocol, arrays))
    return answer.as_numpy(INPUT_NAMES[opposite(direction)])


def regions():
    """Return the names of shared memory that Triton servers of samekit use."""
    return {path.name for path in Path("/dev/shm").glob("*") if path.name.startswith(("samekit-", "triton_"))}


@pytest.mark.parametrize("name", ["grpc", "http"])
def test_answers_equal_the_library(server, library, clips, name):
    protocol = protocols()[name]
    with protocol.InferenceServerClient(getattr(server, name)) as client:
        for audio, rate, latents in clips:
            assert np.array_equal(ask(protocol, client, ENCODER, to_encode(audio, rate)), latents)
            decoded = ask(protocol, client, DECODER, {"latents": latents})
            assert np.array_equal(decoded, library.decode(latents))


def test_example_client_works(server, library, tmp_path):
    import triton_client

    sf.write(tmp_path / "clip.wav", noise((3 * RATE, 2)), RATE)
    library.encode_file(tmp_path / "clip.wav", tmp_path / "library.npy")
    with AutoencoderModel(triton_client.TritonBackend(server.grpc, MODEL)) as model:
        model.encode_file(tmp_path / "clip.wav", tmp_path / "server.npy")
        assert model.decode_file(tmp_path / "server.npy", tmp_path / "back.wav") == 3 * RATE
    assert np.array_equal(np.load(tmp_path / "server.npy"), np.load(tmp_path / "library.npy"))


@pytest.mark.parametrize("name", ["grpc", "http"])
def test_bad_requests_do_not_stop_the_server(server, clips, name):
    protocol = protocols()[name]
    with protocol.InferenceServerClient(getattr(server, name)) as client:
        for kind, request in BAD.items():
            with pytest.raises(protocol.InferenceServerException) as error:
                ask(protocol, client, ENCODER, request.arrays)
            assert error.value.status() in ("400", "StatusCode.INVALID_ARGUMENT"), kind
            # The server itself refuses these.
            if kind not in ("no clips", "clips and rates"):
                assert_one_line(error.value.message())
        audio, rate, latents = clips[0]
        assert np.array_equal(ask(protocol, client, ENCODER, to_encode(audio, rate)), latents)
    assert server.is_ready()


def test_streams_equal_the_library(start, bundled_engine, library):
    from tritonclient import grpc

    audio = noise((1, 2, 20 * RATE))
    latents = library.encode(audio, RATE)
    received = queue.Queue()
    with (
        start(bundled_engine, replace(PYTHON, streaming=True)) as server,
        grpc.InferenceServerClient(server.grpc) as client,
    ):
        client.start_stream(lambda result, error: received.put(error or result))
        for direction, arrays, expected in (
            (ENCODER, to_encode(audio, RATE), latents),
            (DECODER, {"latents": latents}, library.decode(latents)),
        ):
            client.async_stream_infer(f"{MODEL}-{direction}", inputs_of(grpc, arrays), enable_empty_final_response=True)
            parts = []
            while (
                not (answer := received.get(timeout=60)).get_response().parameters["triton_final_response"].bool_param
            ):
                parts.append(answer.as_numpy(INPUT_NAMES[opposite(direction)]))
            assert len(parts) > 3
            assert np.array_equal(np.concatenate(parts, axis=2), expected)
        client.async_stream_infer(f"{MODEL}-{ENCODER}", inputs_of(grpc, BAD["holds NaN"].arrays))
        error = received.get(timeout=60)
        assert "holds NaN" in error.message()
        client.stop_stream()


def test_many_clients_get_right_answers(server, clips, inputs):
    from tritonclient import grpc

    until = time.monotonic() + SECONDS

    def work(client_number):
        answers = 0
        with grpc.InferenceServerClient(server.grpc) as client:
            while time.monotonic() < until:
                audio, rate, latents = clips[(client_number + answers) % len(clips)]
                assert np.array_equal(ask(grpc, client, ENCODER, to_encode(audio, rate)), latents)
                answers += 1
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = sum(pool.map(work, range(CLIENTS)))
    assert answers > CLIENTS
    inputs["requests to Triton"] += answers


def test_server_that_is_killed_and_started_again(start, bundled_engine, clips, faults):
    from tritonclient import grpc

    servers, stop, lock = [], threading.Event(), threading.Lock()

    def work(number):
        """Ask the newest server; count right answers and refusals by server."""
        right, refused = [0, 0], 0
        while not stop.is_set():
            with lock:
                generation = len(servers) - 1
            audio, rate, latents = clips[number % len(clips)]
            try:
                with grpc.InferenceServerClient(servers[generation].grpc) as client:
                    answer = ask(grpc, client, ENCODER, to_encode(audio, rate))
            except grpc.InferenceServerException:
                refused += 1
                time.sleep(0.1)
                continue
            assert np.array_equal(answer, latents)
            right[generation] += 1
        return right, refused

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(8))
        # This must come before the pool waits for its threads.
        stack.callback(stop.set)
        others = regions()
        servers.append(stack.enter_context(start(bundled_engine)))
        clients = [pool.submit(work, number) for number in range(8)]
        time.sleep(4)
        models = psutil.Process(servers[0].process.pid).children()
        servers[0].process.kill()
        faults["Triton servers killed"] += 1
        # A process of a model can wait for the dead server for ever.
        servers[0].close()
        assert psutil.wait_procs(models, timeout=60)[1] == []
        assert regions() == others
        again = stack.enter_context(start(bundled_engine))
        with lock:
            servers.append(again)
        time.sleep(4)
        stop.set()
        results = [client.result(timeout=60) for client in clients]
    assert all(sum(right[generation] for right, _ in results) for generation in (0, 1))
    assert sum(refused for _, refused in results)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_configurations_without_their_backend(start, own_engine, backend):
    """This server has none of these backends. It looks for them after it has checked the configuration."""
    add_build(own_engine)
    with pytest.raises(BackendError, match=f"unable to find backend library for backend '{backend}'") as error:
        start(own_engine, TritonOptions(backend=backend))
    assert_one_line(error.value)


def test_invalid_configuration_is_found(program, own_engine, tmp_path):
    """The server does check configurations: the test above could not fail otherwise."""
    write_repository(own_engine, tmp_path / "models", TritonOptions())
    for config in (tmp_path / "models").glob("*/config.pbtxt"):
        config.write_text(config.read_text().replace("max_batch_size", "most_at_once"))
    with pytest.raises(BackendError, match="did not start") as error:
        TritonServer(tmp_path / "models", program)
    assert "unable to find backend library" not in str(error.value)


def test_sweep_measures_on_the_server(program, small_engine):
    options = replace(PYTHON, streaming=True)
    measured = dict(sweep(Engine.load(small_engine), options))
    assert min(measured.values()) > 0
    assert {each.max_batch for each in measured} == {1, 4, 8}
    assert all(each.streaming for each in measured)


@pytest.mark.usefixtures("program")
def test_benchmark(bundled_engine):
    options = ["--clients", "4", "--seconds", "4", "--clip", "2"]
    done = CliRunner().invoke(triton_load.main, [str(bundled_engine.folder), *options])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert results["answers"] > 4
    assert (results["wrong"], results["errors"]) == (0, {})
    assert 0 < results["latency"]["p50"] <= results["latency"]["p99"] < 10
    assert results["share"] > 0


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_benchmark_that_is_stopped(bundled_engine, tmp_path, number):
    """Many requests wait in the server when the signal comes."""
    options = ["--clients", "16", "--clip", "60", "--seconds", "40"]
    command = [sys.executable, triton_load.__file__, str(bundled_engine.folder), *options]
    others = regions()
    with (tmp_path / "log").open("wb") as log:
        benchmark = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        processes = []
        # The server, and a process each for encoder and decoder.
        while len(processes) < 3 and benchmark.poll() is None and time.monotonic() < until:
            time.sleep(0.5)
            processes = psutil.Process(benchmark.pid).children(recursive=True)
        assert len(processes) == 3, (tmp_path / "log").read_text()
        # The encoder alone is measured for 10 s before the load begins.
        time.sleep(20)
        benchmark.send_signal(number)
        assert benchmark.wait(timeout=30) == 128 + number
    finally:
        benchmark.kill()
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert regions() == others
    assert (tmp_path / "log").read_text() == "stopped; run the same command again\n"
