"""Everything that decides what a run computes, and the directory that holds such a run."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fastcil.data import Dataset, load
from fastcil.engine.environment import environment
from fastcil.engine.options import Settings, flatten, make_settings
from fastcil.engine.parts import Parts
from fastcil.engine.resolve import natural_look, pick_device
from fastcil.engine.scenario import Scenario, make_scenario
from fastcil.engine.state import write_atomically
from fastcil.engine.weights import file_checksum
from fastcil.errors import FastcilError
from fastcil.memory import Budget
from fastcil.memory.checksum import checksum

IDENTITY = "identity.yaml"

# Options that change how a run is watched or how fast it is, not what it computes, but for the
# last bits of sums that are cut into as many parts as there are threads.
_FREE = (
    *("progress", "tensorboard", "checkpoint_seconds", "threads", "scan_batch", "rank_timeout"),
    "data",
)
# What runs did before there was an option of that name, where its default may be something else.
_BEFORE = {"nesterov": False}
# Those that say something of few-shot streams only.
_FEW_SHOT = ("epoch_choice", "epoch_choice_every")


@dataclass
class Plan:
    """Everything that decides what a run computes.

    ``images`` is the data set's `fingerprint`, wherever its images are placed meanwhile.
    ``codec_checksum`` is that of the codec's weights, ``weights_checksum`` that of the file that
    networks start from, if there are such: another may have come to stand where they were read.
    ``first_task`` is the label of the run whose first task this one takes over,
    ``first_task_checksum`` that of its identity. ``label`` is what progress calls the run, if not
    by its method.
    """

    settings: Settings
    dataset: Dataset
    scenario: Scenario
    budget: Budget
    seeds: tuple[int, ...]
    device: str
    data_name: str
    images: str
    backbone: Callable[[], torch.nn.Module] | None = None
    preset: str | None = None
    codec_checksum: str | None = None
    weights_checksum: str | None = None
    first_task: str | None = None
    first_task_checksum: str = ""
    label: str | None = None

    def config(self) -> dict[str, Any]:
        """As `config.yaml` holds it."""
        return {
            "method": self.settings.method,
            "data": self.data_name,
            "scenario": self.scenario.name,
            "memory": str(self.budget),
            "codec": self.settings.codec,
            "seeds": list(self.seeds),
            "device": self.device,
            **({"preset": self.preset} if self.preset else {}),
            **({"first_task": self.first_task} if self.first_task else {}),
            **{k: v for k, v in self.settings.as_dict().items() if k not in ("method", "codec")},
        }

    def identity(self) -> dict[str, Any]:
        """What an unfinished run must share to be gone on with."""
        config = self.config()
        free = _FREE if self.scenario.few_shot else (*_FREE, *_FEW_SHOT)
        config["engine"] = {k: v for k, v in config["engine"].items() if k not in free}
        if self.first_task is not None:
            config["first_task"] = f"that of {self.first_task}, crc32 {self.first_task_checksum}"
        for name in ("seeds", "load", "preset"):
            config.pop(name, None)
        if self.weights_checksum is not None:
            config["network"]["weights"] = self.weights_checksum
        config["images"] = self.images
        config["tasks"] = _stream_fingerprint(self.scenario)
        if self.codec_checksum is not None:
            config["codec_checksum"] = self.codec_checksum
        if self.backbone is not None:
            config["backbone"] = getattr(
                self.backbone, "__qualname__", type(self.backbone).__name__
            )
        return config


def fingerprint(dataset: Dataset) -> str:
    """A checksum that tells whether two data sets are the same: sizes, labels, sampled pixels.

    Of pixels in a file none is read: their own checksum and their places in the file say which.
    """
    value = zlib.crc32("\0".join(dataset.class_names).encode())
    for part in (dataset.train, dataset.test):
        images = part.images
        if images.mapped is not None:
            value = zlib.crc32(images.mapped.encode(), value)
            sample = images.offsets
        else:
            pixels = images.state()["pixels"]
            sample = pixels[:: max(1, len(pixels) // (1 << 20))]
        for tensor in (images.geometry, part.labels, sample):
            value = zlib.crc32(np.ascontiguousarray(tensor.cpu().numpy()).tobytes(), value)
    return f"{len(dataset.train)}+{len(dataset.test)} images, crc32 {value:08x}"


def _stream_fingerprint(scenario: Scenario) -> str:
    """A checksum that tells apart two streams of one name: each task's classes and images."""
    value = zlib.crc32(b"task-aware") if scenario.task_aware else 0
    value = zlib.crc32(b"online", value) if scenario.online else value
    value = zlib.crc32(b"few-shot", value) if scenario.few_shot else value
    for arrival in scenario.arrivals:
        images = [] if arrival.images is None else arrival.images.tolist()
        value = zlib.crc32(repr((arrival.classes, images)).encode(), value)
    return f"{len(scenario.arrivals)} tasks, crc32 {value:08x}"


def make_plan(
    method: str,
    data: Any,
    scenario: str | Scenario,
    memory: str | Budget,
    codec: str | None,
    seeds: Sequence[int] | int,
    device: str,
    backbone: Callable[[], torch.nn.Module] | None,
    options: Mapping[str, Any],
    preset: str | None = None,
) -> Plan:
    """Checks every argument, reads the data and makes every part, before anything is written.

    ``preset`` is the name of the published run that arguments and options come from, if any.
    """
    settings = make_settings(method, options, codec)
    budget = memory if isinstance(memory, Budget) else Budget.parse(memory)
    seeds = _check_seeds(seeds)
    place = pick_device(device)
    if settings.engine.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise FastcilError(
            "engine.tensorboard is True, which needs the package tensorboard; "
            "pip install 'fastcil[tensorboard]'."
        )
    if settings.engine.tsne and importlib.util.find_spec("sklearn") is None:
        raise FastcilError(
            "engine.tsne is True, which needs the package scikit-learn; "
            "pip install 'fastcil[tsne]'."
        )
    groups = settings.groups
    dataset = load(data, skip_bad=groups["load"].skip_bad, download=groups["load"].download)
    stream = make_scenario(scenario, dataset, settings.engine.order_seed)
    size, crop = natural_look(dataset.train.images, groups["augment"])
    parts = Parts.build(settings, budget, place, size, crop, backbone)
    parts.check(dataset.train.images)
    codec_state = parts.memory.codec.state()
    return Plan(
        settings,
        dataset,
        stream,
        budget,
        seeds,
        device,
        str(data) if isinstance(data, (str, Path)) else dataset.name,
        fingerprint(dataset),
        backbone,
        preset,
        checksum(codec_state)[:16] if codec_state else None,
        file_checksum(groups["network"].weights),
    )


def _check_seeds(seeds: Sequence[int] | int) -> tuple[int, ...]:
    """One seed or several, as a tuple."""
    given = tuple(seeds) if isinstance(seeds, Iterable) else (seeds,)
    whole = all(isinstance(s, Integral) and not isinstance(s, bool) and s >= 0 for s in given)
    if not given or not whole or len(set(given)) != len(given):
        raise FastcilError(f"seeds is {given}; give one or more different whole numbers from 0 on.")
    return tuple(int(s) for s in given)


def check_folder(folder: Path, plan: Plan) -> None:
    """Makes sure that a run directory is free, or holds the same run.

    Raises:
        FastcilError: It holds something else, or a run of another config, whose differences are
            named.
    """
    identity = folder / IDENTITY
    if identity.is_file():
        now = _from_yaml(_to_yaml(plan.identity()))
        before = _from_yaml(identity.read_bytes())
        as_published = make_settings(plan.settings.method, codec=plan.settings.codec).as_dict()
        differences = _differences(before, now, flatten(as_published))
        if differences:
            raise FastcilError(
                f"run_dir is '{folder}', which holds a run of another config "
                f"({'; '.join(differences)}); use another directory, or the same options."
            )
    elif folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise FastcilError(
            f"run_dir is '{folder}', which is not empty and holds no run; use an empty one."
        )


def claim(folder: Path, plan: Plan) -> None:
    """Makes the run directory, or checks that what lies there is the same run.

    Raises:
        FastcilError: As `check_folder`; or nothing can be written there.
    """
    check_folder(folder, plan)
    identity = folder / IDENTITY
    if not identity.is_file():
        write_atomically(identity, _to_yaml(plan.identity()))
    if plan.dataset.skipped:
        lines = "".join(f"{line}\n" for line in plan.dataset.skipped)
        write_atomically(folder / "skipped.txt", lines.encode())
    # Whose first task it took over is no option: alone, it would train one.
    options = {name: value for name, value in plan.config().items() if name != "first_task"}
    write_atomically(folder / "config.yaml", _to_yaml(options))
    if not (folder / "result.json").is_file():
        now = environment(plan.device)
        write_atomically(folder / "environment.yaml", _to_yaml(now))


def _to_yaml(value: Any) -> bytes:
    """A YAML file, by libyaml where PyYAML was built with it: ten times as fast."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(value, Dumper=dumper, sort_keys=False).encode()


def _from_yaml(data: bytes) -> Any:
    """What a YAML file holds."""
    return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _differences(before: Any, now: Any, defaults: Mapping[str, Any], name: str = "") -> list[str]:
    """Options whose values differ: ``name: old, now new``.

    An option that an earlier version did not have is no difference while it has its default, or
    does what that version did.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys([*before, *now]):
            place, value = f"{name}.{key}".lstrip("."), now.get(key)
            absent = {} if isinstance(value, dict) else _BEFORE.get(key, defaults.get(place))
            found += _differences(before.get(key, absent), value, defaults, place)
        return found
    return [] if before == now else [f"{name} was {before}, now {now}"]
