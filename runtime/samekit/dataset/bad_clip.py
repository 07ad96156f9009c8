"""The error of a clip that cannot be encoded."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samekit.dataset.manifest import Status


class BadClipError(Exception):
    """A clip cannot be encoded. The manifest records its status and the reason."""

    def __init__(self, status: Status, reason: str, *, transient: bool = False) -> None:
        super().__init__(reason)
        self.status: Status = status
        self.reason = " ".join(reason.split())
        """Cause and cure in one line."""
        self.transient = transient
        """Whether a file cannot be opened now; it may still hold what was encoded before."""

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), transient=self.transient), (self.status, self.reason)
