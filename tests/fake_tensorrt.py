"""A fake TensorRT and a fake GPU, which compute a simple function in host memory and fail in the ways of the real ones.

TensorRT:

* It builds engines that compute `answer(direction, array)`, or what `wrong` makes of that.

* It reads and writes at the addresses that it was given.
* It returns False instead of raising an exception.
* When it refuses a shape, the previous shape stays set.
* When a launch fails, the output keeps its previous contents.
* It keeps no object alive that a CUDA graph or work on a stream uses.

The GPU:

* Work on a stream runs after the work that was enqueued on it before, and after what the stream was told to wait for.
  It may run at any other moment before the program waits for it. A seed chooses the order at random.
* New memory holds NaN. Freed memory becomes NaN when its stream could reuse it: after the work that was enqueued on the
  stream of its allocation, and on the streams that PyTorch's `record_stream` was called for.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import threading
import weakref
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import onnx
import torch

from samekit.backends.base import BackendOptions
from samekit.backends.onnxruntime import OnnxRuntimeBackend
from samekit.engine.fingerprint import PROFILES, TENSORRT
from samekit.engine.spec import DECODER, ENCODER, INPUT_NAMES, opposite

# Handle of a CUDA stream that is not the default stream, 0, on which TensorRT would synchronise the device.
STREAM = 7
# Ends the bytes of an engine for later versions, which holds a part of TensorRT.
LEAN_RUNTIME = " with a lean runtime"
# Content of scratch memory that has been freed.
FREED = 255


def floats_at(address, shape):
    """Return the memory at an address as an array."""
    numbers = (ctypes.c_float * int(np.prod(shape))).from_address(address)
    return np.ctypeslib.as_array(numbers).reshape(shape)


def computed(spec, direction, array):
    """Return the output of the fake engine: for each latent the sum of its input plus the number of the feature."""
    latents = array.shape[2] // spec.layout(direction)[1]
    sums = array.reshape(array.shape[0], array.shape[1], latents, -1).sum(axis=(1, 3), dtype=np.float64)
    shape = spec.input_shape(opposite(direction), array.shape[0], latents)
    spread = np.repeat(sums[:, None], shape[2] // latents, axis=2)
    return (spread + np.arange(shape[1])[:, None]).astype(np.float32)


# As the engine inspector describes layers at detailed verbosity, according to NVIDIA's documentation of TensorRT,
# "Engine Inspector"; the fields that samekit does not use are left out.
LAYERS = [
    {
        "Name": "__myl_ReshTran_myl0_1",
        "LayerType": "kgen",
        "Inputs": [{"Name": "audio", "Dimensions": [1, 2, 4096], "Format/Datatype": "Float"}],
        "Outputs": [{"Name": "a", "Dimensions": [1, 32, 256], "Format/Datatype": "Half"}],
        "TacticName": "__myl_ReshTran_0x1",
    },
    {
        "Name": "_gemm_mha_v2_myl0_2",
        "LayerType": "kgen",
        "Outputs": [{"Name": "b", "Format/Datatype": "Row major linear FP16 format"}],
        "TacticName": "_gemm_mha_v2_0x2",
    },
    {
        "Name": "node_MatMul_3_myl0_3",
        "LayerType": "gemm",
        "Outputs": [{"Name": "c", "Format/Datatype": "Row major linear FP32"}],
        "TacticName": "sm80_xmma_gemm_f32f32",
    },
    {"Name": "shape", "LayerType": "Shape", "Inputs": [], "Outputs": []},
]


def silence(direction, profile, latents, output):
    return np.zeros_like(output)


def noise_of_that_level(direction, profile, latents, output):
    return np.random.default_rng(0).standard_normal(output.shape).astype(np.float32) * output.std()


def not_a_number(direction, profile, latents, output):
    return np.full_like(output, np.nan)


def wide_profile_wrong(direction, profile, latents, output):
    return output * np.float32(1.5) if profile == 1 else output


def decoder_wrong_at_33_latents(direction, profile, latents, output):
    return output * np.float32(1.001) if (direction, latents) == (DECODER, 33) else output


def rows_of_a_batch_exchanged(direction, profile, latents, output):
    return output[::-1]


WRONG = (
    silence,
    noise_of_that_level,
    not_a_number,
    wide_profile_wrong,
    decoder_wrong_at_33_latents,
    rows_of_a_batch_exchanged,
)
"""What wrong engines return in place of an output."""


def answers_of(engine, precision="fp32"):
    """Return a function that computes what the graphs of an engine folder compute, for `FakeTensorRT.answer`."""
    return OnnxRuntimeBackend(engine, BackendOptions(precision=precision, device="cpu", threads=1)).run


class FakeBuilder:
    """Builds from a graph; what it was asked for is in `module.configs`, one for each engine."""

    def __init__(self, module):
        self.module = module

    def create_network(self, flags):
        assert flags == 1 << self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return FakeNetwork()

    def create_builder_config(self):
        self.module.configs.append(FakeConfig())
        return self.module.configs[-1]

    def create_optimization_profile(self):
        shapes = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *sizes: shapes.update({name: sizes}))

    def build_serialized_network(self, network, config):
        plan = network.direction + LEAN_RUNTIME * ("VERSION_COMPATIBLE" in config.flags)
        return plan.encode() if self.module.works("build") else None


class FakeNetwork:
    direction = None

    def get_input(self, index):
        return SimpleNamespace(name=INPUT_NAMES[self.direction])

    def get_layer(self, index):
        return SimpleNamespace(type=SimpleNamespace(name=self.operators[index]))

    @property
    def num_layers(self):
        return len(self.operators)


class FakeParser:
    num_errors = 0

    def __init__(self, network, logger):
        self.network = network

    def parse_from_file(self, path):
        graph = onnx.load(path, load_external_data=False).graph
        self.network.direction = ENCODER if os.path.basename(path).startswith(ENCODER) else DECODER
        self.network.operators = [node.op_type for node in graph.node]
        return True


class FakeConfig:
    """Settings of a build. It has no timing cache."""

    builder_optimization_level = 3
    hardware_compatibility_level = "none"

    def __init__(self):
        self.profiles = []
        self.flags = set()

    def clear_flag(self, flag):
        assert flag == "TF32"

    def set_flag(self, flag):
        self.flags.add(flag)

    def set_preview_feature(self, feature, on):
        assert (feature, on) == ("resize", True)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, data):
        return None

    def get_timing_cache(self):
        return None


class FakeTensorRT:
    """The module. The bytes of an engine begin with the name of its direction."""

    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=3)
    BuilderFlag = SimpleNamespace(TF32="TF32", VERSION_COMPATIBLE="VERSION_COMPATIBLE")
    HardwareCompatibilityLevel = SimpleNamespace(
        SAME_COMPUTE_CAPABILITY="same compute capability", AMPERE_PLUS="ampere plus"
    )
    PreviewFeature = SimpleNamespace(RUNTIME_ACTIVATION_RESIZE_10_10="resize")
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    LayerInformationFormat = SimpleNamespace(JSON="json")
    OnnxParser = FakeParser

    __name__ = TENSORRT
    __version__ = "11.4.0"
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    def __init__(self, spec, answer=None):
        self.answer = answer or (lambda direction, array: computed(spec, direction, array))
        self.information = json.dumps({"Layers": LAYERS, "Bindings": []})
        """What the engine inspector says."""
        self.wrong = None
        """One of `WRONG`, or None for right answers."""
        self.configs = []
        # samekit derives its logger from this class.
        self.ILogger = type("ILogger", (), {"Severity": SimpleNamespace(VERBOSE="VERBOSE")})
        self.spec = spec
        self.fails = None
        self.events = []
        self.faults = []
        """What the real TensorRT would answer with a crash or wrong values."""
        # Profiles of all contexts; a list of contexts would keep them alive.
        self.profiles = []

    def works(self, step):
        """Return whether a step succeeds."""
        return self.fails != step

    def Builder(self, logger):  # noqa: N802 TensorRT's name
        assert isinstance(logger, self.ILogger)
        return FakeBuilder(self)

    def Runtime(self, logger):  # noqa: N802 TensorRT's name
        assert isinstance(logger, self.ILogger)
        return FakeRuntime(self)


class FakeRuntime:
    """Loads engines. Those with code for the CPU are refused by default, as by the real one."""

    engine_host_code_allowed = False

    def __init__(self, module):
        self.module = module

    def deserialize_cuda_engine(self, data):
        direction = next(direction for direction in INPUT_NAMES if data.startswith(direction.encode()))
        self.module.events.append(f"load {direction}")
        allowed = self.engine_host_code_allowed or not data.endswith(LEAN_RUNTIME.encode())
        return FakeEngine(self.module, direction) if allowed and self.module.works("load") else None


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, module, direction):
        self.module = module
        self.direction = direction
        self.names = (INPUT_NAMES[direction], INPUT_NAMES[opposite(direction)])

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        return "input" if name == self.names[0] else "output"

    def get_device_memory_size_for_profile_v2(self, profile):
        return 5000 + profile

    def create_engine_inspector(self):
        return SimpleNamespace(get_engine_information=lambda form: self.module.information)

    def create_runtime_config(self):
        return FakeRuntimeConfig(self.module)

    def create_execution_context(self, strategy):
        config = None if strategy == "user managed" else strategy
        return FakeContext(self, config) if self.module.works("context") else None


class FakeRTX(FakeTensorRT):
    """A module that records CUDA graphs by itself, as TensorRT-RTX does."""

    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
    driver = "driver 1"


class FakeRuntimeConfig:
    cuda_graph_strategy = None

    def __init__(self, module):
        self.module = module

    def set_execution_context_allocation_strategy(self, strategy):
        assert strategy == "user managed"

    def create_runtime_cache(self):
        return FakeRuntimeCache(self.module)

    def set_runtime_cache(self, cache):
        self.cache = cache


class FakeRuntimeCache:
    """Kernels that were compiled: a line for each shape, after a line that names the driver."""

    def __init__(self, module):
        self.module = module
        self.kernels = set()

    def deserialize(self, data):
        driver, *kernels = data.decode(errors="replace").splitlines()
        if driver != self.module.driver:
            return False
        self.kernels = set(kernels)
        return True

    def serialize(self):
        return "\n".join([self.module.driver, *sorted(self.kernels)]).encode()

    def reset(self):
        self.kernels.clear()


class FakeContext:
    captured = None
    """The contexts that a running capture has recorded; None outside a capture."""

    def __init__(self, engine, config):
        self.config = lambda: True
        if config is not None:
            assert config.cuda_graph_strategy in (None, "whole graph")
            self.config = weakref.ref(config)
        self.engine = engine
        self.module = engine.module
        self.shape = self.profile = None
        self.addresses = {}

    def set_optimization_profile_async(self, profile, stream):
        assert stream == STREAM
        self.profile = profile
        self.module.profiles.append(profile)
        return self.module.works("profile")

    def _latents(self, shape):
        return shape[2] // self.module.spec.layout(self.engine.direction)[1]

    def set_input_shape(self, name, shape):
        assert name == self.engine.names[0]
        batch, latents = PROFILES[self.profile]
        fits = batch[0] <= shape[0] <= batch[2] and latents[0] <= self._latents(shape) <= latents[2]
        if not fits or not self.module.works("shape"):
            return False
        self.shape = shape
        return True

    def infer_shapes(self):
        return [] if self.module.works("infer") else ["audio"]

    def get_tensor_shape(self, name):
        assert name == self.engine.names[1]
        if not self.module.works("output shape"):
            return (1, 2, 3)
        return self.module.spec.input_shape(opposite(self.engine.direction), self.shape[0], self._latents(self.shape))

    def update_device_memory_size_for_shapes(self):
        return 10 * self.shape[0] * self._latents(self.shape) if self.module.works("memory") else 0

    def set_device_memory(self, address, size):
        assert address or not size
        self.scratch = address, size
        self.module.events.append(f"{size} bytes of scratch")

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return self.module.works(f"address of {name}")

    def execute_async_v3(self, stream):
        assert stream == STREAM
        assert self.config() is not None, "the context has outlived its configuration"
        self.module.events.append("launch")
        if (config := self.config()) is not True and str(self.shape) not in config.cache.kernels:
            self.module.events.append("compile")
            config.cache.kernels.add(str(self.shape))
        if not self.module.works("launch"):
            return False
        if FakeContext.captured is not None:
            FakeContext.captured.append(weakref.ref(self))
            return True
        addresses = [self.addresses[name] for name in self.engine.names]
        context = weakref.ref(self)
        work = self.module, self.engine.direction, self.profile, self.shape, addresses, self.scratch
        self.module.gpu.engines.enqueue(lambda: compute(context, *work))
        return True


def compute(context, module, direction, profile, shape, addresses, scratch):
    """Do the work of a launch."""
    source, target = addresses
    result = module.answer(direction, floats_at(source, shape))
    if module.wrong:
        latents = shape[2] // module.spec.layout(direction)[1]
        result = module.wrong(direction, profile, latents, result)
    address, size = scratch
    if context() is None:
        module.faults.append("a context was destroyed before its work was done")
    if FREED in (ctypes.c_uint8 * size).from_address(address):
        module.faults.append("scratch memory was reused before the work was done")
    floats_at(target, result.shape)[:] = result


class FakeStream:
    """A stream of a FakeGpu."""

    cuda_stream = STREAM

    def __init__(self, gpu):
        self.gpu = gpu
        self.work = deque()
        self.enqueued = self.done = 0
        self.is_held = False
        """Whether its work takes until this is reset."""

    def enqueue(self, work, after=()):
        """Enqueue work; `after` holds streams, and how much of their work must be done before."""
        with self.gpu.lock:
            self.work.append((work, tuple(after)))
            self.enqueued += 1
            self.gpu.run_some()

    def wait_stream(self, other):
        self.enqueue(lambda: None, [(other, other.enqueued)])

    def synchronize(self):
        self.gpu.run_until(self, self.enqueued)

    def is_ready(self):
        return not self.is_held and bool(self.work) and all(stream.done >= count for stream, count in self.work[0][1])

    def step(self):
        work, _ = self.work.popleft()
        work()
        self.done += 1


class Block(np.ndarray):
    """Memory of a FakeGpu; it is destroyed when no tensor uses it any more."""


class FakeGpu:
    """Host memory in place of a GPU's; records the order of events.

    `module` is the FakeTensorRT that runs on it. `seed` chooses the order of work on different streams.
    """

    capability = (8, 9)
    name = "Fake GPU"
    device_id = 0
    driver = "13000"

    def __init__(self, module, seed=0):
        self.module = module
        module.gpu = self
        self.events = module.events
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.streams = []
        self.uploads, self.engines, self.downloads, self.callers = (self.stream() for _ in range(4))
        self.current = self.callers
        # Memory of the GPU is never given back to the host, because late work may use it.
        self.memory = {}
        self.host = weakref.WeakValueDictionary()
        self.gate = threading.Event()
        """Cleared: waiting for an event takes until it is set."""
        self.gate.set()

    def stream(self):
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def run_some(self):
        """Run some of the work that may run."""
        while self.random.random() < 0.5 and (ready := [stream for stream in self.streams if stream.is_ready()]):
            self.random.choice(ready).step()

    def run_until(self, stream, count):
        """Run work in any order until a stream has done so much."""
        with self.lock:
            while stream.done < count:
                self.random.choice([stream for stream in self.streams if stream.is_ready()]).step()

    def contains(self, value):
        return isinstance(value, torch.Tensor)

    def pinned(self, shape):
        """Allocate memory that is kept until the copies from and to it are done, as PyTorch does."""
        tensor = torch.full(shape, float("nan"))
        self.host[tensor.data_ptr()] = tensor
        return tensor

    def empty(self, shape):
        return self._allocate(np.full(shape, np.nan, np.float32), np.nan)

    def scratch(self, size):
        return self._allocate(np.zeros(size, np.uint8), FREED)

    def _allocate(self, memory, freed):
        """Return a tensor in memory that holds the value `freed` when all its tensors are gone."""
        users = [self.current]
        self.memory[memory.ctypes.data] = memory, users
        block = memory.view(Block)
        weakref.finalize(block, self._free, memory, freed, users)
        return torch.from_numpy(block)

    def _free(self, memory, freed, users):
        # Each block is freed independently of the others.
        self.stream().enqueue(lambda: memory.fill(freed), [(stream, stream.enqueued) for stream in users])

    def copy(self, target, source):
        self.events.append("copy")
        kept = [tensor for tensor in (target, source) if tensor.data_ptr() in self.host]
        views = [floats_at(tensor.data_ptr(), tuple(tensor.shape)) for tensor in (target, source)]

        def work():
            views[0][:] = views[1]
            kept.clear()

        self.current.enqueue(work)

    def keep_for(self, tensor, stream):
        _, users = self.memory[tensor.data_ptr()]
        users.append(stream)

    def event(self):
        stream, count = self.current, self.current.enqueued

        def synchronize():
            self.events.append("wait")
            assert self.gate.wait(60)
            self.run_until(stream, count)

        return SimpleNamespace(synchronize=synchronize)

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def ordered(self):
        self.events.append("engine waits")
        self.engines.wait_stream(self.callers)
        try:
            with self.on(self.engines):
                yield
        finally:
            self.callers.wait_stream(self.engines)
            self.events.append("caller waits")
            # The caller may use its tensors at once, in host memory.
            self.callers.synchronize()

    def capture(self, launch):
        assert self.current is self.engines
        self.events.append("capture")
        FakeContext.captured = captured = []
        try:
            launch()
        finally:
            FakeContext.captured = None

        def replay():
            for context in captured:
                assert context() is not None, "the graph has outlived its execution context"
                context().execute_async_v3(STREAM)

        return replay
