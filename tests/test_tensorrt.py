"""TensorRT: engines built by NVIDIA's compiler, the builds of an engine folder, and the backend on a fake runtime.

Tests that run an engine need a GPU and are marked "gpu". There the contract of every backend is tested too.

Common faults of programs with TensorRT, and the tests that samekit avoids them:

* input written on another stream than the engine's, or memory that is reused too early: `test_work_is_ordered`,
  `test_streams_wait_for_each_other`, `test_input_from_another_stream`
* copies that do not overlap with work, or a lock that is held meanwhile: `test_next_batch_is_uploaded_while_one_runs`,
  `test_copies_do_not_wait_for_the_engine`, `test_no_lock_is_held_while_the_gpu_works`
* pinned memory that is allocated for each call: `test_pinned_memory_is_reused` (on a GPU)
* a capture that an allocation in another thread breaks, or graphs that use up the memory:
  `test_graphs_are_captured_in_their_thread_only`, `test_the_shape_that_was_used_least_recently_is_dropped`
* a launch that fails, or a shape that is refused, without an error: `test_every_answer_is_heard`,
  `test_too_long_is_refused_before_anything_happens`
* an output buffer that the next call overwrites: `test_results_are_the_callers_own`
* scratch memory for the largest shape: `test_scratch_is_what_the_shape_needs`
* engines loaded before they are used: `test_engines_are_read_when_they_are_used`
* engines that are used although they are out of date: `test_stale_engines_are_refused`,
  `test_damaged_builds_are_refused`
* plugins that tie an engine to one GPU family: `TestBuilding` (the graphs have standard ONNX operators only)
* only batch 1, or only one length: `test_every_shape_comes_out_right`
* an engine that is compared with itself: `test_equals_eager_pytorch_in_both_profiles`
* float32 layers that are converted to lower precision: `test_weights_keep_their_precision`
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from fake_tensorrt import FakeGpu, FakeRTX, FakeTensorRT, computed
from faults import in_a_fork
from helpers import (
    DIRECTIONS,
    KINDS,
    assert_close,
    assert_one_line,
    each_direction,
    in_one_pass,
    noise,
    run_direction,
    seeded,
    variant,
)

from samekit import AutoencoderModel
from samekit.backends.base import BackendOptions
from samekit.backends.experimental import warn_experimental
from samekit.backends.selection import open_backend
from samekit.batches import Autoencoder
from samekit.cli.main import main
from samekit.engine.builds import (
    FINGERPRINT_FILE,
    LOG_FILE,
    Build,
    BuiltEngine,
    build_folders,
    choose_build,
    is_whole,
    new_build,
    open_cache,
    write_document,
)
from samekit.engine.fingerprint import (
    AMPERE_PLUS,
    NARROW,
    PORTABLE,
    TENSORRT,
    TENSORRT_RTX,
    WIDE,
    BuilderOptions,
    fingerprint_of,
    profiles_of,
    runs_on,
)
from samekit.engine.folder import Engine
from samekit.engine.records import Check
from samekit.engine.spec import DECODER, ENCODER, GPU_PRECISIONS
from samekit.errors import BackendError, BackendUnavailableError, BuildError, InputError, OutputError, StaleEngineError
from samekit.streaming import run_windows
from samekit.tensorrt.backend import TensorRTBackend
from samekit.tensorrt.flavours import import_flavour, installed_flavours
from samekit.tensorrt.gpu import Gpu
from samekit.tensorrt.runner import split
from samekit.windows import Window
from samekit_export import to_tensorrt
from samekit_export.engine_builder import EngineBuilder
from samekit_export.export import export
from samekit_export.to_tensorrt import add_engines
from samekit_export.verify import example_input

PRECISIONS = list(GPU_PRECISIONS)
needs_rtx = pytest.mark.skipif(TENSORRT_RTX not in installed_flavours(), reason="tensorrt-rtx is not installed")

# --- Building with TensorRT-RTX, which needs no GPU -----------------------------------------------------------


@pytest.fixture(scope="module")
def built(engine_of, tmp_path_factory):
    """A function of name and precision that builds engines once and returns Engine and Build; do not change them."""
    folder = tmp_path_factory.mktemp("engines")

    def exported(name, precision):
        """Return the shared float32 graphs, or half-precision graphs of two blocks, which are exported faster."""
        if precision == "fp32":
            return Engine.load(shutil.copytree(engine_of(name).folder, folder / "fp32" / name))
        checkpoint = variant(name, {"*.config.transformer_depths": [2]})
        with mock.patch("samekit_export.export.verify", return_value=[]):
            return export(checkpoint, folder / precision, [precision])

    def build(name, precision):
        engine = exported(name, precision)
        (build,) = add_engines(engine, [precision], "rtx")
        return engine, build

    return functools.cache(build)


def log_of(build):
    return (build.folder / LOG_FILE).read_text(encoding="utf-8")


def bytes_in_log(build, what):
    """Return every size of this kind in the log."""
    return [int(size) for size in re.findall(rf"{what} Memory: (\d+) bytes", log_of(build))]


@needs_rtx
@pytest.mark.parametrize("precision", PRECISIONS)
class TestBuilding:
    @pytest.fixture
    def build(self, built, kind, precision):
        return built(kind, precision)[1]

    def test_it_is_whole_and_says_what_it_is(self, build, precision):
        assert is_whole(build.folder)
        assert build.folder.name == build.fingerprint.name
        assert build.fingerprint.name.startswith(f"tensorrt_rtx-{build.fingerprint.version}-portable-{precision}-")
        assert set(build.engines) == set(DIRECTIONS)
        for engine in build.engines.values():
            assert engine.size == (build.folder / engine.file).stat().st_size > 1_000_000
            assert engine.seconds > 0
            assert engine.peak_memory > 100_000_000

    def test_compiler_has_nothing_to_complain_of(self, build):
        assert {line.split("]")[0] for line in log_of(build).splitlines()} == {"[INFO"}

    def test_layers_are_counted(self, build, precision):
        counts = [int(count) for count in re.findall(r"(\d+) layers after parsing", log_of(build))]
        assert counts == [build.engines[direction].layers for direction in (ENCODER, DECODER)]
        # The encoders have 479 and 506 layers in fp32. A slice with its own length costs 24 layers, an index 1.
        assert 0 < counts[0] < {"fp32": 520, "fp16": 600}[precision]

    def test_both_profiles_are_in_it(self, build):
        # The builder computes the scratch memory of each profile. The one with the most latents needs most.
        narrow_encoder, wide_encoder, narrow_decoder, wide_decoder = bytes_in_log(build, "Max Scratch")
        assert 1.5 < wide_encoder / narrow_encoder < 2.5
        assert 1.5 < wide_decoder / narrow_decoder < 2.5

    def test_weights_keep_their_precision(self, built, kind, precision):
        engine, build = built(kind, precision)
        graphs = engine.spec.graphs[precision].values()
        exported = sum(size for graph in graphs for size in graph.sizes.values())
        assert 0.8 * exported < sum(bytes_in_log(build, "Total Weights")) < exported


@needs_rtx
@pytest.mark.slow
def test_full_size(tmp_path):
    engine = export(seeded("same-s"), tmp_path, PRECISIONS)
    full, half = add_engines(engine, PRECISIONS, "rtx")
    for build in (full, half):
        assert {line.split("]")[0] for line in log_of(build).splitlines()} == {"[INFO"}
        # An export of the plain model has 2,600 layers. Fewer layers are fused better and build faster.
        assert build.engines[ENCODER].layers < 700
    full, half = (sum(engine.size for engine in build.engines.values()) for build in (full, half))
    parameters = sum(tensor.numel() for tensor in seeded("same-s").tensors.values())
    assert full == pytest.approx(4 * parameters, rel=0.1)
    assert half == pytest.approx(full / 2, rel=0.1)


@pytest.fixture
def own_built(built, tmp_path):
    """An engine folder with its builds, which a test may change."""
    return Engine.load(shutil.copytree(built("tiny-s", "fp32")[0].folder, tmp_path / "tiny-s"))


@needs_rtx
def test_current_engines_are_left_alone(own_built, progress):
    (folder,) = build_folders(own_built)
    assert add_engines(own_built, ["fp32"], "auto") == [Build.load(folder)]
    assert progress() == [f"{folder} is current"]


@needs_rtx
def test_a_damaged_engine_is_built_again(own_built, monkeypatch):
    (folder,) = build_folders(own_built)
    engine = folder / "encoder.engine"
    # The size stays the same, so only the digest shows the damage.
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")

    def build(self, path):
        path.write_bytes(b"new")
        return BuiltEngine(path.name, 3, hashlib.sha256(b"new").hexdigest(), 1, 1.0, None)

    monkeypatch.setattr(EngineBuilder, "build", build)
    (again,) = add_engines(own_built, ["fp32"], "auto")
    assert again.folder == folder
    assert again.read(ENCODER) == b"new"


@needs_rtx
def test_a_graph_that_it_does_not_take(own_engine, progress):
    graph = own_engine.folder / "encoder.onnx"
    model = onnx.load(graph)
    model.graph.node[3].op_type, model.graph.node[3].domain = "Mystery", "elsewhere"
    node = model.graph.node[3].name
    onnx.save(model, graph)
    document = json.loads((own_engine.folder / "spec.json").read_text(encoding="utf-8"))
    document["graphs"]["fp32"][ENCODER]["sizes"]["encoder.onnx"] = graph.stat().st_size
    (own_engine.folder / "spec.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BuildError, match=f"tensorrt_rtx .* cannot build it .*Mystery {node}: ") as caught:
        add_engines(Engine.load(own_engine.folder), ["fp32"], "rtx")
    assert_one_line(caught.value)
    assert progress()[-1].startswith(f"encoder.onnx: Mystery {node}: ")
    # Only the log of the failed build is left.
    (log,) = (own_engine.folder / "tensorrt").iterdir()
    assert log.name.endswith(".failed.log")
    assert str(log) in str(caught.value)
    assert f"[ERROR] Mystery {node}" in log.read_text(encoding="utf-8")


# --- Which TensorRT builds ------------------------------------------------------------------------------------


def fake_module(name, version):
    return SimpleNamespace(__name__=name, __version__=version)


@pytest.fixture
def nothing_builds(monkeypatch):
    """Record what would be built, without a flavour or a GPU unless the test adds them."""
    asked = []
    monkeypatch.setitem(sys.modules, TENSORRT, None)
    monkeypatch.setitem(sys.modules, TENSORRT_RTX, None)
    monkeypatch.setattr("samekit.tensorrt.gpu.has_driver", lambda: False)
    monkeypatch.setattr(
        to_tensorrt,
        "build_engines",
        lambda engine, precision, module, target, gpu, options: asked.append((precision, module.__name__, target)),
    )
    return asked


def test_nothing_is_installed(nothing_builds, engine_of, progress, monkeypatch):
    engine = engine_of("tiny-s")
    monkeypatch.setattr("samekit_export.to_tensorrt.has_driver", lambda: False)
    # The export writes lines too, if no earlier test needed this engine.
    progress()
    assert add_engines(engine, ["fp32"], "auto") == []
    (line,) = progress()
    assert line.startswith("left out: TensorRT engines (no NVIDIA driver; ")
    monkeypatch.setattr("samekit_export.to_tensorrt.has_driver", lambda: True)
    assert add_engines(engine, ["fp32"], "auto") == []
    (line,) = progress()
    assert "pip install 'samekit[gpu]'" in line
    assert "pip install 'samekit[rtx]'" in line
    with pytest.raises(BackendUnavailableError, match=r"run: .*pip install 'samekit\[rtx\]'") as caught:
        add_engines(engine, ["fp32"], "rtx")
    assert_one_line(caught.value)
    assert add_engines(engine, ["fp32"], "off") == []
    with pytest.raises(InputError, match="unknown TensorRT mode 'on'; choose one of auto, rtx, off"):
        add_engines(engine, ["fp32"], "on")
    assert (progress(), nothing_builds) == ([], [])


@pytest.mark.parametrize(
    ("version", "gpu", "chosen"),
    [
        ("11.4.0", True, (TENSORRT, "8.9")),
        ("10.15.1", True, (TENSORRT, "8.9")),
        ("10.14.1", True, (TENSORRT_RTX, PORTABLE)),
        ("11.4.0", False, (TENSORRT_RTX, PORTABLE)),
        (None, True, (TENSORRT_RTX, PORTABLE)),
    ],
)
def test_auto_prefers_the_gpu_at_hand(nothing_builds, monkeypatch, engine_of, version, gpu, chosen, progress):
    if version:
        monkeypatch.setitem(sys.modules, TENSORRT, fake_module(TENSORRT, version))
    monkeypatch.setitem(sys.modules, TENSORRT_RTX, fake_module(TENSORRT_RTX, "1.7.1.116"))
    if gpu:
        monkeypatch.setattr(to_tensorrt, "Gpu", lambda _: SimpleNamespace(capability=(8, 9)))
    engine = engine_of("tiny-s")
    progress()
    add_engines(engine, ["fp32", "int8"], "auto")
    assert nothing_builds == [("fp32", *chosen)]
    assert progress() == ["no TensorRT engine of int8, which is for ONNX Runtime on the CPU"]


def test_versions_that_are_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, TENSORRT, fake_module(TENSORRT, "10.14.1.48"))
    with pytest.raises(
        BackendUnavailableError, match=r"tensorrt 10.14.1.48 is older than 10.15, .*--upgrade"
    ) as caught:
        import_flavour(TENSORRT)
    assert_one_line(caught.value)


@pytest.mark.parametrize("version", [None, "", "unknown", "11"])
def test_module_of_another_kind_in_its_place(monkeypatch, version):
    """Python finds a file `tensorrt.py` in the working folder before the installed package."""
    module = SimpleNamespace(__file__="/home/me/tensorrt.py")
    if version is not None:
        module.__version__ = version
    monkeypatch.setitem(sys.modules, TENSORRT, module)
    with pytest.raises(BackendError, match=r"/home/me/tensorrt\.py: has no version .*; rename it, or") as caught:
        import_flavour(TENSORRT)
    assert_one_line(caught.value)
    assert TENSORRT not in installed_flavours()


class FakeTimingConfig:
    """Builder settings that accept timing caches of one GPU."""

    def __init__(self, fits):
        self.fits = fits
        self.cache = None

    def create_timing_cache(self, data):
        return SimpleNamespace(data=data, serialize=lambda: data + b"+measured")

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache.data not in (b"", self.fits):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


def test_timing_cache_is_kept(engine_of, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMEKIT_CACHE", str(tmp_path))
    engine = engine_of("tiny-s")
    module = FakeTensorRT(engine.spec)

    def times(flavour, fits):
        """Attach and keep the cache as a build does; return its contents afterwards."""
        fingerprint = fingerprint_of(engine.spec, "fp32", flavour, "11.4.0", "8.9")
        builder = EngineBuilder(engine, ENCODER, fingerprint, module, sys.stdout, tmp_path)
        config = FakeTimingConfig(fits)
        builder._attach_timing_cache(config)
        builder._keep_timing_cache(config)
        return [path.read_bytes() for path in sorted(tmp_path.rglob("*.cache"))]

    # TensorRT-RTX has no timing cache.
    assert times(TENSORRT_RTX, b"") == []
    assert times(TENSORRT, b"") == [b"+measured"]
    assert times(TENSORRT, b"+measured") == [b"+measured+measured"]
    # A cache that does not fit is replaced.
    assert times(TENSORRT, b"other") == [b"+measured"]


@pytest.fixture
def encoder_builder(engine_of, tmp_path, monkeypatch):
    """A builder of the encoder that runs no compiler; its log goes to `build.log`."""
    monkeypatch.setenv("SAMEKIT_CACHE", str(tmp_path / "cache"))
    engine = engine_of("tiny-s")
    fingerprint = fingerprint_of(engine.spec, "fp32", TENSORRT, "11.4.0", "8.9")
    module, config = FakeTensorRT(engine.spec), FakeTimingConfig(b"")
    module.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)
    network = SimpleNamespace(num_layers=3)
    module.Builder = lambda _: SimpleNamespace(
        create_network=lambda _: network, build_serialized_network=lambda *_: b"engine"
    )
    with (tmp_path / "build.log").open("w", encoding="utf-8") as log:
        builder = EngineBuilder(engine, ENCODER, fingerprint, module, log, tmp_path)

        def configure(*_):
            builder._attach_timing_cache(config)
            return config

        monkeypatch.setattr(builder, "_parse", lambda *_: None)
        monkeypatch.setattr(builder, "_configure", configure)
        yield builder


@pytest.mark.parametrize("broken", ["folder", "file"])
def test_timing_cache_that_cannot_be_used(encoder_builder, tmp_path, monkeypatch, broken):
    path = encoder_builder._timing_path
    if broken == "folder":
        path.parent.parent.mkdir(parents=True)
        path.parent.write_bytes(b"in the way")
    else:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"+measured")
        read = Path.read_bytes

        def refuse(self):
            if self == path:
                raise PermissionError(13, "Permission denied")
            return read(self)

        monkeypatch.setattr(Path, "read_bytes", refuse)
    built = encoder_builder.build(tmp_path / "encoder.engine")
    assert (tmp_path / "encoder.engine").read_bytes() == b"engine"
    assert built.size == 6
    encoder_builder._log.flush()
    assert "[WARNING] the timing cache " in (tmp_path / "build.log").read_text(encoding="utf-8")


def test_disk_that_is_full_while_building(own_engine, monkeypatch):
    def build(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EngineBuilder, "build", build)
    module = FakeTensorRT(own_engine.spec)
    with pytest.raises(OutputError, match=r"tensorrt-11\.4\.0.* cannot be written \(No space left.*; choose") as caught:
        to_tensorrt.build_engines(own_engine, "fp32", module, "8.9")
    assert_one_line(caught.value)
    assert list((own_engine.folder / "tensorrt").iterdir()) == []


def test_build_log_that_cannot_be_written(encoder_builder, tmp_path):
    # TensorRT calls the logger from C++, where exceptions are not allowed.
    def write(_):
        raise OSError(28, "No space left on device")

    encoder_builder._log = SimpleNamespace(write=write)
    encoder_builder.build(tmp_path / "encoder.engine")
    assert (tmp_path / "encoder.engine").read_bytes() == b"engine"


def test_message_after_the_build_log_was_closed(encoder_builder):
    """TensorRT's objects can outlive a failed build, and log when they are deleted."""
    encoder_builder._log.close()
    encoder_builder._logger.log(SimpleNamespace(name="WARNING"), "a late message")


# --- Fingerprints ---------------------------------------------------------------------------------------------


@pytest.fixture
def spec(engine_of):
    return engine_of("tiny-s").spec


def test_fingerprint_holds_everything_that_matters(spec):
    here = fingerprint_of(spec, "fp32", TENSORRT, "11.4.0", "8.9")
    assert here == fingerprint_of(spec, "fp32", TENSORRT, "11.4.0", "8.9")
    assert here.name.startswith("tensorrt-11.4.0-8.9-fp32-")
    changed = {
        "onnx": {ENCODER: "0", DECODER: "1"},
        "flavour": TENSORRT_RTX,
        "version": "11.4.1",
        "target": "12.0",
        "precision": "fp16",
        "profiles": {},
        "builder_revision": 0,
        "options": BuilderOptions(level=5),
    }
    assert set(changed) == {field.name for field in dataclasses.fields(here)}
    others = [dataclasses.replace(here, **{field: value}) for field, value in changed.items()]
    assert len({here.name, *(other.name for other in others)}) == 1 + len(changed)
    for field, other in zip(changed, others, strict=True):
        (difference,) = here.differences(other)
        assert field in difference


def test_profiles_are_those_of_the_readme():
    assert (NARROW.latents[0], NARROW.latents[2], NARROW.batch[0], NARROW.batch[2]) == (1, 256, 1, 8)
    assert (WIDE.latents[0], WIDE.latents[2], WIDE.batch[0], WIDE.batch[2]) == (1, 4096, 1, 1)


@each_direction
def test_optimal_shapes(spec, own_engine, direction):
    """Those of the reference's TensorRT port on an H200, and the batches that the backend sends."""
    chunks, bands = spec, dataclasses.replace(spec, alignment=1)
    assert chunks.alignment > 1
    for model, batch, decode in ((chunks, 8, 512), (bands, 4, 1024)):
        narrow, wide = profiles_of(model, direction)
        assert (narrow.batch, narrow.latents) == ((1, batch, 8), (1, 256, 256))
        assert (wide.batch, wide.latents) == ((1, 1, 1), (1, 256 if direction == ENCODER else decode, 4096))
        fake = FakeTensorRT(model)
        build = put_build(own_engine)
        backend = TensorRTBackend(model, build, fake, FakeGpu(fake), BackendOptions())
        assert (backend.window_batch, Autoencoder(backend).windows(direction).size) == (batch, 256)


@pytest.mark.parametrize(
    ("target", "capability", "runs"),
    [
        ("8.9", (8, 9), True),
        ("8.9", (8, 6), False),
        (PORTABLE, (8, 0), True),
        (PORTABLE, (8, 9), True),
        (PORTABLE, (12, 0), True),
        (PORTABLE, (12, 1), True),
        (PORTABLE, (7, 5), False),
        (PORTABLE, (9, 0), False),
        (PORTABLE, (10, 0), False),
        (AMPERE_PLUS, (7, 5), False),
        (AMPERE_PLUS, (8, 0), True),
        (AMPERE_PLUS, (9, 0), True),
        (AMPERE_PLUS, (12, 0), True),
    ],
)
def test_which_gpus_a_target_covers(target, capability, runs):
    assert runs_on(target, capability) is runs


@each_direction
def test_shapes(spec, direction):
    shapes = {ENCODER: (2, 2, 3 * 4096), DECODER: (2, spec.latent_width, 3)}
    assert spec.input_shape(direction, 2, 3) == shapes[direction]


# --- Builds of an engine folder -------------------------------------------------------------------------------

VERSIONS = {TENSORRT: "11.4.0", TENSORRT_RTX: "1.7.1"}
CAPABILITY = (8, 9)


def put_build(engine, flavour=TENSORRT, target="8.9", contents=None, checked=True, **changes):
    """Create a build with names of directions in place of engines; `changes` replace fields of its fingerprint.

    `checked` records that the engines were checked on GPUs of capability 8.9.
    """
    fingerprint = fingerprint_of(engine.spec, "fp32", flavour, VERSIONS.get(flavour, "1.0"), target)
    fingerprint = dataclasses.replace(fingerprint, **changes)
    folder = engine.folder / "tensorrt" / fingerprint.name
    with new_build(folder):
        engines = {}
        for direction in DIRECTIONS:
            data = (contents or direction).encode()
            (folder / f"{direction}.engine").write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            engines[direction] = BuiltEngine(f"{direction}.engine", len(data), digest, 700, 1.5, None)
        build = Build(folder, fingerprint, engines)
        if checked:
            cases = [{"direction": ENCODER, "batch": 1, "latents": 1, "snr_db": 110.5}]
            Check("8.9", "Fake GPU", build.digests, cases, "fp32", None).write(folder)
        write_document(build)
    return Build.load(folder)


def choose(engine, **changes):
    arguments = {"precision": "fp32", "capability": CAPABILITY, "versions": VERSIONS} | changes
    return choose_build(engine, **arguments)


def test_fingerprint_that_is_a_link_is_replaced(own_engine, tmp_path):
    """An engine folder may come from an untrusted source, so no file behind its links is overwritten."""
    build = put_build(own_engine)
    path, target = build.folder / FINGERPRINT_FILE, tmp_path / "precious"
    path.rename(target)
    before = target.read_bytes()
    path.symlink_to(target)
    write_document(dataclasses.replace(build, engines={}))
    assert target.read_bytes() == before
    assert not path.is_symlink()
    assert Build.load(build.folder).engines == {}


def test_the_build_for_this_gpu_is_preferred(own_engine):
    with pytest.raises(
        BackendUnavailableError, match="no TensorRT engine of fp32; run: samekit export tiny-s"
    ) as caught:
        choose(own_engine)
    assert_one_line(caught.value)
    portable = put_build(own_engine, TENSORRT_RTX, PORTABLE)
    assert choose(own_engine) == portable
    fitting = put_build(own_engine)
    put_build(own_engine, target="12.0")
    assert choose(own_engine) == fitting
    assert choose(own_engine, capability=(12, 0)).fingerprint.target == "12.0"
    assert choose(own_engine, capability=(8, 0)) == portable
    with pytest.raises(BackendUnavailableError, match="--precision fp16"):
        choose(own_engine, precision="fp16")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"onnx": {ENCODER: "0", DECODER: "0"}}, "other onnx"),
        ({"version": "10.15.1"}, "version 10.15.1 instead of 11.4.0"),
        ({"builder_revision": 0}, "builder_revision 0 instead of 2"),
        ({"profiles": {}}, "other profiles"),
        ({"target": "8.6"}, "was built for 8.6, this GPU is 8.9"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_stale_engines_are_refused(own_engine, changes, reason):
    put_build(own_engine, **changes)
    with pytest.raises(StaleEngineError, match=f"{reason}.*; run: samekit export tiny-s .*--tensorrt auto") as caught:
        choose(own_engine)
    assert_one_line(caught.value)


def test_engine_of_a_flavour_that_is_not_installed(own_engine):
    put_build(own_engine)
    with pytest.raises(StaleEngineError, match=r"needs tensorrt 11.4.0, which is not installed"):
        choose(own_engine, versions={TENSORRT_RTX: "1.7.1"})


DAMAGES = {
    "fingerprint missing a field": (
        lambda path: _edit(path, lambda d: d["fingerprint"].pop("target")),
        "cannot be read",
    ),
    "fingerprint of another kind": (lambda path: _edit(path, lambda d: d.update(engines=[1])), "cannot be read"),
    "fingerprint of a later format": (lambda path: _edit(path, lambda d: d.update(format=2)), "format 2"),
    "fingerprint without a decoder": (
        lambda path: _edit(path, lambda d: d["engines"].pop(DECODER)),
        "engines of encoder only",
    ),
    "fingerprint cut short": (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read"),
    "engine cut short": (lambda path: _shorten(path.with_name("decoder.engine")), "has 6 bytes instead of 7"),
    "engine with an impossible name": (
        lambda path: _edit(path, lambda d: d["engines"][DECODER].update(file="x" * 300)),
        "is missing",
    ),
    "engine missing": (lambda path: path.with_name("encoder.engine").unlink(), "is missing"),
}


def _edit(path, change):
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_builds_are_refused(own_engine, damage):
    build = put_build(own_engine)
    inflict, message = DAMAGES[damage]
    inflict(build.folder / FINGERPRINT_FILE)
    with pytest.raises(StaleEngineError, match=rf"{message}.*; run: samekit clean") as caught:
        choose(own_engine)
    assert_one_line(caught.value)
    assert not is_whole(build.folder)


def test_command_that_deletes_a_damaged_build(own_engine):
    folder = own_engine.folder.rename(own_engine.folder.with_name("my engine"))
    build = put_build(Engine.load(folder))
    _shorten(build.folder / "decoder.engine")
    with pytest.raises(StaleEngineError) as caught:
        Build.load(build.folder)
    assert f"; run: samekit clean '{folder}', and build" in str(caught.value)


def test_contents_are_checked_when_they_are_read(own_engine):
    build = put_build(own_engine)
    (build.folder / "encoder.engine").write_bytes(b"foreign")
    assert choose(own_engine).read(DECODER) == b"decoder"
    with pytest.raises(StaleEngineError, match="contents have changed since it was built") as caught:
        choose(own_engine).read(ENCODER)
    assert_one_line(caught.value)


def test_a_build_that_fails_leaves_nothing(own_engine):
    folder = own_engine.folder / "tensorrt" / "some"

    def fail():
        with new_build(folder):
            (folder / "encoder.engine").write_bytes(b"unfinished")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(folder.parent.iterdir()) == []
    folder.parent.rmdir()
    folder.parent.write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written") as caught, new_build(folder):
        pass
    assert_one_line(caught.value)


def test_a_damaged_build_is_replaced(own_engine):
    """The folder does not count as a build while the new build is written."""
    damaged = put_build(own_engine)
    (damaged.folder / "encoder.engine").write_bytes(b"")
    with new_build(damaged.folder):
        assert build_folders(own_engine) == []
        assert list(damaged.folder.iterdir()) == []
    assert not is_whole(damaged.folder)
    assert is_whole(put_build(own_engine).folder)


def test_info_names_stale_engines_and_clean_removes_them(own_engine, monkeypatch):
    modules = {flavour: fake_module(flavour, version) for flavour, version in VERSIONS.items()}
    monkeypatch.setattr("samekit.tensorrt.flavours.installed_flavours", lambda: modules)
    current = put_build(own_engine)
    elsewhere = put_build(own_engine, target="12.0")
    stale = put_build(own_engine, builder_revision=0)
    kept = open_cache(own_engine, "fp32", "onnxruntime", onnxruntime.__version__)
    old = open_cache(own_engine, "fp32", "onnxruntime", "1.0.0")
    damaged = put_build(own_engine, TENSORRT_RTX, PORTABLE)
    _shorten(damaged.folder / "encoder.engine")
    left = own_engine.folder / "tensorrt" / "tensorrt-11.4.0-8.9-fp32-0123456789ab"
    left.mkdir()
    killed = own_engine.folder / ".export-abcdefgh"
    killed.mkdir()
    graph = own_engine.folder / "encoder.2.onnx"
    graph.touch()
    mine = own_engine.folder / "tensorrt" / "mine"
    mine.mkdir()
    failed = own_engine.folder / "tensorrt" / "some.failed.log"
    failed.touch()

    def run(command):
        result = CliRunner().invoke(main, [command, str(own_engine.folder)])
        assert result.exit_code == 0, result.output
        return [line for line in result.output.splitlines() if line.split()[0] in ("tensorrt", "removed", "nothing")]

    state = {line.split()[1].strip(":"): line for line in run("info")}
    assert set(state) == {kept.name, old.name} | {b.folder.name for b in (current, elsewhere, stale, damaged)}
    assert state[kept.name].endswith("current")
    assert "STALE: version 1.0.0 instead of" in state[old.name]
    assert state[current.folder.name].endswith(": 0 MB; at least 110.5 dB on 8.9 (Fake GPU); current")
    assert state[elsewhere.folder.name].endswith("current")
    assert "STALE: builder_revision 0 instead of 2" in state[stale.folder.name]
    assert "STALE: " in state[damaged.folder.name]

    assert {line.split()[1].strip(",") for line in run("clean")} == {
        str(path) for path in (stale.folder, old, damaged.folder, left, failed, killed, graph)
    }
    assert build_folders(own_engine) == sorted([current.folder, elsewhere.folder, kept])
    assert mine.is_dir()
    assert run("clean") == ["nothing to remove"]


# --- The backend, on a fake runtime ---------------------------------------------------------------------------


@pytest.fixture
def module(spec):
    return FakeTensorRT(spec)


@pytest.fixture
def opened(own_engine, module):
    return TensorRTBackend(own_engine.spec, put_build(own_engine), module, FakeGpu(module), BackendOptions())


def test_pieces_of_a_batch():
    def pieces(batch, latents):
        return [(piece.profile, piece.rows.start, piece.rows.stop) for piece in split(batch, latents)]

    assert pieces(1, 1) == pieces(1, 256) == [(0, 0, 1)]
    assert pieces(8, 256) == [(0, 0, 8)]
    assert pieces(19, 200) == [(0, 0, 8), (0, 8, 16), (0, 16, 19)]
    assert pieces(1, 257) == pieces(1, 4096) == [(1, 0, 1)]
    assert pieces(2, 300) == [(1, 0, 1), (1, 1, 2)]
    with pytest.raises(InputError, match="takes 1 to 4096 latents at once, got 4097; choose a smaller window"):
        split(1, 4097)


@each_direction
@pytest.mark.parametrize(("batch", "latents"), [(1, 1), (3, 5), (8, 256), (9, 2), (1, 257), (2, 300)])
def test_every_shape_comes_out_right(opened, direction, batch, latents):
    array = noise(opened.spec.input_shape(direction, batch, latents))
    np.testing.assert_allclose(
        run_direction(opened, direction, array), computed(opened.spec, direction, array), rtol=1e-5, atol=1e-4
    )


def test_too_long_is_refused_before_anything_happens(opened, module):
    with pytest.raises(InputError, match="got 4097"):
        opened.decode(np.zeros((1, 32, 4097), np.float32))
    with pytest.raises(InputError, match="got 4097"):
        opened.run_tensor(DECODER, torch.zeros(1, 32, 4097))
    assert module.events == []


@pytest.fixture
def open_with(own_engine, spec):
    """A function that opens the backend on a fake GPU with a seed, and returns it with its module."""
    build = put_build(own_engine)

    def open_(seed=0, module=FakeTensorRT, **options):
        module = module(spec)
        return TensorRTBackend(spec, build, module, FakeGpu(module, seed), BackendOptions(**options)), module

    return open_


def submitted(backend, shapes):
    """Submit noise of each shape, with as many results pending as the backend takes; check every output."""
    pending = deque()
    for seed, shape in enumerate([*shapes, *[None] * backend.most_pending]):
        if shape:
            array = noise(shape, seed)
            pending.append((computed(backend.spec, DECODER, array), backend.submit(DECODER, [array])))
            # The input was copied.
            array[:] = float("nan")
        if len(pending) == backend.most_pending or not shape:
            expected, fetch = pending.popleft() if pending else (None, None)
            if fetch:
                np.testing.assert_allclose(fetch(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}], ids=["plain", "graph"])
def test_work_is_ordered(open_with, options):
    """Whatever the order of work that the streams allow, the results are right, and no memory is reused too early."""
    for seed in range(30):
        backend, module = open_with(seed, **options)
        submitted(backend, [(2, 32, 3), (2, 32, 3), (9, 32, 2), (1, 32, 5), (2, 32, 3), (9, 32, 2), (2, 32, 3)] * 2)
        backend.close()
        assert module.faults == []


@pytest.mark.parametrize("module", [FakeTensorRT, FakeRTX])
def test_few_recorded_shapes_are_kept(open_with, module):
    """A recording that is dropped may still be at work."""
    for seed in range(20):
        backend, fake = open_with(seed, module, cuda_graph=True)
        arrays = [noise((1, 32, latents), latents) for latents in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 1, 1)]
        fetches = [backend.submit(DECODER, [array]) for array in arrays]
        for array, fetch in zip(arrays, fetches, strict=True):
            np.testing.assert_allclose(fetch(), computed(backend.spec, DECODER, array), rtol=1e-5, atol=1e-4)
        backend.close()
        assert fake.faults == []
        # One context for the profile, and one for each recording; the first shape was recorded twice.
        assert len(fake.profiles) == 1 + 6


def test_the_shape_that_was_used_least_recently_is_dropped(open_with):
    backend, fake = open_with(cuda_graph=True)

    def new_contexts(*lengths):
        before = len(fake.profiles)
        for latents in lengths:
            backend.decode(noise((1, 32, latents), latents))
        return len(fake.profiles) - before

    assert new_contexts(1, 1, 2, 2, 3, 3, 4, 4) == 1 + 4
    # A fifth shape takes the place of the second one.
    assert new_contexts(1, 5, 5) == 1
    assert new_contexts(1, 3, 4) == 0
    assert new_contexts(2, 2) == 1


def test_next_batch_is_uploaded_while_one_runs(open_with):
    backend, module = open_with(window_batch=4)
    backend.decode(noise((2, 32, 3)))
    module.events.clear()
    windows = [(Window(0, 3, 0, 3), noise((2, 32, 3), seed)) for seed in range(6)]
    assert len(list(run_windows(backend, DECODER, iter(windows)))) == 6
    # Four rows are one batch. A batch is uploaded, run and downloaded.
    batch = ["copy", "120 bytes of scratch", "launch", "copy"]
    assert module.events == [*batch, *batch, "wait", *batch, "wait", "wait"]


def test_copies_do_not_wait_for_the_engine(open_with):
    """While the engine runs a batch, the next one is uploaded and the last one downloaded."""
    backend, module = open_with()
    arrays = [noise((1, 32, 3), seed) for seed in range(2)]
    last = backend.submit(DECODER, [arrays[0]])
    module.gpu.engines.synchronize()
    module.gpu.engines.is_held = True
    following = backend.submit(DECODER, [arrays[1]])
    module.gpu.uploads.synchronize()
    np.testing.assert_allclose(last(), computed(backend.spec, DECODER, arrays[0]), rtol=1e-5, atol=1e-4)
    module.gpu.engines.is_held = False
    np.testing.assert_allclose(following(), computed(backend.spec, DECODER, arrays[1]), rtol=1e-5, atol=1e-4)


def test_no_lock_is_held_while_the_gpu_works(open_with):
    backend, module = open_with()
    arrays = [noise((1, 32, 3), seed) for seed in range(2)]
    with ThreadPoolExecutor(1) as pool:
        module.gpu.gate.clear()
        first = pool.submit(backend.decode, arrays[0])
        while "wait" not in module.events and not first.done():
            time.sleep(0.001)
        fetch = backend.submit(DECODER, [arrays[1]])
        assert not first.done()
        module.gpu.gate.set()
        for array, output in zip(arrays, (first.result(), fetch()), strict=True):
            np.testing.assert_allclose(output, computed(backend.spec, DECODER, array), rtol=1e-5, atol=1e-4)


def test_results_that_are_not_fetched(open_with):
    """They take no memory, and the GPU may be at work when the backend is closed."""
    for seed in range(20):
        backend, module = open_with(seed)
        for _ in range(3):
            backend.submit(DECODER, [noise((2, 32, 3))])
        submitted(backend, [(1, 32, 3)])
        late = backend.submit(DECODER, [noise((2, 32, 3))])
        backend.close()
        assert module.faults == []
        with pytest.raises(BackendError, match="is closed"):
            late()


def test_backend_that_is_dropped_without_close(open_with):
    """After an error, nothing may refer to the model any more while the next batch still runs."""
    for seed in range(20):
        backend, module = open_with(seed)
        for _ in range(3):
            backend.submit(DECODER, [noise((2, 32, 3))])
        del backend
        gc.collect()
        module.gpu.engines.synchronize()
        assert module.faults == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_results_that_wait_while_the_process_is_forked(open_with):
    """The child cannot fetch them, and the parent can."""
    backend, module = open_with()
    array = noise((2, 32, 3))
    fetch = backend.submit(DECODER, [array])

    def child():
        with pytest.raises(BackendError, match="before this process was forked"):
            fetch()
        backend.close()

    assert in_a_fork(child) == 0
    np.testing.assert_allclose(fetch(), computed(backend.spec, DECODER, array), rtol=1e-5, atol=1e-4)
    assert module.faults == []


def test_results_do_not_hold_pinned_memory(open_with):
    backend, module = open_with()
    outputs = [backend.decode(noise((1, 32, 3), seed)) for seed in range(3)]
    assert len(outputs) == 3
    assert len(module.gpu.host) == 0


def test_windows_of_several_lengths_are_one_batch(opened):
    pieces = [noise((rows, 32, latents), latents) for rows, latents in ((1, 3), (2, 5), (1, 1))]
    output = opened.submit(DECODER, pieces)()
    padded = np.concatenate([np.pad(piece, [(0, 0), (0, 0), (0, 5 - piece.shape[2])]) for piece in pieces])
    np.testing.assert_allclose(output, computed(opened.spec, DECODER, padded), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("pieces", [[(1, 32, 3), (1, 31, 3)], [(1, 32, 3), (32, 3)], [(1, 32, 3), (1, 32, 0)]], ids=str)
def test_batches_that_cannot_be(opened, module, pieces):
    with pytest.raises(InputError, match=r"takes float32 .batch, 32, length."):
        opened.submit(DECODER, [np.zeros(shape, np.float32) for shape in pieces])
    assert module.events == []


def test_engines_are_read_when_they_are_used(opened, module):
    assert module.events == []
    opened.decode(noise((1, 32, 1)))
    opened.decode(noise((1, 32, 2)))
    assert [event for event in module.events if event.startswith("load")] == ["load decoder"]
    opened.encode(noise((1, 2, 4096)))
    assert [event for event in module.events if event.startswith("load")] == ["load decoder", "load encoder"]


def test_a_context_for_each_profile_when_it_is_used(opened, module):
    for latents in (1, 256, 2):
        opened.decode(noise((1, 32, latents)))
    assert module.profiles == [0]
    opened.decode(noise((1, 32, 257)))
    opened.decode(noise((1, 32, 4096)))
    assert module.profiles == [0, 1]


def test_scratch_is_what_the_shape_needs(opened, module):
    for latents in (1, 100, 1000):
        opened.decode(noise((1, 32, latents)))
    module.fails = "memory"
    opened.decode(noise((1, 32, 1000)))
    sizes = [event.split()[0] for event in module.events if "scratch" in event and "bytes" in event]
    assert sizes == ["10", "1000", "10000", "5001"]


FAILURES = {
    "context": "could not create an execution context",
    "profile": "could not select profile 0",
    "shape": r"could not take the shape \(1, 32, 3\)",
    "infer": "could not infer the shapes of .'audio'.",
    "output shape": r"could not give \(1, 2, 12288\): it infers \(1, 2, 3\)",
    "address of latents": "could not bind the input",
    "address of audio": "could not bind the output",
    "launch": "could not launch the engine",
}


@pytest.mark.parametrize("step", FAILURES)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_every_answer_is_heard(opened, module, step, cuda_graph):
    opened._cuda_graph = cuda_graph
    module.fails = step
    for _ in range(2):
        with pytest.raises(BackendError, match=f"TensorRT {FAILURES[step]}; see .*use backend onnxruntime") as caught:
            opened.decode(noise((1, 32, 3)))
    assert_one_line(caught.value)
    module.fails = None
    array = noise((1, 32, 3))
    for _ in range(3):
        np.testing.assert_allclose(opened.decode(array), computed(opened.spec, DECODER, array), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("step", ["pinned", "empty", "scratch"])
def test_gpu_without_memory(opened, monkeypatch, step):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 byte.\nmore")

    monkeypatch.setattr(opened.gpu, step, fail)
    calls = [lambda: opened.decode(noise((1, 32, 3)))]
    if step in ("empty", "scratch"):
        calls.append(lambda: opened.run_tensor(DECODER, torch.zeros(1, 32, 3)))
    for call in calls:
        with pytest.raises(BackendError, match=r"failed on \[1, 32, 3\] \(CUDA out .*; try a smaller window") as caught:
            call()
        assert_one_line(caught.value)
    monkeypatch.undo()
    opened.decode(noise((1, 32, 3)))


def test_engine_that_cannot_be_loaded(opened, module):
    module.fails = "load"
    with pytest.raises(
        StaleEngineError, match=r"decoder\.engine: tensorrt 11.4.0 cannot load it, .*; update"
    ) as caught:
        opened.decode(noise((1, 32, 3)))
    assert_one_line(caught.value)


def test_engine_that_was_changed_is_never_run(opened, module):
    (opened.build.folder / "decoder.engine").write_bytes(b"encoder")
    with pytest.raises(StaleEngineError, match="contents have changed"):
        opened.decode(noise((1, 32, 3)))
    assert module.events == []


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_results_are_the_callers_own(opened, cuda_graph):
    opened._cuda_graph = cuda_graph
    arrays = [noise((1, 32, 3), seed) for seed in range(4)]
    outputs = [opened.decode(array) for array in arrays]
    for array, output in zip(arrays, outputs, strict=True):
        np.testing.assert_allclose(output, computed(opened.spec, DECODER, array), rtol=1e-5, atol=1e-4)
    tensors = [opened.run_tensor(DECODER, torch.from_numpy(array)) for array in arrays]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_a_shape_that_comes_again_is_recorded(opened, module):
    opened._cuda_graph = True
    for latents in (3, 3, 3, 3, 4, 3, 4, 4):
        array = noise((1, 32, latents), latents)
        output = opened.decode(array)
        np.testing.assert_allclose(output, computed(opened.spec, DECODER, array), rtol=1e-5, atol=1e-4)
    assert module.events.count("capture") == 2
    # There is one context for the profile, and one for each recording.
    assert len(module.profiles) == 3


def test_tensorrt_rtx_records_by_itself(own_engine, spec):
    module = FakeRTX(spec)
    with TensorRTBackend(
        own_engine.spec, put_build(own_engine), module, FakeGpu(module), BackendOptions(cuda_graph=True)
    ) as backend:
        for seed in range(4):
            array = noise((1, 32, 3), seed)
            np.testing.assert_allclose(backend.decode(array), computed(spec, DECODER, array), rtol=1e-5, atol=1e-4)
    assert "capture" not in module.events


def test_kernels_of_tensorrt_rtx_are_kept(own_engine, spec):
    """They are compiled once for each shape, and again after a change of the driver."""
    build = put_build(own_engine, TENSORRT_RTX, PORTABLE)

    def compiled(driver="driver 1", gpu_driver="13000", **options):
        module = FakeRTX(spec)
        module.driver = driver
        gpu = FakeGpu(module)
        gpu.driver = gpu_driver
        with TensorRTBackend(spec, build, module, gpu, BackendOptions(**options)) as backend:
            for latents in (3, 3, 4):
                array = noise((1, 32, latents), latents)
                np.testing.assert_allclose(backend.decode(array), computed(spec, DECODER, array), rtol=1e-5, atol=1e-4)
        return module.events.count("compile")

    assert compiled() == 2
    assert compiled() == compiled(cuda_graph=True) == 0
    assert [path.name for path in build.folder.glob("*.cache")] == ["decoder-8.9-cuda13000.cache"]
    # An update of the driver that keeps its version of CUDA, and one that does not.
    assert compiled("driver 2") == 2
    assert compiled("driver 2") == 0
    assert compiled("driver 3", "13010") == 2
    (build.folder / "decoder-8.9-cuda13000.cache").write_bytes(b"\xff damaged")
    assert compiled("driver 2") == 2


def test_kernels_that_cannot_be_kept(own_engine, spec, caplog):
    caplog.set_level(logging.INFO, "samekit")
    build = put_build(own_engine, TENSORRT_RTX, PORTABLE)
    (build.folder / "decoder-8.9-cuda13000.cache").mkdir()
    module = FakeRTX(spec)
    with TensorRTBackend(spec, build, module, FakeGpu(module), BackendOptions()) as backend:
        backend.decode(noise((1, 32, 3)))
    assert "the compiled kernels are not kept" in caplog.text


def test_used_by_several_threads(opened):
    arrays = [noise((1, 32, 1 + seed % 3), seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(opened.decode, arrays))
    for array, output in zip(arrays, outputs, strict=True):
        np.testing.assert_allclose(output, computed(opened.spec, DECODER, array), rtol=1e-5, atol=1e-4)


def test_close(opened):
    opened.decode(noise((1, 32, 1)))
    opened.close()
    with pytest.raises(BackendError, match="is closed; open the model again"):
        opened.decode(noise((1, 32, 1)))


# --- Tensors on the device ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [{}, {"chunked": True, "chunk_size": 8, "overlap": 4}], ids=["windows", "chunks"])
def test_tensors_stay_on_the_device(opened, module, chunks):
    model = AutoencoderModel.__new__(AutoencoderModel)
    model.autoencoder = Autoencoder(opened, window=16)
    audio, latents = noise((2, 2, 40 * 4096 + 5)), noise((2, 32, 41))
    from_arrays = model.encode(audio, 44_100, **chunks), model.decode(latents, **chunks)
    module.events.clear()
    from_tensors = (
        model.encode(torch.from_numpy(audio), 44_100, **chunks),
        model.decode(torch.from_numpy(latents), **chunks),
    )
    assert not {"copy", "wait"} & set(module.events)
    for array, tensor in zip(from_arrays, from_tensors, strict=True):
        assert isinstance(tensor, torch.Tensor)
        np.testing.assert_array_equal(array, tensor.numpy())


@pytest.mark.parametrize("layout", ["to_sparse", "_neg_view"])
def test_tensors_of_any_layout(opened, layout):
    codec = Autoencoder(opened)
    z = torch.from_numpy(noise((1, 32, 6)))
    expected = codec.decode_audio(-z if layout == "_neg_view" else z)
    np.testing.assert_array_equal(expected.numpy(), codec.decode_audio(getattr(z, layout)()).numpy())


def test_tensors_that_cannot_be_used(opened):
    codec = Autoencoder(opened)
    with pytest.raises(InputError, match="NaN or infinity"):
        codec.decode_audio(torch.full((1, 32, 2), float("nan")))
    with pytest.raises(InputError, match=r"takes float32 .batch, 32, length."):
        codec.decode_audio(torch.zeros(1, 31, 2))
    with pytest.raises(InputError, match="empty"):
        codec.decode_audio(torch.zeros(0, 32, 2))
    halves = torch.zeros(1, 32, 2, dtype=torch.float16)
    assert not opened.accepts(halves)
    with pytest.raises(BackendError, match="tensorrt backend cannot read this tensor; pass it as a NumPy array"):
        opened.run_tensor(DECODER, halves)
    assert not opened.accepts(np.zeros((1, 32, 2), np.float32))


def test_other_backends_take_arrays_only(engine_of):
    backend = open_backend(engine_of("tiny-s").folder, "onnxruntime", BackendOptions(device="cpu", threads=1))
    assert not backend.accepts(torch.zeros(1, 32, 2))
    with pytest.raises(BackendError, match="onnxruntime backend cannot read this tensor; pass") as caught:
        backend.run_tensor(DECODER, torch.zeros(1, 32, 2))
    assert_one_line(caught.value)


# --- Opening --------------------------------------------------------------------------------------------------


def test_no_gpu(own_engine, monkeypatch):
    put_build(own_engine)
    monkeypatch.setattr("samekit.tensorrt.gpu.has_driver", lambda: False)
    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver, which TensorRT needs; use another"):
        open_backend(own_engine.folder, "tensorrt", BackendOptions())
    monkeypatch.setattr("samekit.tensorrt.gpu.has_driver", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        BackendUnavailableError, match="finds no CUDA device, which TensorRT needs; use another"
    ) as caught:
        open_backend(own_engine.folder, "tensorrt", BackendOptions())
    assert_one_line(caught.value)
    with pytest.raises(BackendUnavailableError, match="on GPUs only; choose device cuda"):
        open_backend(own_engine.folder, "tensorrt", BackendOptions(device="cpu"))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailableError, match=r"torch is not installed; run: .*pip install"):
        open_backend(own_engine.folder, "tensorrt", BackendOptions())


@pytest.fixture
def gpu_here(monkeypatch, module):
    """Pretend that the machine has a GPU and TensorRT, while a backend is opened."""
    monkeypatch.setattr("samekit.tensorrt.opening.Gpu", lambda _: FakeGpu(module))
    monkeypatch.setattr("samekit.tensorrt.opening.installed_flavours", lambda: {TENSORRT: module})
    monkeypatch.setattr("samekit.backends.onnxruntime.CUDA_PROVIDER", "none")


@pytest.mark.usefixtures("gpu_here")
def test_auto_takes_tensorrt_first(own_engine, caplog):
    caplog.set_level(logging.INFO, "samekit")
    warn_experimental.cache_clear()
    build = put_build(own_engine)
    backend = open_backend(own_engine.folder, "auto", BackendOptions())
    assert (backend.name, backend.device, backend.build) == ("tensorrt", "cuda", build)
    notice, choice = caplog.messages
    assert "experimental: samekit's tests have not run it on a GPU yet" in notice
    assert "`make gpu-check`" in notice
    assert choice == "backend tensorrt on cuda, fp32"
    caplog.clear()
    # The notice is given once.
    open_backend(own_engine.folder, "auto", BackendOptions())
    assert caplog.messages == [choice]
    assert backend.torch_device == "cuda:0"
    assert open_backend(own_engine.folder, "tensorrt", BackendOptions(device_id=1)).torch_device == "cuda:1"


@pytest.mark.usefixtures("gpu_here")
def test_auto_says_why_it_passed_over_a_stale_engine(own_engine, caplog):
    put_build(own_engine, builder_revision=0)
    assert open_backend(own_engine.folder, "auto", BackendOptions()).name == "onnxruntime"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "backend tensorrt passed over: " in record.getMessage()
    assert "builder_revision 0 instead of" in record.getMessage()
    with pytest.raises(StaleEngineError):
        open_backend(own_engine.folder, "tensorrt", BackendOptions())


@pytest.mark.usefixtures("gpu_here")
def test_no_flavour_is_installed(own_engine, monkeypatch):
    put_build(own_engine)
    monkeypatch.setattr("samekit.tensorrt.opening.installed_flavours", dict)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'samekit\[gpu\]'.* or ") as caught:
        open_backend(own_engine.folder, "tensorrt", BackendOptions())
    assert_one_line(caught.value)


def test_windows_fit_the_narrow_profile(opened):
    codec = Autoencoder(opened)
    assert all(codec.windows(direction).size <= NARROW.latents[2] for direction in DIRECTIONS)


class FakeStream:
    """A stream that records which streams it waits for."""

    cuda_stream = 7

    def __init__(self, events, name):
        self.events, self.name = events, name

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def cuda_events(monkeypatch):
    """Replace what `Gpu` uses of PyTorch by functions that record their calls in this list."""
    events = []
    monkeypatch.setattr("samekit.tensorrt.gpu.has_driver", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    names = iter(("upload", "engine", "download"))
    monkeypatch.setattr("torch.cuda.Stream", lambda _: FakeStream(events, next(names)))
    monkeypatch.setattr("torch.cuda.current_stream", lambda: FakeStream(events, "caller"))
    monkeypatch.setattr("torch.cuda.device", lambda _: nullcontext())

    @contextmanager
    def current(stream):
        events.append(f"PyTorch goes on with {stream.name}")
        try:
            yield
        finally:
            events.append("PyTorch goes back")

    monkeypatch.setattr("torch.cuda.stream", current)
    return events


def test_streams_wait_for_each_other(cuda_events):
    with pytest.raises(BackendUnavailableError, match="there is no GPU 1, only 1; choose"):
        Gpu(1)
    gpu = Gpu(0)

    def fail():
        with gpu.ordered():
            cuda_events.append(f"work on {gpu.engines.cuda_stream}")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    steps = ["engine waits for caller", "PyTorch goes on with engine", "work on 7"]
    assert cuda_events == [*steps, "PyTorch goes back", "caller waits for engine"]
    assert not gpu.contains(torch.zeros(1))
    assert not gpu.contains(np.zeros(1))


def test_graphs_are_captured_in_their_thread_only(cuda_events, monkeypatch):
    """By default, an allocation in another thread breaks a capture."""
    assert "capture_error_mode" in inspect.signature(torch.cuda.graph).parameters

    @contextmanager
    def graph(recorded, *, stream, capture_error_mode):
        cuda_events.append(f"{recorded.name} of {stream.name}, {capture_error_mode}")
        yield

    recorded = SimpleNamespace(name="graph", replay=lambda: cuda_events.append("replay"))
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: recorded)
    monkeypatch.setattr("torch.cuda.graph", graph)
    Gpu(0).capture(lambda: cuda_events.append("launch"))()
    assert cuda_events == ["graph of engine, thread_local", "launch", "replay"]


# --- ONNX Runtime's providers ---------------------------------------------------------------------------------


@pytest.fixture
def asked_of_onnxruntime(monkeypatch):
    """Record the providers of sessions, with an ONNX Runtime that has every provider."""
    asked = []

    def session(path, options, providers):
        asked.append(dict(providers))
        names = [name for name, _ in providers]
        output = np.zeros((1, 2, 4096), np.float32)
        return SimpleNamespace(
            get_providers=lambda: names,
            get_inputs=lambda: [SimpleNamespace(name="latents")],
            run=lambda *_: [output],
        )

    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)
    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    return asked


def test_engine_cache_of_onnxruntime(own_engine, asked_of_onnxruntime):
    providers = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    backend = open_backend(own_engine.folder, "onnxruntime", BackendOptions(providers=providers, device_id=1))
    backend.decode(np.zeros((1, 32, 1), np.float32))
    (asked,) = asked_of_onnxruntime
    settings = asked["TensorrtExecutionProvider"]
    build = Build.load(Path(settings["trt_engine_cache_path"]))
    assert build.folder.parent == own_engine.folder / "tensorrt"
    assert (build.fingerprint.flavour, build.engines) == ("onnxruntime", {})
    assert build.fingerprint.onnx == {
        direction: own_engine.spec.graphs["fp32"][direction].sha256 for direction in DIRECTIONS
    }
    assert settings["trt_profile_min_shapes"] == "latents:1x32x1"
    assert settings["trt_profile_max_shapes"] == "latents:8x32x256"
    assert asked["CUDAExecutionProvider"] == {"device_id": 1, "use_tf32": "0"}
    assert backend.longest_window == 256
    # The TensorRT backend does not run the cache. The second session uses the same folder.
    with pytest.raises(BackendUnavailableError, match="no TensorRT engine"):
        choose(own_engine)
    open_backend(own_engine.folder, "onnxruntime", BackendOptions(providers=providers))
    assert build_folders(own_engine) == [build.folder]


def test_engine_cache_that_cannot_be_kept(own_engine, asked_of_onnxruntime, caplog):
    (own_engine.folder / "tensorrt").write_bytes(b"")
    options = BackendOptions(providers=("TensorrtExecutionProvider",))
    open_backend(own_engine.folder, "onnxruntime", options).decode(np.zeros((1, 32, 1), np.float32))
    assert "trt_engine_cache_path" not in asked_of_onnxruntime[0]["TensorrtExecutionProvider"]
    assert "are not kept" in caplog.text


# --- On a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
class TestOnGpu:
    """Tests beyond the contract of every backend."""

    @pytest.fixture(params=KINDS)
    def name(self, request):
        return request.param

    @pytest.fixture
    def backend(self, built_of, name):
        with open_backend(built_of(name).folder, "tensorrt", BackendOptions()) as backend:
            yield backend

    @each_direction
    @pytest.mark.parametrize(("batch", "latents"), [(1, 255), (1, 256), (1, 257), (9, 3), (2, 301), (1, 1292)])
    def test_equals_eager_pytorch_in_both_profiles(self, backend, eager_of, name, direction, batch, latents):
        array = example_input(backend.spec, direction, batch, latents, seed=latents)
        eager = eager_of(name)
        reference = in_one_pass(eager.encode if direction == ENCODER else eager.decode, array)
        assert_close(reference, run_direction(backend, direction, array), 90)

    def test_input_from_another_stream(self, backend, eager_of, name):
        array = example_input(backend.spec, DECODER, 4, 200, seed=0)
        reference = in_one_pass(eager_of(name).decode, array)
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                tensor = torch.zeros(array.shape, device="cuda")
                # Without waiting for this, the engine would read zeros.
                torch.cuda._sleep(50_000_000)
                tensor.copy_(torch.from_numpy(array))
                assert_close(reference, backend.run_tensor(DECODER, tensor).cpu().numpy(), 90)

    def test_cuda_graph_gives_the_same(self, built_of, backend, name):
        options = BackendOptions(cuda_graph=True)
        with open_backend(built_of(name).folder, "tensorrt", options) as recording:
            for latents in (7, 7, 7, 8, 8, 7):
                array = example_input(backend.spec, DECODER, 1, latents, seed=latents)
                np.testing.assert_array_equal(recording.decode(array), backend.decode(array))

    def test_short_windows_take_little_memory(self, backend):
        array = example_input(backend.spec, DECODER, 1, 16, seed=0)
        backend.decode(array)
        torch.cuda.reset_peak_memory_stats()
        backend.decode(array)
        assert torch.cuda.max_memory_allocated() < 300_000_000

    def test_pinned_memory_is_reused(self, backend):
        def allocations():
            backend.decode(example_input(backend.spec, DECODER, 2, 16, seed=0))
            return torch.cuda.host_memory_stats()["num_host_alloc"]

        before = [allocations() for _ in range(4)][-1]
        assert [allocations() for _ in range(10)] == [before] * 10

    def test_tensors_stay_on_the_device(self, backend):
        codec = Autoencoder(backend)
        latents = torch.randn(2, backend.spec.latent_width, 300, device="cuda")
        audio = codec.decode_audio(latents)
        assert audio.is_cuda
        assert_close(codec.decode_audio(latents.cpu().numpy()), audio.cpu().numpy(), 110)
