"""PODNet's losses against the equations, one number at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastcil.errors import FastcilError
from fastcil.nn import margin_nca, nca, pod_flat, pod_spatial


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


LABELS = torch.tensor([0, 3, 2, 1, 3, 3])
LOGITS = 3 * rand(6, 4)


def naive_nca(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """-z_y + log(e^max + sum over the other classes), the mean over images."""
    losses = []
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        others = sum(math.exp(v) for j, v in enumerate(z) if j != y)
        losses.append(-z[y] + math.log(math.exp(max(z)) + others))
    return sum(losses) / len(losses)


def released_nca(similarities: torch.Tensor, labels: torch.Tensor, eta: float) -> float:
    """The steps of the released code: the margin off every class, the maximum, the own slot."""
    losses = []
    for s, y in zip(similarities.tolist(), labels.tolist(), strict=True):
        z = [eta * (v - 0.6) for v in s]
        z = [v - max(z) for v in z]
        slots = [0.0 if j == y else v for j, v in enumerate(z)]
        losses.append(-(z[y] - math.log(sum(math.exp(v) for v in slots))))
    return sum(losses) / len(losses)


def naive_margin(logits: torch.Tensor, labels: torch.Tensor, margin: float) -> float:
    losses = []
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        others = sum(math.exp(v) for j, v in enumerate(z) if j != y)
        losses.append(max(0.0, -math.log(math.exp(z[y] - margin) / others)))
    return sum(losses) / len(losses)


def test_nca():
    assert (LOGITS.argmax(1) == LABELS).any() and (LOGITS.argmax(1) != LABELS).any()
    assert float(nca(LOGITS, LABELS)) == pytest.approx(naive_nca(LOGITS, LABELS), rel=1e-12)
    released = released_nca(LOGITS / 2.5, LABELS, 2.5)
    assert float(nca(LOGITS, LABELS)) == pytest.approx(released, rel=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.6, 5.0])
def test_margin_nca(margin):
    expected = naive_margin(LOGITS, LABELS, margin)
    assert float(margin_nca(LOGITS, LABELS, margin)) == pytest.approx(expected, rel=1e-12)
    scaled = margin_nca(LOGITS, LABELS, torch.tensor(margin, dtype=torch.float64))
    assert float(scaled) == pytest.approx(expected, rel=1e-12)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1000.0, -1000.0, 0.0]])
    assert float(nca(logits, torch.tensor([0]))) == pytest.approx(0.0)
    assert float(nca(logits, torch.tensor([1]))) == pytest.approx(2000.0 + math.log(2))
    assert float(margin_nca(logits, torch.tensor([2]), 0.5)) == pytest.approx(1000.5)


@pytest.mark.parametrize("loss", [nca, lambda z, y: margin_nca(z, y, 0.6)])
def test_a_single_class_has_no_loss_and_no_gradient(loss):
    logits = rand(3, 1).requires_grad_()
    value = loss(logits, torch.zeros(3, dtype=torch.int64))
    (first,) = torch.autograd.grad(value, logits, create_graph=True)
    (second,) = torch.autograd.grad(first.sum() + value, logits)
    assert float(value.detach()) == 0.0 and not first.any() and not second.any()


def naive_flat(features: torch.Tensor, teacher: torch.Tensor) -> float:
    losses = []
    for f, g in zip(features.tolist(), teacher.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(f, g, strict=True))
        lengths = math.sqrt(sum(a * a for a in f) * sum(b * b for b in g))
        losses.append(1 - dot / lengths)
    return sum(losses) / len(losses)


def test_pod_flat():
    features, teacher = rand(5, 7), rand(5, 7, seed=1)
    expected = naive_flat(features, teacher)
    assert float(pod_flat(features, teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(pod_flat(features, 3 * features)) == pytest.approx(0.0, abs=1e-12)
    assert float(pod_flat(0 * features, teacher)) == 1.0


def naive_pooled(maps: list) -> list[float]:
    """One image [C][h][w]: squares summed over width, then over height, over their length."""
    pooled = [sum(v * v for v in row) for channel in maps for row in channel]
    for channel in maps:
        pooled += [sum(row[x] ** 2 for row in channel) for x in range(len(channel[0]))]
    length = math.sqrt(sum(v * v for v in pooled))
    return [v / length for v in pooled]


def naive_spatial(maps: list[torch.Tensor], teacher: list[torch.Tensor]) -> float:
    stages = []
    for own, old in zip(maps, teacher, strict=True):
        distances = []
        for a, b in zip(own.tolist(), old.tolist(), strict=True):
            pairs = zip(naive_pooled(a), naive_pooled(b), strict=True)
            distances.append(math.sqrt(sum((u - v) ** 2 for u, v in pairs)))
        stages.append(sum(distances) / len(distances))
    return sum(stages) / len(stages)


@pytest.mark.parametrize(
    "shapes", [[(2, 3, 4, 5)], [(3, 2, 4, 4), (3, 5, 2, 2), (3, 6, 1, 1)]], ids=str
)
def test_pod_spatial(shapes):
    maps = [rand(*shape, seed=k) for k, shape in enumerate(shapes)]
    teacher = [rand(*shape, seed=9 + k) for k, shape in enumerate(shapes)]
    expected = naive_spatial(maps, teacher)
    assert float(pod_spatial(maps, teacher)) == pytest.approx(expected, rel=1e-12)
    # Squares are pooled: neither sign nor size matters, and squeezing one map to one side does.
    assert float(pod_spatial(maps, [-2 * m for m in maps])) == pytest.approx(0.0, abs=1e-12)


def test_pools_keep_where_and_lose_the_other_direction():
    """Rolling columns leaves the pool over width, and changes that over height."""
    own = rand(1, 1, 3, 4)
    rolled = own.roll(1, 3)
    squares, moved = own[0, 0].square(), rolled[0, 0].square()
    torch.testing.assert_close(squares.sum(1), moved.sum(1))
    whole = torch.cat([squares.sum(1), squares.sum(0)]).norm()
    expected = (squares.sum(0) - moved.sum(0)).norm() / whole
    torch.testing.assert_close(pod_spatial([own], [rolled]), expected)


LOSSES = {
    "nca": lambda x: nca(x.flatten(1), LABELS[:2]),
    "margin": lambda x: margin_nca(x.flatten(1), LABELS[:2], 0.6),
    "flat": lambda x: pod_flat(x.flatten(1), rand(2, 8, seed=4)),
    "spatial": lambda x: pod_spatial([x], [rand(2, 2, 2, 2, seed=4)]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_to_second_order(name):
    x = rand(2, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], x)
    assert torch.autograd.gradgradcheck(LOSSES[name], x)


@pytest.mark.parametrize("name", ["flat", "spatial"])
@pytest.mark.parametrize("where", ["zero", "same"])
def test_derivatives_are_finite_where_distances_and_norms_are_zero(name, where):
    """A map of zeros, and a network that is still its teacher."""
    start = torch.zeros(2, 2, 2, 2) if where == "zero" else rand(2, 2, 2, 2, seed=4)
    x = start.double().requires_grad_()
    (first,) = torch.autograd.grad(LOSSES[name](x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum() + LOSSES[name](x), x)
    assert first.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_full(dtype):
    maps = (30 * rand(2, 3, 16, 16)).to(dtype)
    teacher = (30 * rand(2, 3, 16, 16, seed=1)).to(dtype)
    found = pod_spatial([maps], [teacher])
    assert found.dtype == torch.float32
    expected = naive_spatial([maps.double()], [teacher.double()])
    assert float(found) == pytest.approx(expected, rel=1e-5)
    logits = LOGITS.to(dtype)
    assert float(nca(logits, LABELS)) == pytest.approx(naive_nca(logits.double(), LABELS), rel=1e-5)
    features = maps.flatten(1)
    assert float(pod_flat(features, teacher.flatten(1))) == pytest.approx(
        naive_flat(features.double(), teacher.flatten(1).double()), rel=1e-5
    )


@pytest.mark.parametrize(
    "action, says",
    [
        (lambda: pod_flat(rand(2, 3), rand(2, 4)), r"features is \(2, 3\) and the teacher's"),
        (lambda: pod_spatial([], []), "maps holds 0 and teacher_maps 0"),
        (lambda: pod_spatial([rand(1, 1, 2, 2)], []), "maps holds 1 and teacher_maps 0"),
        (
            lambda: pod_spatial([rand(1, 1, 2, 2)], [rand(1, 2, 2, 2)]),
            r"maps is \(1, 1, 2, 2\) and the teacher's \(1, 2, 2, 2\)",
        ),
    ],
)
def test_bad_arguments(action, says):
    with pytest.raises(FastcilError, match=says):
        action()
