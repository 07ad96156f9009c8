"""Limits that replicas and Serve's proxies share, and the error of a request that exceeds one."""

from __future__ import annotations

import errno
from typing import Final

from samekit.errors import SamekitError

BODY_SECONDS: Final = 30
"""A body must arrive within so many seconds, and one more for each `BODY_RATE` bytes that have arrived."""
BODY_RATE: Final = 2**14
STALLED_SECONDS: Final = 60
"""A client that takes no part of its answer in so many seconds is given up."""


class RefusedError(SamekitError):
    """A request is refused with an HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status."""


def disk_error(error: OSError) -> RefusedError:
    """Return the answer to a request whose files cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return RefusedError(503, f"the disk of the server {'is full' if full else 'fails'}; try again later")
