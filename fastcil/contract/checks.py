"""Checks that Configs share: one sentence that names the option."""

from __future__ import annotations

import math

from fastcil.errors import FastcilError


def check_positive(name: str, value: float) -> None:
    """Raises unless ``value`` is finite and above 0.

    Example:
        >>> check_positive("temperature", 2.0)
    """
    if not 0 < value < math.inf:
        raise FastcilError(f"{name} is {value}; it must be a positive number.")


def check_not_negative(name: str, value: float) -> None:
    """Raises unless ``value`` is finite and at least 0.

    Example:
        >>> check_not_negative("aux_weight", 0)
    """
    if not 0 <= value < math.inf:
        raise FastcilError(f"{name} is {value}; it must be a number of at least 0.")
