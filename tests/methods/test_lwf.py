"""LwF against its equations written naively."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import Task, evaluating
from fastcil.errors import FastcilError
from fastcil.methods.lwf import LwF


def make(lab, **options):
    torch.manual_seed(0)
    return LwF(lab.shorten(LwF.Config(**options)), lab.context)


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def naive(logits, old, labels, own, heads, temperature):
    """Cross-entropy over ``own`` and the sum over heads of KD, batch means, in float64."""
    classification = distillation = 0.0
    for row, taught, label in zip(logits, old, labels, strict=True):
        classification -= log_softmax(row[own])[own.index(label)]
        for head in heads:
            target = np.exp(log_softmax(taught[head] / temperature))
            distillation -= (target * log_softmax(row[head] / temperature)).sum()
    return classification / len(logits), distillation / len(logits)


@pytest.mark.parametrize("head", ["all", "task"])
@pytest.mark.parametrize("teacher", ["augmented", "recorded"])
@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_loss_is_the_equation(lab, head, teacher, again):
    method = make(lab, head=head, teacher=teacher, alpha=0.7, temperature=3.0)
    first, second, third = lab.make_tasks((2, 3, 2))
    if again:  # Classes 1 and 3 come again, and none is new.
        images = lab.make_examples([1, 3] * 6, seed=5)
        third = Task(2, (1, 3), known=5, examples=images, exemplars=images.select([]))
    for task in (first, second):
        lab.learn(method, task)
    method.eval()
    images = lab.read(third.examples, range(0, 12))
    with torch.no_grad():
        old = method.network(images).double().numpy()
    method.begin_task(third)
    stage = method.stages(third)[-1]
    with torch.no_grad():  # Away from the teacher.
        for p in method.network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    method.eval()
    batch = lab.batch_of(stage.streams[0], torch.arange(12))
    with torch.no_grad():
        logits = method.network(images).double().numpy()
        found = stage.loss(batch)
    own = list(third.classes) if head == "task" else list(range(third.total))
    heads = [slice(0, 2), slice(2, 5)] if head == "task" else [slice(0, 5)]
    expected = naive(logits, old, batch.labels.tolist(), own, heads, 3.0)
    assert float(found["classification"]) == pytest.approx(expected[0], rel=1e-5)
    assert float(found["distillation"]) == pytest.approx(0.7 * expected[1], rel=1e-5)


def test_the_first_task_is_plain_training(lab):
    method = make(lab)
    (task,) = lab.make_tasks((3,))
    method.begin_task(task)
    (stage,) = method.stages(task)
    batch = lab.batch_of(stage.streams[0], torch.arange(6))
    assert list(stage.loss(batch)) == ["classification"]


def test_warm_up_changes_the_new_outputs_alone(lab):
    method = make(lab)
    first, second = lab.make_tasks((2, 3))
    lab.learn(method, first)
    method.begin_task(second)
    warmup, main = method.stages(second)
    assert (warmup.name, warmup.primary, main.primary) == ("warmup", False, True)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    loop = lab.Loop()
    loop.run(warmup)
    assert loop.trained["warmup"] == ["network.head.weight", "network.head.bias"]
    after = method.state_dict()
    for name, value in before.items():
        if name.startswith("network.head."):
            assert torch.equal(after[name][:2], value[:2])
            assert not torch.equal(after[name][2:], value[2:])
        else:
            assert torch.equal(after[name], value), name
    loop.run(main)
    assert method.network.frozen == ()
    moved = [n for n, v in method.state_dict().items() if not torch.equal(v, before[n])]
    assert any("extractors" in name for name in moved)
    assert not any(name.startswith("teacher.") for name in moved)


def test_warm_up_looks_at_new_classes_only(lab):
    method = make(lab)
    first, second = lab.make_tasks((2, 2))
    lab.learn(method, first)
    mixed = lab.make_examples([0, 2, 3, 1, 2, 3, 0])
    task = replace(second, classes=(0, 1, 2, 3), examples=mixed)
    method.begin_task(task)
    warmup, main = method.stages(task)
    assert warmup.streams[0].pool().tolist() == [1, 2, 4, 5] and len(main.streams[0]) == 7


@pytest.mark.parametrize("case", ["no epochs", "no new class", "one new class"])
def test_no_warm_up(lab, case):
    method = make(lab)
    if case == "no epochs":
        method.config = replace(method.config, warmup=replace(method.config.warmup, epochs=0))
    first, second = lab.make_tasks((2, 1 if case == "one new class" else 3))
    lab.learn(method, first)
    if case == "no new class":
        second = replace(first, index=1, known=2)
    method.begin_task(second)
    assert [stage.name for stage in method.stages(second)] == ["lwf"]


@pytest.mark.parametrize("teacher", ["augmented", "recorded"])
def test_nothing_is_left_behind(lab, teacher):
    method = make(lab, teacher=teacher)
    for task in lab.make_tasks((2, 2)):
        method.begin_task(task)
        held = method.teacher is not None, len(method.recorded)
        later = task.index == 1
        assert held == (later and teacher == "augmented", 24 * (later and teacher == "recorded"))
        method.end_task(lab.after(task))
    assert method.teacher is None and method.recorded.numel() == 0
    assert method.retained() == [] and method.keeps == "nothing"
    assert method.outputs.brought.tolist() == [2, 2]


def test_distillation_keeps_the_old_outputs(lab):
    """With a large alpha the old outputs of the new images move less than without."""
    moved = {}
    torch.manual_seed(0)
    for alpha in (0.0, 5.0):
        method = LwF(lab.shorten(LwF.Config(alpha=alpha), epochs=12, lr=0.03), lab.context)
        first, second = lab.make_tasks((3, 2))
        lab.learn(method, first)
        images = lab.read(second.examples, range(24))
        with evaluating(method), torch.no_grad():
            before = method.logits(images).softmax(1)
        lab.learn(method, second)
        with evaluating(method), torch.no_grad():
            after = method.logits(images)[:, :3].softmax(1)
        moved[alpha] = float((after - before).abs().mean())
    assert moved[5.0] < 0.7 * moved[0.0], moved


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": -1}, "alpha is -1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"head": "both"}, "head is 'both'; it must be one of all, task"),
        ({"teacher": "none"}, "teacher is 'none'; it must be one of augmented, recorded"),
    ],
)
def test_odd_settings_are_a_sentence(options, says):
    with pytest.raises(FastcilError, match=says):
        LwF.Config(**options)
