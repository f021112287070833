"""What a published run will take: told before it starts, its hours measured on this device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from fastcil.contract import lookup
from fastcil.engine.plan import Plan
from fastcil.engine.preset_files import is_run_preset, read_preset
from fastcil.engine.rehearsal import STEPS, RehearsedTask, rehearse
from fastcil.engine.resolve import pick_device


@dataclass(frozen=True)
class Needs:
    """What a run takes: the images exactly, all else about.

    Args:
        tasks: How many.
        epochs: Of all stages, in one seed.
        steps: Of all stages and their companions, in one seed.
        seconds: One seed's, at the rate measured.
        rate: Images a second in the first stage.
        device_nbytes: The most that a CUDA device held meanwhile; 0 on others.
    """

    tasks: int
    epochs: int
    steps: int
    seconds: float
    rate: float
    device_nbytes: int


@dataclass(frozen=True)
class _Size:
    """How large a task is: new classes and images, exemplars before and at its end."""

    classes: int
    known: int
    new: int
    old: float
    quota: float
    test: int


def announce(preset: Any, data: Any, options: Mapping[str, Any]) -> None:
    """Tells, before they are read, what the images of a published run take, and weights it lacks.

    Args:
        preset: As `fastcil.train` takes it; only a preset of whole runs is told.
        data: What will be read; of another data set than the preset's nothing is known.
        options: Nested, ``engine.progress`` and ``network.weights`` among them.
    """
    if not is_run_preset(preset) or not options.get("engine", {}).get("progress", True):
        return
    told = read_preset(preset)
    if told.pretrained and options.get("network", {}).get("weights") is None:
        say(
            f"{preset}: published with a network pre-trained on {told.pretrained}, and this one "
            f"starts at random; pass such weights, --network.weights FILE"
        )
    if isinstance(data, str) and data == told.arguments["data"]:
        number = told.images["train"] + told.images["test"]
        say(
            f"{preset}: reading {number:,} images, about {format_size(told.image_nbytes)} in "
            f"memory, for a while twice that"
        )


def tell_needs(plan: Plan) -> None:
    """Tells what a planned run will take, after a few timed steps of each of its stages.

    The run does not depend on it: the steps train networks of their own, and the random generators
    are put back.
    """
    say(f"{plan.preset}: {_images_line(plan)}")
    try:
        needs = measure(plan)
    except Exception as error:  # What fails on a few images need not fail in the run.
        say(f"{plan.settings.method}: how long it will take could not be measured: {error}")
        return
    on_device = f", {format_size(needs.device_nbytes)} on the device" if needs.device_nbytes else ""
    say(
        f"{plan.settings.method}: {needs.epochs:,} epochs in {needs.tasks} tasks, about "
        f"{needs.steps:,} steps and {_hours(needs.seconds)} a seed on {_device(plan)} "
        f"({STEPS} steps of each stage timed, the first at {needs.rate:,.0f} images/s{on_device})"
    )


def measure(plan: Plan) -> Needs:
    """What a run takes, by its stages' lengths and a few timed steps of them.

    Tasks from the third on are taken to be like the second, for as many images as they have; where
    extractors are added, the forward pass of each costs a third of a step of the first task.
    Selection, evaluation and the choice of epochs are a forward pass of each image they see. The
    exemplars counted are
    those that memory would hold raw: compressed ones are more.

    Args:
        plan: The run.
    """
    device = pick_device(plan.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rehearsed = rehearse(plan)
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    first = rehearsed[0].stages[0]
    per_image = first.seconds[first.name] / first.batches[first.name]
    epochs = steps = 0
    seconds = 0.0
    for number, size in enumerate(_sizes(plan)):
        task = rehearsed[min(number, len(rehearsed) - 1)]
        slower = _growth(rehearsed, number)
        for stage in task.stages:
            images = stage.images(size.new, size.old, size.quota, size.classes)
            main = math.ceil(images / stage.batch)
            epochs += stage.epochs
            for name, spent in stage.seconds.items():
                each = main if name == stage.name else stage.companions[name] or main
                steps += stage.epochs * each
                seconds += stage.epochs * each * spent * slower
        seen = size.new + size.old + task.readouts * size.test
        if number:
            seen += _judged(plan, sum(stage.epochs for stage in task.stages), size)
        seconds += seen * per_image / 3 * max(1, task.extractors) * slower
    tasks = len(plan.scenario.arrivals)
    return Needs(tasks, epochs, steps, seconds, 1.0 / per_image, held)


def _judged(plan: Plan, epochs: int, size: _Size) -> float:
    """Images looked at to choose among a later task's epochs, each time counted."""
    engine = plan.settings.engine
    if not plan.scenario.few_shot or engine.epoch_choice == "last":
        return 0.0
    judges = size.test if engine.epoch_choice == "paper" else size.known
    return math.ceil(epochs / engine.epoch_choice_every) * judges


def _growth(rehearsed: list[RehearsedTask], number: int) -> float:
    """How much slower than the second task a later one is, if each adds extractors."""
    if number < 2:
        return 1.0
    added = rehearsed[1].extractors - rehearsed[0].extractors
    return (3 + number * added) / (3 + added)


def _sizes(plan: Plan) -> list[_Size]:
    """The tasks of a run."""
    train = torch.bincount(plan.dataset.train.labels.cpu(), minlength=len(plan.dataset.class_names))
    test = torch.bincount(plan.dataset.test.labels.cpu(), minlength=len(plan.dataset.class_names))
    keeps = lookup("method", plan.settings.parts[0]).keeps  # type: ignore[attr-defined]
    sizes: list[_Size] = []
    known: dict[int, None] = {}
    before = 0
    for arrival in plan.scenario.arrivals:
        classes = list(arrival.classes)
        images = arrival.images
        new = int(train[classes].sum()) if images is None else len(images)
        old = float(before) if keeps != "nothing" else 0.0
        if known and keeps == "exemplars":
            old = min(old, _quota(plan, len(known)) * len(known))
        known |= dict.fromkeys(classes)
        quota = _quota(plan, len(known))
        sizes.append(_Size(len(classes), len(known), new, old, quota, int(test[list(known)].sum())))
        before += new
    return sizes


def _quota(plan: Plan, classes: int) -> float:
    """Raw images of a class that memory has room for."""
    quota = plan.budget.quota(classes)
    return quota if plan.budget.unit == "images" else quota / _mean_nbytes(plan)


def _mean_nbytes(plan: Plan) -> float:
    """Bytes of a raw exemplar."""
    return float(plan.dataset.train.images.image_nbytes().double().mean())


def _images_line(plan: Plan) -> str:
    """Images, their bytes, and what memory will hold of them."""
    train, test = plan.dataset.train, plan.dataset.test
    sizes = _sizes(plan)
    total = len(plan.scenario.order)
    kept = min(float(len(train)), sizes[-1].quota * total)
    return (
        f"{len(train):,} training and {len(test):,} test images of {total} classes, "
        f"{format_size(train.images.nbytes + test.images.nbytes)}; memory {plan.budget}, at the "
        f"end about {kept:,.0f} raw images, "
        f"{format_size(kept * _mean_nbytes(plan))}"
    )


def say(line: str) -> None:
    """Prints a line where progress is shown."""
    Console(stderr=True).print(line, highlight=False, soft_wrap=True, markup=False)


def format_size(number: float) -> str:
    """Bytes as people read them, in powers of 1000.

    Example:
        >>> format_size(71.4e9), format_size(6_200_000)
        ('71.4 GB', '6.2 MB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"


def _hours(seconds: float) -> str:
    """A length of time as people plan with it."""
    if seconds < 3600:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:,.1f} hours" if seconds < 360_000 else f"{seconds / 3600:,.0f} hours"


def _device(plan: Plan) -> str:
    """What the run computes on."""
    device = pick_device(plan.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = plan.settings.engine.threads or torch.get_num_threads()
    return f"{device.type} with {threads} thread(s)"
