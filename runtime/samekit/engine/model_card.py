"""The texts that are published with an engine: its model card, and what the licence of its weights asks for.

The duties are those of the Stability AI Community License of July 5, 2024 (sections III, IV.a and IV.b). LICENSE.md of
the Stable Audio 3 repositories is this text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from samekit.engine import hub
from samekit.engine.spec import DIRECTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from samekit.engine.spec import EngineSpec

CARD_FILE: Final = "README.md"
"""Name of the model card, which the hub shows."""
LICENSE_FILE: Final = "LICENSE.md"
"""Name of the licence of the weights, in a repository and in an engine folder."""
NOTICE_FILE: Final = "NOTICE"
"""Name of the file with the attribution that Stability AI's licence asks for."""
CARD_MARK: Final = "<!-- written by samekit push, which replaces it -->"
"""A line of each card that samekit has written. Cards without it are kept."""

_OWNER: Final = "stabilityai/"
# What the export does to the weights, which the licence asks to state.
_CHANGES: Final = (
    "samekit exported the autoencoder to ONNX graphs. Weights are combined where that does not change the result, and "
    "stored in the precision that the name of a graph states."
)


@dataclass(frozen=True)
class Licence:
    """What is known about the licence of an engine's weights."""

    title: str
    metadata: Mapping[str, str]
    """Fields of the header of a model card."""
    duties: tuple[str, ...] = ()
    """What publishing the weights obliges to, as sentences; empty if nothing stands against it."""
    card: str = ""
    """What the model card says about it."""
    notice: str = field(default="", repr=False)
    """Contents of `NOTICE`; empty if none is needed."""


_STABILITY: Final = Licence(
    "Stability AI Community License",
    # The fields of the model cards of Stable Audio 3.
    {"license": "other", "license_name": "stable-audio-community", "license_link": LICENSE_FILE},
    (
        "The weights are under the Stability AI Community License, which has conditions for passing them on:",
        f"- A copy of the licence and its notice accompany them. samekit uploads {LICENSE_FILE} and {NOTICE_FILE}.",
        "- 'Powered by Stability AI' is displayed prominently. The model card does so; your product must do so too.",
        "- For a commercial purpose, you register at https://stability.ai/community-license.",
        "- Above 1,000,000 USD of annual revenue, you need another licence: https://stability.ai/enterprise.",
        "- All uses follow https://stability.ai/use-policy.",
    ),
    f"**Powered by Stability AI.** The weights are under the [Stability AI Community License]({LICENSE_FILE}), see "
    f"also [{NOTICE_FILE}]({NOTICE_FILE}). Commercial use requires registration at "
    "<https://stability.ai/community-license>, and another licence above 1,000,000 USD of annual revenue. "
    "All uses follow <https://stability.ai/use-policy>.",
    "This Stability AI Model is licensed under the Stability AI Community License, Copyright © Stability AI Ltd. "
    f"All Rights Reserved\n\nThe notice applies to the weights, which are from {{origin}}.\n\nChanges: {_CHANGES}\n",
)
_MIT: Final = Licence("MIT", {"license": "mit"}, card="The weights are under the MIT licence, as samekit is.")
_NONE: Final = Licence("none", {}, card="The weights are random numbers, good for tests and speed only.")
_UNKNOWN: Final = Licence(
    "unknown",
    {},
    (
        "samekit does not know the licence of these weights ({origin}).",
        "- Make sure that it allows you to publish them.",
        "- Models that are derived from weights of Stability AI stay under the conditions of its licence.",
    ),
    "The licence of the weights is that of their source.",
)


def licence_of(spec: EngineSpec) -> Licence:
    """Return what is known about the licence of an engine's weights, from where they came."""
    kind = spec.source.get("kind")
    if kind == hub.SOURCE_KIND and str(spec.source.get("name")).startswith(_OWNER):
        return _STABILITY
    if spec.is_random:
        return _NONE
    return _MIT if kind == "bundled" else _UNKNOWN


def duties(spec: EngineSpec) -> list[str]:
    """Return the sentences of `Licence.duties` for an engine."""
    return [sentence.replace("{origin}", spec.origin) for sentence in licence_of(spec).duties]


def notice(spec: EngineSpec) -> str:
    """Return the contents of `NOTICE`, or an empty text if none is needed."""
    return licence_of(spec).notice.replace("{origin}", spec.origin)


def model_card(spec: EngineSpec, repository: str) -> str:
    """Return the model card of an engine: how to use it, its figures, its source and its licence."""
    licence, source = licence_of(spec), spec.source
    metadata: dict[str, Any] = {
        "library_name": "samekit",
        "tags": ["audio", "autoencoder", "onnx", "stable-audio"],
        **licence.metadata,
    }
    if source.get("kind") == hub.SOURCE_KIND:
        metadata["base_model"] = source["name"]
    rows = "\n".join(_row(spec, precision) for precision in spec.graphs)
    return hub.model_card(
        metadata,
        f"""{CARD_MARK}

# {spec.name}: engine for samekit

ONNX graphs of a SAME audio autoencoder: {spec.sample_rate:,} Hz, {spec.channels} channels, {spec.latent_width} features
for {spec.hop:,} samples.

```sh
pip install 'samekit[cpu,hub]'
samekit encode song.wav song.npy --model {repository}
samekit decode song.npy song-decoded.wav --model {repository}
```

## Figures

The least signal-to-noise ratio is that of all outputs which were compared with PyTorch in float32 at the export.

| precision | {" | ".join(DIRECTIONS)} | least SNR |
|---|---|---|---|
{rows}

## Source and licence

* Weights: {spec.origin}. SHA-256 of the checkpoint: `{spec.source_sha256}`.
* Changes: {_CHANGES}

{licence.card}
""",
    )


def _row(spec: EngineSpec, precision: str) -> str:
    """Return the row of a precision in the table of figures."""
    graphs = spec.graphs[precision]
    sizes = [f"{sum(graphs[d].sizes.values()) / 1e6:,.1f} MB" if d in graphs else "none" for d in DIRECTIONS]
    least = min((case["snr_db"] for case in spec.verification.get(precision, [])), default=None)
    return f"| {precision} | {' | '.join(sizes)} | {'not measured' if least is None else f'{least:.1f} dB'} |"
