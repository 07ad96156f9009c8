"""The contract of `samekit.backends.base` on every backend, and how backends are chosen and opened."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import THREADS
from faults import in_a_fork
from helpers import (
    BACKEND_NAMES,
    HOP,
    RATE,
    WEBGPU,
    FakeBackend,
    assert_close,
    assert_one_line,
    each_direction,
    in_one_pass,
    noise,
    run_direction,
)

from samekit import AutoencoderModel
from samekit.backends.base import BackendOptions
from samekit.backends.cpu import available_cpus
from samekit.backends.selection import AUTO, BACKENDS, open_backend
from samekit.engine.spec import ENCODER
from samekit.errors import (
    BackendError,
    BackendUnavailableError,
    CheckpointError,
    EngineError,
    EngineNotFoundError,
    InputError,
    NonFiniteError,
    SamekitError,
)
from samekit.packages import install_command
from samekit_export.backend import EagerBackend
from samekit_export.verify import example_input


def test_every_backend_is_held_to_the_contract():
    assert set(BACKENDS) == {AUTO, *BACKEND_NAMES}


@pytest.fixture
def opened(place_of, kind, backend_name):
    """Open a backend for one test, which may close it."""
    folder, device = place_of(kind, backend_name)
    return open_backend(
        folder, AUTO if backend_name == WEBGPU else backend_name, BackendOptions(device=device, threads=1)
    )


# Inputs that are refused: the cause, and how to make such an array from a valid one.
REFUSED = {
    "rank 2": lambda array: array[0],
    "rank 4": lambda array: array[None],
    "a feature too many": lambda array: np.concatenate([array, array[:, :1]], axis=1),
    "a feature too few": lambda array: array[:, 1:],
    "float64": lambda array: array.astype(np.float64),
    "float16": lambda array: array.astype(np.float16),
    "int16": lambda array: array.astype(np.int16),
    "no batch": lambda array: array[:0],
    "no latents": lambda array: array[:, :, :0],
}


@each_direction
class TestContract:
    @pytest.mark.parametrize("batch", [1, 2, 3])
    @pytest.mark.parametrize("latents", range(1, 10))
    def test_equals_eager_pytorch(self, backend, eager_of, kind, direction, latents, batch):
        array = example_input(backend.spec, direction, batch, latents, seed=latents)
        eager = eager_of(kind)
        expected = in_one_pass(eager.encode if direction == ENCODER else eager.decode, array)
        assert_close(expected, run_direction(backend, direction, array), 100)

    def test_shapes_are_those_of_the_spec(self, backend, direction):
        spec = backend.spec
        audio, latents = (2, spec.channels, 3 * spec.hop), (2, spec.latent_width, 3)
        before, after = (audio, latents) if direction == ENCODER else (latents, audio)
        assert run_direction(backend, direction, np.zeros(before, np.float32)).shape == after

    def test_results_are_the_callers_own(self, backend, direction):
        array = example_input(backend.spec, direction, 1, 4, seed=0)
        first = run_direction(backend, direction, array)
        kept = first.copy()
        second = run_direction(backend, direction, array * 2)
        assert np.array_equal(first, kept)
        assert not np.array_equal(second, kept)
        assert first.flags.writeable
        assert not np.shares_memory(first, second)
        assert not np.shares_memory(first, array)

    def test_pieces_run_as_one_batch(self, backend, direction):
        """Shorter pieces are padded with zeros; a second result may be pending."""
        pieces = [
            example_input(backend.spec, direction, rows, latents, seed=rows) for rows, latents in ((1, 3), (2, 5))
        ]
        longest = pieces[1].shape[2]
        first = np.pad(pieces[0], [(0, 0), (0, 0), (0, longest - pieces[0].shape[2])])
        fetches = [backend.submit(direction, pieces) for _ in range(backend.most_pending)]
        expected = run_direction(backend, direction, np.concatenate([first, pieces[1]]))
        for fetch in fetches:
            assert_close(expected, fetch(), 120)

    def test_input_is_left_alone(self, backend, direction):
        array = example_input(backend.spec, direction, 1, 3, seed=0)
        kept = array.copy()
        run_direction(backend, direction, array)
        assert np.array_equal(array, kept)

    def test_same_input_same_output(self, backend, direction):
        array = example_input(backend.spec, direction, 1, 3, seed=0)
        assert np.array_equal(run_direction(backend, direction, array), run_direction(backend, direction, array))

    @pytest.mark.parametrize("layout", ["read-only", "reversed", "Fortran order"])
    def test_any_memory_layout(self, backend, direction, layout):
        array = example_input(backend.spec, direction, 1, 3, seed=0)
        if layout == "read-only":
            other = array.copy()
            other.flags.writeable = False
        elif layout == "reversed":
            other = array[..., ::-1].copy()[..., ::-1]
        else:
            other = np.asfortranarray(array)
        assert np.array_equal(run_direction(backend, direction, other), run_direction(backend, direction, array))

    @pytest.mark.parametrize("cause", REFUSED)
    def test_what_it_does_not_take(self, backend, direction, monkeypatch, cause):
        monkeypatch.setattr(backend, "_run", lambda *_: pytest.fail("it ran"))
        array = REFUSED[cause](example_input(backend.spec, direction, 1, 2, seed=0))
        with pytest.raises(InputError, match=rf"the {direction} takes .*, got .*\[.*\]; pass such an array$"):
            run_direction(backend, direction, array)

    def test_used_by_several_threads(self, opened, direction):
        arrays = [example_input(opened.spec, direction, 1, 3, seed) for seed in range(8)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda array: run_direction(opened, direction, array), arrays))
        for array, output in zip(arrays, together, strict=True):
            assert_close(run_direction(opened, direction, array), output, 110)

    def test_close(self, opened, direction):
        array = example_input(opened.spec, direction, 1, 1, seed=0)
        with opened as same:
            assert same is opened
            run_direction(opened, direction, array)
        opened.close()
        with pytest.raises(SamekitError):
            run_direction(opened, direction, array)


def test_parts_of_a_latent_are_refused(backend, monkeypatch):
    monkeypatch.setattr(backend, "_run", lambda *_: pytest.fail("it ran"))
    for length in (1, backend.spec.hop - 1, backend.spec.hop + 1):
        with pytest.raises(InputError, match=f"multiple of {backend.spec.hop}, got .*{length}"):
            backend.encode(np.zeros((1, 2, length), np.float32))


# --- Checks of the base class ------------------------------------------------------------------------------


@each_direction
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_output_that_is_not_finite(direction, value):
    def answer(direction, array):
        output = FakeBackend().zeros(direction, array)
        output[-1, -1, -1] = value
        return output

    array = example_input(FakeBackend().spec, direction, 2, 3, seed=0)
    with pytest.raises(NonFiniteError, match=f"the fp32 {direction} .fake. produced NaN or infinity") as caught:
        run_direction(FakeBackend(answer), direction, array)
    assert_one_line(caught.value)
    with pytest.raises(NonFiniteError, match='use precision "fp32"'):
        run_direction(FakeBackend(answer, precision="fp16"), direction, array)


@each_direction
def test_output_of_a_wrong_shape(direction):
    backend = FakeBackend(lambda direction, array: FakeBackend().zeros(direction, array)[..., 1:])
    with pytest.raises(BackendError, match=f"the {direction} returned"):
        run_direction(backend, direction, example_input(backend.spec, direction, 1, 3, seed=0))


# --- Choosing a backend ------------------------------------------------------------------------------------


def test_unknown_names():
    with pytest.raises(InputError, match=r"unknown backend 'tenserrt'; choose one of auto, .*, openvino, torch"):
        open_backend("tiny-s", "tenserrt", BackendOptions())
    with pytest.raises(InputError, match="unknown precision 'fp8'; choose one of fp32, fp16, int8, bf16"):
        open_backend("tiny-s", AUTO, BackendOptions(precision="fp8"))


@pytest.mark.parametrize(
    "options",
    [{"device": "tpu"}, {"device": "cuda:0"}, {"threads": 0}, {"threads": -1}, {"threads": "2"}, {"threads": 2**31}],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_no_backend_can_use(engine_of, backend, options):
    with pytest.raises(InputError, match=next(iter(options))):
        open_backend(engine_of("tiny-s").folder, backend, BackendOptions(**options))


def test_lists_of_providers():
    options = BackendOptions(precision="int8", providers=["CPUExecutionProvider"])
    assert options == BackendOptions(precision="int8", providers=("CPUExecutionProvider",))


def test_auto_takes_the_first_that_works(engine_of, caplog):
    caplog.set_level(logging.INFO, "samekit")
    backend = open_backend(engine_of("tiny-s").folder, AUTO, BackendOptions(device="cpu"))
    assert (backend.name, backend.device, backend.precision) == ("onnxruntime", "cpu", "fp32")
    assert caplog.messages == ["backend onnxruntime on cpu, fp32"]


def test_auto_passes_over_what_cannot_be_used(engine_of, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    caplog.set_level(logging.INFO, "samekit")
    backend = open_backend(engine_of("tiny-s").folder, AUTO, BackendOptions(device="cpu"))
    assert (backend.name, backend.precision) == ("torch", "fp32")
    refusal, second, choice, warning = caplog.messages
    assert second.startswith("backend openvino passed over: openvino is not installed; run: ")
    assert refusal.startswith("backend onnxruntime passed over: onnxruntime is not installed; run: ")
    assert choice == "backend torch on cpu, fp32"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [warning]
    assert "running in PyTorch, slower than the engine" in warning
    assert install_command("cpu") in warning


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("backend", [AUTO, "onnxruntime"])
def test_precision_that_was_not_exported_is_refused(engine_of, backend, precision):
    """PyTorch would take its place at an eighth of the speed, so it has to be asked for."""
    folder = engine_of("tiny-s").folder
    with pytest.raises(BackendUnavailableError) as caught:
        open_backend(folder, backend, BackendOptions(precision=precision))
    message = str(caught.value)
    assert message.startswith(f"{folder}: no {precision} graph (there is: fp32); run: samekit export ")
    assert message.endswith(f" --precision {precision}")


def test_auto_names_one_cause_and_logs_all(own_engine, caplog, monkeypatch):
    path = own_engine.folder / "spec.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    source = {"kind": "folder", "folder": str(own_engine.folder / "elsewhere"), "name": "tiny-s"}
    path.write_text(json.dumps(document | {"source": source}), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("samekit.backends.selection.has_driver", lambda: False)
    caplog.set_level(logging.INFO, "samekit")
    with pytest.raises(BackendUnavailableError) as caught:
        open_backend(own_engine.folder, AUTO, BackendOptions())
    told = f"{own_engine.folder} cannot be run: onnxruntime is not installed; run: {install_command('cpu')}"
    assert str(caught.value) == told
    assert [message.split()[1] for message in caplog.messages] == list(BACKEND_NAMES)
    with pytest.raises(CheckpointError, match="elsewhere"):
        open_backend(own_engine.folder, "torch", BackendOptions(device="cpu"))


def test_half_precision_in_pytorch(engine_of, eager_of, kind):
    backend = open_backend(engine_of(kind).folder, "torch", BackendOptions(precision="fp16", device="cpu"))
    latents = example_input(backend.spec, "decoder", 2, 5, seed=0)
    assert_close(in_one_pass(eager_of(kind).decode, latents), backend.decode(latents), 50)


# Settings of PyTorch for a thread or the whole process, which must not change the results of a backend.
SETTINGS = {
    "autocast to bfloat16": lambda stack: stack.enter_context(torch.autocast("cpu", torch.bfloat16)),
    "autocast to float16": lambda stack: stack.enter_context(torch.autocast("cpu", torch.float16)),
    "bfloat16 in products": lambda _: torch.set_float32_matmul_precision("medium"),
    "TF32 everywhere": lambda _: setattr(torch.backends, "fp32_precision", "tf32"),
    "bfloat16 on CPUs": lambda _: setattr(torch.backends.mkldnn, "fp32_precision", "bf16"),
    "float64 by default": lambda _: torch.set_default_dtype(torch.float64),
    "bfloat16 by default": lambda _: torch.set_default_dtype(torch.bfloat16),
    "another device by default": lambda _: torch.set_default_device("meta"),
    "gradients": lambda stack: stack.enter_context(torch.enable_grad()),
}


# Where PyTorch keeps the precisions of float32 products, the wider ones first.
PRECISIONS = (
    *(torch.backends, torch.backends.cudnn, torch.backends.mkldnn),
    *(torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),
    *(torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn),
)


def pytorch_settings():
    """Return the current values of everything that SETTINGS change."""
    precisions = [place.fp32_precision for place in PRECISIONS]
    return [torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.get_default_device(), *precisions]


@pytest.fixture
def pytorch_as_set(request):
    """Apply one of SETTINGS, and restore PyTorch's defaults at the end."""
    before = pytorch_settings()
    with ExitStack() as stack:
        SETTINGS[request.param](stack)
        yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    for place, precision in zip(PRECISIONS, before[-len(PRECISIONS) :], strict=True):
        place.fp32_precision = "none"
        if place.fp32_precision != precision:
            place.fp32_precision = precision
    assert pytorch_settings() == before
    # Reading this older setting raises an error if it contradicts the newer ones.
    assert torch.backends.cudnn.allow_tf32


class ForksMeanwhile(torch.nn.Module):
    """A model that forks the process while it runs, and keeps the child's exit status."""

    child = None

    def encode(self, audio):
        self.child = in_a_fork(self.check)
        return audio[:, :1, ::4]

    def check(self):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


@pytest.mark.parametrize("pytorch_as_set", ["bfloat16 on CPUs"], indirect=True)
@pytest.mark.usefixtures("pytorch_as_set")
def test_settings_of_pytorch_are_the_users_in_a_process_that_is_forked_meanwhile():
    spec, model = FakeBackend().spec, ForksMeanwhile()
    with EagerBackend(spec, model, BackendOptions(device="cpu")) as backend, suppress(BackendError):
        # The model's output has a wrong shape.
        backend.encode(np.zeros((1, spec.channels, spec.hop), np.float32))
    assert model.child == 0


@pytest.mark.parametrize(("asked", "set_before", "set_after"), [(None, 8, 3), (None, 2, 2), (5, 8, 5)])
def test_threads_of_pytorch(checkpoint_of, monkeypatch, asked, set_before, set_after):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    try:
        torch.set_num_threads(set_before)
        open_backend(checkpoint_of("tiny-s"), "torch", BackendOptions(device="cpu", threads=asked))
        assert torch.get_num_threads() == set_after
    finally:
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="module")
def as_it_comes(model_of, engine_of, checkpoint_of):
    """Return folders, an open model, and its results with PyTorch's default settings."""
    model = model_of("tiny-s", "torch")
    latents = model.encode(noise((2, 3 * HOP)), RATE)
    return (engine_of("tiny-s").folder, checkpoint_of("tiny-s")), model, latents, model.decode(latents)


@pytest.mark.parametrize("pytorch_as_set", SETTINGS, indirect=True)
@pytest.mark.usefixtures("pytorch_as_set")
def test_pytorch_computes_as_asked_whatever_is_set(as_it_comes):
    folders, model, latents, audio = as_it_comes
    before = pytorch_settings()
    opened = [AutoencoderModel.from_pretrained(folder, "cpu", backend="torch") for folder in folders]
    for each in (model, *opened):
        assert np.array_equal(each.encode(noise((2, 3 * HOP)), RATE), latents)
        assert np.array_equal(each.decode(latents), audio)
    assert pytorch_settings() == before


def test_checkpoint_folder_runs_in_pytorch(checkpoint_of, caplog):
    folder = checkpoint_of("tiny-s")
    backend = open_backend(folder, AUTO, BackendOptions(device="cpu"))
    assert backend.name == "torch"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"run: samekit export {folder}" in record.getMessage()
    assert open_backend(folder, "torch", BackendOptions(device="cpu")).name == "torch"


def test_named_backend_does_not_give_way(engine_of, checkpoint_of):
    folder = checkpoint_of("tiny-s")
    with pytest.raises(EngineNotFoundError, match=f"run: samekit export {folder}"):
        open_backend(folder, "onnxruntime", BackendOptions())
    with pytest.raises(BackendUnavailableError, match=r"no fp16 .*fp32\); run: samekit export .*--precision fp16"):
        open_backend(engine_of("tiny-s").folder, "onnxruntime", BackendOptions(precision="fp16"))
    with pytest.raises(BackendUnavailableError, match="no int8"):
        open_backend(engine_of("tiny-s").folder, "torch", BackendOptions(precision="int8"))


def test_no_engine(tmp_path):
    with pytest.raises(EngineNotFoundError, match=r"no engine for 'same-s'.*; run: samekit export same-s") as caught:
        open_backend("same-s", "onnxruntime", BackendOptions())
    assert isinstance(caught.value, FileNotFoundError)
    # A path beside existing folders is not looked up on the hub.
    with pytest.raises(EngineNotFoundError, match="check the path"):
        open_backend(tmp_path / "nowhere", AUTO, BackendOptions())
    # An existing folder without a model is refused too.
    for backend in ("torch", AUTO):
        with pytest.raises(SamekitError, match="; pass a folder that holds") as caught:
            open_backend(tmp_path, backend, BackendOptions())
        assert_one_line(caught.value)


@pytest.mark.parametrize("name", ["same-x", ""])
@pytest.mark.parametrize("backend", [AUTO, "torch"])
def test_name_of_nothing(monkeypatch, caplog, backend, name):
    monkeypatch.setenv("SAMEKIT_CACHE", "/my/cache")
    for package in ("safetensors", "torch"):
        with pytest.raises(EngineNotFoundError) as caught:
            open_backend(name, backend, BackendOptions())
        message = str(caught.value)
        assert message.startswith(f"no engine for {name!r} in . or engines or /my/cache, and {name!r} is no published")
        assert message.endswith("no folder; pass one of these")
        assert_one_line(caught.value)
        # An export could not work, so it is not advised, with and without PyTorch.
        assert "samekit export" not in message + caplog.text
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("name", ["./no/where", "a/b/c"])
def test_path_of_nothing(name):
    with pytest.raises(EngineNotFoundError, match=f"and {name}: there is no such folder; check the path$"):
        open_backend(name, "torch", BackendOptions())


def test_only_the_backend_that_can_serve_is_named(own_engine, monkeypatch):
    path = own_engine.folder / "spec.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["graphs"]["int8"] = document["graphs"]["fp32"]
    path.write_text(json.dumps(document))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError) as caught:
        open_backend(own_engine.folder, AUTO, BackendOptions(precision="int8"))
    told = f"{own_engine.folder} cannot be run: onnxruntime is not installed; run: {install_command('cpu')}"
    assert str(caught.value) == told


def test_gpu_without_a_driver(engine_of, checkpoint_of, monkeypatch):
    """The message names no package to install, because every backend needs the driver."""
    monkeypatch.setattr("samekit.backends.selection.has_driver", lambda: False)
    for model in (engine_of("tiny-s").folder, checkpoint_of("tiny-s")):
        with pytest.raises(BackendUnavailableError) as caught:
            open_backend(model, AUTO, BackendOptions(device="cuda"))
        assert str(caught.value) == "device cuda needs an NVIDIA driver, and there is none; choose device cpu"


def test_package_that_is_missing(engine_of, checkpoint_of, monkeypatch):
    engine = engine_of("tiny-s").folder
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailableError, match=r"run: .*pip install 'samekit\[cpu\]'") as caught:
        open_backend(engine, "onnxruntime", BackendOptions())
    assert isinstance(caught.value, ImportError)
    assert open_backend(engine, AUTO, BackendOptions(device="cpu")).name == "torch"
    monkeypatch.setitem(sys.modules, "samekit_export.open_backend", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'samekit\[export\]'"):
        open_backend(engine, "torch", BackendOptions())
    with pytest.raises(EngineNotFoundError, match=r"pip install 'samekit\[export\]'"):
        open_backend(checkpoint_of("tiny-s"), AUTO, BackendOptions())


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_packages_that_the_checkpoint_needs(engine_of, checkpoint_of, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    install = rf"{package}.*; run: .*pip install 'samekit\[export\]'"
    with pytest.raises(BackendUnavailableError, match=install) as caught:
        open_backend(engine_of("tiny-s").folder, "torch", BackendOptions())
    assert_one_line(caught.value)
    for backend in ("torch", AUTO):
        with pytest.raises(EngineNotFoundError, match=install) as caught:
            open_backend(checkpoint_of("tiny-s"), backend, BackendOptions())
        assert_one_line(caught.value)


def test_package_that_the_hub_needs(checkpoint_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EngineNotFoundError, match=r"no engine for 'same-s'.*huggingface_hub.*pip install") as caught:
        open_backend("same-s", AUTO, BackendOptions())
    assert_one_line(caught.value)
    assert open_backend(checkpoint_of("tiny-s"), "torch", BackendOptions(device="cpu")).name == "torch"


def test_pytorch_on_an_engine_whose_checkpoint_changed(own_engine):
    path = own_engine.folder / "spec.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | {"source": document["source"] | {"seed": 1}}), encoding="utf-8")
    with pytest.raises(BackendUnavailableError, match="export it again") as caught:
        open_backend(own_engine.folder, "torch", BackendOptions())
    assert_one_line(caught.value)


# --- ONNX Runtime ------------------------------------------------------------------------------------------


def test_provider_that_this_build_lacks(engine_of):
    for options in (
        BackendOptions(providers=("NoSuchProvider",)),
        BackendOptions(providers=("CPUExecutionProvider", "NoSuchProvider")),
    ):
        with pytest.raises(BackendUnavailableError, match="has no NoSuchProvider") as caught:
            open_backend(engine_of("tiny-s").folder, "onnxruntime", options)
        assert_one_line(caught.value)


def test_cuda_where_there_is_none(engine_of, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for backend in (*BACKEND_NAMES, AUTO):
        with pytest.raises(BackendUnavailableError):
            open_backend(engine_of("tiny-s").folder, backend, BackendOptions(device="cuda"))


@pytest.fixture
def build_for_gpus(monkeypatch):
    """Replace ONNX Runtime by a GPU build whose CUDA provider never starts."""
    session = SimpleNamespace(
        get_providers=lambda: ["CPUExecutionProvider"],
        get_inputs=lambda: [SimpleNamespace(name="latents")],
        run=lambda *_: [np.zeros((1, 2, 4096), np.float32)],
    )
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: session)


@pytest.mark.usefixtures("build_for_gpus")
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"providers": ("CUDAExecutionProvider",)}], ids=str)
def test_provider_that_did_not_start(engine_of, options):
    backend = open_backend(engine_of("tiny-s").folder, "onnxruntime", BackendOptions(device_id=1, **options))
    assert (backend.device, backend.torch_device) == ("cuda", "cuda:1")
    with pytest.raises(BackendUnavailableError, match="CUDAExecutionProvider did not start"):
        backend.decode(np.zeros((1, 32, 1), np.float32))


@pytest.mark.usefixtures("build_for_gpus")
@pytest.mark.parametrize("driver", [False, True])
def test_provider_that_nobody_asked_for_gives_way(engine_of, monkeypatch, caplog, driver):
    monkeypatch.setattr("samekit.backends.onnxruntime.has_driver", lambda: driver)
    backend = open_backend(engine_of("tiny-s").folder, "onnxruntime", BackendOptions())
    assert backend.device == ("cuda" if driver else "cpu")
    for _ in range(2):
        assert backend.decode(np.zeros((1, 32, 1), np.float32)).shape == (1, 2, 4096)
    assert (backend.device, backend.torch_device) == ("cpu", "cpu")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith(": running on the CPU")


def test_threads(engine_of, monkeypatch):
    import onnxruntime

    asked = []

    def session(path, options, **rest):
        asked.append(options.intra_op_num_threads)
        return onnxruntime_session(path, options, **rest)

    onnxruntime_session = onnxruntime.InferenceSession
    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    for threads in (1, 3, None):
        backend = open_backend(engine_of("tiny-s").folder, "onnxruntime", BackendOptions(threads=threads))
        backend.decode(np.zeros((1, 32, 1), np.float32))
    assert asked == [1, 3, available_cpus()]


def test_damaged_folder_shows_on_opening(own_engine):
    graph = own_engine.folder / "decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"decoder\.onnx: has \d+ bytes instead of \d+; export"):
        open_backend(own_engine.folder, AUTO, BackendOptions())
    graph.unlink()
    with pytest.raises(EngineError, match=r"decoder\.onnx: is missing; export"):
        open_backend(own_engine.folder, AUTO, BackendOptions())


def test_graph_of_the_right_size_and_wrong_contents(own_engine):
    graph = own_engine.folder / "decoder.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    backend = open_backend(own_engine.folder, "onnxruntime", BackendOptions())
    with pytest.raises(
        BackendError, match=r"decoder\.onnx: ONNX Runtime [\d.]+ cannot open it .*; export it again, or"
    ) as caught:
        backend.decode(np.zeros((1, 32, 1), np.float32))
    assert_one_line(caught.value)


def test_failure_while_running(engine_of, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory\nin 7 nodes")

    backend = open_backend(engine_of("tiny-s").folder, "onnxruntime", BackendOptions())
    session = SimpleNamespace(run=fail, get_inputs=lambda: [SimpleNamespace(name="latents")])
    monkeypatch.setattr(backend, "_session", lambda _: session)
    with pytest.raises(BackendError, match=r"out of memory\); try a smaller window") as caught:
        backend.decode(np.zeros((1, 32, 1), np.float32))
    assert_one_line(caught.value)


# --- ONNX Runtime: a folder that changes while it is open -------------------------------------------------------


def three_calls(backend, between):
    """Return the outputs of three equal calls; `between` runs before the third one, which packs the weights."""
    audio = noise((1, 2, 3 * HOP))
    outputs = [backend.encode(audio), backend.encode(audio)]
    between()
    return [*outputs, backend.encode(audio)]


def exported_again(engine):
    """Replace the encoder's graph and its digest, as another export would."""
    path = engine.graph(ENCODER, "fp32")
    data = bytearray(path.read_bytes())
    document = json.loads((engine.folder / "spec.json").read_text())
    document["graphs"]["fp32"][ENCODER]["sha256"] = "0" * 64
    (engine.folder / "spec.json").write_text(json.dumps(document))
    new = path.with_suffix(".new")
    new.write_bytes(bytes(len(data)))
    new.replace(path)


@pytest.mark.parametrize("change", ["exported again", "gone"])
def test_what_was_opened_is_what_runs(own_engine, caplog, change):
    def between():
        exported_again(own_engine) if change == "exported again" else shutil.rmtree(own_engine.folder)

    options = BackendOptions(device="cpu", threads=THREADS)
    with open_backend(own_engine.folder, "onnxruntime", options) as backend:
        first, second, third = three_calls(backend, between)
        assert np.array_equal(first, second)
        assert np.array_equal(first, third)
        assert "weights of the encoder are not packed" in caplog.text
        with pytest.raises(EngineError) as caught:
            backend.decode(np.zeros((1, 32, 2), np.float32))
        assert_one_line(caught.value)


def test_another_precision_beside_it_is_no_change(own_engine, caplog):
    document = json.loads((own_engine.folder / "spec.json").read_text())
    document["graphs"]["fp16"] = document["graphs"]["fp32"]

    def between():
        (own_engine.folder / "spec.json").write_text(json.dumps(document))

    with open_backend(own_engine.folder, "onnxruntime", BackendOptions(device="cpu", threads=THREADS)) as backend:
        three_calls(backend, between)
    assert "not packed" not in caplog.text


def test_weights_are_not_held_twice_while_they_are_packed(engine_of, monkeypatch):
    """The mapped session is freed before the packed one opens."""
    still_there = []
    options = BackendOptions(device="cpu", threads=THREADS)
    with open_backend(engine_of("tiny-s").folder, "onnxruntime", options) as backend:
        open_session = backend._open

        def opened(graph, direction, *, packed):
            if packed:
                still_there.append(mapped() is not None)
            return open_session(graph, direction, packed=packed)

        def between():
            nonlocal mapped
            mapped = weakref.ref(backend._sessions[ENCODER])
            monkeypatch.setattr(backend, "_open", opened)

        mapped = None
        three_calls(backend, between)
    assert still_there == [False]


def test_pytorch_without_memory(engine_of, monkeypatch):
    def fail(_audio):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.\nmore")

    with open_backend(engine_of("tiny-s").folder, "torch", BackendOptions(device="cpu")) as backend:
        monkeypatch.setattr(backend._model, "encode", fail)
        with pytest.raises(BackendError, match=r"PyTorch failed on \[1, 2, 4096\] .*; try a smaller window") as caught:
            backend.encode(np.zeros((1, 2, HOP), np.float32))
        assert_one_line(caught.value)
