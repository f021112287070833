"""TOPIC against Tao et al. 2020's losses, written naively, and what its neural gas keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import train
from fastcil.contract import Batch, evaluating
from fastcil.errors import FastcilError
from fastcil.methods.topic import TOPIC

SIZES = (3, 2)


def unit(features):
    return features / features.norm(dim=1, keepdim=True)


def make(lab, **options):
    torch.manual_seed(0)
    return TOPIC(lab.shorten(TOPIC.Config(**options), epochs=2, lr=0.01), lab.context)


def second_task(lab, **options):
    """A float64 method in its second task, moved from where it was, and a batch."""
    method = make(lab, **{"nodes": 7, **options})
    first, second = lab.make_tasks(SIZES)
    lab.learn(method, first)
    method.release()
    method.begin_task(second)
    (stage,) = method.stages(second)
    lab.Loop().begin(stage)
    method.double()
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype))
        if method.centres is not None:
            method.centres.weight.add_(0.3)
    batch = Batch.cat([lab.batch_of(s, s.pool()[::2]) for s in stage.streams])
    return method, stage, replace(batch, images=batch.images.double()), second


@pytest.mark.parametrize("options", [{}, {"threshold": 2e-5, "loose": 0.25, "margin": 5.0}])
def test_loss(lab, options):
    options = {"anchor_weight": 3.0, "min_weight": 0.4, "max_weight": 0.2, **options}
    method, stage, batch, _ = second_task(lab, **options)
    config = method.config
    with evaluating(method), torch.no_grad():
        losses = {name: float(value) for name, value in stage.loss(batch).items()}
        new, old = (unit(n.features(batch.images)) for n in (method.network, method.teacher))
        new, old = new.numpy(), old.numpy()
        logits = method.network(batch.images).numpy()
        gas = {name: value.numpy() for name, value in method.gas.named_buffers()}
        centres = method.centres.weight.numpy()
    assert gas["labels"].tolist()[7:] == [-1, -1]
    entropy, held, drawn, pushed, weights = [], [], [], [], set()
    for row, (label, part) in enumerate(
        zip(batch.labels.tolist(), batch.part.tolist(), strict=True)
    ):
        f, g, z = new[row], old[row], logits[row]
        if part:
            node = np.argmin(((gas["nodes"][:7] - g) ** 2).sum(1))
            v = np.where(gas["variance"][node] < config.threshold, 1.0, config.loose)
            weights |= set(v.tolist())
            held.append((v * (f - g) ** 2).mean())
            continue
        entropy.append(np.log(np.exp(z).sum()) - z[label])
        drawn.append(0.5 * ((f - centres[label - 3]) ** 2).sum())
        rivals = [*gas["nodes"][:7], *(c for k, c in enumerate(centres) if k + 3 != label)]
        pushed.append(max(0.0, config.margin - min(np.linalg.norm(f - r) for r in rivals)))
    expected = {
        "classification": np.mean(entropy),
        "anchors": 3.0 * np.mean(held),
        "min": 0.4 * np.mean(drawn),
        "max": 0.2 * np.mean(pushed),
    }
    assert losses == pytest.approx(expected, rel=1e-5)
    assert "loose" not in options or (weights == {1.0, 0.25} and np.mean(pushed) > 0)


def test_centres_start_as_means_and_learn_by_themselves(lab):
    method, stage, _, task = second_task(lab, centre_lr=0.5)
    (companion,) = stage.companions
    assert [p is method.centres.weight for p in companion.parameters()] == [True]
    assert companion.recipe.lr_at(50) == 0.5 and companion.recipe.momentum == 0
    assert not any(p is method.centres.weight for p in stage.parameters())
    with evaluating(method), torch.no_grad():
        images = lab.read(task.examples, range(24)).double()
        features = unit(method.network.features(images))
    means = torch.stack([features[task.examples.labels == label].mean(0) for label in (3, 4)])
    before = method.centres.weight.detach().clone()
    norms = [m.running_mean.clone() for m in method.network.modules() if hasattr(m, "running_mean")]
    loop = lab.Loop()
    loop.begin(companion)
    batch = lab.batch_of(companion.streams[0], torch.arange(24))
    companion.step([replace(batch, images=batch.images.double())], loop)
    torch.testing.assert_close(method.centres.weight, before + 0.5 * (means - before))
    after = [m.running_mean for m in method.network.modules() if hasattr(m, "running_mean")]
    assert all(torch.equal(a, b) for a, b in zip(norms, after, strict=True))
    fresh = make(lab)
    first, second = lab.make_tasks(SIZES)
    lab.learn(fresh, first)
    with evaluating(fresh), torch.no_grad():
        features = unit(fresh.network.features(lab.read(second.examples, range(24))))
    fresh.begin_task(second)
    means = torch.stack([features[second.examples.labels == label].mean(0) for label in (3, 4)])
    torch.testing.assert_close(fresh.centres.weight.detach(), means)


def test_chosen_are_the_anchors_and_old_nodes_stay(lab):
    method = make(lab, nodes=7)
    first, second = lab.make_tasks(SIZES)
    method.begin_task(first)
    reserved = method.retained()[0].nbytes
    for stage in method.stages(first):
        lab.Loop().run(stage)
    with evaluating(method):
        chosen = method.chosen()
        features = unit(method.network.features(lab.read(first.examples, range(36))))
    assert len(chosen) == len(set(chosen.tolist())) <= 7
    assert torch.equal(chosen, method.gas.anchors(features, first.examples.labels))
    assert torch.equal(method.chosen(), torch.empty(0)), "asked twice it has nothing new"
    method.end_task(lab.after(first))
    assert method.retained()[0].nbytes == reserved == method.gas.nodes.numel() * 8 + 7 * (16 + 7)
    before = {name: value.clone() for name, value in method.gas.named_buffers()}
    second = replace(second, exemplars=first.examples.select(chosen))
    method.begin_task(second)
    for stage in method.stages(second):
        lab.Loop().run(stage)
    with evaluating(method):
        kept = method.chosen()
    there = torch.arange(24, 24 + len(chosen))
    assert torch.equal(kept[2:], there) and int(kept[:2].max()) < 24
    assert second.examples.labels[kept[:2]].sort().values.tolist() == [3, 4]
    for name in ("nodes", "variance", "labels", "counts"):
        assert torch.equal(getattr(method.gas, name)[:7], before[name])
    assert sorted(method.gas.labels[7:].tolist()) == [3, 4]
    method.end_task(second)
    assert method.teacher is None and method.centres is None
    (record,) = method.records()
    assert record.kind == "table" and record.payload["rows"][0][0] == 9


def test_anchors_fill_the_memory_of_a_run():
    rng = np.random.default_rng(0)
    labels = [label for label in range(5) for _ in range(8)]
    images = rng.integers(0, 256, (40, 12, 12, 3), np.uint8)
    result = train(
        "topic",
        ((images, labels), (images, labels)),
        "b3-inc2",
        "6 images",
        backbone=ConvNet,
        **{
            "topic.nodes": 6,
            "engine.epoch_scale": 0.01,
            "engine.progress": False,
            "engine.exemplars_of": "first",
        },
    )
    assert [sum(task.exemplars) for task in result.outcomes[0].tasks] == [6, 6]
    assert result.outcomes[0].tasks[1].exemplars[3:] == [0, 0]
    gas = result.learner.method.gas
    assert sorted(gas.labels.tolist())[-2:] == [3, 4], "memory did not ask, and it learned them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"nodes_per_class": 0}, "nodes_per_class is 0"),
        ({"centre_lr": 0.0}, "centre_lr is 0"),
        ({"anchor_weight": -1.0}, "anchor_weight is -1"),
        ({"old_rows": "lost"}, "old_rows is 'lost'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FastcilError, match=message):
        TOPIC.Config(**options)
