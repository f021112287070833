"""Whole runs on a GPU: what a task takes, its memory's update and its evaluation included.

python benchmarks/gpu/whole_runs.py [--data cifar100] [--epochs 5]

Two tasks of CIFAR-100 and two thousand exemplars, each stage so many epochs long; and how a step's
time and memory grow over twenty tasks. Within ten minutes; small, on the CPU: --device cpu --data
scenes:classes=20,size=32,train_per_class=8,test_per_class=1 --batch 8 --epochs 1 --tasks 3
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import growth
import step_sections
from kept import arguments, run_parts
from step_case import peak_of, synchronise

from fastcil.engine.evaluate import count_correct
from fastcil.engine.lesson import Lesson
from fastcil.engine.parts import Parts
from fastcil.engine.resolve import pick_device
from fastcil.engine.scenario import Arrival, pick
from fastcil.nn.phases import PHASES, PhaseClock, phase

METHODS = ("finetune", "icarl", "der", "foster", "foster+cim")


@dataclass
class _Short(Lesson):
    """Stages of so many epochs."""

    epochs: int = 1

    def _train(self, stages: Any, key: Any, resume: Any) -> None:
        for stage in stages:
            stage.recipe = replace(stage.recipe, epochs=min(self.epochs, stage.recipe.epochs))
        super()._train(stages, key, resume)


def run(method: str, given: Namespace) -> list[dict[str, Any]]:
    """Both tasks of a method."""
    plan = step_sections.whole(given).plan(method, given.device)
    engine = replace(plan.settings.engine, precision=given.precision)
    settings = replace(plan.settings, groups={**plan.settings.groups, "engine": engine})
    images, device = plan.dataset.train.images, pick_device(given.device)
    parts = Parts.for_images(images, settings, plan.budget, device, plan.backbone)
    order, rows = plan.scenario.order, []
    for number in range(2):
        task = plan.scenario.task(number, plan.dataset.train, parts.memory.examples())
        known = task.total
        lesson = _Short(parts, settings, 0, lambda *_: None, epochs=given.epochs)
        test = pick(plan.dataset.test, Arrival(order[:known]), order)
        started = time.perf_counter()
        with peak_of(parts.device) as peak, PhaseClock(parts.device) as clock:
            lesson.run(task)
            with phase("evaluation"):
                count_correct(parts.method, parts.context, test, known)
            synchronise(parts.device)
        seconds = time.perf_counter() - started
        parts.method.release()
        used, spent = peak(), clock.seconds()
        rows.append(
            {
                "method": method,
                "task": number + 1,
                "seconds": round(seconds, 3),
                **{f"{name}, s": round(spent.get(name, 0.0), 3) for name in PHASES},
                "exemplars": len(parts.memory),
                "peak, MiB": None if used is None else used >> 20,
            }
        )
    return rows


def grow(method: str, given: Namespace) -> list[dict[str, Any]]:
    """A step's time and memory over the tasks."""
    grown = growth.row(method, step_sections.stream(given), given.device, 5, given.tasks)
    row = {
        "method": f"{method}, growth",
        "ms, task 2": grown["points"][1]["ms"],
        f"ms, task {len(grown['points'])}": grown["points"][-1]["ms"],
        "ms a task more": grown["ms_slope"],
        "bytes a task more": grown["peak_slope"],
    }
    return [row]


def main() -> None:
    """Times, prints and keeps."""
    given = arguments(
        __doc__.partition("\n")[0],
        data="cifar100",
        batch=128,
        epochs=5,
        tasks=20,
        precision="bf16",
        methods=",".join(METHODS),
    )
    runs = {method: partial(run, method, given) for method in given.methods.split(",")}
    growths = {f"{name}, growth": partial(grow, name, given) for name in growth.METHODS}
    run_parts(__file__, {**runs, **growths}, given)


if __name__ == "__main__":
    main()
