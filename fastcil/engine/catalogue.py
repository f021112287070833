"""What methods, addons and codecs there are, and their options."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from fastcil.contract import lookup, nearest
from fastcil.contract.registry import ADDONS, ALIASES, CODECS, METHODS
from fastcil.engine.presets import presets
from fastcil.errors import FastcilError


def list_all() -> str:
    """One line for every method, addon and codec."""
    lines = []
    for kind, table in (("method", METHODS), ("addon", ADDONS), ("codec", CODECS)):
        lines.append(f"{kind}s")
        for name in sorted(table):
            lines.append(f"  {name:10} {_first_line(lookup(kind, name))}")
    lines += ["", "Compose with '+', as in foster+cim; 'fastcil methods NAME' lists its options."]
    return "\n".join(lines)


def describe(name: str) -> str:
    """What a method, an addon or a codec is, and its options with their defaults.

    Args:
        name: As registered, or a composition.

    Raises:
        FastcilError: The name is unknown.
    """
    return "\n\n".join(_describe(part.strip()) for part in name.split("+"))


def _describe(name: str) -> str:
    """The docstring of one part, and its options."""
    name = ALIASES.get(name, name)
    for kind, table in (("method", METHODS), ("addon", ADDONS), ("codec", CODECS)):
        if name in table:
            cls = lookup(kind, name)
            config = getattr(cls, "Config", None)
            options = "" if config is None else "\n\noptions\n" + _options(name, config())
            text = inspect.getdoc(config) or inspect.getdoc(cls) or ""
            return text + options + _presets(cls)
    known = [*METHODS, *ADDONS, *CODECS]
    raise FastcilError(f"name '{name}' is unknown; {nearest(name, known)}")


def _presets(cls: type) -> str:
    """The names that ``preset`` takes."""
    names = sorted(presets(cls))
    return f"\n\npresets\n  --preset {', '.join(names)}" if names else ""


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _options(prefix: str, config: Any) -> str:
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            lines.append(_options(f"{prefix}.{field.name}", value))
        else:
            lines.append(f"  --{prefix}.{field.name} {value}")
    return "\n".join(lines)
