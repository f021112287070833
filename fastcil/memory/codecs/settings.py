"""What can be set of a codec, as a dataclass that options are checked against."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from typing import Any, Literal, Union

from fastcil.contract import lookup


def codec_settings(name: str) -> type:
    """The settings of a codec: its constructor's arguments that have a default, as a dataclass.

    Only those that a file of options can hold are in it: text, numbers, choices and None.

    Args:
        name: As registered.

    Raises:
        FastcilError: An unknown name.

    Example:
        >>> codec_settings("jpeg")()
        Settings(quality=75, bits_per_pixel=24.0)
        >>> codec_settings("raw")()
        Settings()
    """
    return _settings(lookup("codec", name))


@functools.cache
def _settings(cls: type) -> type:
    """The same of a class; the same dataclass each time."""
    try:
        hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except NameError:
        # A class of the user's own whose annotations can't be resolved has no options.
        hints = {}
    fields: list[tuple[str, Any, Any]] = [
        (name, hints[name], dataclasses.field(default=parameter.default))
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not parameter.empty and _is_plain(hints.get(name))
    ]
    return dataclasses.make_dataclass("Settings", fields, frozen=True)


def _is_plain(hint: Any) -> bool:
    """Whether text can say every value of a type."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return all(map(_is_plain, typing.get_args(hint)))
    return typing.get_origin(hint) is Literal or hint in (str, int, float, bool, type(None))
