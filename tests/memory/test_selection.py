from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil.errors import FastcilError
from fastcil.memory import SELECTIONS, herding, random_order


def naive(features, limit):
    """Rebuffi et al. (2017), Alg. 4, as printed; the first of all that are equally near."""
    rows = features.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms == 0, 1, norms)
    mean = rows.mean(axis=0)
    picked = []
    for k in range(1, min(limit, len(rows)) + 1):
        so_far = sum((rows[p] for p in picked), np.zeros_like(mean))
        away = np.array([np.linalg.norm(mean - (so_far + row) / k) * k for row in rows]) ** 2
        away[picked] = np.inf
        picked.append(int(np.nonzero(away <= away.min() + 1e-11)[0][0]))
    return picked


@pytest.mark.parametrize("seed", range(20))
def test_random_features(seed):
    rng = np.random.default_rng(seed)
    count, width = rng.integers(1, 60), rng.integers(1, 20)
    limit = int(rng.integers(0, count + 5))
    features = rng.standard_normal((count, width)).astype(np.float32) + rng.uniform(-1, 1)
    order = herding(torch.from_numpy(features), limit)
    assert order.dtype == torch.int64
    assert order.tolist() == naive(features, limit)


@pytest.mark.parametrize("seed", range(20))
def test_duplicates_resolve_to_the_first(seed):
    rng = np.random.default_rng(100 + seed)
    distinct = np.maximum(rng.standard_normal((6, 17)), 0).astype(np.float32)
    features = distinct[rng.integers(0, 6, 40)]
    assert herding(torch.from_numpy(features), 40).tolist() == naive(features, 40)


@pytest.mark.parametrize("seed", range(10))
def test_small_whole_features_have_many_exact_ties(seed):
    rng = np.random.default_rng(200 + seed)
    features = rng.integers(-1, 2, (30, 3)).astype(np.float32)
    assert herding(torch.from_numpy(features), 30).tolist() == naive(features, 30)


def test_ties_of_a_symmetric_set():
    cross = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]])
    assert herding(cross, 4).tolist() == [0, 2, 1, 3]
    assert herding(torch.ones(5, 3), 5).tolist() == [0, 1, 2, 3, 4]


def test_a_longer_order_begins_with_the_shorter():
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    whole = herding(features, 30)
    assert sorted(whole.tolist()) == list(range(30))
    for limit in (0, 1, 7, 29):
        assert torch.equal(herding(features, limit), whole[:limit])


def test_scale_of_a_row_does_not_matter():
    features = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    scaled = features * torch.linspace(0.01, 1000, 20)[:, None]
    assert torch.equal(herding(features, 20), herding(scaled, 20))


def test_zero_rows_and_few_rows():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert herding(features, 3).tolist() == naive(features.numpy(), 3)
    assert herding(torch.zeros(0, 4), 3).tolist() == []
    assert herding(torch.randn(1, 4), 3).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    features = torch.randn(25, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert herding(features, 25).tolist() == naive(features.double().numpy(), 25)


def test_input_is_left_alone():
    features = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1)
    before = features.clone()
    herding(features, 5)
    assert torch.equal(features, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("limit", [0, 2])
def test_features_that_are_not_finite(bad, limit):
    features = torch.ones(4, 3)
    features[2, 1] = bad
    with pytest.raises(FastcilError, match="features has 1 of 4 rows with NaN or infinity"):
        herding(features, limit)


@pytest.mark.parametrize(
    ("features", "limit", "says"),
    [
        (torch.zeros(3), 1, "pass a floating"),
        (torch.zeros(3, 2, dtype=torch.int64), 1, "pass a floating"),
        (torch.zeros(3, 2), -1, "limit is -1"),
    ],
)
def test_bad_arguments(features, limit, says):
    with pytest.raises(FastcilError, match=says):
        herding(features, limit)


def test_random_order_is_the_seed_s_permutation():
    first = random_order(50, torch.Generator().manual_seed(3))
    assert sorted(first.tolist()) == list(range(50))
    assert torch.equal(first, random_order(50, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, random_order(50, torch.Generator().manual_seed(4)))


def test_selections():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    assert set(SELECTIONS) == {"herding", "random"}
    order = SELECTIONS["herding"](9, lambda: features, 4, generator)
    assert torch.equal(order, herding(features, 4))
    order = SELECTIONS["random"](9, lambda: pytest.fail("asked for"), 4, generator)
    assert torch.equal(order, random_order(9, torch.Generator().manual_seed(6))[:4])
