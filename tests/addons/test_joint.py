"""Joint training against its loss written out by hand (Luo et al. 2023, Table 3, row 8)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastcil.addons.cim import CIM
from fastcil.contract import Batch


def compose(world, known=0, **options):
    """A method in mid-training whose learning stage learns phi too, and a batch for it."""
    context = world.FakeContext()
    method = world.Mine(world.Mine.Config(), context)
    addon = CIM(CIM.Config(optimisation="joint", **options), context, method)
    task = world.make_task(0, classes=4)
    if known:
        world.begin(method, addon, task)
        addon.end_task(task)
        task = world.make_task(1, classes=4)
    stages = world.begin(method, addon, task, seed=3)
    norm = method.network.extractors[0].norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        for parameter in addon.phi.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    method.train()
    return method, addon, stages[0], task


def make_batch(classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64),
        torch.randint(0, classes, (6,), generator=generator),
        torch.zeros(6, dtype=torch.int64),
        torch.arange(6),
    )


def pade(x, curve):
    a, b = curve
    top = sum(a[k] * x**k for k in range(6))
    return top / (1 + sum((b[k - 1] * x**k).abs() for k in range(1, 5)))


def by_hand(method, addon, batch, new, ratio=4.0, foreground=1.0):
    """The loss in plain functions: names -> tensors, and phi."""
    w = {name: p.detach().clone().requires_grad_() for name, p in method.named_parameters()}
    phi = [
        tuple(t.detach().clone().requires_grad_() for t in (c.numerator, c.denominator))
        for c in addon.phi[0]
    ]
    buffers = dict(method.named_buffers())
    p = "network.extractors.0."

    def maps(images, activations, training):
        x = F.conv2d(images, w[p + "conv1.weight"], None, 2, 1)
        x = F.batch_norm(
            x,
            None if training else buffers[p + "norm.running_mean"],
            None if training else buffers[p + "norm.running_var"],
            w[p + "norm.weight"],
            w[p + "norm.bias"],
            training,
        )
        x = F.conv2d(activations[0](x), w[p + "conv2.weight"], w[p + "conv2.bias"], 2, 1)
        return activations[1](x)

    def head(features):
        return features @ w["network.head.weight"].T + w["network.head.bias"]

    def shrunk(images, eta):
        if eta == 1:
            return images
        side = images.shape[-1]
        cells = int(side / eta**0.5)
        source = torch.arange(side) * cells // side * side // cells
        return images[:, :, source][:, :, :, source]

    seen = maps(batch.images, [lambda x, c=c: pade(x, c) for c in phi], training=False)
    rows = w["network.head.weight"].detach()[batch.labels]
    activation = torch.einsum("bchw,bc->bhw", seen, rows)
    low, high = activation.amin((1, 2), True), activation.amax((1, 2), True)
    masks = (activation - low) / (high - low)
    large = F.interpolate(masks[:, None], (16, 16), mode="bilinear")
    inside, outside = shrunk(batch.images, foreground), shrunk(batch.images, ratio)
    composed = large * inside + (1 - large) * outside
    composed = torch.where(new[:, None, None, None], composed, batch.images)
    logits = head(maps(composed, [F.relu, F.relu], training=True).mean((2, 3)))
    loss = F.cross_entropy(logits, batch.labels) + 0.01 * logits.square().mean()
    loss = loss + addon.config.mu * masks.square().mean()
    scores = head(seen.mean((2, 3)))
    return loss + addon.config.mu_prime * F.cross_entropy(scores, batch.labels), w, phi


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, 0),
        ({"mu": 2.0, "mu_prime": 0.7, "ratio": 9.0}, 0),
        ({}, 4),
        ({"compress_all": True}, 4),
        ({"foreground_ratio": 2.0}, 4),
    ],
)
def test_one_gradient_for_theta_omega_and_phi(world, options, known):
    method, addon, stage, task = compose(world, known, **options)
    batch = make_batch(task.total)
    new = batch.labels >= (0 if options.get("compress_all") else known)
    assert known == 0 or options.get("compress_all") or 0 < int(new.sum()) < 6
    loss, w, phi = by_hand(
        method,
        addon,
        batch,
        new,
        options.get("ratio", 4.0),
        options.get("foreground_ratio", 1.0),
    )
    loss.backward()
    learned = list(stage.parameters())
    assert {id(p) for p in learned} == {
        id(p) for p in (*method.network.parameters(), *addon.phi.parameters())
    }
    before = {name: b.clone() for name, b in method.named_buffers()}
    losses = stage.loss(batch)
    assert list(losses) == ["classification", "pull", "cim masks", "cim branch"]
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(loss.item(), rel=1e-9)
    total.backward()
    for name, parameter in method.named_parameters():
        assert torch.allclose(parameter.grad, w[name].grad, rtol=1e-7, atol=1e-10), name
    # phi's share: beta_2 = 0.01 over the stage's 0.05.
    for curve, (numerator, denominator) in zip(addon.phi[0], phi, strict=True):
        for mine, theirs in ((curve.numerator, numerator), (curve.denominator, denominator)):
            assert float(mine.grad.abs().max()) > 0
            assert torch.allclose(mine.grad, 0.2 * theirs.grad, rtol=1e-6, atol=1e-10)
    moved = method.network.extractors[0].norm.num_batches_tracked
    assert int(moved) == int(before["network.extractors.0.norm.num_batches_tracked"]) + 1, (
        "running statistics follow the network's own pass alone"
    )


def test_every_step_of_the_stage_moves_phi_at_beta_2(world):
    method, addon, stage, task = compose(world)
    assert stage.companions == []
    batch = make_batch(task.total)
    loss, w, phi = by_hand(method, addon, batch, torch.ones(6, dtype=torch.bool))
    loss.backward()
    before = [(c.numerator.detach().clone(), c.denominator.detach().clone()) for c in addon.phi[0]]
    weights = {name: p.detach().clone() for name, p in method.named_parameters()}
    stage.step([batch], world.Lane(stage))
    for curve, start, own in zip(addon.phi[0], before, phi, strict=True):
        for now, old, tensor in zip((curve.numerator, curve.denominator), start, own, strict=True):
            assert torch.allclose(now.detach(), old - 0.01 * tensor.grad, rtol=1e-6, atol=1e-9)
    for name, parameter in method.named_parameters():
        expected = weights[name] - 0.05 * w[name].grad
        assert torch.allclose(parameter.detach(), expected, rtol=1e-6, atol=1e-9), name


def test_other_stages_stay_as_they_are(world):
    method, addon, _, task = compose(world)
    rest = addon.stages(task, method.stages(task))[1]
    assert list(rest.loss(make_batch(task.total))) == ["classification", "pull"]
    assert {id(p) for p in rest.parameters()} == {id(p) for p in method.network.head.parameters()}
