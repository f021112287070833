"""Meta-experience replay against its algorithms written as loops over single gradients."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch import nn

from fastcil import Learner
from fastcil.errors import FastcilError
from fastcil.methods.mer import MER, _OuterStage


class Flat(nn.Module):
    """A linear layer on all pixels; its maps are of one position."""

    out_channels = 5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 5)

    def forward(self, images):
        return self.layer(images.flatten(1))[:, :, None, None]


def make(lab, backbone=Flat, lr=0.2, **options):
    torch.manual_seed(0)
    context = SimpleNamespace(make_backbone=backbone, bare_backbone=backbone)
    return MER(lab.shorten(MER.Config(**options), lr=lr, batch=3), context)


def ready(lab, method, task):
    """A task's stage, its network in float64, and a stepper that has begun it."""
    method.begin_task(task)
    method.network.double()
    (stage,) = method.stages(task)
    loop = lab.Loop()
    loop.begin(stage)
    return stage, loop


def batches(lab, stage, positions, entries):
    """The new data at some positions, and from each other stream the entries given."""
    new, *others = stage.streams
    drawn = [replace(lab.batch_of(new, positions), entry=positions)]
    for stream, chosen in zip(others, entries, strict=False):
        drawn.append(replace(lab.batch_of(stream, stream.pool()[chosen]), entry=chosen))
    return [replace(b, images=b.images.double()) for b in drawn]


def some_draws(stage, size, generator):
    """Entries of a draw from each stream of memory, none while it is empty."""
    pool = len(stage.streams[1].pool())
    draws = [torch.randperm(pool, generator=generator)[:size] for _ in stage.streams[1:]]
    return draws if pool else []


def gradient(theta, images, labels, own):
    """Of the mean cross-entropy over each label's ``own`` classes, by the chain rule."""
    result = [np.zeros_like(value) for value in theta]
    layer, offset, weight, bias = theta
    for x, y in zip(images, labels, strict=True):
        h = layer @ x + offset
        z = weight @ h + bias
        p = np.zeros_like(z)
        p[own[y]] = np.exp(z[own[y]]) / np.exp(z[own[y]]).sum()
        p[y] -= 1
        back = weight.T @ p
        for total, part in zip(result, (np.outer(back, x), back, np.outer(p, h), p), strict=True):
            total += part / len(labels)
    return result


def naive_update(theta, drawn, own, *, algorithm, s, inner, beta, gamma, alpha):
    """One outer update by Algorithm 1 or 6."""
    new, *draws = [(b.images.flatten(1).numpy(), b.labels.tolist()) for b in drawn]
    anchor = [value.copy() for value in theta]
    for k in range(s):
        images, labels = new
        if draws:
            parts = [new, draws[k]] if algorithm == "alg1" else [draws[k], new]
            images = np.concatenate([part[0] for part in parts])
            labels = parts[0][1] + parts[1][1]
        before = [value.copy() for value in theta]
        size = inner or len(labels)
        for first in range(0, len(labels), size):
            step = gradient(theta, images[first : first + size], labels[first : first + size], own)
            theta = [value - alpha * g for value, g in zip(theta, step, strict=True)]
        rate = beta if algorithm == "alg1" else gamma
        theta = [b + rate * (t - b) for b, t in zip(before, theta, strict=True)]
    if algorithm == "alg1":
        theta = [a + gamma * (t - a) for a, t in zip(anchor, theta, strict=True)]
    return theta


def weights(method):
    layer, head = method.network.extractors[0].layer, method.network.head
    values = (layer.weight, layer.bias, head.weight, head.bias)
    return [value.detach().numpy().copy() for value in values]


@pytest.mark.parametrize("head", ["all", "task"])
@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "alg1", "batches": 3, "inner_batch": 1, "beta": 0.3, "gamma": 0.6},
        {"algorithm": "alg1", "batches": 2, "inner_batch": 1, "beta": 0.3, "gamma": 1.0},
        {"algorithm": "alg1", "batches": 2, "inner_batch": 3, "beta": 1.0, "gamma": 0.5},
        {"algorithm": "alg1", "batches": 1, "inner_batch": 0, "beta": 0.1, "gamma": 1.0},
        {"algorithm": "alg6", "batches": 1, "inner_batch": 1, "beta": 0.9, "gamma": 0.2},
        {"algorithm": "alg6", "batches": 2, "inner_batch": 2, "beta": 0.9, "gamma": 0.2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_outer_updates_are_the_algorithm(lab, options, head):
    """Over two tasks, memory being empty in the first update."""
    method = make(lab, head=head, replay=4, **options)
    named = {
        "algorithm": options["algorithm"],
        "s": options["batches"],
        "inner": options["inner_batch"],
        "beta": options["beta"],
        "gamma": options["gamma"],
        "alpha": 0.2,
    }
    generator = torch.Generator().manual_seed(0)
    for task in lab.make_tasks((2, 3)):
        stage, loop = ready(lab, method, task)
        assert len(stage.streams) == 1 + options["batches"]
        every = np.arange(task.total)
        own = {y: every if head == "all" else every[(every < 2) == (y < 2)] for y in every}
        theta = weights(method)
        for step in range(5):
            drawn = batches(
                lab,
                stage,
                torch.randint(24, (3,), generator=generator),
                some_draws(stage, 4, generator),
            )
            assert len(drawn) == (1 if task.first and not step else 1 + options["batches"])
            before = theta
            theta = naive_update(theta, drawn, own, **named)
            losses = stage.step(drawn, loop)
            assert (
                losses["classification"].isfinite() and not losses["classification"].requires_grad
            )
            for found, expected, was in zip(weights(method), theta, before, strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
                assert np.abs(expected - was).max() > 1e-5
        stage.finish()
        method.end_task(task)
        assert not len(method.reservoir.slots)


def test_a_loss_is_the_mean_over_inner_steps(lab):
    (task,) = lab.make_tasks((2,))
    method = make(lab, batches=2, inner_batch=2, lr=1e-9, replay=4)
    stage, loop = ready(lab, method, task)
    stage.step(batches(lab, stage, torch.arange(3), []), loop)
    drawn = batches(lab, stage, torch.arange(3), [torch.tensor([0, 1, 2])] * 2)
    expected = []
    for draw in drawn[1:]:
        images = torch.cat([drawn[0].images, draw.images])
        labels = torch.cat([drawn[0].labels, draw.labels])
        rows = method.logits(images).detach().log_softmax(1)
        # Steps this small leave the losses what they were.
        expected.append(-float(rows[range(6), labels].mean()))
    assert float(stage.step(drawn, loop)["classification"]) == pytest.approx(np.mean(expected))


def test_one_inner_step_is_experience_replay_at_a_lower_rate(lab):
    """As the SAMC paper has it."""
    first, second = lab.make_tasks((2, 3))
    found = []
    for beta, lr in ((0.1, 0.2), (1.0, 0.02)):
        method = make(lab, lr=lr, beta=beta, batches=1, inner_batch=0)
        for task in (first, second):
            stage, loop = ready(lab, method, task)
            generator = torch.Generator().manual_seed(2)
            for _ in range(4):
                where = torch.randint(24, (3,), generator=generator)
                stage.step(batches(lab, stage, where, some_draws(stage, 3, generator)), loop)
        found.append(weights(method))
    for mine, other in zip(*found, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("inner", "moves"), [(1, False), (0, True), (6, True), (5, True)], ids=str)
def test_batch_norms_and_single_images(lab, inner, moves):
    """A step on one image uses running statistics and leaves them; others change them."""
    first, second = lab.make_tasks((2, 2))
    # Maps of one position, which torch refuses to normalise by one image.
    method = make(lab, lambda: ConvNet((4, 4, 6)), batches=2, replay=3, inner_batch=inner)
    for task in (first, second):
        stage, loop = ready(lab, method, task)
        before = {k: v.clone() for k, v in method.network.named_buffers()}
        stage.step(batches(lab, stage, torch.arange(3), []), loop)
        drawn = batches(lab, stage, torch.arange(3, 6), [torch.arange(3)] * 2)
        if inner == 5:  # the last of six images is alone
            counts = int(method.network.extractors[0].layers[1].num_batches_tracked)
        stage.step(drawn, loop)
        after = dict(method.network.named_buffers())
        assert any(not torch.equal(after[k], v) for k, v in before.items()) is moves
        if inner == 5:
            assert int(after["extractors.0.layers.1.num_batches_tracked"]) == counts + 2
        assert all(m.training for m in method.network.modules())


def test_frozen_norms_stay_frozen(lab):
    (task,) = lab.make_tasks((2,))
    method = make(lab, ConvNet, inner_batch=1, batches=1)
    method.begin_task(task)
    method.network.freeze_norms()
    (stage,) = method.stages(task)
    loop = lab.Loop()
    loop.begin(stage)
    stage.step(
        [replace(lab.batch_of(stage.streams[0], torch.arange(3)), entry=torch.arange(3))], loop
    )
    assert not method.network.extractors[0].layers[1].training


def test_new_images_are_offered_when_the_update_is_done(lab):
    (task,) = lab.make_tasks((2,))
    method = make(lab, batches=2)
    stage, loop = ready(lab, method, replace(task, room=4))
    assert stage.streams[1].pool().tolist() == []
    stage.step(batches(lab, stage, torch.tensor([5, 2, 9]), []), loop)
    assert stage.streams[2].pool().tolist() == [5, 2, 9]
    entries = [torch.tensor([1]), torch.tensor([2])]
    drawn = batches(lab, stage, torch.tensor([7, 1, 0]), entries)
    assert [b.index.tolist() for b in drawn] == [[7, 1, 0], [2], [9]]
    stage.step(drawn, loop)
    held = method.reservoir.slots.tolist()
    assert len(held) == 4 and set(held) <= {5, 2, 9, 7, 1, 0} and int(method.reservoir.seen) == 6
    stage.finish()
    assert sorted(method.chosen().tolist()) == sorted(held)


def test_without_memory_it_is_reptile_on_new_images(lab):
    for options, kept in (({"replay": 0}, 4), ({}, 0)):
        method = make(lab, batches=2, inner_batch=1, **options)
        for task in lab.make_tasks((2, 2), kept=kept):
            stage, loop = ready(lab, method, task)
            assert len(stage.streams) == 1
            theta = weights(method)
            own = {y: np.arange(task.total) for y in range(task.total)}
            drawn = batches(lab, stage, torch.arange(3), [])
            stage.step(drawn, loop)
            expected = naive_update(
                theta, drawn, own, algorithm="alg1", s=2, inner=1, beta=0.03, gamma=1.0, alpha=0.2
            )
            for found, value in zip(weights(method), expected, strict=True):
                np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-12)


OPTIONS = {"engine.epoch_scale": 0.05, "engine.batch_size": 6, "engine.progress": False}


def shelf(names, per_class=8, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 256, (per_class, 12, 12, 3), np.uint8) for name in names}


@pytest.mark.parametrize(
    ("memory", "counts"),
    [
        ("10 images", [10, 10, 10]),
        ("3 images/class", [6, 9, 12]),
        ("5000B", [10, 10, 10]),  # 432 + 28 bytes
        ("unlimited", [16, 24, 32]),
        ("none", [0, 0, 0]),
    ],
)
def test_memory_holds_what_the_reservoir_chose(memory, counts):
    learner = Learner("mer", memory=memory, backbone=ConvNet, **{**OPTIONS, "mer.batches": 2})
    known: list[np.ndarray] = []
    for task, names in enumerate((["a", "b"], ["c"], ["d"])):
        data = shelf(names, seed=task)
        known += list(data.values())
        learner.learn(data)
        held = learner.memory.examples()
        assert len(held) == counts[task]
        for place, label in enumerate(held.labels.tolist()):
            image = held.images.image(place).numpy()
            assert any(np.array_equal(image, other) for other in known[label])


def test_compressed_exemplars_are_more():
    learner = Learner(
        "mer+cam",
        memory="8 images",
        backbone=ConvNet,
        **OPTIONS,
        **{"cam.threshold": 0.9, "cam.refresh": 1, "mer.batches": 2},
    )
    for task in range(2):
        learner.learn(shelf([f"{task}x", f"{task}y"], per_class=12, seed=task))
    assert len(learner.memory) > 8 and learner.memory.units <= 8 + 1e-6


def test_one_image_at_a_time_as_published():
    """The released setting but for its hundred exemplars and ten draws."""
    config = MER.PRESETS["mnist-rotations"]
    learner = Learner(
        "mer",
        memory="6 images",
        **{
            "network.name": "mlp",
            "mer.first": vars(config.first),
            "mer.later": vars(config.later),
            "mer.inner_batch": config.inner_batch,
            "mer.replay": 3,
            "mer.batches": 2,
            "engine.progress": False,
        },
    )
    for task in range(2):
        learner.learn(shelf([f"{task}x", f"{task}y"], per_class=5, seed=task))
    assert int(learner.method.reservoir.seen) == 20
    assert learner.predict(shelf(["t"])["t"]).scores.isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta": 0.0}, "beta is 0.0; it must be a positive"),
        ({"gamma": -1.0}, "gamma is -1.0"),
        ({"replay": -1}, "replay is -1"),
        ({"inner_batch": -2}, "inner_batch is -2"),
        ({"batches": 0}, "batches is 0; it must be at least 1"),
        ({"algorithm": "alg2"}, "algorithm is 'alg2'; it must be one of alg1, alg6"),
        ({"head": "both"}, "head is 'both'"),
    ],
)
def test_odd_settings_are_a_sentence(options, says):
    with pytest.raises(FastcilError, match=says):
        MER.Config(**options)


def test_in_half_precision_every_inner_step_sees_the_weights_of_the_one_before(monkeypatch) -> None:
    """Autocast keeps the halves it makes of weights for as long as a step of the stage lasts."""
    seen: list[tuple[float, float]] = []
    inner = _OuterStage._inner

    def watched(stage, batch, stepper):
        kept = sum(stage.loss(batch).values()).detach()
        torch.clear_autocast_cache()
        seen.append((float(kept), float(sum(stage.loss(batch).values()).detach())))
        return inner(stage, batch, stepper)

    monkeypatch.setattr(_OuterStage, "_inner", watched)
    options = {"engine.precision": "bf16", "engine.progress": False, "engine.epoch_scale": 0.01}
    learner = Learner("mer", memory="4 images", backbone=ConvNet, **options)
    rng = np.random.default_rng(0)
    learner.learn({name: rng.integers(0, 256, (6, 8, 8, 3), np.uint8) for name in "ab"})
    assert len(seen) > 3 and len({new for _, new in seen}) > 3
    assert all(kept == new for kept, new in seen)
