from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil import ops


def naive(features, weights):
    """Eq. 1 written out, one image after the other."""
    maps = []
    for image, row in zip(features.double().numpy(), weights.double().numpy(), strict=True):
        a = sum(w * f for w, f in zip(row, image, strict=True))
        maps.append((a - a.min()) / (a.max() - a.min()))
    return torch.from_numpy(np.stack(maps))


@pytest.mark.parametrize("shape", [(4, 16, 7, 7), (1, 3, 1, 5), (3, 1, 4, 2)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_value(shape, layout):
    features = torch.randn(shape).to(memory_format=layout)
    weights = torch.randn(shape[:2])
    torch.testing.assert_close(
        ops.cam(features, weights), naive(features, weights).float(), rtol=1e-4, atol=1e-5
    )
    wide = ops.cam(features.double(), weights)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, naive(features, weights), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 3e4], ids=str)
def test_constant_maps_give_zeros_and_finite_gradients(value):
    # 37 positions and 513 channels: rounding may differ from position to position.
    features = (value * torch.rand(2, 513, 1, 1)).repeat(1, 1, 37, 1)
    features[1, 0, 5] += 100.0
    weights = torch.randn(2, 513)
    features.requires_grad_()
    weights.requires_grad_()
    maps = ops.cam(features, weights)
    assert bool((maps[0] == 0).all()) and maps[1].amax() == 1
    grads = torch.autograd.grad(maps.square().sum(), (features, weights), create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), (features, weights))
    assert all(bool(g.isfinite().all()) for g in (*grads, *again))


def test_one_position_is_constant():
    assert ops.cam(torch.randn(2, 3, 1, 1), torch.randn(2, 3)).tolist() == [[[0.0]], [[0.0]]]


def test_first_and_second_derivatives():
    features = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.cam, (features, weights))
    assert torch.autograd.gradgradcheck(ops.cam, (features, weights))


def test_autocast_does_not_round():
    features, weights = torch.randn(2, 64, 7, 7), torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.cam(features, weights), ops.cam(features.clone(), weights))
        found = ops.cam(features.bfloat16(), weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ops.cam(features.bfloat16().float(), weights))
    torch.testing.assert_close(ops.cam(features, weights), naive(features, weights).float())


def test_empty_batch():
    assert ops.cam(torch.randn(0, 3, 2, 2), torch.randn(0, 3)).shape == (0, 2, 2)


def test_compiles_in_one_graph():
    features, weights = torch.randn(2, 8, 3, 3), torch.randn(2, 8)
    compiled = torch.compile(ops.cam, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, weights), ops.cam(features, weights))


@pytest.mark.parametrize(
    ("features", "weights", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3), "features has shape"),
        (torch.ones(2, 3, 0, 4), torch.ones(2, 3), "features has shape"),
        (torch.ones(2, 3, 4, 4), torch.ones(3), "class_weights has shape"),
        (torch.ones(2, 3, 4, 4), torch.ones(1, 3), "class_weights has shape"),
        (torch.ones(2, 3, 4, 4).int(), torch.ones(2, 3), "features has dtype"),
    ],
)
def test_bad_arguments(features, weights, message):
    with pytest.raises(ValueError, match=message):
        ops.cam(features, weights)
