"""Options that come by a name or from a file, to lay others over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastcil.contract import lookup, nearest, parse_composition
from fastcil.engine.options import flatten, nest
from fastcil.engine.preset_files import is_run_preset, read_preset
from fastcil.errors import FastcilError

DEFAULTS = {"data": "scenes", "scenario": "lfs-5", "memory": "2000 images"}
_SUFFIXES = (".yaml", ".yml")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        FastcilError: No such file, or not a mapping.
    """
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FastcilError(f"config is '{path}', which can't be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise FastcilError(
            f"config '{path}' is not YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(loaded, dict):
        raise FastcilError(f"config '{path}' holds no options; write 'name: value' lines.")
    return {str(name): value for name, value in loaded.items() if value is not None}


def presets(part: type) -> dict[str, Any]:
    """The named Configs of a method or an addon: its ``PRESETS``, if it has some.

    Example:
        >>> sorted(presets(lookup("method", "foster")))
        ['cifar-b0', 'cifar-b50', 'food101', 'imagenet']
    """
    return dict(getattr(part, "PRESETS", {}))


def named_preset(name: str, methods: Iterable[str]) -> dict[str, Any]:
    """The Configs that go by ``name``, of every part of these compositions that has one.

    Args:
        name: A key of some ``PRESETS``.
        methods: Compositions.

    Returns:
        part -> Config; a part without a preset of that name keeps its defaults.

    Raises:
        FastcilError: No part has one of that name.

    Example:
        >>> named_preset("pycil", ["icarl+cam"])["icarl"].loss
        'softmax'
    """
    known: dict[str, dict[str, Any]] = {}
    for text in methods:
        method, addons = parse_composition(text)
        known[method] = presets(lookup("method", method))
        known |= {addon: presets(lookup("addon", addon)) for addon in addons}
    found = {part: configs[name] for part, configs in known.items() if name in configs}
    if not found:
        names = {key for configs in known.values() for key in configs}
        hint = nearest(name, names) if names else f"{', '.join(known)} has none."
        raise FastcilError(f"preset is '{name}', which is neither a .yaml file nor known; {hint}")
    return found


def merge_options(
    preset: str | Path | None, options: Mapping[str, Any], methods: Iterable[str]
) -> dict[str, Any]:
    """A preset's options with these on top, nested.

    Args:
        preset: A YAML file (``.yaml``, ``.yml``); the name of a preset, of Configs (``cifar-b0``)
            or of whole runs (``cim/food101-lfs10``); or None.
        options: Dotted or nested names -> values.
        methods: The compositions that the preset is for.
    """
    if preset is None:
        below: Mapping[str, Any] = {}
    elif str(preset).endswith(_SUFFIXES):
        below = nest(read_yaml(preset))
    elif is_run_preset(preset):
        below = read_preset(str(preset)).options_for(methods)
    else:
        below = named_preset(str(preset), methods)
    return nest({**flatten(below), **flatten(nest(options))})


def preset_arguments(preset: str | Path | None, **given: Any) -> dict[str, Any]:
    """Data, scenario and memory of a run: as given, else as the preset has them, else the defaults.

    Args:
        preset: As `merge_options` takes; only a preset of whole runs has arguments.
        **given: ``data``, ``scenario`` and ``memory``; None leaves it to the preset.

    Example:
        >>> preset_arguments("cim/food101-lfh5", data="photos", scenario=None, memory=None)
        {'data': 'photos', 'scenario': 'lfh-5', 'memory': '20 images/class'}
        >>> preset_arguments(None, data=None, scenario=None, memory="none")
        {'data': 'scenes', 'scenario': 'lfs-5', 'memory': 'none'}
    """
    own = read_preset(str(preset)).arguments if is_run_preset(preset) else {}
    said = {name: value for name, value in given.items() if value is not None}
    return {**DEFAULTS, **own, **said}
