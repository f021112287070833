"""Checks that Configs share: one sentence that names the option."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

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


def check_choices(config: Any) -> None:
    """Raises unless every field of a dataclass that is typed as a Literal holds one of its values.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Config:
        ...     head: Literal["all", "task"] = "all"
        >>> check_choices(Config("task"))
    """
    for name, hint in field_types(config.__class__).items():
        value, known = getattr(config, name), get_args(hint)
        if get_origin(hint) is Literal and value not in known:
            raise FastcilError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields; Python itself parses their annotations at every call.

    Example:
        >>> from dataclasses import make_dataclass
        >>> field_types(make_dataclass("Config", [("lr", "float")]))
        {'lr': <class 'float'>}
    """
    return get_type_hints(cls)
