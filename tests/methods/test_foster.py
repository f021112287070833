"""FOSTER against Wang et al. 2022, written naively, and what its stages may touch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import evaluating
from fastcil.methods.foster import Foster


def make(lab, **options):
    torch.manual_seed(0)
    return Foster(lab.shorten(Foster.Config(**options)), lab.context)


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def naive_weights(beta, counts):
    """Balanced weights of Cui et al. 2019, with mean 1."""
    raw = [(1 - beta) / (1 - beta**n) for n in counts]
    return np.array([r * len(counts) / sum(raw) for r in raw])


def at_second_task(lab, stage_number, **options):
    """A float64 method in the middle of a stage of its second task (3 old, 2 new classes)."""
    method = make(lab, **options)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.release()
    old = snapshot(method.network)
    method.begin_task(second)
    loop = lab.Loop()
    for number in range(stage_number):
        loop.run(method.stages(second)[number])
    stage = method.stages(second)[stage_number]
    loop.begin(stage)
    method.double()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))
    batch = lab.batch_of(stage.streams[0], torch.arange(0, 36, 5))
    batch = replace(batch, images=batch.images.double())
    assert (batch.labels < 3).any() and (batch.labels >= 3).any()
    return method, stage, batch, old


def pooled(extractor, images):
    return extractor(images).mean((2, 3)).numpy()


@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "distillation_weight": 0.5}], ids=str)
def test_boosting_loss(lab, options):
    method, stage, batch, old = at_second_task(lab, 0, **options)
    with evaluating(method), torch.no_grad():
        losses = {k: float(v) for k, v in stage.loss(batch).items()}
        f_old, f_new = (pooled(e, batch.images) for e in method.network.extractors)
    w = {k: v.detach().numpy() for k, v in method.state_dict().items()}
    alignment = naive_weights(options.get("beta1", 0.97), [4, 4, 4, 12, 12])
    expected = dict.fromkeys(("classification", "enhancement", "distillation"), 0.0)
    for a, b, y in zip(f_old, f_new, batch.labels.tolist(), strict=True):
        z = w["network.head.weight"] @ np.concatenate([a, b]) + w["network.head.bias"]
        fe = w["aux_head.weight"] @ b + w["aux_head.bias"]
        z_old = old["head.weight"].double().numpy() @ a + old["head.bias"].double().numpy()
        expected["classification"] -= np.log(softmax(z / alignment)[y])
        expected["enhancement"] -= np.log(softmax(fe)[y])
        expected["distillation"] -= (softmax(z_old / 2) * np.log(softmax(z[:3] / 2))).sum()
    expected = {k: v / len(batch) for k, v in expected.items()}
    expected["distillation"] *= options.get("distillation_weight", 1.0)
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"beta2": 0.8}], ids=str)
def test_compression_loss(lab, options):
    method, stage, batch, _ = at_second_task(lab, 1, **options)
    with evaluating(method), torch.no_grad():
        (loss,) = stage.loss(batch).values()
        taught = method.teacher(batch.images).numpy()
        student = method.network(batch.images).numpy()
    weights = naive_weights(options.get("beta2", 0.97), [4, 4, 4, 12, 12])
    expected = 0.0
    for t, s in zip(taught, student, strict=True):
        p = softmax(t / 2) * weights
        expected -= (p / p.sum() * np.log(softmax(s / 2))).sum()
    assert float(loss) == pytest.approx(expected / len(batch), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "old"),
    [
        ({}, 4.0),
        ({"nominal_memory": 100}, 33.0),
        ({"nominal_per_class": 20}, 20.0),
        ({"nominal_memory": 2}, 1.0),
    ],
    ids=str,
)
def test_counts_behind_the_weights(lab, options, old):
    method = make(lab, **options)
    _, second = lab.make_tasks((3, 2))
    assert method._counts(second).tolist() == pytest.approx([old] * 3 + [12] * 2)


def test_counts_are_means_over_old_classes(lab):
    _, second = lab.make_tasks((3, 2))
    fewer = replace(second, exemplars=second.exemplars.select(torch.arange(7)))
    assert make(lab)._counts(fewer).tolist() == pytest.approx([7 / 3] * 3 + [12] * 2)


def test_beta1_falls_over_the_tasks():
    config = Foster.PRESETS["cifar-b0"]
    assert [config.beta1_at(i) for i in range(1, 10)] == pytest.approx(
        [0.98, 0.975, 0.97, 0.965, 0.96, 0.955, 0.95, 0.945, 0.94]
    )
    assert Foster.Config(beta1=0.9, beta1_step=0.1).beta1_at(5) < 1
    assert Foster.Config(beta1=0.1, beta1_step=-0.1).beta1_at(5) > 0


def test_published_configurations():
    presets = Foster.PRESETS
    assert [presets[name].beta1 for name in ("cifar-b50", "imagenet", "food101")] == [
        0.94,
        0.97,
        0.95,
    ]
    for name, config in presets.items():
        recipes = (config.first, config.boosting, config.compression)
        assert [r.epochs for r in recipes] == [200, 170, 130]
        assert [r.schedule for r in recipes] == ["cosine"] * 3
        assert [r.weight_decay for r in recipes] == [5e-4, 5e-4, 0.0]
        assert {r.batch_size for r in recipes} == {128 if name.startswith("cifar") else 256}
        assert config.beta2 == 0.97 and config.beta1_at(1) == config.beta1
        assert (config.beta1_step == 0) == (name != "cifar-b0")


def test_heads_without_bias(lab):
    method = make(lab, bias=False)
    for task in lab.make_tasks((3, 2, 1)):
        method.begin_task(task)
        heads = [method.network.head, method.aux_head, method.old_head]
        assert all(head.bias is None for head in heads if head is not None)
        for stage in method.stages(task):
            lab.Loop().run(stage)
        assert method.network.head.bias is None
        method.end_task(lab.after(task))
        method.release()


def test_first_task_is_plain(lab):
    method = make(lab)
    (task,) = lab.make_tasks((3,))
    loop = lab.learn(method, task)
    assert list(loop.losses) == ["first"]
    assert len(loop.trained["first"]) == len(list(method.parameters()))
    assert list(method.readouts()) == ["student"]
    assert method.localiser() is method.network
    assert method.retained() == []


def test_boosting_starts_from_the_old_network(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    before = snapshot(method.network)
    images = lab.read(second.exemplars, range(5))
    with evaluating(method), torch.no_grad():
        old_logits = method.logits(images)
    method.begin_task(second)
    old, new = method.network.extractors
    assert same(new, snapshot(old))
    assert same(old, {k[len("extractors.0.") :]: v for k, v in before.items() if k[0] == "e"})
    head = method.network.head
    assert torch.equal(head.weight[:3, :6], before["head.weight"])
    assert torch.equal(head.bias[:3], before["head.bias"])
    assert head.weight.shape == (5, 12)
    assert method.aux_head.weight.shape == (5, 6) and method.aux_head.bias is not None
    with evaluating(method), torch.no_grad():
        remembered = method.old_head(method.network.features(images)[:, :6])
    torch.testing.assert_close(remembered, old_logits)


def test_stages_train_what_they_may_and_nothing_else(lab):
    method = make(lab)
    tasks = lab.make_tasks((3, 2, 1))
    lab.learn(method, tasks[0])
    method.release()
    for task in tasks[1:]:
        method.begin_task(task)
        boosting, compression = method.stages(task)
        old = snapshot(method.network.extractors[0])
        old_head = snapshot(method.old_head)
        loop = lab.Loop()
        loop.run(boosting)
        assert {name.split("layers")[0] for name in loop.trained["boosting"]} == {
            "network.extractors.1.",
            "network.head.weight",
            "network.head.bias",
            "aux_head.weight",
            "aux_head.bias",
        }
        # Bit for bit, batch-norm statistics and their counters included.
        assert same(method.network.extractors[0], old)
        assert same(method.old_head, old_head)
        assert not same(method.network.extractors[1], old)

        boosted = method.network
        loop.begin(compression)
        student = method.network
        assert method.teacher is boosted
        assert len(student.extractors) == 1 and student.head.classes == task.total
        assert same(student.extractors[0], old)
        assert torch.equal(student.head.weight[: task.known], old_head["weight"])
        assert torch.equal(student.head.bias[: task.known], old_head["bias"])
        assert student.extractors[0].layers[1].training
        assert not any(m.training for e in boosted.extractors for m in e.modules())
        assert method.old_head is None and method.aux_head is None
        assert not {id(p) for p in student.parameters()} & {id(p) for p in boosted.parameters()}
        method.release()


def test_compression_leaves_the_teacher_alone(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.begin_task(second)
    boosting, compression = method.stages(second)
    loop = lab.Loop()
    loop.run(boosting)
    taught = snapshot(method.network)
    loop.run(compression)
    assert all(name.startswith("network.") for name in loop.trained["compression"])
    assert len(loop.trained["compression"]) == len(list(method.network.parameters()))
    assert same(method.teacher, taught)
    assert compression.recipe.weight_decay == 0
    assert [boosting.primary, compression.primary] == [True, False]


def test_teacher_selects_and_is_read_out_until_release(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.release()
    lab.learn(method, second)
    images = lab.read(second.examples, range(4))
    teacher, student = method.teacher, method.network
    with evaluating(method), torch.no_grad():
        scores = {name: readout(images) for name, readout in method.readouts().items()}
        assert list(scores) == ["student", "teacher"]
        assert torch.equal(scores["student"], student(images))
        assert torch.equal(scores["teacher"], teacher(images))
        assert torch.equal(method.embed(images), teacher.features(images))
        assert method.embed(images).shape == (4, 12)
        assert method.localiser() is teacher
    method.release()
    assert list(method.readouts()) == ["student"]
    assert method.localiser() is student
    with evaluating(method), torch.no_grad():
        assert torch.equal(method.embed(images), student.features(images))
    assert method.structure().keys() == {"network"}


def test_boosting_logits_are_the_joint_heads(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.begin_task(second)
    stage = method.stages(second)[0]
    images = lab.read(second.examples, range(4))
    assert method.localiser() is method.network
    with evaluating(method), torch.no_grad():
        features = torch.cat([e(images).mean((2, 3)) for e in method.network.extractors], 1)
        expected = features @ method.network.head.weight.T + method.network.head.bias
        torch.testing.assert_close(stage.logits(images), expected)
        assert method.network.cam_weights(second.examples.labels[:4]).shape == (4, 12)


def test_the_distillation_s_target_depends_on_the_images_not_on_weights_that_train(lab):
    """What a mask does to an image, it does to the old logits too (Luo et al. 2023, Eq. 9)."""
    method, stage, batch, _ = at_second_task(lab, 0)
    method.eval()
    images = batch.images.clone().requires_grad_(True)
    loss = stage.loss(replace(batch, images=images))["distillation"]
    (found,) = torch.autograd.grad(loss, images)
    z = method.network(images)[:, :3]
    target = (method.old_head(method.network.features(images)[:, :6]) / 2).softmax(1)
    by_hand = -(target * (z / 2).log_softmax(1)).sum(1).mean()
    (expected,) = torch.autograd.grad(by_hand, images)
    torch.testing.assert_close(found, expected)
    trained = {id(p) for p in stage.parameters()}
    frozen = [*method.old_head.parameters(), *method.network.extractors[0].parameters()]
    assert not trained & set(map(id, frozen))
