"""WA against Zhao et al. 2020, written naively."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import evaluating
from fastcil.methods.wa import WA
from fastcil.nn.heads import aligning_factor


def make(lab, **options):
    torch.manual_seed(0)
    return WA(lab.shorten(WA.Config(**options), epochs=2), lab.context)


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def ready(lab, method, sizes=(3, 2)):
    """The method in float64 at the start of its last task, its stage and a batch of both parts."""
    tasks = lab.make_tasks(sizes)
    for task in tasks[:-1]:
        lab.learn(method, task)
        method.release()
    task = tasks[-1]
    method.begin_task(task)
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    method.double()
    (stage,) = method.stages(task)
    count = len(stage.streams[0])
    batch = lab.batch_of(stage.streams[0], torch.arange(0, count, 5))
    assert {0, 1} == set(batch.part.tolist())
    return task, stage, replace(batch, images=batch.images.double())


@pytest.mark.parametrize(
    ("options", "sizes", "share"),
    [
        ({}, (3, 2), 3 / 5),
        ({"temperature": 3.0}, (3, 2), 3 / 5),
        ({"bias": True}, (2, 2, 1), 4 / 5),
    ],
    ids=str,
)
def test_loss(lab, options, sizes, share):
    method = make(lab, **options)
    task, stage, batch = ready(lab, method, sizes)
    with evaluating(method), torch.no_grad():
        new = method.network(batch.images).numpy()
        old = method.teacher(batch.images).numpy()
        losses = {k: float(v) for k, v in stage.loss(batch).items()}
    known, t = task.known, options.get("temperature", 2.0)
    assert old.shape[1] == known
    entropy = [-np.log(softmax(z)[y]) for z, y in zip(new, batch.labels.tolist(), strict=True)]
    taught = [
        -(softmax(q / t) * np.log(softmax(z[:known] / t))).sum()
        for z, q in zip(new, old, strict=True)
    ]
    assert losses == pytest.approx(
        {
            "classification": (1 - share) * np.mean(entropy),
            "distillation": share * np.mean(taught),
        },
        rel=1e-10,
    )


def test_the_first_task_is_plain_cross_entropy(lab):
    method = make(lab)
    (task,) = lab.make_tasks((3,))
    method.begin_task(task)
    (stage,) = method.stages(task)
    batch = lab.batch_of(stage.streams[0], torch.arange(0, 36, 5))
    with evaluating(method), torch.no_grad():
        rows = method.network(batch.images).double().numpy()
        losses = stage.loss(batch)
    expected = np.mean(
        [-np.log(softmax(z)[y]) for z, y in zip(rows, batch.labels.tolist(), strict=True)]
    )
    assert list(losses) == ["classification"]
    assert float(losses["classification"]) == pytest.approx(expected, rel=1e-5)


def test_known_classes_are_learned_from_their_labels(lab):
    """A data-incremental task: all classes are old, yet cross-entropy counts."""
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    again = replace(second, known=3, classes=(0, 1), examples=first.examples)
    method.begin_task(again)
    (stage,) = method.stages(again)
    batch = lab.batch_of(stage.streams[0], torch.arange(6))
    rows = method.network.head.weight.detach().clone()
    with evaluating(method), torch.no_grad():
        losses = stage.loss(batch)
        z = method.network(batch.images)
    entropy = torch.nn.functional.cross_entropy(z, batch.labels)
    assert float(losses["classification"]) == pytest.approx(float(entropy) * 2 / 5, rel=1e-6)
    stage.finish()
    assert torch.equal(method.network.head.weight, rows)


@pytest.mark.parametrize("bias", [False, True])
def test_alignment(lab, bias):
    method = make(lab, bias=bias, clamp=False)
    tasks = lab.make_tasks((3, 2, 1))
    for task in tasks:
        method.begin_task(task)
        (stage,) = method.stages(task)
        stage.begin = None
        finish, stage.finish = stage.finish, None
        lab.Loop().run(stage)
        before = {k: v.clone() for k, v in method.network.state_dict().items()}
        finish()
        weight = before.pop("head.weight").double().numpy()
        after = method.network.state_dict()
        found = after.pop("head.weight").double().numpy()
        assert all(torch.equal(v, before[k]) for k, v in after.items())
        assert ("head.bias" in after) == bias
        lengths = np.sqrt((weight**2).sum(1))
        gamma = 1.0
        if not task.first:
            gamma = lengths[: task.known].mean() / lengths[task.known :].mean()
            assert abs(gamma - 1) > 1e-3
        np.testing.assert_allclose(found[: task.known], weight[: task.known], rtol=0)
        np.testing.assert_allclose(found[task.known :], gamma * weight[task.known :], rtol=1e-5)
        method.end_task(lab.after(task))


def test_rows_of_zeros_are_left_alone():
    assert aligning_factor(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), known=1) == 1.0


def test_the_aligned_network_is_the_next_teacher(lab):
    method = make(lab)
    first, second, third = lab.make_tasks((3, 2, 1))
    for task in (first, second):
        lab.learn(method, task)
    aligned = method.network.head.weight.detach().clone()
    method.begin_task(third)
    assert torch.equal(method.teacher.head.weight, aligned)
    assert torch.equal(method.network.head.weight[:5], aligned)
    assert torch.equal(method.taught_gamma, torch.ones(5))


def test_weights_are_clamped_after_every_step(lab):
    for clamp in (True, False):
        method = make(lab, clamp=clamp)
        (task,) = lab.make_tasks((3,))
        method.begin_task(task)
        (stage,) = method.stages(task)
        loop = lab.Loop()
        loop.begin(stage)
        seen = []
        for positions in torch.arange(36).split(12):
            before = loop.optimizer
            losses = stage.step([lab.batch_of(stage.streams[0], positions)], loop)
            assert loop.optimizer is before and not losses["classification"].requires_grad
            seen.append(method.network.head.weight.min().item())
        assert all(value >= 0 for value in seen) == clamp
        assert (method.network.extractors[0].layers[0].weight < 0).any()


def test_clamped_step_is_the_plain_one_and_a_clamp(lab):
    methods = [make(lab, clamp=clamp) for clamp in (True, False)]
    (task,) = lab.make_tasks((3,))
    for method in methods:
        torch.manual_seed(1)
        method.begin_task(task)
        (stage,) = method.stages(task)
        loop = lab.Loop()
        loop.begin(stage)
        stage.step([lab.batch_of(stage.streams[0], torch.arange(0, 36, 3))], loop)
    clamped, plain = (m.network.head.weight for m in methods)
    assert torch.equal(clamped, plain.clamp(min=0)) and not torch.equal(clamped, plain)


def test_scaled_logits(lab):
    """Rows stay; the newest classes' logits are scaled at test and in the teacher."""
    method = make(lab, scale="logits")
    tasks = lab.make_tasks((3, 2, 1))
    for task in tasks[:2]:
        lab.learn(method, task)
    rows = method.network.head.weight.detach()
    lengths = rows.norm(dim=1)
    gamma = lengths[:3].mean() / lengths[3:].mean()
    scale = torch.cat([torch.ones(3), gamma.repeat(2)])
    images = lab.read(tasks[1].examples, range(4))
    with evaluating(method), torch.no_grad():
        plain = method.network(images)
        torch.testing.assert_close(method.logits(images), plain * scale)
        torch.testing.assert_close(method(images), plain * scale)
    method.begin_task(tasks[2])
    torch.testing.assert_close(method.taught_gamma, scale)
    assert torch.equal(method.gamma, torch.ones(6))
    assert torch.equal(method.network.head.weight[:5], rows)
    (stage,) = method.stages(tasks[2])
    batch = lab.batch_of(stage.streams[0], torch.arange(0, 32, 5))
    with evaluating(method), torch.no_grad():
        taught = (method.teacher(batch.images) * scale / 2).softmax(1)
        own = (method.network(batch.images)[:, :5] / 2).log_softmax(1)
        found = stage.loss(batch)["distillation"]
    expected = -(taught * own).sum(1).mean() * 5 / 6
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_readouts(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    for task in (first, second):
        lab.learn(method, task)
    assert list(method.readouts()) == ["linear", "nme"]
    exemplars = lab.after(second).exemplars
    images = lab.read(second.examples, range(6))
    with evaluating(method), torch.no_grad():
        unit = method.network.features(lab.read(exemplars, range(len(exemplars)))).double()
        unit = unit / unit.norm(dim=1, keepdim=True)
        means = torch.stack([unit[exemplars.labels == c].sum(0) for c in range(5)])
        means = means / means.norm(dim=1, keepdim=True)
        features = method.network.features(images).double()
        features = features / features.norm(dim=1, keepdim=True)
        scores = method.readouts()["nme"](images)
    expected = -((features[:, None] - means) ** 2).sum(2)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)
    assert [entry.nbytes for entry in method.retained()] == [4 * 5 * 6, 4 * 5]
    method.end_task(second)
    method.end_task(replace(second, exemplars=second.exemplars.select([])))
    assert list(method.readouts()) == ["linear"]


def test_published_schedules():
    paper, pycil = WA.Config().later, WA.PRESETS["pycil"].later
    assert [e for e in range(1, 250) if paper.lr_at(e) < paper.lr_at(e - 1)] == [100, 150, 200]
    assert [e for e in range(1, 170) if pycil.lr_at(e) < pycil.lr_at(e - 1)] == [60, 100, 140]
    assert (pycil.epochs, pycil.batch_size, pycil.weight_decay) == (170, 128, 2e-4)
    assert (paper.epochs, paper.batch_size) == (250, 32)
