"""Effects of samekit on its process: usage reports, interrupted and broken imports, forks, copies of models."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from helpers import RATE, FakeBackend, assert_one_line, noise

import samekit
from samekit import AutoencoderModel
from samekit.errors import BackendError, EngineError, EngineNotFoundError

# ONNX Runtime sends no usage reports if one of these variables of continuous integration services is set.
CI_VARIABLES = (
    "CI",
    "TF_BUILD",
    "GITHUB_ACTIONS",
    "JENKINS_URL",
    "CODEBUILD_BUILD_ID",
    "BUILDKITE",
    "BITBUCKET_BUILD_NUMBER",
)


@pytest.fixture
def home(tmp_path):
    """Empty folder that is the home and the working folder of a process."""
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def song(tmp_path):
    path = tmp_path / "song.wav"
    sf.write(path, noise((9000, 2), level=0.1), RATE, "PCM_16")
    return path


def environment(home, **changes):
    """Return the environment variables of a user outside continuous integration, with an empty home."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*CI_VARIABLES, "ORT_DISABLE_TELEMETRY") and not name.startswith("XDG_")
    }
    return kept | {"HOME": str(home), "MPLCONFIGDIR": str(home.parent / "matplotlib")} | changes


def python(home, *arguments, prefix=(), timeout=120, **changes):
    """Run Python in `home`."""
    command = [*prefix, sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=home,
        env=environment(home, **changes),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


# --- Usage reports -----------------------------------------------------------------------------------------

# ONNX Runtime's own Privacy.md (1.32), "Disabling Telemetry": the variable must be set before it initializes. Its
# official builds since 1.29 write `~/.cache/Microsoft/DeveloperTools/.onnxruntime/deviceid` on import.
WORK = {
    "encode": "-m samekit encode {song} {out}/a.npy --model {engine} --backend onnxruntime",
    "pre-encode": "-m samekit pre-encode --data_dir {data} --output_path {out}/b --model {engine} --device cpu",
    "Ray's actors": "-m samekit pre-encode --data_dir {data} --output_path {out}/c --model {engine} --ray local",
    "verify": "-m samekit verify {engine}",
    "doctor": "-m samekit doctor",
    "benchmark": "{root}/benchmarks/latency.py --help",
    "InferenceSession": "-c 'import samekit, onnxruntime as o; o.InferenceSession(\"{engine}/decoder.onnx\")'",
}


@pytest.fixture
def arguments(engine_of, song, tmp_path, request):
    """Arguments with which Python runs an entry of WORK."""
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    data.mkdir()
    shutil.copyfile(song, data / "song.wav")
    (data / "song.txt").write_text("caption")
    root, engine = Path(__file__).parents[1], engine_of("tiny-s").folder
    parts = re.findall(r"'[^']*'|\S+", WORK[request.param])
    places = {"song": song, "data": data, "out": out, "engine": engine, "root": root}
    return [part.strip("'").format_map(places) for part in parts]


@pytest.mark.parametrize("arguments", WORK, indirect=True)
def test_nothing_is_written_into_the_home(arguments, home):
    done = python(home, *arguments)
    assert done.returncode == 0, done.stderr
    # Ray writes an access token into the home folder.
    assert [str(path) for path in home.rglob("*") if ".ray" not in path.parts] == []


@pytest.mark.skipif(sys.platform != "linux", reason="strace is a program of Linux")
@pytest.mark.parametrize("arguments", ["encode", "verify"], indirect=True)
def test_nothing_is_looked_up(arguments, home, tmp_path):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    trace = tmp_path / "trace"
    prefix = (strace, "-f", "-qq", "-o", str(trace), "-e", "trace=network,openat,clone,clone3")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace processes here")
    done = python(home, *arguments, prefix=prefix)
    assert done.returncode == 0, done.stderr
    calls = trace.read_text(encoding="utf-8", errors="replace").splitlines()
    assert any("onnxruntime_pybind11_state" in call for call in calls), "nothing was traced"
    # Internet sockets, sockets of name services, and files that name lookups and uploads need.
    assert [call for call in calls if re.search(r"AF_INET|AF_UNIX|resolv\.conf|/certs/|deviceid", call)] == []


@pytest.mark.parametrize("value", ["0", "", "1", None])
def test_the_users_choice_about_usage_reports_stands(home, value):
    program = "import samekit, os; print(repr(os.environ['ORT_DISABLE_TELEMETRY']))"
    done = python(home, "-c", program, **({} if value is None else {"ORT_DISABLE_TELEMETRY": value}))
    assert done.stdout.strip() == repr("1" if value is None else value)


# --- Imports -----------------------------------------------------------------------------------------------

INTERRUPTED = "import os, signal; os.kill(os.getpid(), signal.{signal})"
# Extension modules turn an exception during their initialization into an ImportError, with or without its cause.
BROKEN = {
    "with its cause": """
try:
    {kill}
except KeyboardInterrupt as error:
    raise ImportError("initialization failed") from error
""",
    "without": """
try:
    {kill}
except KeyboardInterrupt:
    pass
raise ImportError("initialization failed")
""",
}


def fake_package(folder, name, text):
    """Write a package and return the environment variables that make Python find it first."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text + "\n", encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_stop_while_a_package_is_imported(engine_of, home, song, tmp_path, how, stop):
    kill = INTERRUPTED.format(signal=stop.name)
    path = fake_package(tmp_path / "fake", "onnxruntime", BROKEN[how].format(kill=kill))
    options = ("--model", engine_of("tiny-s").folder)
    done = python(home, "-m", "samekit", "encode", song, tmp_path / "a.npy", *options, **path)
    assert done.returncode == 128 + stop
    assert done.stderr.splitlines()[-1] == "stopped; run the same command again"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a.npy").exists()


def test_interrupt_while_a_package_is_imported_reaches_the_caller(engine_of, home, tmp_path):
    text = BROKEN["with its cause"].format(kill=INTERRUPTED.format(signal="SIGINT"))
    program = (
        "import sys, samekit\ntry:\n    samekit.AutoencoderModel.from_pretrained(sys.argv[1])\n"
        "except KeyboardInterrupt:\n    print('interrupted')"
    )
    path = fake_package(tmp_path / "fake", "onnxruntime", text)
    assert python(home, "-c", program, engine_of("tiny-s").folder, **path).stdout == "interrupted\n"


SWALLOWS = """
import os, signal
import samekit.doctor
from samekit.cli.main import main

def examine():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        yield "done"

samekit.doctor.examine = examine
main(["doctor"])
"""


def test_stop_that_raises_nothing(home):
    """The exit code is that of the signal, also when a library ignores KeyboardInterrupt and the command completes."""
    done = python(home, "-c", SWALLOWS)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.splitlines() == ["stopped; run the same command again"]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("raise ImportError('libstdc++.so.6: version GLIBCXX_3.4.30 not found')", r"\(libstdc\+\+.so.6: version "),
        ("import no_such_dependency", r"\(No module named 'no_such_dependency'\)"),
        ("raise OSError('libcublas.so.12: cannot open shared object file')", r"\(libcublas.so.12: cannot open "),
    ],
    ids=["library", "dependency", "loader"],
)
def test_broken_package_is_told_and_pytorch_does_not_take_its_place(engine_of, home, song, tmp_path, text, cause):
    path = fake_package(tmp_path / "fake", "onnxruntime", text)
    options = ("--model", engine_of("tiny-s").folder)
    done = python(home, "-m", "samekit", "encode", song, tmp_path / "a.npy", *options, **path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(rf"Error: onnxruntime is installed, but cannot be imported {cause}.*; .*pip ", line)
    assert not (tmp_path / "a.npy").exists()


@pytest.mark.parametrize("command", ["export", "verify"])
def test_broken_package_of_exports(engine_of, home, tmp_path, command):
    path = fake_package(tmp_path / "fake", "torch", "raise OSError('libtorch_cpu.so: cannot open')")
    done = python(home, "-m", "samekit", command, engine_of("tiny-s").folder, **path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: torch is installed, but cannot be imported (libtorch_cpu.so: cannot open); ")


# --- python -m ---------------------------------------------------------------------------------------------


def test_module_is_the_command(home):
    assert python(home, "-m", "samekit", "--version").stdout == f"samekit, version {samekit.__version__}\n"
    shown = python(home, "-m", "samekit", "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("Usage: samekit [OPTIONS] [COMMAND]")
    assert python(home, "-m", "samekit", "no-such-command").returncode == 2


# --- Forks -------------------------------------------------------------------------------------------------

FORKED = """
import multiprocessing, os, sys
import numpy as np
from samekit import AutoencoderModel

folder, backend, threads = sys.argv[1:]
# The tracebacks of these errors keep references to backends that failed to open.
refused = []
for name, options in (("torch", {"precision": "int8"}), ("onnxruntime", {"providers": ["none"]})):
    try:
        AutoencoderModel.from_pretrained(folder, backend=name, **options)
    except Exception as error:
        refused.append(error)
assert len(refused) == 2
model = AutoencoderModel.from_pretrained(folder, "cpu", backend=backend, threads=int(threads))
audio = np.random.default_rng(0).standard_normal((2, 40 * 4096)).astype(np.float32)
stream = model.stream_encoder(44_100)
expected = None

def work():
    found = model.encode(audio, 44_100)
    assert expected is None or np.abs(found - expected).max() < 1e-4
    assert model.decode(found).shape == (1, 2, 40 * 4096)
    stream.push(audio)
    assert np.abs(stream.finish() - found[0]).max() < 1e-4
    return found

def fork(end):
    child = os.fork()
    if not child:
        work()
        end()
        # Unlike `os._exit`, this destroys all objects.
        sys.exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7, status

# Fork before the first use of the model, and after it.
fork(lambda: None)
for _ in range(3):
    expected = work()
fork(lambda: None)
fork(model.close)
# Fork in a forked process.
fork(lambda: fork(lambda: None))
child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join()
assert child.exitcode == 0
# The parent can still use the model.
work()
print("worked")
"""

can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@can_fork
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_forked_processes_work_and_end(engine_of, home, backend, threads):
    """Models work in a forked process, although it does not have the threads of ONNX Runtime and PyTorch."""
    done = python(home, "-W", "ignore", "-c", FORKED, engine_of("tiny-s").folder, backend, threads)
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stdout == "worked\n"


@can_fork
def test_forked_process_of_a_parent_at_work(engine_of, home):
    """Models work in a forked process, although threads of the parent held locks and ran sessions at the fork."""
    program = """
import os, sys, threading
import numpy as np
from samekit import AutoencoderModel

model = AutoencoderModel.from_pretrained(sys.argv[1], "cpu", backend="onnxruntime", threads=2)
latents = np.zeros((1, 32, 8), np.float32)
# This call completes all imports: a fork during an import in another thread can deadlock.
model.decode(latents)
stopped = threading.Event()

def work():
    while not stopped.is_set():
        model.decode(latents)

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(5):
    child = os.fork()
    if not child:
        model.decode(latents)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stopped.set()
"""
    done = python(home, "-W", "ignore", "-c", program, engine_of("tiny-s").folder)
    assert done.returncode == 0, done.stderr


class GpuBackend(FakeBackend):
    """Backend that claims to compute on a GPU."""

    device = "cuda"


@can_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_gpus_are_refused_in_forked_processes():
    backend = GpuBackend()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            backend.decode(np.zeros((1, 4, 2), np.float32))
        except BackendError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    message = os.read(read, 10_000).decode()
    os.close(read)
    assert_one_line(message)
    assert re.search(r"on a GPU before this process was forked.*; start them by spawn, or open the model", message)
    assert backend.decode(np.zeros((1, 4, 2), np.float32)).shape == (1, 2, 16)


# --- Copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
@pytest.mark.parametrize(
    "way", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_copies_open_the_same_again(engine_of, name, way, monkeypatch, tmp_path):
    folder = engine_of("tiny-s").folder
    monkeypatch.chdir(folder.parent)
    options = {"backend": name, "threads": 1, "window": 64, "window_batch": 2}
    with AutoencoderModel.from_pretrained("./tiny-s", "cpu", **options) as model:
        audio = noise((2, 9000))
        expected = model.encode(audio, RATE)
        # Another process may have another working folder.
        monkeypatch.chdir(tmp_path)
        with way(model) as other:
            assert type(other) is AutoencoderModel
            assert other.spec == model.spec
            assert other.autoencoder.backend.name == name
            assert other.autoencoder.backend.window_batch == 2
            assert other.autoencoder.windows("encoder").size == 64
            assert np.array_equal(other.encode(audio, RATE), expected)
        # Closing the copy does not close the original.
        assert np.array_equal(model.encode(audio, RATE), expected)


def test_copy_of_a_checkpoint_that_runs_in_pytorch(checkpoint_of):
    with AutoencoderModel.from_pretrained(checkpoint_of("tiny-s"), "cpu") as model, copy.deepcopy(model) as other:
        assert other.autoencoder.backend.name == "torch"
        assert np.array_equal(other.encode(noise((2, 9000)), RATE), model.encode(noise((2, 9000)), RATE))


def test_copies_of_what_cannot_be_opened_again(engine_of):
    closed = AutoencoderModel.from_pretrained(engine_of("tiny-s").folder, "cpu", backend="onnxruntime")
    closed.close()
    made = AutoencoderModel(FakeBackend())
    for model, told in ((made, "was not opened by a path or a name"), (closed, "is closed; open")):
        for way in (pickle.dumps, copy.deepcopy):
            with pytest.raises(BackendError, match=told) as caught:
                way(model)
            assert_one_line(caught.value)


def test_copy_of_a_model_that_was_replaced(own_engine, engine_of):
    with AutoencoderModel.from_pretrained(own_engine.folder, "cpu", backend="onnxruntime") as model:
        pickled = pickle.dumps(model)
    shutil.rmtree(own_engine.folder)
    with pytest.raises(EngineNotFoundError):
        pickle.loads(pickled)
    shutil.copytree(engine_of("tiny-l").folder, own_engine.folder)
    with pytest.raises(EngineError, match="is another model now than the one that was copied; ") as caught:
        pickle.loads(pickled)
    assert_one_line(caught.value)


class Clips(torch.utils.data.Dataset):
    """Dataset whose items are the latents of noise."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.model.encode(torch.from_numpy(noise((2, 9000), seed=index)), RATE)[0]


@pytest.mark.parametrize("method", [pytest.param("fork", marks=can_fork), "spawn"])
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_data_loader(engine_of, backend, method):
    with AutoencoderModel.from_pretrained(engine_of("tiny-s").folder, "cpu", backend=backend, threads=2) as model:
        clips = Clips(model)
        expected = torch.stack([clips[index] for index in range(len(clips))])
        loader = torch.utils.data.DataLoader(
            clips, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=100
        )
        found = torch.cat(list(loader))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
