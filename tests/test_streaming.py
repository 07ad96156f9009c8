"""Streams in blocks of any size equal one pass, and keep at most a window of input."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import RATE, FakeBackend, assert_close, assert_one_line, each_direction, noise

from samekit.engine.spec import DECODER, ENCODER
from samekit.errors import BackendError, InputError
from samekit.model import AutoencoderModel
from samekit.streaming import StreamDecoder, StreamEncoder, WindowCutter, run_windows
from samekit.windows import ExactWindows

LEAST_DB = 110


@pytest.fixture
def windowed(backend):
    """Return each model on each backend, with windows of 16 latents."""
    return AutoencoderModel(backend, window=16)


def in_blocks(array, sizes):
    """Yield pieces of the last axis, whose sizes repeat `sizes`."""
    start = 0
    for size in itertools.cycle(sizes):
        if start >= array.shape[-1]:
            return
        yield array[..., start : start + size]
        start += size


def through(stream, array, sizes):
    """Return the whole output of a stream that gets an array in blocks."""
    outputs = [stream.push(block) for block in in_blocks(array, sizes)]
    return np.concatenate([*outputs, stream.finish()], axis=-1)


@pytest.mark.parametrize("sizes", [[4096], [1, 5000, 4095, 100_001], [10**7]], ids=str)
def test_encoder(windowed, backend, sizes):
    clip = noise((2, 41 * 4096 - 1000))
    padded = np.pad(clip, ((0, 0), (0, 1000)))
    assert_close(backend.encode(padded[None])[0], through(windowed.stream_encoder(RATE), clip, sizes), LEAST_DB)


@pytest.mark.parametrize("sizes", [[1], [3, 1, 17, 50], [1000]], ids=str)
def test_decoder(windowed, backend, sizes):
    latents = noise((32, 41), level=1)
    assert_close(backend.decode(latents[None])[0], through(windowed.stream_decoder(), latents, sizes), LEAST_DB)


@pytest.mark.parametrize("rate", [48_000, 22_050, 96_000])
def test_encoder_at_another_rate(windowed, rate):
    clip = noise((1, 3 * rate + 17))
    stream = windowed.stream_encoder(rate)
    output = through(stream, clip, [999, 10_001])
    assert_close(windowed.encode(clip, rate)[0], output, LEAST_DB)
    assert stream.samples == -(-clip.shape[1] * RATE // rate)


@pytest.fixture
def one_model(model_of):
    """Return one model, for tests that do not depend on the model."""
    return AutoencoderModel(model_of("tiny-s", "onnxruntime").autoencoder.backend, window=16)


def test_blocks_of_other_kinds(one_model):
    clip = noise(50_000)
    expected = through(one_model.stream_encoder(RATE), np.stack([clip, clip]), [9000])
    assert_close(expected, through(one_model.stream_encoder(RATE), torch.from_numpy(clip), [9000]), LEAST_DB)
    assert_close(expected, through(one_model.stream_encoder(RATE), clip[None].astype(np.float64), [9000]), LEAST_DB)


def test_decoder_takes_what_the_encoder_gives(one_model):
    clip = noise((2, 40 * 4096))
    encoder, decoder = one_model.stream_encoder(RATE), one_model.stream_decoder()
    blocks = [decoder.push(encoder.push(block)) for block in in_blocks(clip, [30_000])]
    blocks += [decoder.push(encoder.finish()), decoder.finish()]
    expected = one_model.decode(one_model.encode(clip, RATE))[0]
    assert_close(expected, np.concatenate(blocks, axis=-1), LEAST_DB)


def test_empty_blocks_change_nothing(one_model):
    clip = noise((2, 10_000))
    stream = one_model.stream_encoder(RATE)
    outputs = [stream.push(block) for block in (clip[:, :0], clip, clip[:, :0])]
    assert_close(one_model.encode(clip, RATE)[0], np.concatenate([*outputs, stream.finish()], axis=-1), LEAST_DB)


def test_stream_begins_anew_after_finish(one_model):
    stream = one_model.stream_decoder()
    for seed in (1, 2):
        latents = noise((32, 20), seed, level=1)
        assert_close(one_model.decode(latents[None])[0], through(stream, latents, [7]), LEAST_DB)
    stream = one_model.stream_encoder(RATE)
    for seed in (1, 2):
        clip = noise((2, 90_000), seed)
        assert_close(one_model.encode(clip, RATE)[0], through(stream, clip, [40_000]), LEAST_DB)


PLAN = ExactWindows(size=8, context=2, alignment=2)


def test_encoder_keeps_its_promise_of_latency():
    stream = StreamEncoder(FakeBackend(), PLAN, RATE)
    given = 0
    for latents in range(1, 60):
        given += stream.push(noise((2, 8))).shape[-1]
        assert latents - stream.latency <= given < latents


def test_decoder_keeps_its_promise_of_latency():
    stream = StreamDecoder(FakeBackend(), PLAN)
    given = 0
    for latents in range(1, 60):
        given += stream.push(noise((4, 1))).shape[-1] // 8
        assert latents - stream.latency <= given < latents


@each_direction
def test_nothing_but_a_window_is_kept(direction):
    backend = FakeBackend()
    features, unit = (2, 8) if direction == ENCODER else (4, 1)
    cutter = WindowCutter(ExactWindows(size=200, context=2, alignment=2), unit)
    tracemalloc.start()
    try:
        for _ in range(10):
            # The cutter must not keep this large block alive, of which its tail would be a view.
            windows = cutter.push(np.zeros((3, features, 20_000 * unit), np.float32))
            for _ in run_windows(backend, direction, windows):
                pass
            del windows
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 3 * features * 10_000 * unit * 4
    assert set(backend.calls) == {200}


@pytest.mark.parametrize("expected", [None, 1, 150, 173, 174, 500])
@pytest.mark.parametrize("piece", [1, 7, 60, 1000])
@pytest.mark.parametrize("context", [0, 2])
def test_cutter_equals_slices_whatever_length_is_expected(expected, piece, context):
    plan, allocated = ExactWindows(size=64, context=context, alignment=2), []

    def allocate(shape):
        allocated.append(shape[-1])
        return np.full(shape, np.nan, np.float32)

    cutter = WindowCutter(plan, 3, expected, allocate)
    for latents in (174, 64, 1):
        array = noise((2, 2, latents * 3))
        windows = []
        for start in range(0, latents * 3, piece):
            block = array[:, :, start : start + piece].copy()
            windows += cutter.push(block)
            # The cutter must have copied the block, whose owner writes over it.
            block.fill(np.nan)
        windows += cutter.push(array[:, :, :0], final=True)
        assert [window for window, _ in windows] == list(plan.over(latents))
        for window, values in windows:
            assert np.array_equal(values, array[:, :, window.start * 3 : window.stop * 3])
        if expected == latents:
            # No array is copied once more, and none is too large.
            assert allocated == [values.shape[-1] for _, values in windows]
        allocated.clear()


def test_streams_without_input(one_model):
    with pytest.raises(InputError, match="no samples were received"):
        one_model.stream_encoder(RATE).finish()
    with pytest.raises(InputError, match="no latents were received"):
        one_model.stream_decoder().finish()


@pytest.mark.parametrize(
    ("block", "match"),
    [
        (np.zeros((2, 3, 10), np.float32), "a clip must be"),
        (np.zeros((2, 10), np.int16), "divide by 32768"),
        (np.full((2, 10), np.nan, np.float32), "NaN"),
        ([0.0, 0.1], "NumPy array or a PyTorch tensor"),
    ],
    ids=["rank", "int16", "NaN", "list"],
)
def test_blocks_that_cannot_be_encoded(one_model, block, match):
    with pytest.raises(InputError, match=match) as caught:
        one_model.stream_encoder(RATE).push(block)
    assert_one_line(caught.value)


@pytest.mark.parametrize("shape", [(33, 2), (32,), (1, 32, 2)])
def test_blocks_that_cannot_be_decoded(one_model, shape):
    with pytest.raises(InputError, match=r"latents must be \[32, length\], got .*; pass one clip"):
        one_model.stream_decoder().push(np.zeros(shape, np.float32))


@pytest.mark.parametrize("direction", [ENCODER, DECODER])
def test_refused_block_does_not_end_the_stream(one_model, direction):
    stream = one_model.stream_encoder(RATE) if direction == ENCODER else one_model.stream_decoder()
    array = noise((2, 90_000)) if direction == ENCODER else noise((32, 20))
    expected = one_model.encode(array, RATE)[0] if direction == ENCODER else one_model.decode(array[None])[0]
    first = stream.push(array[:, :7])
    with pytest.raises(InputError):
        stream.push(array[:, 7:9] * np.float32(np.inf))
    assert_close(expected, np.concatenate([first, stream.push(array[:, 7:]), stream.finish()], axis=-1), LEAST_DB)


@each_direction
@pytest.mark.parametrize("failing", ["push", "finish"])
def test_failure_ends_the_stream(direction, failing):
    def fail(*_):
        raise BackendError("the power went out; try again")

    backend = FakeBackend()
    stream = StreamEncoder(backend, PLAN, RATE) if direction == ENCODER else StreamDecoder(backend, PLAN)
    block = noise((2, 8 * 20)) if direction == ENCODER else noise((4, 20))
    stream.push(block)
    backend.answer = fail
    with pytest.raises(BackendError, match="the power went out"):
        stream.push(block) if failing == "push" else stream.finish()
    backend.answer = backend.zeros
    # The failed step has consumed its input, so every later call is refused.
    for again in (lambda: stream.push(block), stream.finish, lambda: stream.push(block)):
        with pytest.raises(BackendError, match="; begin a new stream") as caught:
            again()
        assert_one_line(caught.value)


def test_windows_that_are_not_run_do_not_change_those_that_follow():
    array = noise((1, 4, 200))
    cutter = WindowCutter(PLAN, 1)
    assert list(cutter.push(array[:, :, :100]))
    second = list(cutter.push(array[:, :, 100:], final=True))
    for window, piece in second:
        assert np.array_equal(piece, array[:, :, window.start : window.stop])
    assert [window for window, _ in second] == list(PLAN.over(200))[-len(second) :]
