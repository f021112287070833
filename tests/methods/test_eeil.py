"""EEIL against Castro et al. 2018, written naively."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import evaluating
from fastcil.errors import FastcilError
from fastcil.memory import herding
from fastcil.methods.eeil import EEIL
from fastcil.nn import distillation_by_layer

SIZES = (2, 3, 1, 2)
LAYERS = {0: (0, 2), 1: (2, 5), 2: (5, 6), 3: (6, 8)}


def make(lab, **options):
    torch.manual_seed(0)
    return EEIL(lab.shorten(EEIL.Config(**options), epochs=1), lab.context)


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def distilled(new, old, layers, t):
    """Mean over the batch of the sum over layers (Eqs. 1, 2)."""
    terms = []
    for z, q in zip(new, old, strict=True):
        total = 0.0
        for start, stop in layers:
            p, own = softmax(q[start:stop] / t), softmax(z[start:stop] / t)
            total -= (p * np.log(own)).sum()
        terms.append(total)
    return np.mean(terms)


def entropy(rows, labels):
    return np.mean([-np.log(softmax(z)[y]) for z, y in zip(rows, labels.tolist(), strict=True)])


def at_last_task(lab, number, **options):
    """A float64 method in the middle of a stage of its fourth task, and a batch."""
    method = make(lab, **options)
    *before, task = lab.make_tasks(SIZES)
    for earlier in before:
        lab.learn(method, earlier)
        method.release()
    method.begin_task(task)
    loop = lab.Loop()
    if number:
        loop.run(method.stages(task)[0])
    stage = method.stages(task)[number]
    loop.begin(stage)
    method.double()
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    pool = stage.streams[0].pool()
    batch = lab.batch_of(stage.streams[0], pool[:: max(1, len(pool) // 9)])
    assert {0, 1} == set(batch.part.tolist())
    return method, task, stage, replace(batch, images=batch.images.double())


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "distillation_weight": 0.5}], ids=str)
def test_cross_distilled_loss(lab, options):
    method, _, stage, batch = at_last_task(lab, 0, **options)
    with evaluating(method), torch.no_grad():
        new = method.network(batch.images).numpy()
        old = method.teacher(batch.images).numpy()
        losses = {k: float(v) for k, v in stage.loss(batch).items()}
    layers = [LAYERS[f] for f in range(3)]
    taught = distilled(new[:, :6], old, layers, options.get("temperature", 2.0))
    expected = {
        "classification": entropy(new, batch.labels),
        "distillation": options.get("distillation_weight", 1.0) * taught,
    }
    assert losses == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("teacher", ["old", "trained"])
def test_finetuning_distils_the_new_layer_too(lab, teacher):
    method, _, stage, batch = at_last_task(lab, 1, finetuning_teacher=teacher)
    with evaluating(method), torch.no_grad():
        new = method.network(batch.images).numpy()
        old = method.teacher(batch.images).numpy()
        trained = method.trained(batch.images).numpy()
        losses = {k: float(v) for k, v in stage.loss(batch).items()}
    assert not np.allclose(trained[:, :6], old)
    target = trained if teacher == "trained" else np.concatenate([old, trained[:, 6:]], 1)
    expected = {
        "classification": entropy(new, batch.labels),
        "distillation": distilled(new, target, list(LAYERS.values()), 2.0),
    }
    assert losses == pytest.approx(expected, rel=1e-10)


def test_the_temporary_teacher_is_the_network_just_trained(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    before = {k: v.clone() for k, v in method.network.state_dict().items()}
    method.begin_task(second)
    training, finetuning = method.stages(second)
    loop = lab.Loop()
    loop.run(training)
    trained = {k: v.clone() for k, v in method.network.state_dict().items()}
    loop.run(finetuning)
    assert all(torch.equal(v, trained[k]) for k, v in method.trained.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    assert not torch.equal(method.network.head.weight, trained["head.weight"])
    assert set(loop.trained["finetuning"]) == set(loop.trained["training"])
    assert not any("teacher" in n or n.startswith("trained") for n in loop.trained["finetuning"])
    method.end_task(lab.after(second))
    assert method.teacher is None and method.trained is None and not len(method.balanced.positions)
    assert method.structure().keys() == {"network"}


def test_the_balanced_set_is_herded_with_the_network_just_trained(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2), per_class=12, kept=4)
    lab.learn(method, first)
    method.begin_task(second)
    training, finetuning = method.stages(second)
    assert callable(finetuning.streams[0].subset)
    lab.Loop().run(training)
    with evaluating(method), torch.no_grad():
        expected = list(range(24, 36))
        for start in (0, 12):
            features = method.network.features(lab.read(second.examples, range(start, start + 12)))
            expected += (herding(features, 4) + start).tolist()
    lab.Loop().begin(finetuning)
    assert finetuning.streams[0].pool().tolist() == sorted(expected)
    labels = torch.cat([p.labels for p in finetuning.streams[0].parts])
    assert Counter(labels[method.balanced.positions].tolist()) == dict.fromkeys(range(5), 4)


def test_no_finetuning_without_exemplars_or_in_the_first_task(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2), kept=0)
    method.begin_task(first)
    assert [s.name for s in method.stages(first)] == ["training"]
    method.end_task(first)
    method.begin_task(second)
    assert [s.name for s in method.stages(second)] == ["training"]


def test_layers_are_remembered_in_a_saved_method(lab):
    method, _, stage, batch = at_last_task(lab, 1)
    assert method.brought.tolist() == list(SIZES)
    twin = make(lab)
    twin.restore(json.loads(json.dumps(method.structure())))
    twin = twin.double()
    twin.load_tensors({k: v.clone() for k, v in method.tensors().items()})
    *_, task = lab.make_tasks(SIZES)
    again = twin.stages(task)[1]
    twin.train()
    method.train()
    assert torch.equal(again.streams[0].pool(), stage.streams[0].pool())
    for key, value in stage.loss(batch).items():
        assert torch.equal(again.loss(batch)[key], value)


def test_a_task_of_known_classes_adds_no_layer(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    again = replace(second, known=3, classes=(0, 1, 2), examples=first.examples)
    loop = lab.learn(method, again)
    assert set(loop.losses) == {"training", "finetuning"}
    assert method.brought.tolist() == [3, 0]
    later = replace(second, index=2, exemplars=lab.after(first).exemplars)
    method.begin_task(later)
    stage = method.stages(later)[0]
    batch = lab.batch_of(stage.streams[0], torch.arange(0, 36, 5))
    with evaluating(method), torch.no_grad():
        new = method.network(batch.images).double().numpy()
        old = method.teacher(batch.images).double().numpy()
        found = float(stage.loss(batch)["distillation"])
    assert found == pytest.approx(distilled(new[:, :3], old, [(0, 3)], 2.0), rel=1e-5)


@pytest.mark.parametrize("layers", [[], [2, 3]])
def test_layers_must_fill_the_outputs(layers):
    with pytest.raises(FastcilError, match=r"layers is \[.*\], of \d outputs; logits has 4"):
        distillation_by_layer(torch.zeros(2, 4), torch.zeros(2, 4), layers)


def test_published_schedule():
    config = EEIL.Config()
    rates = [round(config.later.lr_at(e), 6) for e in (0, 9, 10, 19, 20, 29, 30, 39)]
    assert rates == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    rates = [round(config.finetuning.lr_at(e), 6) for e in (0, 9, 10, 19, 20, 29)]
    assert rates == [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    assert (config.later.epochs, config.finetuning.epochs) == (40, 30)
