"""JSON: checks of values from files that may hold anything, and the one text from which digests are taken."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = type | tuple[type, ...]


def check_kind(name: str, value: Any, kind: Kind) -> None:
    """Check the kind of one value; true and false are no numbers.

    Raises:
        TypeError: it is of another kind.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} = {reprlib.repr(value)}")


def check_kinds(fields: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Check every field that is there.

    Raises:
        TypeError: one is of another kind.
    """
    for name, value in fields.items():
        if name in kinds:
            check_kind(name, value, kinds[name])
