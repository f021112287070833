from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastcil import ops
from fastcil.errors import FastcilError
from fastcil.ops.patch_gram import _patch_gram, output_size

# images, channels, height, width, kernel, stride, padding, dilation
CASES = [
    (3, 5, 7, 9, (3, 3), (2, 2), (1, 1), (1, 1)),
    (2, 20, 8, 8, (1, 1), (1, 1), (0, 0), (1, 1)),
    (5, 33, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 3, 17, 15, (7, 7), (2, 2), (3, 3), (1, 1)),
    (2, 4, 11, 10, (3, 2), (3, 1), (2, 1), (2, 3)),
    (4, 16, 5, 5, (1, 1), (2, 2), (0, 0), (1, 1)),
    (0, 2, 4, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 16, 30, 31, (2, 2), (1, 1), (0, 0), (1, 1)),
]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}


def draw(case, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case[:4], generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(case[0], generator=generator)


def naive(x, weights, kernel, stride, padding, dilation):
    """One patch after the other, sliced by hand."""
    high, wide = output_size(x.shape[2:], kernel, stride, padding, dilation)
    padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    total = 0
    for image, weight in zip(padded, weights, strict=True):
        for y in range(0, high * stride[0], stride[0]):
            for z in range(0, wide * stride[1], stride[1]):
                patch = image[
                    :, y : y + reach[0] : dilation[0], z : z + reach[1] : dilation[1]
                ].flatten()
                total = total + weight * torch.outer(patch, patch)
    return total


def zeros(case, dtype=torch.float64):
    side = case[1] * case[4][0] * case[4][1]
    return torch.zeros(side, side, dtype=dtype)


@pytest.mark.parametrize("case", [c for c in CASES if c[0] > 0 and c[2] < 20], ids=str)
@pytest.mark.parametrize("kernel", ["op", "reference"])
def test_it_is_the_sum_over_patches(case, kernel):
    x, weights = draw(case)
    state = zeros(case)
    if kernel == "op":
        ops.patch_gram_(state, x, *case[4:], weights=weights)
    else:
        _patch_gram(state, x, weights, 1.0, *map(list, case[4:]))
    wanted = naive(x, weights.double(), *case[4:]).tril()
    assert torch.allclose(state, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kernel_is_the_reference(case, layout, dtype, allowed, weighted):
    ours, truth = zeros(case, dtype), zeros(case)
    for seed in range(2):
        x, weights = draw(case, dtype, seed)
        weights = weights if weighted else None
        ops.patch_gram_(ours, LAYOUTS[layout](x), *case[4:], weights=weights, decay=0.7)
        _patch_gram(truth, x.double(), weights, 0.7, *map(list, case[4:]))
    assert ours.dtype == dtype
    assert float((ours - truth).norm()) <= allowed * float(truth.norm())


def test_many_rows_come_in_blocks():
    case = (9, 7, 13, 14, (3, 3), (1, 1), (1, 1), (1, 1))
    x, _ = draw(case)
    state = zeros(case)
    ops.patch_gram_(state, x, *case[4:])
    rows = functional.unfold(x, 3, padding=1).mT.reshape(-1, 63)
    assert len(rows) > 2 * 192
    assert torch.allclose(state, (rows.T @ rows).tril())


def test_threads_change_nothing(threads):
    case = CASES[3]
    x, weights = draw(case, torch.float32)
    results = []
    for count in (1, 2):
        with threads(count):
            state = zeros(case, torch.float32)
            ops.patch_gram_(state, x, *case[4:], weights=weights)
            results.append(state)
    assert torch.equal(*results)


def test_nothing_uninitialised_is_used(poison):
    x, _ = draw(CASES[0])
    with poison():
        state = zeros(CASES[0])
        ops.patch_gram_(state, x, *CASES[0][4:])
    assert torch.isfinite(state).all()


def test_it_passes_opcheck():
    x, weights = draw(CASES[0])
    arguments = (zeros(CASES[0]), x, weights, 0.5, *map(list, CASES[0][4:]))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fastcil.patch_gram_, arguments, test_utils=tests)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(2, 3, 4)}, "x is"),
        ({"x": torch.zeros(2, 3, 4, 4).half()}, "x is"),
        ({"kernel": (5, 5)}, "kernel is"),
        ({"stride": (0, 1)}, "stride is"),
        ({"padding": (1,)}, "padding is"),
        ({"x": torch.zeros(2, 4, 4, 4)}, "state is"),
        ({"weights": torch.ones(3)}, "weights is"),
        ({"state": torch.zeros(27, 54)[:, ::2]}, "state is not contiguous"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    arguments = {"state": torch.zeros(27, 27), "x": torch.zeros(2, 3, 4, 4), "kernel": (3, 3)}
    with pytest.raises(FastcilError, match=f"^{words}"):
        ops.patch_gram_(**(arguments | change))
