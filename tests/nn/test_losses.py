from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil.nn import alignment_weights, balanced_distillation, distillation


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def draw(classes=7, batch=5, scale=3.0):
    rng = np.random.default_rng(0)
    return scale * rng.normal(size=(batch, classes)), scale * rng.normal(size=(batch, classes))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation(temperature):
    z, teacher = draw()
    p, q = softmax(teacher / temperature), softmax(z / temperature)
    expected = np.mean([-sum(p[i] * np.log(q[i])) for i in range(len(z))])
    found = distillation(torch.from_numpy(z), torch.from_numpy(teacher), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.5, 0.94, 0.97, 1 - 1e-9])
def test_alignment_weights(beta):
    counts = np.array([1, 2, 20, 20, 500, 13_000])
    v = np.array([1 / sum(beta**k for k in range(n)) for n in counts])
    expected = len(v) * v / v.sum()
    found = alignment_weights(torch.from_numpy(counts), beta)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert float(found.sum()) == pytest.approx(len(counts))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_balanced_distillation(temperature):
    z, teacher = draw()
    w = np.linspace(0.3, 2.0, z.shape[1])
    p, q = softmax(teacher / temperature) * w, softmax(z / temperature)
    p = p / p.sum(1, keepdims=True)
    expected = np.mean([-sum(p[i] * np.log(q[i])) for i in range(len(z))])
    found = balanced_distillation(*map(torch.from_numpy, (z, teacher, w)), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_equal_weights_change_nothing():
    z, teacher = map(torch.from_numpy, draw())
    torch.testing.assert_close(
        balanced_distillation(z, teacher, torch.ones(7), 2.0), distillation(z, teacher, 2.0)
    )


def test_half_precision_is_computed_in_float32():
    z, teacher = (torch.from_numpy(array).bfloat16() for array in draw())
    for found, expected in (
        (distillation(z, teacher), distillation(z.float(), teacher.float())),
        (
            balanced_distillation(z, teacher, torch.ones(7)),
            balanced_distillation(z.float(), teacher.float(), torch.ones(7)),
        ),
    ):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_gradient_is_zero_where_student_and_teacher_agree():
    z = torch.from_numpy(draw()[0]).requires_grad_()
    distillation(z, z.detach(), 2.0).backward()
    assert z.grad.abs().max() < 1e-7


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: distillation(torch.ones(2, 3), torch.ones(2, 4)), r"logits is \(2, 3\)"),
        (lambda: distillation(torch.ones(3), torch.ones(3)), "must be the same"),
        (lambda: distillation(torch.ones(2, 3), torch.ones(2, 3), 0.0), "temperature is 0.0"),
        (
            lambda: balanced_distillation(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)),
            "weights has shape",
        ),
        (
            lambda: balanced_distillation(torch.ones(2, 3), torch.ones(1, 3), torch.ones(3)),
            "student_logits is",
        ),
        (lambda: alignment_weights(torch.tensor([1, 2]), 1.0), "beta is 1.0"),
        (lambda: alignment_weights(torch.tensor([1, 0]), 0.9), "counts is"),
        (lambda: alignment_weights(torch.tensor(3), 0.9), "counts is"),
    ],
)
def test_bad_arguments(action, message):
    with pytest.raises(ValueError, match=message):
        action()
