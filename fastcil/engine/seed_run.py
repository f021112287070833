"""A Learner driven through a Scenario and measured, from any point where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcil.contract import Task
from fastcil.data import Examples
from fastcil.engine.distributed import check_alike, first_says, on_first
from fastcil.engine.environment import environment, together
from fastcil.engine.epoch_choice import EpochChoice, held_out
from fastcil.engine.evaluate import count_ahead, count_correct
from fastcil.engine.events import JsonLines, Listener, TensorBoard, broadcast
from fastcil.engine.first_task import SharedFirstTask
from fastcil.engine.learner import Learner
from fastcil.engine.lesson import FirstTask
from fastcil.engine.localisation import localisation_records
from fastcil.engine.plan import Plan
from fastcil.engine.probe import probes
from fastcil.engine.progress import make_progress
from fastcil.engine.records import collect_records, record_to_plain
from fastcil.engine.result import Result, SeedOutcome, TaskOutcome
from fastcil.engine.scenario import Arrival, pick, positions
from fastcil.engine.state import load_state, locked, save_state
from fastcil.engine.timer import Timer
from fastcil.engine.trainer import Trainer
from fastcil.engine.tsne import tsne_records
from fastcil.nn.phases import phase
from fastcil.nn.ranks import current

CHECKPOINT, LEARNER, RESULT = "checkpoint.safetensors", "learner.safetensors", "result.json"


class SeedRun:
    """One seed's run: tasks, evaluation, checkpoints.

    Args:
        plan: What to run.
        seed: Which seed.
        folder: Where to keep it, or None.
        first: The first task that it shares with other runs, which it takes over if the plan says
            so, and trains and keeps if not.
    """

    def __init__(
        self, plan: Plan, seed: int, folder: Path | None, first: SharedFirstTask | None = None
    ) -> None:
        self.plan = plan
        self.seed = seed
        self.folder = folder
        self.learner: Learner | None = None
        self.outcome = SeedOutcome(seed)
        self._timer = Timer(plan.settings.engine.checkpoint_seconds)
        self._task_began = 0.0
        self._ahead: dict[str, int] | None = None
        self._sittings: list[dict[str, Any]] = []  # environments, this one's last
        self._first: FirstTask | None = None
        if first is not None:
            self._first = first.take if plan.first_task else first.keep

    def run(self) -> SeedOutcome:
        """Runs what is left to run and hands over everything measured."""
        folder = self.folder
        if folder is None:
            return self._run()
        if not first_says((folder / RESULT).is_file()):
            with ExitStack() as stack:
                on_first(lambda: stack.enter_context(locked(folder)))
                # Another process may have finished it meanwhile.
                if not first_says((folder / RESULT).is_file()):
                    return self._run()
        if self._writes is not None:
            (folder / CHECKPOINT).unlink(missing_ok=True)
        return Result.load(folder).outcomes[0]

    @property
    def _writes(self) -> Path | None:
        """The folder, where this process is the one that writes there."""
        return self.folder if current().first else None

    def _run(self) -> SeedOutcome:
        tell = self._listener()
        called = self.plan.label or self.plan.settings.method
        if len(self.plan.seeds) > 1:
            called += f", seed {self.seed}:"
        tell("run", {"method": self.plan.settings.method, "seed": self.seed, "called": called})
        self._sittings = [environment(self.plan.device)]
        resume = self._restore(tell)
        arrivals = self.plan.scenario.arrivals
        try:
            for number in range(len(self.outcome.tasks), len(arrivals)):
                tell("task", {"task": number, "tasks": len(arrivals), "seed": self.seed})
                self._run_task(number, tell, resume)
                resume = None
        finally:
            tell("finished", {"seed": self.seed})
        self._finish()
        return self.outcome

    def _listener(self) -> Listener:
        engine = self.plan.settings.engine
        if not current().first:
            return broadcast([])
        listeners: list[Listener] = [make_progress(engine.progress)]
        if self.folder is not None:
            listeners.append(JsonLines(self.folder / "events.jsonl"))
            if engine.tensorboard:
                listeners.append(TensorBoard(self.folder / "tensorboard"))
        return broadcast(listeners)

    def _restore(self, tell: Listener) -> dict[str, Any] | None:
        """The learner where it was stopped, or a new one; returns what a task under way needs."""
        file = self.folder / CHECKPOINT if self.folder is not None else None
        if self._writes is not None:
            # What a kill left in the middle of a write.
            for draft in self._writes.glob(".*.safetensors.*"):
                draft.unlink()
        if file is None or not first_says(file.is_file()):
            plan = self.plan
            self.learner = Learner(
                memory=plan.budget,
                device=plan.device,
                seed=self.seed,
                backbone=plan.backbone,
                settings=plan.settings,
            )
            return None
        state = load_state(file)
        # The next checkpoint takes this one's place.
        current().barrier()
        # Options that may change between two sittings are this sitting's.
        saved = {**state["learner"], "settings": self.plan.settings.as_dict()}
        self.learner = Learner.from_state(
            saved, device=self.plan.device, backbone=self.plan.backbone
        )
        if current().size > 1:
            # Each has read the file by itself: on another machine it might be an older one.
            check_alike(self.learner.parts.checksums(), "in the checkpoint")
        self.outcome = SeedOutcome(self.seed, [TaskOutcome(**t) for t in state["tasks"]])
        self._sittings = [*state.get("sittings", []), *self._sittings]
        tell("resumed", {"task": len(self.outcome.tasks), "path": str(file)})
        return state if "trainer" in state else None

    def _run_task(self, number: int, tell: Listener, resume: dict[str, Any] | None) -> None:
        assert self.learner is not None
        spent = resume["seconds"] if resume else 0.0
        self._task_began = time.monotonic() - spent
        self._ahead = resume.get("ahead") if resume else None
        task, names = self._task(number)
        engine = self.plan.settings.engine
        look = self._look_ahead if engine.forward_transfer and number > 0 else None
        save = self._save_between_steps
        if number == 0 and self.plan.first_task:
            tell("shared", {"first_task": self.plan.first_task})
        start = self.learner.parts.start
        if number == 0 and start is not None and start.left:
            tell("weights", {"left over": start.left})
        lesson = self.learner.learn_task(
            task, names, tell, save, resume, look, self._judges(task), self._first
        )
        with phase("evaluation"):
            outcome = self._measure(task, len(names), lesson.choice)
        self.outcome.tasks.append(outcome)
        tell("evaluated", self._headline(number, outcome))
        self.learner.method.release()
        learner = self.learner
        self._save(lambda: {"learner": learner.state()})

    def _task(self, number: int) -> tuple[Task, list[str]]:
        """The task, with labels in learning order, and the names of its new classes."""
        assert self.learner is not None
        plan, learner = self.plan, self.learner
        order, (arrival, _) = plan.scenario.order, self._arrived(number)
        # All images say how they are cut, not those that happen to come first.
        learner.prepare(plan.dataset.train.images)
        exemplars = learner.memory.examples()
        task = plan.scenario.task(number, plan.dataset.train, exemplars, arrival)
        return task, [plan.dataset.class_names[order[k]] for k in task.new_classes]

    def _look_ahead(self, task: Task) -> None:
        """Measures the method on a task that it has made room for, and not been trained on."""
        assert self.learner is not None
        scenario, method = self.plan.scenario, self.learner.method
        test = pick(
            self.plan.dataset.test, Arrival(scenario.arrivals[task.index].classes), scenario.order
        )
        tasks = [*self.learner.tasks, len(task.new_classes)] if scenario.task_aware else None
        self._ahead = count_ahead(method, self.learner.parts.context, test, task.total, tasks)

    def _arrived(self, number: int) -> tuple[Arrival, Tensor]:
        """A task as it is trained, and the images held out of it to choose epochs on, int64."""
        plan, engine = self.plan, self.plan.settings.engine
        arrival = plan.scenario.arrivals[number]
        if not plan.scenario.few_shot or engine.epoch_choice != "held-out":
            return arrival, torch.empty(0, dtype=torch.int64)
        index = positions(plan.dataset.train, arrival)
        seed = self.seed if engine.data_seed is None else engine.data_seed
        held = held_out(plan.dataset.train.labels.cpu()[index], seed, number)
        return replace(arrival, images=index[~held]), index[held]

    def _judges(self, task: Task) -> Examples | None:
        """Images to choose the epochs of a few-shot session on, of all classes known with it."""
        rule, order = self.plan.settings.engine.epoch_choice, self.plan.scenario.order
        if not task.few_shot or rule == "last":
            return None
        if rule == "paper":
            return self._seen(task.total)
        held = torch.cat([self._arrived(number)[1] for number in range(task.index + 1)])
        return pick(self.plan.dataset.train, Arrival(order[: task.total], held), order)

    def _seen(self, classes: int) -> Examples:
        """Test images of the classes learned first."""
        order = self.plan.scenario.order[:classes]
        return pick(self.plan.dataset.test, Arrival(order), order)

    def _measure(self, task: Task, classes: int, choice: EpochChoice | None) -> TaskOutcome:
        assert self.learner is not None
        learner, plan = self.learner, self.plan
        order = plan.scenario.order[: len(learner.class_names)]
        test = self._seen(len(order))
        task_aware = plan.scenario.task_aware
        tasks = learner.tasks if task_aware else None
        method, context = learner.method, learner.parts.context
        further = probes(
            method,
            context,
            lambda: pick(plan.dataset.train, Arrival(order), order),
            tasks or [len(order)],
            plan.settings.engine.knn,
        )
        correct = count_correct(method, context, test, len(order), tasks, further)
        limit = plan.budget.limit(len(order))
        found = localisation_records(
            learner,
            plan.dataset,
            self._arrived(task.index)[0],
            order,
            next(iter(correct.values())),
            self.outcome.tasks[-1].records if self.outcome.tasks else [],
        )
        last = task.index + 1 == len(plan.scenario.arrivals)
        if plan.settings.engine.tsne and last:
            found += tsne_records(method, context, test, learner.tasks[0], self.seed)
        return TaskOutcome(
            classes=classes,
            correct=correct,
            exemplars=learner.memory.counts(len(order)),
            nbytes=learner.nbytes(),
            limit=None if limit == float("inf") else limit,
            units=learner.memory.units,
            seconds=round(time.monotonic() - self._task_began, 3),
            records=[
                *collect_records(learner, task, gallery=self.seed == plan.seeds[0]),
                *map(record_to_plain, [*found, *(choice.records() if choice else [])]),
            ],
            task_aware=task_aware,
            few_shot=plan.scenario.few_shot,
            epoch_choice=(choice.rule if choice else "last") if task.few_shot else None,
            ahead=self._ahead,
        )

    def _headline(self, number: int, outcome: TaskOutcome) -> dict[str, Any]:
        accuracy = {
            name: round(100.0 * sum(c["top1"]) / max(1, sum(c["count"])), 3)
            for name, c in outcome.correct.items()
        }
        return {
            "task": number,
            "accuracy": accuracy,
            "classes": len(outcome.exemplars),
            "exemplars": sum(outcome.exemplars),
            "nbytes": outcome.nbytes["budgeted"],
            "seconds": outcome.seconds,
        }

    def _save_between_steps(self, trainer: Trainer) -> None:
        if self.folder is not None and self._timer.is_due():
            self._save(lambda: self._under_way(trainer))

    def _under_way(self, trainer: Trainer) -> dict[str, Any]:
        """What going on in the middle of a task needs."""
        assert self.learner is not None
        seconds = time.monotonic() - self._task_began
        return {**self.learner.checkpoint(trainer), "seconds": seconds, "ahead": self._ahead}

    def _save(self, state: Callable[[], dict[str, Any]]) -> None:
        """One file holds everything, so that a kill leaves this checkpoint or the one before."""
        folder = self.folder
        if folder is None:
            return

        def write() -> None:
            tasks = [asdict(task) for task in self.outcome.tasks]
            save_state(folder / CHECKPOINT, {"tasks": tasks, "sittings": self._sittings, **state()})

        # However long it takes, the others wait: in a collective of the next step they would not.
        on_first(write)
        self._timer.restart()

    def _finish(self) -> None:
        """The finished run's files; the result is written last, since it says it is finished."""
        folder, learner = self.folder, self.learner
        if folder is None or learner is None:
            return
        measured = together(self._sittings)

        def write() -> None:
            learner.save(folder / LEARNER)
            Result(self.plan.config(), measured, [self.outcome]).save(folder / RESULT)
            (folder / CHECKPOINT).unlink(missing_ok=True)

        # All read what was written.
        on_first(write)
