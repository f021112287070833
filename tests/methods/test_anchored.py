"""EWC and its kin against their equations, written with every task's anchor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from fastcil.contract import evaluating
from fastcil.curvature import DiagonalFisher, KroneckerFactors, MemoryAwareSynapses
from fastcil.curvature.anchor import draws, kept_curvature, scan_of
from fastcil.curvature.curvature import Penalty
from fastcil.data import Examples
from fastcil.errors import FastcilError
from fastcil.methods.ewc import EWC, OnlineEWC
from fastcil.methods.mas import MAS
from fastcil.methods.osla import OSLA
from fastcil.methods.si import SI
from fastcil.nn import LinearHead

METHODS = [EWC, OnlineEWC, MAS, OSLA, SI]
SIZES = (2, 3, 2)


def make(lab, cls, **options):
    torch.manual_seed(0)
    return cls(lab.shorten(cls.Config(**options), epochs=2, lr=0.02), lab.context)


def shaken(method):
    """The method with weights away from where the last task left them."""
    with torch.no_grad():
        for number, p in enumerate(method.network.parameters()):
            generator = torch.Generator().manual_seed(number)
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    method.eval()
    return method


def weights(network):
    return {name: p.detach().double().clone() for name, p in network.named_parameters()}


def moved(now, then):
    """A displacement; rows of a head that came later count from zero."""
    step = {}
    for name, value in then.items():
        whole = torch.zeros_like(now[name])
        whole[tuple(slice(n) for n in value.shape)] = value
        step[name] = now[name] - whole
    return step


def batch_of(lab, stage, count=10):
    return lab.batch_of(stage.streams[0], torch.arange(count))


def history(lab, method, tasks, measure):
    """Learns tasks; after each its weights, and what ``measure`` says of it there."""
    past = []
    for task in tasks:
        lab.learn(method, task)
        twin = copy.deepcopy(method.network).double()
        with evaluating(twin):
            past.append((weights(method.network), measure(twin, task)))
    return past


def quadratic(values, step):
    """Sum of F D^2, F being of the first rows."""
    total = 0.0
    for name, value in values.items():
        d = step[name][tuple(slice(n) for n in value.shape)]
        total += float((value.double() * d.square()).sum())
    return total


def fisher(lab):
    def measure(network, task):
        sums = DiagonalFisher(network, estimator="empirical")
        images = lab.read(task.examples, range(len(task.examples))).double()
        sums.update(images, task.examples.labels)
        return sums.values()

    return measure


def sensitivity(lab):
    def measure(network, task):
        sums = MemoryAwareSynapses(network)
        sums.update(lab.read(task.examples, range(len(task.examples))).double())
        return sums.values()

    return measure


def penalty_of(lab, method, tasks):
    """The penalty of a third task's loss, away from the anchors, and the weights there."""
    method.begin_task(tasks[2])
    (stage,) = method.stages(tasks[2])
    shaken(method)
    batch = batch_of(lab, stage)
    losses = stage.loss(batch)
    logits = method.network(batch.images)
    assert torch.allclose(losses["classification"], functional.cross_entropy(logits, batch.labels))
    return losses["penalty"], weights(method.network), stage, batch


def test_ewc_has_an_anchor_for_every_task(lab):
    """The sum over tasks but for a constant: differences of two points, and the gradient."""
    method, tasks = make(lab, EWC, lam=3.0), lab.make_tasks(SIZES)
    past = history(lab, method, tasks[:2], fisher(lab))

    def truth(now):
        return 1.5 * sum(quadratic(values, moved(now, then)) for then, values in past)

    first, here, stage, batch = penalty_of(lab, method, tasks)
    shaken(method)
    second, there = stage.loss(batch)["penalty"], weights(method.network)
    assert float((second - first).detach()) == pytest.approx(truth(there) - truth(here), rel=1e-3)
    leaves = {name: value.clone().requires_grad_() for name, value in there.items()}
    wanted = 0.0
    for then, values in past:
        for name, value in values.items():
            rows = tuple(slice(n) for n in value.shape)
            wanted = wanted + 1.5 * (value * (leaves[name][rows] - then[name]).square()).sum()
    wanted.backward()
    method.network.requires_grad_(True).zero_grad()
    stage.loss(batch)["penalty"].backward()
    for name, p in method.network.named_parameters():
        assert torch.allclose(p.grad.double(), leaves[name].grad, rtol=1e-3, atol=1e-6), name


def test_online_ewc_has_one(lab):
    method, tasks = make(lab, OnlineEWC, lam=3.0, gamma=0.5), lab.make_tasks(SIZES)
    past = history(lab, method, tasks[:2], fisher(lab))
    found, here, *_ = penalty_of(lab, method, tasks)
    step = moved(here, past[1][0])
    wanted = 1.5 * (0.5 * quadratic(past[0][1], step) + quadratic(past[1][1], step))
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("merging, factor", [("sum", 1.0), ("mean", 0.5)])
def test_mas(lab, merging, factor):
    method, tasks = make(lab, MAS, lam=3.0, merging=merging), lab.make_tasks(SIZES)
    past = history(lab, method, tasks[:2], sensitivity(lab))
    found, here, *_ = penalty_of(lab, method, tasks)
    step = moved(here, past[1][0])
    wanted = 3.0 * factor * sum(quadratic(values, step) for _, values in past)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)


def test_osla_merges_factors(lab):
    method = make(lab, OSLA, lam=3.0, estimator="exact")
    tasks = lab.make_tasks(SIZES)

    def measure(network, task):
        factors = KroneckerFactors(network, estimator="exact")
        factors.update(lab.read(task.examples, range(len(task.examples))).double())
        return factors.dense()

    past = history(lab, method, tasks[:2], measure)
    found, here, *_ = penalty_of(lab, method, tasks)
    step, wanted = moved(here, past[1][0]), 0.0
    for layer in past[0][1]:
        (one,), (two,) = past[0][1][layer], past[1][1][layer]
        a, outputs = 0.5 * (one.input + two.input), two.output / 2
        outputs[: len(one.output), : len(one.output)] += one.output / 2
        parts = [step[f"{layer}.weight"].flatten(1)]
        if f"{layer}.bias" in step:
            parts.append(step[f"{layer}.bias"][:, None])
        d = torch.cat(parts, 1)[: len(outputs)]
        # Lambda is the sum over both tasks.
        wanted += 2 * 1.5 * float((d * (outputs @ d @ a)).sum())
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-3)


def test_si_follows_the_path(lab):
    """omega by hand, from the weights before and after each step and the gradient of CE alone."""
    method, tasks = make(lab, SI, c=0.7, xi=0.5), lab.make_tasks(SIZES)
    lab.learn(method, tasks[0])
    importance, anchor = method.kept.group("omega/"), method.kept.group("anchor/")
    assert any(bool(v.any()) for v in importance.values())
    method.begin_task(tasks[1])
    start = weights(method.network)
    (stage,) = method.stages(tasks[1])
    path = {name: torch.zeros_like(value) for name, value in start.items()}

    class Watching(lab.Loop):
        def update(self, loss):
            before = weights(method.network)
            super().update(loss)
            after = weights(method.network)
            for name, gradient in self.gradients.items():
                path[name] -= gradient * (after[name] - before[name])

    loop = Watching()
    inner = stage.step

    def step(batches, stepper):
        twin = copy.deepcopy(method.network)
        loss = functional.cross_entropy(twin(batches[0].images), batches[0].labels)
        found = torch.autograd.grad(loss, list(twin.parameters()))
        names = [name for name, _ in twin.named_parameters()]
        loop.gradients = {n: g.double() for n, g in zip(names, found, strict=True)}
        return inner(batches, stepper)

    stage.step = step
    loop.run(stage)
    for name, value in method.path.group("omega/").items():
        assert torch.allclose(value.double(), path[name], rtol=1e-3, atol=1e-7), name
    end = weights(method.network)
    method.end_task(lab.after(tasks[1]))
    for name, value in method.kept.group("omega/").items():
        wanted = path[name].clamp(min=0) / ((end[name] - start[name]).square() + 0.5)
        old = importance[name].double()
        wanted[tuple(slice(n) for n in old.shape)] += old
        assert torch.allclose(value.double(), wanted, rtol=1e-3, atol=1e-7), name
    found, here, *_ = penalty_of(lab, method, tasks)
    total = quadratic(method.kept.group("omega/"), moved(here, end))
    assert float(found.detach()) == pytest.approx(0.7 * total, rel=1e-4)
    assert anchor.keys() == importance.keys()


def test_si_s_optimiser_sees_the_whole_gradient(lab):
    method, tasks = make(lab, SI, c=5.0), lab.make_tasks(SIZES)
    lab.learn(method, tasks[0])
    method.begin_task(tasks[1])
    (stage,) = method.stages(tasks[1])
    loop = lab.Loop()
    loop.begin(stage)
    shaken(method)
    batch = batch_of(lab, stage)
    losses = stage.loss(batch)
    parameters = list(method.network.parameters())
    wanted = torch.autograd.grad(losses["classification"] + losses["penalty"], parameters)
    seen = []
    loop.update = lambda loss: seen.extend(torch.autograd.grad(loss, parameters))
    stage.step([batch], loop)
    for found, truth in zip(seen, wanted, strict=True):
        assert torch.allclose(found, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", METHODS)
def test_heads_of_their_own_are_not_held(lab, cls):
    method, tasks = make(lab, cls, head="task"), lab.make_tasks(SIZES)
    lab.learn(method, tasks[0])
    assert not any("head." in name for name in method.kept.names)
    method.begin_task(tasks[1])
    (stage,) = method.stages(tasks[1])
    shaken(method)
    batch = batch_of(lab, stage)
    logits = method.network(batch.images)
    wanted = functional.cross_entropy(logits[:, 2:5], batch.labels - 2)
    assert torch.allclose(stage.loss(batch)["classification"], wanted)
    method.network.requires_grad_(True).zero_grad()
    stage.loss(batch)["classification"].backward()
    assert not method.network.head.weight.grad[:2].any()
    assert method.network.head.weight.grad[2:].any()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (EWC, {}),
        (EWC, {"estimator": "exact"}),
        (OnlineEWC, {"per": "batch"}),
        (MAS, {}),
        (OSLA, {"curvature": "kfac", "estimator": "exact"}),
        (OSLA, {"curvature": "ekfac", "estimator": "sampled"}),
    ],
)
def test_curvature_is_that_of_the_tasks_own_head(lab, cls, options):
    """As of a network that has no other outputs."""
    method, (first, second, _) = make(lab, cls, head="task", **options), lab.make_tasks(SIZES)
    lab.learn(method, first)
    generator = torch.Generator().manual_seed(0)
    step = {
        name: torch.randn(p.shape, generator=generator)
        for name, p in method.network.named_parameters()
        if not name.startswith("head.")
    }

    # Of the second task alone.
    method.shares = lambda task: (0.0, 1.0)
    lab.learn(method, second)
    measured = method.curvature()
    measured.load_tensors(kept_curvature(method.kept))
    twin = copy.deepcopy(method)
    twin.network.head = LinearHead(6, 3)
    with torch.no_grad():
        twin.network.head.weight.copy_(method.network.head.weight[2:5])
        twin.network.head.bias.copy_(method.network.head.bias[2:5])
    alone = Examples(second.examples.images, second.examples.labels - 2)
    expected = twin.curvature()
    expected.measure(
        scan_of(lab.context, twin.network, alone, expected.of_batches),
        draws(1, torch.initial_seed()),
    )
    found = Penalty(measured)(step)
    torch.testing.assert_close(found, Penalty(expected)(step), rtol=1e-4, atol=1e-6)
    assert found > 1e-3


@pytest.mark.parametrize("cls", [EWC, OnlineEWC])
def test_fisher_information_of_a_few_images(lab, cls):
    """The square of their mean gradient, as the code that SAMC's figures go back to has it."""
    method = make(lab, cls, per="batch", images=10, head="task")
    (task,) = lab.make_tasks((3,))
    lab.learn(method, task)
    chosen = torch.randperm(36, generator=draws(0, torch.initial_seed()))[:10]
    method.eval()
    logits = method.network(lab.read(task.examples, chosen.tolist()))
    loss = functional.cross_entropy(logits, task.examples.labels[chosen])
    method.requires_grad_(True)
    for name, p in method.network.named_parameters():
        if not name.startswith("head."):
            (gradient,) = torch.autograd.grad(loss, [p], retain_graph=True)
            found = method.kept[f"curvature/{name}"]
            torch.testing.assert_close(found, gradient.square(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("cls", METHODS)
def test_what_is_kept_survives(lab, cls):
    method, tasks = make(lab, cls), lab.make_tasks(SIZES)
    for task in tasks[:2]:
        lab.learn(method, task)
    again = make(lab, cls)
    again.restore(method.structure())
    again.load_tensors({name: value.clone() for name, value in method.tensors().items()})
    losses = []
    for one in (method, again):
        torch.manual_seed(7)
        one.begin_task(tasks[2])
        (stage,) = one.stages(tasks[2])
        shaken(one)
        losses.append(stage.loss(batch_of(lab, stage)))
    assert float(losses[0]["penalty"].detach()) > 0
    for name, value in losses[0].items():
        assert torch.equal(value, losses[1][name])
    entries = method.retained()
    assert {entry.kind for entry in entries} == {"curvature"}
    pull = getattr(method, "pull", None)
    held = method.kept.nbytes + (0 if pull is None else pull.nbytes)
    assert sum(entry.nbytes for entry in entries) == held > 0


@pytest.mark.parametrize("kind", ["tkfac", "ekfac", "xkfac", "diagonal"])
def test_osla_by_other_curvatures(lab, kind):
    method, tasks = make(lab, OSLA, curvature=kind, lam=0.1), lab.make_tasks(SIZES)
    for task in tasks:
        losses = lab.learn(method, task).losses
        assert all(value == value for values in losses.values() for value in values)


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize(
    "options, words",
    [({"lam": -1.0}, "is -1.0"), ({"head": "two"}, "head is 'two'")],
)
def test_bad_settings_are_named(cls, options, words):
    options = {("c" if cls is SI and name == "lam" else name): v for name, v in options.items()}
    with pytest.raises(FastcilError, match=words):
        cls.Config(**options)
