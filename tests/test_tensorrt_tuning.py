"""`samekit tune` on the fake GPU, whose clock follows a model of cost."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from fake_tensorrt import FakeGpu, FakeTensorRT
from helpers import DIRECTIONS, assert_one_line
from test_tensorrt import put_build
from test_tensorrt_check import own_engine  # noqa: F401 a fixture

from samekit import AutoencoderModel
from samekit.backends.base import BackendOptions
from samekit.backends.selection import open_backend
from samekit.batches import Autoencoder
from samekit.cli.main import main
from samekit.engine.fingerprint import TENSORRT
from samekit.engine.spec import DECODER, ENCODER
from samekit.errors import BackendError
from samekit.tensorrt.backend import TensorRTBackend
from samekit.tensorrt.tuning import BATCHES, WINDOWS, tune


class Clock:
    """The time that the launches of a fake GPU take: a fixed part, and one for each latent."""

    def __init__(self, spec, call, latent, slow_above=10**9):
        self.spec, self.call, self.latent, self.slow_above = spec, call, latent, slow_above
        self.now = 0.0

    def launched(self, direction, array):
        latents = array.shape[0] * array.shape[2] // self.spec.layout(direction)[1]
        self.now += self.call + latents * self.latent * (10 if array.shape[0] > self.slow_above else 1)
        output = self.spec.input_shape(DECODER if direction == ENCODER else ENCODER, 1, 1)
        length = array.shape[2] // self.spec.layout(direction)[1]
        return np.ones((array.shape[0], output[1], output[2] * length), np.float32)

    def __call__(self):
        return self.now


def tuned(engine, clock):
    """Tune on a fake GPU of a clock; return the result and the backend that opens afterwards."""
    module = FakeTensorRT(engine.spec, clock.launched)
    build = put_build(engine)
    backend = TensorRTBackend(engine.spec, build, module, FakeGpu(module), BackendOptions())
    return tune(backend, clock), module


def test_calls_that_cost_much_are_made_large(own_engine):  # noqa: F811
    tuning, _ = tuned(own_engine, Clock(own_engine.spec, call=1, latent=1e-3))
    # A batch of 16 runs as two of 8.
    assert (tuning.window_batch, tuning.windows) == (8, {ENCODER: 256, DECODER: 256})
    assert {(case["direction"], case["window"], case["batch"]) for case in tuning.cases} == {
        (direction, window, batch) for direction in DIRECTIONS for window in WINDOWS for batch in BATCHES
    }


def test_calls_that_cost_nothing_are_kept_small(own_engine):  # noqa: F811
    tuning, _ = tuned(own_engine, Clock(own_engine.spec, call=0, latent=1e-2))
    # Only the context of a window is lost: 2 of 64 latents in the encoder, 4 in the decoder.
    assert tuning.window_batch == 1
    assert tuning.windows == {ENCODER: 128, DECODER: 256}


def test_batches_that_are_slow(own_engine):  # noqa: F811
    tuning, _ = tuned(own_engine, Clock(own_engine.spec, call=1, latent=1e-3, slow_above=2))
    assert tuning.window_batch <= 2


@pytest.fixture
def tune_here(own_engine, monkeypatch):  # noqa: F811
    """Let the command and the backend use a fake GPU."""
    module = FakeTensorRT(own_engine.spec)
    monkeypatch.setattr("samekit.tensorrt.opening.Gpu", lambda _: FakeGpu(module))
    monkeypatch.setattr("samekit.tensorrt.opening.installed_flavours", lambda: {TENSORRT: module})
    monkeypatch.setattr("samekit.tensorrt.tuning.BATCHES", (1, 2))
    monkeypatch.setattr("samekit.tensorrt.tuning.WINDOWS", (64, 512))
    put_build(own_engine)
    return lambda *options: CliRunner().invoke(main, ["tune", str(own_engine.folder), "--precision", "fp32", *options])


def test_the_command(tune_here, own_engine):  # noqa: F811
    done = tune_here("--json")
    assert done.exit_code == 0, done.output
    tuning = json.loads(done.stdout)
    assert tuning["gpu"] == "Fake GPU"
    backend = open_backend(own_engine.folder, "tensorrt", BackendOptions())
    assert backend.window_batch == tuning["window_batch"]
    codec = Autoencoder(backend)
    assert {direction: codec.windows(direction).size for direction in DIRECTIONS} == tuning["windows"]
    # What the user asks for takes precedence.
    model = AutoencoderModel.from_pretrained(own_engine.folder, backend="tensorrt", window=32, window_batch=3)
    assert model.autoencoder.backend.window_batch == 3
    assert model.autoencoder.windows(DECODER).size == 32
    done = tune_here()
    assert done.exit_code == 0, done.output
    *rows, last = done.output.splitlines()
    assert len(rows) == 8
    assert last.startswith("Fake GPU: windows of encoder ")


@pytest.mark.parametrize(
    "change",
    [
        {"windows": {ENCODER: 64}},
        {"windows": {ENCODER: 64, DECODER: 10**9}},
        {"windows": {ENCODER: 64, DECODER: True}},
        {"window_batch": 0},
        {"window_batch": "2"},
    ],
)
def test_records_that_are_damaged(tune_here, own_engine, change, caplog):  # noqa: F811
    tune_here()
    (path,) = own_engine.folder.glob("tensorrt/*/tune-8.9.json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    backend = open_backend(own_engine.folder, "tensorrt", BackendOptions())
    assert "tune-8.9.json: cannot be read" in caplog.text
    assert backend.window_batch == 8


def test_gpu_with_little_memory(own_engine, monkeypatch):  # noqa: F811
    """Batches that do not fit are left out."""
    module = FakeTensorRT(own_engine.spec)
    gpu = FakeGpu(module)
    backend = TensorRTBackend(own_engine.spec, put_build(own_engine), module, gpu, BackendOptions())
    limit = 100
    scratch = gpu.scratch

    def limited(size):
        if size > limit:
            raise RuntimeError("CUDA out of memory")
        return scratch(size)

    monkeypatch.setattr(gpu, "scratch", limited)
    with pytest.raises(BackendError, match="no window could be run in both directions; see") as caught:
        tune(backend)
    assert_one_line(caught.value)
    limit = 10 * 128
    assert {case["batch"] * case["window"] for case in tune(backend).cases} == {64, 128}
