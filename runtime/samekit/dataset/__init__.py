"""Encode datasets of audio files with captions into the latents that training code reads."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samekit.dataset.devices import DevicesExecutor
    from samekit.dataset.options import PreEncodeOptions, Shard
    from samekit.dataset.ray import RayExecutor, RayOptions
    from samekit.dataset.report import PreEncodeReport, Progress
    from samekit.dataset.run import pre_encode

__all__ = [
    "DevicesExecutor",
    "PreEncodeOptions",
    "PreEncodeReport",
    "Progress",
    "RayExecutor",
    "RayOptions",
    "Shard",
    "pre_encode",
]

_MODULES = {
    "DevicesExecutor": "devices",
    "PreEncodeOptions": "options",
    "PreEncodeReport": "report",
    "Progress": "report",
    "RayExecutor": "ray",
    "RayOptions": "ray",
    "Shard": "options",
    "pre_encode": "run",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
