"""DER's channel masks and pruning (Yan et al. 2021, Sec. 3.3), and heads that are copied."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastcil import train
from fastcil.contract import Batch, evaluating, total
from fastcil.errors import FastcilError
from fastcil.methods.der import DER
from fastcil.nn.channel_masks import MaskedResNet
from fastcil.nn.pruning import PrunedResNet
from fastcil.nn.resnet import ResNet

LARGEST = 20.0


def backbone():
    # As the engine places them.
    return ResNet((1, 1), width=4, stem="cifar", projected=False).to(
        memory_format=torch.channels_last
    )


@pytest.fixture
def resnets(lab) -> SimpleNamespace:
    """The lab, with small residual networks for backbones."""
    context = type(lab.context)()
    context.make_backbone = context.bare_backbone = backbone
    return SimpleNamespace(**{**vars(lab), "context": context})


def make(lab, epochs=3, **options):
    torch.manual_seed(0)
    config = DER.Config(masks=True, **{"largest_scale": LARGEST, **options})
    short = replace(lab.shorten(config, epochs=epochs), first=config.first)
    return DER(short, lab.context)


def turn_off(method, share=0.5):
    """Makes some of the newest extractor's masks negative, as training would."""
    generator = torch.Generator().manual_seed(1)
    for mask in method.network.extractors[-1].masks:
        off = torch.rand(mask.logits.shape, generator=generator) < share
        off[0] = False
        mask.logits.data[off] = -1.0


@pytest.mark.parametrize(("size", "steps"), [(16, 3), (36, 1), (7, 5), (35, 1)])
def test_scale_rises_within_every_epoch(resnets, size, steps):
    method = make(resnets)
    (task,) = resnets.make_tasks((3,))
    method.begin_task(task)
    (stage,) = method.stages(task)
    stage.streams = (replace(stage.streams[0], batch_size=size),)
    recipe = replace(method.config.representation, batch_size=size)
    method.config = replace(method.config, representation=recipe)
    stage = method.stages(task)[0]
    loop, seen = resnets.Loop(), []
    loop.begin(stage)
    for epoch in range(2):
        for call in stage.before_epoch:
            call(epoch)
        for positions in torch.arange(36).split(size)[:steps]:
            stage.step([resnets.batch_of(stage.streams[0], positions)], loop)
            scales = {float(mask.scale) for mask in method.network.extractors[-1].masks}
            assert len(scales) == 1
            seen.append(scales.pop())
    once = [LARGEST]
    if steps > 1:
        once = [
            1 / LARGEST + (LARGEST - 1 / LARGEST) * (b - 1) / (steps - 1)
            for b in range(1, steps + 1)
        ]
    np.testing.assert_allclose(seen, once * 2, rtol=1e-5)


def test_loss_weighs_the_share_in_use(resnets):
    method = make(resnets, sparsity=0.3)
    first, second = resnets.make_tasks((3, 2))
    resnets.learn(method, first)
    method.begin_task(second)
    turn_off(method)
    method.double()
    stage = method.stages(second)[0]
    batch = resnets.batch_of(stage.streams[0], torch.arange(0, 36, 5))
    batch = replace(batch, images=batch.images.double())
    with evaluating(method), torch.no_grad():
        losses = stage.loss(batch)
        share = method.network.extractors[-1].used()
    assert list(losses) == ["classification", "auxiliary", "sparsity"]
    assert 0 < share < 1
    assert float(losses["sparsity"]) == pytest.approx(0.3 * float(share), rel=1e-12)


def test_sparsity_turns_channels_off(resnets):
    # A rate this high stands for many steps.
    method = make(resnets, epochs=6, sparsity=60.0)
    (task,) = resnets.make_tasks((3,))
    resnets.learn(method, task)
    spared = make(resnets, epochs=6, sparsity=0.0)
    resnets.learn(spared, task)
    sizes = [sum(p.numel() for p in m.network.parameters()) for m in (method, spared)]
    assert sizes[0] < 0.5 * sizes[1]


def test_pruned_learner_computes_what_the_masked_one_did(resnets):
    method = make(resnets)
    for task in resnets.make_tasks((3, 2)):
        method.begin_task(task)
        stages = method.stages(task)
        stage = stages[0]
        finish, stage.finish = stage.finish, None
        resnets.Loop().run(stage)
        turn_off(method)
        newest = method.network.extractors[-1]
        for mask in newest.masks:
            mask.logits.data.mul_(1e3)
        images = resnets.read(task.examples, range(6))
        with evaluating(method), torch.no_grad():
            before = method.logits(images)
            finish()
            torch.testing.assert_close(method.logits(images), before, rtol=1e-6, atol=1e-6)
        pruned = method.network.extractors[-1]
        assert isinstance(newest, MaskedResNet) and isinstance(pruned, PrunedResNet)
        assert pruned.out_channels < newest.out_channels
        assert method.network.head.in_features == method.network.out_channels
        for later in stages[1:]:
            resnets.Loop().run(later)
        method.end_task(resnets.after(task))


def test_retained_bytes_are_those_left(resnets):
    whole = make(resnets, sparsity=0.0)
    small = make(resnets, sparsity=0.0)
    kept = {}
    for name, method in (("whole", whole), ("small", small)):
        for task in resnets.make_tasks((2, 2, 2)):
            method.begin_task(task)
            for number in range(len(method.stages(task))):
                stage = method.stages(task)[number]
                if name == "small" and number == 0:
                    turn_off(method)
                    # As sure as it gets, whatever training says.
                    stage.finish = lambda m=method, f=stage.finish: (turn_off(m), f())
                resnets.Loop().run(stage)
            method.end_task(resnets.after(task))
        kept[name] = [entry.nbytes for entry in method.retained()]
    assert len(kept["small"]) == len(kept["whole"]) == 2
    for ours, theirs in zip(kept["small"], kept["whole"], strict=True):
        assert ours < 0.6 * theirs
    extractors = small.network.extractors[1:]
    held = [sum(t.nbytes for t in e.state_dict().values()) for e in extractors]
    assert kept["small"] == held


def test_the_next_extractor_starts_from_what_is_left(resnets):
    method = make(resnets)
    first, second = resnets.make_tasks((3, 2))
    method.begin_task(first)
    (stage,) = method.stages(first)
    stage.finish = lambda f=stage.finish: (turn_off(method), f())
    resnets.Loop().run(stage)
    method.end_task(resnets.after(first))
    old = method.network.extractors[0]
    method.begin_task(second)
    kept, new = method.network.extractors
    assert kept is old and isinstance(new, MaskedResNet)
    assert new.out_channels == 8 > old.out_channels
    assert all((mask.logits == 1).all() and mask.scale == LARGEST for mask in new.masks)
    left = old.kept[0]
    assert torch.equal(new.body.stem[0].weight[left], old.body.stem[0].weight)
    assert torch.equal(new.body.stem[1].running_mean[left], old.body.stem[1].running_mean)
    assert all(p.requires_grad for p in new.parameters()) and new.training
    assert not any(p.requires_grad for p in old.parameters())


def test_uneven_tasks_and_one_of_known_classes(resnets):
    method = make(resnets, epochs=4)
    tasks = resnets.make_tasks((5, 3, 1))
    for task in tasks:
        loop = resnets.learn(method, task)
        assert all(torch.tensor(v).isfinite().all() for v in loop.losses.values())
        method.release()
    last = resnets.after(tasks[-1]).exemplars
    again = replace(tasks[0], index=3, known=9, exemplars=last)
    resnets.learn(method, again)
    assert [type(e) for e in method.network.extractors] == [PrunedResNet] * 4
    images = resnets.read(tasks[0].examples, range(4))
    with evaluating(method), torch.no_grad():
        assert method.logits(images).shape == (4, 9)


@pytest.mark.parametrize("number", [0, 1])
def test_resumed_in_the_middle_of_an_epoch(resnets, number):
    method = make(resnets)
    first, second = resnets.make_tasks((3, 2))
    resnets.learn(method, first)
    torch.manual_seed(5)
    method.begin_task(second)
    if number:
        resnets.Loop().run(method.stages(second)[0])
    stage = method.stages(second)[number]
    loop = resnets.Loop()
    loop.begin(stage)
    batches = [resnets.batch_of(stage.streams[0], torch.arange(n, 20, 3)) for n in range(3)]
    for call in stage.before_epoch:
        call(0)
    stage.step([batches[0]], loop)
    saved = json.loads(json.dumps(method.structure()))
    tensors = {key: value.clone() for key, value in method.tensors().items()}
    optimizer = copy.deepcopy(loop.optimizer.state_dict())

    twin = make(resnets)
    twin.restore(saved)
    twin.load_tensors(tensors)
    again = twin.stages(second)[number]
    twin.train()
    twin.requires_grad_(False)
    other = resnets.Loop()
    parameters = list(again.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    other.optimizer = again.recipe.make_optimizer(parameters)
    other.optimizer.load_state_dict(optimizer)
    for batch in batches[1:]:
        stage.step([batch], loop)
        again.step([batch], other)
    if stage.finish is not None:
        stage.finish()
        again.finish()
    assert twin.structure() == method.structure()
    found = twin.tensors()
    assert found.keys() == method.tensors().keys()
    assert all(torch.equal(v, found[k]) for k, v in method.tensors().items())


def test_a_bilevel_step_goes_through_masks(resnets):
    method = make(resnets)
    first, second = resnets.make_tasks((3, 2))
    resnets.learn(method, first)
    method.begin_task(second)
    stage = method.stages(second)[0]
    resnets.Loop().begin(stage)
    method.eval()
    batch = resnets.batch_of(stage.streams[0], torch.arange(0, 36, 6))
    scale = torch.ones(1, requires_grad=True)
    inner = Batch(batch.images * scale, batch.labels, batch.part, batch.index)
    theta = {
        key: p
        for key, p in method.named_parameters()
        if p.requires_grad and key.startswith("network.extractors")
    }
    assert any(key.endswith("logits") for key in theta)
    gradients = torch.autograd.grad(
        total(stage.loss(inner, theta)), list(theta.values()), create_graph=True
    )
    stepped = {key: p - 0.1 * g for (key, p), g in zip(theta.items(), gradients, strict=True)}
    outer = stage.call(stage.logits, batch.images, parameters=stepped).square().sum()
    (slope,) = torch.autograd.grad(outer, scale)
    assert slope.isfinite().all() and slope.abs() > 0


def test_without_masks_nothing_is_kept_for_them(lab):
    plain = DER(lab.shorten(DER.Config()), lab.context)
    (task,) = lab.make_tasks((3,))
    plain.begin_task(task)
    assert "position" not in plain.tensors()
    assert plain.stages(task)[0].finish is None


def test_another_backbone_is_refused(lab):
    (task,) = lab.make_tasks((3,))
    with pytest.raises(FastcilError, match="backbone is a ConvNet, whose channels can't be masked"):
        make(lab).begin_task(task)


def test_composes_with_cim_and_is_saved(tmp_path):
    rng = np.random.default_rng(0)
    labels = [c for c in range(4) for _ in range(6)]
    images = rng.integers(0, 256, (len(labels), 16, 16, 3), np.uint8)
    options = {
        "engine.epoch_scale": 0.01,
        "engine.batch_size": 8,
        "engine.progress": False,
        "network.name": "resnet20",
        "network.width": 4,
        "der.masks": True,
        "cim.refresh": 1,
    }
    arguments = {"data": ((images, labels), (images[::3], labels[::3])), "scenario": "b2-inc2"}
    result = train("der+cim", memory="8 images", device="cpu", **arguments, **options)
    learner = result.learner
    learner.save(tmp_path / "learner.safetensors")
    again = type(learner).load(tmp_path / "learner.safetensors", device="cpu")
    ours, theirs = learner.predict(images), again.predict(images)
    assert torch.equal(ours.scores, theirs.scores)
    assert isinstance(again.method.network.extractors[1], PrunedResNet)


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_copied_head_keeps_its_old_block(lab, warmup):
    torch.manual_seed(0)
    method = DER(lab.shorten(DER.Config(head="copied")), lab.context)
    recipe = replace(method.config.representation, warmup=warmup, epochs=3)
    method.config = replace(method.config, representation=recipe)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    old = method.network.head.weight.detach().clone()
    method.begin_task(second)
    head = method.network.head
    assert head.weight.shape == (5, 12) and head.bias is None
    assert torch.equal(head.weight[:3, :6], old)
    before = [head.weight.detach().clone(), method.aux_head.weight.detach().clone()]
    for epoch in range(3):
        for call in method.stages(second)[0].before_epoch:
            call(epoch)
    after = [head.weight, method.aux_head.weight]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    method.stages(second)[1].begin()
    assert not (method.network.head.weight == before[0]).any()
