"""Pre-encoding on a Ray cluster and to URLs: the output equals that of one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import fsspec
import psutil
import pytest
import torch
from faults import KILLED, contents, dying_at, kill_this_process, mounted, remount
from helpers import assert_one_line
from test_dataset import command, encoded_lines, run, write_bad_clips, write_clip, write_clips

from samekit import AutoencoderModel
from samekit.dataset.calls import Calls, batches_of
from samekit.dataset.check import verify
from samekit.dataset.options import PreEncodeOptions, Shard
from samekit.dataset.output import GroupLimits, UrlOutput
from samekit.dataset.pipeline import Task
from samekit.dataset.ray import RayExecutor, RayOptions
from samekit.dataset.run import pre_encode
from samekit.dataset.sources import Source
from samekit.dataset.worker import Worker
from samekit.errors import EngineNotFoundError, InputError, OutputError

SECONDS = 44_100
# For processes that import the tests' own modules.
WITH_TESTS = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


@pytest.fixture(scope="module")
def cluster():
    """Start one cluster of two cores for all tests of this file, and return its address.

    It must not outlive them: Ray ends the process that started a cluster when the cluster stops answering.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would store its token in the home folder, which differs between tests.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with patch.context() as starting:
            starting.setenv("PYTHONPATH", WITH_TESTS)
            ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture
def engine(engine_of):
    return engine_of("tiny-s").folder


@pytest.fixture
def model(engine):
    """A model in this process, with as many threads as an actor."""
    return AutoencoderModel.from_pretrained(engine, "cpu", backend="onnxruntime", threads=1)


@pytest.fixture
def encoder(cluster, engine):
    """An executor with two actors."""
    del cluster
    with RayExecutor(engine, device="cpu", backend="onnxruntime") as encoder:
        yield encoder


@pytest.fixture(scope="module")
def work(engine_of, tmp_path_factory):
    """A dataset that takes seconds to encode, and the output of one process."""
    data = write_clips(tmp_path_factory.mktemp("work"), 48, samples=5 * SECONDS)
    out = tmp_path_factory.mktemp("alone")
    run(data, out, AutoencoderModel.from_pretrained(engine_of("tiny-s").folder, "cpu", threads=1))
    return data, contents(out)


def workers():
    """Return the processes of the actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        # Others of Ray's processes may end at any moment.
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::Worker"):
                found.append(process)
    return found


def mixed_clips(folder):
    """Write clips with different rates, channels and lengths, and some that cannot be encoded."""
    for index in range(24):
        suffix, rate = (("wav", 44_100), ("flac", 48_000), ("ogg", 22_050))[index % 3]
        write_clip(folder / str(index % 2) / f"{index:02d}.{suffix}", 3000 + 20_000 * index, rate=rate, seed=index)
    write_bad_clips(folder)


# --- On a cluster -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pad": True, "sample_size": 30 * 4096, "float16": True},
        {"layout": "mirror", "target_latent_rms": 0.9, "flip": "random"},
    ],
    ids=["plain", "pad", "mirror"],
)
def test_folder_is_that_of_one_process(encoder, model, data, out, options):
    mixed_clips(data)
    seen = []
    report = pre_encode(encoder, data, out, PreEncodeOptions(**options), seen.append)
    alone = out.with_name("alone")
    expected = run(data, alone, model, **options)
    assert contents(out) == contents(alone)
    assert verify(out) == []
    assert report.statuses == expected.statuses == {"encoded": 24, "no_caption": 1, "silent": 1, "unreadable": 1}
    assert report.bad == expected.bad
    assert [(progress.done, progress.total) for progress in seen] == [(done, 27) for done in range(1, 28)]
    assert seen[-1].audio_seconds == pytest.approx(report.audio_seconds, abs=1e-3)
    again = pre_encode(encoder, data, out, PreEncodeOptions(**options))
    assert (again.encoded, again.unchanged) == (0, 26)
    assert contents(out) == contents(alone)


def test_actors_that_read_in_processes(encoder, model, data, out):
    mixed_clips(data)
    assert pre_encode(encoder, data, out, PreEncodeOptions(reader_processes=True)).encoded == 24
    alone = out.with_name("alone")
    run(data, alone, model, reader_processes=False)
    assert contents(out) == contents(alone)


def test_batches_of_windows_give_the_same_latents(encoder, model, data, out):
    mixed_clips(data)
    assert pre_encode(encoder, data, out, PreEncodeOptions(batch_size=4)).encoded == 24
    alone = out.with_name("alone")
    run(data, alone, model, batch_size=4)
    assert contents(out).keys() == contents(alone).keys()
    assert verify(out) == []


def test_killed_worker_loses_nothing(encoder, work, out, faults):
    data, alone = work
    killed, seen = [], []

    def kill(progress):
        seen.append(progress.done)
        if progress.done in (8, 24):
            victim = workers()[0]
            victim.kill()
            killed.append(victim.pid)

    report = pre_encode(encoder, data, out, progress=kill)
    assert len(set(killed)) == 2
    faults["actors killed"] += 2
    assert seen == list(range(1, 49))
    assert report.statuses == {"encoded": 48}
    assert contents(out) == alone


def test_clip_with_which_actors_die_is_one_bad_clip(cluster, engine, data, out, monkeypatch, faults):
    del cluster
    write_clips(data, 20)

    class Dying(Worker):
        def encode(self, facts, job, tasks):
            if any(task.source.relpath == "clip00007.wav" for task in tasks):
                kill_this_process()
            return super().encode(facts, job, tasks)

    monkeypatch.setattr("samekit.dataset.ray.Worker", Dying)
    with RayExecutor(engine, device="cpu", backend="onnxruntime") as encoder:
        report = pre_encode(encoder, data, out)
    faults["actors killed"] += 3
    assert report.statuses == {"encoded": 19, "failed": 1}
    (bad,) = report.bad
    assert bad["reason"].startswith(f"{data}/clip00007.wav: 3 workers died while they encoded it (")
    assert sum(report.workers.values()) == 19


def test_killed_driver_is_followed_by_another(cluster, engine, work, out, faults):
    data, alone = work
    arguments = ["--model", engine, "--backend", "onnxruntime", "--device", "cpu", "--data_dir", data]
    program = [sys.executable, "-c", "from samekit.cli.main import main; main()", "pre-encode", *arguments]
    driver = subprocess.Popen(
        [*program, "--output_path", out, "--ray", cluster], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while encoded_lines(out) < 8:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == KILLED
    faults["processes killed"] += 1
    result = command(*arguments, "--output_path", out, "--ray", cluster, "--json")
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout)
    assert last["statuses"] == {"encoded": 48}
    assert 8 <= last["unchanged"] < 48
    assert contents(out) == alone


def test_error_of_a_worker_is_raised_here(encoder, data, out, monkeypatch, tmp_path):
    """Relative paths start at the working folder in which the actors were started."""
    monkeypatch.chdir(tmp_path)
    write_clips(data, 3)
    with pytest.raises(InputError, match="data/: does not exist on ") as error:
        pre_encode(encoder, "data", out)
    assert_one_line(error.value)
    with pytest.raises(InputError, match="out: does not exist here") as error:
        pre_encode(encoder, data, "out")
    assert_one_line(error.value)
    assert pre_encode(encoder, data, out).encoded == 3


# A cluster of two nodes with one core each. One node is removed during the run.
LOST_NODE = """
import sys
import ray
from ray.cluster_utils import Cluster
from samekit.dataset.run import pre_encode
from samekit.dataset.ray import RayExecutor, RayOptions

node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, connect=True, head_node_args={**node, "include_dashboard": False})
second = cluster.add_node(**node)
cluster.wait_for_nodes()
gone = []

def lose(progress):
    if progress.done >= 16 and not gone:
        gone.append(second)
        cluster.remove_node(second, allow_graceful=False)

with RayExecutor(sys.argv[1], RayOptions(actors=2), device="cpu", backend="onnxruntime") as encoder:
    report = pre_encode(encoder, sys.argv[2], sys.argv[3], progress=lose)
assert gone
assert report.statuses == {"encoded": 48}
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_lost_node_holds_nothing_up(engine, work, out, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    data, alone = work
    subprocess.run([sys.executable, "-c", LOST_NODE, engine, data, out], check=True, timeout=120)
    assert contents(out) == alone


# --- Killed while they write, and disks that take nothing ----------------------------------------------------

# A command that dies before a given step. Steps of Ray itself are counted too.
DYING = """
import sys
from faults import dying_at
from samekit.cli.main import main
dying_at(int(sys.argv[1]), lambda: main(sys.argv[2:], standalone_mode=False))()
"""


def dying_driver(step, arguments):
    """Run a command that dies before a step of its writing, and return its exit code."""
    program = [sys.executable, "-c", DYING, str(step), *map(str, arguments)]
    environment, nowhere = os.environ | {"PYTHONPATH": WITH_TESTS}, subprocess.DEVNULL
    return subprocess.run(program, env=environment, stdout=nowhere, stderr=nowhere, check=False).returncode


def finished_pairs(out):
    """Return the finished files of an output, without manifest, report and lock."""
    return {name: data for name, data in contents(out).items() if not name.startswith(".")}


def wait_for_orphans(before):
    """Wait until the actors of a killed driver have ended."""
    deadline = time.monotonic() + 60
    while {process.pid for process in workers()} - before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)], ids=["some steps", "every step"])
def test_driver_killed_at_a_step(cluster, engine, model, data, out, stride, faults):
    """The next run completes the output. The actors live a little longer than the driver."""
    write_clips(data, 3)
    alone, kills = out.with_name("alone"), 0
    run(data, alone, model)
    expected, others = contents(alone), {process.pid for process in workers()}
    arguments = ["pre-encode", "--model", engine, "--backend", "onnxruntime", "--device", "cpu", "--data_dir", data]
    for step in range(1, 400, stride):
        ended = dying_driver(step, [*arguments, "--output_path", out, "--ray", cluster])
        assert ended in (0, KILLED), step
        if ended == 0:
            break
        kills += 1
        if out.exists():
            pairs = finished_pairs(out)
            assert pairs.items() <= expected.items(), step
            run(data, out, model)
        wait_for_orphans(others)
        run(data, out, model)
        assert contents(out) == expected, step
        shutil.rmtree(out)
    faults["processes killed"] += kills
    assert kills * stride >= 25
    assert contents(out) == expected


@pytest.mark.parametrize("clips", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_actor_killed_at_every_step(cluster, engine, model, data, out, tmp_path, monkeypatch, clips, faults):
    """Each actor dies one step of its writing later than the previous one, until one completes its batch."""
    del cluster
    write_clips(data, clips)
    alone, deaths = out.with_name("alone"), tmp_path / "deaths"
    run(data, alone, model)
    expected = finished_pairs(alone)
    deaths.mkdir()

    class Dying(Worker):
        def encode(self, facts, job, tasks):
            def die(*_arguments, **_options):
                (deaths / str(step)).mkdir()
                kill_this_process()

            step = len(list(deaths.iterdir())) + 1
            answers = []
            dying_at(step, lambda: answers.append(super(Dying, self).encode(facts, job, tasks)), die=die)()
            return answers[0]

    def look(calls, actor, batch, error):
        seen.append(dict(finished_pairs(out)))
        return failed(calls, actor, batch, error)

    seen, failed = [], Calls._failed
    monkeypatch.setattr("samekit.dataset.ray.Worker", Dying)
    monkeypatch.setattr("samekit.dataset.calls._DEATHS", 10**6)
    monkeypatch.setattr(Calls, "_failed", look)
    with RayExecutor(engine, RayOptions(actors=1), device="cpu", backend="onnxruntime") as encoder:
        report = pre_encode(encoder, data, out)
    assert report.statuses == {"encoded": clips}
    assert contents(out) == contents(alone)
    assert all(pairs.items() <= expected.items() for pairs in seen)
    assert len(seen) == len(list(deaths.iterdir())) >= 10 * clips
    faults["actors killed"] += len(seen)


@pytest.mark.parametrize("scheme", ["", "local://"], ids=["folder", "URL"])
def test_disk_that_becomes_full(encoder, model, data, tmp_path, scheme, faults):
    """The disk becomes full during the run, when only the actors write large files."""
    write_clips(data, 30, samples=10_000)
    alone = tmp_path / "alone"
    run(data, alone, model)
    # The whole output takes 640 KiB, so the actors fill this disk however fast they are.
    with mounted(tmp_path / "disk", "-o", "size=400k") as disk:
        out = disk / "out"
        with pytest.raises(OutputError, match="No space left") as error:
            pre_encode(encoder, data, f"{scheme}{out}")
        faults["disks full"] += 1
        assert_one_line(error.value)
        assert str(out) in str(error.value)
        assert finished_pairs(out).items() <= contents(alone).items()
        assert not list(disk.rglob(".*.tmp"))
        remount(disk, "size=20m")
        assert pre_encode(encoder, data, f"{scheme}{out}").clips == 30
        found = contents(out)
        assert found == (contents if not scheme else without_locks)(alone)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_nobody_writes_after_an_error(cluster, engine, data, out, monkeypatch, error):
    """The actors must not write after the run has ended, because another run may write to the same output."""
    del cluster
    write_clips(data, 40)

    class Slow(Worker):
        def encode(self, facts, job, tasks):
            time.sleep(0.5)
            return super().encode(facts, job, tasks)

    def stop(_progress):
        raise error

    monkeypatch.setattr("samekit.dataset.ray.Worker", Slow)
    with RayExecutor(engine, device="cpu", backend="onnxruntime") as encoder:
        with pytest.raises(error):
            pre_encode(encoder, data, out, progress=stop)
        found = contents(out)
        time.sleep(2)
        assert contents(out) == found
        # The encoder can be used again.
        assert pre_encode(encoder, data, out).statuses == {"encoded": 40}


def test_disk_that_is_read_only(encoder, data, tmp_path, faults):
    write_clips(data, 1)
    with mounted(tmp_path / "disk") as disk:
        remount(disk, "ro")
        for target in (disk, disk / "new", f"local://{disk}/new"):
            with pytest.raises(OutputError, match="Read-only file system") as error:
                pre_encode(encoder, data, target)
            faults["disks read-only"] += 1
            assert_one_line(error.value)


def test_two_of_everything(encoder, model, data, out):
    """While a cluster writes to a folder, other runs are refused."""
    write_clips(data, 20)
    refusals = []

    def meddle(progress):
        if progress.done == 1:
            with pytest.raises(OutputError, match=f"process {os.getpid()} is writing there") as error:
                run(data, out, model)
            refusals.append(error.value)

    assert pre_encode(encoder, data, out, progress=meddle).encoded == 20
    (refusal,) = refusals
    assert_one_line(refusal)
    assert verify(out) == []


# --- What cannot work ---------------------------------------------------------------------------------------


def refused(*arguments):
    """Run a command that must be refused, and return its error message of one line."""
    result = command(*arguments)
    # The start of Ray takes so long that it is announced.
    lines = [line for line in result.stderr.splitlines() if not line.startswith("joining or starting a Ray cluster")]
    assert (result.exit_code, len(lines)) == (2, 1), result.output
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--ray", "127.0.0.1:1"], "no Ray cluster answers"),
        (["--ray", "nowhere.invalid:6379"], "no Ray cluster answers"),
        (["--ray", "localhost"], "names no port"),
        (["--ray", "localhost:65536"], "names no port"),
        (["--ray", "localhost:\u00b2"], "names no port"),
        (["--ray", "local", "--shard", "1/2"], "pass one of them"),
        (["--actors", "2", "--cpus-per-actor", "1"], "--actors --cpus-per-actor"),
        (["--ray", "local", "--gpus-per-actor", "1.5"], "a share of one GPU"),
        (["--ray", "local", "--cpus-per-actor", "0"], "0 is not in the range"),
    ],
    ids=str,
)
def test_options_of_a_cluster_that_cannot_be(data, out, monkeypatch, arguments, reason):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    write_clips(data, 1)
    start = time.monotonic()
    result = command("--model", "x", "--data_dir", data, "--output_path", out, *arguments)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - start < 15
    assert not out.exists()


@contextmanager
def listening(serve):
    """Start a server and yield its port. It listens at all addresses, because Ray's clients use the external one."""
    with ExitStack() as open_sockets:
        server = open_sockets.enter_context(socket.create_server(("0.0.0.0", 0)))

        def serve_all():
            with suppress(OSError):
                while True:
                    connection = open_sockets.enter_context(server.accept()[0])
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        accepting = threading.Thread(target=serve_all)
        accepting.start()
        yield server.getsockname()[1]
        # This ends `accept` in the thread.
        server.shutdown(socket.SHUT_RDWR)
        accepting.join()


def test_what_listens_at_a_port_is_for_ray_to_find_out(data, out, monkeypatch):
    """Only Ray's client can tell a cluster, because a busy one answers late. It must try only once."""
    asked, tries = [], "RAY_gcs_server_port_wait_time_s"

    def init(*_, address, **_options):
        asked.append((address, os.environ[tries]))
        raise ConnectionError(f"Failed to connect to\nRay cluster at {address}")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    write_clips(data, 1)
    with listening(lambda _connection: None) as port:
        line = refused("--model", "x", "--data_dir", data, "--output_path", out, "--ray", f"127.0.0.1:{port}")
    assert asked == [(f"127.0.0.1:{port}", "1")]
    assert tries not in os.environ
    assert f"127.0.0.1:{port}: no Ray cluster answers (Failed to connect to Ray cluster at 127.0.0.1:{port}); " in line


def driver(data, out, address):
    """Start a command in a new process that is not connected to a cluster."""
    program = [sys.executable, "-c", "from samekit.cli.main import main; main()", "pre-encode", "--model", "absent"]
    program += ["--backend", "onnxruntime", "--data_dir", data, "--output_path", out, "--ray", address]
    return subprocess.Popen(program, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_ports_of_others_are_refused_in_bounded_time(data, out):
    """Without a limit, Ray tries 20 times, which takes 15 minutes."""
    import grpc

    write_clips(data, 1)

    def answer(connection):
        with suppress(OSError):
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

    grpc_server = grpc.server(ThreadPoolExecutor(1))
    grpc_port = grpc_server.add_insecure_port("0.0.0.0:0")
    grpc_server.start()
    start = time.monotonic()
    with ExitStack() as stack:
        kinds = (answer, socket.socket.close, lambda _connection: None)
        ports = [grpc_port, *(stack.enter_context(listening(serve)) for serve in kinds)]
        for process in [driver(data, out, f"127.0.0.1:{port}") for port in ports]:
            _, shown = process.communicate(timeout=120)
            assert process.returncode == 2, shown
            assert "no Ray cluster answers (" in shown.splitlines()[-1]
            assert "Traceback" not in shown
    assert time.monotonic() - start < 90
    grpc_server.stop(None).wait()
    assert not out.exists()


@pytest.mark.slow
def test_cluster_that_answers_late_is_joined(cluster, data, out):
    """The answers of the cluster are delayed by 14 s, as on a busy machine."""
    write_clips(data, 1)
    host, port = cluster.rsplit(":", 1)
    first = []

    def forward(source, target):
        with suppress(OSError):
            while content := source.recv(2**16):
                target.sendall(content)

    def serve(connection):
        first.append(time.monotonic())
        with socket.create_connection((host, int(port))) as cluster_side:
            threading.Thread(target=forward, args=(connection, cluster_side), daemon=True).start()
            time.sleep(max(0, first[0] + 14 - time.monotonic()))
            forward(cluster_side, connection)

    with listening(serve) as port_of_proxy:
        process = driver(data, out, f"127.0.0.1:{port_of_proxy}")
        _, shown = process.communicate(timeout=120)
    # This error comes from an actor, so the cluster was joined.
    assert "no engine for 'absent'" in shown.splitlines()[-1]
    assert process.returncode == 2


def test_without_ray_the_command_says_what_to_install(data, out, monkeypatch):
    write_clips(data, 1)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "samekit[ray]" in refused("--model", "x", "--data_dir", data, "--output_path", out, "--ray", "local")


def test_cluster_that_does_not_start_is_told_in_one_line(data, out, monkeypatch):
    """This happens on a machine that is too busy."""

    def init(*_, **options):
        raise ConnectionError("nobody") if options["address"] == "auto" else Exception("The node\ntimed out.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    write_clips(data, 1)
    line = refused("--model", "x", "--data_dir", data, "--output_path", out, "--ray")
    assert "Ray does not start here (timed out.)" in line


def test_missing_engine_is_told_by_the_worker(cluster, data, out):
    del cluster
    write_clips(data, 1)
    with (
        pytest.raises(EngineNotFoundError, match="no engine for 'absent'") as error,
        RayExecutor("absent", backend="onnxruntime"),
    ):
        pass
    assert_one_line(error.value)
    options = ["--backend", "onnxruntime", "--data_dir", data, "--output_path", out]
    assert "no engine for" in refused("--model", "absent", *options, "--ray", "local")


def test_cluster_without_room_is_not_waited_for_for_ever(cluster, engine, monkeypatch):
    del cluster
    monkeypatch.setattr("samekit.dataset.ray._PLACE_SECONDS", 0.5)
    with (
        pytest.raises(InputError, match="no room for an actor of 64 cores") as error,
        RayExecutor(engine, RayOptions(cpus_per_actor=64)),
    ):
        pass
    assert_one_line(error.value)


@pytest.mark.parametrize(
    "options", [{"actors": 0}, {"cpus_per_actor": 0}, {"gpus_per_actor": -1}, {"gpus_per_actor": "1"}]
)
def test_options_are_checked(options):
    with pytest.raises(InputError, match="pass a ") as error:
        RayOptions(**options)
    assert_one_line(error.value)


@pytest.mark.parametrize(
    ("options", "resources", "actors"),
    [
        ({}, {"CPU": 7.0}, 7),
        ({"cpus_per_actor": 4}, {"CPU": 7.0}, 1),
        ({"gpus_per_actor": 1}, {"CPU": 64.0, "GPU": 8.0}, 8),
        ({"gpus_per_actor": 0.5, "cpus_per_actor": 4}, {"CPU": 64.0, "GPU": 8.0}, 16),
        ({"gpus_per_actor": 1}, {"CPU": 64.0}, 0),
        # Not 9, which is the quotient of the floating-point numbers.
        ({"gpus_per_actor": 0.1}, {"CPU": 64.0, "GPU": 1.0}, 10),
        # The parts of an actor are on one GPU.
        ({"gpus_per_actor": 0.6}, {"CPU": 64.0, "GPU": 8.0}, 8),
    ],
)
def test_actors_that_fit(options, resources, actors):
    assert RayOptions(**options).fitting(resources) == actors


def test_actors_without_a_gpu_run_on_the_cpu():
    """Ray does not hide GPUs from them, so otherwise all of them would use the first GPU."""

    def device(options, **backend):
        return RayExecutor("same-s", options, **backend)._backend["device"]

    assert device(None) == device(RayOptions(), device=None) == "cpu"
    assert device(RayOptions(gpus_per_actor=1)) is device(RayOptions(gpus_per_actor=0.25), device=None) is None
    assert device(RayOptions(gpus_per_actor=1), device="cuda") == "cuda"
    for asked in ({"device": "cuda"}, {"device": torch.device("cuda:1")}, {"backend": "tensorrt"}):
        with pytest.raises(InputError, match="actors get no GPU; pass --gpus-per-actor 1") as caught:
            device(RayOptions(), **asked)
        assert_one_line(caught.value)


def test_batches_are_cut_by_number_and_by_size():
    sizes = [100] * 9 + [2**26, 100, 2**24, 2**24, 100]
    tasks = [Task(Source("x", "x", (size, 0)), f"{index}.npy") for index, size in enumerate(sizes)]
    lengths = [len(batch.tasks) for batch in batches_of(tasks, 1)]
    assert lengths == [8, 2, 3, 1]
    assert [task for batch in batches_of(tasks, 3) for task in batch.tasks] == tasks


# --- Other places -------------------------------------------------------------------------------------------


@pytest.fixture
def bucket():
    """An empty file system in memory; return a function that returns its files by name."""
    store = fsspec.filesystem("memory")
    store.store.clear()

    def held():
        return {name.removeprefix("/bucket/out/"): store.cat_file(name) for name in store.find("/bucket/out")}

    yield held
    store.store.clear()


URL = "memory://bucket/out"


def without_locks(folder):
    return {name: data for name, data in contents(folder).items() if not name.endswith(".lock")}


def test_url_holds_what_a_folder_holds(model, data, out, bucket):
    mixed_clips(data)
    report = run(data, URL, model, pad=True, sample_size=20 * 4096)
    run(data, out, model, pad=True, sample_size=20 * 4096)
    assert bucket() == without_locks(out)
    assert report.folder == URL
    assert run(data, URL, model, pad=True, sample_size=20 * 4096).encoded == 0
    (data / "0" / "00.txt").unlink()
    write_clips(data, 2)
    for target in (URL, out):
        again = run(data, target, model, pad=True, sample_size=20 * 4096)
        assert (again.encoded, again.statuses["no_caption"]) == (2, 2)
    assert bucket() == without_locks(out)


def test_run_into_a_url_that_was_cut_short_goes_on(model, data, out, bucket, monkeypatch):
    monkeypatch.setattr(UrlOutput, "seconds_between_appends", 0)
    monkeypatch.setattr(UrlOutput, "group_limits", GroupLimits(clips=1))
    write_clips(data, 12)

    def stop(progress):
        if progress.done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pre_encode(model, data, URL, PreEncodeOptions(), stop)
    parts = [name for name in bucket() if name.endswith(".jsonl")]
    assert len(parts) == 8
    report = run(data, URL, model)
    assert (report.encoded, report.unchanged) == (5, 7)
    run(data, out, model)
    assert bucket() == without_locks(out)


def test_url_keeps_the_rules_of_a_folder(model, data, bucket):
    write_clips(data, 3)
    run(data, URL, model)
    before = bucket()
    with pytest.raises(InputError, match=f"{URL}: holds latents of other settings") as error:
        run(data, URL, model, float16=True)
    assert_one_line(error.value)
    assert bucket() == before
    report = run(data, URL, model, float16=True, reencode=True)
    assert (report.encoded, report.unchanged) == (3, 0)
    for name in before:
        if name.startswith(".samekit/"):
            fsspec.filesystem("memory").rm_file(f"/bucket/out/{name}")
    with pytest.raises(InputError, match=rf"{URL}: holds \S+, which no manifest lists"):
        run(data, URL, model)


def test_shards_share_a_url(model, data, bucket):
    write_clips(data, 10)
    reports = [run(data, URL, model, shard=Shard(index, 2)) for index in (1, 2)]
    assert sum(report.encoded for report in reports) == 10
    assert sum(report.unchanged for report in reports) == 0
    assert len([name for name in bucket() if name.startswith("0")]) == 20
    assert {f".samekit/report-{index}-of-2.json" for index in (1, 2)} <= bucket().keys()
    with pytest.raises(InputError, match="was started with --shard I/2"):
        run(data, URL, model)


@pytest.fixture
def requests(monkeypatch, bucket):
    """The calls that change or read files of the bucket: name of the function and of the file, in their order."""
    store, seen = type(fsspec.filesystem("memory")), []

    def recording(name, call):
        def record(self, path, *arguments, **options):
            seen.append((name, path.removeprefix("/bucket/out/")))
            return call(self, path, *arguments, **options)

        return record

    for name in ("pipe_file", "rm_file", "cat_file"):
        monkeypatch.setattr(store, name, recording(name, getattr(store, name)))
    return seen


def test_group_of_clips_is_uploaded_in_two_requests_a_clip(model, data, requests):
    write_clips(data, 6)
    run(data, URL, model, sample_size=40 * 4096)
    names = [f"{number:012d}" for number in range(6)]
    clips = [request for request in requests if "/" not in request[1] and "silence" not in request[1]]
    # Nothing is removed, because the list of files shows that there is no older clip.
    assert sorted(clips[:6]) == [("pipe_file", f"{name}.npy") for name in names]
    assert sorted(clips[6:]) == [("pipe_file", f"{name}.json") for name in names]
    # One part of the manifest, after the files.
    assert ("pipe_file", ".samekit/manifest-000002.jsonl") in requests[requests.index(clips[-1]) :]

    requests.clear()
    for number in (2, 3):
        (data / f"clip{number:05d}.txt").write_text("another caption")
    (data / "clip00005.txt").unlink()
    run(data, URL, model, sample_size=40 * 4096)
    clips = [request for request in requests if "/" not in request[1] and "silence" not in request[1]]
    assert sorted(clips[:2]) == [("rm_file", f"{name}.json") for name in names[2:4]]
    assert sorted(clips[2:4]) == [("pipe_file", f"{name}.npy") for name in names[2:4]]
    assert sorted(clips[4:6]) == [("pipe_file", f"{name}.json") for name in names[2:4]]
    # The clip that lost its caption.
    assert clips[6:] == [("rm_file", f"{names[5]}.json"), ("rm_file", f"{names[5]}.npy")]


def test_silence_is_not_downloaded_to_compare_its_size(model, data, bucket, monkeypatch):
    write_clips(data, 2)
    run(data, URL, model, sample_size=40 * 4096)
    store, fetched = fsspec.filesystem("memory"), {}
    cat, whole = type(store).cat_file, bucket()["silence.npy"]

    def count(self, path, *arguments, **options):
        fetched[path] = cat(self, path, *arguments, **options)
        return fetched[path]

    monkeypatch.setattr(type(store), "cat_file", count)
    for changed, repaired in ((whole, False), (whole + b"x", True), (whole[:-1], True), (b"?" + whole[1:], True)):
        store.pipe_file("/bucket/out/silence.npy", changed)
        fetched.clear()
        run(data, URL, model, sample_size=40 * 4096)
        assert len(fetched.pop("/bucket/out/silence.npy", b"")) <= 128
        assert bucket()["silence.npy"] == whole
        assert (changed != whole) == repaired


def test_files_are_uploaded_at_the_same_time(model, data, bucket, monkeypatch):
    """Four uploads wait for each other, so one after another would never end."""
    write_clips(data, 4)
    together, pipe = threading.Barrier(4, timeout=30), type(fsspec.filesystem("memory")).pipe_file

    def wait(self, path, *arguments, **options):
        if re.search(r"/\d+\.npy$", path):
            together.wait()
        return pipe(self, path, *arguments, **options)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", wait)
    assert run(data, URL, model).encoded == 4
    assert not together.broken


def test_each_thread_has_its_own_connection(data, monkeypatch):
    """Connections such as those of FTP cannot be shared, so fsspec keeps a file system for each thread."""
    users = {}

    class Connection(type(fsspec.filesystem("memory"))):
        protocol = "connection"
        store, pseudo_dirs = {}, [""]

        def pipe_file(self, path, value, **options):
            users.setdefault(id(self), set()).add(threading.get_ident())
            super().pipe_file(path, value, **options)

    fsspec.register_implementation("connection", Connection, clobber=True)
    write_clips(data, 8)
    run(data, "connection://bucket/out")
    assert len(users) > 1
    assert all(len(threads) == 1 for threads in users.values())


def test_of_other_shards_a_run_fetches_the_settings_alone(model, data, bucket, monkeypatch):
    write_clips(data, 8)
    for index in (1, 2):
        run(data, URL, model, shard=Shard(index, 2))
    store, fetched = fsspec.filesystem("memory"), {}
    other = "/bucket/out/.samekit/manifest-2-of-2-000001.jsonl"
    header, _ = bucket()[".samekit/manifest-2-of-2-000001.jsonl"].split(b"\n", 1)
    # Invalid rows cause no error, because they are not read.
    store.pipe_file(other, header + b"\n" + b"no row\n" * 10**5)
    cat = type(store).cat_file

    def count(self, path, *arguments, **options):
        fetched[path] = cat(self, path, *arguments, **options)
        return fetched[path]

    monkeypatch.setattr(type(store), "cat_file", count)
    assert run(data, URL, model, shard=Shard(1, 2)).encoded == 0
    assert len(fetched[other]) <= 2**16


def test_url_of_a_folder_is_a_folder(model, data, out):
    write_clips(data, 3)
    run(data, f"file://{out}", model)
    alone = out.with_name("alone")
    run(data, alone, model)
    assert contents(out) == contents(alone)


def test_workers_write_to_a_url(encoder, model, data, out):
    """The URL begins with `local://`, because all processes can reach the local disk."""
    write_clips(data, 20)
    report = pre_encode(encoder, data, f"local://{out}")
    assert report.encoded == 20
    alone = out.with_name("alone")
    run(data, alone, model)
    assert contents(out) == without_locks(alone)
    assert verify(out) == []


def ended_by(work):
    """Call `work`, and return the error that it raised, or None."""
    try:
        work()
    except (OutputError, KeyboardInterrupt) as error:
        return error
    return None


@pytest.mark.parametrize("error", [RuntimeError("503 Slow Down"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("keeps_halves", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_url_that_fails_at_any_call(data, out, bucket, monkeypatch, error, keeps_halves, begun, faults):
    """After any failed call, all files are complete. The next run adds the missing ones.

    Object stores keep nothing of a failed upload. Other places may keep half of it.
    """
    monkeypatch.setattr(UrlOutput, "seconds_between_appends", 0)
    write_clips(data, 4)
    store, options = fsspec.filesystem("memory"), {"pad": True, "sample_size": 400}
    if begun:
        # The new clip is sorted before the others, so lost numbers would be noticed.
        run(data, out, **options)
        run(data, URL, **options)
        write_clip(data / "a.wav", 100)
    write_clip(data / "mute.wav", 100, caption=None)
    before = bucket()
    run(data, out, **options)
    expected = without_locks(out)
    calls = [(type(store), name) for name in ("pipe_file", "rm_file", "makedirs", "ls", "cat_file", "info")]
    failed = []

    upload = store.pipe_file

    def fail(_, path, data=None, **_options):
        failed.append(path)
        if keeps_halves and isinstance(data, bytes):
            upload(path, data[: len(data) // 2])
        raise error

    def work():
        run(data, URL, **options)

    for step in range(1, 300):
        store.store.clear()
        store.pipe({f"/bucket/out/{name}": held for name, held in before.items()})
        failed.clear()
        caught = ended_by(dying_at(step, work, calls, fail))
        if not failed:
            break
        if caught is None:
            # A failed upload of a group is repeated, one clip at a time.
            assert bucket() == expected, step
            continue
        # After an interrupt, as after a kill, incomplete uploads are not removed.
        if caught is not error:
            assert_one_line(caught)
            assert re.match(rf"{URL}\S*: cannot be ", str(caught))
            # The file is named, unless the folder cannot be listed or made.
            assert URL + failed[0].removeprefix("/bucket/out") in str(caught) or not os.path.splitext(failed[0])[1]
        if caught is not error or not keeps_halves:
            pairs = {name: held for name, held in bucket().items() if not name.startswith(".")}
            assert pairs.items() <= expected.items(), step
        work()
        assert bucket() == expected, step
    faults["calls of a file system failed"] += step - 1
    assert step > 15


@pytest.mark.parametrize("call", ["ls", "cat_file"])
def test_url_that_cannot_be_read(model, data, bucket, monkeypatch, call):
    write_clips(data, 1)
    run(data, URL, model)
    before = bucket()

    def refuse(*_arguments, **_options):
        raise PermissionError(13, "Forbidden")

    with monkeypatch.context() as patched:
        patched.setattr(type(fsspec.filesystem("memory")), call, refuse)
        with pytest.raises(OutputError, match=rf"^{URL}\S*: cannot be read \(Forbidden\); ") as error:
            run(data, URL, model)
    assert_one_line(error.value)
    assert bucket() == before


def test_url_that_cannot_be_written(model, data, tmp_path):
    write_clips(data, 1)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"^local://.* cannot be written") as error:
        run(data, f"local://{tmp_path}/file/below", model)
    assert_one_line(error.value)


@pytest.mark.parametrize("url", ["foo://bucket/x", "s3://bucket/x"])
def test_url_of_an_unknown_kind_is_refused(engine, data, url, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    write_clips(data, 1)
    assert "install fsspec" in refused("--model", engine, "--data_dir", data, "--output_path", url)


def test_url_whose_client_connects_at_once(engine, data):
    """The connection is refused."""

    class Connecting(fsspec.AbstractFileSystem):
        def __init__(self, **_options):
            raise ConnectionRefusedError(111, "Connection refused")

    fsspec.register_implementation("connecting", Connecting, clobber=True)
    write_clips(data, 1)
    url = "connecting://bucket/out"
    line = refused("--model", engine, "--data_dir", data, "--output_path", url)
    assert f"{url}: cannot be read (Connection refused); check URL, network and permissions" in line


def test_verify_wants_a_folder():
    assert "only folders can be verified" in refused("--verify", "s3://bucket/x")
