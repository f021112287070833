"""Streams of tasks: who arrives when."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcil.data import Dataset, Examples
from fastcil.errors import FastcilError


@dataclass(frozen=True)
class Arrival:
    """What one task brings.

    Args:
        classes: The data set's labels, in the order they are learned in.
        images: int64 positions in the data set's training part, or None for every image of
            ``classes``.
    """

    classes: tuple[int, ...]
    images: Tensor | None = None


@dataclass(frozen=True)
class Scenario:
    """A stream of tasks over a data set.

    The type carries more than class-incremental streams: arrivals that name the same classes
    again are data-incremental, arrivals with a few ``images`` each are few-shot, ``task_aware``
    streams are scored within each task's classes, and ``online`` ones are seen once.

    Args:
        name: How it was asked for.
        arrivals: The tasks.
        task_aware: Whether the task's identity is known when predicting.
        online: Whether each image is seen once.
    """

    name: str
    arrivals: tuple[Arrival, ...]
    task_aware: bool = False
    online: bool = False

    @property
    def order(self) -> tuple[int, ...]:
        """The data set's labels in learning order."""
        return tuple(dict.fromkeys(c for arrival in self.arrivals for c in arrival.classes))


def class_order(classes: int, seed: int | None) -> list[int]:
    """A permutation of the labels, as the field draws it.

    numpy's legacy generator with seed 1993 is what iCaRL's successors share; with CIFAR-100 the
    order starts 68, 56, 78, 8, 23. None keeps the data set's own order.

    Example:
        >>> class_order(100, 1993)[:5]
        [68, 56, 78, 8, 23]
    """
    if seed is None:
        return list(range(classes))
    order: list[int] = np.random.RandomState(seed).permutation(classes).tolist()
    return order


def split_classes(text: str, classes: int) -> list[int]:
    """How many classes each task of a named scenario brings.

    - ``lfs-N``: all classes in N tasks, as even as can be, larger ones first (Luo et al. 2023,
      "learning from scratch"; 101 classes in 10 tasks are 11 + 9 x 10);
    - ``lfh-N``: half of the classes (rounded up) first, the rest in N tasks ("from half");
    - ``bA-incB``: A classes first, then B at a time, fewer in the last; ``b0-inc10`` begins
      with 10.

    Raises:
        FastcilError: The name is none of these, or asks for more tasks than there are classes.

    Example:
        >>> split_classes("lfs-3", 20), split_classes("lfh-2", 10), split_classes("b5-inc4", 20)
        ([7, 7, 6], [5, 3, 2], [5, 4, 4, 4, 3])
    """
    even = re.fullmatch(r"lf([sh])-(\d+)", text)
    steps = re.fullmatch(r"b(\d+)-inc(\d+)", text)
    sizes: list[int] = []
    if even:
        tasks = int(even[2])
        first = [] if even[1] == "s" else [-(-classes // 2)]
        rest = classes - sum(first)
        if 0 < tasks <= rest:
            sizes = first + [rest // tasks + (k < rest % tasks) for k in range(tasks)]
    elif steps:
        base, step = int(steps[1]), int(steps[2])
        if step > 0 and 0 < max(base, step) <= classes:
            left = classes - base
            sizes = ([base] if base else []) + [step] * (left // step)
            sizes += [left % step] if left % step else []
    else:
        raise FastcilError(
            f"scenario is '{text}'; use 'lfs-N', 'lfh-N' or 'bA-incB', as in 'lfs-5' or "
            f"'b50-inc10'."
        )
    if not sizes:
        raise FastcilError(
            f"scenario is '{text}', which {classes} classes cannot fill; ask for fewer tasks."
        )
    return sizes


def make_scenario(
    scenario: str | Scenario, dataset: Dataset, order_seed: int | None = 1993
) -> Scenario:
    """The scenario of a name over a data set; a `Scenario` is checked and handed back.

    Raises:
        FastcilError: An unknown name, or classes or images that the data set does not have.
    """
    total = len(dataset.class_names)
    _check_complete(dataset)
    if isinstance(scenario, str):
        order = class_order(total, order_seed)
        arrivals, start = [], 0
        for size in split_classes(scenario, total):
            arrivals.append(Arrival(tuple(order[start : start + size])))
            start += size
        return Scenario(scenario, tuple(arrivals))
    if not scenario.arrivals:
        raise FastcilError("scenario has no task; give at least one Arrival.")
    for name in ("task_aware", "online"):
        if getattr(scenario, name):
            raise FastcilError(
                f"scenario.{name} is True, which no method of this version can do; leave it False."
            )
    known: set[int] = set()
    for number, arrival in enumerate(scenario.arrivals):
        _check_arrival(f"scenario's task {number}", arrival, dataset, known)
        known |= set(arrival.classes)
    return scenario


def _check_complete(dataset: Dataset) -> None:
    """Refuses a class that can't be learned, or not be tested."""
    for name, part in (("training", dataset.train), ("test", dataset.test)):
        have = torch.bincount(part.labels.cpu(), minlength=len(dataset.class_names))
        missing = (have == 0).nonzero().flatten().tolist()
        if missing:
            raise FastcilError(
                f"'{dataset.name}' has no {name} image of class "
                f"'{dataset.class_names[missing[0]]}'; give it some, or leave the class out."
            )


def _check_arrival(what: str, arrival: Arrival, dataset: Dataset, known: set[int]) -> None:
    """Refuses classes or images that the data set does not have, and classes without an image."""
    classes, total = arrival.classes, len(dataset.class_names)
    if not classes or not all(0 <= c < total for c in classes):
        raise FastcilError(
            f"{what} has classes {classes}; '{dataset.name}' has labels 0 to {total - 1}."
        )
    if len(set(classes)) != len(classes):
        raise FastcilError(f"{what} has classes {classes}; name each once.")
    labels = dataset.train.labels.cpu()
    if arrival.images is not None:
        images = arrival.images
        if images.dtype != torch.int64 or ((images < 0) | (images >= len(labels))).any():
            raise FastcilError(
                f"{what} has images that '{dataset.name}' has not; give int64 positions from 0 to "
                f"{len(labels) - 1}."
            )
        labels = labels[images.cpu()]
    empty = sorted(set(classes) - known - set(labels.unique().tolist()))
    if empty or not torch.isin(labels, torch.tensor(classes)).any():
        raise FastcilError(f"{what} has no image of class {(empty or classes)[0]}; give it some.")


def pick(examples: Examples, arrival: Arrival, order: Sequence[int]) -> Examples:
    """The training data of one arrival, with labels in learning order."""
    position = torch.full((max(max(order), int(examples.labels.max())) + 1,), -1)
    position[torch.tensor(order)] = torch.arange(len(order))
    labels = examples.labels.cpu()
    wanted = torch.isin(labels, torch.tensor(arrival.classes))
    if arrival.images is not None:
        chosen = torch.zeros_like(wanted)
        chosen[arrival.images.cpu()] = True
        wanted &= chosen
    index = wanted.nonzero().flatten()
    picked = examples.select(index)
    return Examples(picked.images, position[labels[index]])
