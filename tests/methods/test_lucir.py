"""LUCIR against Hou et al. 2019, written naively."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import evaluating, total
from fastcil.methods.lucir import LUCIR

TERMS = {"classification", "distillation", "ranking"}


def make(lab, seed=0, **options):
    torch.manual_seed(seed)
    config = lab.shorten(LUCIR.Config(**options), epochs=2)
    return LUCIR(config, lab.context)


def second_task(lab, sizes=(3, 2), kept=4, **options):
    """A float64 method somewhere in the first stage of its second task, and a batch of all."""
    method = make(lab, **options)
    first, second = lab.make_tasks(sizes, kept=kept)
    lab.learn(method, first)
    method.release()
    method.begin_task(second)
    method.double()
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
        method.network.head.sigma.fill_(3.0)
    stage = method.stages(second)[0]
    everything = len(stage.streams[0])
    batch = lab.batch_of(stage.streams[0], torch.arange(0, everything, 3))
    return method, second, stage, replace(batch, images=batch.images.double())


def values(method, images):
    """Features of new and old network and all rows, as lists of float64."""
    with evaluating(method), torch.no_grad():
        new = method.network.features(images).tolist()
        old = method.teacher.features(images).tolist()
    rows = [*method.network.head.old.tolist(), *method.network.head.new.tolist()]
    return new, old, rows


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def loss_of(method, stage, batch):
    with evaluating(method), torch.no_grad():
        return {name: float(value) for name, value in stage.loss(batch).items()}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((3, 2), {}),
        ((2, 4), {"lambda_base": 10.0, "margin": 0.2, "hardest": 3}),
        ((4, 1), {"ranking_weight": 2.0}),  # fewer new classes than K
    ],
)
def test_every_term(lab, sizes, options):
    method, _, stage, batch = second_task(lab, sizes, **options)
    losses = loss_of(method, stage, batch)
    known, new = sizes
    features, before, rows = values(method, batch.images)
    margin, hardest = options.get("margin", 0.5), min(options.get("hardest", 2), new)
    entropy, apart, ranked = 0.0, 0.0, []
    for f, f_old, y in zip(features, before, batch.labels.tolist(), strict=True):
        cosines = [cosine(f, w) for w in rows]
        z = [3.0 * c for c in cosines]
        entropy -= z[y] - math.log(sum(math.exp(v) for v in z))
        apart += 1 - cosine(f, f_old)
        if y < known:
            rivals = sorted(cosines[known:], reverse=True)[:hardest]
            ranked += [max(0.0, margin - cosines[y] + c) for c in rivals]
    lam = options.get("lambda_base", 5.0) * math.sqrt(known / new)
    assert losses.keys() == TERMS
    assert losses["classification"] == pytest.approx(entropy / len(batch), rel=1e-6)
    assert losses["distillation"] == pytest.approx(lam * apart / len(batch), rel=1e-6)
    expected = options.get("ranking_weight", 1.0) * sum(ranked) / len(ranked)
    assert losses["ranking"] == pytest.approx(expected, rel=1e-6)
    assert losses["ranking"] > 0 and losses["distillation"] > 0
    if margin == 0.2:
        assert 0 < sum(value == 0 for value in ranked) < len(ranked)


def test_only_old_classes_are_ranked(lab):
    method, _, stage, batch = second_task(lab)
    new = batch.labels >= 3
    alone = replace(
        batch,
        images=batch.images[new],
        labels=batch.labels[new],
        part=batch.part[new],
        index=batch.index[new],
    )
    losses = loss_of(method, stage, alone)
    assert losses["ranking"] == 0 and losses.keys() == TERMS
    # A new image of an old class counts as one.
    assert loss_of(method, stage, replace(batch, part=torch.zeros_like(batch.part))) == (
        loss_of(method, stage, batch)
    )


def test_distillation_of_logits(lab):
    method, _, stage, batch = second_task(
        lab, distillation="logits", ranking_weight=0.0, temperature=3.0, logits_weight=0.5
    )
    losses = loss_of(method, stage, batch)
    with evaluating(method), torch.no_grad():
        old, new = method.teacher(batch.images).numpy(), method.network(batch.images).numpy()
    expected = 0.0
    for z_old, z in zip(old, new[:, :3], strict=True):
        p = np.exp(z_old / 3) / np.exp(z_old / 3).sum()
        q = np.exp(z / 3) / np.exp(z / 3).sum()
        expected -= (p * np.log(q)).sum()
    assert losses.keys() == {"classification", "distillation"}
    assert losses["distillation"] == pytest.approx(0.5 * 9 * expected / len(batch), rel=1e-6)


def test_the_first_task_has_cross_entropy_alone(lab):
    method = make(lab)
    (task,) = lab.make_tasks((3,))
    method.begin_task(task)
    (stage,) = method.stages(task)
    batch = lab.batch_of(stage.streams[0], torch.arange(0, 36, 5))
    assert loss_of(method, stage, batch).keys() == {"classification"}
    assert {id(p) for p in stage.parameters()} == {
        id(p) for p in method.network.parameters() if p is not method.network.head.old
    }


@pytest.mark.parametrize("transfer", [False, True])
def test_new_rows_are_imprinted(lab, transfer):
    method = make(lab, transfer=transfer)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    before = method.network.head.weight.detach().clone()
    method.begin_task(second)
    head = method.network.head
    assert torch.equal(head.old, before) and len(head.new) == 2
    norm = float(before.norm(dim=1).mean())
    images = lab.read(second.examples, range(len(second.examples)))
    with evaluating(method), torch.no_grad():
        features = method.network.features(images).double().numpy()
    for label in (3, 4):
        mean = np.zeros(6)
        for f, y in zip(features, second.examples.labels.tolist(), strict=True):
            if y == label:
                mean += f / np.linalg.norm(f)
        expected = norm * mean / np.linalg.norm(mean)
        np.testing.assert_allclose(head.new[label - 3].detach().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("classes", [(0, 1, 2), (1,)])
def test_new_images_of_known_classes(lab, classes):
    """Nothing to rank, all rows train, and lambda counts the classes that came."""
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    again = replace(
        second,
        classes=classes,
        known=3,
        examples=lab.make_examples([c for c in classes for _ in range(6)], seed=4),
    )
    method.begin_task(again)
    head = method.network.head
    rows = head.weight.detach().clone()
    assert (len(head.old), len(head.new)) == (3, 0)
    (stage,) = method.stages(again)
    with torch.no_grad():
        for parameter in method.network.extractors.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    batch = lab.batch_of(stage.streams[0], torch.arange(len(stage.streams[0])))
    features, before, _ = values(method, batch.images)
    losses = loss_of(method, stage, batch)
    apart = [1 - cosine(f, g) for f, g in zip(features, before, strict=True)]
    lam = 5 * math.sqrt(3 / len(classes))
    assert losses.keys() == {"classification", "distillation"}
    assert losses["distillation"] == pytest.approx(lam * sum(apart) / len(apart), rel=1e-4)
    loop = lab.Loop()
    loop.run(stage)
    assert all(np.isfinite(loop.losses["lucir"]))
    assert (head.old != rows).any(1).all()
    method.end_task(replace(again, exemplars=lab.after(first).exemplars))
    assert method.nearest.means.shape == (3, 6)


def test_new_and_known_classes_together(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    labels = [1, 1, 1, 3, 3, 3, 4, 4, 4]
    mixed = replace(second, classes=(1, 3, 4), examples=lab.make_examples(labels))
    method.begin_task(mixed)
    images = lab.read(mixed.examples, range(3, 6))
    with evaluating(method), torch.no_grad():
        mean = torch.nn.functional.normalize(method.network.features(images), dim=1).mean(0)
    torch.testing.assert_close(
        torch.nn.functional.normalize(method.network.head.new[0], dim=0),
        torch.nn.functional.normalize(mean, dim=0),
    )
    loop = lab.Loop()
    loop.run(method.stages(mixed)[0])
    assert all(np.isfinite(loop.losses["lucir"]))


def test_a_step_is_differentiated_by_the_images(lab):
    """Through a step of all that trains of the extractor, against finite differences."""
    for options in ({}, {"transfer": True}, {"distillation": "logits"}):
        method, _, stage, batch = second_task(lab, **options)
        method.eval()
        theta = {
            name: p.detach().requires_grad_()
            for name, p in method.named_parameters()
            if name.startswith("network.extractors")
        }

        def outer(strength, stage=stage, batch=batch, theta=theta):
            images = batch.images * (1 + strength * batch.images.sin())
            losses = stage.loss(replace(batch, images=images), theta)
            slopes = torch.autograd.grad(total(losses), list(theta.values()), create_graph=True)
            stepped = {
                k: v.detach() - 0.01 * g for (k, v), g in zip(theta.items(), slopes, strict=True)
            }
            logits = stage.call(stage.logits, batch.images, parameters=stepped)
            return torch.nn.functional.cross_entropy(logits, batch.labels)

        strength = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(outer(strength), strength)
        step = 1e-5
        ahead, behind = (outer(torch.tensor(s, dtype=torch.float64)) for s in (step, -step))
        expected = float((ahead - behind).detach()) / (2 * step)
        assert abs(expected) > 1e-8
        assert float(slope) == pytest.approx(expected, rel=1e-2)


def test_readouts(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    for task in (first, second):
        lab.learn(method, task)
    images = lab.read(second.examples, range(5))
    assert list(method.readouts()) == ["linear", "nme"]
    with evaluating(method), torch.no_grad():
        assert torch.equal(method(images), method.network(images))
        scores = method.readouts()["nme"](images)
        features = torch.nn.functional.normalize(method.network.features(images), dim=1)
    expected = -(features[:, None] - method.nearest.means).square().sum(2)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    method.end_task(replace(second, exemplars=second.examples.select([])))
    assert list(method.readouts()) == ["linear"]


def test_recipes_follow_the_presets():
    default, presets = LUCIR.Config(), LUCIR.PRESETS
    rates = [default.later.lr_at(e) for e in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (default.first.epochs, default.first.weight_decay, default.first.batch_size) == (
        160,
        5e-4,
        128,
    )
    imagenet = presets["imagenet"]
    rates = [imagenet.later.lr_at(e) for e in (0, 29, 30, 59, 60, 89)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (imagenet.later.weight_decay, imagenet.lambda_base, imagenet.finetune) == (
        1e-4,
        10,
        False,
    )
    large = presets["imagenet-1000"]
    assert large.finetune and large.later == imagenet.later
    assert [large.finetuning.lr_at(e) for e in (0, 9, 10, 19)] == pytest.approx(
        [0.01, 0.01, 0.001, 0.001]
    )
    assert (large.finetuning.epochs, large.finetuning.weight_decay) == (20, 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation": "maps"}, "distillation is 'maps'"),
        ({"hardest": 0}, "hardest is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"lambda_base": -1.0}, "lambda_base is -1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        LUCIR.Config(**options)
