"""Channels and length of audio arrays `[..., channels, samples]`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from samekit.errors import InputError

Audio = npt.NDArray[np.float32]


def to_channels(audio: Audio, channels: int) -> Audio:
    """Give audio the channels that a model takes, by the rule of the Stable Audio 3 reference.

    Mono is repeated, channels past the last one wanted are dropped; nothing is mixed.

    Args:
        audio: `[..., channels, samples]`.
        channels: how many are wanted.

    Returns:
        `[..., channels, samples]`, a view if nothing is repeated.

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
    """Append zeros up to a whole multiple of samples.

    Args:
        audio: `[..., samples]`.
        multiple: in samples.

    Returns:
        `[..., ceil(samples / multiple) * multiple]`; the input itself if nothing is missing.
    """
    missing = -audio.shape[-1] % multiple
    if missing == 0:
        return audio
    return np.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, missing)])
