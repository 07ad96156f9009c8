"""Shared helpers of the tests: seeded arrays and checkpoints, comparisons, and a backend without a model."""

from __future__ import annotations

import functools
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from samekit.backends.base import Backend
from samekit.backends.cpu import fast_precisions, processor
from samekit.engine.spec import DECODER, ENCODER, EngineSpec
from samekit_export import random_weights
from samekit_export.random_weights import published_config, random_checkpoint
from samekit_export.verify import snr_db

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("tiny-s", "tiny-l")
DIRECTIONS = (ENCODER, DECODER)
# Every backend except "auto". A test compares this list with `samekit.backends.BACKENDS`.
BACKEND_NAMES = ("tensorrt", "onnxruntime", "openvino", "torch")
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs the package openvino")
needs_bf16 = pytest.mark.skipif(
    find_spec("openvino") is None or "bf16" not in fast_precisions(processor()[1]),
    reason="needs the package openvino and a processor with bfloat16 products",
)
# The backend "onnxruntime" on another device. It is tested like another backend.
WEBGPU = "webgpu"
_MARKS = {"tensorrt": [pytest.mark.gpu], "openvino": [needs_openvino], WEBGPU: [pytest.mark.webgpu]}
EACH_BACKEND = [pytest.param(name, marks=_MARKS.get(name, [])) for name in (*BACKEND_NAMES, WEBGPU)]
RATE = 44_100
HOP = 4096

each_direction = pytest.mark.parametrize("direction", DIRECTIONS)

# Cached, because drawing millions of random numbers is slow. Tests must not change the tensors.
seeded = functools.cache(random_checkpoint)

# Lines that are printed at the end of a run.
SUMMARY = pytest.StashKey[list[str]]()

# Counts of inputs and of injected faults by kind, printed at the end of a run. See the fixtures `inputs`, `faults`.
INPUTS = pytest.StashKey[Counter]()
FAULTS = pytest.StashKey[Counter]()
# Ids of the failed tests that use one of these fixtures.
FAILED = pytest.StashKey[list[str]]()

REMOVED = mock.sentinel.REMOVED
"""Value that makes `edit` delete a field."""


def noise(shape, seed=0, level=0.2):
    """Return seeded Gaussian noise in float32. The default level is that of the golden inputs."""
    return (np.random.RandomState(seed).standard_normal(shape) * level).astype(np.float32)


def golden_cases(name):
    """Return the golden cases of a model, each with the reference's output as `output`."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return [case | {"output": file[case["key"]]} for case in json.loads(str(file["cases"]))]


def assert_close(reference, output, least_db):
    """Check that `output` is float32, has the reference's shape, and reaches a signal-to-noise ratio of `least_db`."""
    assert (output.dtype, output.shape) == (np.float32, reference.shape), f"{output.dtype} {output.shape}"
    assert (measured := snr_db(reference, output)) >= least_db, f"{measured:.1f} dB"


def run_direction(codec, direction, array):
    """Encode or decode an array by a backend or by the `autoencoder` of an AutoencoderModel."""
    if isinstance(codec, Backend):
        return codec.run(direction, array)
    return codec.encode_audio(array) if direction == ENCODER else codec.decode_audio(array)


def in_one_pass(module, array):
    """Apply a PyTorch callable to a NumPy array and return its output as a NumPy array."""
    with torch.inference_mode():
        return module(torch.from_numpy(array)).numpy()


def edit(document, changes):
    """Set fields of nested objects in place, by dotted paths.

    A `*` in a path means "encoder" and "decoder". The value REMOVED deletes the field.
    """
    for pattern, value in changes.items():
        for path in {pattern.replace("*", direction) for direction in DIRECTIONS}:
            *parents, field = path.split(".")
            inner = document
            for parent in parents:
                inner = inner[parent]
            inner[field] = value
            if value is REMOVED:
                del inner[field]
    return document


def variant(name, changes):
    """Return the seeded checkpoint of `name` with changed configuration fields; paths start below `model`."""
    document = published_config(name)
    edit(document["model"], changes)
    document["audio_channels"] = document["model"]["io_channels"]
    with mock.patch.object(random_weights, "published_config", return_value=document):
        return random_checkpoint(name)


def smallest_window(spec, direction):
    """Return the number of latents in the smallest exact window of a direction."""
    needed = 2 * spec.contexts[direction] + spec.alignment
    return spec.alignment * -(-needed // spec.alignment)


def assert_one_line(error):
    """Check that an error message is one line that names a cause and a cure, separated by a semicolon."""
    message = str(error)
    assert message.count("\n") == 0
    assert "; " in message


class FakeBackend(Backend):
    """Backend without a model that records the number of latents of each call.

    It returns `answer(direction, array)`, or zeros if `answer` is not given.
    """

    name = "fake"

    def __init__(self, answer=None, precision="fp32"):
        spec = EngineSpec(
            name="fake",
            sample_rate=RATE,
            channels=2,
            hop=8,
            latent_width=4,
            alignment=2,
            contexts={ENCODER: 1, DECODER: 2},
            source={},
            source_sha256="0",
        )
        super().__init__(spec, precision)
        self.answer = answer or self.zeros
        self.calls = []

    def zeros(self, direction, array):
        """Return zeros in the shape of the output."""
        batch, _, length = array.shape
        shape = (batch, 4, length // 8) if direction == ENCODER else (batch, 2, length * 8)
        return np.zeros(shape, np.float32)

    def _run(self, direction, array):
        self.calls.append(array.shape[-1] // (8 if direction == ENCODER else 1))
        return self.answer(direction, array)
