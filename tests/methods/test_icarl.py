"""iCaRL against Rebuffi et al. 2017, written naively."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import evaluating
from fastcil.engine.groups import NetworkOptions
from fastcil.engine.resolve import make_backbone_builder
from fastcil.methods.icarl import ICaRL


def make(lab, **options):
    torch.manual_seed(0)
    return ICaRL(lab.shorten(ICaRL.Config(**options), epochs=1), lab.context)


def second_task(lab, method, sizes=(3, 2)):
    """The method at the start of its second task, with the logits of old and new network."""
    first, second = lab.make_tasks(sizes)
    lab.learn(method, first)
    method.release()
    method.begin_task(second)
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    method.double()
    (stage,) = method.stages(second)
    batch = lab.batch_of(stage.streams[0], torch.arange(0, 36, 5))
    batch = replace(batch, images=batch.images.double())
    with evaluating(method), torch.no_grad():
        old = method.teacher(batch.images).numpy()
        new = method.network(batch.images).numpy()
        losses = {k: float(v) for k, v in stage.loss(batch).items()}
    return batch, old, new, losses


@pytest.mark.parametrize(("outputs", "scale"), [(100, 100), (5, 5), (1, 5)])
def test_sigmoid_loss(lab, outputs, scale):
    batch, old, new, losses = second_task(lab, make(lab, outputs=outputs))
    expected, new_only = 0.0, 0.0
    for b, label in enumerate(batch.labels.tolist()):
        for y in range(5):
            g = 1 / (1 + np.exp(-new[b, y]))
            t = 1 / (1 + np.exp(-old[b, y])) if y < 3 else float(y == label)
            term = -(t * np.log(g) + (1 - t) * np.log(1 - g)) / (len(batch) * scale)
            expected += term
            new_only += term if y >= 3 else 0.0
    assert old.shape[1] == 3 and new.shape[1] == 5
    assert (batch.labels < 3).any() and (batch.labels >= 3).any()
    assert sum(losses.values()) == pytest.approx(expected, rel=1e-10)
    assert losses["classification"] == pytest.approx(new_only, rel=1e-10)


def test_a_class_that_comes_again_is_learned_from_its_labels(lab):
    method = make(lab)
    first = lab.make_tasks((3,))[0]
    method.begin_task(first)
    method.end_task(lab.after(first))
    examples = lab.make_examples([0, 1, 0, 1])
    again = replace(first, index=1, classes=(0, 1), known=3, examples=examples)
    method.begin_task(again)
    (stage,) = method.stages(again)
    batch = lab.batch_of(stage.streams[0], torch.arange(4))
    with evaluating(method), torch.no_grad():
        z = method.network(batch.images).double()
        target = method.teacher(batch.images).sigmoid().double()
        found = sum(stage.loss(batch).values())
    target[:, :2] = torch.eye(3, dtype=torch.float64)[batch.labels][:, :2]
    expected = -(target * z.sigmoid().log() + (1 - target) * (1 - z.sigmoid()).log()).sum() / 400
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_sigmoid_loss_of_the_first_task(lab):
    method = make(lab).double()
    task = lab.make_tasks((3,))[0]
    method.begin_task(task)
    method.double()
    (stage,) = method.stages(task)
    batch = lab.batch_of(stage.streams[0], torch.arange(0, 36, 5))
    batch = replace(batch, images=batch.images.double())
    with evaluating(method), torch.no_grad():
        g = method.network(batch.images).sigmoid().numpy()
        losses = stage.loss(batch)
    hot = np.eye(3)[batch.labels.numpy()]
    expected = -(hot * np.log(g) + (1 - hot) * np.log(1 - g)).sum() / (len(batch) * 100)
    assert {k: float(v) for k, v in losses.items()} == pytest.approx({"classification": expected})


def test_softmax_loss(lab):
    batch, old, new, losses = second_task(lab, make(lab, loss="softmax", temperature=2.0))
    entropy, distilled = 0.0, 0.0
    for b, label in enumerate(batch.labels.tolist()):
        entropy -= np.log(np.exp(new[b, label]) / np.exp(new[b]).sum())
        p = np.exp(old[b] / 2) / np.exp(old[b] / 2).sum()
        q = np.exp(new[b, :3] / 2) / np.exp(new[b, :3] / 2).sum()
        distilled -= (p * np.log(q)).sum()
    assert losses["classification"] == pytest.approx(entropy / len(batch), rel=1e-10)
    assert losses["distillation"] == pytest.approx(distilled / len(batch), rel=1e-6)


def test_teacher_is_the_network_before_the_task(lab):
    method = make(lab, loss="sigmoid")
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    assert method.teacher is None
    before = {k: v.clone() for k, v in method.network.state_dict().items()}
    seen = []
    method.begin_task(second)
    (stage,) = method.stages(second)
    lab.Loop(lambda *_: seen.append(copy_of(method.teacher))).run(stage)
    assert seen and all(torch.equal(seen[-1][k], v) for k, v in before.items())
    assert not any("teacher" in name for name in lab.Loop().trained)
    assert not torch.equal(
        method.network.extractors[0].layers[0].weight, before["extractors.0.layers.0.weight"]
    )
    method.end_task(lab.after(second))
    assert method.teacher is None


def copy_of(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("flip", [True, False])
def test_nearest_mean_of_exemplars(lab, flip):
    method = make(lab, flip_means=flip)
    first, second = lab.make_tasks((3, 2))
    for task in (first, second):
        lab.learn(method, task)
    exemplars = lab.after(second).exemplars
    images = lab.read(second.examples, range(6))
    with evaluating(method), torch.no_grad():
        plain = method.network.features(lab.read(exemplars, range(len(exemplars))))
        mirrored = method.network.features(lab.read(exemplars, range(len(exemplars)), flip=True))
        features = method.network.features(images).double().numpy()
        scores = method.readouts()["nme"](images).numpy()
        assert torch.equal(method(images), method.readouts()["nme"](images))
    plain, mirrored = plain.double().numpy(), mirrored.double().numpy()
    for b, feature in enumerate(features):
        feature = feature / np.linalg.norm(feature)
        for y in range(5):
            rows = [i for i, label in enumerate(exemplars.labels.tolist()) if label == y]
            assert len(rows) == 4
            mean = np.zeros(6)
            for i in rows:
                mean += plain[i] / np.linalg.norm(plain[i])
                if flip:
                    mean += mirrored[i] / np.linalg.norm(mirrored[i])
            mean /= np.linalg.norm(mean)
            assert scores[b, y] == pytest.approx(-((feature - mean) ** 2).sum(), abs=1e-5)
    assert list(method.readouts()) == ["nme", "linear"]


def test_class_without_exemplars_is_never_nearest(lab):
    method = make(lab)
    (task,) = lab.make_tasks((3,))
    method.begin_task(task)
    kept = lab.after(task).exemplars
    method.end_task(replace(task, exemplars=kept.select((kept.labels != 1).nonzero()[:, 0])))
    images = lab.read(task.examples, range(len(task.examples)))
    with evaluating(method), torch.no_grad():
        scores = method.readouts()["nme"](images)
    assert (scores[:, 1] == -torch.inf).all() and scores[:, [0, 2]].isfinite().all()


def test_without_any_exemplar_the_head_decides(lab):
    method = make(lab)
    (task,) = lab.make_tasks((3,))
    method.begin_task(task)
    method.end_task(lab.after(task))
    assert list(method.readouts()) == ["nme", "linear"]
    method.end_task(task)
    assert list(method.readouts()) == ["linear"]
    images = lab.read(task.examples, range(2))
    with evaluating(method), torch.no_grad():
        assert torch.equal(method(images), method.network(images))


def test_means_leave_training_mode_as_it_was(lab):
    method = make(lab)
    (task,) = lab.make_tasks((3,))
    method.begin_task(task)
    method.train()
    statistics = method.network.extractors[0].layers[1].running_mean.clone()
    method.end_task(lab.after(task))
    assert method.network.extractors[0].training
    assert torch.equal(method.network.extractors[0].layers[1].running_mean, statistics)


def test_recipe_follows_the_preset():
    paper, pycil = ICaRL.Config(), ICaRL.PRESETS["pycil"]
    assert [round(paper.later.lr_at(e), 6) for e in (0, 48, 49, 62, 63)] == [2, 2, 0.4, 0.4, 0.08]
    assert [round(pycil.later.lr_at(e), 6) for e in (0, 79, 80, 119, 120)] == [
        0.1,
        0.1,
        0.01,
        0.01,
        0.001,
    ]


def test_features_are_not_rectified_where_that_is_left_open():
    """As in the released CIFAR network; PyCIL's Config and `network.last_relu` say otherwise."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    paper, pycil = ICaRL.Config(), ICaRL.PRESETS["pycil"]
    for config, asked, rectified in (
        (paper, None, False),
        (paper, True, True),
        (pycil, None, True),
        (pycil, False, False),
    ):
        options = NetworkOptions(last_relu=asked)
        network = make_backbone_builder(options, 32, ICaRL.published_network(config))().eval()
        with torch.no_grad():
            assert bool((network(images) < 0).any()) != rectified
