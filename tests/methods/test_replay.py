"""finetune, joint and er: what they train on, and their cross-entropy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import Batch, lookup


def naive_cross_entropy(logits, labels):
    """-1/N sum log softmax, in float64 and loops."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        total -= row[label] - np.log(sum(np.exp(v) for v in row))
    return total / len(labels)


@pytest.mark.parametrize("name", ["finetune", "joint", "er"])
def test_loss_is_cross_entropy_of_all_known_classes(lab, name):
    cls = lookup("method", name)
    method = cls(lab.shorten(cls.Config()), lab.context)
    for task in lab.make_tasks((2, 3)):
        method.begin_task(task)
        (stage,) = method.stages(task)
        batch = Batch.cat([lab.batch_of(s, torch.arange(4)) for s in stage.streams])
        method.eval()
        with torch.no_grad():
            logits = method.logits(batch.images).double().numpy()
            (loss,) = stage.loss(batch).values()
        assert logits.shape[1] == task.total
        assert float(loss) == pytest.approx(naive_cross_entropy(logits, batch.labels), rel=1e-5)


@pytest.mark.parametrize("name", ["finetune", "er"])
def test_a_head_for_each_task(lab, name):
    """The cross-entropy of each image over the classes that arrived with its own."""
    cls = lookup("method", name)
    method = cls(lab.shorten(cls.Config(head="task")), lab.context)
    for task in lab.make_tasks((2, 3)):
        method.begin_task(task)
    (stage,) = method.stages(task)
    batch = Batch.cat([lab.batch_of(s, s.pool()[::4]) for s in stage.streams])
    method.eval()
    with torch.no_grad():
        logits = method.logits(batch.images).double().numpy()
        (loss,) = stage.loss(batch).values()
    old = batch.labels < 2
    terms = [
        naive_cross_entropy(logits[mine][:, first:last], batch.labels[mine] - first) * mine.sum()
        for mine, first, last in ((old.numpy(), 0, 2), (~old.numpy(), 2, 5))
        if mine.any()
    ]
    assert old.any() == (name == "er")
    assert float(loss) == pytest.approx(sum(terms) / len(batch), rel=1e-5)


def test_finetune_sees_new_data_only(lab):
    cls = lookup("method", "finetune")
    config = lab.shorten(cls.Config())
    config = replace(config, later=replace(config.later, batch_size=7))
    method = cls(config, lab.context)
    first, second = lab.make_tasks((2, 3))
    lab.learn(method, first)
    head = method.network.head.weight.detach().clone()
    method.begin_task(second)
    assert torch.equal(method.network.head.weight[:2], head)
    (stage,) = method.stages(second)
    assert stage.streams[0].parts == (second.examples,)
    assert stage.streams[0].batch_size == stage.recipe.batch_size == 7


@pytest.mark.parametrize("fresh", [True, False])
def test_joint_starts_anew(lab, fresh):
    cls = lookup("method", "joint")
    method = cls(lab.shorten(cls.Config(fresh=fresh)), lab.context)
    first, second = lab.make_tasks((2, 3))
    lab.learn(method, first)
    old = method.network
    before = {k: v.clone() for k, v in old.extractors.state_dict().items()}
    method.begin_task(second)
    (stage,) = method.stages(second)
    assert stage.streams[0].parts == (second.examples, second.exemplars)
    now = method.network.extractors.state_dict()
    assert all(torch.equal(now[k], v) for k, v in before.items()) is not fresh
    assert (method.network is old) is not fresh
    assert method.network.head.classes == 5


def test_er_joins_a_batch_of_new_data_and_one_of_exemplars(lab):
    cls = lookup("method", "er")
    method = cls(lab.shorten(cls.Config(), batch=6), lab.context)
    first, second = lab.make_tasks((2, 3))
    method.begin_task(first)
    (stage,) = method.stages(first)
    assert len(stage.streams) == 1
    method.begin_task(second)
    (stage,) = method.stages(second)
    new, replayed = stage.streams
    assert (new.batch_size, replayed.batch_size) == (6, 6)
    assert (len(new), len(replayed)) == (len(second.examples), len(second.exemplars))
    drawn = lab.batch_of(replayed, replayed.subset)
    assert torch.equal(drawn.labels, second.exemplars.labels)
    assert drawn.part.unique().tolist() == [1]
    assert torch.equal(drawn.index, torch.arange(len(second.exemplars)))
    assert torch.equal(drawn.images, lab.read(second.exemplars, range(len(second.exemplars))))
    fresh = lab.batch_of(new, torch.arange(len(new)))
    assert fresh.part.unique().tolist() == [0]


def test_er_replays_as_many_as_it_is_told(lab):
    cls = lookup("method", "er")
    method = cls(lab.shorten(cls.Config(replay_batch=20), batch=6), lab.context)
    for task in lab.make_tasks((2, 3), kept=12):
        method.begin_task(task)
    new, replayed = method.stages(task)[0].streams
    assert (new.batch_size, replayed.batch_size) == (6, 20)


def test_er_weighs_memory_as_new_data(lab):
    """The joined mean equals the mean of both batches' means, whatever memory's size."""
    cls = lookup("method", "er")
    method = cls(lab.shorten(cls.Config(), batch=6), lab.context)
    tasks = lab.make_tasks((2, 3), kept=3)
    for task in tasks:
        method.begin_task(task)
    (stage,) = method.stages(tasks[1])
    method.eval()
    new = lab.batch_of(stage.streams[0], torch.arange(0, 36, 6))
    old = lab.batch_of(stage.streams[1], stage.streams[1].subset[:6])
    each = [float(stage.loss(b)["classification"].detach()) for b in (new, old)]
    both = float(stage.loss(Batch.cat([new, old]))["classification"].detach())
    assert both == pytest.approx(sum(each) / 2, rel=1e-5)
