"""Presets of whole runs: data, scenario, memory, network and Configs, as published experiments are.

They are YAML files, `fastcil/presets/FAMILY/FILE.yaml`; a file describes what the runs of one data
set share and, under ``runs``, what each has of its own. `FAMILY/FILE-RUN` is a preset's name. Its
``configs`` name the published Config that a method or an addon takes; a run's win over the file's,
and ``null`` there leaves a part its defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from statistics import fmean
from typing import Any

import yaml

from fastcil.contract import lookup, nearest, parse_composition
from fastcil.contract.registry import ADDONS, METHODS
from fastcil.engine.groups import GROUPS
from fastcil.engine.options import flatten, nest
from fastcil.errors import FastcilError

ARGUMENTS = ("data", "scenario", "memory")
_KEYS = ("title", "images", "configs", "published", "pretrained")


@dataclass(frozen=True)
class Published:
    """A published figure.

    Args:
        method: The composition.
        average: Average accuracy in percent, the first task included; None where there is none.
        last: Accuracy after the last task.
        source: Paper and table.
        bwt: Backward transfer in points, as that paper averages it.
        exemplars: Exemplars held after the last task.
        mebibytes: What they take, and what they are completed with.
        seconds: Time that the first two tasks took.
        sessions: Accuracy on all classes known after each task, where it is told; the average is
            then theirs, to two places.
    """

    method: str
    average: float | None
    last: float | None
    source: str
    bwt: float | None = None
    exemplars: float | None = None
    mebibytes: float | None = None
    seconds: float | None = None
    sessions: tuple[float, ...] = field(default=(), repr=False)

    @property
    def text(self) -> str:
        """The figures that there are, as people read them.

        Example:
            >>> Published("er", 70.1, 62.5, "").text, Published("er", 70.1, None, "").text
            ('70.10 / 62.50', '70.10')
            >>> Published("gem", None, 50.28, "", bwt=-13.56).text
            '- / 50.28, BWT -13.56'
        """
        both = [self.average] if self.last is None else [self.average, self.last]
        shown = " / ".join("-" if figure is None else f"{figure:.2f}" for figure in both)
        parts = [] if shown == "-" else [shown]
        parts += [] if self.bwt is None else [f"BWT {self.bwt:.2f}"]
        parts += [] if self.exemplars is None else [f"{self.exemplars:,.0f} exemplars"]
        parts += [] if self.mebibytes is None else [f"{self.mebibytes:,.0f} MiB"]
        parts += [] if self.seconds is None else [f"two tasks in {self.seconds:,.0f} s"]
        return ", ".join(parts)


@dataclass(frozen=True)
class RunPreset:
    """A published experiment, for any method.

    Args:
        name: ``cim/food101-lfs10``.
        title: In words.
        arguments: ``data``, ``scenario`` and ``memory``.
        options: Option group, method or addon -> its options, nested.
        configs: Method or addon -> the published Config it takes, a key of its ``PRESETS``.
        images: How many images the data set has, ``train`` and ``test``, and their average
            ``height`` and ``width``.
        published: What papers report.
        pretrained: Data that the published network was trained on before, whose weights are to be
            passed; None if it starts at random.
    """

    name: str
    title: str
    arguments: Mapping[str, str]
    options: Mapping[str, Mapping[str, Any]]
    configs: Mapping[str, str]
    images: Mapping[str, int]
    published: tuple[Published, ...] = field(default=())
    pretrained: str | None = None

    def options_for(self, methods: Iterable[str]) -> dict[str, Any]:
        """The options that concern these compositions, nested.

        Args:
            methods: Compositions.

        Raises:
            FastcilError: A part has no Config of the name that the preset gives it.

        Example:
            >>> options = read_preset("cim/food101-lfs10").options_for(["foster+cim"])
            >>> sorted(options), options["foster"]["beta1"]
            (['augment', 'foster', 'network'], 0.95)
        """
        flat = flatten({k: v for k, v in self.options.items() if k in GROUPS})
        for text in methods:
            method, addons = parse_composition(text)
            for kind, part in (("method", method), *(("addon", addon) for addon in addons)):
                if part in self.configs:
                    flat |= flatten({part: self._config(kind, part)})
                flat |= flatten({part: self.options.get(part, {})})
        return nest(flat)

    def _config(self, kind: str, part: str) -> Any:
        """The published Config of a part."""
        configs = getattr(lookup(kind, part), "PRESETS", {})
        if self.configs[part] not in configs:
            raise FastcilError(
                f"preset '{self.name}' gives {part} its Config '{self.configs[part]}'; "
                f"{nearest(self.configs[part], configs) if configs else 'it has none.'}"
            )
        return configs[self.configs[part]]

    @property
    def image_nbytes(self) -> int:
        """Bytes that all images take when read, about."""
        number = self.images["train"] + self.images["test"]
        return number * self.images["height"] * self.images["width"] * 3


def is_run_preset(name: Any) -> bool:
    """Whether a preset's name is that of a whole run: ``FAMILY/FILE-RUN``, and no YAML file.

    Example:
        >>> is_run_preset("cim/food101-lfs10"), is_run_preset("pycil"), is_run_preset("a/b.yaml")
        (True, False, False)
    """
    return isinstance(name, str) and "/" in name and not name.endswith((".yaml", ".yml"))


def preset_names() -> list[str]:
    """The names of all presets of whole runs, in the order of their files.

    Example:
        >>> names = preset_names()
        >>> "cim/imagenet1000-lfs10-5k" in names, "cifar100/b0-10" in names
        (True, True)
    """
    return [f"{stem}-{run}" for stem, content in _files() for run in content["runs"]]


def read_preset(name: str) -> RunPreset:
    """The preset of a name.

    Raises:
        FastcilError: There is none; the nearest is named.

    Example:
        >>> preset = read_preset("cim/imagenet100-lfh5")
        >>> preset.arguments["memory"], preset.published[0]
        ('20 images/class', Published(method='icarl', average=62.53, last=None, \
source='Luo et al. (2023), Table 1', bwt=None, exemplars=None, mebibytes=None, seconds=None))
    """
    for stem, content in _files():
        for run, own in content["runs"].items():
            if name == f"{stem}-{run}":
                return _make(name, content, own)
    near = nearest(name, preset_names()).partition(" Known:")[0]
    hint = near if near.startswith("did") else "'fastcil presets' lists them."
    raise FastcilError(f"preset is '{name}', which is neither a .yaml file nor known; {hint}")


@cache
def _files() -> tuple[tuple[str, dict[str, Any]], ...]:
    """Every file's ``FAMILY/FILE`` and content; keys of ``runs`` are text."""
    found = []
    for family in _sorted(resources.files("fastcil") / "presets"):
        for file in _sorted(family) if family.is_dir() else ():
            if file.name.endswith(".yaml"):
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
                content["runs"] = {str(run): own for run, own in content["runs"].items()}
                found.append((f"{family.name}/{file.name.removesuffix('.yaml')}", content))
    return tuple(found)


def _sorted(folder: Any) -> list[Any]:
    """What is in a folder of the package, by name."""
    return sorted(folder.iterdir(), key=lambda entry: str(entry.name))


def _make(name: str, content: Mapping[str, Any], own: Mapping[str, Any]) -> RunPreset:
    """A preset of what its file's runs share and of what is its own."""
    shared = {key: value for key, value in content.items() if key != "runs"}
    merged = nest({**flatten(_plain(shared)), **flatten(_plain(own))})
    return RunPreset(
        name,
        str(shared["title"]),
        {key: str(merged[key]) for key in ARGUMENTS},
        {key: value for key, value in merged.items() if key not in ARGUMENTS},
        _configs(name, {**shared.get("configs", {}), **own.get("configs", {})}),
        dict(shared["images"]),
        tuple(_published(own.get("published", {}))),
        shared.get("pretrained"),
    )


def _configs(name: str, told: Mapping[str, Any]) -> dict[str, str]:
    """Part -> the name of its Config, of those that are to have one.

    Raises:
        FastcilError: A part that is neither a method nor an addon, or a Config that is no name.
    """
    parts = [*METHODS, *ADDONS]
    for part, config in told.items():
        if part not in parts:
            raise FastcilError(
                f"preset '{name}' gives a Config to '{part}', which is neither a method nor an "
                f"addon; {nearest(str(part), parts)}"
            )
        if not (config is None or isinstance(config, str)):
            raise FastcilError(
                f"preset '{name}' gives {part} the Config {config!r}; it must be the name of one, "
                f"or null for the defaults of {part}."
            )
    return {part: config for part, config in told.items() if config is not None}


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """What may be laid over one another: arguments and options."""
    return {key: value for key, value in content.items() if key not in _KEYS}


def _published(sources: Mapping[str, Mapping[str, Any]]) -> Iterator[Published]:
    """Figures of ``source -> {method: average}``, ``[average, last]`` or a mapping of names.

    Such a mapping may hold ``sessions``, from which average and last follow.
    """
    for source, figures in sources.items():
        for method, figure in figures.items():
            if isinstance(figure, Mapping):
                told = {key: value for key, value in figure.items() if key != "sessions"}
                named = {"average": None, "last": None, **told}
                sessions = tuple(figure.get("sessions", ()))
                if sessions:
                    mean = round(fmean(sessions), 2)
                    named |= {"average": mean, "last": sessions[-1], "sessions": sessions}
            else:
                both = figure if isinstance(figure, list) else (figure, None)
                named = dict(zip(("average", "last"), both, strict=True))
            yield Published(method=method, source=source, **named)
