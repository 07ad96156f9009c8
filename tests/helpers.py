"""What several test modules share: seeded arrays and checkpoints, comparisons, a backend that computes nothing."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from samekit.backends.base import Backend
from samekit.engine.spec import DECODER, ENCODER, EngineSpec
from samekit_export import random_weights
from samekit_export.random_weights import published_config, random_checkpoint
from samekit_export.verify import snr_db

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("tiny-s", "tiny-l")
DIRECTIONS = (ENCODER, DECODER)
# Every name but "auto"; a test holds this list to `samekit.backends.BACKENDS`.
BACKEND_NAMES = ("tensorrt", "onnxruntime", "torch")
EACH_BACKEND = [pytest.param(name, marks=pytest.mark.gpu) if name == "tensorrt" else name for name in BACKEND_NAMES]
RATE = 44_100
HOP = 4096

each_direction = pytest.mark.parametrize("direction", DIRECTIONS)

# The same object every time: drawing millions of numbers takes a while. Its tensors are not to be changed.
seeded = functools.cache(random_checkpoint)

# Lines for the end of a run's report.
SUMMARY = pytest.StashKey[list[str]]()

# What a run tried and broke on purpose, told at its end: kind -> how often. The fixtures of these names count.
INPUTS = pytest.StashKey[Counter]()
FAULTS = pytest.StashKey[Counter]()
# Tests of those that failed.
WRONG = pytest.StashKey[list[str]]()

REMOVED = mock.sentinel.REMOVED
"""In place of a field's value: the field is left out."""


def noise(shape, seed=0, level=0.2):
    """Float32 noise; the level is that of the golden inputs."""
    return (np.random.RandomState(seed).standard_normal(shape) * level).astype(np.float32)


def golden_cases(name):
    """Every golden case of a model, with its output under `output`."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return [case | {"output": file[case["key"]]} for case in json.loads(str(file["cases"]))]


def assert_close(reference, output, least_db):
    """Float32 of the same shape, and so close to the reference."""
    assert (output.dtype, output.shape) == (np.float32, reference.shape), f"{output.dtype} {output.shape}"
    assert (measured := snr_db(reference, output)) >= least_db, f"{measured:.1f} dB"


def run_direction(codec, direction, array):
    """One half of whatever encodes and decodes arrays: a backend, or what stands behind an AutoencoderModel."""
    if isinstance(codec, Backend):
        return codec.run(direction, array)
    return codec.encode_audio(array) if direction == ENCODER else codec.decode_audio(array)


def in_one_pass(module, array):
    """The output of a PyTorch callable for a NumPy array."""
    with torch.inference_mode():
        return module(torch.from_numpy(array)).numpy()


def edit(document, changes):
    """Set fields of nested objects by dotted paths; `*` stands for encoder and decoder, REMOVED removes."""
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
    """The seeded checkpoint of `name` with fields of its configuration changed; paths count from `model`."""
    document = published_config(name)
    edit(document["model"], changes)
    document["audio_channels"] = document["model"]["io_channels"]
    with mock.patch.object(random_weights, "published_config", return_value=document):
        return random_checkpoint(name)


def smallest_window(spec, direction):
    """Latents in the smallest exact window of one half."""
    needed = 2 * spec.contexts[direction] + spec.alignment
    return spec.alignment * -(-needed // spec.alignment)


def assert_one_line(error):
    """A message of one line that names a cause and a cure."""
    message = str(error)
    assert message.count("\n") == 0
    assert "; " in message


class FakeBackend(Backend):
    """Answers with zeros, or with what `answer(half, array)` returns; remembers the latents of each call."""

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
        """Silence, or latents of nothing."""
        batch, _, length = array.shape
        shape = (batch, 4, length // 8) if direction == ENCODER else (batch, 2, length * 8)
        return np.zeros(shape, np.float32)

    def _run(self, direction, array):
        self.calls.append(array.shape[-1] // (8 if direction == ENCODER else 1))
        return self.answer(direction, array)
