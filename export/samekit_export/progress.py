"""Report the progress of long loops to a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Sized
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES: Final = 5.0

_Item = TypeVar("_Item")


def logged(items: Iterable[_Item], text: str) -> Iterator[_Item]:
    """Yield the items, and log how many are done at level INFO every five seconds."""
    total = f" of {len(items)}" if isinstance(items, Sized) else ""
    due = time.monotonic() + _SECONDS_BETWEEN_LINES
    for done, item in enumerate(items):
        if time.monotonic() >= due:
            logger.info("%s: %d%s done", text, done, total)
            due = time.monotonic() + _SECONDS_BETWEEN_LINES
        yield item
