"""Checks of numbers and flags that users pass."""

from __future__ import annotations

from typing import Any, Final

from samekit.errors import InputError

MOST_THREADS: Final = 1024
"""Upper limit of thread counts: no machine has more cores, and starting more threads takes minutes."""
MOST_INT32: Final = 2**31 - 1
"""Upper limit of counts that other programs store in 32 bits."""


def check_flag(name: str, value: Any) -> None:
    """Raise InputError unless the value is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; pass True or False")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise InputError unless the value is an integer from `least` to `most`; True and False are refused."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        upwards = "" if most is None else f" to {most}"
        raise InputError(f"{name} is {value!r}; pass a whole number from {least}{upwards}")
