"""One task learned: its stages, what memory keeps of it, and what is made of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastcil.contract import Method, Stage, Task, evaluating
from fastcil.data import Examples
from fastcil.engine.distributed import check_alike
from fastcil.engine.epoch_choice import EpochChoice, plan_choice
from fastcil.engine.events import Listener
from fastcil.engine.online import see_once
from fastcil.engine.options import Settings
from fastcil.engine.parts import Parts
from fastcil.engine.seeds import mix
from fastcil.engine.state import random_state, set_random_state
from fastcil.engine.trainer import Trainer
from fastcil.memory.checksum import checksum
from fastcil.nn.phases import phase
from fastcil.nn.ranks import current
from fastcil.nn.same_kernels import same_kernels

_INIT, _DATA, _SELECT, _REFINE = 0, 1, 2, 3

FirstTask = Callable[[Method, Callable[[], None]], None]
"""Teaches a method its first task, by calling the function that trains it or in another way."""


@dataclass
class Lesson:
    """Teaches one task; evaluation and `Method.release` are left.

    Args:
        parts: What learns.
        settings: Precision, compilation and seeds.
        seed: Of what ``engine.init_seed`` and ``engine.data_seed`` leave open.
        tell: Hears the trainer's events.
        save: Called between steps; see `Trainer`.
        begun: Called with the task once there is room for its classes, before it is trained; not
            called again where a lesson is resumed.
        judges: Images to choose the epochs of a few-shot session on; see `plan_choice`.
        first: Called instead of training, where the task is the first; None: train it.

    Attributes:
        choice: How the epochs of a few-shot session were chosen; None where they were not.
    """

    parts: Parts
    settings: Settings
    seed: int
    tell: Listener
    save: Callable[[Trainer], None] | None = None
    begun: Callable[[Task], None] | None = None
    judges: Examples | None = None
    first: FirstTask | None = None
    choice: EpochChoice | None = field(default=None, init=False)

    def run(self, task: Task, resume: dict[str, Any] | None = None) -> None:
        """Trains on the task, updates memory, refines what it holds.

        Args:
            task: The new data; its exemplars are what memory holds.
            resume: What `progress` gave, the parts having been restored to the same moment.
        """
        task = self._plan_choice(task)
        if resume is None:
            task = self._begin(task)
        self.parts.to_device()
        if resume is None and self.begun is not None:
            self.begun(task)
        if resume is None or not resume.get("remembered", False):
            self._learn(task, resume)
            resume = None
        self._refine(replace(task, exemplars=self.parts.memory.examples()), resume)
        done = replace(task, exemplars=self.parts.memory.examples())
        for part in self.parts.learners:
            part.end_task(done)
        if current().size > 1:
            self._compare_ranks(task)

    def _compare_ranks(self, task: Task) -> None:
        """Makes sure that all ranks hold the same, and says what."""
        sums = self.parts.checksums()
        sums["random numbers"] = checksum({"cpu": random_state()["cpu"]})
        check_alike(sums, f"after {task.name}")
        self.tell("ranks", {"task": task.index, "ranks": current().size, "memory": sums["memory"]})

    @staticmethod
    def progress(trainer: Trainer) -> dict[str, Any]:
        """How far a lesson has come, in the middle of one of its stages.

        Args:
            trainer: The one that ``save`` is called with.
        """
        return {
            "trainer": trainer.state(),
            "random": random_state(),
            "remembered": trainer.key[0] == _REFINE,
        }

    def _plan_choice(self, task: Task) -> Task:
        """Without the images that epochs are chosen on; resumed, the same ones."""
        parts, engine = self.parts, self.settings.engine
        seed = self.seed if engine.data_seed is None else engine.data_seed
        self.choice, task = plan_choice(
            task,
            engine.epoch_choice,
            engine.epoch_choice_every,
            parts.learners,
            parts.context,
            seed,
            self.judges,
            self.tell,
        )
        return task

    def _begin(self, task: Task) -> Task:
        """Makes room for the task's classes."""
        task = self.parts.with_room(task)
        chosen = self.settings.engine.init_seed
        # Weight draws depend on the task alone, not on what this process did before.
        torch.manual_seed(mix(_INIT, self.seed if chosen is None else chosen, task.index))
        for part in self.parts.learners:
            part.begin_task(task)
        return task

    def _key(self, purpose: int, task: Task) -> tuple[int, ...]:
        """Numbers that set these draws apart."""
        chosen = self.settings.engine.data_seed
        return (purpose, self.seed if chosen is None else chosen, task.index)

    def _learn(self, task: Task, resume: dict[str, Any] | None) -> None:
        """The method's stages, as the addons changed them, and memory's update."""

        def train() -> None:
            self._train(self._stages(task), self._key(_DATA, task), resume)

        if task.first and self.first is not None:
            self.first(self.parts.method, train)
        else:
            train()
        if task.first and self.settings.groups["network"].norms == "first":
            self.parts.method.network.freeze_norms()
        self.tell("remember", {"task": task.index})
        with phase("memory update"):
            self._remember(task)

    def _stages(self, task: Task) -> list[Stage]:
        """What the method and its addons describe."""
        stages = self.parts.method.stages(task)
        for addon in self.parts.addons:
            stages = addon.stages(task, stages)
        see_once(stages, task)
        return stages

    def _refine(self, task: Task, resume: dict[str, Any] | None) -> None:
        """The addons' stages on the exemplars that memory holds now, and what came of them."""
        stages = [stage for addon in self.parts.addons for stage in addon.refinements(task)]
        if not stages:
            return
        see_once(stages, task)
        self._train(stages, self._key(_REFINE, task), resume)
        for addon in self.parts.addons:
            changed = addon.refined(task)
            if changed is not None:
                self.parts.memory.replace(
                    *changed, classes=task.total, other_nbytes=self.parts.other_nbytes()
                )

    def _train(
        self, stages: Sequence[Stage], key: tuple[int, ...], resume: dict[str, Any] | None
    ) -> None:
        """Runs stages, from where they were stopped."""
        engine = self.settings.engine
        trainer = Trainer(
            self.parts.method,
            self.parts.augmentation,
            self.parts.device,
            key,
            self.tell,
            precision=engine.precision,
            compiled=engine.compile,
            save=self.save,
            choice=self.choice,
        )
        if resume is not None:
            set_random_state(resume["random"])
        # The same bits again on CUDA too; left to itself cuDNN chooses by how long things took.
        with same_kernels():
            trainer.run(stages, resume["trainer"] if resume else None)

    def _remember(self, task: Task) -> None:
        """Chooses exemplars by the method's features, in the form they will be kept."""
        parts, marks = self.parts, None
        if self.settings.engine.exemplars_of == "first" and not task.first:
            self._keep_first(task)
            return
        with evaluating(parts.method):
            with phase("addon", when=bool(parts.addons)):
                parts.prepare_memory(task)
                for addon in parts.addons:
                    marks = addon.marks(task.examples) if marks is None else marks
            parts.offered = marks
            parts.memory.update(
                task,
                lambda examples: parts.context.scan(parts.method.embed, examples),
                marks=marks,
                other_nbytes=parts.other_nbytes(),
                seed=mix(*self._key(_SELECT, task)),
                chosen=parts.method.chosen() if parts.method.selection == "own" else None,
            )

    def _keep_first(self, task: Task) -> None:
        """Keeps the exemplars of the first task, shared out as then, as far as there is room."""
        parts, labels = self.parts, self.parts.memory.examples().labels
        parts.offered = None
        if parts.memory.keeps == "everything":
            parts.memory.update(
                task, lambda examples: parts.context.scan(parts.method.embed, examples)
            )
            return
        none = task.examples.select(torch.arange(0))
        first = int(labels.max()) + 1 if len(labels) else task.known
        parts.memory.update(
            replace(task, examples=none, classes=(), known=first),
            lambda examples: parts.context.scan(parts.method.embed, examples),
            other_nbytes=parts.other_nbytes(),
            chosen=torch.arange(len(labels)) if parts.method.selection == "own" else None,
        )
