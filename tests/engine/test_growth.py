"""A step of a method with one network costs the same in every task; DER's grows by one extractor.

Counted, not timed: numbers that train, tensors that a method keeps, operators of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from backbones import ConvNet
from torch.utils._python_dispatch import TorchDispatchMode

from fastcil.engine.lesson import Lesson
from fastcil.engine.parts import Parts
from fastcil.engine.plan import make_plan
from fastcil.engine.resolve import pick_device

TASKS = 5
DATA = f"scenes:classes={2 * TASKS},size=32,train_per_class=6,test_per_class=1"
OPTIONS = {"engine.progress": False, "engine.batch_size": 8}
# EEIL's loss has a term for each task.
FLAT = ["finetune", "er", "icarl", "wa", "lucir", "podnet", "lwf", "si", "foster", "darkpp"]


class Counter(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Counting(Lesson):
    """Stages of three steps, the last of which is counted in the main one."""

    ops: int = 0
    trained: int = 0
    counter: Counter = field(default_factory=Counter)

    def _train(self, stages, key, resume):
        for stage in stages:
            stage.recipe = replace(stage.recipe, epochs=1)
            stage.steps = 3 if stage.primary else 1
        main = next(stage for stage in stages if stage.primary)

        def hear(event, fields):
            if event == "step" and fields["stage"] == main.name:
                if fields["step"] == 1:
                    self.trained = sum(p.numel() for p in main.parameters() if p.requires_grad)
                    self.counter.__enter__()
                elif fields["step"] == 2:
                    self.counter.__exit__(None, None, None)
                    self.ops, self.counter.count = self.counter.count, 0

        self.tell = hear
        super()._train(stages, key, resume)


def count(method):
    """Operators of a step, numbers it trains and tensors held, after each task."""
    stream = (DATA, f"lfs-{TASKS}", "20 images")
    plan = make_plan(method, *stream, None, (0,), "cpu", ConvNet, OPTIONS)
    images, device = plan.dataset.train.images, pick_device("cpu")
    parts = Parts.for_images(images, plan.settings, plan.budget, device, ConvNet)
    found = []
    for number in range(TASKS):
        task = plan.scenario.task(number, plan.dataset.train, parts.memory.examples())
        lesson = Counting(parts, plan.settings, 0, lambda *_: None)
        lesson.run(task)
        parts.method.release()
        tensors = sum(len(part.tensors()) for part in parts.learners)
        found.append((lesson.ops, lesson.trained, tensors))
    return found


@pytest.mark.parametrize("method", FLAT)
def test_one_network_costs_the_same_in_every_task(method):
    # The second task is the first with old classes; all after it are alike.
    _, second, *later = count(method)
    rows = 2 * 7 * 2  # of two heads: two classes, six features and a bias
    assert second[0] > 50
    for further, (ops, trained, tensors) in enumerate(later, 1):
        assert abs(ops - second[0]) <= 4
        assert trained <= second[1] + 2 * rows * further  # over one extractor, or over two
        assert tensors == second[2]


def test_expanding_networks_grow_by_one_extractor_a_task():
    _, *later = count("der")
    steps = [b[0] - a[0] for a, b in pairwise(later)]
    assert min(steps) > 0 and max(steps) - min(steps) <= 4  # a forward pass more, no more
    trained = [point[1] for point in later]
    assert max(trained) < 1.8 * min(trained)  # only the newest one trains, and the head
    held = [b[2] - a[2] for a, b in pairwise(later)]
    assert len(set(held)) == 1 and held[0] > 0


def test_the_counter_would_notice():
    torch.manual_seed(0)
    with Counter() as counter:
        torch.ones(2) + 1
    assert counter.count >= 2
