"""Values, derivatives, errors and bits of the three Padé ops, their references as well."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastcil import ops

module = importlib.import_module("fastcil.ops.pade")

RELU = (
    [0.029975, 0.616908, 2.374325, 3.063234, 1.522585, 0.252338],
    [1.191093, 4.404015, 0.909820, 0.348195],
)
VERSIONS = ["A", "B", "C", "nonsafe"]
DEGREES = [(5, 4), (3, 3), (1, 1), (0, 2), (2, 4), (4, 1), (8, 8), (7, 8), (8, 1), (0, 8)]
KERNELS = {
    "op": (
        torch.ops.fastcil.pade,
        torch.ops.fastcil.pade_backward,
        torch.ops.fastcil.pade_double_backward,
    ),
    "reference": (module._pade, module._pade_backward, module._pade_double_backward),
}
CONSTANT = {"A": 1, "B": 1, "C": 0.1, "nonsafe": 1}


def by_channel(coefficients, x):
    """One coefficient after the other, each to be broadcast with x [B, C, ...]."""
    if coefficients.dim() == 1:
        return coefficients.unbind()
    rows = coefficients.repeat_interleave(x.shape[1] // len(coefficients), 0)
    return [column.view(-1, *[1] * (x.dim() - 2)) for column in rows.unbind(1)]


def naive(x, numerator, denominator, version):
    """The definition: powers, their sum, and what autograd makes of it."""
    a, b = by_channel(numerator, x), by_channel(denominator, x)
    p = sum(a_k * x**k for k, a_k in enumerate(a))
    terms = [b_k * x**k for k, b_k in enumerate(b, 1)]
    if version == "A":
        return p / (1 + sum(term.abs() for term in terms))
    total = sum(terms)
    return p / (CONSTANT[version] + (total if version == "nonsafe" else total.abs()))


def horner(x, numerator, denominator, version):
    """What one would write without the op."""
    a, b = (by_channel(c.to(x.dtype), x) for c in (numerator, denominator))
    z = x
    if version == "A":
        b, z = [b_k.abs() for b_k in b], x.abs()
    p, q = a[-1], b[-1]
    for a_k in a[-2::-1]:
        p = p * x + a_k
    for b_k in b[-2::-1]:
        q = q * z + b_k
    q = q * z
    return p / (CONSTANT[version] + (q.abs() if version in "BC" else q))


def derivatives(function, version, directions, gradient, *inputs):
    """Value, gradient, and gradient of <gradient, directions>, all by autograd."""
    x, a, b = [t.detach().clone().requires_grad_() for t in inputs]
    g = gradient.detach().clone().requires_grad_()
    y = function(x, a, b, version)
    grads = torch.autograd.grad(y, (x, a, b), g, create_graph=True)
    pairing = sum((u * v).sum() for u, v in zip(grads, directions, strict=True))
    second = torch.autograd.grad(pairing, (g, x, a, b))
    return [t.detach() for t in (y, *grads, *second)]


def fused(kernels, version, directions, gradient, *inputs):
    """The same by the three ops."""
    forward, backward, double_backward = kernels
    return [
        forward(*inputs, version),
        *backward(gradient, *inputs, version),
        *double_backward(*directions, gradient, *inputs, version),
    ]


def draw(degrees, version, seed=0, shape=(24,), groups=None):
    """x, coefficients of both signs and directions, clear of poles and of 0; float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = () if groups is None else (groups,)
    m, n = degrees

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    a, b, x = normal(*rows, m + 1), normal(*rows, n), 1.5 * normal(*shape)
    if version == "nonsafe":
        b = b.abs() * (torch.arange(n) % 2)
    else:
        # abs has a kink where the sum crosses zero: let it happen at 0 only.
        b = b.abs() * torch.sign(normal(*rows, 1))
        x = x.abs() if version in "BC" else x
    x = torch.where(x.abs() < 0.05, x + 0.1, x)
    return [normal(*shape), normal(*rows, m + 1), normal(*rows, n)], normal(*shape), x, a, b


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_value_and_derivatives(degrees, version, kernels):
    for number, (shape, groups) in enumerate([((24,), None), ((2, 6, 3), 3), ((1, 4, 2, 40), 2)]):
        directions, *inputs = draw(degrees, version, number, shape, groups)
        ours = fused(KERNELS[kernels], version, directions, *inputs)
        truth = derivatives(naive, version, directions, *inputs)
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def sliced(t):
    wide = t.new_zeros(*t.shape[:3], 2 * t.shape[3] + 1)
    wide[..., 1::2] = t
    return wide[..., 1::2]


# The same values with other strides.
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": sliced,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def errors(results, truth):
    """The largest error of each result of elements, and that of each coefficient's."""
    gaps = [(t.double() - u).abs() for t, u in zip(results, truth, strict=True)]
    return [gap.flatten() if gap.dim() < 3 else gap.max()[None] for gap in gaps]


def ratios(ours, eager):
    """Errors of several draws beside eager's: a single one is a lottery where sums cancel."""
    pooled = [
        [torch.stack(draws).square().mean(0) for draws in zip(*side, strict=True)]
        for side in (ours, eager)
    ]
    return torch.stack([(t / u).mean().sqrt() for t, u in zip(*pooled, strict=True)])


@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_error_is_at_most_twice_that_of_eager(version, dtype, groups):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    eager, ours = [], {}
    for _ in range(16):
        a, b = (torch.tensor(c) for c in RELU)
        if groups:
            a, b = (c * (1 + 0.3 * torch.rand(groups, 1, generator=generator)) for c in (a, b))
        dx, g, x = ((k * normal(2, 8, 7, 9)).to(dtype) for k in (1, 1, 2))
        rest = [normal(*a.shape), normal(*b.shape)], [a, b]
        wide = [[t.double() for t in tensors] for tensors in rest]
        truth = derivatives(
            naive, version, [dx.double(), *wide[0]], g.double(), x.double(), *wide[1]
        )
        # Everything in this dtype, as a model that was cast to it has it.
        cast = [[t.to(dtype) for t in tensors] for tensors in rest]
        found = derivatives(horner, version, [dx, *cast[0]], g, x, *cast[1])
        eager.append(errors(found, truth))
        for layout, change in LAYOUTS.items():
            moved = [change(t) for t in (dx, g, x)]
            strides = torch.empty_like(moved[2]).stride()
            for name, kernels in KERNELS.items():
                found = fused(kernels, version, [moved[0], *rest[0]], *moved[1:], *rest[1])
                for of_elements in (0, 1, 4, 5):
                    assert found[of_elements].stride() == strides
                    assert found[of_elements].dtype == dtype
                ours.setdefault((layout, name), []).append(errors(found, truth))
    for key, found in ours.items():
        assert bool((ratios(found, eager) <= 2).all()), key


@pytest.mark.parametrize(("mean", "count", "draws"), [(1.0, 2**22, 1), (0.0, 2**18, 16)])
@pytest.mark.parametrize("version", VERSIONS)
def test_coefficient_gradients_of_many_elements(version, mean, count, draws):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.tensor(c) for c in RELU)
    ours, eager = [], []
    for _ in range(draws):
        x, g = (torch.randn(count, generator=generator) for _ in range(2))
        g += mean
        found = []
        for dtype in (torch.float32, torch.float64):
            leaves = [t.to(dtype).requires_grad_() for t in (a, b)]
            y = horner(x.to(dtype), *leaves, version)
            found.append(torch.autograd.grad(y, leaves, g.to(dtype)))
        eager.append(errors(*found))
        ours.append(errors(KERNELS["op"][1](g, x, a, b, version)[1:], found[1]))
    assert bool((ratios(ours, eager) <= 1).all())


@pytest.mark.parametrize("degrees", [(5, 4), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, degrees, threads):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    for groups, channels_last in [(None, False), (3, False), (3, True)]:
        shape = (5, 6, 97, 101)
        rows = () if groups is None else (groups,)
        like = torch.channels_last if channels_last else torch.contiguous_format
        dx, g, x = (normal(*shape).to(dtype, memory_format=like) for _ in range(3))
        coefficients = [normal(*rows, k) for k in (degrees[0] + 1, degrees[1]) * 2]
        results = []
        for count in (1, 2):
            with threads(count):
                results.append(
                    fused(KERNELS["op"], "A", [dx, *coefficients[:2]], g, x, *coefficients[2:])
                )
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 31, 1023, 1024, 1025, 8191, 8192, 8193, 20_001])
def test_every_size(count, groups, poison):
    for shape in ((2, 2, count), (count, 2)):
        directions, *inputs = draw((5, 4), "A", count, shape, groups)
        with poison():
            ours = fused(KERNELS["op"], "A", directions, *inputs)
        reference = fused(KERNELS["reference"], "A", directions, *inputs)
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-9)
        single = [t.float() for t in (*directions, *inputs)]
        with poison():
            ours = fused(KERNELS["op"], "A", single[:3], *single[3:])
        for mine, truth in zip(ours, reference, strict=True):
            assert (mine - truth).abs().max() <= 2e-5 * truth.abs().max() + 1e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_neighbours_change_no_bit(version):
    # Large |x| are computed another way, and their neighbours must not be.
    x = 3 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x[::7] *= 100
    a, b = map(torch.tensor, RELU)
    g = torch.ones_like(x)
    values, slopes = ops.pade(x, a, b, version), KERNELS["op"][1](g, x, a, b, version)[0]
    near = x.abs() < 60
    for chosen in (near, ~near):
        part = x[chosen]
        assert torch.equal(ops.pade(part, a, b, version), values[chosen])
        slope = KERNELS["op"][1](g[chosen], part, a, b, version)[0]
        assert torch.equal(slope, slopes[chosen])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float32, [1e8, 1e20, 3e38]),
        (torch.float16, [20.0, 6e4]),
        (torch.bfloat16, [1e8, 3e38]),
        (torch.float64, [1e80, 1e300]),
    ],
    ids=str,
)
def test_large_inputs_stay_finite(version, dtype, values, kernels):
    forward, backward, double_backward = KERNELS[kernels]
    a, b = map(torch.tensor, RELU)
    x = torch.tensor([s * v for v in values for s in (1, -1)], dtype=dtype)
    y = forward(x, a, b, version)
    limit = (a[-1] / b[-1]).double()
    # Towards infinity f(x) = x a_5 / b_4 + constant.
    reference = x.double() * limit
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    close = torch.tensor([0.0 if abs(v) > 1e6 else 10.0 for v in x.tolist()], dtype=torch.float64)
    assert bool(((y.double() - reference).abs() <= 2 * tolerance * reference.abs() + close).all())
    small = torch.full_like(y, 1e-30 if dtype != torch.float16 else 1e-3)
    grads = backward(small, x, a, b, version)
    along = torch.ones_like(x), torch.zeros_like(a), torch.zeros_like(b)
    second = double_backward(*along, small, x, a, b, version)
    assert all(bool(grad.isfinite().all()) for grad in (*grads, *second))
    slope = backward(along[0], x, a, b, version)[0]
    far = x.abs() > 1e4
    expected = limit.to(dtype).expand_as(slope)
    torch.testing.assert_close(slope[far], expected[far], rtol=1e-2, atol=0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("place", [0, 3, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_treated_as_the_reference_does(value, place, version):
    generator = torch.Generator().manual_seed(0)
    dx, g, x = (torch.randn(41, generator=generator) for _ in range(3))
    a, b = map(torch.tensor, RELU)
    for changed in (dx, g, x):
        before = changed[place].item()
        changed[place] = value
        ours, reference = (
            fused(kernels, version, [dx, a, b], g, x, a, b) for kernels in KERNELS.values()
        )
        torch.testing.assert_close(ours, reference, equal_nan=True, rtol=1e-4, atol=1e-5)
        assert ours[0].isnan().sum() == (1 if changed is x else 0)
        changed[place] = before


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("version", VERSIONS)
def test_derivatives_at_zero_take_abs_as_flat_there(version, kernels):
    x = torch.tensor([0.0, -0.0, 1.0], dtype=torch.float64)
    a, b = (torch.tensor(c, dtype=torch.float64) for c in RELU)
    b[1] = 0
    ours = KERNELS[kernels][1](torch.ones_like(x), x, a, b, version)
    along = [torch.ones_like(t) for t in (x, a, b)]
    truth = derivatives(naive, version, along, torch.ones_like(x), x, a, b)
    torch.testing.assert_close(list(ours), truth[1:4])


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("change", [lambda t: t, lambda t: t[:1, :1, :1, :1].expand_as(t)])
def test_gradients_of_another_layout_than_the_input(change, groups):
    directions, g, x, a, b = draw((5, 4), "A", shape=(2, 3, 4, 5), groups=groups)
    g, dx = change(g), change(directions[0])
    x = x.to(memory_format=torch.channels_last)
    inputs = [dx, *directions[1:]], g, x, a, b
    ours = fused(KERNELS["op"], "A", *inputs)
    torch.testing.assert_close(ours, derivatives(naive, "A", *inputs))
    assert ours[4].stride() == torch.empty_like(g).stride()
