"""How long a GPU takes for a batch of windows, and the defaults that follow.

A call takes a fixed time, and a time for each latent. The published times of the reference's TensorRT port on an H200
give both (128 ... 4096 latents, one pass, half precision):

    attention          fixed      each latent    fixed, in latents    latents of a default batch    share of the fixed
    chunks (SAME-S)    0.67 ms      5.6 us       120                  8 x 256 = 2048                6 %
    bands (SAME-L)     1.55 ms     47.6 us        33                  4 x 256 = 1024                3 %

So a GPU gets the longest windows that the narrow profile of a TensorRT engine accepts, and as many at once as keep the
fixed time below a sixteenth. samekit has not measured these defaults on a GPU; `samekit tune` measures others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from samekit.engine.spec import EngineSpec


class GpuCost(NamedTuple):
    """What follows from the cost of one kind of model on a GPU."""

    window_batch: int
    """How many windows to run at once."""
    wide_decode: int
    """Latents for which the wide profile of the decoder is optimal."""


GPU_WINDOW: Final = 256
"""Latents of a default window on a GPU."""

_CHUNKS: Final = GpuCost(window_batch=8, wide_decode=512)
_BANDS: Final = GpuCost(window_batch=4, wide_decode=1024)


def gpu_cost(spec: EngineSpec) -> GpuCost:
    """Return the defaults of a model; the windows of attention in chunks are aligned, those of bands are not."""
    return _CHUNKS if spec.alignment > 1 else _BANDS
