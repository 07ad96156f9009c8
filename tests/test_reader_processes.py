"""Clips that are read in processes: the same files as with threads, and no clip or process is lost when one dies."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile as sf
from faults import contents
from helpers import RATE, FakeBackend, assert_one_line, noise

from samekit import AutoencoderModel
from samekit.dataset.executor import LocalExecutor, default_readers, reads_in_processes
from samekit.dataset.options import PreEncodeOptions
from samekit.dataset.run import pre_encode
from samekit.errors import BackendError, InputError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="reader processes need POSIX")

HOP = 8
# Samples of a clip that has many more windows than a process reads ahead.
LONG = 200_000


def first_samples(direction, array):
    """Return latents that show from which samples they were computed."""
    del direction
    return np.ascontiguousarray(array[:, 0].reshape(len(array), -1, HOP)[:, :, :4].swapaxes(1, 2))


def write(path, samples, *, rate=RATE, channels=2, seed=0, level=0.1):
    """Write an audio file of noise and its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, noise((samples, channels), seed, level), rate, format=path.suffix[1:].upper())
    path.with_suffix(".txt").write_text(f"caption {seed}")
    return path


def run(data, out, answer=first_samples, **options):
    """Pre-encode with reader processes."""
    model = AutoencoderModel(FakeBackend(answer))
    return pre_encode(model, data, out, PreEncodeOptions(**{"reader_processes": True, "readers": 2, **options}))


def children():
    """Return the processes that this one has started and that still run."""
    return [child for child in psutil.Process().children() if "reader_process" in "".join(child.cmdline())]


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": 3}, {"float16": True, "checksum": True}, {"sample_size": 9000, "crop": "random", "pad": True}],
    ids=str,
)
def test_files_are_those_of_threads(data, tmp_path, options):
    for seed, (name, rate, channels) in enumerate(
        (("a.wav", RATE, 2), ("b.flac", 48_000, 1), ("c.mp3", 44_100, 2), ("d.ogg", 22_050, 2), ("e.wav", 96_000, 3))
    ):
        write(data / name, rate, rate=rate, channels=channels, seed=seed)
    write(data / "loud.wav", 3000, level=2)
    write(data / "silent.wav", 3000, level=1e-6)
    write(data / "short.wav", 10)
    write(data / "no caption.wav", 3000).with_suffix(".txt").unlink()
    cut = write(data / "cut.flac", 30_000)
    cut.write_bytes(cut.read_bytes()[:20_000])
    (data / "empty.wav").touch()
    write(data / "gone.wav", 100).unlink()
    reports = [run(data, tmp_path / str(where), reader_processes=where, **options) for where in (True, False)]
    assert reports[0].statuses == reports[1].statuses
    assert reports[0].bad == reports[1].bad
    assert reports[0].encoded == 7
    assert len(reports[0].bad) == 4
    files = [contents(tmp_path / str(where)) for where in (True, False)]
    for each in files:
        del each[".samekit/report.json"]
    assert files[0] == files[1]
    assert not children()


def reads_in(process, folder):
    """Return whether a process has opened a file of a folder."""
    return any(Path(file.path).is_relative_to(folder) for file in process.open_files())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("readers", [1, 2])
def test_reader_that_dies_is_one_bad_clip(data, out, number, readers):
    for index in range(6):
        write(data / f"{index}.wav", LONG, seed=index)
    killed = []

    def answer(direction, array):
        if array.any() and not killed:
            killed.append(next(child for child in children() if reads_in(child, data)))
            killed[0].send_signal(number)
        return first_samples(direction, array)

    report = run(data, out, answer, readers=readers)
    assert report.statuses == {"encoded": 5, "unreadable": 1}
    (bad,) = report.bad
    assert bad["reason"].startswith(f"{data / bad['relpath']}: the process that read it was ended by {number.name}; ")
    assert not children()
    again = run(data, out, readers=readers)
    assert (again.encoded, again.unchanged) == (1, 5)
    run(data, out.with_name("threads"), reader_processes=False)
    names = [name for name in contents(out) if name.endswith("y")]
    assert {name: contents(out)[name] for name in names} == {
        name: contents(out.with_name("threads"))[name] for name in names
    }


def test_readers_that_die_before_a_run_are_replaced(data, tmp_path):
    write(data / "a.wav", 3000)
    with closing(LocalExecutor(AutoencoderModel(FakeBackend(first_samples)).autoencoder)) as executor:
        options = PreEncodeOptions(reader_processes=True)
        assert pre_encode(executor, data, tmp_path / "1", options).encoded == 1
        (child,) = children()
        assert pre_encode(executor, data, tmp_path / "2", options).encoded == 1
        assert children() == [child]
        child.kill()
        assert pre_encode(executor, data, tmp_path / "3", options).encoded == 1
        assert children() != [child]
    assert not children()


def test_clips_that_fail_are_not_read_to_their_end(data, out):
    """Their windows and the memory of those are free again, and the process reads the next clip."""
    for index in range(20):
        write(data / f"{index:02d}.wav", LONG, seed=index)
    seen = set()

    def answer(direction, array):
        seen.update(children())
        return first_samples(direction, array) * (np.nan if array.any() else 1)

    backend = FakeBackend(answer)
    report = pre_encode(
        AutoencoderModel(backend), data, out, PreEncodeOptions(reader_processes=True, readers=1, batch_size=2)
    )
    assert report.statuses == {"failed": 20}
    assert len(backend.calls) < 100
    assert len(seen) == 1
    assert not children()


@pytest.mark.parametrize("error", [BackendError, KeyboardInterrupt])
def test_error_of_the_encoder_ends_the_processes(data, out, error):
    for index in range(4):
        write(data / f"{index}.wav", LONG, seed=index)

    def answer(direction, array):
        if array.any():
            raise error("the power went out; try again")
        return first_samples(direction, array)

    with pytest.raises(error, match="the power went out"):
        run(data, out, answer)
    assert not children()
    assert run(data, out).encoded == 4


def test_system_without_room_for_the_memory():
    """The memory is sparse, but takes addresses, which `ulimit -v` limits."""
    code = (
        "import resource; from samekit.dataset.window_arrays import SharedMemory;"
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); SharedMemory(2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("samekit.errors.BackendError: no memory can be shared here (")
    assert last.endswith("); pass --worker-threads")


def test_process_that_does_not_start(data, out, monkeypatch):
    write(data / "a.wav", 100)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match=r"ended with exit code 1 when it started; pass --worker-threads") as caught:
        run(data, out)
    assert_one_line(caught.value)
    monkeypatch.setattr(sys, "executable", "/not there")
    with pytest.raises(BackendError, match=r"no more processes can be started here .*; pass fewer --workers"):
        run(data, out)


def shared_memory():
    """Return the bytes in use of each file in memory that this process has open, by its inode."""
    gc.collect()
    files = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    status = [os.stat(file) for file in files if os.path.realpath(file).startswith("/memfd:samekit")]
    return {each.st_ino: each.st_blocks * 512 for each in status}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux")
@pytest.mark.parametrize("batch_size", [1, 10])
def test_shared_memory_does_not_grow(data, out, batch_size):
    for index in range(10):
        write(data / f"{index}.wav", LONG + 100 * index, seed=index)
    model = AutoencoderModel(FakeBackend(first_samples))
    with closing(LocalExecutor(model.autoencoder)) as executor:
        options = PreEncodeOptions(reader_processes=True, readers=2, batch_size=batch_size)
        assert pre_encode(executor, data, out, options).encoded == 10
        (used,) = shared_memory().values()
    window = 4 * 2 * HOP * executor.facts.windows.size
    # Ten clips have 2,000 windows. A reader has a few, and so have the queue and the batches that wait.
    assert window <= used <= window * (20 + 8 * batch_size)
    del executor
    assert not shared_memory()


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from test_reader_processes import run
if __name__ == "__main__":
    run(sys.argv[2], sys.argv[3])
"""


def start_program(data, out):
    """Pre-encode in another process; return it when it has encoded something."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, os.path.dirname(__file__), data, out], stderr=subprocess.PIPE
    )
    while not list(out.glob("0*.npy")):
        assert program.poll() is None, program.stderr.read()
        time.sleep(0.01)
    return program, psutil.Process(program.pid).children()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_processes_end_with_their_parent(data, out, number):
    for index in range(16):
        write(data / f"{index:02d}.wav", LONG, seed=index)
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    program, readers = start_program(data, out)
    assert len(readers) == 2
    program.send_signal(number)
    _, errors = program.communicate(timeout=30)
    assert program.returncode == -number
    # The readers print nothing.
    assert errors.count(b"Traceback") == (number == signal.SIGINT)
    _, alive = psutil.wait_procs(readers, timeout=10)
    assert not alive
    assert not [name for name in (set(os.listdir("/dev/shm")) if before else set()) - before if "samekit" in name]
    run(data, out)
    run(data, out.with_name("whole"), reader_processes=False)
    for name, content in contents(out.with_name("whole")).items():
        if name.endswith(".npy"):
            assert contents(out)[name] == content


def test_script_without_a_main_guard(data, out, tmp_path):
    """`multiprocessing` would run the script again in each process."""
    write(data / "a.wav", 3000)
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.replace('if __name__ == "__main__":', "if True:") + "print('once')\n")
    command = [sys.executable, script, os.path.dirname(__file__), data, out]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "once\n"


def test_processes_import_neither_torch_nor_an_engine():
    code = "import sys, samekit.dataset.reader_process; print(*{name.split('.')[0] for name in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "numpy" in modules
    assert not {"torch", "onnx", "onnxruntime", "ray", "click", "samekit_export"}.intersection(modules)


@pytest.mark.parametrize(
    ("cores", "device", "option", "processes", "readers"),
    [
        (2, "cpu", None, False, 2),
        (4, "cpu", None, False, 4),
        (5, "cpu", None, True, 4),
        (64, "cpu", False, False, 4),
        (2, "cuda", None, True, 2),
        (64, "cuda", None, True, 16),
        (64, "cuda", False, False, 16),
        (1, "cpu", True, True, 1),
    ],
)
def test_when_processes_read(cores, device, option, processes, readers):
    assert reads_in_processes(PreEncodeOptions(reader_processes=option), cores, device) == processes
    assert default_readers(cores, device) == readers


def test_system_that_cannot_start_processes(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    assert not reads_in_processes(PreEncodeOptions(), 64, "cuda")
    with pytest.raises(InputError, match="reader processes need POSIX and a Python command; pass --worker-threads"):
        reads_in_processes(PreEncodeOptions(reader_processes=True), 64, "cuda")
