"""Say which paths have not run on a GPU in samekit's tests. A path leaves this list when its figures are of record."""

from __future__ import annotations

import functools
import logging
from typing import Final

logger = logging.getLogger(__name__)

TENSORRT: Final = "the TensorRT backend"
TRITON: Final = "the Triton model repository for GPUs"
RAY: Final = "encoding on GPUs of a Ray cluster"
SERVE: Final = "samekit serve with GPUs"


@functools.cache
def warn_experimental(path: str) -> None:
    """Log a warning about one of the paths above, once in a process."""
    logger.warning(
        "%s is experimental: samekit's tests have not run it on a GPU yet; to test it on this machine, run "
        "`make gpu-check` in the sources of samekit",
        path,
    )
