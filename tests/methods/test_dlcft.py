"""DLCFT against its equations, and that its loss is what the paper says it is: quadratic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fastcil.contract import Batch
from fastcil.curvature import KroneckerFactors
from fastcil.curvature.anchor import displacements, kept_curvature
from fastcil.errors import FastcilError
from fastcil.methods.dlcft import DLCFT
from fastcil.nn import Tensors, leaky

SIZES = (2, 3, 2)


def make(lab, **options):
    torch.manual_seed(0)
    return DLCFT(lab.shorten(DLCFT.Config(**options), epochs=2, lr=0.002), lab.context)


def shake(method, scale=0.1):
    with torch.no_grad():
        for number, p in enumerate(method.network.parameters()):
            generator = torch.Generator().manual_seed(number)
            p.add_(scale * torch.randn(p.shape, generator=generator))


def batch_of(lab, stage, count=8):
    """Images of every stream, joined."""
    parts = [lab.batch_of(s, s.pool()[:count]) for s in stage.streams]
    return Batch.cat(parts)


def errors(logits, labels, alpha=15.0):
    """Eq. 5."""
    return 0.5 * (alpha * functional.one_hot(labels, logits.shape[1]) - logits).square().sum(1)


@pytest.mark.parametrize("replays", [False, True])
def test_the_loss_is_eq_11_and_eq_14(lab, replays):
    method, tasks = make(lab, curvature="kfac", lam=0.3), lab.make_tasks(SIZES)
    for task in tasks[:2]:
        lab.learn(method, task)
    third = tasks[2]
    if not replays:
        third = replace(third, exemplars=third.exemplars.select([]))
    method.begin_task(third)
    (stage,) = method.stages(third)
    shake(method)
    batch = batch_of(lab, stage)
    losses = stage.loss(batch)
    each = errors(method.network(batch.images), batch.labels)
    new, lam = batch.part == 0, 0.3 if replays else 1.0
    assert torch.allclose(losses["classification"], each[new].mean() / 3)
    assert ("replay" in losses) == replays
    if replays:
        assert torch.allclose(losses["replay"], 2 / 3 * 0.7 * each[~new].mean())
    # The penalty, from the factors that were kept.
    curvature = method._curvature()
    curvature.load_tensors(kept_curvature(method.kept))
    step = displacements(method.kept, dict(method._scores().named_parameters()))
    wanted = 0.0
    for layer, ((a, g),) in curvature._factors.dense().items():
        d = torch.cat(
            [step[f"{layer}.weight"].flatten(1), step[f"{layer}.bias"][:, None]], 1
        ).detach()
        g = torch.eye(len(d)) if layer == "network.head" else g
        wanted += 0.5 * float((d * (g @ d @ a)).sum())
    assert float(losses["penalty"].detach()) == pytest.approx(2 / 3 * lam * wanted, rel=1e-4)


@pytest.mark.parametrize("merging, weights", [("mean", (1 / 2, 1 / 2)), ("text", (1 / 3, 2 / 3))])
def test_tasks_are_merged(lab, merging, weights):
    method = make(lab, curvature="kfac", estimator="exact", merging=merging)
    tasks, blocks = lab.make_tasks(SIZES), []
    for task in tasks[:2]:
        lab.learn(method, task)
        factors = KroneckerFactors(
            method.network, likelihood="gaussian", estimator="exact", dtype=torch.float64
        )
        factors.update(lab.read(task.examples, range(len(task.examples))))
        blocks.append(factors.dense())
    curvature = method._curvature()
    curvature.load_tensors(kept_curvature(method.kept))
    for layer, ((a, g),) in curvature._factors.dense().items():
        (one,), (two,) = (b[layer.removeprefix("network.")] for b in blocks)
        assert torch.allclose(
            a.double(), weights[0] * one.input + weights[1] * two.input, rtol=1e-3, atol=1e-6
        )
        if layer != "network.head":
            wanted = weights[0] * one.output + weights[1] * two.output
            assert torch.allclose(g.double(), wanted, rtol=1e-3, atol=1e-4)


def test_new_units_start_at_zero_and_are_held(lab):
    method, tasks = make(lab), lab.make_tasks(SIZES)
    lab.learn(method, tasks[0])
    before = method.network.head.weight.detach().clone()
    method.begin_task(tasks[1])
    head = method.network.head
    assert torch.equal(head.weight[:2], before)
    assert not head.weight[2:].any() and not head.bias[2:].any()
    (stage,) = method.stages(tasks[1])
    batch = batch_of(lab, stage)
    assert float(stage.loss(batch)["penalty"].detach()) == 0
    with torch.no_grad():
        head.weight[3] += 1
    assert float(stage.loss(batch)["penalty"].detach()) > 0


def test_the_extractor_is_linearised_at_its_weights(lab):
    method, tasks = make(lab), lab.make_tasks(SIZES)
    torch.manual_seed(5)
    method.begin_task(tasks[0])
    torch.manual_seed(5)
    backbone = leaky(lab.context.make_backbone().eval())
    images = lab.read(tasks[0].examples, range(6))
    assert torch.allclose(method.network.maps(images), backbone(images), atol=1e-5)
    names = [name for name, _ in method.network.named_parameters()]
    assert len(names) == 6 and not any("base" in name for name in names)


@pytest.mark.parametrize("classifier", ["joint", "static"])
def test_the_loss_is_quadratic_in_psi_and_with_a_static_classifier_in_all(lab, classifier):
    """Third differences along a random direction vanish, in float64."""
    method, tasks = make(lab, classifier=classifier), lab.make_tasks(SIZES)
    lab.learn(method, tasks[0])
    method.begin_task(tasks[1])
    method.double()
    (stage,) = method.stages(tasks[1])
    shake(method)
    batch = batch_of(lab, stage)
    batch = type(batch)(batch.images.double(), batch.labels, batch.part, batch.index)

    def third(direction):
        values = []
        named = dict(method.network.named_parameters())
        before = {name: p.detach().clone() for name, p in named.items()}
        with torch.no_grad():
            for k in range(4):
                for name, p in named.items():
                    p.copy_(before[name] + k * direction[name])
                values.append(float(stage.loss(batch)["classification"]))
            for name, p in named.items():
                p.copy_(before[name])
        difference = values[3] - 3 * values[2] + 3 * values[1] - values[0]
        return abs(difference) / max(map(abs, values))

    draws = torch.Generator().manual_seed(3)
    random = {
        name: torch.randn(p.shape, generator=draws, dtype=torch.float64)
        for name, p in method.network.named_parameters()
    }
    psi = {n: d * (not n.startswith("head.")) for n, d in random.items()}
    head = {n: d * n.startswith("head.") for n, d in random.items()}
    assert third(psi) < 1e-12 and third(head) < 1e-12
    if classifier == "static":
        assert third(random) < 1e-12
    else:
        assert third(random) > 1e-6


def test_a_static_classifier_is_the_ridge_regression_of_its_task(lab):
    method, tasks = make(lab, classifier="static", ridge=0.1), lab.make_tasks(SIZES)
    lab.learn(method, tasks[0])
    first = method.static.clone()
    task = tasks[1]
    method.begin_task(task)
    images = lab.read(task.examples, range(len(task.examples)))
    primal, _ = method.network.extractors[0].tangent(images)
    z = primal.mean((2, 3)).double()
    z = z - z.mean(0)
    y = 15.0 * functional.one_hot(task.examples.labels - 2, 3).double()
    gram = z.T @ z
    wanted = torch.linalg.solve(
        gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram)), z.T @ (y - y.mean(0))
    ).T
    assert torch.equal(method.static[:2], first)
    assert torch.allclose(method.static[2:].double(), wanted.detach(), rtol=1e-3, atol=1e-4)
    shake(method)
    primal, tangent = (part.mean((2, 3)) for part in method.network.extractors[0].tangent(images))
    scores = method.network.head(primal) + tangent @ method.static.T
    assert torch.allclose(method.logits(images), scores, atol=1e-5)


def test_heads_of_their_own_are_not_held(lab):
    method, tasks = make(lab, head="task"), lab.make_tasks(SIZES)
    lab.learn(method, tasks[0])
    assert not any("head." in name for name in method.kept.names)
    method.begin_task(tasks[1])
    (stage,) = method.stages(tasks[1])
    shake(method)
    batch = lab.batch_of(stage.streams[0], torch.arange(6))
    logits = method.network(batch.images)
    wanted = errors(logits[:, 2:5], batch.labels - 2).mean() / 2
    assert torch.allclose(stage.loss(batch)["classification"], wanted)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_the_curvature_is_that_of_the_task_s_own_head(lab, loss):
    """However large the heads of other tasks are: the loss has nothing of them."""
    found = []
    for scale in (1.0, 100.0):
        options = {"head": "task", "curvature": "diagonal", "estimator": "exact", "loss": loss}
        method, (first, second, _) = make(lab, **options), lab.make_tasks(SIZES)
        lab.learn(method, first)
        method.begin_task(second)
        shake(method)
        with torch.no_grad():
            method.network.head.weight[:2] *= scale
        method.kept = Tensors()
        method.end_task(second)
        found.append(kept_curvature(method.kept))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("replays", [False, True])
def test_an_exemplar_is_compared_with_the_outputs_of_its_own_task(lab, replays):
    method, tasks = make(lab, head="task"), lab.make_tasks(SIZES)
    lab.learn(method, tasks[0])
    second = tasks[1]
    if not replays:
        second = replace(second, exemplars=second.exemplars.select([]))
    method.begin_task(second)
    (stage,) = method.stages(second)
    shake(method)
    batch = batch_of(lab, stage)
    losses = stage.loss(batch)
    old = batch.part == 1
    assert bool(old.any()) == replays == ("replay" in losses) == (stage.unmoved is None)
    if replays:
        logits = method.network(batch.images[old])
        wanted = errors(logits[:, :2], batch.labels[old]).mean() / 2 * 0.5
        assert torch.allclose(losses["replay"], wanted)


@pytest.mark.parametrize("curvature", ["tkfac", "kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("classifier", ["joint", "static"])
def test_what_is_kept_survives(lab, curvature, classifier):
    options = {"curvature": curvature, "classifier": classifier}
    method, tasks = make(lab, **options), lab.make_tasks(SIZES)
    for task in tasks[:2]:
        losses = lab.learn(method, task).losses
        assert all(v == v for values in losses.values() for v in values)
    again = make(lab, **options)
    again.restore(method.structure())
    again.load_tensors({name: value.clone() for name, value in method.tensors().items()})
    losses = []
    for one in (method, again):
        one.begin_task(tasks[2])
        (stage,) = one.stages(tasks[2])
        shake(one)
        losses.append(stage.loss(batch_of(lab, stage)))
    assert float(losses[0]["penalty"].detach()) > 0
    for name, value in losses[0].items():
        assert torch.equal(value, losses[1][name])


@pytest.mark.parametrize("curvature", ["kfac", "tkfac"])
def test_nonlinear_with_cross_entropy(lab, curvature):
    """The ablations of Table 3."""
    method = make(lab, linear=False, loss="softmax", curvature=curvature, lam=0.3)
    tasks = lab.make_tasks(SIZES)
    for task in tasks[:2]:
        lab.learn(method, task)
    assert not hasattr(method.network.extractors[0], "tangent")
    method.begin_task(tasks[2])
    assert method.network.head.weight[5:].any()
    (stage,) = method.stages(tasks[2])
    shake(method)
    method.eval()
    batch = batch_of(lab, stage)
    losses = stage.loss(batch)
    each = functional.cross_entropy(method.network(batch.images), batch.labels, reduction="none")
    new = batch.part == 0
    assert torch.allclose(losses["classification"], each[new].mean() / 3)
    assert torch.allclose(losses["replay"], 2 / 3 * 0.7 * each[~new].mean())
    assert float(losses["penalty"].detach()) > 0


def test_a_second_task_s_curvature_is_exact_for_what_is_one_layer(lab):
    """Only the classifier trains: its curvature is the whole truth, so the first task's loss is
    known to the end (Shon et al. 2022, Eq. 8)."""
    method, tasks = make(lab, curvature="kfac"), lab.make_tasks(SIZES)
    lab.learn(method, tasks[0])
    images = lab.read(tasks[0].examples, range(len(tasks[0].examples)))
    labels = tasks[0].examples.labels

    def loss():
        return float(errors(method.network(images), labels).mean().detach())

    # At the optimum of the classifier the gradient is gone, and Eq. 8 has no linear term.
    with torch.no_grad():
        z = torch.cat([method.network.features(images), torch.ones(len(images), 1)], 1).double()
        y = 15.0 * functional.one_hot(labels, 2).double()
        best = torch.linalg.lstsq(z, y).solution.T
        method.network.head.weight.copy_(best[:, :-1])
        method.network.head.bias.copy_(best[:, -1])
    method.end_task(tasks[0])
    start = loss()
    # end_task merged with itself: the same task, twice.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        method.network.head.weight.add_(
            torch.randn(method.network.head.weight.shape, generator=generator)
        )
    assert float(method._penalty().detach()) == pytest.approx(loss() - start, rel=1e-3)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"alpha": 0.0}, "alpha"),
        ({"lam": 1.5}, "lam is 1.5"),
        ({"curvature": "xkfac"}, "curvature is 'xkfac'"),
        ({"merging": "max"}, "merging is 'max'"),
        ({"head": "two"}, "head is 'two'"),
        ({"classifier": "none"}, "classifier is 'none'"),
        ({"estimator": "empirical"}, "estimator is 'empirical'"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
        ({"classifier": "static", "linear": False}, "classifier is 'static'"),
    ],
)
def test_bad_settings_are_named(options, words):
    with pytest.raises(FastcilError, match=words):
        DLCFT.Config(**options)
