"""Pre-encoding on several GPUs of this machine: the output equals that of one process.

The worker processes open a backend of another package, which computes on the CPU, or TensorRT on a fake GPU.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faults import KILLED, contents
from helpers import assert_one_line
from test_dataset import command, encoded_lines, write_bad_clips, write_clip, write_clips

from samekit import AutoencoderModel
from samekit.backends.base import count_gpus
from samekit.dataset import DevicesExecutor, PreEncodeOptions, Shard, pre_encode
from samekit.dataset.check import verify
from samekit.errors import BackendError, BackendUnavailableError, InputError, OutputError

TESTS = Path(__file__).parent

# A package with backends. Files in the folder of the engine control and record what happens in the workers.
MODULE = """
import os
import signal
import time
from pathlib import Path

import numpy as np

from samekit.backends.base import Backend
from samekit.errors import BackendError


class Sums(Backend):
    name = "sums"
    device = "cuda"

    def __init__(self, engine, options):
        super().__init__(engine.spec, options.precision)
        self.folder = Path(engine.folder)
        with open(self.folder / "opened", "a") as file:
            file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {options.device_id} {os.getpid()}\\n")
        print("libraries may print")
        if (self.folder / "dies-when-opened").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.folder / "has-no-memory").exists():
            raise BackendError("out of memory; close other programs")

    def _run(self, direction, array):
        if (self.folder / "slow").exists():
            time.sleep(0.02)
        if array.any() and ((self.folder / "always-dies").exists() or np.abs(array).max() > 0.9):
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.folder / "fails").exists():
            raise ZeroDivisionError("a bug")
        sums = array[:, 0].reshape(len(array), -1, 8)[:, :, :4].swapaxes(1, 2)
        return np.ascontiguousarray(sums)


def open_fake_tensorrt(engine, options):
    from fake_tensorrt import FakeGpu, FakeTensorRT
    from samekit.engine.builds import Build, build_folders
    from samekit.tensorrt.backend import TensorRTBackend

    module = FakeTensorRT(engine.spec)
    (folder,) = build_folders(engine)
    return TensorRTBackend(engine.spec, Build.load(folder), module, FakeGpu(module), options)
"""
ENTRY_POINTS = "[samekit.backends]\nsums = sums_backend:Sums\nfake-tensorrt = sums_backend:open_fake_tensorrt\n"


@pytest.fixture(autouse=True)
def _package(tmp_path, monkeypatch):
    """Install the package with the backends."""
    folder = tmp_path / "site"
    information = folder / "sums_backend-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: sums-backend\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "sums_backend.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    """Pretend that CUDA finds two GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("samekit.dataset.devices.count_gpus", lambda: 2)


@pytest.fixture
def engine(small_engine, tmp_path):
    return Path(shutil.copytree(small_engine, tmp_path / "engine"))


@pytest.fixture
def executor(engine):
    with DevicesExecutor(engine, backend="sums") as executor:
        yield executor


def opened(engine):
    """Return for each opening of the model: the visible GPUs, the number of the GPU among them, and the process."""
    return [tuple(line.split()) for line in (engine / "opened").read_text().splitlines()]


def processes(engine):
    """Return the worker processes that run."""
    return [psutil.Process(int(pid)) for _, _, pid in opened(engine) if psutil.pid_exists(int(pid))]


def alone(engine, data, out, **options):
    """Encode in this process; return the output and the report."""
    target = out.with_name("alone")
    (engine / "slow").unlink(missing_ok=True)
    with AutoencoderModel.from_pretrained(engine, "cuda", backend="sums").autoencoder.backend as backend:
        model = AutoencoderModel(backend)
        report = pre_encode(model, data, target, PreEncodeOptions(**options))
    return contents(target), report


def mixed_clips(folder):
    """Write clips of several lengths, and some that cannot be encoded."""
    for index in range(40):
        write_clip(folder / str(index % 3) / f"{index:02d}.wav", 30 + 613 * (index % 9), seed=index)
    write_bad_clips(folder)


# --- The output ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pad": True, "sample_size": 8000, "float16": True},
        {"checksum": True, "shard": Shard(1, 2)},
        {"target_latent_rms": 0.04, "batch_size": 3},
    ],
    ids=["plain", "pad", "shard", "loudness"],
)
def test_folder_is_that_of_one_process(executor, engine, data, out, options):
    mixed_clips(data)
    seen = []
    report = pre_encode(executor, data, out, PreEncodeOptions(**options), seen.append)
    expected, report_alone = alone(engine, data, out, **options)
    assert contents(out) == expected
    assert [problem for problem in verify(out) if "shards are missing" not in problem] == []
    assert report.statuses == report_alone.statuses
    assert report.bad == report_alone.bad
    assert [progress.done for progress in seen] == list(range(1, report.clips + 1))
    assert seen[-1].audio_seconds == pytest.approx(report.audio_seconds, abs=1e-3)
    again = pre_encode(executor, data, out, PreEncodeOptions(**options))
    assert (again.encoded, again.workers) == (0, {})
    assert contents(out).keys() == expected.keys()


def test_each_process_sees_one_gpu(executor, engine, data, out):
    write_clips(data, 60)
    (engine / "slow").touch()
    report = pre_encode(executor, data, out)
    found = opened(engine)
    assert sorted(entry[:2] for entry in found) == [("0", "0"), ("1", "0")]
    assert len({pid for _, _, pid in found} | {str(os.getpid())}) == 3
    host = os.uname().nodename
    assert list(report.workers) == [f"{host}, GPU 0, sums", f"{host}, GPU 1, sums"]
    assert sum(report.workers.values()) == report.encoded == 60
    assert min(report.workers.values()) >= 8
    assert f"; {host}, GPU 0, sums: {report.workers[f'{host}, GPU 0, sums']} clips; " in report.summary()


@pytest.mark.parametrize(
    ("visible", "devices", "expected"),
    [(None, "1", ["1"]), ("3,GPU-5f2a", "all", ["3", "GPU-5f2a"]), ("3,GPU-5f2a", [1], ["GPU-5f2a"])],
)
def test_gpus_are_those_that_the_user_made_visible(engine, monkeypatch, visible, devices, expected):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with DevicesExecutor(engine, devices, backend="sums"):
        assert sorted(entry[0] for entry in opened(engine)) == expected


def test_tensorrt_on_fake_gpus(engine, data, out):
    mixed_clips(data)
    options = PreEncodeOptions(batch_size=3)
    with DevicesExecutor(engine, backend="fake-tensorrt") as executor:
        report = pre_encode(executor, data, out, options)
    assert report.statuses["encoded"] == 40
    assert {name.rsplit(", ", 1)[1] for name in report.workers} == {"tensorrt"}
    model = AutoencoderModel.from_pretrained(engine, "cuda", backend="fake-tensorrt")
    target = out.with_name("alone")
    pre_encode(model, data, target, options)
    assert contents(out) == contents(target)


def test_a_script_needs_no_main_guard(engine, data, out, tmp_path):
    write_clips(data, 3)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import samekit.dataset.devices\n"
        "samekit.dataset.devices.count_gpus = lambda: 2\n"
        "from samekit.dataset import DevicesExecutor, pre_encode\n"
        "with DevicesExecutor(sys.argv[1], [0, 1], backend='sums') as executor:\n"
        "    print(pre_encode(executor, *sys.argv[2:]).encoded)\n"
    )
    done = subprocess.run([sys.executable, script, engine, data, out], capture_output=True, text=True, check=True)
    # What the backend prints is shown, but not among the output of the script.
    assert done.stdout == "3\n"
    assert done.stderr.count("libraries may print") == 2


def test_log_of_the_workers(engine, caplog):
    caplog.set_level(logging.INFO, "samekit")
    with DevicesExecutor(engine, [0], backend="sums"):
        pass
    assert [record.name for record in caplog.records if "random weights" in record.getMessage()] == ["samekit.model"]


# --- Deaths -------------------------------------------------------------------------------------------------


def test_killed_workers_lose_nothing(executor, engine, data, out, faults):
    mixed_clips(data)
    (engine / "slow").touch()
    killed, seen = [], []

    def kill(progress):
        seen.append(progress.done)
        if progress.done in (4, 20):
            victim = processes(engine)[0]
            victim.kill()
            killed.append(victim.pid)

    report = pre_encode(executor, data, out, progress=kill)
    faults["workers killed"] += 2
    assert len(set(killed)) == 2
    assert seen == list(range(1, 44))
    assert report.statuses["encoded"] == 40
    assert contents(out) == alone(engine, data, out)[0]


def test_clip_that_kills_workers_is_one_bad_clip(executor, engine, data, out, faults, caplog):
    write_clips(data, 30)
    write_clip(data / "clip00017.wav", 100, level=2)
    report = pre_encode(executor, data, out)
    faults["workers killed"] += 3
    assert report.statuses == {"encoded": 29, "failed": 1}
    (bad,) = report.bad
    assert bad["relpath"] == "clip00017.wav"
    assert bad["reason"] == (
        f"{data}/clip00017.wav: 3 workers died while they encoded it (killed by SIGKILL); remove the clip"
    )
    assert caplog.text.count("a worker died on ") == 3
    write_clip(data / "clip00017.wav", 100)
    assert pre_encode(executor, data, out).encoded == 1
    assert contents(out) == alone(engine, data, out)[0]


def test_workers_that_always_die_end_the_run(executor, engine, data, out):
    write_clips(data, 200)
    (engine / "always-dies").touch()
    with pytest.raises(BackendError, match=r"12 workers died one after another, .*'clip0.*SIGKILL") as error:
        pre_encode(executor, data, out)
    assert_one_line(error.value)
    (engine / "always-dies").unlink()
    assert pre_encode(executor, data, out).statuses == {"encoded": 200}


def test_workers_that_cannot_be_started_again_are_lost(executor, engine, data, out, caplog):
    write_clips(data, 100)
    (engine / "slow").touch()
    (engine / "dies-when-opened").touch()

    def kill(progress):
        if progress.done == 1:
            for process in processes(engine):
                process.kill()

    with pytest.raises(BackendError, match="every worker process is lost") as error:
        pre_encode(executor, data, out, progress=kill)
    assert_one_line(error.value)
    assert caplog.text.count("a worker is lost for good: killed by SIGKILL") == 2


def test_death_while_the_model_is_opened(engine):
    (engine / "dies-when-opened").touch()
    with (
        pytest.raises(BackendError, match=r"of GPU 0 died while it opened the model \(killed by SIGKILL\)") as error,
        DevicesExecutor(engine, backend="sums"),
    ):
        pass
    assert_one_line(error.value)
    wait_for_the_end(engine)


def wait_for_the_end(engine):
    """Wait until no worker runs any more."""
    deadline = time.monotonic() + 20
    while any(process.status() != psutil.STATUS_ZOMBIE for process in processes(engine)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# A program that runs the command with two GPUs. Tests start it as another process and kill that.
COMMAND = """
import samekit.dataset.devices
from samekit.cli.main import main

samekit.dataset.devices.count_gpus = lambda: 2
main()
"""


def start_command(engine, data, out):
    """Start the command in a new process and wait until it has encoded some clips."""
    arguments = ["pre-encode", "--model", engine, "--backend", "sums", "--data_dir", data, "--output_path", out]
    program = [sys.executable, "-c", COMMAND, *arguments, "--devices", "all"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not out.exists() or encoded_lines(out) < 8:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_workers_end_when_the_main_process_is_killed(engine, executor, data, out, faults):
    write_clips(data, 100)
    (engine / "slow").touch()
    process = start_command(engine, data, out)
    process.kill()
    assert process.wait() == KILLED
    process.communicate()
    faults["processes killed"] += 1
    deadline = time.monotonic() + 20
    # The workers of the fixture `executor` go on.
    while len(processes(engine)) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    report = pre_encode(executor, data, out)
    assert report.statuses == {"encoded": 100}
    assert report.unchanged >= 8
    assert contents(out) == alone(engine, data, out)[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_all(engine, data, out, number):
    write_clips(data, 200)
    (engine / "slow").touch()
    process = start_command(engine, data, out)
    start = time.monotonic()
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert process.returncode == 128 + number
    assert shown.splitlines()[-1] == "stopped; run the same command again to go on"
    assert "Traceback" not in shown
    wait_for_the_end(engine)
    found = contents(out)
    assert not [name for name in found if name.endswith(".tmp")]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_nothing_is_written_after_an_error(executor, engine, data, out, error):
    write_clips(data, 60)
    (engine / "slow").touch()

    def stop(_progress):
        raise error

    with pytest.raises(error):
        pre_encode(executor, data, out, progress=stop)
    found = contents(out)
    time.sleep(1)
    assert contents(out) == found
    # The executor can be used again.
    assert pre_encode(executor, data, out).statuses == {"encoded": 60}


# --- Errors -------------------------------------------------------------------------------------------------


def test_error_while_the_model_is_opened(engine):
    (engine / "has-no-memory").touch()
    with (
        pytest.raises(BackendError, match="out of memory; close other programs"),
        DevicesExecutor(engine, backend="sums"),
    ):
        pass
    wait_for_the_end(engine)


def test_bug_in_a_worker_is_raised_here_with_its_traceback(executor, engine, data, out):
    write_clips(data, 20)
    (engine / "fails").touch()
    with pytest.raises(
        RuntimeError, match=r"(?s)in a worker process: Traceback.*sums_backend.*ZeroDivisionError: a bug"
    ):
        pre_encode(executor, data, out)


def test_folder_that_cannot_be_written(executor, data, out):
    write_clips(data, 3)
    out.write_text("a file")
    with pytest.raises(OutputError, match="cannot be written") as error:
        pre_encode(executor, data, out)
    assert_one_line(error.value)


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ("", "devices is ''; pass"),
        ("0,", "pass .all., or numbers"),
        ("-1", "pass .all., or numbers"),
        ("0;1", "pass .all., or numbers"),
        ("cuda:0", "pass .all., or numbers"),
        ("9" * 5000, "pass .all., or numbers"),
        ([], "pass .all., or numbers"),
        ([True], "pass .all., or numbers"),
        ([-1], "pass .all., or numbers"),
        ("0,1,0", "GPU 0 twice"),
        ("0,2", "GPU 2, but only 2 can be used here"),
    ],
    ids=str,
)
def test_devices_that_cannot_be(devices, reason):
    with pytest.raises(InputError, match=reason) as error:
        DevicesExecutor("x", devices)
    assert_one_line(error.value)


def refused(*arguments):
    """Run a command that must be refused, and return its error message of one line."""
    result = command(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    return result.stderr


def test_options_that_contradict_each_other(data, out):
    write_clips(data, 1)
    base = ["--model", "x", "--data_dir", data, "--output_path", out, "--devices", "all"]
    assert "--devices and --ray both split the work; pass one" in refused(*base, "--ray", "local")
    assert "device cpu and devices both choose where to encode" in refused(*base, "--device", "cpu")
    assert "--actors only works with a Ray cluster" in refused(*base, "--actors", "2")
    assert not out.exists()


def test_machine_without_a_gpu(data, out, monkeypatch):
    monkeypatch.setattr("samekit.dataset.devices.count_gpus", lambda: 0)
    write_clips(data, 1)
    line = refused("--model", "x", "--data_dir", data, "--output_path", out, "--devices", "all")
    assert f"devices is 'all', but CUDA offers no GPU on {os.uname().nodename}; leave it out" in line
    assert not out.exists()
    with pytest.raises(BackendUnavailableError, match="CUDA offers no GPU"):
        DevicesExecutor("x", [0])


def test_command(engine, data, out):
    write_clips(data, 5)
    result = command(
        "--model", engine, "--backend", "sums", "--data_dir", data, "--output_path", out, "--devices", "1,0", "--json"
    )
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout)
    assert (last["encoded"], sum(last["workers"].values())) == (5, 5)
    assert "5 of 5 clips" in result.stderr


# --- Counting GPUs ------------------------------------------------------------------------------------------

# A library with the functions of NVIDIA's driver, which are declared in cuda.h.
DRIVER = (
    "int cuInit(unsigned int flags) {{ return {0}; }}\nint cuDeviceGetCount(int *count) {{ *count = 3; return {1}; }}"
)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize(
    ("codes", "shown"),
    [((0, 0), "3"), ((100, 0), "0"), ((803, 0), "does not work (CUDA error 803)"), ((0, 3), "(CUDA error 3)")],
)
def test_gpus_are_counted_by_the_driver(tmp_path, codes, shown):
    source = tmp_path / "driver.c"
    source.write_text(DRIVER.format(*codes))
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / "libcuda.so.1"], check=True)
    program = "from samekit.backends.base import count_gpus; print(count_gpus())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown in done.stdout + done.stderr


def test_no_driver_is_no_gpu(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", mock_without_library)
    assert count_gpus() == 0


def mock_without_library(name):
    raise OSError(f"{name}: cannot open shared object file")


def test_system_that_cannot_start_processes(engine, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(BackendUnavailableError, match="processes need POSIX and a Python command") as error:
        DevicesExecutor(engine, backend="sums").__enter__()
    assert_one_line(error.value)
