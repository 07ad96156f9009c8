"""Equal windows run together: fewer calls, the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import FakeBackend

from samekit.backends.base import BackendOptions
from samekit.batches import Autoencoder
from samekit.engine.spec import DECODER
from samekit.errors import InputError
from samekit.streaming import run_windows


class CountingBackend(FakeBackend):
    """Returns the first two features of each latent as audio, and records the batch of each call."""

    def __init__(self, window_batch):
        super().__init__()
        self._window_batch = window_batch
        self.batches = []

    def _run(self, direction, array):
        assert direction == DECODER
        self.batches.append(array.shape[0])
        return np.repeat(array[:, :2], self.spec.hop, axis=2)


@pytest.mark.parametrize(
    ("window_batch", "clips", "expected"),
    [(1, 1, [1] * 5), (4, 1, [4, 1]), (4, 2, [4, 4, 2]), (4, 3, [6, 6, 3]), (100, 1, [4, 1])],
)
def test_equal_windows_run_together(window_batch, clips, expected):
    backend = CountingBackend(window_batch)
    latents = np.random.default_rng(0).standard_normal((clips, 4, 43), np.float32)
    audio = Autoencoder(backend, window=12).decode_audio(latents)
    assert np.array_equal(audio, np.repeat(latents[:, :2], backend.spec.hop, axis=2))
    assert backend.batches == expected


@pytest.mark.parametrize("window_batch", [0, -1, 2.0, "2", True], ids=repr)
def test_a_batch_of_none_is_refused(window_batch):
    with pytest.raises(InputError, match=r"window_batch is .*; pass a whole number from 1"):
        BackendOptions(window_batch=window_batch)


def test_no_windows_no_calls():
    backend = CountingBackend(4)
    assert list(run_windows(backend, DECODER, [])) == []
    assert backend.batches == []
