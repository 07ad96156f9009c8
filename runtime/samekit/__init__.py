"""Run the SAME audio autoencoders of Stable Audio 3: audio to latents and back, with or without PyTorch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["AutoencoderModel", "SamekitError", "__version__"]

# Official builds of ONNX Runtime report usage from 1.29 on. On import they write a device id into the user's cache and
# start an uploader, whose threads make forked children hang or crash when they end. This variable, which they read on
# import and children inherit, turns that off. A value that the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from samekit.errors import SamekitError
    from samekit.model import AutoencoderModel


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import samekit` is fast."""
    if name == "AutoencoderModel":
        from samekit.model import AutoencoderModel

        return AutoencoderModel
    if name == "SamekitError":
        from samekit.errors import SamekitError

        return SamekitError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
