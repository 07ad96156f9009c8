"""WebGPU, and plugins of ONNX Runtime.

Tests marked "webgpu" run graphs through the provider. The others need no GPU and no plugin.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
from click.testing import CliRunner
from helpers import DIRECTIONS, HOP, KINDS, WEBGPU, FakeBackend, assert_close, assert_one_line, each_direction, noise
from onnx import TensorProto, helper

from samekit import AutoencoderModel
from samekit.backends.base import BackendOptions
from samekit.backends.providers import CPU_PROVIDER, WEBGPU_PROVIDER, is_built_in, plugin_device
from samekit.backends.selection import AUTO, open_backend
from samekit.backends.webgpu import check_adapter, check_results, with_portable_sine
from samekit.cli.main import main
from samekit.engine.spec import DECODER
from samekit.errors import BackendError, BackendUnavailableError, InputError
from samekit_export.verify import example_input, snr_db

FLOATS = {"fp32": (TensorProto.FLOAT, np.float32, 4e-6), "fp16": (TensorProto.FLOAT16, np.float16, 5e-4)}


def one_node(operator, kind, inputs=1, shape=("n",)):
    """Return a model of one node whose inputs are all `x`."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"] * inputs, ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


# --- The graphs that WebGPU runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", FLOATS)
def test_sine_of_other_operators(precision):
    """The bytes are a valid model for the `onnx` package, and ONNX Runtime computes a sine with it."""
    kind, dtype, error = FLOATS[precision]
    model = with_portable_sine(one_node("Sin", kind).SerializeToString())
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    (function,) = onnx.load_from_string(model).functions
    assert "Sin" not in {node.op_type for node in function.node}
    x = np.linspace(-20, 20, 100_001).astype(dtype)
    (y,) = onnxruntime.InferenceSession(model, providers=[CPU_PROVIDER]).run(None, {"x": x})
    assert y.dtype == dtype
    assert np.abs(y - np.sin(x.astype(np.float64))).max() < error


@each_direction
@pytest.mark.parametrize("name", KINDS)
def test_only_sines_are_rewritten(engine_of, name, direction):
    engine = engine_of(name)
    data = engine.graph(direction, "fp32").read_bytes()
    before, after = onnx.load_from_string(data), onnx.load_from_string(with_portable_sine(data))
    sines = [node for node in before.graph.node if node.op_type == "Sin"]
    assert bool(sines) == ((name, direction) == ("tiny-l", DECODER))
    for node in sines:
        node.domain = "samekit"
    assert after.graph == before.graph
    assert (with_portable_sine(data) is data) == (not sines)


@pytest.mark.parametrize("cut", [1, 2, 7, 20])
def test_damaged_model_is_left_alone(cut, inputs):
    inputs["damaged files"] += 1
    data = one_node("Sin", TensorProto.FLOAT).SerializeToString()[:-cut]
    assert with_portable_sine(data) in (data, with_portable_sine(data))
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        onnxruntime.InferenceSession(with_portable_sine(data), providers=[CPU_PROVIDER])


# --- Checks when a session opens --------------------------------------------------------------------------------


class Session:
    """A session that computes on the CPU, or fails with a message of the provider."""

    def __init__(self, graph, error=None):
        self.graph, self.error = graph, error

    def run(self, names, feeds):
        if self.error:
            raise RuntimeError(self.error)
        return onnxruntime.InferenceSession(self.graph, providers=[CPU_PROVIDER]).run(names, feeds)


@pytest.mark.parametrize("precision", FLOATS)
def test_probe_is_one_addition(precision):
    opened = []

    def open_session(graph):
        opened.append(onnx.load_from_string(graph))
        return Session(graph)

    check_adapter(open_session, precision)
    (model,) = opened
    onnx.checker.check_model(model, full_check=True)
    assert model.graph == one_node("Add", FLOATS[precision][0], inputs=2, shape=(1, 4)).graph


# Messages of onnxruntime-webgpu 1.27 and onnxruntime-ep-webgpu 0.4.
NO_ADAPTER = (
    "/onnxruntime_src/onnxruntime/core/providers/webgpu/webgpu_context.cc:65 onnxruntime::webgpu::WebGpuContext::"
    "Initialize(const onnxruntime::webgpu::WebGpuContextConfig&) status == wgpu::RequestAdapterStatus::Success was "
    "false. Failed to get a WebGPU adapter: No supported adapters"
)
NO_HALF = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Add node. Status Message: "
    "shader_helper.cc:401 GenerateSourceCode Program Add requires f16 but the device does not support it."
)


def test_no_adapter():
    def open_session(_graph):
        raise RuntimeError(NO_ADAPTER)

    with pytest.raises(BackendUnavailableError, match=r"no GPU .*\(Failed to get a WebGPU adapter: No su") as caught:
        check_adapter(open_session, "fp32")
    assert_one_line(caught.value)


def test_half_precision_needs_an_extension_of_the_gpu():
    with pytest.raises(BackendUnavailableError, match=r"fp16 needs shader-f16.*; choose precision fp32"):
        check_adapter(lambda graph: Session(graph, NO_HALF), "fp16")
    with pytest.raises(BackendUnavailableError, match=r"fails at an addition.*; update its driver"):
        check_adapter(lambda graph: Session(graph, "device lost"), "fp32")


@pytest.mark.parametrize(
    ("precision", "level", "good"),
    [("fp32", 1e-5, True), ("fp32", 1e-4, False), ("fp16", 1e-2, True), ("fp16", 0.1, False), ("fp32", np.nan, False)],
)
@each_direction
def test_gpu_that_computes_wrongly_is_refused(direction, precision, level, good):
    spec = FakeBackend().spec

    def cpu(array):
        return noise((1, 4, 8), seed=1, level=1)

    def gpu(array):
        assert array.dtype == np.float32
        assert array.shape == spec.input_shape(direction, 1, 8)
        return cpu(array) + noise((1, 4, 8), seed=2, level=level)

    if good:
        check_results(spec, direction, precision, gpu, cpu)
        return
    with pytest.raises(BackendUnavailableError, match=rf"the {direction} with an error: .* dB.*; update") as caught:
        check_results(spec, direction, precision, gpu, cpu)
    assert_one_line(caught.value)


@each_direction
@pytest.mark.parametrize("factor", [1, 1.001, np.nan])
def test_opening_compares_the_gpu_with_the_cpu(engine_of, monkeypatch, direction, factor):
    """A GPU that computes wrongly encodes nothing. Here it is the CPU, whose outputs are changed."""
    session = onnxruntime.InferenceSession

    class OnGpu:
        def __init__(self, graph, options):
            self.session = session(graph, options, providers=[CPU_PROVIDER])
            self.get_inputs, self.get_providers = self.session.get_inputs, lambda: [WEBGPU_PROVIDER]

        def run(self, names, feeds):
            return [output * np.float32(factor) for output in self.session.run(names, feeds)]

    def open_session(graph, options, *, providers, **rest):
        if any(WEBGPU_PROVIDER in provider for provider in providers):
            return OnGpu(graph, options)
        return session(graph, options, providers=providers, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [WEBGPU_PROVIDER, CPU_PROVIDER])
    backend = open_backend(engine_of("tiny-s").folder, AUTO, BackendOptions(device=WEBGPU, threads=1))
    array = example_input(backend.spec, direction, 1, 2, seed=0)
    if factor == 1:
        assert np.isfinite(backend.run(direction, array)).all()
        return
    for _ in range(2):
        with pytest.raises(
            BackendUnavailableError, match=rf"compute the {direction} with an error: .*; update the driver"
        ):
            backend.run(direction, array)


# --- Options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "tensorrt"])
def test_other_backends_do_not_run_on_webgpu(engine_of, backend):
    with pytest.raises(BackendUnavailableError, match="webgpu runs in the backend onnxruntime only; choose"):
        open_backend(engine_of("tiny-s").folder, backend, BackendOptions(device=WEBGPU))


def test_checkpoint_does_not_run_on_webgpu(checkpoint_of):
    with pytest.raises(BackendError, match="; "):
        open_backend(checkpoint_of("tiny-s"), "torch", BackendOptions(device=WEBGPU))


def test_int8_is_for_cpus(bundled_engine):
    with pytest.raises(BackendUnavailableError):
        open_backend(bundled_engine.folder, AUTO, BackendOptions("int8", WEBGPU))


def test_webgpu_chooses_the_gpu(engine_of):
    with pytest.raises(BackendUnavailableError, match="device_id is 1, and WebGPU chooses the GPU itself; leave"):
        open_backend(engine_of("tiny-s").folder, AUTO, BackendOptions(device=WEBGPU, device_id=1))


@pytest.mark.parametrize("value", [["a"], {"a": 1}, {1: "a"}, "a=b"], ids=str)
def test_provider_options_are_texts(value):
    with pytest.raises(InputError, match=r"provider_options is .*; pass a dict of texts"):
        BackendOptions(provider_options=value)


def test_provider_option_of_the_command_needs_a_value(tmp_path):
    song = tmp_path / "song.wav"
    soundfile.write(song, noise((HOP, 2)), 44_100)
    arguments = ["encode", str(song), str(tmp_path / "song.npy"), "--model", "same-tiny", "--provider-option", "a"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "'a' is not of the form NAME=VALUE" in result.output


# --- Plugins ----------------------------------------------------------------------------------------------------

# ONNX Runtime's guide on packages of plugins asks for these functions. NVIDIA's packages have another name than their
# module, and their provider has two spellings (NVIDIA/TensorRT-RTX-EP-ABI: `_KNOWN_EP_NAME = "nv_tensorrt_rtx"`).
PLUGIN = """
def get_library_path():
    {path}

def get_ep_names():
    return {names}
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package with a plugin: package, module, provider names."""

    def write(package, module, names, path="return 'library.so'"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(PLUGIN.format(names=names, path=path))
        facts = tmp_path / f"{package.replace('-', '_')}-1.5.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        (facts / "RECORD").write_text(f"{module}/__init__.py,,\n{facts.name}/METADATA,,\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return write


@pytest.fixture
def loaded(monkeypatch):
    """Make ONNX Runtime accept any library, and return the calls that load one."""
    calls = []
    monkeypatch.setattr("onnxruntime.register_execution_provider_library", lambda *call: calls.append(call))
    return calls


def test_plugin_runs_a_model(install, loaded, engine_of, model_of, monkeypatch):
    """Its device is that of the CPU, which ONNX Runtime always offers."""
    install("onnxruntime-ep-fake-cu13", "onnxruntime_ep_fake", ["cpu_execution_provider"], "return 'runs.so'")
    given = []

    class Options(onnxruntime.SessionOptions):
        def add_provider_for_devices(self, devices, options):
            given.append(([device.ep_name for device in devices], dict(options)))
            super().add_provider_for_devices(devices, options)

    monkeypatch.setattr("onnxruntime.SessionOptions", Options)
    folder = engine_of("tiny-s").folder
    options = {"providers": ("cpu_execution_provider", CPU_PROVIDER), "provider_options": {"a": "1"}}
    latents = noise((1, 32, 3), level=1)
    for _ in range(2):
        model = AutoencoderModel.from_pretrained(folder, backend="onnxruntime", threads=1, **options)
        assert (model.autoencoder.backend.device, model.device) == ("cpu", "cpu")
        assert_close(model_of("tiny-s", "onnxruntime").decode(latents), model.decode(latents), 110)
    assert given == [([CPU_PROVIDER], {"a": "1"})] * 2
    # A library can be loaded once.
    assert loaded == [("onnxruntime_ep_fake", "runs.so")]


def test_plugin_without_a_device(install, loaded, engine_of):
    install(
        "onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime_ep_nv_tensorrt_rtx", ["nv_tensorrt_rtx"], "return 'nv.so'"
    )
    options = BackendOptions(providers=("NvTensorRTRTXExecutionProvider",))
    message = "onnxruntime-ep-nv-tensorrt-rtx-cu13 1.5 finds no device for NvTensorRTRTXExecutionProvider .*; install"
    with pytest.raises(BackendUnavailableError, match=message) as caught:
        open_backend(engine_of("tiny-s").folder, "onnxruntime", options)
    assert_one_line(caught.value)


def test_number_of_a_device_of_a_plugin(install, loaded):
    install("onnxruntime-ep-fake", "onnxruntime_ep_fake", ["cpu_execution_provider"], "return 'number.so'")
    assert plugin_device(onnxruntime, "cpu_execution_provider", 0).ep_name == CPU_PROVIDER
    with pytest.raises(BackendUnavailableError, match="has no device 7 here; pass device_id from 0 to"):
        plugin_device(onnxruntime, "cpu_execution_provider", 7)


@pytest.mark.parametrize("path", ["return '/no/such/library.so'", "raise FileNotFoundError('no library')"])
def test_broken_plugin(install, path):
    install("onnxruntime-ep-broken", "onnxruntime_ep_broken", ["BrokenExecutionProvider"], path)
    with pytest.raises(BackendError, match=r"onnxruntime-ep-broken 1.5 .*; update") as caught:
        plugin_device(onnxruntime, "BrokenExecutionProvider", 0)
    assert_one_line(caught.value)


def test_unknown_provider_lists_those_of_plugins(install, loaded, engine_of):
    install("onnxruntime-ep-fake", "onnxruntime_ep_fake", ["FakeExecutionProvider"])
    options = BackendOptions(providers=("OtherExecutionProvider",))
    with pytest.raises(BackendUnavailableError, match=r"has no OtherEx.*FakeExecutionProvider.*; install the package"):
        open_backend(engine_of("tiny-s").folder, "onnxruntime", options)


def test_doctor_lists_plugins(install, loaded):
    install("onnxruntime-ep-fake", "onnxruntime_ep_fake", ["cpu_execution_provider"], "return 'doctor.so'")
    install("onnxruntime-ep-broken", "onnxruntime_ep_broken", ["BrokenExecutionProvider"], "raise OSError('gone')")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    shown = result.output.splitlines()
    vendor = onnxruntime.get_ep_devices()[0].device.vendor
    assert f"  onnxruntime-ep-fake 1.5: cpu_execution_provider; devices 0: CPU of {vendor}" in shown
    assert any(line.startswith("  onnxruntime-ep-broken 1.5 is no working plugin") and "gone" in line for line in shown)


# --- Through the provider ---------------------------------------------------------------------------------------

# Shape arithmetic, whose results ONNX Runtime needs on the CPU: a few numbers each.
MOST_ON_CPU = 0.01


@pytest.mark.webgpu
@each_direction
@pytest.mark.parametrize("name", KINDS)
def test_every_node_of_weight_is_on_the_gpu(engine_of, tmp_path, name, direction):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    rest = {"providers": [WEBGPU_PROVIDER]}
    if not is_built_in(onnxruntime, WEBGPU_PROVIDER):
        options.add_provider_for_devices([plugin_device(onnxruntime, WEBGPU_PROVIDER, 0)], {})
        rest = {}
    engine = engine_of(name)
    graph = with_portable_sine(engine.graph(direction, "fp32").read_bytes())
    session = onnxruntime.InferenceSession(graph, options, **rest)
    array = example_input(engine.spec, direction, 1, 3, seed=0)
    session.run(None, {session.get_inputs()[0].name: array})
    with open(session.end_profiling()) as file:
        events = [event for event in json.load(file) if event["name"].endswith("_kernel_time")]
    sizes, floats = Counter(), set()
    for event in events:
        facts = event["args"]
        sizes[facts["provider"]] += int(facts["output_size"])
        for output in facts["output_type_shape"]:
            if facts["provider"] == CPU_PROVIDER and "float" in output:
                floats.add((facts["op_name"], tuple(output["float"])))
    # Zeros that pad the sequence. Version 1.27 also computes the mask of bands on the CPU, once for all heads and
    # blocks: 17 queries and 51 keys for each of the 3 latents.
    assert {(name, shape) for name, shape in floats if name != "ConstantOfShape"} <= {("Min", (3, 1, 17, 51))}
    assert sizes[CPU_PROVIDER] < MOST_ON_CPU * sizes[WEBGPU_PROVIDER]


@pytest.mark.webgpu
def test_both_directions_at_a_time(model_of):
    backend, reference = (model_of("tiny-s", name).autoencoder.backend for name in (WEBGPU, "onnxruntime"))
    arrays = {direction: example_input(backend.spec, direction, 1, 2, seed=0) for direction in DIRECTIONS}
    with ThreadPoolExecutor(4) as pool:
        calls = [(direction, pool.submit(backend.run, direction, arrays[direction])) for direction in DIRECTIONS * 2]
        for direction, call in calls:
            assert snr_db(reference.run(direction, arrays[direction]), call.result()) > 100


@pytest.mark.webgpu
def test_command_on_webgpu(engine_of, tmp_path):
    soundfile.write(tmp_path / "song.wav", noise((3 * HOP, 2)), 44_100)
    folder = engine_of("tiny-s").folder
    for device in (WEBGPU, "cpu"):
        arguments = ["encode", str(tmp_path / "song.wav"), str(tmp_path / f"{device}.npy")]
        result = CliRunner().invoke(main, [*arguments, "--model", str(folder), "--device", device])
        assert result.exit_code == 0, result.output
    assert_close(np.load(tmp_path / "cpu.npy"), np.load(tmp_path / f"{WEBGPU}.npy"), 100)


@pytest.mark.webgpu
def test_half_precision_is_refused_or_runs(half_engine):
    arguments = (half_engine, AUTO, BackendOptions("fp16", WEBGPU))
    with suppress(BackendUnavailableError):
        assert open_backend(*arguments).encode(noise((1, 2, HOP))).shape == (1, 32, 1)
        return
    with pytest.raises(BackendUnavailableError, match="fp16 needs shader-f16"):
        open_backend(*arguments)
