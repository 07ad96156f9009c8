"""The HTTP server: answers, limits, batches over several requests, and a real Ray Serve on the loopback interface."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import soundfile as sf
from click.testing import CliRunner
from helpers import FakeBackend, assert_one_line, noise

from samekit import AutoencoderModel
from samekit.backends.shared import SharedBackend
from samekit.cli.main import main
from samekit.engine.spec import DECODER, ENCODER
from samekit.errors import InputError, NonFiniteError
from samekit.serving import flow
from samekit.serving.http import create_app
from samekit.serving.options import ServeOptions
from samekit.serving.server import app
from samekit.serving.service import Service

RATE = 44_100
SERVER_SECONDS = 120


def audio_file(samples=RATE, rate=RATE, channels=2, kind="WAV", seed=0):
    """Return the bytes of an audio file of noise."""
    file = io.BytesIO()
    sf.write(file, noise((channels, samples), seed).T, rate, format=kind)
    return file.getvalue()


def npy_file(array):
    """Return the bytes of a `.npy` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="module")
def model(small_engine):
    """The library, with the threads of the server."""
    return AutoencoderModel.from_pretrained(small_engine, "cpu", backend="onnxruntime", threads=1)


def encoded(model, tmp_path, data, suffix=".wav"):
    """Encode a file with the library; return the bytes of the `.npy` file and the metadata."""
    path = (tmp_path / "clip").with_suffix(suffix)
    path.write_bytes(data)
    metadata = model.encode_file(path, tmp_path / "clip.npy")
    return (tmp_path / "clip.npy").read_bytes(), metadata


@asynccontextmanager
async def client_of(engine, folder, token_sha256=None, **limits):
    """A client of the application in this process, without Ray."""
    folder.mkdir(exist_ok=True)
    options = ServeOptions(str(engine), cpus_per_replica=1, backend="onnxruntime", **limits)
    service = Service(options, folder, lambda *_: None)
    app = create_app(service, token_sha256)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        client.app, client.service = app, service
        yield client
    service.close()
    assert service.in_work == 0
    assert list(folder.iterdir()) == []


def ask(engine, folder, method, url, *, limits=None, token_sha256=None, **request):
    """Send one request to the application in this process."""

    async def send():
        async with client_of(engine, folder, token_sha256, **(limits or {})) as client:
            return await client.request(method, url, **request)

    return asyncio.run(send())


async def until(condition):
    """Wait until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 the service has no events for tests
            await asyncio.sleep(0.001)


def refused(response, status):
    """Check that an answer is one line of JSON; return the message."""
    assert response.status_code == status, response.text
    message = response.json()["error"]
    assert_one_line(message)
    return message


# --- Answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rate", "channels"), [("WAV", RATE, 2), ("FLAC", 48_000, 1), ("OGG", 22_050, 2), ("MP3", RATE, 2)]
)
def test_latents_are_those_of_the_library(small_engine, model, tmp_path, kind, rate, channels):
    data = audio_file(3 * rate + 77, rate, channels, kind)
    expected, metadata = encoded(model, tmp_path, data, f".{kind.lower()}")
    answer = ask(small_engine, tmp_path / "work", "POST", "/v1/encode", content=data)
    assert answer.status_code == 200
    assert answer.content == expected
    assert answer.headers["content-type"] == "application/x-npy"
    assert answer.headers["x-samekit-samples"] == str(metadata["samples"])
    as_json = ask(
        small_engine, tmp_path / "work", "POST", "/v1/encode", content=data, headers={"accept": "application/json"}
    )
    fields = as_json.json()
    assert base64.b64decode(fields.pop("npy")) == expected
    assert fields == {name: value for name, value in metadata.items() if name != "source"}


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/x-npy"),
        ("*/*", "application/x-npy"),
        ("text/html;q=1", "application/x-npy"),
        # What the client axios sends: github.com/axios/axios/blob/v1.x/lib/defaults/index.js
        ("application/json, text/plain, */*", "application/json"),
        ("Application/JSON;charset=utf-8", "application/json"),
        ("application/x-npy, application/json;q=0.5", "application/x-npy"),
        ("application/x-npy;q=0.2, application/json; q=0.5", "application/json"),
        ("application/json;q=0, */*;q=0.1", "application/x-npy"),
        ("application/x-npy;q=0, application/*", "application/json"),
        ("application/json;q=nan", "application/x-npy"),
        ("application/json;q=1e9, ;;=,\xff", "application/x-npy"),
    ],
)
def test_kind_of_answer_that_the_client_prefers(small_engine, tmp_path, accept, kind):
    async def send():
        async with client_of(small_engine, tmp_path / "work") as client:
            del client.headers["accept"]
            headers = {} if accept is None else {"accept": accept.encode("latin-1")}
            return await client.post("/v1/encode", content=audio_file(), headers=headers)

    assert asyncio.run(send()).headers["content-type"] == kind


@pytest.mark.parametrize(
    ("query", "headers", "name", "subtype", "peak"),
    [
        ("", {}, "out.wav", "PCM_16", None),
        ("?format=flac&bits=24&peak=limit", {}, "out.flac", "PCM_24", "limit"),
        ("?bits=float", {}, "out.wav", "FLOAT", None),
        ("", {"accept": "audio/flac, audio/wav;q=0.5"}, "out.flac", "PCM_16", None),
        ("?samples=8001", {}, "out.wav", "PCM_16", None),
    ],
)
def test_audio_is_that_of_the_library(small_engine, model, tmp_path, query, headers, name, subtype, peak):
    latents, out = tmp_path / "clip.npy", tmp_path / name
    data = npy_file(noise((4, 1001), level=2))
    latents.write_bytes(data)
    if "samples" in query:
        latents.with_suffix(".json").write_text('{"samples": 8001}')
    model.decode_file(latents, out, subtype, peak)
    answer = ask(small_engine, tmp_path / "work", "POST", f"/v1/decode{query}", content=data, headers=headers)
    assert answer.status_code == 200
    # libsndfile writes the time of day into WAV files of floats.
    (samples, rate), (expected, _) = sf.read(io.BytesIO(answer.content)), sf.read(out)
    assert rate == RATE
    np.testing.assert_array_equal(samples, expected)
    assert subtype == "FLOAT" or answer.content == out.read_bytes()
    assert answer.headers["content-type"] == f"audio/{out.suffix[1:]}"
    assert int(answer.headers["content-length"]) == out.stat().st_size


def test_facts_probes_page_and_description(small_engine, model, tmp_path):
    async def visit():
        async with client_of(small_engine, tmp_path / "work", max_seconds=7) as client:
            # A range that does not exist: no answer is served in parts.
            headers = {"range": "bytes=99999999-"}
            paths = ("/v1/model", "/healthz", "/readyz", "/", "/openapi.json")
            return {path: await client.get(path, headers=headers) for path in paths}

    answers = asyncio.run(visit())
    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(answers, 200)
    facts = answers["/v1/model"].json()
    assert facts["model_sha256"] == model.spec.source_sha256
    assert facts["max_seconds"] == 7
    assert answers["/"].headers["content-type"].startswith("text/html")
    assert {"/v1/encode", "/v1/decode", "/v1/model"} <= set(answers["/openapi.json"].json()["paths"])


# --- Limits and faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        ("encode", b"", {}, 400, "empty"),
        ("encode", b"no audio", {}, 422, "body"),
        ("encode", audio_file()[:5000], {}, 422, "cut off"),
        ("encode", audio_file(), {"content-type": "Multipart/form-data; boundary=x"}, 415, "send the file itself"),
        ("encode", audio_file(), {"content-encoding": "gzip"}, 415, "gzip"),
        ("encode", audio_file(3 * RATE), {}, 413, "longer than 2 s"),
        ("encode", bytes(300_001 * 4), {}, 413, "longer than 1000000 bytes"),
        ("decode", b"", {}, 400, "empty"),
        ("decode", b"\x93NUMPY no", {}, 422, "no .npy"),
        ("decode", npy_file(np.full((4, 9), np.nan, np.float32)), {}, 422, "NaN"),
        ("decode", npy_file(np.zeros((5, 9), np.float32)), {}, 422, "5 wide"),
        ("decode", npy_file(np.array([{"a": 1}], object)), {}, 422, "object"),
        ("decode", npy_file(np.zeros((4, 2 * RATE // 8 + 1), np.float32)), {}, 413, "longer than 2 s"),
        ("decode?bits=12", b"x", {}, 400, "bits"),
        ("decode?bits=16&bits=", b"x", {}, 400, "bits"),
        ("decode?peak=%00", b"x", {}, 400, "peak"),
        ("decode?format=mp3", b"x", {}, 400, "format"),
        ("decode?samples=-1", b"x", {}, 400, "samples"),
        ("decode?samples=1e3", b"x", {}, 400, "samples"),
        ("decode?samples=" + 5000 * "9", b"x", {}, 400, "samples"),
        ("decode?samples=" + 4000 * "9", npy_file(np.zeros((4, 9), np.float32)), {}, 422, "do not stand for"),
        ("decode?samples=5", npy_file(np.zeros((4, 9), np.float32)), {}, 422, "do not stand for 5 samples"),
        ("decode?format=flac&bits=32", npy_file(np.zeros((4, 9), np.float32)), {}, 422, "PCM_32"),
        ("nothing", b"", {}, 404, "Not Found"),
        ("encode/", b"", {"host": "elsewhere"}, 404, "Not Found"),
    ],
)
def test_refusals_are_one_line_of_json(small_engine, tmp_path, path, body, headers, status, words):
    limits = {"max_seconds": 2, "max_bytes": 1_000_000}
    answer = ask(small_engine, tmp_path / "work", "POST", f"/v1/{path}", content=body, headers=headers, limits=limits)
    message = answer.json()["error"]
    assert answer.status_code == status, message
    assert words in message
    assert "\n" not in message
    assert str(tmp_path) not in message


def test_long_body_without_a_length_is_refused_early(small_engine, tmp_path):
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1000
            yield bytes(1000)

    answer = ask(small_engine, tmp_path / "work", "POST", "/v1/encode", content=endless(), limits={"max_bytes": 5000})
    refused(answer, 413)
    assert sent == 6000


def test_slow_body(small_engine, tmp_path, monkeypatch):
    """It must arrive within a time that grows with what has arrived."""
    monkeypatch.setattr("samekit.serving.service.BODY_SECONDS", 0.2)

    async def steady():
        for begin in range(0, len(data), len(data) // 10):
            await asyncio.sleep(0.05)
            yield data[begin : begin + len(data) // 10]

    async def stalled():
        yield data[:1000]
        await asyncio.Event().wait()

    data = audio_file()
    assert ask(small_engine, tmp_path / "work", "POST", "/v1/encode", content=steady()).status_code == 200
    answer = ask(small_engine, tmp_path / "work", "POST", "/v1/encode", content=stalled())
    assert "1000 bytes" in refused(answer, 408)


def test_full_queue(small_engine, tmp_path):
    async def overload():
        async with client_of(small_engine, tmp_path / "work", max_queue=1) as client:
            wait = asyncio.Event()

            async def slow():
                yield audio_file()
                await wait.wait()

            first = asyncio.ensure_future(client.post("/v1/encode", content=slow()))
            await until(lambda: client.service.in_work)
            ready, second = await client.get("/readyz"), await client.post("/v1/encode", content=audio_file())
            wait.set()
            return await first, ready, second

    first, ready, second = asyncio.run(overload())
    assert (first.status_code, ready.status_code) == (200, 503)
    refused(second, 429)
    assert second.headers["retry-after"] == "1"


def test_client_that_has_gone_frees_its_work(small_engine, tmp_path):
    """The request is cancelled, as Ray Serve does it; `client_of` checks that nothing stays."""

    async def leave():
        async with client_of(small_engine, tmp_path / "work", max_seconds=3600) as client:
            work = asyncio.ensure_future(client.post("/v1/encode", content=audio_file(60 * RATE)))
            await until(lambda: client.service.in_work)
            await asyncio.sleep(0.05)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            await until(lambda: not client.service.in_work)

    asyncio.run(leave())


def test_client_that_leaves_while_it_sends(small_engine, tmp_path):
    scope = {"type": "http", "method": "POST", "path": "/v1/encode", "query_string": b"", "headers": []}
    sent = []

    async def send(message):
        sent.append(message)

    async def leave():
        async with client_of(small_engine, tmp_path / "work") as client:
            messages = iter([{"type": "http.request", "body": b"RIFF", "more_body": True}, {"type": "http.disconnect"}])

            async def receive():
                return next(messages)

            await client.app(scope, receive, send)

    # The application raises nothing, so nothing is logged.
    asyncio.run(leave())
    assert sent[0]["status"] == 499


def test_folder_of_requests_that_cannot_be_written(small_engine, tmp_path):
    folder = tmp_path / "work"

    async def send():
        async with client_of(small_engine, folder, max_queue=1) as client:
            folder.rename(tmp_path / "away")
            failed = [await client.post("/v1/encode", content=audio_file()) for _ in range(2)]
            (tmp_path / "away").rename(folder)
            return failed, await client.post("/v1/encode", content=audio_file())

    failed, last = asyncio.run(send())
    for answer in failed:
        assert "disk" in refused(answer, 503)
    assert last.status_code == 200


def test_token(small_engine, tmp_path):
    digest = hashlib.sha256("s\u00e9cret".encode()).hexdigest()
    for path, given, status in (
        ("/v1/model", None, 401),
        ("/v1/model", "Bearer wrong", 401),
        ("/v1/model", "Basic s\u00e9cret", 401),
        ("/openapi.json", None, 401),
        ("/metrics", None, 401),
        ("/v1/model", "Bearer s\u00e9cret, Bearer s\u00e9cret", 401),
        ("/v1/model", "Bearer s\u00e9cret", 200),
        ("/healthz", None, 200),
        ("/", None, 200),
    ):
        headers = [("authorization", each.encode()) for each in (given or "").split(", ") if each]
        answer = ask(small_engine, tmp_path / "work", "GET", path, headers=headers, token_sha256=digest)
        assert answer.status_code == status, path


def test_files_of_killed_replicas_are_removed(small_engine, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = tmp_path / "work"
    left = folder / f"{ended.pid}-left"
    left.mkdir(parents=True)
    assert ask(small_engine, folder, "GET", "/healthz").status_code == 200
    assert not left.exists()


@pytest.mark.parametrize("change", [{"replicas": 0}, {"gpus_per_replica": 2}, {"max_bytes": True}, {"max_wait_ms": -1}])
def test_options_are_checked(change):
    with pytest.raises(InputError) as caught:
        ServeOptions("same-s", **change)
    assert_one_line(caught.value)
    assert next(iter(change)) in str(caught.value)


# --- Batches over several requests -------------------------------------------------------------------------------


class CountingBackend(FakeBackend):
    """Encodes to the sum of each latent's samples; records the size of each batch, and waits for `gate`."""

    def __init__(self, most_pending=1):
        super().__init__(self.sums)
        self.most_pending = most_pending
        self.batches, self.gate = [], threading.Event()

    def sums(self, direction, array):
        assert self.gate.wait(60)
        self.batches.append(array.shape[0])
        if (array == 99).any() and array.shape[0] > 1:
            raise NonFiniteError("one of these overflows; leave it out")
        total = array.reshape(*array.shape[:2], -1, 8).sum((1, 3))
        return np.repeat(np.where(total == 99 * 16, np.nan, total)[:, None], 4, axis=1).astype(np.float32)


@pytest.mark.parametrize("most_pending", [1, 2])
def test_windows_of_several_threads_share_batches(most_pending):
    backend, sizes = CountingBackend(most_pending), []
    shared = SharedBackend(backend, 4, 0.05, lambda direction, size: sizes.append((direction, size)))
    inputs = [np.full((1, 2, 8 * (2 if index % 4 else 3)), index, np.float32) for index in range(16)]
    outputs = {}

    def work(index):
        try:
            outputs[index] = shared.encode(inputs[index])
        except NonFiniteError as error:
            outputs[index] = error

    inputs[7][:] = 99
    threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    backend.gate.set()
    for thread in threads:
        thread.join(60)
    shared.close()
    assert isinstance(outputs.pop(7), NonFiniteError)
    for index, output in outputs.items():
        np.testing.assert_array_equal(output, np.full((1, 4, inputs[index].shape[-1] // 8), 16 * index))
    assert max(size for _, size in sizes) == 4
    assert {direction for direction, _ in sizes} == {ENCODER}
    assert len(backend.batches) < 16


def test_one_request_with_many_windows_and_both_directions():
    backend = CountingBackend()
    backend.gate.set()
    with SharedBackend(backend, 3, 0, lambda *_: None) as shared:
        array = noise((7, 2, 16))
        np.testing.assert_array_equal(shared.encode(array), backend.encode(array))
        model = AutoencoderModel(shared, window=8)
        clip = noise((2, 8 * 50))
        np.testing.assert_array_equal(model.encode(clip, RATE), AutoencoderModel(backend, window=8).encode(clip, RATE))
    with pytest.raises(Exception, match="closed"):
        shared.run(DECODER, np.zeros((1, 4, 2), np.float32))


def test_failure_of_a_backend_reaches_the_thread_and_the_next_one_goes_on():
    calls = []

    def answer(direction, array):
        calls.append(direction)
        if len(calls) == 1:
            raise RuntimeError("driver lost")
        return np.zeros((array.shape[0], 4, array.shape[-1] // 8), np.float32)

    with SharedBackend(FakeBackend(answer), 1, 0, lambda *_: None) as shared:
        with pytest.raises(RuntimeError, match="driver lost"):
            shared.encode(np.zeros((1, 2, 8), np.float32))
        assert shared.encode(np.zeros((1, 2, 8), np.float32)).shape == (1, 4, 1)


# --- Flow of long bodies ------------------------------------------------------------------------------------------


class Relay:
    """Takes the place of Ray Serve between proxy and replica: queues without a limit, whose peak it records.

    It also records how many of the messages to the client were sent when the replica's request ended.
    """

    def __init__(self, app, messages=()):
        self.app, self.peaks = flow.ReplicaFlow(app), {"up": 0, "down": 0}
        self.messages, self.sent_at_end = messages, 0

    async def __call__(self, scope, receive, send):
        up, down = asyncio.Queue(), asyncio.Queue()
        held = {"up": 0, "down": 0}

        def put(queue, name, message):
            held[name] += len(message.get("body", b""))
            self.peaks[name] = max(self.peaks[name], held[name])
            queue.put_nowait(message)

        async def fetch():
            while True:
                put(up, "up", await receive())

        async def next_of(queue, name):
            message = await queue.get()
            held[name] -= len(message.get("body", b"")) if message else 0
            return message

        async def enqueue(message):
            put(down, "down", message)

        async def run():
            try:
                await self.app(scope, lambda: next_of(up, "up"), enqueue)
            finally:
                self.sent_at_end = len(self.messages)
                down.put_nowait(None)

        tasks = [asyncio.ensure_future(fetch()), asyncio.ensure_future(run())]
        while (message := await next_of(down, "down")) is not None:
            await send(message)
        for task in tasks:
            task.cancel()


OF_SERVE = [
    (b"x-samekit-flow", b"0"),
    (b"x-request-disconnect-disabled", b"?1"),
    (b"x-request-id", b"\xff"),
    (b"serve_multiplexed_model_id", b"\xff"),
    (b"x-session-id", b"\xff"),
]
"""Headers that a client must not set for Serve."""


def exchange(app, body=b"", chunk=2**16, slow_client=0.0):
    """Send a request through both middlewares; return the messages of the answer and the relay."""
    messages, left = [], memoryview(body)
    relay, done = Relay(app, messages), asyncio.Event()

    async def receive():
        nonlocal left
        if left is None:
            await done.wait()
            return {"type": "http.disconnect"}
        part, left = left[:chunk], left[chunk:] if len(left) > chunk else None
        return {"type": "http.request", "body": bytes(part), "more_body": left is not None}

    async def send(message):
        await asyncio.sleep(slow_client)
        messages.append(message)

    async def run():
        scope = {"type": "http", "headers": OF_SERVE}
        await asyncio.wait_for(flow.ProxyFlow(relay)(scope, receive, send), 60)
        done.set()

    asyncio.run(run())
    return messages, relay


def test_upload_waits_for_a_slow_replica():
    received = []

    async def app(scope, receive, send):
        assert [name for name, _ in scope["headers"]] == [b"x-samekit-flow"]
        more = True
        while more:
            await asyncio.sleep(0.001)
            message = await receive()
            received.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    body = os.urandom(5 * flow.WINDOW)
    messages, relay = exchange(app, body)
    assert b"".join(received) == body
    assert [message["type"] for message in messages] == ["http.response.start", "http.response.body"]
    assert relay.peaks["up"] <= 1.5 * flow.WINDOW


@pytest.mark.parametrize("slow_client", [0, 0.01])
def test_download_takes_little_memory(slow_client):
    parts = [os.urandom(2**20) for _ in range(20)]

    async def app(_scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    messages, relay = exchange(app, slow_client=slow_client)
    assert b"".join(message["body"] for message in messages[1:]) == b"".join(parts)
    assert max(len(message["body"]) for message in messages[1:]) <= flow.WINDOW
    assert relay.peaks["down"] <= 1.5 * flow.WINDOW
    # A server that stops waits for its replicas, and so for the client.
    assert relay.sent_at_end == len(messages)


@pytest.mark.parametrize("size", [10, 3 * flow.WINDOW])
def test_replica_that_dies_before_its_answer(size):
    async def app(_scope, receive, _send):
        while (await receive())["more_body"]:
            pass

    messages, _ = exchange(app, bytes(size))
    assert [message["type"] for message in messages] == ["http.response.start", "http.response.body"]
    assert messages[0]["status"] == 503
    assert_one_line(json.loads(messages[1]["body"])["error"])


@pytest.mark.parametrize("part", [b"a part", bytes(flow.WINDOW + 1)])
def test_no_part_of_an_answer_is_sent_if_the_replica_dies(part):
    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": part, "more_body": True})

    messages, _ = exchange(app)
    assert messages[0]["status"] == 503
    assert_one_line(json.loads(b"".join(message["body"] for message in messages[1:]))["error"])


def test_small_parts_of_a_body_are_gathered():
    parts = []

    async def app(_scope, receive, send):
        more = True
        while more:
            message = await receive()
            parts.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    body = os.urandom(2 * 2**20)
    exchange(app, body)
    assert b"".join(parts) == body
    assert len(parts) <= 4


def test_early_answer_is_followed_by_the_rest_of_the_body():
    """If the server closed a connection with unread data, the client could see a reset instead of the answer."""
    left = [32]

    async def receive():
        left[0] -= 1
        return {"type": "http.request", "body": bytes(2**20), "more_body": left[0] > 0}

    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    seen = []

    async def send(message):
        seen.append((message, left[0]))

    asyncio.run(flow.ProxyFlow(Relay(app))({"type": "http", "headers": []}, receive, send))
    (start, _), *_, (last, unread) = seen
    assert (b"connection", b"close") in start["headers"]
    assert b"".join(message["body"] for message, _ in seen[1:]) == b"{}"
    assert not last.get("more_body")
    assert (seen[1][1] > 0, unread) == (True, 0)


def test_errors_of_serve_itself_become_json():
    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": [[b"content-type", b"text/plain"]]})
        await send({"type": "http.response.body", "body": b"Path '/v1/model' not found."})

    messages, _ = exchange(app)
    assert messages[0]["status"] == 503
    assert len(messages) == 2
    assert "no model" in json.loads(messages[1]["body"])["error"]


@pytest.mark.parametrize("stalls", ["body", "answer"])
def test_clients_that_stall_are_given_up(monkeypatch, stalls):
    monkeypatch.setattr(flow, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(flow, "STALLED_SECONDS", 0.1)
    sent = []

    async def receive():
        await asyncio.sleep(60 if sent and stalls == "body" else 0)
        return {"type": "http.request", "body": b"part", "more_body": stalls == "body"}

    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def send(message):
        await asyncio.sleep(60 if stalls == "answer" else 0)
        sent.append(message)

    with nullcontext() if stalls == "body" else pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(flow.ProxyFlow(Relay(app))({"type": "http", "headers": []}, receive, send), 30))
    assert [message.get("more_body") for message in sent] == ([None, True, None] if stalls == "body" else [])


# --- Ray Serve ----------------------------------------------------------------------------------------------------


@contextmanager
def served(engine, log, *options, **environment):
    """Start `samekit serve` in a new process; yield the process and a client."""
    command = [sys.executable, "-m", "samekit", "serve", str(engine), "--port", "0", *options]
    variables = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64} | environment
    with open(log, "wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=variables) as process:
        try:
            begin = time.monotonic()
            while not (line := log.read_text()).count("serves"):
                assert process.poll() is None, line
                assert time.monotonic() - begin < SERVER_SECONDS, line
                time.sleep(0.1)
            with httpx.Client(base_url=line.split()[-1], timeout=60) as client:
                yield process, client
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            process.wait(60)
            # Ray's processes end after the one that started them.
            psutil.wait_procs(children, 30)


@pytest.fixture(scope="module")
def short_folder():
    """An empty folder with a short name, below which Ray can create sockets."""
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server(small_engine, short_folder):
    """A server with one replica, and a client with its token."""
    options = ("--cpus-per-replica", "1", "--max-bytes", "30000000", "--backend", "onnxruntime")
    # As read from a file, with its line break.
    environment = {"SAMEKIT_TOKEN": "secret\n", "TMPDIR": str(short_folder)}
    with served(small_engine, short_folder / "log", *options, **environment) as (process, client):
        client.headers["authorization"] = "Bearer secret"
        yield process, client


def workers(process, name):
    """Return Ray's processes of a class."""
    return [each for each in psutil.Process(process.pid).children(recursive=True) if name in each.name()]


def test_round_trip_through_ray_serve(server, model, tmp_path):
    _, client = server
    data = audio_file(10 * RATE)
    expected, metadata = encoded(model, tmp_path, data)
    answer = client.post("/v1/encode", content=data)
    assert answer.content == expected
    model.decode_file(tmp_path / "clip.npy", tmp_path / "out.wav")
    back = client.post("/v1/decode", params={"samples": metadata["samples"]}, content=answer.content)
    assert back.content == (tmp_path / "out.wav").read_bytes()


def test_many_clients_at_once(server, model, tmp_path):
    _, client = server
    clips = [audio_file(RATE // (1 + index % 3), seed=index) for index in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda clip: client.post("/v1/encode", content=clip), clips))
    for clip, answer in zip(clips, answers, strict=True):
        assert answer.content == encoded(model, tmp_path, clip)[0]


def test_bodies_are_bounded_by_ray_serve_too(server):
    process, client = server
    (proxy,) = workers(process, "ProxyActor")
    before = proxy.memory_info().rss
    refused(client.post("/v1/encode", content=(bytes(2**20) for _ in range(100))), 413)
    refused(client.post("/v1/encode", content=bytes(31_000_000)), 413)
    assert proxy.memory_info().rss - before < 50e6


def test_broken_requests_leave_the_server_alone(server):
    _, client = server
    address = (client.base_url.host, client.base_url.port)
    begin = b"POST /v1/encode HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
    plain = {"x-request-id": b"\xff", "serve-multiplexed-model-id": b"\xff", "x-session-id": b"\xff"}
    assert client.get("/healthz", headers=plain).status_code == 200
    for text in (
        b"\x16\x03\x01\x02\x00",
        begin + b"Content-Length: -1\r\n\r\n",
        begin + b"Content-Length: 99999999999999999999\r\n\r\n",
        begin + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        begin + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    ):
        # The server may close the connection before it has read everything.
        with socket.create_connection(address, 30) as connection, suppress(ConnectionError):
            connection.sendall(text)
            answer = connection.recv(2**16)
            assert answer[9:12] in (b"400", b"413", b"431"), text[:80]
    with socket.create_connection(address, 30) as connection:
        connection.sendall(begin + b"Content-Length: 1000\r\n\r\nbegun")
    assert client.post("/v1/encode", content=audio_file()).status_code == 200


def test_less_usual_clients_of_ray_serve(server):
    _, client = server
    address = (client.base_url.host, client.base_url.port)
    clip = audio_file()
    begin = b"POST /v1/encode HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
    length = b"Content-Length: %d\r\n" % len(clip)
    with socket.create_connection(address, 30) as connection:
        connection.sendall(begin + length + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(2**16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(clip)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
    # A client that sends no more closes its side of the connection; the server takes it as gone.
    with socket.create_connection(address, 30) as connection:
        connection.sendall(begin + b"Content-Length: 1000\r\n\r\nbegun")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(2**16) == b""
    # The answer is complete although the connection is closed and most of the body was not sent when it was made.
    with socket.create_connection(address, 30) as connection:
        connection.sendall(begin + b"Connection: close\r\nContent-Length: 40000000\r\n\r\n")
        for _ in range(40):
            connection.sendall(bytes(1_000_000))
            time.sleep(0.005)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"longer than 30000000 bytes" in answer
    for method, path in (
        ("HEAD", "/healthz"),
        ("HEAD", "/v1/encode"),
        ("OPTIONS", "/v1/encode"),
        ("TRACE", "/v1/encode"),
    ):
        answer = client.request(method, path)
        assert (answer.status_code, "allow" in answer.headers) == (405, True)
        assert method == "HEAD" or answer.json() == {"error": "Method Not Allowed"}
    assert client.post("/v1/encode", content=clip, headers={"content-type": "audio/flac"}).status_code == 200
    with socket.create_connection(address, 30) as connection:
        connection.sendall(begin + b"Authorization: Bearer secret\r\nContent-Length: 0\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 401 ")


def test_metrics_of_ray_serve(server):
    _, client = server
    assert client.post("/v1/encode", content=audio_file(2 * RATE)).status_code == 200
    refused(client.post("/v1/encode", content=b"no audio"), 422)
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['samekit_requests_total{route="/v1/encode",status="200"}']) >= 1
    assert float(values['samekit_requests_total{route="/v1/encode",status="422"}']) >= 1
    assert float(values['samekit_audio_seconds_total{direction="encode"}']) >= 2
    assert float(values['samekit_batch_windows_count{direction="encoder"}']) >= 1
    assert float(values['samekit_request_seconds_count{route="/v1/encode"}']) >= 2
    assert float(values["samekit_requests_in_work"]) == 1


def test_replica_that_is_killed(server, model, tmp_path, faults):
    process, client = server
    clip = audio_file(20 * RATE)
    expected, _ = encoded(model, tmp_path, clip)
    stop, answers = threading.Event(), []

    def slowly():
        for begin in range(0, len(clip), 2**17):
            yield clip[begin : begin + 2**17]
            time.sleep(0.02)

    def load(slow):
        while not stop.is_set():
            answers.append(client.post("/v1/encode", content=slowly() if slow else clip))

    with ThreadPoolExecutor(4) as pool:
        # Some clients wait for their answer and some still send when the replica dies.
        work = [pool.submit(load, index % 2) for index in range(4)]
        time.sleep(0.5)
        (killed,) = workers(process, "ServeReplica")
        killed.kill()
        faults["replicas killed"] += 1
        begin, count = time.monotonic(), len(answers)
        while not any(answer.status_code == 200 for answer in answers[count + 4 :]):
            assert time.monotonic() - begin < 60
            time.sleep(0.1)
        stop.set()
    for done in work:
        done.result()
    for answer in answers:
        if answer.status_code == 200:
            assert answer.content == expected
        else:
            refused(answer, 503)
            assert answer.headers["retry-after"] == "1"
    # The gauge of the killed replica is gone.
    assert "samekit_requests_in_work 1.0" in client.get("/metrics").text


def test_sigterm_completes_what_is_in_work(server, small_engine, model, tmp_path, short_folder, faults):
    """It ends the server, so it is the last test with this server."""
    process, client = server
    clip = audio_file(60 * RATE)
    expected, _ = encoded(model, tmp_path, clip)
    (folder,) = short_folder.glob("samekit-serve-*")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/encode", content=clip)
        while not any(each.name.partition("-")[0].isdecimal() for each in folder.iterdir()):
            assert not answer.done()
        process.terminate()
        faults["servers stopped"] += 1
        assert answer.result().content == expected
    assert process.wait(60) == 143
    assert not folder.exists()
    lines = (short_folder / "log").read_text().splitlines()
    # Ray adds its own lines if a test before this one killed a replica.
    assert f"samekit serves {small_engine} on {client.base_url}" in lines
    assert lines[-1] == "stopped"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "missing"),
        (["ENGINE", "--port", "TAKEN"], "cannot be used"),
        (["ENGINE", "--backend", "x"], "backend"),
        (["ENGINE", "--gpus-per-replica", "0.5", "--replicas", "99"], "99 replicas"),
        (["ENGINE", "--cpus-per-replica", "999"], "cores"),
        (["ENGINE"], "SAMEKIT_TOKEN is blank"),
    ],
)
def test_server_that_cannot_start(small_engine, monkeypatch, arguments, words):
    if "blank" in words:
        monkeypatch.setenv("SAMEKIT_TOKEN", " ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        real = {"ENGINE": str(small_engine), "TAKEN": str(taken.getsockname()[1])}
        done = CliRunner().invoke(main, ["serve", *(real.get(each, each) for each in arguments)])
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert words in line


def test_application_for_configurations(small_engine):
    """`serve run` passes arguments as text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve import Application

    assert isinstance(app({"model": str(small_engine), "max_queue": "5", "gpus_per_replica": "0.5"}), Application)
    with pytest.raises(ValueError, match="max_queues"):
        app({"model": str(small_engine), "max_queues": "5"})
