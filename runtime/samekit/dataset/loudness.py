"""Scale the audio of a clip until the root mean square (RMS) of its latents has a target value.

The encoder is not linear, so this takes several steps: the clip is encoded, its gain is multiplied by the target
divided by the RMS, and the clip is encoded again. Tolerance and number of corrections are those of the scripts of LoRA
trainers. The RMS is that of the latents of the clip, without padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from samekit.arrays import Array

MOST_CORRECTIONS: Final = 4
TOLERANCE: Final = 0.03
"""Relative to the target."""
# The least RMS, so that the gain stays finite.
_LEAST_RMS: Final = 1e-6


@dataclass(frozen=True)
class Loudness:
    """The gain of a clip."""

    gain: float = 1.0
    corrections: int = 0
    """How often the gain was changed."""
    rms: float = 0.0
    """RMS of the latents with this gain; 0 until the clip is encoded."""

    def corrected(self, target: float) -> Loudness | None:
        """Return the next gain to try, or None if this one is to be kept."""
        if self.corrections == MOST_CORRECTIONS or abs(self.rms - target) <= TOLERANCE * target:
            return None
        return Loudness(self.gain * target / self.rms, self.corrections + 1)

    def metadata(self) -> dict[str, Any]:
        """Return the fields of the metadata that trainers know."""
        return {"audio_gain_applied": self.gain, "latent_rms_achieved": self.rms}


def latent_rms(blocks: Iterable[Array], latents: int) -> float:
    """Return the RMS of the first `latents` latents in blocks of `[width, latents]`."""
    squares, values = [], 0
    for block in blocks:
        part = block[:, :latents]
        squares.append(float(np.square(part, dtype=np.float64).sum()))
        values += part.size
        latents -= part.shape[1]
    return max(math.sqrt(math.fsum(squares) / max(values, 1)), _LEAST_RMS)
