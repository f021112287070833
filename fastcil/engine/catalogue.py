"""What methods, addons, codecs and published runs there are, and their options."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import yaml

from fastcil.contract import lookup, nearest
from fastcil.contract.registry import ADDONS, ALIASES, CODECS, METHODS
from fastcil.engine.preset_files import preset_names, read_preset
from fastcil.engine.presets import presets
from fastcil.errors import FastcilError
from fastcil.memory import codec_settings


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
            settings = codec_settings(name) if kind == "codec" else config
            listed = "" if settings is None else _options(name, settings())
            options = f"\n\noptions\n{listed}" if listed else ""
            text = inspect.getdoc(config) or inspect.getdoc(cls) or ""
            return text + options + _presets(cls)
    known = [*METHODS, *ADDONS, *CODECS]
    raise FastcilError(f"name '{name}' is unknown; {nearest(name, known)}")


def _presets(cls: type) -> str:
    """The names that ``preset`` takes."""
    names = sorted(presets(cls))
    return f"\n\npresets\n  --preset {', '.join(names)}" if names else ""


def list_presets() -> str:
    """One line for every published run: data, scenario, memory."""
    lines = []
    for name in preset_names():
        told = read_preset(name).arguments
        lines.append(f"{name:36} {told['data']:22} {told['scenario']:14} {told['memory']}")
    how = "'fastcil presets NAME' shows what one sets, --preset NAME with --method METHOD runs it."
    return "\n".join([*lines, "", how])


def describe_preset(name: str) -> str:
    """What a published run sets, as YAML, and what papers report of it.

    Args:
        name: As `list_presets` has it.

    Raises:
        FastcilError: The name is unknown.

    Example:
        >>> print(describe_preset("cifar100/b50-10-resnet18"))  # doctest: +ELLIPSIS
        CIFAR-100
        <BLANKLINE>
        data: cifar100
        ...
        published, average / last accuracy
          der                      72.81 / 65.64  Yan et al. (2021), curves without pruning
    """
    preset = read_preset(name)
    sets = {**preset.arguments, **preset.options, "configs": dict(preset.configs)}
    lines = [preset.title, "", yaml.safe_dump(sets, sort_keys=False, default_flow_style=None)]
    if preset.pretrained:
        lines += [f"network.weights: to be passed, pre-trained on {preset.pretrained}", ""]
    lines.append("published, average / last accuracy")
    for figure in preset.published:
        lines.append(f"  {figure.method:24} {figure.text:14} {figure.source}")
    return "\n".join(lines)


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
