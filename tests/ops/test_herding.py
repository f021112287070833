from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil import ops
from fastcil.errors import FastcilError
from fastcil.ops.herding import _herding

SIZES = [[7, 0, 1, 30], [0], [], [5], [64, 64, 3], [0, 0, 9]]


def naive(rows, limit):
    """Rebuffi et al. (2017), Alg. 4, as printed; the first of all that are equally near."""
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms == 0, 1, norms)
    mean, picked = rows.sum(axis=0) / max(len(rows), 1), []
    for k in range(1, min(limit, len(rows)) + 1):
        so_far = rows[picked].sum(axis=0)
        away = np.square(np.linalg.norm(mean - (so_far + rows) / k, axis=1) * k)
        away[picked] = np.inf
        picked.append(int(np.nonzero(away <= away.min() + 1e-11)[0][0]))
    return picked + [-1] * (limit - len(picked))


def draw(sizes, width, seed, whole=False):
    rng = np.random.default_rng(seed)
    count = sum(sizes)
    rows = rng.integers(-1, 2, (count, width)) if whole else rng.standard_normal((count, width))
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(starts)


@pytest.mark.parametrize("kernel", [ops.herding, _herding], ids=["op", "reference"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("width, whole", [(1, False), (19, False), (64, False), (3, True)])
def test_every_class_is_herded_as_the_paper_prints_it(kernel, sizes, width, whole):
    features, starts = draw(sizes, width, seed=len(sizes), whole=whole)
    for limit in (0, 1, 6, 80):
        order = kernel(features, starts, limit)
        assert order.dtype == torch.int64 and order.shape == (len(sizes), limit)
        parts = np.split(features.numpy(), starts.numpy()[1:-1]) if sizes else []
        assert order.tolist() == [naive(part, limit) for part in parts]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    features, starts = draw([12, 20], 10, seed=1)
    features = features.to(dtype)
    assert torch.equal(ops.herding(features, starts, 20), _herding(features, starts, 20))


def test_layout_and_threads_change_nothing(threads):
    features, starts = draw([40, 3, 50], 33, seed=2)
    wanted = ops.herding(features, starts, 50)
    assert torch.equal(ops.herding(features.mT.contiguous().mT, starts, 50), wanted)
    for count in (1, 2):
        with threads(count):
            assert torch.equal(ops.herding(features, starts, 50), wanted)


def test_opcheck():
    features, starts = draw([5, 4], 6, seed=3)
    torch.library.opcheck(torch.ops.fastcil.herding.default, (features, starts, 4))


@pytest.mark.skipif(not ops.extension_available(), reason="needs the C++ kernels")
@pytest.mark.parametrize("starts", [[0, 5], [3, 1], [-1, 4]])
def test_the_cpu_kernel_reads_no_row_that_is_not_there(starts):
    with pytest.raises(ValueError, match=r"starts\[0\] is"):
        ops.herding(torch.zeros(4, 2), torch.tensor(starts), 2)


def test_features_that_are_not_numbers_end_all_the_same():
    order = ops.herding(torch.full((6, 2), torch.nan), torch.tensor([0, 6]), 6)
    assert int(order.min()) >= 0 and int(order.max()) < 6


@pytest.mark.parametrize(
    "features, starts, limit, says",
    [
        (torch.zeros(3), torch.tensor([0, 3]), 1, "features is torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.tensor([0, 3]), 1, "pass a floating"),
        (torch.zeros(3, 2), torch.tensor([0.0, 3.0]), 1, "starts is torch.float32"),
        (torch.zeros(3, 2), torch.zeros(0, dtype=torch.int64), 1, r"starts is torch.int64 \[0\]"),
        (torch.zeros(3, 2), torch.tensor([0, 3]), -1, "limit is -1"),
    ],
)
def test_bad_arguments(features, starts, limit, says):
    with pytest.raises(FastcilError, match=says):
        ops.herding(features, starts, limit)
