from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fastcil import ops
from fastcil.errors import FastcilError
from fastcil.ops.spectral_gram import (
    _spectral_gram,
    frequencies,
    from_tiles,
    spectral_gram_shapes,
    to_tiles,
    transform_length,
)

# images, channels, height, width, size, border
CASES = [
    (3, 5, 7, 9, (9, 12), (1, 2)),
    (4, 20, 4, 4, (6, 6), (1, 1)),
    (1, 3, 1, 2, (4, 4), (1, 1)),
    (2, 33, 5, 6, (10, 8), (2, 2)),
    (0, 4, 3, 3, (5, 5), (1, 1)),
    (5, 16, 12, 13, (15, 16), (0, 0)),
    (2, 2, 3, 5, (25, 27), (0, 3)),
    (2, 1, 1, 1, (1, 1), (1, 1)),
    (3, 250, 3, 4, (5, 6), (1, 2)),  # many panels: in two halves
]
FORMS = [torch.contiguous_format, torch.channels_last]


def draw(images, channels, height, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels, height, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(images, generator=generator)


def zeros(channels, size, border, dtype=torch.float64):
    return [
        torch.zeros(shape, dtype=dtype) for shape in spectral_gram_shapes(channels, size, border)
    ]


def hermitian(state):
    """The matrices that are stored, complex."""
    packed = from_tiles(state)
    real = packed.tril() + packed.tril(-1).mT
    return real + 1j * (packed.triu(1) - packed.triu(1).mT)


def naive(signal, weights, size):
    """Definition: signal [N, M, rows, columns] -> [F, M, M], by the sum over all pixels."""
    y, x = torch.meshgrid(
        *(torch.arange(float(n)).double() for n in signal.shape[2:]), indexing="ij"
    )
    matrices = []
    for fy, fx, times in frequencies(*size).tolist():
        wave = torch.exp(-2j * math.pi * (fy * y / size[0] + fx * x / size[1]))
        values = (signal * wave).sum((2, 3))
        matrices.append(times * torch.einsum("n,ni,nj->ij", weights, values.conj(), values))
    return torch.stack(matrices)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_whole_images_is_the_definition(case):
    images, channels, height, width, size, border = case
    x, weights = draw(images, channels, height, width)
    states = zeros(channels, size, border)
    ops.spectral_gram_(*states, x, size, border, weights)
    wanted = naive(x, weights.double() + 0j, size)
    given = hermitian(states[0])
    assert torch.allclose(given[:, :channels, :channels], wanted, rtol=1e-12, atol=1e-10)
    assert not given[:, channels:].any()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kernel_is_the_reference(case, form, dtype, allowed, weighted):
    images, channels, height, width, size, border = case
    ours, truth = zeros(channels, size, border, dtype), zeros(channels, size, border)
    for seed in range(2):
        x, weights = draw(images, channels, height, width, dtype, seed)
        weights = weights if weighted else None
        ops.spectral_gram_(
            *ours, x.contiguous(memory_format=form), size, border, weights, decay=0.7
        )
        _spectral_gram(*truth, x.double(), weights, 0.7, list(size), list(border))
    for got, wanted in zip(ours, truth, strict=True):
        assert got.dtype == dtype
        assert float((got - wanted).norm()) <= allowed * float(wanted.norm())


def test_lags_follow_by_the_correlation_theorem():
    size, border = (9, 9), (0, 0)
    x, _ = draw(2, 3, 7, 6)
    states = zeros(3, size, border)
    ops.spectral_gram_(*states, x, size, border)
    matrices = hermitian(states[0])[:, :3, :3]
    kept = frequencies(*size).double()
    for dy, dx in ((0, 0), (1, 2), (2, -1)):
        turn = torch.exp(2j * math.pi * (kept[:, 0] * dy / 9 + kept[:, 1] * dx / 9))
        found = (matrices * turn[:, None, None]).real.sum(0) / 81
        shifted = functional.pad(x, (2, 2, 2, 2))[:, :, 2 + dy : 9 + dy, 2 + dx : 8 + dx]
        assert torch.allclose(found, torch.einsum("nchw,ndhw->cd", x, shifted))


def test_threads_change_nothing(threads):
    size, border = (10, 12), (1, 1)
    x, weights = draw(7, 40, 8, 9, torch.float32)
    results = []
    for count in (1, 2):
        with threads(count):
            states = zeros(40, size, border, torch.float32)
            ops.spectral_gram_(*states, x, size, border, weights)
            results.append(states)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_nothing_uninitialised_is_used(poison):
    size, border = (6, 6), (1, 1)
    x, _ = draw(3, 5, 4, 4)
    with poison():
        states = zeros(5, size, border)
        ops.spectral_gram_(*states, x, size, border)
    assert all(torch.isfinite(state).all() for state in states)


def test_tiles_and_back():
    matrices = torch.arange(2 * 48 * 48.0).view(2, 48, 48)
    assert torch.equal(from_tiles(to_tiles(matrices).contiguous()), matrices)
    tile = to_tiles(matrices)[1, 2, 0]
    assert torch.equal(tile, matrices[1, 32:48, :16])


def test_every_length_can_be_transformed():
    for least in range(1, 200):
        length = transform_length(least)
        assert length >= least
        x = torch.zeros(1, 1, 1, length, dtype=torch.float64)
        x[..., 1 % length] = 1
        states = zeros(1, (1, length), (0, 0))
        ops.spectral_gram_(*states, x, (1, length))
        # All frequencies of an impulse are of size one.
        assert torch.allclose(
            states[0][:, 0, 0, 0, 0], frequencies(1, length)[:, 2].double(), rtol=1e-12
        )


def test_it_passes_opcheck():
    size, border = (6, 6), (1, 1)
    x, weights = draw(2, 3, 4, 4)
    arguments = (*zeros(3, size, border), x, weights, 0.5, list(size), list(border))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fastcil.spectral_gram_, arguments, test_utils=tests)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(2, 3, 4)}, "x is"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "x is"),
        ({"size": (3, 6)}, "size is"),
        ({"size": (7, 6)}, "size is"),
        ({"border": (5, 1)}, "border is"),
        ({"border": (2, 1)}, "rows is"),
        ({"weights": torch.ones(3)}, "weights is"),
        ({"x": torch.zeros(2, 3, 4, 4)}, "whole is"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    x, _ = draw(2, 3, 4, 4)
    names = ("whole", "rows", "columns", "corners")
    arguments = dict(zip(names, zeros(3, (6, 6), (1, 1)), strict=True))
    arguments |= {"x": x, "size": (6, 6), "border": (1, 1), **change}
    with pytest.raises(FastcilError, match=f"^{words}"):
        ops.spectral_gram_(**arguments)
