"""Channels and length of audio arrays `[..., channels, samples]`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from samekit.errors import InputError

Audio = npt.NDArray[np.float32]


def to_channels(audio: Audio, channels: int) -> Audio:
    """Convert `[..., channels, samples]` to the channels of a model, by the rule of the Stable Audio 3 reference.

    Mono is repeated, and surplus channels are dropped; nothing is mixed. The result is a view if nothing is repeated.

    Raises:
        InputError: there are too few channels, but more than one.
    """
    given = audio.shape[-2]
    if given >= channels:
        return audio[..., :channels, :]
    if given != 1:
        raise InputError(f"audio of {given} channels cannot become {channels}; give 1, or {channels} or more")
    return np.repeat(audio, channels, axis=-2)


def pad_to(audio: Audio, multiple: int) -> Audio:
    """Append zeros to `[..., samples]` up to a multiple of samples; return the input itself if nothing is missing."""
    missing = -audio.shape[-1] % multiple
    if missing == 0:
        return audio
    return np.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, missing)])
