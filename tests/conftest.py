"""Fixtures of every test: seeded models, exported once a run; nothing of the user's is read, nothing downloaded."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import signal
import sys
from collections import Counter
from importlib.metadata import version

import pytest
import torch
from helpers import EACH_BACKEND, FAULTS, INPUTS, KINDS, SUMMARY, WRONG, seeded

from samekit import AutoencoderModel
from samekit.engine.folder import Engine
from samekit_export.checkpoint import load, save_folder
from samekit_export.cli import PROGRESS
from samekit_export.export import export
from samekit_export.model import Same
from samekit_export.random_weights import published_config
from samekit_export.to_tensorrt import add_engines

# Read when huggingface_hub is imported, which happens later and only where it is needed.
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=os.devnull)

# A shell that starts a command in the background lets it ignore Ctrl-C, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# PyTorch gives most warnings once a process: whichever test came first would fail, and the others not.
torch.set_warn_always(True)

# Models this small run no faster on more cores, and much slower beside other work.
THREADS = 1
torch.set_num_threads(THREADS)


def pytest_report_header():
    import onnxruntime

    packages = ("samekit", "torch", "onnx", "onnxruntime")
    return [
        "packages: " + ", ".join(f"{package} {version(package)}" for package in packages),
        "onnxruntime providers: " + ", ".join(onnxruntime.get_available_providers()),
    ]


def pytest_configure(config):
    config.stash[INPUTS], config.stash[FAULTS] = Counter(), Counter()
    config.stash[WRONG], config.stash[SUMMARY] = [], []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and {"inputs", "faults"} & set(item.fixturenames):
        item.config.stash[WRONG].append(item.nodeid)
    return report


def pytest_sessionfinish(session):
    """A worker of pytest-xdist passes on what it counted."""
    if hasattr(session.config, "workeroutput"):
        stash = session.config.stash
        counts = {"inputs": dict(stash[INPUTS]), "faults": dict(stash[FAULTS])}
        session.config.workeroutput["counted"] = counts | {"wrong": stash[WRONG], "summary": stash[SUMMARY]}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """The process that reports adds up what its workers counted; one that died counts as a crash."""
    stash, counted = node.config.stash, getattr(node, "workeroutput", {}).get("counted")
    if counted is None:
        stash[WRONG].append(f"worker {node.gateway.id}")
        return
    stash[INPUTS].update(counted["inputs"])
    stash[FAULTS].update(counted["faults"])
    stash[WRONG].extend(counted["wrong"])
    stash[SUMMARY].extend(counted["summary"])


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash[SUMMARY]:
        terminalreporter.write_line(line)
    for key, what in ((INPUTS, "inputs tried"), (FAULTS, "faults injected")):
        if counts := config.stash[key]:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
            terminalreporter.write_line(f"{counts.total():,} {what}: {kinds}")
    if any(config.stash[key] for key in (INPUTS, FAULTS, WRONG)):
        wrong = len(set(config.stash[WRONG]))
        # Each of these tests asserts that nothing crashes, hangs, or is lost or half-written.
        told = f"in {wrong} tests, see above" if wrong else "0"
        terminalreporter.write_line(f"crashes: {told}; items lost: {told}")


@pytest.fixture(scope="session")
def inputs(request):
    """Counts inputs: `inputs["damaged files"] += 1`; a test with it that fails counts as a crash."""
    return request.config.stash[INPUTS]


@pytest.fixture(scope="session")
def faults(request):
    """Counts faults: `faults["disks full"] += 1`; a test with it that fails counts as a crash or a loss."""
    return request.config.stash[FAULTS]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch finds none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path_factory):
    """No engine of the user's is found: an empty home, an empty working directory, no cache."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SAMEKIT_CACHE", raising=False)
    monkeypatch.chdir(home)


@pytest.fixture(scope="session", autouse=True)
def _exporter_is_not_traced():
    """Take PyTorch's exporter out of coverage's sight: calls by the million, watched they take two thirds longer."""
    export_program = torch.onnx.export

    def untraced(*arguments, **options):
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return export_program(*arguments, **options)
        finally:
            sys.settrace(tracer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", untraced)
        yield


@pytest.fixture(scope="session")
def engine_of(tmp_path_factory):
    """Export a seeded model, once a run: name -> Engine. Not to be changed; see `own_engine`."""
    folder = tmp_path_factory.mktemp("engines")
    return functools.cache(lambda name: export(seeded(name), folder))


@pytest.fixture(scope="session")
def bundled_engine(tmp_path_factory):
    """The model that comes with samekit, exported once a run. Not to be changed."""
    return export(load("same-tiny"), tmp_path_factory.mktemp("bundled"))


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """Write a seeded checkpoint folder, once a run: name -> path. Not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def write(name):
        save_folder(published_config(name), seeded(name).tensors, folder / name)
        return folder / name

    return functools.cache(write)


@pytest.fixture(scope="session")
def eager_of():
    """Eager PyTorch, the oracle: name -> Same."""
    return functools.cache(lambda name: Same.from_checkpoint(seeded(name)))


@pytest.fixture(scope="session")
def built_of(engine_of, tmp_path_factory):
    """A copy of an exported model with the TensorRT engines that can be built here, once a run: name -> Engine."""
    folder = tmp_path_factory.mktemp("built")

    def build(name):
        shutil.copytree(engine_of(name).folder, folder / name)
        add_engines(Engine.load(folder / name), ["fp32"], "auto")
        return Engine.load(folder / name)

    return functools.cache(build)


@pytest.fixture(scope="session")
def place_of(engine_of, built_of):
    """Where a backend finds a model, and the device that it is tested on: name and backend -> folder and device."""

    def place(name, backend):
        return (built_of(name).folder, "cuda") if backend == "tensorrt" else (engine_of(name).folder, "cpu")

    return place


@pytest.fixture(scope="session")
def model_of(place_of):
    """Open an exported model, once a run: name and backend -> AutoencoderModel."""

    def open_model(name, backend):
        folder, device = place_of(name, backend)
        return AutoencoderModel.from_pretrained(folder, device, backend=backend, threads=THREADS)

    return functools.cache(open_model)


@pytest.fixture(scope="session", params=KINDS)
def kind(request):
    """Both kinds of attention span."""
    return request.param


@pytest.fixture(scope="session", params=EACH_BACKEND)
def backend_name(request):
    """Every backend."""
    return request.param


@pytest.fixture(scope="session")
def model(model_of, kind, backend_name):
    """Every model on every backend."""
    return model_of(kind, backend_name)


@pytest.fixture(scope="session")
def backend(model):
    """The backend of `model`."""
    return model.autoencoder.backend


@pytest.fixture
def own_engine(engine_of, tmp_path):
    """An engine folder of tiny-s to be changed, apart from `tmp_path`'s other files."""
    folder = tmp_path / "own" / "tiny-s"
    shutil.copytree(engine_of("tiny-s").folder, folder)
    return Engine.load(folder)


@pytest.fixture
def ready_graphs(engine_of, monkeypatch):
    """Let exports of tiny-s take the graphs that were exported before, unverified; returns the files they write."""
    source = engine_of("tiny-s").folder
    written = []

    def write(graph, path):
        written.append(f"{type(graph).__name__} {path.name}")
        shutil.copyfile(source / f"{path.name.split('.')[0]}.onnx", path)

    monkeypatch.setattr("samekit_export.export.write_onnx", write)
    monkeypatch.setattr("samekit_export.export.verify", lambda *_: [])
    return written


@pytest.fixture
def progress(caplog):
    """What the steps of an export report: a function that returns the lines since it was called before."""
    caplog.set_level(logging.INFO, "samekit_export")

    def lines():
        found = [record.getMessage() for record in caplog.records if record.name in PROGRESS]
        caplog.clear()
        return found

    return lines


@pytest.fixture
def data(tmp_path):
    """Where a test puts its clips; not there yet."""
    return tmp_path / "data"


@pytest.fixture
def out(tmp_path):
    """Where their latents go; not there yet."""
    return tmp_path / "out"
