from __future__ import annotations

import pytest
import torch

kernels = pytest.importorskip("fastcil.kernels.pade", reason="triton is not installed")

A = torch.tensor([0.029975, 0.616908, 2.374325, 3.063234, 1.522585, 0.252338], dtype=torch.float64)
B = torch.tensor([1.191093, 4.404015, 0.909820, 0.348195], dtype=torch.float64)
VERSIONS = ["A", "B", "C", "nonsafe"]
ULP = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def naive(x, numerator, denominator, version):
    """The definition: powers, their sum, and what autograd makes of it."""
    p = sum(a * x**k for k, a in enumerate(numerator))
    terms = [b * x ** (k + 1) for k, b in enumerate(denominator)]
    if version == "A":
        return p / (1 + sum(term.abs() for term in terms))
    total = sum(terms)
    return p / {"B": 1 + total.abs(), "C": 0.1 + total.abs(), "nonsafe": 1 + total}[version]


def oracle(dx, da, db, gradient, x, a, b, version):
    """In float64: f(x), its gradients, and the gradients of <those, (dx, da, db)>."""
    dx, da, db, gradient, x, a, b = (t.detach().double() for t in (dx, da, db, gradient, x, a, b))
    inputs = [t.clone().requires_grad_() for t in (gradient, x, a, b)]
    if a.ndim == 1:
        y = naive(*inputs[1:], version)
    else:
        parts = inputs[1].unflatten(1, (len(a), -1)).unbind(1)
        groups = zip(parts, inputs[2], inputs[3], strict=True)
        y = torch.stack([naive(*group, version) for group in groups], 1).flatten(1, 2)
    first = torch.autograd.grad(y, inputs[1:], inputs[0], create_graph=True)
    paired = sum((t * d).sum() for t, d in zip(first, (dx, da, db), strict=True))
    second = torch.autograd.grad(paired, inputs, allow_unused=True)
    return [y.detach(), *(t.detach() for t in first), *second]


def ours(dx, da, db, gradient, x, a, b, version):
    return [
        kernels.pade(x, a, b, version),
        *kernels.pade_backward(gradient, x, a, b, version),
        *kernels.pade_double_backward(dx, da, db, gradient, x, a, b, version),
    ]


def draw(count, degrees=(5, 4), version="A", seed=0):
    """Directions, a gradient, x and coefficients in float64, clear of poles, kinks and zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count):
        return torch.randn(count, generator=generator, dtype=torch.float64)

    m, n = degrees
    a, b = normal(m + 1), normal(n) / 2
    if version == "nonsafe":
        b = b.abs() * (torch.arange(n) % 2) if n > 1 else torch.zeros(n, dtype=torch.float64)
    x = 2 * normal(4 * count)
    total = sum(b[k] * x ** (k + 1) for k in range(n))
    clear = (x.abs() > 0.05) & ((total.abs() > 0.05) | (version in ("A", "nonsafe")))
    x = x[clear][:count]
    return normal(count), normal(m + 1), normal(n), normal(count), x, a, b


def compare(found, expected, tolerance):
    """Relative to the largest; a bound per tensor, or one for all."""
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        other = torch.zeros_like(one, dtype=torch.float64) if other is None else other
        bound = tolerance * (other.abs().max() + 1e-300)
        assert bool(((one.double() - other).abs() <= bound).all()), (index, one, other)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("version", "degrees"),
    [(version, (5, 4)) for version in VERSIONS]
    + [("A", (8, 8)), ("A", (0, 1)), ("B", (4, 1)), ("nonsafe", (1, 3))],
    ids=str,
)
def test_values_and_derivatives(version, degrees):
    arguments = draw(256 + 37, degrees, version)
    compare(ours(*arguments, version), oracle(*arguments, version), 1e-11)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("version", "dtype"),
    [("A", torch.float32), ("A", torch.float16), ("A", torch.bfloat16), ("B", torch.float32)],
    ids=str,
)
def test_narrow_types_compute_in_float32(version, dtype):
    dx, da, db, gradient, x, _, _ = draw(1024 + 37, version=version)
    dx, gradient, x = (t.to(dtype) for t in (dx, gradient, x))
    da, db, a, b = (t.float() for t in (da, db, A, B / 2))
    arguments = (dx, da, db, gradient, x, a, b)
    found, expected = ours(*arguments, version), oracle(*arguments, version)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        wide = index in (2, 3, 6, 7)  # by the coefficients
        assert one.dtype == (torch.float32 if wide else dtype)
        error = (one.double() - other).abs()
        rounding = 0.0 if wide else ULP[dtype]
        # Two ulps at most: the interpreter cuts bfloat16 off where a GPU rounds.
        assert bool((error <= rounding * other.abs() + 1e-5 * other.abs().max()).all()), index


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("version", "dtype"),
    [(version, torch.float32) for version in VERSIONS]
    + [("A", torch.float64), ("A", torch.bfloat16)],
    ids=str,
)
def test_derivatives_at_zero_take_abs_as_flat_there(version, dtype):
    x = torch.tensor([0.0, -0.0, 1.0], dtype=dtype)
    gradient = torch.ones_like(x)
    a = A.to(torch.promote_types(dtype, torch.float32))
    b = B.to(a.dtype)
    found = kernels.pade_backward(gradient, x, a, b, version)
    inputs = [t.double().requires_grad_() for t in (x, a, b)]
    expected = torch.autograd.grad(naive(*inputs, version), inputs, gradient.double())
    compare(found, expected, 1e-6 if dtype != torch.bfloat16 else 2.0**-7)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("version", "dtype", "values"),
    [
        *((version, torch.float32, [1e8, -1e20, 3e38]) for version in VERSIONS),
        ("A", torch.bfloat16, [1e8, -3e38]),
        ("A", torch.float16, [6e4, -20.0]),
        ("A", torch.float64, [1e60, -3e55]),
    ],
    ids=str,
)
def test_large_inputs_neither_overflow_nor_disturb_the_rest_of_the_tile(version, dtype, values):
    count = 256 if dtype == torch.float64 else 1024
    _, _, _, gradient, x, _, _ = draw(count, version="A")
    for place, value in enumerate(values):
        x[10 * place] = value
        gradient[10 * place] = 1e-4 / abs(value) if dtype != torch.float16 else 1e-4
    x, gradient = x.to(dtype), gradient.to(dtype)
    a = A.to(torch.promote_types(dtype, torch.float32))
    b = B.to(a.dtype)
    found = (kernels.pade(x, a, b, version), *kernels.pade_backward(gradient, x, a, b, version))
    zeros = [torch.zeros_like(t) for t in (x, a, b)]
    expected = oracle(*zeros, gradient, x, a, b, version)[:4]
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert bool(one.isfinite().all())
        bound = ULP.get(dtype, 1e-11) * other.abs()
        if index >= 2:
            bound = 1e-5 * other.abs().max()
        # Far out the slope of f is a difference of two that are as large.
        assert bool(((one.double() - other).abs() <= bound + 1e-5).all()), index


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("version", ["A", "B"])
def test_nan_and_infinity_stay_where_they_are(version, dtype):
    _, _, _, gradient, x, _, _ = draw(1024 + 8, version="A")
    x, gradient, a, b = (t.float() for t in (x, gradient, A, B))
    x, gradient = x.to(dtype), gradient.to(dtype)
    clean = kernels.pade(x, a, b, version)
    x[[3, 1027]] = float("nan")
    x[[5, 1029]] = float("inf")
    y = kernels.pade(x, a, b, version)
    grad_x = kernels.pade_backward(gradient, x, a, b, version)[0]
    assert bool(y[[3, 1027]].isnan().all()) and bool(grad_x[[3, 1027]].isnan().all())
    assert bool((y[[5, 1029]] == float("inf")).all())
    others = torch.ones(len(x), dtype=torch.bool)
    others[[3, 5, 1027, 1029]] = False
    torch.testing.assert_close(y[others], clean[others])
    assert bool(grad_x[others].isfinite().all())


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("layout", "groups"),
    [(layout, 1) for layout in LAYOUTS]
    + [("contiguous", 2), ("channels_last", 2), ("permuted", 2), ("channels_last", 3)],
)
def test_layouts_and_groups(layout, groups):
    shape = (2, 6, 4, 5)
    dx, da, db, gradient, x, a, b = draw(240, seed=1)
    dx, gradient, x = (t.view(shape) for t in (dx, gradient, x))
    if groups > 1:
        factor = torch.linspace(1, 2, groups, dtype=torch.float64)[:, None]
        da, db, a, b = (factor * t for t in (da, db, a, b))
    x = LAYOUTS[layout](x)
    gradient = gradient.to(memory_format=torch.channels_last)
    arguments = (dx, da, db, gradient, x, a, b)
    found = ours(*arguments, "A")
    for one, like in zip(found, (x, x, a, b, gradient, x, a, b), strict=True):
        assert (one.shape, one.stride()) == (like.shape, torch.empty_like(like).stride())
    compare(found, oracle(*arguments, "A"), 1e-11)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("channels", "groups", "length", "dtype"),
    [(16, 2, 9, torch.bfloat16), (12, 3, 11, torch.float32), (3, 3, 7, torch.bfloat16)],
    ids=str,
)
def test_groups_of_tokens(channels, groups, length, dtype):
    """Channels are last in memory, so that a group's elements are short runs."""
    x = torch.randn(2, length, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.transpose(1, 2)
    factor = torch.linspace(1, 2, groups)[:, None]
    a, b = factor * A.float(), factor * B.float()
    gradient = torch.ones_like(x)
    found = (kernels.pade(x, a, b, "A"), *kernels.pade_backward(gradient, x, a, b, "A"))
    zeros = [torch.zeros_like(t) for t in (x, a, b)]
    compare(found, oracle(*zeros, gradient, x, a, b, "A")[:4], ULP[dtype])


@pytest.mark.usefixtures("interpreted")
def test_programs_of_several_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)
    monkeypatch.setattr(kernels, "_TILES", 3)
    monkeypatch.setattr(kernels, "_SLOTS", 2)
    arguments = list(draw(4 * 256 + 13))
    arguments[4][300] = 1e58  # within the first program, so that it starts again
    arguments[3][300] = 1e-60
    found, expected = ours(*arguments, "A"), oracle(*arguments, "A")
    assert abs(found[0][300] / expected[0][300] - 1) < 1e-12
    for index in (0, 1, 4, 5):
        found[index], expected[index] = (
            torch.cat([t[:300], t[301:]]) for t in (found[index], expected[index])
        )
    compare(found[:4], expected[:4], 1e-11)
    compare(found[4:6], expected[4:6], 1e-11)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape", [(), (0,), (0, 4, 3, 3), (2, 4, 0)], ids=str)
def test_scalars_and_nothing(shape):
    groups = 2 if len(shape) > 1 else 1
    x = torch.full(shape, 0.5)
    a, b = (t.float().expand(groups, -1) if groups > 1 else t.float() for t in (A, B))
    found = ours(x, a, b, x, x, a, b, "A")
    for one, like in zip(found, (x, x, a, b, x, x, a, b), strict=True):
        assert (one.shape, one.dtype) == (like.shape, like.dtype)
    if x.numel():
        compare(found, oracle(x, a, b, x, x, a, b, "A"), 1e-5)
    else:
        assert not any(one.count_nonzero() for one in found)


@pytest.mark.usefixtures("interpreted")
def test_coefficients_keep_their_dtype_and_strides():
    _, _, _, gradient, x, a, b = (t.float() for t in draw(100))
    a, b = a.bfloat16(), b.double()
    a = torch.stack([a, a], 1)[:, 0]
    grads = kernels.pade_backward(gradient, x, a, b, "A")[1:]
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float64]
    zeros = [torch.zeros_like(t) for t in (x, a, b)]
    expected = oracle(*zeros, gradient, x, a.float(), b.float(), "A")[2:4]
    compare(grads, expected, 2.0**-7)
