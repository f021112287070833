"""The few-shot forms of methods against Tao et al. 2020's losses, written naively."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import Batch, evaluating, lookup
from fastcil.methods.eeil import EEIL
from fastcil.methods.icarl import ICaRL

NAMES = ("finetune", "joint", "icarl", "eeil", "ncm", "topic")
SETS = ("fscil-cifar100", "fscil-mini", "fscil-cub")


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def session(lab, cls, sizes, **options):
    """A float64 method in its last task, moved from where it was, and a batch of both streams."""
    torch.manual_seed(0)
    method = cls(lab.shorten(cls.Config(**options), epochs=1), lab.context)
    *before, task = lab.make_tasks(sizes)
    for earlier in before:
        lab.learn(method, earlier)
        method.release()
    method.begin_task(task)
    (stage,) = method.stages(task)
    lab.Loop().begin(stage)
    method.double()
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    new, anchors = (lab.batch_of(s, s.pool()[::3]) for s in stage.streams)
    assert not new.part.any() and bool(anchors.part.all())
    batch = Batch.cat([new, anchors])
    return method, stage, replace(batch, images=batch.images.double())


def outputs(method, stage, batch):
    with evaluating(method), torch.no_grad():
        losses = {name: float(value) for name, value in stage.loss(batch).items()}
        new, old = (n(batch.images).numpy() for n in (method.network, method.teacher))
    return new, old, batch.labels.tolist(), batch.part.numpy() == 1, losses


@pytest.mark.parametrize("normalised", [True, False])
def test_icarl(lab, normalised):
    options = {"form": "few-shot", "temperature": 3.0, "normalised": normalised}
    method, stage, batch = session(lab, ICaRL, (3, 2), **options)
    new, old, labels, anchor, losses = outputs(method, stage, batch)
    entropy = [-np.log(softmax(z)[y]) for z, y in zip(new, labels, strict=True)]
    taught = [
        -(softmax(q / 3) * np.log(softmax(z[:3] / 3))).sum() for z, q in zip(new, old, strict=True)
    ]
    assert losses["classification"] == pytest.approx(np.mean(np.array(entropy)[~anchor]))
    assert losses["distillation"] == pytest.approx(np.mean(np.array(taught)[anchor]))
    assert next(iter(method.readouts())) == "linear"


def test_eeil(lab):
    options = {"form": "few-shot", "exemplar_weight": 0.3, "distillation_weight": 0.8}
    method, stage, batch = session(lab, EEIL, (2, 3, 1), **options)
    new, old, labels, anchor, losses = outputs(method, stage, batch)
    entropy = np.array([-np.log(softmax(z)[y]) for z, y in zip(new, labels, strict=True)])
    taught = np.zeros(len(labels))
    for layer in (slice(0, 2), slice(2, 5)):
        taught -= [
            (softmax(q[layer] / 2) * np.log(softmax(z[layer] / 2))).sum()
            for z, q in zip(new, old, strict=True)
        ]
    assert losses == pytest.approx(
        {
            "classification": entropy[~anchor].mean(),
            "exemplars": 0.3 * entropy[anchor].mean(),
            "distillation": 0.8 * taught[anchor].mean(),
        }
    )
    assert stage.primary


@pytest.mark.parametrize("name", SETS)
def test_presets_share_the_base_session(lab, name):
    """So that one base session serves all: the same recipe, and the same network after it."""
    structures, recipes = [], []
    (task,) = lab.make_tasks((3,))
    for method_name in NAMES:
        cls = lookup("method", method_name)
        method = cls(cls.PRESETS[name], lab.context)
        method.begin_task(task)
        structures.append(method.network.structure())
        (stage,) = method.stages(task)
        recipes.append(stage.recipe)
        assert list(stage.parameters()) == list(method.network.parameters())
    assert all(other == structures[0] for other in structures)
    assert all(other == recipes[0] for other in recipes)
    assert structures[0]["head"]["normalised"] and recipes[0].lr_at(60) == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["icarl", "eeil", "ncm", "topic"])
def test_a_session_leaves_earlier_convolutions_alone(lab, name):
    cls = lookup("method", name)
    torch.manual_seed(0)
    method = cls(lab.shorten(cls.PRESETS["fscil-cifar100"]), lab.context)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.release()
    before = {k: v.clone() for k, v in method.network.named_parameters()}
    loop = lab.learn(method, second)
    (trained,) = loop.trained.values()
    assert not any("layers.0." in name for name in trained)
    assert all(f"network.extractors.0.layers.{k}.weight" in trained for k in (1, 3, 4))
    now = dict(method.network.named_parameters())
    assert torch.equal(now["extractors.0.layers.0.weight"], before["extractors.0.layers.0.weight"])
    last = "extractors.0.layers.3.weight"
    assert not torch.equal(now[last], before[last])
