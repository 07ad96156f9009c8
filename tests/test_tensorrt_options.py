"""Options of TensorRT's builder: what they set, what records them, and where they are refused."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from fake_tensorrt import FakeGpu, FakeRTX
from helpers import assert_one_line, noise
from test_tensorrt import VERSIONS, needs_rtx, put_build
from test_tensorrt_check import answer, module, own_engine  # noqa: F401 fixtures

from samekit.backends.base import BackendOptions
from samekit.backends.selection import open_backend
from samekit.cli.main import main
from samekit.engine.builds import FINGERPRINT_FILE, Build, choose_build
from samekit.engine.fingerprint import (
    AMPERE_PLUS,
    PORTABLE,
    TENSORRT,
    TENSORRT_RTX,
    BuilderOptions,
    Fingerprint,
    fingerprint_of,
    runs_with,
    why_not_on,
)
from samekit.engine.folder import Engine
from samekit.engine.spec import DECODER, ENCODER, GPU_PRECISIONS
from samekit.errors import BuildError, InputError, StaleEngineError
from samekit.serving.triton import TritonOptions, write_repository
from samekit.tensorrt.flavours import import_flavour, make_logger
from samekit_export.engine_builder import EngineBuilder
from samekit_export.to_tensorrt import add_engines

WIDE_OPTIONS = BuilderOptions(level=5, hardware="ampere+", later_versions=True)


@pytest.fixture
def build(own_engine, module, monkeypatch):  # noqa: F811
    """A function that builds on the fake GPU with some options, and returns the build."""
    monkeypatch.setattr("samekit_export.to_tensorrt.import_flavour", lambda _: module)
    monkeypatch.setattr("samekit_export.to_tensorrt.Gpu", lambda _: FakeGpu(module))

    def build_(options=None, **changes):
        (built,) = add_engines(own_engine, ["fp32"], "auto", options or BuilderOptions(**changes))
        return built

    return build_


def test_what_the_builder_is_told(build, module):  # noqa: F811
    build()
    build(level=0)
    build(hardware="capability")
    build(WIDE_OPTIONS)
    # Each build has two engines.
    assert [(c.builder_optimization_level, c.hardware_compatibility_level, c.flags) for c in module.configs[::2]] == [
        (3, "none", set()),
        (0, "none", set()),
        (3, "same compute capability", set()),
        (5, "ampere plus", {"VERSION_COMPATIBLE"}),
    ]


def test_builds_record_their_options(build, own_engine):  # noqa: F811
    default, wide = build(), build(WIDE_OPTIONS)
    assert (wide.fingerprint.target, wide.fingerprint.options) == (AMPERE_PLUS, WIDE_OPTIONS)
    assert wide.folder.name.startswith("tensorrt-11.4.0-8.0+-fp32-")
    assert Build.load(wide.folder) == wide
    # Both stay, and each is current.
    assert (build(), build(WIDE_OPTIONS)) == (default, wide)
    path = default.folder / FINGERPRINT_FILE
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["fingerprint"].pop("options") == dataclasses.asdict(BuilderOptions())
    # A fingerprint of before there were options is that of their defaults.
    assert Fingerprint.from_json(document["fingerprint"]) == default.fingerprint


def test_info_says_which_build_is_which(build, own_engine, module, monkeypatch):  # noqa: F811
    monkeypatch.setattr("samekit.tensorrt.flavours.installed_flavours", lambda: {TENSORRT: module})
    default, wide = build(), build(WIDE_OPTIONS)
    done = CliRunner().invoke(main, ["info", str(own_engine.folder)])
    assert done.exit_code == 0, done.output
    assert f"{default.folder.name}: 0 MB; at least " in done.output
    assert f"{wide.folder.name}: 0 MB; level 5, hardware ampere+, later_versions True; at least " in done.output
    done = CliRunner().invoke(main, ["info", "--json", str(own_engine.folder)])
    options = {described["name"]: described["options"] for described in json.loads(done.stdout)["tensorrt"]}
    assert options == {default.folder.name: {}, wide.folder.name: dataclasses.asdict(WIDE_OPTIONS)}


@pytest.mark.parametrize(
    "options",
    [1, [], {"level": 9}, {"level": "5"}, {"hardware": {}}, {"later_versions": 1}, {"faster": True}],
    ids=str,
)
def test_records_that_are_damaged(build, options):
    path = build().folder / FINGERPRINT_FILE
    document = json.loads(path.read_text(encoding="utf-8"))
    document["fingerprint"]["options"] = options
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(StaleEngineError, match="cannot be read"):
        Build.load(path.parent)


def test_the_build_for_the_fewest_machines_is_preferred(build, own_engine):  # noqa: F811
    best = [
        build(later_versions=True, hardware="ampere+"),
        build(hardware="ampere+"),
        build(hardware="capability"),
        build(level=1),
        build(),
        build(level=4),
    ]
    while best:
        chosen = choose_build(own_engine, "fp32", (8, 9), VERSIONS)
        assert chosen == best.pop()
        (chosen.folder / FINGERPRINT_FILE).unlink()


def test_other_gpus(build, own_engine):  # noqa: F811
    wide = build(hardware="ampere+")
    build(hardware="capability")
    assert choose_build(own_engine, "fp32", (12, 0), VERSIONS) == wide
    with pytest.raises(StaleEngineError, match=r"was built for 8\.0\+, this GPU is 7\.5"):
        choose_build(own_engine, "fp32", (7, 5), VERSIONS)


@pytest.mark.parametrize(
    ("version", "runs"),
    [
        ("11.4.0", True),
        ("11.4.0.2", True),
        ("11.10.0", True),
        ("11.3.9", False),
        ("12.0.0", False),
        ("10.16.1", False),
        ("9" * 9999, False),
    ],
    ids=lambda value: str(value)[:9],
)
def test_later_versions(build, own_engine, version, runs):  # noqa: F811
    strict, lenient = build(), build(later_versions=True)
    assert not runs_with(strict.fingerprint, "11.5.0")
    assert runs_with(lenient.fingerprint, version) is runs
    if runs:
        chosen = choose_build(own_engine, "fp32", (8, 9), {TENSORRT: version})
        assert chosen == (strict if version == "11.4.0" else lenient)
    else:
        with pytest.raises(StaleEngineError, match=r"version 11\.4\.0 instead of"):
            choose_build(own_engine, "fp32", (8, 9), {TENSORRT: version})


def test_code_for_the_cpu_is_allowed_only_if_it_was_built_so(build, own_engine, module):  # noqa: F811
    lenient = build(later_versions=True)
    array = noise((1, 4, 3))
    with open_backend(own_engine.folder, "tensorrt", BackendOptions()) as backend:
        assert backend.build == lenient
        np.testing.assert_array_equal(backend.decode(array), module.answer(DECODER, array))
    (lenient.folder / FINGERPRINT_FILE).unlink()
    contents = (lenient.folder / "encoder.engine").read_text()
    put_build(own_engine, contents=contents)
    with (
        open_backend(own_engine.folder, "tensorrt", BackendOptions()) as backend,
        pytest.raises(StaleEngineError, match="cannot load it"),
    ):
        backend.decode(array)


def test_gpu_that_cannot_build_for_others(build, module, monkeypatch):  # noqa: F811
    monkeypatch.setattr(FakeGpu, "capability", (7, 5))
    with pytest.raises(
        InputError, match=r"needs a GPU of compute capability 8.0\+ .* has 7.5; choose gpu or"
    ) as caught:
        build(hardware="ampere+")
    assert_one_line(caught.value)


@pytest.mark.parametrize("mode", ["auto", "rtx"])
@pytest.mark.parametrize(("option", "value"), [("level", 0), ("hardware", "capability"), ("later_versions", True)])
def test_options_that_tensorrt_rtx_lacks(own_engine, monkeypatch, mode, option, value):  # noqa: F811
    """`auto` takes it where there is no GPU."""
    rtx = FakeRTX(own_engine.spec)
    rtx.__name__ = TENSORRT_RTX
    monkeypatch.setattr("samekit_export.to_tensorrt.import_flavour", lambda _: rtx)
    monkeypatch.setattr("samekit.tensorrt.gpu.has_driver", lambda: False)
    option_of_command = f"--tensorrt-{option.replace('_', '-')}"
    with pytest.raises(InputError, match=f"tensorrt_rtx has no {option_of_command}: .*; leave it out") as caught:
        add_engines(own_engine, ["fp32"], mode, BuilderOptions(**{option: value}))
    assert_one_line(caught.value)
    assert rtx.configs == []


@needs_rtx
class TestTensorRTRTX:
    """What NVIDIA's builder does with options that samekit refuses."""

    @pytest.fixture
    def compile_(self, engine_of, tmp_path):
        """A function that compiles the encoder with some options, and returns the digest of the engine and the log."""
        engine, rtx = engine_of("tiny-s"), import_flavour(TENSORRT_RTX)

        def compile__(**options):
            fingerprint = fingerprint_of(
                engine.spec, "fp32", TENSORRT_RTX, rtx.__version__, PORTABLE, BuilderOptions(**options)
            )
            log = io.StringIO()
            builder = EngineBuilder(engine, ENCODER, fingerprint, rtx, log, tmp_path / "failed.log")
            return builder.build(tmp_path / "encoder.engine").sha256, log.getvalue()

        return compile__

    def test_levels_and_hardware_change_nothing(self, compile_):
        (plain, _), (lowest, _), (highest, _) = compile_(), compile_(level=0), compile_(level=5)
        assert plain == lowest == highest
        wide, log = compile_(hardware="ampere+")
        assert wide == plain
        assert "[WARNING] setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX." in log

    def test_there_is_no_runtime_for_later_versions(self, compile_):
        with pytest.raises(BuildError, match="Unable to load library: libnvinfer_lean"):
            compile_(later_versions=True)

    @pytest.mark.parametrize("precision", GPU_PRECISIONS)
    def test_turing_lacks_float32_products(self, half_engine, precision):
        """Both precisions have some. If this fails, 7.5 can be a target."""
        rtx, messages = import_flavour(TENSORRT_RTX), []
        builder = rtx.Builder(make_logger(rtx, lambda _, message: messages.append(message)))
        network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        engine = Engine.load(half_engine)
        parser = rtx.OnnxParser(network, make_logger(rtx, lambda *_: None))
        assert parser.parse_from_file(str(engine.graph(ENCODER, precision)))
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM75, 0)
        profile.set_shape(network.get_input(0).name, *[engine.spec.input_shape(ENCODER, 1, 1)] * 3)
        config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is None
        assert "for Turing (SM75): FP32 GEMM is not supported" in messages[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tensorrt-level", "4"],
            "--tensorrt-level changes TensorRT engines, and none is built; pass --tensorrt auto",
        ),
        (["--tensorrt", "rtx", "--tensorrt-level", "5"], "tensorrt_rtx has no --tensorrt-level: it builds the same"),
        (["--tensorrt", "rtx", "--tensorrt-hardware", "ampere+"], "tensorrt_rtx has no --tensorrt-hardware: "),
        (["--tensorrt", "rtx", "--tensorrt-later-versions"], "each release runs only its own engines; leave"),
        (["--tensorrt", "auto", "--tensorrt-level", "6"], "6 is not in the range 0<=x<=5"),
        (["--tensorrt", "auto", "--tensorrt-hardware", "turing"], "'turing' is not one of 'gpu', 'capability'"),
    ],
)
def test_the_command_refuses_before_it_exports(arguments, message):
    done = CliRunner().invoke(main, ["export", "same-tiny", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "changes", [{"level": 6}, {"level": True}, {"hardware": "all"}, {"later_versions": 1}], ids=str
)
def test_values_that_the_builder_does_not_have(changes):
    with pytest.raises(InputError, match=r"; (pass|choose)") as caught:
        BuilderOptions(**changes)
    assert_one_line(caught.value)


def test_triton_needs_an_engine_for_its_version(build, own_engine, tmp_path):  # noqa: F811
    build(later_versions=True)
    options = TritonOptions(backend="tensorrt", precision="fp32")
    with pytest.raises(InputError, match="later versions of TensorRT, which Triton does not load by itself; build"):
        write_repository(own_engine, tmp_path / "repository", options)


def test_turing_needs_tensorrt():
    assert why_not_on(PORTABLE, (8, 9)) is None
    assert why_not_on(PORTABLE, (9, 0)) == "was built for portable, this GPU is 9.0"
    assert why_not_on(PORTABLE, (7, 5)) == (
        "was built for portable, this GPU is 7.5, which needs tensorrt, because TensorRT-RTX has no float32 products "
        "for it"
    )
