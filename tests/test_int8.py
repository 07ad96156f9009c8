"""int8 graphs: accuracy for every model, length and level; products that stay float32; backends that run them."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
from collections import Counter
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import THREADS
from helpers import (
    DIRECTIONS,
    HOP,
    assert_close,
    assert_one_line,
    each_direction,
    in_one_pass,
    noise,
    run_direction,
    seeded,
    variant,
)
from onnx import TensorProto, helper

from samekit.backends import onnxruntime as ort
from samekit.backends.base import BackendOptions
from samekit.backends.onnxruntime import OnnxRuntimeBackend, session_options
from samekit.backends.providers import CPU_PROVIDER
from samekit.batches import Autoencoder
from samekit.cli.main import main
from samekit.engine.accuracy import FLOOR_DB, floor_db
from samekit.engine.folder import Engine
from samekit.engine.spec import DECODER, ENCODER, INT8_TARGET_DB
from samekit.errors import BackendUnavailableError, CheckpointError, VerificationError
from samekit.tensorrt.opening import open_tensorrt
from samekit_export import int8, int8_layers, to_onnx
from samekit_export.checkpoint import load_bundled
from samekit_export.export import GRAPHS, export
from samekit_export.gptq import GptqRounder
from samekit_export.int8 import prepare_, quantize_
from samekit_export.int8_layers import Int8Linear
from samekit_export.model import Same
from samekit_export.random_weights import random_checkpoint
from samekit_export.report import measure
from samekit_export.to_onnx import OPSET
from samekit_export.verify import snr_db, verify

# The least accuracy of int8 on seeded weights.
LEAST_DB = 37

# Make the runtime treat this processor as one that adds pairs of int8 products in 16 bits.
saturating = mock.patch("samekit.backends.onnxruntime.int8_saturates", return_value=True)

INT8 = BackendOptions(precision="int8", device="cpu", threads=THREADS)


@pytest.fixture(scope="session")
def int8_of(engine_of, tmp_path_factory):
    """Return a function that exports a model to float32 and int8, once per run: name -> Engine."""
    folder = tmp_path_factory.mktemp("int8")

    def add(name):
        shutil.copytree(engine_of(name).folder, folder / name)
        return export(seeded(name), folder, ["int8"])

    return functools.cache(add)


@pytest.fixture
def opened(int8_of, kind):
    with OnnxRuntimeBackend(int8_of(kind), INT8) as backend:
        yield backend


def inputs(direction, latents, seed, batch=1):
    """Return inputs that the export has not used: loud, usual and quiet noise, and a tone."""
    if direction == ENCODER:
        shape = (batch, 2, latents * HOP)
        seconds = np.arange(latents * HOP) / 44_100
        tone = np.broadcast_to(0.3 * np.sin(2 * np.pi * 440 * seconds), shape)
        return [noise(shape, seed, level) for level in (0.5, 0.2, 0.02)] + [tone.astype(np.float32)]
    return [noise((batch, 32, latents), seed, level) for level in (1.5, 1.0, 0.5)]


def eager(model, direction, array):
    with torch.inference_mode():
        return (model.encode if direction == ENCODER else model.decode)(torch.from_numpy(array)).numpy()


# --- Accuracy ----------------------------------------------------------------------------------------------


@each_direction
@pytest.mark.parametrize(("batch", "latents"), [(1, 1), (1, 7), (3, 4), (1, 40)])
def test_accuracy(opened, eager_of, kind, direction, batch, latents):
    for array in inputs(direction, latents, seed=latents + 100, batch=batch):
        measured = snr_db(eager(eager_of(kind), direction, array), run_direction(opened, direction, array))
        assert LEAST_DB <= measured < 60, f"{measured:.1f} dB"


@each_direction
def test_accuracy_of_other_weights(kind, direction):
    model = Same.from_checkpoint(random_checkpoint(kind, seed=1))
    graph = GRAPHS[direction](model)
    quantize_(graph, model)
    for array in inputs(direction, 9, seed=5):
        assert snr_db(eager(model, direction, array), in_one_pass(graph, array)) >= LEAST_DB


@each_direction
def test_silence(opened, direction):
    array = np.zeros_like(inputs(direction, 3, seed=0)[0])
    assert np.isfinite(run_direction(opened, direction, array)).all()


@each_direction
def test_same_windows_give_the_same_numbers(int8_of, kind, direction):
    array, outputs = inputs(direction, 61, seed=3)[0], []
    for _ in range(2):
        with OnnxRuntimeBackend(int8_of(kind), INT8) as backend:
            backend.use_packed_weights(direction)
            codec = Autoencoder(backend, window=24)
            outputs += [run_direction(codec, direction, array), run_direction(codec, direction, array)]
    for output in outputs[1:]:
        assert np.array_equal(output, outputs[0])


# No power of two above 8 divides the features, and the width of a head is no power of two.
ODD = {"*.config.channels": 120, "*.config.c_mults": [1], "*.config.dim_heads": 40, "*.config.ff_mult": 3}


@each_direction
def test_odd_widths(direction):
    model = Same.from_checkpoint(variant("tiny-l", ODD))
    assert model.config.encoder.inner % int8.INNER_ROTATION == 8
    graph = GRAPHS[direction](model)
    assert quantize_(graph, model) == []
    assert isinstance(graph.trunk.blocks[0].ff, Int8Linear)
    for array in inputs(direction, 9, seed=5):
        assert snr_db(eager(model, direction, array), in_one_pass(graph, array)) >= LEAST_DB


@each_direction
def test_blocks_that_add_nothing(kind, direction):
    """All rows of a value are zero, so their range is empty and the size of each feature is zero."""
    model = Same.from_checkpoint(random_checkpoint(kind))
    graph = GRAPHS[direction](model)
    first, second = graph.trunk.blocks[:2]
    with torch.no_grad():
        for zeroed in (first.v.weight, second.value.weight, second.value.bias):
            zeroed.zero_()
    array = inputs(direction, 9, seed=5)[1]
    expected = in_one_pass(graph, array)
    assert quantize_(graph, model) == []
    assert snr_db(expected, in_one_pass(graph, array)) >= LEAST_DB


def test_rotation_spares_rare_large_values():
    """One value in each row is 50 times as large and determines the range; a rotation spreads it."""
    rows = torch.from_numpy(noise((256, 192), level=1))
    rows[:, 7] *= 50
    linear = functools.partial(torch.nn.functional.linear, rows)
    weight = torch.from_numpy(noise((64, 192), seed=1, level=1))
    original, uncorrelated = int8.Linear(weight.double()), GptqRounder(torch.eye(192))
    plain, rotated = (
        snr_db(linear(weight).numpy(), Int8Linear(original, uncorrelated, rotation)(rows).numpy())
        for rotation in (None, int8.rotation_for(192, int8.INNER_ROTATION))
    )
    assert rotated > plain + 3


@pytest.mark.parametrize(
    ("features", "most", "size"), [(64, None, 64), (40, None, 8), (40, 16, 8), (96, 16, 16), (7, 16, 1)]
)
def test_rotation(features, most, size):
    rotation = int8.rotation_for(features, most)
    assert len(rotation) == size
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64))
    assert rotation.abs().max() == rotation.abs().min()


def correlated(features, seed):
    """Return rows that span twelve dimensions, plus a little noise."""
    mixed = noise((12, features), level=1)
    return torch.from_numpy(noise((400, 12), seed, 1) @ mixed + noise((400, features), seed + 7, 0.1))


def nearest(weight):
    """Round every weight to the nearest step; return the steps and their scale."""
    scale = weight.abs().amax(dim=0) / 127
    return torch.round(weight / scale).to(torch.int8), scale


@pytest.mark.parametrize("features", [96, 300])
def test_errors_of_weights_cancel_over_rows_that_are_correlated(features):
    """Most of the error cancels, even for similar rows that were not used for rounding."""
    seen, others = (correlated(features, seed) for seed in (1, 2))
    weight = torch.from_numpy(noise((features, 64), seed=3, level=1))
    plain, compensated = (
        snr_db((others @ weight).numpy(), (others @ (steps.float() * scale)).numpy())
        for steps, scale in (nearest(weight), GptqRounder(seen.T @ seen).to_int8(weight))
    )
    assert compensated > plain + 8


@pytest.mark.parametrize("features", [96, 128, 300])
def test_rounding_is_the_formula(features):
    """The result equals GPTQ without blocks: one feature after the other, each error compensated by all that follow."""
    seen = correlated(features, 1)
    moment = (seen.T @ seen).double()
    weight = torch.from_numpy(noise((features, 8), seed=3, level=1))
    steps, scale = GptqRounder(moment.float()).to_int8(weight)
    order = moment.diagonal().argsort(descending=True)
    left = (weight / scale)[order].double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(features)
    expected = torch.empty(features, 8, dtype=torch.float64)
    for i in range(features):
        rest = damped[order[i:]][:, order[i:]]
        expected[order[i]] = left[i].round().clamp(-127, 127)
        # The change that minimizes the error of the rest (Optimal Brain Surgeon, eq. 5).
        pull = torch.linalg.inv(rest)[0]
        left[i + 1 :] -= pull[1:, None] / pull[0] * (left[i] - expected[order[i]])
    # float32 sums can decide rare ties differently, and all later features depend on them.
    outputs = [seen.double() @ (rounded.double() * scale) for rounded in (expected, steps)]
    assert (expected == steps).float().mean() > 0.97
    assert abs(error_db(weight, outputs[0], seen) - error_db(weight, outputs[1], seen)) < 0.3


def error_db(weight, output, rows):
    return snr_db((rows @ weight).numpy(), output.float().numpy())


def test_rows_without_correlation_lose_nothing():
    rows, weight = torch.from_numpy(noise((4000, 96))), torch.from_numpy(noise((96, 64), seed=3))
    steps, scale = nearest(weight)
    compensated, same_scale = GptqRounder(rows.T @ rows).to_int8(weight)
    assert torch.equal(scale, same_scale)
    assert steps.abs().max() == 127
    assert (steps != compensated).float().mean() < 0.05


def test_rows_of_zeros_are_rounded_to_nearest():
    weight = torch.from_numpy(noise((96, 64), seed=3))
    assert torch.equal(GptqRounder(torch.zeros(96, 96)).to_int8(weight)[0], nearest(weight)[0])


def test_learned_row_counts_as_often_as_it_is_read(eager_of, kind):
    """The first block computes the learned row once; it counts in the moment as often as it is repeated."""
    model = eager_of(kind)
    graph = GRAPHS["decoder"](model)
    given = []
    block = graph.trunk.blocks[0]
    with torch.no_grad(), block.k.linear.register_forward_pre_hook(lambda _, rows: given.append(rows[0])):
        moment = int8.moments_of(graph, [torch.from_numpy(noise((1, 32, 16), level=1))])["0.norm"]
    own, learned = given[0][:-1], given[0][-1:]
    rows = torch.cat([own, learned.expand(model.config.decoder.stride * len(own), -1)]).double()
    expected = rows.T @ rows
    torch.testing.assert_close(moment, (expected / expected.trace()).float(), rtol=1e-4, atol=1e-7)


@each_direction
def test_preparing_changes_no_function(eager_of, kind, direction):
    """With rotated heads and scaled features, a prepared graph still computes the same function."""
    array = inputs(direction, 5, seed=1)[0]
    model = eager_of(kind)
    graph = GRAPHS[direction](model)
    expected = in_one_pass(graph, array)
    found = prepare_(graph, model)
    assert len(found) == 28
    assert not any(isinstance(module, Int8Linear) for module in graph.modules())
    assert_close(expected, in_one_pass(graph, array), 105)


@each_direction
def test_large_features_are_made_small(direction):
    """Large features of trained models get smaller. The factors are powers of two, so no result changes."""
    model = Same.from_checkpoint(load_bundled("same-tiny"))
    graph = GRAPHS[direction](model)
    with torch.no_grad():
        given = list(int8.examples(graph, model, 24, seed=0))
        outputs = [graph(x) for x in given]
        before = int8.moments_of(graph, given)
        int8.scale_features_(graph, scaled := before.copy())
        after = int8.moments_of(graph, given)
        for x, output in zip(given, outputs, strict=True):
            assert torch.equal(graph(x), output)
    for name in int8.QUANTIZED_INPUTS:
        assert any(not torch.equal(before[key], scaled[key]) for key in before if key.endswith(f".{name}"))

    def unevenness(moment):
        size = moment.diagonal().sqrt()
        return float(size.max() / size.median())

    for key in before:
        if key.endswith("norm"):
            assert unevenness(after[key]) < max(0.7 * unevenness(before[key]), 2)


@each_direction
def test_trained_weights(direction):
    """With trained weights, all but a few products are int8, and the accuracy is close to the target."""
    model = Same.from_checkpoint(load_bundled("same-tiny"))
    graph = GRAPHS[direction](model)
    kept = quantize_(graph, model)
    rounded = sum(isinstance(module, Int8Linear) for module in graph.modules())
    assert len(kept) <= rounded // 6
    hop, width = model.config.hop, model.config.latent_width
    array = noise((1, 2, 40 * hop), seed=8) if direction == ENCODER else noise((1, width, 40), seed=8, level=0.7)
    assert snr_db(eager(model, direction, array), in_one_pass(graph, array)) > INT8_TARGET_DB - 1


@each_direction
def test_values_whose_squares_overflow(kind, direction):
    """Values are multiplied and the next layer is divided by the same factor, so the function stays the same."""
    checkpoint = random_checkpoint(kind)
    model = Same.from_checkpoint(checkpoint)
    graph = GRAPHS[direction](model)
    with torch.no_grad():
        for block in graph.trunk.blocks:
            block.value.weight.mul_(2.0**70)
            block.value.bias.mul_(2.0**70)
            block.ff.weight.mul_(2.0**-70)
    array = inputs(direction, 9, seed=5)[1]
    expected = in_one_pass(graph, array)
    quantize_(graph, model)
    assert snr_db(expected, in_one_pass(graph, array)) >= LEAST_DB


def test_models_that_are_not_finite(eager_of):
    graph = GRAPHS[ENCODER](eager_of("tiny-s"))
    with torch.no_grad():
        graph.trunk.blocks[0].out.weight.fill_(3e38)
    with pytest.raises(CheckpointError, match="computes NaN or infinity for ordinary audio") as caught:
        quantize_(graph, eager_of("tiny-s"))
    assert_one_line(caught.value)


def test_export_is_refused_where_it_could_not_be_verified(tmp_path):
    """The export fails before it writes anything."""
    with saturating, pytest.raises(BackendUnavailableError, match="export it on another machine") as caught:
        export(seeded("tiny-s"), tmp_path, ["fp32", "int8"])
    assert_one_line(caught.value)
    assert not any(tmp_path.iterdir())


def test_report_leaves_out_what_does_not_run(int8_of, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise((9000, 2)), 44_100)
    with saturating:
        report = measure(tmp_path / "a.wav", int8_of("tiny-s"))
    assert any("onnxruntime int8: int8 decoding needs" in reason for reason in report.left_out)
    assert ("onnxruntime", "fp32") in {(row.backend, row.precision) for row in report.rows}


# --- What stays float32 --------------------------------------------------------------------------------------


@pytest.fixture
def graph(eager_of):
    """Return the graph that amplifies rounding errors most."""
    return GRAPHS["decoder"](eager_of("tiny-l"))


@pytest.mark.parametrize(("target", "fewest", "most"), [(10, 0, 0), (42, 1, 27), (200, 28, 28)])
def test_as_much_stays_float32_as_the_target_takes(graph, eager_of, target, fewest, most):
    model = eager_of("tiny-l")
    array = next(int8.examples(graph, model, 5, int8.EVALUATION_SEED))
    with torch.no_grad():
        wanted = graph(array).numpy()
        kept = quantize_(graph, model, target, latents=5)
        output = graph(array).numpy()
    assert fewest <= len(kept) <= most
    assert len(set(kept)) == len(kept) == 28 - sum(isinstance(module, Int8Linear) for module in graph.modules())
    assert snr_db(wanted, output) >= min(target, 100)
    for block in graph.trunk.blocks:
        assert block.split_latent_rows == isinstance(block.ff, Int8Linear)


def test_no_more_stays_float32_than_that(graph, eager_of, monkeypatch):
    """With one product more in int8, the target is missed."""
    tried = []

    def select(graph, prepared, int8):
        original(graph, prepared, int8)
        tried.append((len(prepared) - len(int8), worst()))

    model, original = eager_of("tiny-l"), int8.select_int8_
    given = list(int8.examples(graph, model, 5, int8.EVALUATION_SEED))
    with torch.no_grad():
        wanted = [graph(x).numpy() for x in given]

        def worst():
            return min(snr_db(y, graph(x).numpy()) for x, y in zip(given, wanted, strict=True))

        monkeypatch.setattr(int8, "select_int8_", select)
        kept = len(quantize_(graph, model, 42, latents=5))
    reached = dict(tried)
    assert reached[kept] >= 42 > reached[kept - 1]


def test_separate_rows_of_latents_are_the_same_function(graph):
    array = noise((2, 32, 7), level=1)
    expected = in_one_pass(graph, array)
    for block in graph.trunk.blocks:
        block.split_latent_rows = True
    assert_close(expected, in_one_pass(graph, array), 110)


# --- The files -----------------------------------------------------------------------------------------------


def fused_graph(path):
    """Return the graph after ONNX Runtime's optimization, with the options of our runtime."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(onnxruntime, THREADS, "int8")
        options.optimized_model_filepath = f"{folder}/fused.onnx"
        # ONNX Runtime warns that such a file is for this machine only.
        options.log_severity_level = 3
        onnxruntime.InferenceSession(path, options, providers=[CPU_PROVIDER])
        return onnx.load(options.optimized_model_filepath).graph


@each_direction
def test_graphs_are_standard_and_fuse(int8_of, kind, direction):
    path = int8_of(kind).graph(direction, "int8")
    proto = onnx.load(path)
    assert {(opset.domain, opset.version) for opset in proto.opset_import} == {("", OPSET)}
    assert {node.domain for node in proto.graph.node} == {""}
    found = Counter(node.op_type for node in proto.graph.node)
    # A block has 7 products of 4 kinds of rows, and the last one's queries are of fewer rows than its keys. All but the
    # last block of a decoder have two feed-forward passes: 3 more products of 2 kinds.
    blocks, twice = (4, 0) if direction == ENCODER else (4, 3)
    assert found["MatMulInteger"] == 7 * blocks + 3 * twice
    assert found["DynamicQuantizeLinear"] == 4 * blocks + 1 + 2 * twice
    fused = Counter(node.op_type for node in fused_graph(path).node)
    assert fused["MatMulIntegerToFloat"] + fused["DynamicQuantizeMatMul"] == found["MatMulInteger"]
    assert fused["MatMulInteger"] == 0


def test_folder(int8_of, engine_of):
    engine = int8_of("tiny-s")
    engine.check_digests()
    assert list(engine.spec.graphs) == ["fp32", "int8"]
    assert engine.spec.graphs["fp32"] == engine_of("tiny-s").spec.graphs["fp32"]
    for direction in DIRECTIONS:
        assert engine.graph(direction, "int8").stat().st_size < 0.6 * engine.graph(direction, "fp32").stat().st_size
    assert min(row["snr_db"] for row in engine.spec.verification["int8"]) >= LEAST_DB


def test_verification_follows_the_target(int8_of, eager_of):
    """An int8 graph may be 3 dB less accurate than its target."""
    engine = int8_of("tiny-s")
    assert floor_db(engine.spec, "int8") == FLOOR_DB["int8"] == 32
    assert floor_db(dataclasses.replace(engine.spec, int8_target_db=25.0), "int8") == 22
    assert floor_db(engine.spec, "fp32") == FLOOR_DB["fp32"]
    demanding = dataclasses.replace(engine.spec, int8_target_db=63.0)
    with pytest.raises(VerificationError, match=r"60\.0 dB is the least"):
        verify(Engine(engine.folder, demanding), eager_of("tiny-s"), "int8")


def test_operator_equals_onnx_runtime(tmp_path):
    linear = int8.Linear(torch.from_numpy(noise((48, 32))).double(), torch.ones(48).double())
    layer = Int8Linear(linear, GptqRounder(torch.eye(32)))
    path = tmp_path / "layer.onnx"
    with to_onnx._quiet_exporter():
        torch.onnx.export(
            layer.eval(),
            (torch.zeros(4, 32),),
            path,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("rows")},),
            custom_translation_table=int8_layers.ONNX_OPERATORS,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=[CPU_PROVIDER])
    for level in (0.0, 1e-3, 1.0):
        rows = noise((50, 32), level=level) + np.float32(level)
        (expected,) = session.run(None, {session.get_inputs()[0].name: rows})
        np.testing.assert_allclose(layer(torch.from_numpy(rows)).numpy(), expected, rtol=1e-5, atol=1e-6 * level)


# --- What runs them ------------------------------------------------------------------------------------------


def test_saturating_processors_encode_the_same_numbers(opened, int8_of, kind):
    """The session uses other operators, with unsigned weights, on these processors."""
    array = inputs(ENCODER, 9, seed=3)[0]
    with saturating:
        types = {weight.data_type for weight in fused_graph(int8_of(kind).graph(ENCODER, "int8")).initializer}
        with OnnxRuntimeBackend(int8_of(kind), INT8) as backend:
            output = run_direction(backend, ENCODER, array)
    assert onnx.TensorProto.UINT8 in types
    assert onnx.TensorProto.INT8 not in types
    assert np.array_equal(run_direction(opened, ENCODER, array), output)


def test_saturating_processors_do_not_decode(int8_of, kind):
    with (
        saturating,
        OnnxRuntimeBackend(int8_of(kind), INT8) as backend,
        pytest.raises(BackendUnavailableError, match="needs a processor with VNNI") as caught,
    ):
        run_direction(backend, DECODER, inputs(DECODER, 3, seed=0)[0])
    assert_one_line(caught.value)


def test_probe_of_the_processor():
    """The runtime contains this graph as bytes, because it does not require a package that writes graphs."""
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1])],
        [helper.make_tensor("w", TensorProto.INT8, [4, 1], bytes([127] * 4), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=8)
    assert onnx.load_from_string(ort._PROBE) == model


@pytest.mark.parametrize(("total", "saturates"), [(4 * 255 * 127, False), (2 * 32_767, True)])
def test_saturation_is_seen(total, saturates):
    session = mock.Mock(**{"run.return_value": [np.array([[total]], np.int32)]})
    runtime = mock.Mock(**{"InferenceSession.return_value": session})
    assert ort.int8_saturates(runtime) == saturates
    # The first session of a process decides this setting for all threads.
    runtime.SessionOptions().add_session_config_entry.assert_called_once_with("session.set_denormal_as_zero", "1")


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


def test_verification_measures_what_it_can(int8_of):
    """All precisions except int8 are measured on a processor that cannot run int8."""
    with saturating:
        done = CliRunner().invoke(main, ["verify", str(int8_of("tiny-s").folder)])
    assert done.exit_code == 2
    assert sum(line.startswith("fp32 ") and line.endswith(" dB") for line in done.stdout.splitlines()) >= 10
    reason, error = done.stderr.splitlines()
    assert reason.startswith("int8: not measured, int8 decoding needs a processor with VNNI")
    assert error.endswith("not every graph can be measured on this machine; verify it on another one")


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
    monkeypatch.setattr("samekit.backends.onnxruntime.has_driver", lambda: True)
    with OnnxRuntimeBackend(Engine.load(int8_of("tiny-s").folder), BackendOptions(precision="int8")) as backend:
        assert backend.device == "cpu"
