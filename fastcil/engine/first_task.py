"""One first task for several methods: trained once per seed, taken over by the others.

Few-shot learners are compared from the same base session, and what they differ in comes after it.
The first method of a comparison trains that task; the others begin theirs, take over the network as
the first one's stages left it, and go on as usual: memory's update, ``end_task``, evaluation and
records are each method's own. So are the seconds, which for them leave that training out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fastcil.contract import Method, Stage, Task, evaluating
from fastcil.engine.lesson import Lesson
from fastcil.engine.options import flatten
from fastcil.engine.parts import Parts
from fastcil.engine.plan import IDENTITY, Plan
from fastcil.engine.rehearsal import few
from fastcil.engine.resolve import pick_device
from fastcil.engine.scenario import Arrival
from fastcil.engine.seeds import generator
from fastcil.engine.state import load_state, random_state, save_state, set_random_state
from fastcil.errors import CompositionError, FastcilError

FILE = "first-task.safetensors"

# What of a run's identity decides which network the first task has, and what it sees.
_SAME = ("images", "tasks", "scenario", "backbone", "network", "augment")
_SEEDS = ("engine.order_seed", "engine.init_seed", "engine.data_seed")
_PER_CLASS, _BATCH, _EPOCHS, _PROBED = 2, 8, 2, 4

Form = dict[str, Any]
"""What a network is made of: the leaves of its structure and its tensors' shapes, by name."""


class SharedFirstTask:
    """What a network was after one seed's first task: kept by who trained it, for all others.

    Args:
        donor: Label of the method that trains it.
        file: Where it is kept, or None to keep it in this process only.
    """

    def __init__(self, donor: str, file: Path | None) -> None:
        self.donor = donor
        self.file = file
        self._state: dict[str, Any] | None = None

    @property
    def kept(self) -> bool:
        """Whether it is there."""
        return self._state is not None or (self.file is not None and self.file.is_file())

    def keep(self, method: Method, train: Callable[[], None]) -> None:
        """Trains the task and keeps the network as the stages left it."""
        train()
        network = method.network
        tensors = {name: value.detach().clone() for name, value in network.state_dict().items()}
        state = {"structure": _structure(network), "tensors": tensors}
        if self.file is None:
            self._state = state
        else:
            save_state(self.file, state)

    def take(self, method: Method, _: Callable[[], None]) -> None:
        """Gives a method that has begun the task the network that was kept, instead of training.

        Raises:
            FastcilError: Nothing was kept, or it is another network.
        """
        if not self.kept:
            raise FastcilError(
                f"share_first_task is True, but the first task of '{self.donor}' was not kept when "
                f"it was trained; use another run_dir."
            )
        state = self._state or load_state(self.file or "")
        kept = _form(state["structure"], state["tensors"])
        _check_same(type(method).__name__, _form_of(method.network), self.donor, kept)
        method.network.load_state_dict(state["tensors"])


def share_first_task(plans: Mapping[str, Plan], folder: Path | None) -> dict[int, SharedFirstTask]:
    """Lets all plans but the first take over the first one's first task, if they can.

    They can where data, tasks, seeds, network and augmentation are the same, and where the first
    task trains the network and nothing else. The latter is seen by trying: a copy of each method
    begins the task and takes a step of each of two epochs of every stage, on a few images. All
    that training changes is in a method's tensors, or a run could not be resumed; if one outside
    the network is another afterwards, or the network's structure is, a method that was not
    trained would lack it.

    Args:
        plans: Label -> plan; the first trains. ``first_task`` of the others is set.
        folder: Each label's run directory is in it; None for a comparison that is not kept.

    Returns:
        Seed -> where its first task is kept.

    Raises:
        FastcilError: Names the first difference, or what keeps a method from taking over.
    """
    (donor, plan), *others = plans.items()
    shared = {
        seed: SharedFirstTask(donor, folder / donor / f"seed-{seed}" / FILE if folder else None)
        for seed in plan.seeds
    }
    for label, other in others:
        _check_alike(label, other, donor, plan)
    # A run that was begun has been tried; that it is the same run is seen when it is claimed.
    fresh = [label for label, _ in others if not (folder and (folder / label / IDENTITY).is_file())]
    trained = _try(plan) if fresh else None
    checksum = zlib.crc32(yaml.safe_dump(plan.identity()).encode())
    for label, other in others:
        if trained is not None and label in fresh:
            _check_takes_over(label, _try(other), donor, trained)
        other.first_task, other.first_task_checksum = donor, f"{checksum:08x}"
    for first in shared.values():
        if first.file is not None and not first.kept and _past_first_task(first.file.parent):
            raise FastcilError(
                f"share_first_task is True, but '{first.file.parent}' holds a run whose first task "
                f"was not kept when it was trained; use another run_dir."
            )
    return shared


def _past_first_task(folder: Path) -> bool:
    """Whether a run has been through the stages of its first task."""
    if (folder / "result.json").is_file():
        return True
    checkpoint = folder / "checkpoint.safetensors"
    if not checkpoint.is_file():
        return False
    state = load_state(checkpoint)
    return bool(state["tasks"]) or bool(state.get("remembered", False))


@dataclass
class _Trial:
    """A method's first task, tried.

    Args:
        method: As a few steps left it.
        begun: The network's form before them.
        changed: Tensors outside the network that are others now.
        images: Normalised images to compare networks on.  # [B, 3, h, w]
    """

    method: Method
    begun: Form
    changed: list[str]
    images: Tensor


class _TrialLesson(Lesson):
    """A lesson that begins, and trains a little."""

    def attempt(self, task: Task) -> _Trial:
        """Begins the task and trains for a few steps."""
        parts = self.parts
        task = self._begin(task)
        parts.to_device()
        begun, before = _form_of(parts.method.network), _outside(parts)
        self._train(self._stages(task), self._key(0, task), None)
        after = _outside(parts)
        changed = [
            name
            for name in dict.fromkeys([*before, *after])
            if name not in before or name not in after or not _equal(before[name], after[name])
        ]
        size = parts.augmentation.size
        images = torch.randn(_PROBED, 3, size, size, generator=generator(0))
        return _Trial(parts.method, begun, changed, images.to(parts.device))

    def _stages(self, task: Task) -> list[Stage]:
        stages = super()._stages(task)
        for stage in stages:
            stage.recipe = replace(stage.recipe, epochs=min(_EPOCHS, stage.recipe.epochs))
            for part in (stage, *stage.companions):
                part.steps = 1
        return stages


def _try(plan: Plan) -> _Trial:
    """The first task of a plan on a few images, of a few a step; random generators are put back."""
    before = random_state()
    engine = replace(plan.settings.engine, compile=False, progress=False, batch_size=_BATCH)
    settings = replace(plan.settings, groups={**plan.settings.groups, "engine": engine})
    train, arrival = plan.dataset.train, plan.scenario.arrivals[0]
    device = pick_device(plan.device)
    parts = Parts.for_images(train.images, settings, plan.budget, device, plan.backbone)
    shown = Arrival(arrival.classes, few(train, arrival, _PER_CLASS))
    task = plan.scenario.task(0, train, parts.memory.examples(), shown)
    try:
        return _TrialLesson(parts, settings, plan.seeds[0], lambda *_: None).attempt(task)
    finally:
        set_random_state(before)


def _outside(parts: Parts) -> dict[str, Tensor]:
    """Copies of all tensors of a method and its addons but those of the network."""
    return {
        f"{type(part).__name__}.{name}": value.detach().clone()
        for part in parts.learners
        for name, value in part.tensors().items()
        if part is not parts.method or not name.startswith("network.")
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _check_alike(label: str, own: Plan, donor: str, plan: Plan) -> None:
    """Refuses a plan whose data, tasks, seeds, network or augmentation are others."""
    mine, theirs = (
        {
            name: value
            for name, value in flatten(some.identity()).items()
            if name.partition(".")[0] in _SAME or name in _SEEDS
        }
        for some in (own, plan)
    )
    _check_same(label, mine, donor, theirs)
    rules = own.settings.engine.epoch_choice, plan.settings.engine.epoch_choice
    if plan.scenario.few_shot and rules[0] == "held-out" != rules[1]:
        raise FastcilError(
            f"share_first_task is True, but '{donor}', whose engine.epoch_choice is '{rules[1]}', "
            f"trains on the images that '{label}' would judge epochs by; put one first that holds "
            f"them out."
        )


def _check_takes_over(label: str, own: _Trial, donor: str, trained: _Trial) -> None:
    """Refuses a method whose first task is more than training a network, or another network."""
    network, form = own.method.network, _form_of(trained.method.network)
    reason = None
    if own.changed:
        reason = f"training changes its {own.changed[0]} too, which is no part of the network"
    elif _form_of(network) != own.begun:
        reason = "training changes the form of its network"
    if reason is None:
        _check_same(label, own.begun, donor, form)
        network.load_state_dict(trained.method.network.state_dict())
        with torch.no_grad(), evaluating(network), evaluating(trained.method.network):
            if not torch.equal(network(own.images), trained.method.network(own.images)):
                reason = (
                    f"of the same weights its network makes something else than that of '{donor}', "
                    f"as where network.last_relu follows the method"
                )
    if reason is not None:
        raise CompositionError(
            f"share_first_task is True, but '{label}' can't take over a first task: {reason}."
        )


def _check_same(label: str, own: Mapping[str, Any], donor: str, wanted: Mapping[str, Any]) -> None:
    """Refuses the first difference."""
    for name in dict.fromkeys([*wanted, *own]):
        if own.get(name) != wanted.get(name):
            raise FastcilError(
                f"share_first_task is True, but '{label}' has {name} {own.get(name)}, and "
                f"'{donor}', which trains the first task, {wanted.get(name)}; give both the same."
            )


def _structure(network: nn.Module) -> Any:
    """What a network says of itself, or its class."""
    described = getattr(network, "structure", None)
    return type(network).__name__ if described is None else described()


def _form_of(network: nn.Module) -> Form:
    return _form(_structure(network), network.state_dict())


def _form(structure: Any, tensors: Mapping[str, Tensor]) -> Form:
    return _leaves(structure, "network") | {name: tuple(t.shape) for name, t in tensors.items()}


def _leaves(value: Any, name: str) -> Form:
    """The leaves of a structure under dotted names."""
    if isinstance(value, Mapping):
        pairs = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        pairs = [(str(place), item) for place, item in enumerate(value)]
    else:
        return {name: value}
    return {
        leaf: found for key, item in pairs for leaf, found in _leaves(item, f"{name}.{key}").items()
    }
