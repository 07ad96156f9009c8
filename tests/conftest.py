"""Shared fixtures. Models have seeded weights and are exported once per run.

No test reads a file of the user or uses the network.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import signal
import sys
import warnings
from collections import Counter
from importlib.metadata import version

import pytest
import torch
from helpers import EACH_BACKEND, FAILED, FAULTS, INPUTS, KINDS, SUMMARY, WEBGPU, seeded

from samekit import AutoencoderModel
from samekit.backends.providers import WEBGPU_PROVIDER, installed_plugins, is_built_in
from samekit.engine.folder import Engine
from samekit_export.checkpoint import load, save_folder
from samekit_export.cli import PROGRESS
from samekit_export.export import export
from samekit_export.model import Same
from samekit_export.random_weights import published_config
from samekit_export.to_tensorrt import add_engines

# huggingface_hub reads these variables when it is imported, which happens later.
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=os.devnull)

# A shell may start background commands with SIGINT ignored, and child processes inherit this setting.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# By default, PyTorch gives most warnings once per process: only the first test that causes one would fail.
torch.set_warn_always(True)

# More threads do not make such small models faster, and are much slower when other processes use the cores.
THREADS = 1
torch.set_num_threads(THREADS)


# A software driver of WebGPU is slow, and the golden cases are longer.
MOST_WEBGPU_LATENTS = 4


def pytest_report_header():
    import onnxruntime

    packages = ("samekit", "torch", "onnx", "onnxruntime")
    return [
        "packages: " + ", ".join(f"{package} {version(package)}" for package in packages),
        "onnxruntime providers: " + ", ".join(onnxruntime.get_available_providers()),
    ]


def pytest_configure(config):
    config.stash[INPUTS], config.stash[FAULTS] = Counter(), Counter()
    config.stash[FAILED], config.stash[SUMMARY] = [], []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and {"inputs", "faults"} & set(item.fixturenames):
        item.config.stash[FAILED].append(item.nodeid)
    return report


def pytest_sessionfinish(session):
    """Send the counts of a pytest-xdist worker to the main process."""
    if hasattr(session.config, "workeroutput"):
        stash = session.config.stash
        counts = {"inputs": dict(stash[INPUTS]), "faults": dict(stash[FAULTS])}
        session.config.workeroutput["counted"] = counts | {"failed": stash[FAILED], "summary": stash[SUMMARY]}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Add the counts of a worker to those of the main process. A worker without counts died: it counts as a crash."""
    stash, counted = node.config.stash, getattr(node, "workeroutput", {}).get("counted")
    if counted is None:
        stash[FAILED].append(f"worker {node.gateway.id}")
        return
    stash[INPUTS].update(counted["inputs"])
    stash[FAULTS].update(counted["faults"])
    stash[FAILED].extend(counted["failed"])
    stash[SUMMARY].extend(counted["summary"])


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash[SUMMARY]:
        terminalreporter.write_line(line)
    for key, label in ((INPUTS, "inputs tried"), (FAULTS, "faults injected")):
        if counts := config.stash[key]:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
            terminalreporter.write_line(f"{counts.total():,} {label}: {kinds}")
    if any(config.stash[key] for key in (INPUTS, FAULTS, FAILED)):
        failed = len(set(config.stash[FAILED]))
        # Each of these tests asserts that nothing crashes, hangs, gets lost, or stays incomplete.
        found = f"in {failed} tests, see above" if failed else "0"
        terminalreporter.write_line(f"crashes: {found}; items lost: {found}")


@pytest.fixture(scope="session")
def inputs(request):
    """Counter of inputs: `inputs["damaged files"] += 1`. A failed test that uses it is reported as a crash."""
    return request.config.stash[INPUTS]


@pytest.fixture(scope="session")
def faults(request):
    """Counter of faults: `faults["disks full"] += 1`. A failed test that uses it is reported as a crash or a loss."""
    return request.config.stash[FAULTS]


def pytest_collection_modifyitems(items):
    import onnxruntime

    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs an NVIDIA GPU, and PyTorch finds none"
    if not is_built_in(onnxruntime, WEBGPU_PROVIDER) and not any(
        "webgpu" in each.package for each in installed_plugins()
    ):
        missing["webgpu"] = "needs ONNX Runtime's WebGPU provider; run: make test-webgpu"
    for item in items:
        for marker in missing.keys() & set(item.keywords):
            item.add_marker(pytest.mark.skip(reason=missing[marker]))
        sizes = item.callspec.params if hasattr(item, "callspec") else {}
        if "webgpu" in item.keywords and sizes.get("batch", 1) * sizes.get("latents", 1) > MOST_WEBGPU_LATENTS:
            item.add_marker(pytest.mark.skip(reason="WebGPU without a GPU takes 0.2 s for each latent"))


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path_factory):
    """Use an empty home and working folder and no cache, so that no engine of the user is found."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SAMEKIT_CACHE", raising=False)
    monkeypatch.chdir(home)


@pytest.fixture(scope="session", autouse=True)
def _exporter_is_not_traced():
    """Exclude PyTorch's exporter from coverage: its millions of calls take two thirds longer when they are traced."""
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
    """Return a function that exports a seeded model, once per run: name -> Engine.

    Tests must not change its files; see `own_engine`.
    """
    folder = tmp_path_factory.mktemp("engines")
    return functools.cache(lambda name: export(seeded(name), folder))


@pytest.fixture(scope="session")
def half_engine(engine_of, tmp_path_factory):
    """Return the folder of tiny-s in fp32 and fp16, exported once per run. Tests must not change its files."""
    out = tmp_path_factory.mktemp("half")
    shutil.copytree(engine_of("tiny-s").folder, out / "tiny-s")
    return export(seeded("tiny-s"), out, ["fp16"]).folder


@pytest.fixture(scope="session")
def bundled_engine(tmp_path_factory):
    """Export the model that comes with samekit, once per run. Tests must not change its files."""
    return export(load("same-tiny"), tmp_path_factory.mktemp("bundled"))


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """Return a function that writes a seeded checkpoint folder, once per run: name -> path.

    Tests must not change its files.
    """
    folder = tmp_path_factory.mktemp("checkpoints")

    def write(name):
        save_folder(published_config(name), seeded(name).tensors, folder / name)
        return folder / name

    return functools.cache(write)


@pytest.fixture(scope="session")
def same_of_diffusers(tmp_path_factory):
    """Return a model of `diffusers` with random weights, and the folder in which it is saved."""
    with warnings.catch_warnings():
        # Its imports warn about packages that it does not need here, its model about old weight norm.
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderSAME

        torch.manual_seed(0)
        model = AutoencoderSAME(
            encoder_channels=32,
            encoder_c_mults=(4,),
            encoder_transformer_depths=(4,),
            latent_dim=32,
            decoder_sinusoidal_blocks=(3,),
        ).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # As diffusers draws them, the branches are zero, and the input hardly changes the output.
                if name.endswith(("gamma", "beta", "bias", "scale", "new_tokens")):
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif name.endswith("alpha"):
                    parameter.fill_(1.5)
                elif name.endswith("weight_g"):
                    parameter.fill_(1)
                elif not name.endswith("weight_v"):
                    parameter.normal_(std=1.3 * parameter.shape[-1] ** -0.5)
            model.bottleneck.running_std.fill_(1.25)
        folder = tmp_path_factory.mktemp("diffusers") / "vae"
        model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def eager_of():
    """Return a function that opens a seeded model in eager PyTorch, the reference of the tests: name -> Same."""
    return functools.cache(lambda name: Same.from_checkpoint(seeded(name)))


@pytest.fixture(scope="session")
def built_of(engine_of, tmp_path_factory):
    """Return a function that copies an exported model and adds TensorRT engines, once per run: name -> Engine.

    It builds the engines that this machine supports.
    """
    folder = tmp_path_factory.mktemp("built")

    def build(name):
        shutil.copytree(engine_of(name).folder, folder / name)
        add_engines(Engine.load(folder / name), ["fp32"], "auto")
        return Engine.load(folder / name)

    return functools.cache(build)


@pytest.fixture(scope="session")
def place_of(engine_of, built_of):
    """Return a function that selects what to open: model name and backend name -> engine folder and device."""

    def folder_and_device(name, backend):
        if backend == "tensorrt":
            return built_of(name).folder, "cuda"
        return engine_of(name).folder, WEBGPU if backend == WEBGPU else "cpu"

    return folder_and_device


@pytest.fixture(scope="session")
def model_of(place_of):
    """Return a function that opens an exported model, once per run: name and backend -> AutoencoderModel."""

    def open_model(name, backend):
        folder, device = place_of(name, backend)
        name = "auto" if backend == WEBGPU else backend
        return AutoencoderModel.from_pretrained(folder, device, backend=name, threads=THREADS)

    return functools.cache(open_model)


@pytest.fixture(scope="session", params=KINDS)
def kind(request):
    """Name of a model; the two models differ in the kind of attention span."""
    return request.param


@pytest.fixture(scope="session", params=EACH_BACKEND)
def backend_name(request):
    """Name of a backend; tests run on each of them."""
    return request.param


@pytest.fixture(scope="session")
def model(model_of, kind, backend_name):
    """Each model on each backend."""
    return model_of(kind, backend_name)


@pytest.fixture(scope="session")
def backend(model):
    """The backend of `model`."""
    return model.autoencoder.backend


@pytest.fixture
def own_engine(engine_of, tmp_path):
    """Copy of the engine folder of tiny-s that the test may change."""
    folder = tmp_path / "own" / "tiny-s"
    shutil.copytree(engine_of("tiny-s").folder, folder)
    return Engine.load(folder)


@pytest.fixture
def ready_graphs(engine_of, monkeypatch):
    """Make exports of tiny-s copy graphs that were exported before and skip verification.

    Returns:
        a list to which each graph that an export writes is added, as class and file name.
    """
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


@pytest.fixture(scope="session")
def small_engine(tmp_path_factory):
    """Return an engine folder of small graphs, which tests must not change."""
    from small import write_engine

    folder = tmp_path_factory.mktemp("small") / "engine"
    write_engine(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """Path for the clips of a test; it does not exist yet."""
    return tmp_path / "data"


@pytest.fixture
def out(tmp_path):
    """Path for the latents of a test; it does not exist yet."""
    return tmp_path / "out"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Start a stand-in for the Hugging Face hub, and use an empty cache."""
    from hub_server import serve

    with serve(monkeypatch, tmp_path) as started:
        yield started


@pytest.fixture
def _impatient(monkeypatch):
    """Let the hub's client repeat requests without waiting, which would take half a minute in all."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Use an empty cache of the hub and no network."""
    from hub_server import use_cache
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    use_cache(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven by Playwright; the test is skipped if one of them is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
