"""int8 graphs: accuracy of every kind, length and level; what stays float32; what runs them and what refuses to."""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conftest import THREADS
from helpers import HALVES, HOP, assert_close, assert_one_line, each_half, in_one_pass, noise, run_half, seeded

from samekit.autoencoder import Autoencoder
from samekit.backends.base import BackendOptions
from samekit.backends.ort import CPU_PROVIDER, OnnxRuntimeBackend
from samekit.backends.tensorrt import open_tensorrt
from samekit.cli import main
from samekit.errors import BackendUnavailableError
from samekit.spec import ENCODER
from samekit.store import Engine
from samekit_export import int8, to_onnx
from samekit_export.checkpoint import load_bundled, random_checkpoint
from samekit_export.export import GRAPHS, export
from samekit_export.int8 import Int8Linear, prepare_, products, quantize_
from samekit_export.model import Same
from samekit_export.rounding import Compensation, to_int8
from samekit_export.to_onnx import OPSET
from samekit_export.verify import snr_db

# What the tier promises on seeded weights.
LEAST_DB = 37

INT8 = BackendOptions(precision="int8", device="cpu", threads=THREADS)


@pytest.fixture(scope="session")
def int8_of(engine_of, tmp_path_factory):
    """An exported model with int8 graphs beside the float32 ones, once a run: name -> Engine."""
    folder = tmp_path_factory.mktemp("int8")

    def add(name):
        shutil.copytree(engine_of(name).folder, folder / name)
        return export(seeded(name), folder, ["int8"])

    return functools.cache(add)


@pytest.fixture
def opened(int8_of, kind):
    with OnnxRuntimeBackend(int8_of(kind), INT8) as backend:
        yield backend


def inputs(half, latents, seed, batch=1):
    """Loud, usual and quiet noise, and a tone, none of which the export has seen."""
    if half == ENCODER:
        shape = (batch, 2, latents * HOP)
        seconds = np.arange(latents * HOP) / 44_100
        tone = np.broadcast_to(0.3 * np.sin(2 * np.pi * 440 * seconds), shape)
        return [noise(shape, seed, level) for level in (0.5, 0.2, 0.02)] + [tone.astype(np.float32)]
    return [noise((batch, 32, latents), seed, level) for level in (1.5, 1.0, 0.5)]


def eager(model, half, array):
    with torch.inference_mode():
        return (model.encode if half == ENCODER else model.decode)(torch.from_numpy(array)).numpy()


# --- Accuracy ----------------------------------------------------------------------------------------------


@each_half
@pytest.mark.parametrize(("batch", "latents"), [(1, 1), (1, 7), (3, 4), (1, 40)])
def test_accuracy(opened, eager_of, kind, half, batch, latents):
    for array in inputs(half, latents, seed=latents + 100, batch=batch):
        measured = snr_db(eager(eager_of(kind), half, array), run_half(opened, half, array))
        assert LEAST_DB <= measured < 60, f"{measured:.1f} dB"


@each_half
def test_accuracy_of_other_weights(kind, half):
    model = Same.from_checkpoint(random_checkpoint(kind, seed=1))
    graph = GRAPHS[half](model)
    quantize_(graph, model)
    for array in inputs(half, 9, seed=5):
        assert snr_db(eager(model, half, array), in_one_pass(graph, array)) >= LEAST_DB


@each_half
def test_silence(opened, half):
    """A range of nothing is no division by zero."""
    array = np.zeros_like(inputs(half, 3, seed=0)[0])
    assert np.isfinite(run_half(opened, half, array)).all()


@each_half
def test_same_windows_give_the_same_numbers(opened, half):
    codec, array = Autoencoder(opened, window=24), inputs(half, 61, seed=3)[0]
    opened.expect_many_calls(half)
    assert np.array_equal(run_half(codec, half, array), run_half(codec, half, array))


def test_rotation_spares_rare_large_values():
    """One value a row that is 50 times as large takes the range; rotated it is spread."""
    rows = torch.from_numpy(noise((256, 192), level=1))
    rows[:, 7] *= 50
    linear = functools.partial(torch.nn.functional.linear, rows)
    weight = torch.from_numpy(noise((64, 192), seed=1, level=1))
    original = int8.Linear(weight.double())
    plain, rotated = (
        snr_db(linear(weight).numpy(), Int8Linear(original, turn=turn)(rows).numpy())
        for turn in (None, int8.rotation(int8.TURNED))
    )
    assert rotated > plain + 3


def test_errors_of_weights_cancel_over_rows_that_are_correlated():
    """Rows of twelve dimensions in 96 features leave room for most of the error; others of the kind gain as much."""
    mixed = noise((12, 96), level=1)
    seen, others = (
        torch.from_numpy(noise((400, 12), seed, 1) @ mixed + noise((400, 96), seed + 7, 0.1)) for seed in (1, 2)
    )
    weight = torch.from_numpy(noise((96, 64), seed=3, level=1))
    nearest, compensated = (
        snr_db((others @ weight).numpy(), (others @ (steps.float() * scale)).numpy())
        for steps, scale in (to_int8(weight), to_int8(weight, Compensation(seen.T @ seen)))
    )
    assert compensated > nearest + 8


def test_rows_without_correlation_lose_nothing():
    rows, weight = torch.from_numpy(noise((4000, 96))), torch.from_numpy(noise((96, 64), seed=3))
    steps, scale = to_int8(weight)
    compensated, same_scale = to_int8(weight, Compensation(rows.T @ rows))
    assert torch.equal(scale, same_scale)
    assert steps.abs().max() == 127
    assert (steps != compensated).float().mean() < 0.05


@each_half
def test_preparing_changes_no_function(eager_of, kind, half):
    """Rotated heads, scaled features: the float32 products of a prepared graph give what those of the graph gave."""
    array = inputs(half, 5, seed=1)[0]
    model = eager_of(kind)
    graph = GRAPHS[half](model)
    expected = in_one_pass(graph, array)
    found = prepare_(graph, model)
    assert len(found) == 28
    assert not any(isinstance(module, Int8Linear) for module in graph.modules())
    assert_close(expected, in_one_pass(graph, array), 105)


def test_large_features_are_made_small():
    """A trained model's norms have a few features that are far larger than the others."""
    model = Same.from_checkpoint(load_bundled("same-tiny"))
    graph = GRAPHS["encoder"](model)
    with torch.no_grad():
        given = list(int8.examples(graph, model, 24))
        before = int8.moments_of(graph, given)
        int8.migrate_(graph, before.copy())
        after = int8.moments_of(graph, given)

    def unevenness(moment):
        size = moment.diagonal().sqrt()
        return float(size.max() / size.median())

    for place in ("0.norm", "0.ff_norm", "1.norm", "1.ff_norm"):
        assert unevenness(after[place]) < 0.7 * unevenness(before[place])


@each_half
def test_trained_weights(half):
    """Outliers of trained weights cost accuracy, not the tier: all but a few products are int8."""
    model = Same.from_checkpoint(load_bundled("same-tiny"))
    graph = GRAPHS[half](model)
    total = len(list(products(graph)))
    kept = quantize_(graph, model)
    assert len(kept) <= total // 7
    hop, width = model.config.hop, model.config.latent_width
    array = noise((1, 2, 40 * hop), seed=8) if half == ENCODER else noise((1, width, 40), seed=8, level=0.7)
    assert snr_db(eager(model, half, array), in_one_pass(graph, array)) >= LEAST_DB


# --- What stays float32 --------------------------------------------------------------------------------------


@pytest.fixture
def graph(eager_of):
    """The graph that amplifies errors most."""
    return GRAPHS["decoder"](eager_of("tiny-l"))


@pytest.mark.parametrize(("target", "fewest", "most"), [(10, 0, 0), (42, 4, 27), (200, 28, 28)])
def test_as_much_stays_float32_as_the_target_takes(graph, eager_of, target, fewest, most):
    total = len(list(products(graph)))
    assert total == 28
    model = eager_of("tiny-l")
    (array, *_) = int8.examples(graph, model, 5)
    with torch.no_grad():
        wanted = graph(array).numpy()
        kept = quantize_(graph, model, target, latents=5)
        output = graph(array).numpy()
    assert fewest <= len(kept) <= most
    assert len(set(kept)) == len(kept) == total - sum(isinstance(module, Int8Linear) for module in graph.modules())
    assert snr_db(wanted, output) >= min(target, 100)
    for block in graph.trunk.blocks:
        assert block.apart == isinstance(block.ff, Int8Linear)


# --- The files -----------------------------------------------------------------------------------------------


@each_half
def test_graphs_are_standard_and_fuse(int8_of, kind, half, tmp_path):
    path = int8_of(kind).graph(half, "int8")
    proto = onnx.load(path)
    assert {(opset.domain, opset.version) for opset in proto.opset_import} == {("", OPSET)}
    assert {node.domain for node in proto.graph.node} == {""}
    found = Counter(node.op_type for node in proto.graph.node)
    assert found["MatMulInteger"] >= found["DynamicQuantizeLinear"] > 0
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    # It notes that such a file is for this machine only.
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=[CPU_PROVIDER])
    fused = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    assert fused["MatMulIntegerToFloat"] + fused["DynamicQuantizeMatMul"] == found["MatMulInteger"]
    assert fused["MatMulInteger"] == 0


def test_folder(int8_of, engine_of):
    engine = int8_of("tiny-s")
    engine.check_digests()
    assert list(engine.spec.graphs) == ["fp32", "int8"]
    assert engine.spec.graphs["fp32"] == engine_of("tiny-s").spec.graphs["fp32"]
    for half in HALVES:
        assert engine.graph(half, "int8").stat().st_size < 0.6 * engine.graph(half, "fp32").stat().st_size
    assert min(row["snr_db"] for row in engine.spec.verification["int8"]) >= LEAST_DB


def test_operator_equals_onnx_runtime(tmp_path):
    layer = Int8Linear(int8.Linear(torch.from_numpy(noise((48, 32))).double(), torch.ones(48).double()))
    path = tmp_path / "layer.onnx"
    with to_onnx._quiet_exporter():
        torch.onnx.export(
            layer.eval(),
            (torch.zeros(4, 32),),
            path,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("rows")},),
            custom_translation_table=int8.ONNX_OPERATORS,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=[CPU_PROVIDER])
    for level in (0.0, 1e-3, 1.0):
        rows = noise((50, 32), level=level) + np.float32(level)
        (expected,) = session.run(None, {session.get_inputs()[0].name: rows})
        np.testing.assert_allclose(layer(torch.from_numpy(rows)).numpy(), expected, rtol=1e-5, atol=1e-6 * level)


# --- What runs them ------------------------------------------------------------------------------------------


def test_command_line(int8_of, tmp_path):
    folder = int8_of("tiny-s").folder
    np.save(tmp_path / "z.npy", noise((32, 5), level=1))
    steps = [
        ["decode", tmp_path / "z.npy", tmp_path / "song.wav"],
        ["encode", tmp_path / "song.wav", tmp_path / "song.npy"],
    ]
    for step in steps:
        done = CliRunner().invoke(main, [*map(str, step), "--model", str(folder), "--precision", "int8"])
        assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "song.json").read_text())["precision"] == "int8"
    shown = CliRunner().invoke(main, ["info", str(folder)])
    assert "int8 " in shown.output


@pytest.mark.parametrize(
    ("opener", "options", "message"),
    [
        (open_tensorrt, {}, "TensorRT runs fp32 and fp16, int8 is for CPUs; choose precision fp16"),
        (OnnxRuntimeBackend, {"device": "cuda"}, "int8 graphs are for CPUs; choose precision fp16"),
        (OnnxRuntimeBackend, {"providers": ("CUDAExecutionProvider",)}, "int8 graphs are for CPUs; choose"),
    ],
)
def test_gpus_are_refused(int8_of, opener, options, message):
    with pytest.raises(BackendUnavailableError, match=message) as caught:
        opener(int8_of("tiny-s"), BackendOptions(precision="int8", **options))
    assert_one_line(caught.value)


def test_a_gpu_at_hand_is_not_used(int8_of, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU_PROVIDER])
    monkeypatch.setattr("samekit.backends.ort.has_driver", lambda: True)
    with OnnxRuntimeBackend(Engine.load(int8_of("tiny-s").folder), BackendOptions(precision="int8")) as backend:
        assert backend.device == "cpu"
