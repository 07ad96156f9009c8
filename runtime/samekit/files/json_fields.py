"""Checks of the types of values that were parsed from JSON files."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = type | tuple[type, ...]


def check_kind(name: str, value: Any, kind: Kind) -> None:
    """Raise TypeError unless a value is of this type; true and false do not count as numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} = {reprlib.repr(value)}")


def check_kinds(fields: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Raise TypeError unless every field that is present and listed in `kinds` is of its type."""
    for name, kind in kinds.items():
        if name in fields:
            check_kind(name, fields[name], kind)
