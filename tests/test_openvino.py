"""The OpenVINO backend beyond the contract of tests/test_backends.py, and the precision bf16."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections import Counter
from itertools import product

import numpy as np
import pytest
from faults import in_a_fork
from helpers import (
    DIRECTIONS,
    KINDS,
    assert_one_line,
    each_direction,
    in_one_pass,
    needs_bf16,
    needs_openvino,
    run_direction,
    seeded,
)

from samekit import AutoencoderModel
from samekit.backends.base import BackendOptions
from samekit.backends.cpu import fast_precisions
from samekit.backends.openvino_bf16 import keep_float32
from samekit.backends.openvino_forms import transpose_keys_in_products, use_float32_rotary, use_fused_rotary
from samekit.backends.selection import AUTO, BACKENDS, open_backend
from samekit.engine.builds import remove_stale
from samekit.engine.contents import compiled_files, compiled_name, is_engine_file, remove_leftovers
from samekit.engine.exchange import copy_engine
from samekit.engine.folder import Engine
from samekit.engine.spec import DECODER, ENCODER
from samekit.errors import BackendError, BackendUnavailableError, EngineError, EngineNotFoundError, InputError
from samekit.packages import import_openvino
from samekit_export.export import check_precisions, export
from samekit_export.verify import example_input, snr_db

pytestmark = needs_openvino


def opened(engine, precision="fp32", **options):
    return open_backend(engine.folder, "openvino", BackendOptions(precision, threads=1, **options))


def runtime_types(engine, direction, precision):
    """Return how often OpenVINO runs each operation in each type: (operation, type) -> count."""
    openvino = import_openvino()

    core = openvino.Core()
    (use_float32_rotary if precision == "bf16" else use_fused_rotary)(core)
    model = core.read_model(engine.graph(direction, "fp32"))
    transpose_keys_in_products(openvino, model)
    if precision == "bf16":
        model, _ = keep_float32(openvino, core, model)
    hint = {"INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else precision, "INFERENCE_NUM_THREADS": 1}
    ops = core.compile_model(model, "CPU", hint).get_runtime_model().get_ops()
    return Counter(tuple(op.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision")) for op in ops)


def hint_alone(engine, direction, array):
    """Return what OpenVINO computes in bfloat16 if it is told of no operation to keep in float32."""
    openvino = import_openvino()

    core, settings = openvino.Core(), {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(engine.graph(direction, "fp32")), "CPU", settings)
    (output,) = compiled(array).values()
    return output


@needs_bf16
@pytest.mark.parametrize("kind", KINDS)
@each_direction
def test_bf16_is_more_accurate_than_the_hint_alone(engine_of, eager_of, kind, direction):
    engine, eager = engine_of(kind), eager_of(kind)
    array = example_input(engine.spec, direction, 1, 24, seed=1)
    expected = in_one_pass(eager.encode if direction == ENCODER else eager.decode, array)
    with opened(engine, "bf16") as backend:
        reached = snr_db(expected, run_direction(backend, direction, array))
    assert 60 > reached > snr_db(expected, hint_alone(engine, direction, array)) + 1.5


@pytest.mark.parametrize("kind", [*KINDS, "same-tiny"])
@each_direction
def test_rotary_embedding_is_one_operation(engine_of, bundled_engine, kind, direction):
    """`same-tiny` rotates whole heads, the others half of each."""
    engine = bundled_engine if kind == "same-tiny" else engine_of(kind)
    types = runtime_types(engine, direction, "fp32")
    assert types["RoPE", "f32"] == 2 * types["Softmax", "f32"] > 0
    assert not {"VariadicSplit", "Split"} & {name for name, _ in types}


@pytest.mark.parametrize("kind", KINDS)
@each_direction
def test_products_transpose_the_keys(engine_of, kind, direction):
    openvino = import_openvino()
    core = openvino.Core()
    use_fused_rotary(core)
    model = core.read_model(engine_of(kind).graph(direction, "fp32"))
    transpose_keys_in_products(openvino, model)
    types = Counter(op.get_type_name() for op in model.get_ops())
    products = [op for op in model.get_ops() if op.get_type_name() == "MatMul" and op.get_attributes()["transpose_b"]]
    assert len(products) == types["Softmax"] > 0
    for each in products:
        *_, last = each.input_value(1).get_node().input_value(1).get_node().data
        assert last == 3


@needs_bf16
@pytest.mark.parametrize("kind", KINDS)
@each_direction
def test_operations_in_float32(engine_of, kind, direction):
    types = runtime_types(engine_of(kind), direction, "bf16")
    blocks = types["Softmax", "f32"]
    assert blocks > 0
    # Queries times keys, and the last product.
    assert types["MatMul", "f32"] == blocks + 1
    assert types["MatMul", "bf16"] == blocks
    # Rotary embeddings and differences of softmaxes are among the others.
    assert not {("FullyConnected", "f32"), ("RoPE", "bf16"), ("Softmax", "bf16"), ("Subgraph", "bf16")} & set(types)


@needs_bf16
def test_auto_runs_bf16_here(engine_of, caplog):
    caplog.set_level(logging.INFO, "samekit")
    with open_backend(engine_of("tiny-s").folder, AUTO, BackendOptions("bf16")) as backend:
        assert (backend.name, backend.device, backend.precision) == ("openvino", "cpu", "bf16")
    assert caplog.messages == ["backend openvino on cpu, bf16"]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in (AUTO, "openvino")])
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"device": "intel-gpu"}, {"device": "npu"}], ids=str)
def test_other_backends_name_the_one_that_can(engine_of, backend, options):
    (option,) = (f"{name} {value}" for name, value in options.items())
    with pytest.raises(BackendUnavailableError) as caught:
        open_backend(engine_of("tiny-s").folder, backend, BackendOptions(**options))
    assert str(caught.value) == f"the {backend} backend has no {option}; use backend openvino"


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_are_refused_by_name(half_engine, precision):
    with pytest.raises(BackendUnavailableError, match=precision) as caught:
        open_backend(half_engine, "openvino", BackendOptions(precision))
    assert_one_line(caught.value)


@pytest.mark.parametrize("device", ["intel-gpu", "npu", "cuda"])
def test_devices_that_are_not_here(engine_of, device):
    openvino = import_openvino()

    assert openvino.Core().available_devices == ["CPU"]
    with pytest.raises(BackendUnavailableError, match="choose device cpu") as caught:
        opened(engine_of("tiny-s"), device=device)
    assert_one_line(caught.value)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"device": "intel-gpu"}], ids=str)
def test_pytorch_does_not_take_the_place_of_an_engine_for_openvino(checkpoint_of, options):
    with pytest.raises(EngineNotFoundError, match="PyTorch cannot take its place: the torch backend has no") as caught:
        open_backend(checkpoint_of("tiny-s"), AUTO, BackendOptions(**options))
    assert_one_line(caught.value)


def test_bf16_is_not_exported():
    with pytest.raises(InputError, match="bf16 runs the graphs of fp32; export precision fp32"):
        check_precisions(["bf16"])


@pytest.mark.parametrize(
    ("instructions", "fast"),
    [
        (["avx2"], ["fp32"]),
        (["avx2", "avx_vnni"], ["fp32", "int8"]),
        (["avx2", "avx512f", "avx512_vnni", "avx512_bf16"], ["fp32", "int8", "bf16"]),
    ],
)
def test_precisions_that_a_processor_is_fast_in(instructions, fast):
    assert fast_precisions(instructions) == fast


def test_opens_again_but_not_in_a_fork(engine_of):
    array = example_input(engine_of("tiny-s").spec, DECODER, 1, 3, seed=0)
    with opened(engine_of("tiny-s")) as backend:
        expected = backend.decode(array)
        with pickle.loads(pickle.dumps(backend)) as copy:
            assert np.array_equal(copy.decode(array), expected)

        def child():
            with pytest.raises(BackendError, match="forked after OpenVINO ran; start processes by spawn, or choose"):
                backend.decode(array)

        assert in_a_fork(child) == 0
        assert np.array_equal(backend.decode(array), expected)


FORKED = """
import os, sys
import numpy as np
from samekit.backends.base import BackendOptions
from samekit.backends.selection import open_backend

with open_backend(sys.argv[1], "openvino", BackendOptions(threads=1)) as backend:
    backend.decode(np.zeros((1, backend.spec.latent_width, 2), np.float32))
child = os.fork()
if not child:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_forked_process_ends_after_models_were_closed(engine_of):
    command = [sys.executable, "-c", FORKED, engine_of("tiny-s").folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


INTERRUPTED = """
import os, signal, sys, threading, time
from samekit.backends.base import BackendOptions
from samekit.backends.selection import open_backend

engine, order = sys.argv[1:]
backends = [open_backend(engine, "openvino", BackendOptions(threads=1)) for _ in range(2)]

def close_both():
    while backends:
        backends.pop(0).close()

if order == "oldest first":
    close_both()
else:
    thread = threading.Thread(target=close_both)
    thread.start()
    thread.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("order", ["oldest first", "in another thread"])
def test_signals_are_handled_after_models_were_closed(engine_of, order):
    """OpenVINO's plugin for CPUs unmaps a stack for signal handlers that threads may still use, see `_core`."""
    command = [sys.executable, "-c", INTERRUPTED, engine_of("tiny-s").folder, order]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_graphs_that_changed_are_not_run(own_engine):
    graph = own_engine.graph(DECODER, "fp32")
    with opened(own_engine) as backend:
        graph.write_bytes(bytes(graph.stat().st_size))
        with pytest.raises(
            BackendError, match=r"decoder\.onnx: OpenVINO \S+ cannot open it .*; export it again"
        ) as caught:
            backend.decode(np.zeros((1, 32, 1), np.float32))
        assert_one_line(caught.value)
        graph.unlink()
        with pytest.raises(EngineError, match=r"decoder\.onnx: is missing"):
            backend.decode(np.zeros((1, 32, 1), np.float32))


def test_nothing_is_reported_and_nothing_is_left(engine_of):
    """OpenVINO's import starts a thread that sends usage data, and leaves a folder in the home folder."""
    before = set(threading.enumerate())
    model = AutoencoderModel.from_pretrained(engine_of("tiny-s").folder, backend="openvino", threads=1)
    model.decode(np.zeros((1, 32, 2), np.float32))
    assert set(threading.enumerate()) == before
    assert os.listdir(os.environ["HOME"]) == []


def test_subnormals_are_zero(engine_of):
    tiny = np.full((1, 32, 2), 1e-40, np.float32)
    with opened(engine_of("tiny-s")) as backend:
        assert np.array_equal(backend.decode(tiny), backend.decode(np.zeros_like(tiny)))


# --- Compiled graphs in the engine folder -----------------------------------------------------------------------

PRECISIONS = ["fp32", pytest.param("bf16", marks=needs_bf16)]


@pytest.fixture(scope="module")
def large_engine_of(tmp_path_factory):
    """Return a function that exports a seeded model, once, as if its weights were large: name -> Engine."""

    def write(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("samekit_export.to_onnx.EXTERNAL_DATA_ABOVE", 1000)
            return export(seeded(name), tmp_path_factory.mktemp("large"))

    return functools.cache(write)


@pytest.fixture
def large_engine(large_engine_of, tmp_path):
    """Copy of such an engine of tiny-l that the test may change."""
    folder = tmp_path / "large" / "tiny-l"
    shutil.copytree(large_engine_of("tiny-l").folder, folder, ignore=shutil.ignore_patterns("*.openvino"))
    return Engine.load(folder)


def results(engine, precision):
    with opened(engine, precision) as backend:
        return [
            run_direction(backend, direction, example_input(engine.spec, direction, 2, latents, seed=5))
            for direction, latents in product(DIRECTIONS, (24, 7))
        ]


def assert_equal(expected, found):
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_graphs_open_again(engine_of, large_engine_of, kind, precision):
    engine = large_engine_of(kind)
    # Graphs that hold their weights themselves are always compiled.
    expected = results(engine_of(kind), precision)
    assert compiled_files(engine_of(kind).folder) == []
    assert_equal(expected, results(engine, precision))
    kept = {path: path.stat().st_mtime_ns for path in compiled_files(engine.folder) if f".{precision}-" in path.name}
    assert [path.name.split("-")[0] for path in kept] == [f"{d}.onnx.{precision}" for d in ("decoder", "encoder")]
    weights = engine.folder / "decoder.onnx.data"
    assert all(path.stat().st_size < weights.stat().st_size for path in kept)
    assert_equal(expected, results(engine, precision))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiled_graphs_are_opened_without_the_original(large_engine, precision):
    expected = results(large_engine, precision)
    for direction in DIRECTIONS:
        graph = large_engine.graph(direction, "fp32")
        before = graph.stat()
        graph.write_bytes(bytes(before.st_size))
        os.utime(graph, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_equal(expected, results(large_engine, precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiled_graphs_of_damaged_weights_end_with_them(large_engine, precision):
    expected = results(large_engine, precision)
    weights = large_engine.folder / "decoder.onnx.data"
    intact = weights.read_bytes()
    weights.write_bytes(bytes(len(intact)))
    zeros = results(large_engine, precision)
    assert not np.array_equal(zeros[-1], expected[-1])
    weights.write_bytes(intact)
    assert_equal(expected, results(large_engine, precision))


def exchange(first, second):
    """Give each of two files the contents of the other one."""
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiled_graphs_under_another_name_are_not_used(large_engine, precision, caplog):
    expected = results(large_engine, precision)
    exchange(*compiled_files(large_engine.folder))
    caplog.set_level(logging.INFO, "samekit.backends.openvino_cache")
    assert_equal(expected, results(large_engine, precision))
    assert len(caplog.messages) == 2


@needs_bf16
def test_compiled_graphs_without_their_inputs_are_not_used(large_engine):
    expected = results(large_engine, "bf16")
    for path in compiled_files(large_engine.folder):
        with np.load(path) as archive:
            compiled = archive[path.name]
        with path.open("wb") as file:
            np.savez(file, **{path.name: compiled})
    assert_equal(expected, results(large_engine, "bf16"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_behind_links(large_engine, precision, tmp_path):
    """As in the hub's cache: the files of a snapshot are links to files of other names."""
    expected = results(large_engine, precision)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in compiled_files(large_engine.folder):
        path.unlink()
    for path in list(large_engine.folder.glob("*.onnx*")):
        blob = path.replace(blobs / str(len(list(blobs.iterdir()))))
        path.symlink_to(os.path.relpath(blob, path.parent))
    blob_names = sorted(blobs.iterdir())
    assert_equal(expected, results(large_engine, precision))
    assert len(compiled_files(large_engine.folder)) == 2
    assert_equal(expected, results(large_engine, precision))
    assert sorted(blobs.iterdir()) == blob_names


def flip_a_bit(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-1000], flip_a_bit, lambda data: bytes(len(data))]
)
def test_damaged_compiled_graphs_are_compiled_again(large_engine, damage, caplog):
    caplog.set_level(logging.INFO, "samekit.backends.openvino_cache")
    expected = results(large_engine, "fp32")
    intact = {path: path.read_bytes() for path in compiled_files(large_engine.folder)}
    for path, data in intact.items():
        path.write_bytes(damage(data))
    assert_equal(expected, results(large_engine, "fp32"))
    assert [message.split(": ")[0] for message in caplog.messages] == [str(path) for path in reversed(intact)]
    caplog.clear()
    # They have been replaced.
    assert_equal(expected, results(large_engine, "fp32"))
    assert caplog.messages == []


def test_compiled_graphs_that_cannot_be_kept(large_engine, caplog):
    caplog.set_level(logging.INFO, "samekit.backends.openvino_cache")
    expected = results(large_engine, "fp32")
    for path in compiled_files(large_engine.folder):
        path.unlink()
        path.mkdir()
    assert_equal(expected, results(large_engine, "fp32"))
    assert all(": the compiled graph is not kept (" in message for message in caplog.messages)
    assert len(caplog.messages) == 2


def test_other_settings_compile_again(large_engine):
    with opened(large_engine) as backend:
        backend.decode(np.zeros((1, 32, 1), np.float32))
    results(large_engine, "fp32")
    with open_backend(large_engine.folder, "openvino", BackendOptions("fp32", threads=2)) as backend:
        backend.decode(np.zeros((1, 32, 1), np.float32))
    assert Counter(path.name.split(".")[0] for path in compiled_files(large_engine.folder)) == {DECODER: 2, ENCODER: 1}


def test_compiled_graphs_of_older_exports_are_deleted(large_engine):
    results(large_engine, "fp32")
    current = compiled_files(large_engine.folder)
    graph = large_engine.graph_file(ENCODER, "fp32")
    replaced = dataclasses.replace(graph, file="encoder.7.onnx")
    older = current[0].with_name(compiled_name(replaced, "bf16", "1" * 64))
    killed = current[0].with_name(f".{current[0].name}.1-0123456701234567.tmp")
    for path in (older, killed):
        path.write_bytes(b"1234")
    assert all(map(is_engine_file, (*current, older, killed)))
    assert current[1].name.startswith(f"{graph.file}.fp32-")
    assert remove_leftovers(large_engine.folder) == [(killed, 4), (older, 4)]
    assert compiled_files(large_engine.folder) == current
    removed = remove_stale(large_engine, {})
    assert [path for path, _ in removed] == current
    assert compiled_files(large_engine.folder) == []


def test_compiled_graphs_are_not_copied(large_engine, tmp_path):
    results(large_engine, "fp32")
    copy_engine(large_engine, tmp_path / "copy", ["fp32"], DIRECTIONS)
    assert compiled_files(tmp_path / "copy") == []
