"""Numbers that users choose: whether each is one that can be meant. Knows no option."""

from __future__ import annotations

from typing import Any, Final

from samekit.errors import InputError

MOST_THREADS: Final = 1024
"""More than any machine has cores for: starting them alone would take minutes."""
MOST_INT32: Final = 2**31 - 1
"""What other programs count in 32 bits."""


def check_flag(name: str, value: Any) -> None:
    """Check a choice of two.

    Raises:
        InputError: it is something else than true or false.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; pass True or False")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Check a whole number within bounds; true and false are none.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        upwards = "" if most is None else f" to {most}"
        raise InputError(f"{name} is {value!r}; pass a whole number from {least}{upwards}")
