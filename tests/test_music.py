"""Example inputs: noise and music of which shorter ones are the start of longer ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import FakeBackend, each_direction

from samekit.audio import read_audio
from samekit.demo import PIECE
from samekit.engine.accuracy import example_input
from samekit_export.music import music

SPEC = dataclasses.replace(FakeBackend().spec, hop=4096)


@each_direction
def test_longer_noise_begins_with_shorter_noise(direction):
    """So accuracy at several lengths and batches is compared on the same content."""
    long = example_input(SPEC, direction, 3, 5, seed=1)
    assert long.shape == SPEC.input_shape(direction, 3, 5)
    short = example_input(SPEC, direction, 2, 2, seed=1)
    assert np.array_equal(short, long[:2, :, : short.shape[2]])
    assert not np.array_equal(long[0], long[1])
    assert not np.array_equal(long, example_input(SPEC, direction, 3, 5, seed=2))


def test_music_is_the_piece():
    audio, rate = read_audio(PIECE)
    assert rate == SPEC.sample_rate
    assert np.array_equal(music(SPEC, 3, start=1.0), audio[None, :, rate : rate + 3 * 4096])


def test_music_is_repeated():
    audio, rate = read_audio(PIECE)
    start = audio.shape[1] / rate - 0.01
    excerpt = music(SPEC, 1, start)
    first = round(start * rate)
    assert np.array_equal(excerpt[0], np.concatenate([audio[:, first:], audio], axis=1)[:, :4096])


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 2), (44_100, 1)])
def test_music_for_other_models(rate, channels):
    excerpt = music(dataclasses.replace(SPEC, sample_rate=rate, channels=channels), 7)
    assert (excerpt.shape, excerpt.dtype) == ((1, channels, 7 * 4096), np.float32)
    assert excerpt.std() > 0.01
