"""Checks of TensorRT engines: an engine that computes wrong values is never published, and never runs.

The fake TensorRT computes what the graphs compute, in ONNX Runtime, or something wrong.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from fake_tensorrt import WRONG, FakeGpu, FakeTensorRT, answers_of
from helpers import assert_one_line, noise, seeded
from test_tensorrt import put_build

from samekit.backends.base import BackendOptions
from samekit.backends.selection import open_backend
from samekit.cli.main import main
from samekit.engine.builds import Build, build_folders
from samekit.engine.fingerprint import PORTABLE, TENSORRT, TENSORRT_RTX, profiles_of
from samekit.engine.folder import Engine
from samekit.engine.spec import DECODER, DIRECTIONS, ENCODER
from samekit.errors import BackendUnavailableError, StaleEngineError, VerificationError
from samekit.tensorrt.check import CASES
from samekit_export.to_tensorrt import build_engines


@pytest.fixture
def own_engine(small_engine, tmp_path):
    """A copy of an engine folder of small graphs, without a build."""
    folder = shutil.copytree(small_engine, tmp_path / "own", ignore=shutil.ignore_patterns("tensorrt"))
    return Engine.load(folder)


@pytest.fixture
def answer(own_engine):
    return answers_of(own_engine)


@pytest.fixture
def module(own_engine, answer, monkeypatch, tmp_path):
    """A TensorRT that builds and runs on the fake GPU of this machine."""
    module = FakeTensorRT(own_engine.spec, answer)
    monkeypatch.setenv("SAMEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("samekit.tensorrt.opening.Gpu", lambda _: FakeGpu(module))
    monkeypatch.setattr("samekit.tensorrt.opening.installed_flavours", lambda: {TENSORRT: module})
    return module


def build(engine, module):
    return build_engines(engine, "fp32", module, "8.9", FakeGpu(module))


def record_of(build):
    return json.loads((build.folder / "check-8.9.json").read_text(encoding="utf-8"))


def test_engines_are_checked_before_they_are_published(own_engine, module, progress):
    built = build(own_engine, module)
    record = record_of(built)
    assert record["gpu"] == "Fake GPU"
    assert record["failure"] is None
    assert record["engines"] == {direction: built.engines[direction].sha256 for direction in DIRECTIONS}
    cases = [(case["direction"], case["batch"], case["latents"]) for case in record["cases"]]
    assert cases == [(direction, *case) for direction in DIRECTIONS for case in CASES]
    assert all(case["snr_db"] >= 90 for case in record["cases"])
    assert {latents > 256 for _, latents in CASES} == {False, True}
    # Opening checks nothing again.
    module.events.clear()
    with open_backend(own_engine.folder, "tensorrt", BackendOptions()) as backend:
        assert module.events == []
        array = noise((1, 4, 3))
        np.testing.assert_array_equal(backend.decode(array), module.answer(DECODER, array))


def test_profiles_of_the_builder(own_engine, module):
    build(own_engine, module)
    for direction, config in zip(DIRECTIONS, module.configs, strict=True):
        names = {ENCODER: "audio", DECODER: "latents"}
        shapes = [profile[names[direction]] for profile in config.profiles]
        assert shapes == [
            tuple(own_engine.spec.input_shape(direction, *size) for size in zip(*profile, strict=True))
            for profile in profiles_of(own_engine.spec, direction)
        ]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_engines_are_not_published(own_engine, module, wrong):
    module.wrong = wrong
    with pytest.raises(VerificationError, match=r"wrong values on Fake GPU: .* dB at \d x \d+ latents") as caught:
        build(own_engine, module)
    assert_one_line(caught.value)
    assert build_folders(own_engine) == []
    (log,) = (own_engine.folder / "tensorrt").iterdir()
    assert log.name.endswith(".failed.log")


def test_the_error_names_the_case(own_engine, module):
    module.wrong = next(wrong for wrong in WRONG if wrong.__name__ == "wide_profile_wrong")
    with pytest.raises(VerificationError, match=r"fp32 encoder .* 6.02 dB at 1 x 257 latents \(wide profile\), 90.0"):
        build(own_engine, module)
    module.wrong = next(wrong for wrong in WRONG if "33" in wrong.__name__)
    with pytest.raises(VerificationError, match=r"fp32 decoder .* 60.0 dB at 4 x 33 latents \(narrow profile\), 90.0"):
        build(own_engine, module)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_engines_never_run(own_engine, module, wrong, caplog):
    """An engine that was built without a GPU is checked when it is opened."""
    built = put_build(own_engine, checked=False)
    module.wrong = wrong
    with pytest.raises(StaleEngineError, match=r"wrong values on Fake GPU: .*; use backend onnxruntime") as caught:
        open_backend(own_engine.folder, "tensorrt", BackendOptions())
    assert_one_line(caught.value)
    # The result is recorded: the engine is not even loaded again.
    assert record_of(built)["failure"]
    module.events.clear()
    with pytest.raises(StaleEngineError, match=r"no TensorRT engine can be used .*wrong values on Fake GPU"):
        open_backend(own_engine.folder, "tensorrt", BackendOptions())
    assert module.events == []
    caplog.set_level(logging.WARNING, "samekit")
    with open_backend(own_engine.folder, "auto", BackendOptions(threads=1)) as backend:
        assert backend.name == "onnxruntime"
    assert "wrong values on Fake GPU" in caplog.text


def test_portable_engines_are_checked_once_on_each_kind_of_gpu(own_engine, module, monkeypatch):
    rtx = FakeTensorRT(own_engine.spec, module.answer)
    rtx.__name__, rtx.__version__ = TENSORRT_RTX, "1.7.1"
    gpu = FakeGpu(rtx)
    monkeypatch.setattr("samekit.tensorrt.opening.Gpu", lambda _: gpu)
    monkeypatch.setattr("samekit.tensorrt.opening.installed_flavours", lambda: {TENSORRT_RTX: rtx})
    built = put_build(own_engine, TENSORRT_RTX, PORTABLE, checked=False)
    assert not list(built.folder.glob("check-*"))
    loads = []
    for capability in ((8, 9), (8, 9), (12, 0), (8, 9)):
        gpu.capability = capability
        rtx.events.clear()
        open_backend(own_engine.folder, "tensorrt", BackendOptions()).close()
        loads.append(sum(event.startswith("load") for event in rtx.events))
    assert loads == [2, 0, 2, 0]
    assert sorted(path.name for path in built.folder.glob("check-*")) == ["check-12.0.json", "check-8.9.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(engines={ENCODER: "0", DECODER: "0"}),
        lambda record: record.update(capability="12.0"),
        lambda record: record.update(format=2),
        lambda record: record.update(cases=[]),
        lambda record: record.update(cases=[1]),
        lambda record: record.update(cases=[{"direction": ENCODER, "batch": 1, "latents": 1}]),
        lambda record: record.update(failure=1),
        lambda record: record.pop("gpu"),
        lambda record: record.update(more=1),
    ],
)
def test_records_that_do_not_count(own_engine, module, change):
    built = build(own_engine, module)
    record = record_of(built)
    change(record)
    (built.folder / "check-8.9.json").write_text(json.dumps(record), encoding="utf-8")
    module.wrong = WRONG[0]
    with pytest.raises(StaleEngineError, match="wrong values"):
        open_backend(own_engine.folder, "tensorrt", BackendOptions())


@pytest.mark.parametrize("text", ["", "[", "[1]", "null", "[" * 100_000])
def test_records_that_cannot_be_read(own_engine, module, text, caplog):
    built = put_build(own_engine)
    (built.folder / "check-8.9.json").write_text(text, encoding="utf-8")
    open_backend(own_engine.folder, "tensorrt", BackendOptions()).close()
    assert "cannot be read" in caplog.text
    assert record_of(built)["failure"] is None


def test_record_that_cannot_be_written(own_engine, module, caplog):
    built = put_build(own_engine, checked=False)
    (built.folder / "check-8.9.json").mkdir()
    open_backend(own_engine.folder, "tensorrt", BackendOptions()).close()
    assert "what was measured on this GPU is not kept" in caplog.text
    module.wrong = WRONG[0]
    for _ in range(2):
        with pytest.raises(StaleEngineError, match="wrong values"):
            open_backend(own_engine.folder, "tensorrt", BackendOptions())


def test_unchecked_engines_do_not_run_without_onnxruntime(own_engine, module, monkeypatch):
    put_build(own_engine, checked=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"not checked on this kind of GPU, .*pip install") as caught:
        open_backend(own_engine.folder, "tensorrt", BackendOptions())
    assert_one_line(caught.value)
    assert module.events == []


def test_failure_of_the_gpu_is_not_recorded(own_engine, module):
    built = put_build(own_engine, checked=False)
    module.fails = "launch"
    with pytest.raises(Exception, match="could not launch"):
        open_backend(own_engine.folder, "tensorrt", BackendOptions())
    module.fails = None
    assert not list(built.folder.glob("check-*"))
    open_backend(own_engine.folder, "tensorrt", BackendOptions()).close()


def test_half_precision_is_compared_with_float32(own_engine, module, tmp_path):
    """The floor of fp16 is for its distance from float32."""
    graphs = own_engine.spec.graphs["fp32"]
    spec = dataclasses.replace(own_engine.spec, graphs={"fp32": graphs, "fp16": graphs})
    (own_engine.folder / "spec.json").write_text(spec.to_json(), encoding="utf-8")
    module.wrong = lambda direction, profile, latents, output: output * np.float32(1.005)
    with pytest.raises(VerificationError, match=r"fp32 encoder .* 46.02 dB at 1 x 1 latents .*, 90.0 dB is the least"):
        build(own_engine, module)
    built = build_engines(Engine.load(own_engine.folder), "fp16", module, "8.9", FakeGpu(module))
    record = record_of(built)
    assert record["reference"] == "fp32"
    assert {round(case["snr_db"]) for case in record["cases"]} == {46}


def test_info_says_what_was_checked(own_engine, module, monkeypatch):
    modules = {TENSORRT: module, TENSORRT_RTX: SimpleNamespace(__version__="1.7.1")}
    monkeypatch.setattr("samekit.tensorrt.flavours.installed_flavours", lambda: modules)
    put_build(own_engine)
    put_build(own_engine, TENSORRT_RTX, PORTABLE, checked=False)
    done = CliRunner().invoke(main, ["info", str(own_engine.folder)])
    assert done.exit_code == 0, done.output
    checked, unchecked = [line for line in done.output.splitlines() if line.strip().startswith("tensorrt ")]
    assert "at least 110.5 dB on 8.9 (Fake GPU); current" in checked
    assert "; not checked on a GPU; current" in unchecked
    done = CliRunner().invoke(main, ["info", "--json", str(own_engine.folder)])
    builds = json.loads(done.stdout)["tensorrt"]
    assert [each["checks"] for each in builds] == ["at least 110.5 dB on 8.9 (Fake GPU)", "not checked on a GPU"]


class TestVerify:
    @pytest.fixture(autouse=True)
    def _quick(self, own_engine, monkeypatch):
        """The checkpoint of the engine is not that of its small graphs, which are not measured."""
        spec = dataclasses.replace(own_engine.spec, source_sha256=seeded("tiny-s").sha256)
        (own_engine.folder / "spec.json").write_text(spec.to_json(), encoding="utf-8")
        monkeypatch.setattr("samekit_export.verify.verify", lambda *_: [])

    def verify(self, engine, *options):
        return CliRunner().invoke(main, ["verify", *options, str(engine.folder)])

    def test_it_checks_engines_again(self, own_engine, module):
        built = put_build(own_engine, checked=False)
        other = put_build(own_engine, target="12.0", checked=False)
        done = self.verify(own_engine)
        assert done.exit_code == 0, done.output
        assert record_of(built)["failure"] is None
        assert f"{built.folder.name}: at least " in done.output
        assert not list(other.folder.glob("check-*"))
        done = self.verify(own_engine, "--json")
        (row,) = json.loads(done.stdout)["tensorrt"]
        assert (row["name"], row["failure"], len(row["cases"])) == (built.folder.name, None, 2 * len(CASES))

    @pytest.mark.parametrize("wrong", WRONG)
    def test_wrong_engines(self, own_engine, module, wrong):
        """They are found although an earlier check passed, and do not run from then on."""
        built = put_build(own_engine)
        module.wrong = wrong
        done = self.verify(own_engine)
        assert done.exit_code == 2
        assert "computes wrong values on Fake GPU" in done.stderr
        assert record_of(built)["failure"]
        module.events.clear()
        with pytest.raises(StaleEngineError, match="wrong values on Fake GPU"):
            open_backend(own_engine.folder, "tensorrt", BackendOptions())
        assert module.events == []

    def test_without_a_gpu(self, own_engine, monkeypatch):
        monkeypatch.setattr("samekit.tensorrt.gpu.has_driver", lambda: False)
        put_build(own_engine)
        done = self.verify(own_engine)
        assert done.exit_code == 0, done.output
        assert "TensorRT engines: not checked, there is no NVIDIA driver" in done.stderr


def test_a_build_that_exists_is_not_built_again(own_engine, module, progress):
    first = build(own_engine, module)
    assert build(own_engine, module) == Build.load(first.folder)
    assert progress()[-1] == f"{first.folder} is current"


class TestLayers:
    @pytest.fixture
    def info(self, own_engine, module, monkeypatch):
        monkeypatch.setitem(sys.modules, TENSORRT, module)
        monkeypatch.setitem(sys.modules, TENSORRT_RTX, None)
        return lambda *options: CliRunner().invoke(main, ["info", "--layers", *options, str(own_engine.folder)])

    def test_summary(self, own_engine, module, info):
        put_build(own_engine)
        put_build(own_engine, builder_revision=0)
        done = info()
        assert done.exit_code == 0, done.output
        line = "4 layers (2 kgen, 1 gemm, 1 Shape); outputs 2 fp16, 1 fp32, 1 other; attention fused in 1 layers"
        assert done.output.count(line) == 2
        (current,) = [build for build in json.loads(info("--json").stdout)["tensorrt"] if not build["stale"]]
        assert current["layers"][ENCODER]["attention"] == 1

    @pytest.mark.parametrize("information", ["", "[]", '{"Layers": ["only its name"]}', '{"Layers": [{}]}'])
    def test_engine_without_details(self, own_engine, module, info, information):
        put_build(own_engine)
        module.information = information
        done = info()
        assert done.exit_code == 2
        assert "does not describe its layers; build it again" in done.stderr

    def test_no_engine(self, info):
        done = info()
        assert done.exit_code == 2
        assert "no current TensorRT engine; run: samekit export" in done.stderr

    def test_engine_that_cannot_be_loaded(self, own_engine, module, info):
        put_build(own_engine)
        module.fails = "load"
        done = info()
        assert done.exit_code == 2
        assert "cannot load it (no reason given); use a machine with its GPU" in done.stderr

    def test_builds_describe_their_layers(self, own_engine, module):
        build(own_engine, module)
        assert {config.profiling_verbosity for config in module.configs} == {"detailed"}
