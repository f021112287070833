"""A Learner driven through a Scenario and measured, from any point where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastcil.contract import Task
from fastcil.engine.environment import environment
from fastcil.engine.evaluate import count_ahead, count_correct
from fastcil.engine.events import JsonLines, Listener, TensorBoard, broadcast
from fastcil.engine.learner import Learner
from fastcil.engine.localisation import localisation_records
from fastcil.engine.needs import announce, tell_needs
from fastcil.engine.plan import Plan, claim, make_plan
from fastcil.engine.preset_files import is_run_preset
from fastcil.engine.presets import merge_options, preset_arguments
from fastcil.engine.probe import probes
from fastcil.engine.progress import make_progress
from fastcil.engine.records import collect_records, record_to_plain
from fastcil.engine.result import Result, SeedOutcome, TaskOutcome
from fastcil.engine.scenario import Arrival, Scenario, pick
from fastcil.engine.state import load_state, locked, save_state
from fastcil.engine.trainer import Trainer
from fastcil.memory import Budget

CHECKPOINT, LEARNER, RESULT = "checkpoint.safetensors", "learner.safetensors", "result.json"


def train(
    method: str,
    data: Any = None,
    scenario: str | Scenario | None = None,
    memory: str | Budget | None = None,
    codec: str | None = None,
    seeds: Sequence[int] | int = (0,),
    device: str = "auto",
    run_dir: str | Path | None = None,
    preset: str | Path | None = None,
    *,
    backbone: Callable[[], torch.nn.Module] | None = None,
    **options: Any,
) -> Result:
    """Runs a class-incremental learning experiment.

    Args:
        method: The composition, as in ``foster+cim``; `fastcil methods` lists what there is.
        data: ``scenes`` (drawn by fastcil; the default), a folder or ``.tar`` of
            ``train/<class>/...`` and ``test/<class>/...``, an ``.npz``, ``cifar100``, arrays, torch
            datasets, a `Dataset` or what else `fastcil.data.load` reads; relative names are also
            looked for in ``FASTCIL_DATA``. ``"cifar100:classes=0-49,train_per_class=100"`` is a
            part of one.
        scenario: New classes in each task: ``lfs-N`` (``lfs-5`` is the default), ``lfh-N``,
            ``bA-incB``; the same with the task known when predicting: ``task-N``; new images of all
            classes in each task: ``data-N``; each with ``-online`` behind it to see every image
            once (see `fastcil.engine.scenario.split_classes`); or a `Scenario`.
        memory: ``"64MiB"``, ``"2000 images"`` (default), ``"20 images/class"`` or a `Budget`.
        codec: How exemplars are stored, if no addon says; what can be set of it are options under
            its name: ``codec="jpeg", **{"jpeg.quality": 50}``.
        seeds: One run each; figures are means over them.
        device: ``auto``, ``cpu``, ``cuda``.
        run_dir: Where to keep config, log, checkpoints, result and report. A run that was
            stopped there goes on, to the same bits; a finished one is read.
        preset: The name of a published run, such as ``cim/food101-lfs10``, which sets data,
            scenario and memory too (`fastcil presets` lists them); or of a published configuration
            that the method or an addon has, such as ``cifar-b0`` of ``foster`` (`fastcil methods
            foster`); or a YAML file of options. What is passed here wins over it.
        backbone: Builds a feature extractor of the user's own.
        **options: Dotted option names -> values, as on the command line:
            ``**{"cim.threshold": 0.7}``.

    Returns:
        The `Result`; its ``learner`` is the first seed's.

    Raises:
        FastcilError: Anything that can't be used, in one sentence, before anything is written.

    Example:
        >>> result = train("er", data="scenes:classes=4,size=32,train_per_class=8,test_per_class=4",
        ...                scenario="lfs-2", memory="8 images",
        ...                **{"engine.epoch_scale": 0.01, "network.width": 4,
        ...                   "network.name": "resnet20", "engine.progress": False})
        >>> result.accuracy_matrix.shape
        (2, 2)
    """
    merged = merge_options(preset, options, [method])
    arguments = preset_arguments(preset, data=data, scenario=scenario, memory=memory)
    announce(preset, arguments["data"], merged)
    plan = make_plan(
        method,
        arguments["data"],
        arguments["scenario"],
        arguments["memory"],
        codec,
        seeds,
        device,
        backbone,
        merged,
        str(preset) if is_run_preset(preset) else None,
    )
    folder = Path(run_dir) if run_dir is not None else None
    return run_plan(plan, folder)


def run_plan(plan: Plan, folder: Path | None) -> Result:
    """Runs, or goes on with, or reads what a plan describes."""
    if folder is not None:
        claim(folder, plan)
    if plan.preset is not None and plan.settings.engine.progress and not _begun(folder):
        tell_needs(plan)
    learners: list[Learner] = []
    outcomes = []
    for seed in plan.seeds:
        runner = SeedRun(plan, seed, folder / f"seed-{seed}" if folder else None)
        outcomes.append(runner.run())
        if folder is None and not learners and runner.learner is not None:
            learners.append(runner.learner)
    if folder is None:
        return Result(plan.config(), environment(plan.device), outcomes, None, lambda: learners[0])
    first = folder / f"seed-{plan.seeds[0]}"
    result = Result(
        plan.config(),
        # Of the process that measured, which need not be this one.
        Result.load(first).environment,
        outcomes,
        folder,
        lambda: Learner.load(first / LEARNER, device=plan.device, backbone=plan.backbone),
    )
    result.save(folder / RESULT)
    return result


def _begun(folder: Path | None) -> bool:
    """Whether some training was done there before."""
    return folder is not None and any(
        file.name in (CHECKPOINT, RESULT) for file in folder.glob("seed-*/*")
    )


class SeedRun:
    """One seed's run: tasks, evaluation, checkpoints.

    Args:
        plan: What to run.
        seed: Which seed.
        folder: Where to keep it, or None.
    """

    def __init__(self, plan: Plan, seed: int, folder: Path | None) -> None:
        self.plan = plan
        self.seed = seed
        self.folder = folder
        self.learner: Learner | None = None
        self.outcome = SeedOutcome(seed)
        self._saved_at = time.monotonic()
        self._task_began = 0.0
        self._ahead: dict[str, int] | None = None

    def run(self) -> SeedOutcome:
        """Runs what is left to run and hands over everything measured."""
        if self.folder is None:
            return self._run()
        if not (self.folder / RESULT).is_file():
            with locked(self.folder):
                # Another process may have finished it meanwhile.
                if not (self.folder / RESULT).is_file():
                    return self._run()
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return Result.load(self.folder).outcomes[0]

    def _run(self) -> SeedOutcome:
        tell = self._listener()
        tell("run", {"method": self.plan.settings.method, "seed": self.seed})
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
        listeners: list[Listener] = [make_progress(engine.progress)]
        if self.folder is not None:
            listeners.append(JsonLines(self.folder / "events.jsonl"))
            if engine.tensorboard:
                listeners.append(TensorBoard(self.folder / "tensorboard"))
        return broadcast(listeners)

    def _restore(self, tell: Listener) -> dict[str, Any] | None:
        """The learner where it was stopped, or a new one; returns what a task under way needs."""
        file = self.folder / CHECKPOINT if self.folder is not None else None
        if self.folder is not None:
            # What a kill left in the middle of a write.
            for draft in self.folder.glob(".*.safetensors.*"):
                draft.unlink()
        if file is None or not file.is_file():
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
        # Options that may change between two sittings are this sitting's.
        saved = {**state["learner"], "settings": self.plan.settings.as_dict()}
        self.learner = Learner.from_state(
            saved, device=self.plan.device, backbone=self.plan.backbone
        )
        self.outcome = SeedOutcome(self.seed, [TaskOutcome(**t) for t in state["tasks"]])
        tell("resumed", {"task": len(self.outcome.tasks), "path": str(file)})
        return state if "trainer" in state else None

    def _run_task(self, number: int, tell: Listener, resume: dict[str, Any] | None) -> None:
        assert self.learner is not None
        spent = resume["seconds"] if resume else 0.0
        self._task_began = time.monotonic() - spent
        self._ahead = resume.get("ahead") if resume else None
        task, names = self._task(number)
        wanted = self.plan.settings.engine.forward_transfer and number > 0
        look = self._look_ahead if wanted else None
        self.learner.learn_task(task, names, tell, self._save_between_steps, resume, look)
        outcome = self._measure(task, len(names))
        self.outcome.tasks.append(outcome)
        tell("evaluated", self._headline(number, outcome))
        self.learner.method.release()
        self._save(self.learner.state(), {})

    def _task(self, number: int) -> tuple[Task, list[str]]:
        """The task, with labels in learning order, and the names of its new classes."""
        assert self.learner is not None
        plan, learner = self.plan, self.learner
        arrival, order = plan.scenario.arrivals[number], plan.scenario.order
        examples = pick(plan.dataset.train, arrival, order)
        # All images say how they are cut, not those that happen to come first.
        learner.prepare(plan.dataset.train.images)
        place = {label: k for k, label in enumerate(order)}
        known = len(learner.class_names)
        classes = sorted(place[c] for c in arrival.classes)
        task = Task(
            index=number,
            classes=tuple(classes),
            known=known,
            examples=examples,
            exemplars=learner.memory.examples(),
            name=f"task {number + 1}",
            online=plan.scenario.online,
        )
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

    def _measure(self, task: Task, classes: int) -> TaskOutcome:
        assert self.learner is not None
        learner, plan = self.learner, self.plan
        order = plan.scenario.order[: len(learner.class_names)]
        test = pick(plan.dataset.test, Arrival(order), order)
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
            plan.scenario.arrivals[task.index],
            order,
            next(iter(correct.values())),
            self.outcome.tasks[-1].records if self.outcome.tasks else [],
        )
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
                *map(record_to_plain, found),
            ],
            task_aware=task_aware,
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
        due = self.plan.settings.engine.checkpoint_seconds
        if self.folder is None or time.monotonic() - self._saved_at < due:
            return
        assert self.learner is not None
        state = self.learner.checkpoint(trainer)
        seconds = time.monotonic() - self._task_began
        self._save(state.pop("learner"), {**state, "seconds": seconds, "ahead": self._ahead})

    def _save(self, learner: dict[str, Any], more: dict[str, Any]) -> None:
        """One file holds everything, so that a kill leaves this checkpoint or the one before."""
        if self.folder is not None:
            tasks = [asdict(task) for task in self.outcome.tasks]
            save_state(self.folder / CHECKPOINT, {"learner": learner, "tasks": tasks, **more})
            self._saved_at = time.monotonic()

    def _finish(self) -> None:
        """The finished run's files; the result is written last, since it says it is finished."""
        if self.folder is None or self.learner is None:
            return
        self.learner.save(self.folder / LEARNER)
        measured = environment(self.plan.device)
        Result(self.plan.config(), measured, [self.outcome]).save(self.folder / RESULT)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
