"""Music for measurements: excerpts of the built-in piece."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

import numpy as np

from samekit.audio import prepare, read_audio
from samekit.demo import PIECE

if TYPE_CHECKING:
    from samekit.arrays import Array


class AudioFormat(Protocol):
    """What decides the shape of a model's audio: an `EngineSpec` or a `SameConfig`."""

    @property
    def sample_rate(self) -> int:
        """In Hz."""

    @property
    def channels(self) -> int:
        """Channels of audio."""

    @property
    def hop(self) -> int:
        """Samples per latent."""


def music(model: AudioFormat, latents: int, start: float = 2.0) -> Array:
    """Return an excerpt of the built-in piece as a model takes it: `[1, channels, latents * hop]`.

    Args:
        model: of which rate, channels and hop.
        latents: length of the excerpt; the piece is repeated if it is shorter.
        start: of the excerpt, in seconds.
    """
    piece = _piece(model.sample_rate, model.channels)
    first = round(start * model.sample_rate)
    positions = np.arange(first, first + latents * model.hop) % piece.shape[1]
    excerpt: Array = piece.take(positions, axis=1)[None]
    return excerpt


@functools.lru_cache(maxsize=2)
def _piece(rate: int, channels: int) -> Array:
    audio, original = read_audio(PIECE)
    return prepare(audio, original, rate, channels)
