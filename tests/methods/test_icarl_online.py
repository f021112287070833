"""The online form of iCaRL against its equations, written naively."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import evaluating
from fastcil.methods.icarl import ICaRL


def make(lab, **options):
    torch.manual_seed(0)
    return ICaRL(lab.shorten(ICaRL.Config(form="online", **options), epochs=1), lab.context)


def softmax(row):
    return np.exp(row) / np.exp(row).sum()


@pytest.mark.parametrize("reg", [1.0, 0.3])
def test_loss(lab, reg):
    """Three tasks of 2, 3 and 2 classes: the divergence is summed over the first two."""
    method = make(lab, reg=reg)
    tasks = lab.make_tasks((2, 3, 2))
    for task in tasks[:2]:
        lab.learn(method, task)
        method.release()
    method.begin_task(tasks[2])
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    method.double()
    (stage,) = method.stages(tasks[2])
    new, old = stage.streams
    drawn = old.pool()
    images = torch.cat([torch.arange(0, len(tasks[2].examples), 3), drawn])
    batch = lab.batch_of(old, images)
    batch = replace(batch, images=batch.images.double())
    with evaluating(method), torch.no_grad():
        z = method.network(batch.images).numpy()
        q = method.teacher(batch.images).numpy()
        losses = {k: float(v) for k, v in stage.loss(batch).items()}
    entropy, divergence, count = 0.0, 0.0, 0
    for row, old_row, label, part in zip(
        z, q, batch.labels.tolist(), batch.part.tolist(), strict=True
    ):
        if part == 0:
            entropy -= np.log(softmax(row[5:7])[label - 5])
            count += 1
            continue
        first, end = (0, 2) if label < 2 else (2, 5)
        p, found = softmax(old_row[first:end]), softmax(row[first:end])
        divergence += (p * np.log(p / found)).sum() / (end - first)  # one exemplar of each class
    assert sorted(batch.labels[batch.part == 1].tolist()) == [0, 1, 2, 3, 4]
    assert (new.batch_size, old.batch_size, count) == (16, 5, 8)
    assert losses["classification"] == pytest.approx(entropy / count, rel=1e-9)
    assert losses["distillation"] == pytest.approx(reg * divergence, rel=1e-6)


def test_every_step_draws_other_exemplars(lab):
    method = make(lab)
    first, second = lab.make_tasks((2, 2))
    lab.learn(method, first)
    method.begin_task(second)
    (stage,) = method.stages(second)
    loop, seen = lab.Loop(), []
    step = stage.step

    def watch(batches, stepper):
        old = batches[1]
        assert sorted(old.labels.tolist()) == [0, 1] and old.part.tolist() == [1, 1]
        seen.append(tuple(sorted(old.index.tolist())))
        return step(batches, stepper)

    stage.step = watch
    stage.recipe = replace(stage.recipe, epochs=12, batch_size=8)
    loop.run(stage)
    assert len(seen) == 24 and len(set(seen)) > 8, "four exemplars of each class: 16 pairs"


def test_without_exemplars_there_is_only_the_cross_entropy(lab):
    method = make(lab)
    first, second = lab.make_tasks((2, 3), kept=0)
    lab.learn(method, first)
    method.begin_task(second)
    (stage,) = method.stages(second)
    assert len(stage.streams) == 1
    batch = lab.batch_of(stage.streams[0], torch.arange(4))
    with evaluating(method), torch.no_grad():
        losses = stage.loss(batch)
    assert float(losses["distillation"]) == 0 < float(losses["classification"])


def test_herding_looks_at_the_logits_of_the_task(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    images = lab.read(second.examples, range(6))
    with evaluating(method), torch.no_grad():
        assert torch.equal(method.embed(images), method.logits(images))
    lab.learn(method, second)
    with evaluating(method), torch.no_grad():
        logits, seen = method.logits(images), method.embed(images)
    assert torch.equal(seen[:, 3:], logits[:, 3:]) and not seen[:, :3].any()
    again = replace(second, index=2, classes=(0, 3), known=5)
    method.begin_task(again)
    with evaluating(method), torch.no_grad():
        assert torch.equal(method.embed(images), method.logits(images)), "no class is new"


def test_its_readout_is_the_nearest_mean_within_the_task(lab):
    method = make(lab)
    tasks = lab.make_tasks((3, 2))
    for task in tasks:
        lab.learn(method, task)
    held = lab.after(tasks[1]).exemplars
    images = lab.read(tasks[1].examples, range(5))
    with evaluating(method), torch.no_grad():
        mine = method.logits(lab.read(held, range(len(held))))
        seen, scores = method.logits(images), method.readouts()["nme"](images)
    assert list(method.readouts()) == ["nme", "linear"]
    for y in range(5):
        own = slice(0, 3) if y < 3 else slice(3, 5)
        mean = mine[held.labels == y].mean(0)[own]
        expected = -(seen[:, own] - mean).square().sum(1)
        torch.testing.assert_close(scores[:, y], expected, rtol=1e-4, atol=1e-4)


def test_presets_are_those_of_appendix_e():
    rates = {"samc-cifar10": 0.1, "samc-cifar100": 1.0, "samc-mini": 1.0}
    for name, rate in rates.items():
        config = ICaRL.PRESETS[name]
        assert (config.form, config.reg) == ("online", 1.0)
        for recipe in (config.first, config.later):
            assert (recipe.lr, recipe.epochs, recipe.batch_size) == (rate, 1, 10)
            assert (recipe.momentum, recipe.weight_decay, recipe.schedule) == (0, 0, "constant")
