"""A fake TensorRT that computes a simple function in host memory and fails in the ways of the real one.

* It reads and writes at the addresses that it was given.
* It returns False instead of raising an exception.
* When it refuses a shape, the previous shape stays set.
* When a launch fails, the output keeps its previous contents.
* It keeps no object alive that a CUDA graph uses.
"""

from __future__ import annotations

import ctypes
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from samekit.engine.fingerprint import PROFILES, TENSORRT
from samekit.engine.spec import INPUT_NAMES, opposite

# Handle of a CUDA stream that is not the default stream, 0, on which TensorRT would synchronise the device.
STREAM = 7


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


class FakeTensorRT:
    """The module. The bytes of an engine begin with the name of its direction."""

    __name__ = TENSORRT
    __version__ = "11.4.0"
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    def __init__(self, spec):
        # samekit derives its logger from this class.
        self.ILogger = type("ILogger", (), {"Severity": SimpleNamespace(VERBOSE="VERBOSE")})
        self.spec = spec
        self.fails = None
        self.events = []
        # Profiles of all contexts; a list of contexts would keep them alive.
        self.profiles = []

    def works(self, step):
        """Return whether a step succeeds."""
        return self.fails != step

    def Runtime(self, logger):  # noqa: N802 TensorRT's name
        assert isinstance(logger, self.ILogger)
        return SimpleNamespace(deserialize_cuda_engine=self._load)

    def _load(self, data):
        direction = next(direction for direction in INPUT_NAMES if data.startswith(direction.encode()))
        self.events.append(f"load {direction}")
        return FakeEngine(self, direction) if self.works("load") else None


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

    def create_runtime_config(self):
        return FakeRuntimeConfig()

    def create_execution_context(self, strategy):
        config = None if strategy == "user managed" else strategy
        return FakeContext(self, config) if self.module.works("context") else None


class FakeRTX(FakeTensorRT):
    """A module that records CUDA graphs by itself, as TensorRT-RTX does."""

    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")


class FakeRuntimeConfig:
    def set_execution_context_allocation_strategy(self, strategy):
        assert strategy == "user managed"


class FakeContext:
    captured = None
    """The contexts that a running capture has recorded; None outside a capture."""

    def __init__(self, engine, config):
        self.config = lambda: True
        if config is not None:
            assert config.cuda_graph_strategy == "whole graph"
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
        self.module.events.append(f"{size} bytes of scratch")

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return self.module.works(f"address of {name}")

    def execute_async_v3(self, stream):
        assert stream == STREAM
        assert self.config() is not None, "the context has outlived its configuration"
        self.module.events.append("launch")
        if not self.module.works("launch"):
            return False
        if FakeContext.captured is not None:
            FakeContext.captured.append(weakref.ref(self))
            return True
        source, target = (self.addresses[name] for name in self.engine.names)
        result = computed(self.module.spec, self.engine.direction, floats_at(source, self.shape))
        floats_at(target, result.shape)[:] = result
        return True


class FakeGpu:
    """Host memory in place of a GPU's; records the order of events."""

    capability = (8, 9)

    def __init__(self, events):
        self.events = events
        self.scratches = weakref.WeakSet()

    def contains(self, value):
        return isinstance(value, torch.Tensor)

    def upload(self, array):
        self.events.append("upload")
        return torch.from_numpy(array.copy())

    def download(self, tensor):
        self.events.append("download")
        return tensor.numpy()

    def empty(self, shape):
        return torch.full(shape, float("nan"))

    def scratch(self, size):
        block = torch.empty(size, dtype=torch.uint8)
        self.scratches.add(block)
        return block

    @contextmanager
    def ordered(self):
        self.events.append("engine waits")
        yield STREAM
        # Memory that is freed before this could be reused while the engine still writes to it.
        self.events.append("caller waits" + (" with scratch" if self.scratches else ""))

    def capture(self, launch):
        self.events.append("capture")
        FakeContext.captured = captured = []
        try:
            launch(STREAM)
        finally:
            FakeContext.captured = None

        def replay():
            for context in captured:
                assert context() is not None, "the graph has outlived its execution context"
                context().execute_async_v3(STREAM)

        return replay
