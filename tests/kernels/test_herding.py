from __future__ import annotations

import pytest
import torch

from fastcil import ops
from fastcil.ops.herding import TIE

kernels = pytest.importorskip("fastcil.kernels.herding", reason="triton is not installed")


def test_ties_are_those_of_the_op():
    assert kernels.TIE == TIE


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_same_order_as_the_op(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_ROWS", 8)
    monkeypatch.setattr(kernels, "_COLUMNS", 16)
    monkeypatch.setattr(kernels, "_SCORES", 8)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 20, generator=generator).relu().to(dtype)
    starts = torch.tensor([0, 17, 17, 18, 40])
    for limit in (0, 1, 9):
        ours = kernels.herding(features, starts, limit)
        assert torch.equal(ours, ops.herding(features, starts, limit))


@pytest.mark.usefixtures("interpreted")
def test_of_equal_candidates_the_first():
    row = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    features = torch.cat([row * scale for scale in (1.0, 3.0, 0.7, 11.0)] + [torch.zeros(2, 5)])
    starts = torch.tensor([0, 4, 6])
    assert kernels.herding(features, starts, 5).tolist() == [[0, 1, 2, 3, -1], [0, 1, -1, -1, -1]]


@pytest.mark.usefixtures("interpreted")
def test_starts_out_of_range_and_features_that_are_no_numbers_stay_inside():
    features = torch.full((4, 3), float("nan"))
    order = kernels.herding(features, torch.tensor([-5, 2, 9]), 3)
    assert bool(((order >= -1) & (order < 2)).all())


@pytest.mark.parametrize(
    "architecture, dtype",
    [
        (90, torch.float64),
        (90, torch.float32),
        pytest.param(90, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(90, torch.float16, marks=pytest.mark.slow),
        pytest.param(80, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled(launches, assemble, architecture, dtype):
    features = torch.empty(500, 512, dtype=dtype, device="meta")
    starts = torch.empty(11, dtype=torch.int64, device="meta")
    (launch,) = launches(kernels, "herding", features, starts, 20)
    code = assemble(launch, architecture)
    assert code.stack == 0
    assert code.count(r"\b(LDL|STL|ATOM\w*|REDG?)\b") == 0
