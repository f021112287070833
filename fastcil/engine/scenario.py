"""Streams of tasks: who arrives when."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcil.contract import Task
from fastcil.data import Dataset, Examples
from fastcil.engine.few_shot import (
    LISTED,
    draw_sessions,
    is_few_shot,
    read_sessions,
    session_sizes,
)
from fastcil.errors import FastcilError

_ONLINE = "-online"


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
    again are data-incremental, ``few_shot`` ones bring a few ``images`` of each class,
    ``task_aware`` streams are scored within each task's classes, and ``online`` ones pass by once.

    A class belongs to the task in which it first arrives; the accuracy matrix's columns are those
    tasks. A ``task_aware`` stream lets every class arrive once, so that an image has one task.

    Args:
        name: How it was asked for.
        arrivals: The tasks.
        task_aware: Whether the task's identity is known when predicting: each test image's
            scores are then compared only among the classes of its own task, in every readout.
            Training does not change.
        online: Whether every stage that trains on a task's new images passes over them once, in
            one shuffle, whatever its recipe's length (see
            `fastcil.engine.online.see_once`).
        few_shot: Whether every task but the first, the base session, brings a few images of each
            of its classes (see `fastcil.engine.few_shot`).
    """

    name: str
    arrivals: tuple[Arrival, ...]
    task_aware: bool = False
    online: bool = False
    few_shot: bool = False

    @property
    def order(self) -> tuple[int, ...]:
        """The data set's labels in learning order."""
        return tuple(dict.fromkeys(c for arrival in self.arrivals for c in arrival.classes))

    def task(
        self, number: int, train: Examples, exemplars: Examples, arrival: Arrival | None = None
    ) -> Task:
        """A task of the stream, with labels in learning order.

        Args:
            number: Its place, from 0.
            train: All training images.
            exemplars: What memory holds.
            arrival: The task's classes with other images than all of them; None: as they arrive.
        """
        order, arrival = self.order, arrival or self.arrivals[number]
        place = {label: k for k, label in enumerate(order)}
        return Task(
            index=number,
            classes=tuple(sorted(place[c] for c in arrival.classes)),
            known=len({c for past in self.arrivals[:number] for c in past.classes}),
            examples=pick(train, arrival, order),
            exemplars=exemplars,
            name=f"task {number + 1}",
            online=self.online,
            few_shot=self.few_shot and number > 0,
        )


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


def without_online(text: str) -> str:
    """A scenario's name without the ``-online`` that lets any stream pass by once.

    The folder of session lists may be called as it likes.

    Example:
        >>> without_online("task-20-online"), without_online("lfs-5")
        ('task-20', 'lfs-5')
    """
    return text if text.startswith(LISTED) else text.removesuffix(_ONLINE)


def split_classes(text: str, classes: int) -> list[int]:
    """How many new classes each task of a named scenario brings.

    - ``lfs-N``: all classes in N tasks, as even as can be, larger ones first (Luo et al. 2023,
      "learning from scratch"; 101 classes in 10 tasks are 11 + 9 x 10);
    - ``lfh-N``: half of the classes (rounded up) first, the rest in N tasks ("from half");
    - ``bA-incB``: A classes first, then B at a time, fewer in the last; ``b0-inc10`` begins
      with 10;
    - ``task-N``: as ``lfs-N``, task-incremental: the task of an image is known when predicting;
    - ``data-N``: data-incremental: all classes in the first of N tasks, which come again in the
      others with images of their own (see `split_images`);
    - ``few-B-NxK``: few-shot: B classes with all their images, then N at a time with K images of
      each, until they are used up (see `fastcil.engine.few_shot.draw_sessions`).

    Behind each but the last may stand ``-online``, as in ``task-20-online``: the same tasks, over
    whose images stages pass once (`Scenario.online`).

    Raises:
        FastcilError: The name is none of these, or asks for more tasks than there are classes.

    Example:
        >>> split_classes("lfs-3", 20), split_classes("lfh-2", 10), split_classes("b5-inc4", 20)
        ([7, 7, 6], [5, 3, 2], [5, 4, 4, 4, 3])
        >>> split_classes("task-3", 20), split_classes("data-3", 20), split_classes("few-6-2x5", 10)
        ([7, 7, 6], [20, 0, 0], [6, 2, 2])
    """
    if text.startswith("few-"):
        return session_sizes(text, classes)
    form = without_online(text)
    even = re.fullmatch(r"(lfs|lfh|task|data)-(\d+)", form)
    steps = re.fullmatch(r"b(\d+)-inc(\d+)", form)
    sizes: list[int] = []
    if even:
        tasks = int(even[2])
        if even[1] == "data":
            sizes = [classes] + [0] * (tasks - 1) if tasks else []
        else:
            first = [-(-classes // 2)] if even[1] == "lfh" else []
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
            f"scenario is '{text}'; use 'lfs-N', 'lfh-N', 'bA-incB', 'task-N', 'data-N', "
            f"'few-B-NxK' or 'few:FOLDER', as in 'lfs-5' or 'b50-inc10', and '-online' behind any "
            f"but the last two to pass over each task's images once."
        )
    if not sizes:
        raise FastcilError(
            f"scenario is '{text}', which {classes} classes cannot fill; ask for "
            f"{'at least one task' if even and not int(even[2]) else 'fewer tasks'}."
        )
    return sizes


def split_images(labels: Tensor, parts: int, seed: int | None) -> list[Tensor]:
    """Deals the images of every class to ``parts`` parts, each image to one.

    The images of each class are shuffled by numpy's legacy generator with ``seed`` (None leaves
    them in order) and dealt out like cards, each class beginning where the one before it ended.
    So of every class two parts differ by at most one image, and in all by at most one too, if
    every class has as many images as there are parts. Of a class that has fewer, the first part
    gets one, for that is where a class is learned first, and later parts one each as far as they
    go; the first part then exceeds its share by at most one image for each such class.

    Args:
        labels: int64 [N].
        parts: How many.
        seed: Of the shuffle, or None.

    Returns:
        int64 positions of each part's images, ascending; a part is empty if there are too few.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
        >>> [part.tolist() for part in split_images(labels, 2, None)]
        [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
    """
    count = len(labels)
    order = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
    shuffled = torch.from_numpy(order)
    shuffled = shuffled[labels.cpu()[shuffled].argsort(stable=True)]  # class by class
    part = torch.zeros(count, dtype=torch.int64)  # of each place in `shuffled`
    start = dealt = dealt_late = 0
    for size in torch.bincount(labels.cpu()).tolist():
        cards = torch.arange(size)
        if size >= parts:
            part[start : start + size] = (dealt + cards) % parts
            dealt += size
        elif size:
            # The first card stays with the first part, the others go round among the later ones.
            part[start + 1 : start + size] = 1 + (dealt_late + cards[1:] - 1) % (parts - 1)
            dealt_late += size - 1
        start += size
    sizes = torch.bincount(part, minlength=parts).tolist()
    by_part = shuffled[part.argsort(stable=True)].split(sizes)
    return [images.sort().values for images in by_part]


def make_scenario(
    scenario: str | Scenario, dataset: Dataset, order_seed: int | None = 1993
) -> Scenario:
    """The scenario of a name over a data set; a `Scenario` is checked and handed back.

    Args:
        scenario: A name (see `split_classes`), ``few:FOLDER`` for published session lists (see
            `fastcil.engine.few_shot.read_sessions`), or a `Scenario`.
        dataset: Whose classes and training images arrive.
        order_seed: Of the class order, and of the shuffle of a ``data-N`` or ``few-B-NxK``
            stream; None keeps the data set's own order of both. Session lists bring their own.

    Raises:
        FastcilError: An unknown name, or classes or images that the data set does not have.
    """
    total = len(dataset.class_names)
    _check_complete(dataset)
    if isinstance(scenario, str):
        order = class_order(total, order_seed)
        if is_few_shot(scenario):
            sessions = (
                read_sessions(scenario, dataset)
                if scenario.startswith(LISTED)
                else draw_sessions(scenario, dataset, order, order_seed)
            )
            arrivals = [Arrival(classes, images) for classes, images in sessions]
        elif parts := re.fullmatch(r"data-([1-9]\d*)", without_online(scenario)):
            arrivals = _data_arrivals(dataset, order, int(parts[1]), order_seed)
        else:
            arrivals, start = [], 0
            for size in split_classes(scenario, total):
                arrivals.append(Arrival(tuple(order[start : start + size])))
                start += size
        return Scenario(
            scenario,
            tuple(arrivals),
            task_aware=scenario.startswith("task-"),
            online=scenario != without_online(scenario),
            few_shot=is_few_shot(scenario),
        )
    if not scenario.arrivals:
        raise FastcilError("scenario has no task; give at least one Arrival.")
    if scenario.few_shot and scenario.online:
        raise FastcilError(
            "scenario.few_shot and scenario.online are both True, but a few-shot session passes "
            "over its shots many times; leave one of them False."
        )
    if scenario.few_shot and len(scenario.order) == len(set(scenario.arrivals[0].classes)):
        raise FastcilError(
            "scenario.few_shot is True, but no class comes after its first task; let few-shot "
            "sessions with new classes follow it."
        )
    known: set[int] = set()
    for number, arrival in enumerate(scenario.arrivals):
        _check_arrival(f"scenario's task {number}", arrival, dataset, known)
        again = known & set(arrival.classes)
        if scenario.task_aware and again:
            raise FastcilError(
                f"scenario.task_aware is True, but its task {number} brings class {min(again)} "
                f"again, whose images would belong to two tasks; let every class arrive once, or "
                f"leave task_aware False."
            )
        known |= set(arrival.classes)
    return scenario


def _data_arrivals(
    dataset: Dataset, order: Sequence[int], parts: int, seed: int | None
) -> list[Arrival]:
    """The tasks of a ``data-N`` stream: each its part of the images, and the classes in it."""
    labels = dataset.train.labels.cpu()
    most = len(labels) - len(order) + 1  # One image of each class is in the first.
    if parts > most:
        raise FastcilError(
            f"scenario is 'data-{parts}', which the {len(labels)} training images of "
            f"'{dataset.name}' cannot fill; ask for at most {most} tasks."
        )
    arrivals = []
    for images in split_images(labels, parts, seed):
        present = set(labels[images].tolist())
        arrivals.append(Arrival(tuple(c for c in order if c in present), images))
    return arrivals


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


def places(order: Sequence[int], labels: Tensor) -> Tensor:
    """Labels in learning order, int64 [N]; -1 for a class that is not in ``order``."""
    position = torch.full((max(max(order), int(labels.max())) + 1,), -1)
    position[torch.tensor(order)] = torch.arange(len(order))
    return position[labels.cpu()]


def positions(examples: Examples, arrival: Arrival) -> Tensor:
    """Which examples one arrival brings, int64, ascending."""
    labels = examples.labels.cpu()
    wanted = torch.isin(labels, torch.tensor(arrival.classes))
    if arrival.images is not None:
        chosen = torch.zeros_like(wanted)
        chosen[arrival.images.cpu()] = True
        wanted &= chosen
    return wanted.nonzero().flatten()


def pick(examples: Examples, arrival: Arrival, order: Sequence[int]) -> Examples:
    """The training data of one arrival, a view, with labels in learning order."""
    picked = examples.view(positions(examples, arrival))
    return Examples(picked.images, places(order, picked.labels).to(picked.labels.device))
