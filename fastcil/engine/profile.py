"""Where the time of a run goes: a few steps of every stage, timed by phase and traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from fastcil.contract import Stage
from fastcil.engine.environment import environment
from fastcil.engine.evaluate import count_correct
from fastcil.engine.lesson import Lesson
from fastcil.engine.online import leading
from fastcil.engine.parts import Parts
from fastcil.engine.placement import place_images
from fastcil.engine.plan import Plan, make_plan
from fastcil.engine.presets import merge_options, preset_arguments
from fastcil.engine.probe import probes
from fastcil.engine.profile_table import LaneProfile, OpTime, Profile, StageProfile, TaskProfile
from fastcil.engine.resolve import pick_device
from fastcil.engine.scenario import Arrival, Scenario, pick
from fastcil.errors import FastcilError
from fastcil.memory import Budget
from fastcil.nn.phases import OTHER, PhaseClock, phase

WARM = 3  # steps of each stage that nobody times: kernels are chosen and objectives compiled
TRACED = 5
_TOP = 12
_ONCE = ("addon", "memory update", "evaluation")
_INSIDE = ("fastcil: ", "ProfilerStep", "Optimizer.", "autograd::engine", "Torch-Compiled")


def profile(
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
    steps: int = 20,
    tasks: int = 2,
    backbone: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> Profile:
    """Trains a few steps of every stage of a run's first tasks and says what they are spent on.

    Data, memory, network and device are those of the run; stages are cut short, so that what is
    learned is nothing. Of each stage the first `WARM` steps are left out, ``steps`` are timed, and
    `TRACED` more run under torch's profiler, which slows them down. An epoch is taken for the
    first one: what addons do every few epochs, such as drawing boxes anew, is not in it.

    Args:
        method: As `fastcil.train` takes it, and so all that follows.
        data: What to learn.
        scenario: New classes in each task.
        memory: Budget of the exemplars.
        codec: How they are stored.
        seeds: The first is used.
        device: Where to compute. On CUDA phases are timed on the device's stream.
        run_dir: Where to write ``profile.json``, ``profile.txt`` and a trace of each stage, to be
            looked at in Perfetto or chrome://tracing; None: nowhere.
        preset: Options of a published run or configuration.
        steps: Steps of each stage, and of each of its companions, that are timed.
        tasks: How many of the run's first tasks are gone through.
        backbone: Builds a feature extractor of the user's own.
        **options: Dotted option names -> values.

    Returns:
        The times; ``print`` shows them as a table.

    Raises:
        FastcilError: Anything that can't be used.

    Example:
        >>> found = profile("er", data="scenes:classes=4,size=32,train_per_class=8,"
        ...                 "test_per_class=4", scenario="lfs-2", memory="8 images", steps=2,
        ...                 **{"network.width": 4, "network.name": "resnet20",
        ...                    "engine.progress": False})
        >>> [stage.name for task in found.tasks for stage in task.stages]
        ['replay', 'replay']
    """
    for name, value in (("steps", steps), ("tasks", tasks)):
        if value < 1:
            raise FastcilError(f"{name} is {value}; it must be at least 1.")
    told = preset_arguments(preset, data=data, scenario=scenario, memory=memory)
    plan = make_plan(
        method,
        told["data"],
        told["scenario"],
        told["memory"],
        codec,
        seeds,
        device,
        backbone,
        merge_options(preset, options, [method]),
    )
    place_images([plan])
    return _Profiler(plan, Path(run_dir) if run_dir is not None else None, steps).run(tasks)


class _Profiler:
    """Goes through the first tasks of a plan."""

    def __init__(self, plan: Plan, folder: Path | None, steps: int) -> None:
        self.plan = plan
        self.folder = folder
        self.steps = steps
        engine = replace(plan.settings.engine, progress=False, epoch_choice="last")
        groups = {**plan.settings.groups, "engine": engine}
        self.settings = replace(plan.settings, groups=groups)
        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        images, device = plan.dataset.train.images, pick_device(plan.device)
        self.parts = Parts.for_images(images, self.settings, plan.budget, device, plan.backbone)

    def run(self, tasks: int) -> Profile:
        """The first tasks, measured; writes what was found."""
        count = min(tasks, len(self.plan.scenario.arrivals))
        clock = PhaseClock(self.parts.device)
        with clock:
            found = [self._task(number, clock) for number in range(count)]
        made = Profile(self.plan.config(), environment(self.plan.device), self.steps, TRACED, found)
        if self.folder is not None:
            made.save(self.folder)
        return made

    def _task(self, number: int, clock: PhaseClock) -> TaskProfile:
        """One task learned and evaluated."""
        plan, parts = self.plan, self.parts
        order = plan.scenario.order
        task = plan.scenario.task(number, plan.dataset.train, parts.memory.examples())
        watch = _Watch(self.steps, clock, number, self.folder)
        _Short(parts, self.settings, plan.seeds[0], watch, watch=watch).run(task)
        test = pick(plan.dataset.test, Arrival(order[: task.total]), order)
        sizes = [len(arrival.classes) for arrival in plan.scenario.arrivals[: number + 1]]
        tasks = sizes if plan.scenario.task_aware else None
        with phase("evaluation"):
            further = probes(
                parts.method,
                parts.context,
                lambda: pick(plan.dataset.train, Arrival(order[: task.total]), order),
                tasks or [task.total],
                plan.settings.engine.knn,
            )
            count_correct(parts.method, parts.context, test, task.total, tasks, further)
        once = watch.rest()
        parts.method.release()
        return TaskProfile(number, len(task.examples), len(test), once, watch.stages)


class _Watch:
    """Cuts stages short and hears how their steps go."""

    def __init__(self, steps: int, clock: PhaseClock, task: int, folder: Path | None) -> None:
        self.steps = steps
        self.clock = clock
        self.task = task
        self.folder = folder
        self.stages: list[StageProfile] = []
        self._coming: list[StageProfile] = []
        self._done = 0
        self._lane = ""
        self._once: dict[str, float] = {}
        self._tracer: torch_profile | None = None

    def shorten(self, stage: Stage) -> None:
        """Leaves a stage one epoch of the steps that are looked at, and notes what it was."""
        lanes = []
        for part in (stage, *stage.companions):
            lead = leading(part)
            images = sum(min(len(s), s.batch_size) for s in part.streams)
            whole = part.steps or (lead.steps if lead is not None else 0)
            lanes.append(LaneProfile(part.name, whole, images))
            # A stage without any image takes no step.
            part.steps = WARM + self.steps + TRACED if whole else 0
        self._coming.append(StageProfile(stage.name, stage.recipe.epochs, lanes))
        stage.recipe = replace(stage.recipe, epochs=min(1, stage.recipe.epochs))

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """Hears a trainer's events."""
        if event == "stage":
            self._keep_rest()
            self.stages.append(self._coming.pop(0))
            self._done, self._lane = 0, ""
        elif event == "step":
            self._step(fields["stage"])
        elif event == "epoch":
            self.clock.reset()

    def _step(self, lane: str) -> None:
        stage = self.stages[-1]
        if lane != self._lane:
            self._lane, self._done = lane, 0
        self._done += 1
        if self._done == 1 and lane == stage.name:
            # What is done once an epoch lies before its first step.
            stage.before = {"addon": self.clock.seconds().get("addon", 0.0)}
        if self._done == WARM:
            self.clock.reset()
        elif self._done == WARM + self.steps:
            own = next(each for each in stage.lanes if each.name == lane)
            own.seconds = {k: v / self.steps for k, v in self.clock.seconds().items()}
            self._start_trace()
        elif self._done == WARM + self.steps + TRACED:
            self._end_trace(stage, lane)
            self.clock.reset()

    def _start_trace(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._tracer = torch_profile(activities=activities)
        self._tracer.start()

    def _end_trace(self, stage: StageProfile, lane: str) -> None:
        assert self._tracer is not None
        self._tracer.stop()
        own = next(each for each in stage.lanes if each.name == lane)
        own.ops = _top_ops(self._tracer)
        if self.folder is not None:
            name = f"trace-{self.task + 1}-{len(self.stages)}-{lane.replace(' ', '-')}.json"
            own.trace = name
            _export(self._tracer, self.folder / name)
        self._tracer = None

    def _keep_rest(self) -> None:
        """What was spent outside of steps since the last of them."""
        for name, seconds in self.clock.seconds().items():
            if name in (*_ONCE, OTHER):
                self._once[name] = self._once.get(name, 0.0) + seconds
        self.clock.reset()

    def rest(self) -> dict[str, float]:
        """Seconds of what a task does once: memory's update, evaluation, beginnings and ends."""
        self._keep_rest()
        return self._once


@dataclass
class _Short(Lesson):
    """A lesson of few steps."""

    watch: _Watch = field(kw_only=True)

    def _train(
        self, stages: Sequence[Stage], key: tuple[int, ...], resume: dict[str, Any] | None
    ) -> None:
        for stage in stages:
            self.watch.shorten(stage)
        super()._train(stages, key, resume)


def _export(tracer: torch_profile, path: Path) -> None:
    """Writes a chrome trace, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    tracer.export_chrome_trace(str(draft))
    draft.replace(path)


def _top_ops(tracer: torch_profile) -> list[OpTime]:
    """The operators that take most time by themselves, on the device where there is one."""
    events = [e for e in tracer.key_averages() if not e.key.startswith(_INSIDE)]
    # On a device they are its kernels; an operator of the host counts those that it launched again.
    kernels = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    events = kernels or events

    def own(event: Any) -> float:
        return float(event.self_device_time_total if kernels else event.self_cpu_time_total)

    whole = sum(map(own, events)) or 1.0
    ranked = sorted(events, key=own, reverse=True)[:_TOP]
    return [OpTime(e.key, own(e) / 1e6 / TRACED, own(e) / whole, e.count / TRACED) for e in ranked]
