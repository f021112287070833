"""PODNet against Douillard et al. 2020 and the released code, written naively."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import Learner
from fastcil.contract import Batch, evaluating
from fastcil.memory.balance import herded_subset
from fastcil.methods.podnet import PODNet
from fastcil.nn import resnet20


def make(lab, epochs=1, **options):
    torch.manual_seed(0)
    return PODNet(lab.shorten(PODNet.Config(**options), epochs=epochs), lab.context)


def naive_scores(head, features):
    """eta sum_p s_p softmax_p(s), s = -|f/|f| - w/|w||^2."""
    scores = np.zeros((len(features), head.classes))
    for b, f in enumerate(features.double().numpy()):
        for c, proxies in enumerate(head.weight.detach().double().numpy()):
            units = [w / np.linalg.norm(w) for w in proxies]
            s = np.array([-((f / np.linalg.norm(f) - w) ** 2).sum() for w in units])
            scores[b, c] = float(head.scale.detach()) * (s * np.exp(s) / np.exp(s).sum()).sum()
    return scores


def pooled(maps):
    """One image's map [C, h, w]: squares over width beside squares over height, length 1."""
    vector = np.concatenate([(maps**2).sum(2).ravel(), (maps**2).sum(1).ravel()])
    return vector / np.linalg.norm(vector)


def second_task(lab, method, sizes=(3, 2)):
    """The method in its second task, away from where it starts, and a batch from all over it."""
    first, second = lab.make_tasks(sizes)
    lab.learn(method, first)
    method.release()
    method.begin_task(second)
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    method.double()
    stream = method.stages(second)[0].streams[0]
    batch = lab.batch_of(stream, torch.arange(0, len(stream), 3))
    return second, replace(batch, images=batch.images.double())


@pytest.mark.parametrize("form", ["released", "margin"])
@pytest.mark.parametrize("sizes", [(3, 2), (2, 1), (1, 4)])
def test_losses_of_a_later_task(lab, sizes, form):
    method = make(lab, nca=form, margin=0.7, flat_weight=0.5, spatial_weight=2.0)
    second, batch = second_task(lab, method, sizes)
    known, total = sizes[0], sum(sizes)
    assert set(batch.labels.tolist()) == set(range(total))
    stage = method.stages(second)[0]
    with evaluating(method), torch.no_grad():
        losses = {name: float(value) for name, value in stage.loss(batch).items()}
        own, old = method.network.levels(batch.images), method.teacher.levels(batch.images)
        features, before = method.network.features(batch.images), old[-1].mean((2, 3))
    assert method.teacher.head.classes == known and len(own) == 2
    z = naive_scores(method.head, features)
    entropy, eta = 0.0, float(method.head.scale.detach())
    for row, y in zip(z, batch.labels.tolist(), strict=True):
        others = sum(np.exp(v) for j, v in enumerate(row) if j != y)
        if form == "released":
            entropy += -row[y] + np.log(np.exp(row.max()) + others)
        else:
            entropy += max(0.0, -np.log(np.exp(row[y] - 0.7 * eta) / others))
    factor = math.sqrt(total / sizes[1])
    flat = np.mean(
        [
            1 - f @ g / np.linalg.norm(f) / np.linalg.norm(g)
            for f, g in zip(features.numpy(), before.numpy(), strict=True)
        ]
    )
    spatial = np.mean(
        [
            np.mean(
                [
                    np.linalg.norm(pooled(a) - pooled(b))
                    for a, b in zip(m.numpy(), n.numpy(), strict=True)
                ]
            )
            for m, n in zip(own, old, strict=True)
        ]
    )
    assert flat > 1e-3 and spatial > 1e-3
    assert losses == {
        "classification": pytest.approx(entropy / len(batch), rel=1e-9),
        "flat": pytest.approx(0.5 * factor * flat, rel=1e-9),
        "spatial": pytest.approx(2.0 * factor * spatial, rel=1e-9),
    }


def test_the_first_task_has_nothing_to_distil(lab):
    method = make(lab)
    (task,) = lab.make_tasks((3,))
    method.begin_task(task)
    (stage,) = method.stages(task)
    batch = lab.batch_of(stage.streams[0], torch.arange(5))
    with evaluating(method), torch.no_grad():
        assert list(stage.loss(batch)) == ["classification"]
    assert method.head.weight.shape == (3, 10, 6) and method.teacher is None


def test_one_pass_gives_levels_features_and_logits(lab, monkeypatch):
    """The stages of the network are computed once for all terms, the teacher's once too."""
    method = make(lab)
    second, batch = second_task(lab, method)
    calls = []
    levels = ConvNet.levels
    monkeypatch.setattr(ConvNet, "levels", lambda net, x: calls.append(net) or levels(net, x))
    monkeypatch.setattr(ConvNet, "forward", lambda net, x: pytest.fail("a second pass"))
    method.stages(second)[0].loss(batch)
    assert calls == [method.network.extractors[0], method.teacher.extractors[0]]


def test_new_proxies_start_at_the_centres_of_their_classes(lab):
    method = make(lab, proxies=3)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    old, known = method.head.weight.detach().clone(), len(first.classes)
    features = lab.context.scan(method.eval().embed, second.examples)
    method.train()
    method.begin_task(second)
    assert torch.equal(method.head.old, old) and method.network.extractors[0].training
    norm = float(np.mean([np.linalg.norm(w) for w in old.flatten(0, 1).numpy()]))
    for place, label in enumerate(second.classes):
        mine = features[second.examples.labels == label]
        units = torch.nn.functional.normalize(mine, dim=1)
        centres = method.head.new[place].detach() / norm
        # Lloyd's equation: a centre is the mean of the points that it is the nearest centre of.
        nearest = torch.cdist(units, centres).argmin(1)
        for k in range(3):
            torch.testing.assert_close(
                units[nearest == k].mean(0), centres[k], rtol=1e-4, atol=1e-4
            )
    assert method.head.classes == known + 2


def test_a_class_with_fewer_images_than_proxies(lab):
    """One class of four images for ten proxies, each image two or three times."""
    method = make(lab)
    first, second = lab.make_tasks((3, 1))
    lab.learn(method, first)
    few = replace(second, examples=second.examples.select(torch.arange(4)))
    norm = method.head.weight.detach().norm(dim=2).mean()
    features = lab.context.scan(method.eval().embed, few.examples)
    lab.learn(method, few)
    assert method.head.weight.shape == (4, 10, 6)
    method = make(lab)
    lab.learn(method, first)
    method.begin_task(few)
    starts = method.head.new[0].detach()
    wanted = norm * torch.nn.functional.normalize(features, dim=1)
    distances = torch.cdist(starts, wanted)
    assert distances.amin(1).max() < 1e-4
    counts = distances.argmin(1).bincount(minlength=4).tolist()
    assert sorted(counts) == [2, 2, 3, 3]


def test_a_label_without_images_keeps_fresh_proxies(lab):
    method = make(lab)
    first, second = lab.make_tasks((2, 3))
    lab.learn(method, first)
    some = second.examples.select((second.examples.labels != 3).nonzero()[:, 0])
    method.begin_task(replace(second, classes=(2, 4), examples=some))
    norms = method.head.new.detach().norm(dim=2)
    assert method.head.classes == 5 and (norms > 0).all()
    # Random directions are far apart, centres of a class near to each other.
    spread = torch.nn.functional.normalize(method.head.new.detach(), dim=2).var(1).sum(1)
    assert spread[1] > 2 * max(spread[0], spread[2])


def test_old_proxies_rest_in_the_first_stage_and_move_in_the_second(lab):
    method = make(lab, epochs=2)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    scale = method.head.scale.detach().clone()
    method.begin_task(second)
    main, finetune = method.stages(second)
    assert (main.name, main.primary, finetune.name) == ("podnet", True, "finetune")
    before = copied(method)
    loop = lab.Loop()
    loop.run(main)
    after = copied(method)
    assert torch.equal(after["network.head.old"], before["network.head.old"])
    moved = {n for n in before if not torch.equal(before[n], after[n]) and "teacher" not in n}
    parameters = {n for n, _ in method.named_parameters() if n.startswith("network.")}
    assert moved & parameters == parameters - {"network.head.old"}
    assert not torch.equal(method.head.scale, scale)
    loop.run(finetune)
    end = copied(method)
    moved = {n for n in end if n in after and not torch.equal(end[n], after[n])}
    assert moved & parameters == {"network.head.old", "network.head.new"}
    assert loop.trained["finetune"] == ["network.head.old", "network.head.new"]
    # As in the released code, batch norms go on taking statistics.
    assert any("running_mean" in name for name in moved)


def copied(method):
    return {name: value.clone() for name, value in method.state_dict().items()}


def test_the_second_stage_sees_a_herded_balanced_set_by_features_of_the_first(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.begin_task(second)
    main, finetune = method.stages(second)
    loop = lab.Loop()
    loop.run(main)
    with evaluating(method):
        wanted = herded_subset(second, lambda e: lab.context.scan(method.embed, e))
    assert len(method.balanced.positions) == 0
    loop.begin(finetune)
    assert torch.equal(method.balanced.positions, wanted) and torch.equal(
        finetune.streams[0].pool(), wanted
    )
    labels = torch.cat([second.examples.labels, second.exemplars.labels])[wanted]
    assert labels.bincount().tolist() == [4] * 5
    assert method.network.training
    # The loss is the classifier's alone.
    batch = lab.batch_of(finetune.streams[0], wanted[:6])
    assert list(finetune.loss(batch)) == ["classification"]
    method.end_task(lab.after(second))
    assert len(method.balanced.positions) == 0 and method.teacher is None


def test_no_second_stage_without_old_exemplars_or_epochs(lab):
    first, second = lab.make_tasks((3, 2), kept=0)
    method = make(lab)
    lab.learn(method, first)
    method.begin_task(second)
    assert [s.name for s in method.stages(second)] == ["podnet"]
    method = make(lab, epochs=0)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.begin_task(second)
    assert [s.name for s in method.stages(second)] == ["podnet"]


@pytest.mark.parametrize("classes, factor", [((0, 1, 2), 1.0), ((1,), math.sqrt(3))])
def test_a_task_without_new_classes(lab, classes, factor):
    """All proxies train, and C_n counts the classes that there are images of."""
    method = make(lab, flat_weight=1.0, spatial_weight=0.0)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    images = torch.isin(first.examples.labels, torch.tensor(classes)).nonzero()[:, 0]
    again = replace(second, classes=classes, known=3, examples=first.examples.select(images))
    assert again.total == 3 and again.new_classes == ()
    method.begin_task(again)
    main, finetune = method.stages(again)
    with torch.no_grad():
        for parameter in method.network.extractors.parameters():
            parameter.mul_(1.1).add_(0.05)
    batch = lab.batch_of(main.streams[0], torch.arange(0, len(images), 3))
    with evaluating(method), torch.no_grad():
        found = float(main.loss(batch)["flat"])
        f, g = method.network.features(batch.images), method.teacher.features(batch.images)
        cosine = float(torch.nn.functional.cosine_similarity(f.double(), g.double()).mean())
    assert found == pytest.approx(factor * (1 - cosine), rel=1e-4)
    before = copied(method)
    loop = lab.Loop()
    for stage in (main, finetune):
        loop.run(stage)
        assert not torch.equal(method.head.old, before["network.head.old"])
        before = copied(method)
        assert "network.head.old" in loop.trained[stage.name]
    assert method.head.classes == 3 and len(method.head.new) == 0
    method.end_task(again)


def test_readouts(lab):
    method = make(lab)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    lab.learn(method, second)
    assert list(method.readouts()) == ["linear", "nme"]
    images = lab.read(second.examples, range(5))
    exemplars = lab.after(second).exemplars
    with evaluating(method), torch.no_grad():
        features = method.network.features(images)
        assert torch.equal(method(images), method.network(images))
        found = method(images).double().numpy()
        np.testing.assert_allclose(found, naive_scores(method.head, features), atol=1e-5)
        nme = method.readouts()["nme"](images)
        rows = [
            torch.nn.functional.normalize(
                method.embed(lab.read(exemplars, range(len(exemplars)), flip=flip)), dim=1
            )
            for flip in (False, True)
        ]
    for y in range(5):
        mine = (exemplars.labels == y).nonzero()[:, 0]
        mean = torch.nn.functional.normalize(sum(r[mine].mean(0) for r in rows), dim=0)
        units = torch.nn.functional.normalize(features, dim=1)
        torch.testing.assert_close(nme[:, y], -(units - mean).square().sum(1), rtol=0, atol=1e-5)
    method.end_task(replace(second, exemplars=exemplars.select([])))
    assert list(method.readouts()) == ["linear"] and method.retained()[0].nbytes == 0


def test_a_backbone_without_levels_is_a_sentence(lab):
    class Flat(torch.nn.Sequential):
        out_channels = 4

    method = make(lab)
    method.context = type(
        "Own", (), {"make_backbone": lambda self: Flat(torch.nn.Conv2d(3, 4, 3))}
    )()
    (task,) = lab.make_tasks((2,))
    method.begin_task(task)
    (stage,) = method.stages(task)
    with pytest.raises(ValueError, match="Flat has no levels"):
        stage.loss(lab.batch_of(stage.streams[0], torch.arange(3)))


def test_a_published_network_trains_with_double_backward(lab):
    """ResNet-20 as PODNet has it: no last ReLU, residual branches that start at zero."""
    options = PODNet.published_network(PODNet.Config())
    assert options == {"last_relu": False, "zero_init_residual": True}
    method = make(lab)
    method.context.make_backbone = lambda: resnet20(width=4, **options)
    (task, second) = lab.make_tasks((2, 2))
    try:
        lab.learn(method, task)
        method.begin_task(second)
        stage = method.stages(second)[0]
        batch = lab.batch_of(stage.streams[0], torch.arange(0, 24, 4))
        theta = dict(method.network.extractors.named_parameters())
        theta = {f"network.extractors.{name}": p for name, p in theta.items()}
        mask = torch.ones(1, requires_grad=True)
        inner = Batch(batch.images * mask, batch.labels, batch.part, batch.index)
        # The network is still its teacher, bit by bit: every distance in the loss is zero.
        with evaluating(method):
            losses = stage.loss(inner, theta)
            assert float(losses["spatial"].detach()) == 0.0
            gradients = torch.autograd.grad(
                sum(losses.values()), list(theta.values()), create_graph=True
            )
            (slope,) = torch.autograd.grad(sum(g.square().sum() for g in gradients), mask)
        assert slope.isfinite().all() and all(g.isfinite().all() for g in gradients)
        lab.Loop().run(stage)
    finally:
        del method.context.make_backbone


@pytest.mark.parametrize("addon", ["cam", "cim", "aanets"])
def test_composes(addon):
    """Learns uneven tasks, the last of one class of three images."""
    rng = np.random.default_rng(0)
    colours = rng.uniform(40, 215, (5, 1, 1, 3))

    def draw(label, count):
        noise = rng.normal(colours[label], 20, (count, 14, 14, 3))
        return noise.clip(0, 255).astype(np.uint8)

    shelves = [{"ant": draw(0, 12), "bee": draw(1, 12)}, {"cat": draw(2, 11), "dog": draw(3, 12)}]
    shelves.append({"elk": draw(4, 3)})
    options = {
        "engine.epoch_scale": 0.01,
        "engine.batch_size": 8,
        "engine.progress": False,
        "network.name": "resnet20",
        "network.width": 4,
        "augment.size": 12,
    }
    learner = Learner(f"podnet+{addon}", memory="15 images", **options)
    for shelf in shelves:
        learner.learn(shelf)
    method = learner.method
    assert method.head.classes == 5 and method.head.proxies == 10
    backbone = method.network.extractors[0]
    plain = backbone.plastic if addon == "aanets" else backbone
    assert isinstance(plain.stages[-1][-1].relu2, torch.nn.Identity), "features before the ReLU"
    assert all(p.isfinite().all() for p in learner.method.parameters())
    images = np.concatenate([draw(label, 4) for label in range(5)])
    prediction = learner.predict(images)
    assert len(prediction.names) == 20 and set(prediction.names) <= set(learner.class_names)
    assert all(count >= 1 for count in learner.memory.counts(5))
