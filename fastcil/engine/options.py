"""Every setting of a run, as dataclasses; the command line, YAML and Python share them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fastcil.contract import (
    lookup,
    nearest,
    parse_composition,
    replace_batch_size,
    scale_epochs,
)
from fastcil.contract.checks import field_types
from fastcil.contract.registry import CODECS
from fastcil.engine.groups import GROUPS, EngineOptions
from fastcil.engine.weights import StateDict, as_option
from fastcil.errors import CompositionError, FastcilError
from fastcil.memory import Codec, codec_settings, make_codec

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# What `fastcil.train` and `compare` take beside options.
ARGUMENTS = (
    *("method", "methods", "data", "scenario", "memory", "codec", "seeds", "device"),
    *("run_dir", "preset", "backbone", "share_first_task"),
)
# How jsonargparse says that a value is of the wrong type: option, type, value.
_COMPLAINTS = (
    r'key "([^"]+)": Expected an? (.+?)\. Got value: (.*)$',
    r'key "([^"]+)": Does not validate .*Subtypes: \[(.+?)\] Errors: .*Given value: (.*)$',
)

# The option whose value may be a mapping, and is one value all the same.
_WEIGHTS = "network.weights"


@dataclass(frozen=True)
class Settings:
    """All settings of one method's runs.

    Args:
        method: The composition, as in ``foster+cim``.
        groups: Option group, part of the composition or codec chosen -> its dataclass.
        codec: Name of the memory's codec, or None for the addon's, else ``raw``.
        state_dict: What ``network.weights`` names, if it was passed in Python.
    """

    method: str
    groups: Mapping[str, Any] = field(default_factory=dict)
    codec: str | None = None
    state_dict: StateDict | None = field(default=None, compare=False)

    @property
    def parts(self) -> tuple[str, tuple[str, ...]]:
        """The method's name and its addons'."""
        return parse_composition(self.method)

    @property
    def engine(self) -> EngineOptions:
        """The engine's options."""
        options: EngineOptions = self.groups["engine"]
        return options

    def make_codec(self) -> Codec[Any]:
        """The codec chosen, with its settings; ``raw`` where none is."""
        if self.codec is None:
            return make_codec("raw")
        settings = self.groups.get(self.codec)
        return make_codec(self.codec, **(dataclasses.asdict(settings) if settings else {}))

    def config(self, part: str) -> Any:
        """The Config of the method or of an addon, with this run's epochs and batch size."""
        config = scale_epochs(self.groups[part], self.engine.epoch_scale)
        return replace_batch_size(config, self.engine.batch_size)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as YAML holds them."""
        plain = {name: _plain(dataclasses.asdict(group)) for name, group in self.groups.items()}
        return {"method": self.method, "codec": self.codec, **plain}


def _plain(value: Any) -> Any:
    """Tuples as lists, all through."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def config_types(methods: Iterable[str], codecs: Iterable[str | None] = ()) -> dict[str, type]:
    """The option groups that are known: the engine's, each part's Config, each codec's settings.

    Args:
        methods: Compositions.
        codecs: Codecs chosen beside them; those without settings have no group.

    Raises:
        FastcilError: An unknown name, or a codec that is called as another group is.
    """
    types = dict(GROUPS)
    for text in methods:
        method, addons = parse_composition(text)
        types[method] = lookup("method", method).Config  # type: ignore[attr-defined]
        types.update(
            {name: lookup("addon", name).Config for name in addons}  # type: ignore[attr-defined]
        )
    chosen = {name: codec_settings(name) for name in codecs if name is not None}
    chosen = {name: settings for name, settings in chosen.items() if dataclasses.fields(settings)}
    taken = [name for name in chosen if name in types]
    if taken:
        raise FastcilError(
            f"codec '{taken[0]}' has the name of another group of options; register it by another."
        )
    return types | chosen


def known_options(types: Mapping[str, Any]) -> dict[str, Any]:
    """Every dotted name that ``types`` knows, groups' own included, and the type of its value."""
    known: dict[str, Any] = {}
    for name, cls in types.items():
        known[name] = cls
        hints = field_types(cls)
        for option in dataclasses.fields(cls):
            key, hint = f"{name}.{option.name}", hints[option.name]
            known |= known_options({key: hint}) if dataclasses.is_dataclass(hint) else {key: hint}
    return known


def nest(options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested dicts; a ready Config stands for all of its options.

    Example:
        >>> nest({"cim.threshold": 0.7, "cim": {"ratio": 9.0}})
        {'cim': {'threshold': 0.7, 'ratio': 9.0}}
    """
    nested: dict[str, Any] = {}
    for name, value in flatten(options).items():
        *path, leaf = name.split(".")
        place = nested
        for key in path:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise FastcilError(
                    f"option '{name}' lies under '{key}', which has a value already."
                )
        if isinstance(place.get(leaf), dict):
            raise FastcilError(f"option '{name}' is {value!r}, but options under it are set too.")
        place[leaf] = value
    return nested


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options, ready Configs among them, under their dotted names.

    Example:
        >>> flatten({"cim": {"mask": {"lr": 0.1}}})
        {'cim.mask.lr': 0.1}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if name == _WEIGHTS:
            value = as_option(value)
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def check_keys(options: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Refuses option names that nothing knows, and values where a group or None can't stand.

    Raises:
        FastcilError: Names the option and the nearest known one.
    """
    known = known_options(types)
    for name, value in flatten(options).items():
        if name not in known:
            raise FastcilError(_unknown(name, list(known)))
        wanted = known[name]
        if dataclasses.is_dataclass(wanted):
            inside = f"{name}.{dataclasses.fields(wanted)[0].name}"
            raise FastcilError(
                f"option '{name}' is {value!r}, but it is a group; set what is in it, "
                f"such as '{inside}'."
            )
        if value is None and type(None) not in typing.get_args(wanted):
            raise FastcilError(f"option '{name}' is None; it must be {_type_name(str(wanted))}.")


def _unknown(name: str, known: list[str]) -> str:
    """What to say of an option that nothing knows."""
    if name in ARGUMENTS:
        return f"'{name}' is no option but an argument of its own; pass it beside the options."
    group, _, leaf = name.rpartition(".")
    if group == "codec" or (group in CODECS and group not in known):
        example = "jpeg" if group == "codec" else group
        return (
            f"option '{name}' is unknown; what is set of a codec stands under its own name, beside "
            f"codec='{example}'."
        )
    near = nearest(name, [*known, *ARGUMENTS]).split(" Known:")[0]
    if near.startswith("Known"):
        same = [k for k in known if k.rpartition(".")[2] == leaf]
        near = f"did you mean '{same[0]}'?" if same else "see 'fastcil methods NAME'."
    return f"option '{name}' is unknown; {near}"


def make_settings(
    method: str, options: Mapping[str, Any] | None = None, codec: str | None = None
) -> Settings:
    """Checks options and fills in the defaults.

    Args:
        method: The composition.
        options: Dotted or nested names -> values.
        codec: Name of the memory's codec.

    Raises:
        FastcilError: An unknown name, or a value of the wrong type or range.
        CompositionError: A codec beside an addon that brings its own.
    """
    codec = check_codec(method, codec)
    types = config_types([method], [codec])
    nested = nest(options or {})
    check_keys(nested, types)
    # One spelling, whatever was typed: it names folders and is compared on resuming.
    name, addons = parse_composition(method)
    state_dict = _take_state_dict(nested)
    return Settings("+".join([name, *addons]), build_groups(nested, types), codec, state_dict)


def _take_state_dict(nested: dict[str, Any]) -> StateDict | None:
    """Puts the name of a state_dict in its place; one named so may still be in this process."""
    network = nested.get("network", {})
    given = network.get("weights")
    if isinstance(given, StateDict):
        network["weights"] = given.name
        return given
    return StateDict.find(given) if isinstance(given, str) else None


def build_groups(nested: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    """Dataclasses from plain values; what is left out has its default."""
    return {
        name: _build(name, cls, nested[name]) if nested.get(name) else cls()
        for name, cls in types.items()
    }


def _build(name: str, cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from plain values, converted and checked by jsonargparse."""
    # It takes a dash in a name for an underscore.
    plain = name.replace("-", "_")
    try:
        written = json.dumps(values)
    except TypeError:  # Some are objects of Python's, such as a Recipe.
        return _parse(plain, cls, dict(values))
    return _parse_written(plain, cls, written)


@lru_cache(maxsize=256)
def _parse_written(name: str, cls: type, values: str) -> Any:
    """`_parse` of JSON: a run reads the same options several times, into what nobody changes."""
    return _parse(name, cls, json.loads(values))


def _parse(name: str, cls: type, values: dict[str, Any]) -> Any:
    try:
        parser = _parser(name, cls)
        return parser.instantiate(parser.parse_object({name: values}))[name]
    except (FastcilError, ImportError):
        raise
    except Exception as error:
        raise FastcilError(explain(error)) from error


@lru_cache(maxsize=64)
def _parser(name: str, cls: type) -> ArgumentParser:
    """What reads a dataclass; to make one takes as long as a small task."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=cls, default=cls())
    return parser


def explain(error: Exception) -> str:
    """jsonargparse's complaint, as a sentence of ours where its form is known."""
    text = " ".join(str(error).split())
    for form in _COMPLAINTS:
        found = re.search(form, text)
        if found is not None:
            name, wanted, value = found.groups()
            return f"option '{name}' is {value!r}; it must be {_type_name(wanted)}."
    group = re.search(r"key \"([^\"]+)\": Unable to load config '([^']*)'", text)
    if group is not None:
        return f"option '{group[1]}' is {group[2]!r}, but it is a group; set what is in it."
    return f"an option has a value that won't do: {text}"


def _type_name(text: str) -> str:
    """A type as people read it."""
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("typing.", "")
    text = re.sub(r", NoneType$", " or None", text)
    return re.sub(r"Literal\[([^]]*)\]", r"one of \1", text)


def check_codec(method: str, codec: str | None) -> str | None:
    """Refuses an unknown codec, or one beside an addon that brings its own."""
    if codec is None:
        return None
    lookup("codec", codec)
    for name in parse_composition(method)[1]:
        brings = lookup("addon", name).brings_codec  # type: ignore[attr-defined]
        if brings is not None:
            raise CompositionError(
                f"codec is '{codec}', but '{name}' in '{method}' stores exemplars its own way "
                f"('{brings}'); leave codec out, or use the method without '{name}'."
            )
    return codec
