"""The eager model and the graphs that are exported from it, for all implemented values of a configuration."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import (
    DIRECTIONS,
    KINDS,
    REMOVED,
    assert_close,
    each_direction,
    in_one_pass,
    noise,
    run_direction,
    seeded,
    smallest_window,
    variant,
)

from samekit.backends.base import BackendOptions
from samekit.engine.spec import DECODER, ENCODER
from samekit.errors import CheckpointError
from samekit.streaming import WindowCutter, run_windows
from samekit.windows import ExactWindows
from samekit_export.backend import EagerBackend
from samekit_export.graph import GraphDecoder, GraphEncoder
from samekit_export.graph_attention import mask_value
from samekit_export.model import Same, band_mask
from samekit_export.model_spec import spec_of
from samekit_export.verify import example_input, snr_db

BAND = {
    "*.config.chunk_size": REMOVED,
    "*.config.chunk_midpoint_shift": REMOVED,
}

# Name -> the seeded checkpoint that is changed, and the changes.
VARIANTS = {
    "tiny-s": ("tiny-s", {}),
    "tiny-l": ("tiny-l", {}),
    "patch of 64": (
        "tiny-s",
        {
            "pretransform.config.patch_size": 64,
            "encoder.config.in_channels": 128,
            "decoder.config.out_channels": 128,
            "downsampling_ratio": 1024,
        },
    ),
    "stride 8": ("tiny-s", {"*.config.strides": [8], "*.config.chunk_size": 16, "downsampling_ratio": 2048}),
    "stride 1": ("tiny-l", {"*.config.strides": [1], "downsampling_ratio": 256}),
    "heads of 32": ("tiny-l", {"*.config.dim_heads": 32}),
    "heads of 128": ("tiny-s", {"*.config.dim_heads": 128}),
    "feed-forward of 2": ("tiny-s", {"*.config.ff_mult": 2}),
    "halves of their own size": (
        "tiny-l",
        {
            "encoder.config.channels": 64,
            "encoder.config.transformer_depths": [2],
            "decoder.config.dim_heads": 32,
            "decoder.config.ff_mult": 4,
        },
    ),
    "depth 1": ("tiny-l", {"*.config.transformer_depths": [1]}),
    "depth 2": ("tiny-s", {"*.config.transformer_depths": [2]}),
    "chunks of 4 latents": ("tiny-s", {"*.config.chunk_size": 64}),
    "chunks not shifted": ("tiny-s", {"*.config.chunk_midpoint_shift": False}),
    "odd depth, chunks not shifted": (
        "tiny-s",
        {"*.config.chunk_midpoint_shift": REMOVED, "*.config.transformer_depths": [3]},
    ),
    "chunks of 2 and 4 latents": ("tiny-s", {"decoder.config.chunk_size": 64}),
    "chunks of 6 and 4 latents": ("tiny-s", {"encoder.config.chunk_size": 96, "decoder.config.chunk_size": 64}),
    "encoder in chunks, decoder in a band": ("tiny-s", {"decoder.config.sliding_window": [1, 1]}),
    "encoder in a band, decoder in chunks": ("tiny-s", {"encoder.config.sliding_window": [1, 1]}),
    "band of 2": ("tiny-l", {"*.config.sliding_window": [2, 2]}),
    "band of 3 and convolution": ("tiny-l", {"*.config.sliding_window": [3, 3], "decoder.config.conv_mapping": True}),
    "soft clip": ("tiny-l", {"decoder.soft_clip": True}),
    "mono": (
        "tiny-s",
        {
            "io_channels": 1,
            "pretransform.config.channels": 1,
            "encoder.config.in_channels": 256,
            "decoder.config.out_channels": 256,
        },
    ),
    "latents of 8": ("tiny-s", {"latent_dim": 8, "*.config.latent_dim": 8, "bottleneck.config.dim": 8}),
    "every block a sine": ("tiny-s", {"*.config.sinusoidal_blocks": [5]}),
    "no block a sine": ("tiny-l", {"decoder.config.sinusoidal_blocks": [0]}),
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(scope="module")
def variant_of():
    """Return a function that makes the checkpoint and the model of a variant, once: name -> both."""
    made = {}

    def make(name):
        if name not in made:
            checkpoint = variant(*VARIANTS[name])
            made[name] = checkpoint, Same.from_checkpoint(checkpoint)
        return made[name]

    return make


def eager_call(model, direction):
    return model.encode if direction == ENCODER else model.decode


def graph_of(model, direction):
    return GraphEncoder(model) if direction == ENCODER else GraphDecoder(model)


@each_variant
@each_direction
def test_graph_equals_eager(variant_of, name, direction):
    checkpoint, model = variant_of(name)
    spec, graph = spec_of(checkpoint), graph_of(model, direction)
    for batch, latents in ((1, 1), (1, 2), (3, 3), (2, 8), (1, 13)):
        array = example_input(spec, direction, batch, latents, seed=latents)
        expected = in_one_pass(eager_call(model, direction), array)
        assert_close(expected, in_one_pass(graph, array), 100)
        assert np.isfinite(expected).all()


def in_windows(backend, direction, plan, array):
    """Encode or decode in the windows of a plan."""
    windows = WindowCutter(plan, backend.spec.layout(direction)[1]).push(array, final=True)
    return np.concatenate(list(run_windows(backend, direction, windows)), axis=-1)


@each_variant
@each_direction
def test_smallest_windows_equal_one_pass(variant_of, name, direction):
    checkpoint, model = variant_of(name)
    spec = spec_of(checkpoint)
    with EagerBackend(spec, model, BackendOptions(device="cpu", threads=1)) as backend:
        window = smallest_window(spec, direction)
        plan = ExactWindows(window, spec.contexts[direction], spec.alignment)
        for latents in (window + 1, 3 * window + 2):
            array = example_input(spec, direction, 1, latents, seed=latents)
            assert_close(run_direction(backend, direction, array), in_windows(backend, direction, plan, array), 110)


@pytest.mark.parametrize(("name", "less"), [("tiny-s", 1), ("tiny-l", 2)])
@each_direction
def test_less_context_shows(variant_of, name, less, direction):
    checkpoint, model = variant_of(name)
    spec = spec_of(checkpoint)
    with EagerBackend(spec, model, BackendOptions(device="cpu", threads=1)) as backend:
        plan = ExactWindows(32, spec.contexts[direction] - less, spec.alignment)
        array = example_input(spec, direction, 1, 100, seed=0)
        assert snr_db(run_direction(backend, direction, array), in_windows(backend, direction, plan, array)) < 110


# These change no tensor, so the output would stay the same if the field were ignored.
SAME_WEIGHTS = [
    "chunks of 4 latents",
    "chunks not shifted",
    "chunks of 2 and 4 latents",
    "encoder in chunks, decoder in a band",
    "encoder in a band, decoder in chunks",
    "band of 2",
    "soft clip",
    "every block a sine",
    "no block a sine",
]


@pytest.mark.parametrize("name", SAME_WEIGHTS)
def test_configuration_is_honoured(variant_of, name):
    (checkpoint, changed), (original, unchanged) = variant_of(name), variant_of(VARIANTS[name][0])
    for direction in DIRECTIONS:
        array = example_input(spec_of(checkpoint), direction, 1, 8, seed=0)
        outputs = [in_one_pass(eager_call(model, direction), array) for model in (changed, unchanged)]
        honoured = getattr(checkpoint.config, direction) != getattr(original.config, direction)
        if direction == DECODER:
            honoured = honoured or checkpoint.config.soft_clip
        assert np.array_equal(*outputs) != honoured


# --- Attention, written out --------------------------------------------------------------------------------


def dense_attention(attention, x, sees):
    """Compute attention for a sequence `[tokens, width]` in float64; token i attends to j if `sees[i, j]` is true."""
    width, tokens = attention.config.head_width, len(x)
    angles = np.outer(np.arange(tokens), 10_000.0 ** (-np.arange(0, 32, 2) / 32))

    def turned(features, norm):
        alpha, beta, gamma = (tensor.double().numpy() for tensor in (norm.alpha, norm.beta, norm.gamma))
        features = gamma * np.tanh(alpha * features) + beta
        a, b, rest = features[:, :16], features[:, 16:32], features[:, 32:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=1)

    def softmax(query, key):
        scores = np.where(sees, query @ key.T / math.sqrt(width), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    q1, k1, v, q2, k2 = np.split(x @ attention.to_qkv.weight.double().numpy().T, 5, axis=1)
    heads = []
    for start in range(0, x.shape[1], width):
        of_head = slice(start, start + width)
        first, second = (
            softmax(turned(q[:, of_head], attention.q_norm), turned(k[:, of_head], attention.k_norm))
            for q, k in ((q1, k1), (q2, k2))
        )
        heads.append((first - second) @ v[:, of_head])
    return np.concatenate(heads, axis=1) @ attention.to_out.weight.double().numpy().T


@pytest.mark.parametrize(
    ("name", "groups", "sees"),
    [
        ("tiny-l", 5, lambda i, j: abs(i - j) <= 17),
        ("band of 2", 5, lambda i, j: abs(i - j) <= 34),
        ("band of 2", 1, lambda i, j: abs(i - j) <= 34),
        ("tiny-s", 3, lambda i, j: i // 34 == j // 34),
        ("chunks of 4 latents", 2, lambda i, j: i // 68 == j // 68),
    ],
)
def test_attention(variant_of, name, groups, sees):
    _, model = variant_of(name)
    trunk = model.encoder.layers[0]
    attention, span = trunk.transformers[1].self_attn, trunk.config.span
    band = name in ("tiny-l", "band of 2")
    tokens = 17 if band else 17 * span.latents
    x = np.random.RandomState(0).standard_normal((groups * tokens, trunk.config.width))
    position = np.arange(groups * tokens)
    expected = dense_attention(attention, x, np.vectorize(sees)(position[:, None], position))
    mask = band_mask(1, groups, tokens, span.latents, torch.device("cpu")) if band else None
    output = in_one_pass(
        lambda rows: attention(rows.view(1, groups, tokens, -1), trunk.transformers[1].rope, mask).flatten(0, 2),
        x.astype(np.float32),
    )
    assert_close(expected, output, 110)


# --- Graphs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@each_direction
def test_rows_of_a_batch_do_not_meet(variant_of, name, direction):
    checkpoint, model = variant_of(name)
    graph = graph_of(model, direction)
    array = example_input(spec_of(checkpoint), direction, 3, 5, seed=0)
    together = in_one_pass(graph, array)
    for number in range(3):
        assert_close(in_one_pass(graph, array[number : number + 1])[0], together[number], 110)


@pytest.mark.parametrize("name", KINDS)
def test_folding_leaves_the_model_alone(name):
    tensors = {key: tensor.clone() for key, tensor in seeded(name).tensors.items()}
    model = Same.from_checkpoint(dataclasses.replace(seeded(name), tensors=tensors))
    for direction in DIRECTIONS:
        graph = graph_of(model, direction)
        assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in graph.parameters())
    assert all(torch.equal(tensor, seeded(name).tensors[key]) for key, tensor in model.state_dict().items())


def with_tensors(name, change):
    """Return a seeded checkpoint with some of its tensors changed."""
    tensors = dict(seeded(name).tensors)
    return dataclasses.replace(seeded(name), tensors=tensors | change(tensors))


@pytest.mark.parametrize("name", KINDS)
@each_direction
def test_negative_alphas(name, direction):
    checkpoint = with_tensors(name, lambda tensors: {k: -t for k, t in tensors.items() if "_norm.alpha" in k})
    model = Same.from_checkpoint(checkpoint)
    array = example_input(spec_of(checkpoint), direction, 1, 5, seed=0)
    assert_close(in_one_pass(eager_call(model, direction), array), in_one_pass(graph_of(model, direction), array), 100)


@pytest.mark.parametrize("norm", ["pre_norm", "ff_norm"])
@each_direction
def test_alpha_of_zero_cannot_be_folded(norm, direction):
    checkpoint = with_tensors(
        "tiny-s", lambda tensors: {k: 0 * t for k, t in tensors.items() if f"2.{norm}.alpha" in k}
    )
    with pytest.raises(CheckpointError, match=r"alpha is \(nearly\) zero"):
        graph_of(Same.from_checkpoint(checkpoint), direction)


def test_hidden_keys_weigh_nothing_and_are_not_subnormal():
    """Masking works even if visible keys have the lowest possible score and the hidden key has the highest."""
    model = Same.from_checkpoint(seeded("tiny-l"))
    for trunk in (model.encoder_parts[0], model.decoder_parts[1]):
        hides = np.float32(mask_value(trunk))
        features = noise((2, 10_000, trunk.config.width), level=5)
        for block in trunk.blocks:
            q, k = (
                in_one_pass(norm, rows.reshape(10_000, -1, trunk.config.head_width))
                for norm, rows in zip((block.self_attn.q_norm, block.self_attn.k_norm), features, strict=True)
            )
            scores = (q * k).sum(axis=-1) * trunk.config.head_width**-0.5
            assert np.exp(scores.max() + hides) < np.exp(scores.min()) * np.finfo(np.float32).eps / 34
            assert np.exp(scores.min() + hides - scores.max()) > np.finfo(np.float32).tiny


@pytest.mark.parametrize("name", KINDS)
def test_sharp_attention(name):
    """Large scores make every softmax nearly one-hot, so mistakes in masks and scales have a large effect."""
    checkpoint = with_tensors(name, lambda tensors: {k: 3 * t for k, t in tensors.items() if "q_norm.gamma" in k})
    model = Same.from_checkpoint(checkpoint)
    for direction in DIRECTIONS:
        array = example_input(spec_of(checkpoint), direction, 2, 7, seed=0)
        assert_close(
            in_one_pass(eager_call(model, direction), array), in_one_pass(graph_of(model, direction), array), 95
        )
