"""DER against Yan et al. 2021, written naively, and what its stages may touch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import evaluating
from fastcil.errors import FastcilError
from fastcil.methods.der import DER


def make(lab, **options):
    torch.manual_seed(0)
    config = DER.Config(**options)
    return DER(replace(lab.shorten(config), first=config.first), lab.context)


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def entropy(logits, label):
    return -np.log(np.exp(logits[label]) / np.exp(logits).sum())


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_representation_loss(lab, weight):
    method = make(lab, aux_weight=weight)
    first, second, third = lab.make_tasks((3, 2, 1))
    for task in (first, second):
        lab.learn(method, task)
        method.release()
    method.begin_task(third)
    method.double()
    stage = method.stages(third)[0]
    batch = lab.batch_of(stage.streams[0], torch.arange(0, 32, 2))
    batch = replace(batch, images=batch.images.double())
    with evaluating(method), torch.no_grad():
        u = np.concatenate(
            [e(batch.images).mean((2, 3)).numpy() for e in method.network.extractors], axis=1
        )
        losses = {k: float(v) for k, v in stage.loss(batch).items()}
    head = method.network.head.weight.detach().numpy()
    aux = method.aux_head.weight.detach().numpy()
    assert head.shape == (6, 18) and aux.shape == (2, 6)
    assert method.network.head.bias is None and method.aux_head.bias is None
    assert set(batch.labels.tolist()) > {5} and min(batch.labels.tolist()) < 5
    plain = np.mean([entropy(head @ r, y) for r, y in zip(u, batch.labels.tolist(), strict=True)])
    auxiliary = np.mean(
        [
            entropy(aux @ r[12:], 0 if y < 5 else y - 5 + 1)
            for r, y in zip(u, batch.labels.tolist(), strict=True)
        ]
    )
    assert losses["classification"] == pytest.approx(plain, rel=1e-10)
    assert losses["auxiliary"] == pytest.approx(weight * auxiliary, rel=1e-10)


def test_first_task_has_one_stage_and_no_auxiliary_head(lab):
    method = make(lab)
    (task,) = lab.make_tasks((3,))
    method.begin_task(task)
    (stage,) = method.stages(task)
    assert method.aux_head is None
    assert list(stage.loss(lab.batch_of(stage.streams[0], torch.arange(4)))) == ["classification"]
    assert method.retained() == []


def test_new_extractor_starts_as_the_last(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    old_head = method.network.head.weight.detach().clone()
    method.begin_task(second)
    old, new = method.network.extractors
    assert old is not new and same(new, snapshot(old))
    assert not torch.equal(method.network.head.weight[:3, :6], old_head)


def test_stages_train_what_they_may_and_nothing_else(lab):
    method = make(lab)
    tasks = lab.make_tasks((3, 2, 1))
    lab.learn(method, tasks[0])
    for count, task in enumerate(tasks[1:], start=1):
        method.begin_task(task)
        older = [snapshot(e) for e in list(method.network.extractors)[:count]]
        representation, classifier = method.stages(task)
        loop = lab.Loop()
        loop.run(representation)
        trained = loop.trained["representation"]
        assert {name.rsplit("layers", 1)[0] for name in trained} == {
            f"network.extractors.{count}.",
            "network.head.weight",
            "aux_head.weight",
        }
        # Bit for bit, batch-norm statistics and their counters included.
        assert all(same(e, b) for e, b in zip(list(method.network.extractors), older, strict=False))
        assert not same(method.network.extractors[count], older[-1])

        every = [snapshot(e) for e in method.network.extractors]
        learned = method.network.head.weight.detach().clone()
        loop.run(classifier)
        assert loop.trained["classifier"] == ["network.head.weight"]
        assert all(same(e, b) for e, b in zip(method.network.extractors, every, strict=True))
        assert not torch.equal(method.network.head.weight, learned)
        assert method.aux_head is None
        assert not any(m.training for e in method.network.extractors for m in e.modules())
        method.end_task(lab.after(task))


def test_newest_extractor_trains_in_training_mode(lab):
    """It is copied from one that the last task left frozen."""
    method = make(lab)
    tasks = lab.make_tasks((2, 2, 2))
    for task in tasks[:2]:
        lab.learn(method, task)
    method.begin_task(tasks[2])
    stage = method.stages(tasks[2])[0]
    lab.Loop().begin(stage)
    modes = [e.layers[1].training for e in method.network.extractors]
    assert modes == [False, False, True]
    assert all(p.requires_grad for p in method.network.extractors[2].parameters())


def test_classifier_loss_divides_by_temperature(lab):
    method = make(lab, temperature=5.0)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.begin_task(second)
    stage = method.stages(second)[1]
    lab.Loop().begin(stage)
    method.double()
    batch = lab.batch_of(stage.streams[0], torch.arange(0, 36, 6))
    batch = replace(batch, images=batch.images.double())
    with torch.no_grad():
        logits = method.logits(batch.images).numpy()
        (loss,) = stage.loss(batch).values()
    expected = np.mean(
        [entropy(z / 5.0, y) for z, y in zip(logits, batch.labels.tolist(), strict=True)]
    )
    assert float(loss) == pytest.approx(expected, rel=1e-10)


def test_classifier_begins_with_a_fresh_head(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.begin_task(second)
    before = method.network.head.weight
    values = before.detach().clone()
    method.stages(second)[1].begin()
    assert method.network.head.weight is before
    assert not (before == values).any()


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_heads_are_redrawn_when_warmup_ends(lab, warmup):
    method = make(lab)
    recipe = replace(method.config.representation, warmup=warmup, epochs=4)
    method.config = replace(method.config, representation=recipe)
    first, second = lab.make_tasks((3, 2))
    for task in (first, second):
        method.begin_task(task)
        stage = method.stages(task)[0]
        heads = [method.network.head]
        if method.aux_head is not None:
            heads.append(method.aux_head)
        identity = [h.weight for h in heads]
        for epoch in range(4):
            before = [h.weight.detach().clone() for h in heads]
            for call in stage.before_epoch:
                call(epoch)
            changed = [not torch.equal(h.weight, b) for h, b in zip(heads, before, strict=True)]
            assert changed == [warmup > 0 and epoch == warmup] * len(heads)
        assert all(h.weight is p for h, p in zip(heads, identity, strict=True))
        method.end_task(lab.after(task))


def test_classifier_subset_is_balanced(lab):
    method = make(lab)
    tasks = lab.make_tasks((5, 3, 1))
    for task in tasks:
        method.begin_task(task)
        if task.first:
            continue
        stream = method.stages(task)[1].streams[0]
        labels = torch.cat([part.labels for part in stream.parts])
        assert Counter(labels[stream.subset].tolist()) == dict.fromkeys(range(task.total), 4)
        assert len(stream) == 4 * task.total
        assert stream.subset.unique().numel() == len(stream)


def test_retained_networks(lab):
    method = make(lab)
    tasks = lab.make_tasks((2, 2, 2))
    size = None
    for index, task in enumerate(tasks):
        lab.learn(method, task)
        method.release()
        if size is None:
            tensors = method.network.extractors[0].state_dict().values()
            size = sum(t.numel() * t.element_size() for t in tensors)
        entries = method.retained()
        assert [e.kind for e in entries] == ["network"] * index
        assert [e.nbytes for e in entries] == [size] * index
        assert len({e.name for e in entries}) == index


def test_published_schedules():
    cifar, imagenet = DER.Config().representation, DER.PRESETS["imagenet"].representation
    drops = [e for e in range(1, 170) if cifar.lr_at(e) < 0.5 * cifar.lr_at(e - 1)]
    assert drops == [110, 130]
    drops = [e for e in range(1, 220) if imagenet.lr_at(e) < 0.5 * imagenet.lr_at(e - 1)]
    assert drops == [80, 140, 180, 200]


def test_pycils_form(lab):
    """Heads with a bias, H copied, recipes of its own, and aligned weights at the end of a task."""
    pycil = DER.PRESETS["pycil"]
    assert [round(pycil.first.lr_at(e), 6) for e in (59, 60, 120, 170)] == [0.1, 0.01, 1e-3, 1e-4]
    later = pycil.representation
    assert [round(later.lr_at(e), 6) for e in (0, 79, 80, 120, 150)] == [0.1, 0.1, 0.01, 1e-3, 1e-4]
    assert (pycil.first.epochs, later.epochs, later.weight_decay) == (200, 170, 2e-4)
    torch.manual_seed(0)
    method = DER(lab.shorten(pycil), lab.context)
    first, second, third = lab.make_tasks((3, 2, 1))
    for task in (first, second, third):
        old = method.network.head.state_dict() if not task.first else {}
        old = {name: value.clone() for name, value in old.items()}
        method.begin_task(task)
        head = method.network.head
        if old:
            rows, columns = old["weight"].shape
            assert torch.equal(head.weight[:rows, :columns], old["weight"])
            assert torch.equal(head.bias[:rows], old["bias"]) and method.aux_head.bias is not None
        (stage,) = method.stages(task)
        assert stage.recipe == (method.config.first if task.first else method.config.representation)
        finish, stage.finish = stage.finish, None
        lab.Loop().run(stage)
        before = {k: v.clone() for k, v in head.state_dict().items()}
        finish()
        lengths = before["weight"].double().pow(2).sum(1).sqrt().numpy()
        gamma = 1.0 if task.first else lengths[: task.known].mean() / lengths[task.known :].mean()
        assert task.first or abs(gamma - 1) > 1e-3
        expected = before["weight"].double().numpy()
        expected[task.known :] *= gamma
        np.testing.assert_allclose(head.weight.detach().double().numpy(), expected, rtol=1e-5)
        assert torch.equal(head.bias, before["bias"]) and method.aux_head is None
        method.end_task(lab.after(task))
        method.release()


def test_without_a_recipe_of_its_own_the_first_task_has_that_of_all(lab):
    method = make(lab)
    (task,) = lab.make_tasks((3,))
    method.begin_task(task)
    assert method.stages(task)[0].recipe == method.config.representation
    with pytest.raises(FastcilError, match=r"classifier\.epochs is 0"):
        DER.Config(classifier=replace(DER.Config().classifier, epochs=0))
    assert DER.Config(classifier=replace(DER.Config().classifier, epochs=0), balance="weights")
