"""Derive the facts that an engine folder records from a checkpoint: an `EngineSpec` without graphs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from samekit.engine.spec import DECODER, ENCODER, EngineSpec
from samekit_export.config import ChunkSpan
from samekit_export.graph import GRAPH_REVISION

if TYPE_CHECKING:
    from samekit_export.config import TrunkConfig
    from samekit_export.tensors import Checkpoint


def _context(trunk: TrunkConfig) -> int:
    """Return how many latents a trunk sees to either side of a latent, in a window that starts at a chunk."""
    if isinstance(trunk.span, ChunkSpan):
        transformers = trunk.span.latents // 2 if trunk.span.shifted else 0
    else:
        transformers = trunk.depth * trunk.span.latents
    # The decoder's convolution sees one patch more, which belongs to the next latent.
    return transformers + trunk.mapping_kernel // 2


def _chunk(trunk: TrunkConfig) -> int:
    """Return the latents in a chunk; 1 for a band, which may be cut anywhere."""
    return trunk.span.latents if isinstance(trunk.span, ChunkSpan) else 1


def spec_of(checkpoint: Checkpoint) -> EngineSpec:
    """Return the facts about a checkpoint's model."""
    config = checkpoint.config
    return EngineSpec(
        name=checkpoint.name,
        sample_rate=config.sample_rate,
        channels=config.channels,
        hop=config.hop,
        latent_width=config.latent_width,
        # One for both directions, so that latents and audio can be cut at the same places.
        alignment=math.lcm(_chunk(config.encoder), _chunk(config.decoder)),
        contexts={ENCODER: _context(config.encoder), DECODER: _context(config.decoder)},
        source=checkpoint.source,
        source_sha256=checkpoint.sha256,
        soft_clip=config.soft_clip,
        graph_revision=GRAPH_REVISION,
    )
