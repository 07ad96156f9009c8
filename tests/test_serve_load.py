"""`samekit serve` under load, with replicas that are killed and with hostile clients: short runs of the benchmark."""

from __future__ import annotations

import io
import json
import signal
import tempfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import noise
from hostile_requests import Hostile, Request, judged
from load_clips import outcome_of
from load_server import Server
from serve_load import main

GIVEN = {"equal", "429", "503"}
"""What a client may get: the library's answer, or an announced refusal."""


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_checks_of_the_benchmark_find_faults(tmp_path):
    latents = noise((4, 6))
    right = npy(latents)
    answers = {
        "equal": httpx.Response(200, content=right),
        "close": httpx.Response(200, content=npy(latents * np.float32(1 + 1e-6))),
        "wrong": httpx.Response(200, content=npy(latents * np.float32(1.01))),
        "503": httpx.Response(503, json={"error": "busy; try again later"}),
        "503 without a line of error": httpx.Response(503, text="unavailable"),
        "status 500: oh": httpx.Response(500, text="oh"),
    }
    assert [outcome_of("encode", answer, right) for answer in answers.values()] == list(answers)
    for changed in (right[:-4], npy(latents[:, :5]), b""):
        assert outcome_of("encode", httpx.Response(200, content=changed), right) == "wrong"
    hostile = Hostile(4, "127.0.0.1:9", tmp_path / "canary")
    requests = [hostile.request(number) for number in range(300)]
    assert len({request.kind for request in requests}) == 13
    assert requests[7] == hostile.request(7)
    valid, line = Request("x", [b""]), json.dumps({"error": "cause; cure"}).encode()
    assert judged(valid, b"HTTP/1.1 422 no\r\n\r\n" + line).fault is None
    for bad in (b"", b"HTTP/1.1 500 no\r\n\r\n" + line, b"HTTP/1.1 422 no\r\n\r\ntext", b"HTTP/1.1 302 no\r\n\r\n"):
        assert judged(valid, bad).fault


def load(engine, *arguments):
    """Run the benchmark; return its results, after what holds for every run has been checked."""
    options = ["--clip-seconds", 1, "--bare-seconds", 0, *arguments]
    done = CliRunner().invoke(main, [str(engine), *map(str, options)])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert results["faults"] == {}
    assert set(results["outcomes"]) <= GIVEN
    assert results["outcomes"]["equal"] >= 10
    assert results["first_answer"]["outcome"] == "equal"
    assert results["crashed_replicas"] == 0
    assert results["left_files"] == []
    # A new replica opens new files for its counters.
    assert results["new_files"] == [] or results["killed"]
    # The exit code of a command that SIGTERM stopped.
    assert results["stop"]["exit_code"] == 128 + signal.SIGTERM
    assert results["stop"]["left_processes"] == []
    return results


@pytest.mark.slow
@pytest.mark.parametrize("task", ["encode", "decode"])
def test_more_clients_than_the_queue_holds(small_engine, task):
    results = load(small_engine, "--task", task, "--clients", 16, "--seconds", 20, "--serve", "--max-queue 8")
    assert results["outcomes"]["429"] > 0
    for early, late in (results["memory"][name] for name in ("replica_mib", "descriptors")):
        assert late < 1.2 * early + 20


@pytest.mark.slow
def test_replicas_that_are_killed(small_engine, faults):
    options = ["--clients", 4, "--seconds", 40, "--kill-every", 12, "--serve", "--replicas 2 --cpus-per-replica 1"]
    results = load(small_engine, *options)
    killed = sum(results["killed"].values())
    assert killed >= 2
    assert results["replicas"] == [2, 2]
    faults["replicas killed"] += killed


@pytest.mark.slow
def test_server_ends_if_ray_dies(small_engine, faults):
    """A supervisor can then start it again."""
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as folder:
        server = Server(small_engine, Path(folder))
        try:
            (raylet,) = [process for process in server.processes() if process.name() == "raylet"]
            raylet.kill()
            faults["Rays killed"] += 1
            assert server.process.wait(180) == 2
        finally:
            server.stop()
        assert server.temporary_files() == []
        assert "Ray's process on this machine died; start it again" in server.log.read_text().splitlines()[-1]


@pytest.mark.slow
def test_hostile_requests(small_engine, inputs):
    results = load(small_engine, "--clients", 2, "--seconds", 5, "--hostile", 500)
    assert sum(results["hostile"].values()) == 500
    assert results["opened_addresses"] == 0
    assert not results["unpickled"]
    early, late = results["memory"]["replica_mib"]
    assert late < early + 50
    inputs["hostile requests"] += 500
