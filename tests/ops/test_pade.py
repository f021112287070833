from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcil import ops

RELU = (
    [0.029975, 0.616908, 2.374325, 3.063234, 1.522585, 0.252338],
    [1.191093, 4.404015, 0.909820, 0.348195],
)
VERSIONS = ["A", "B", "C", "nonsafe"]
DEGREES = [(5, 4), (3, 3), (1, 1), (0, 2), (2, 4), (4, 1)]


def naive(x, numerator, denominator, version):
    """The definition: powers, their sum, and what autograd makes of it."""
    p = sum(a * x**k for k, a in enumerate(numerator))
    terms = [b * x ** (k + 1) for k, b in enumerate(denominator)]
    if version == "A":
        return p / (1 + sum(term.abs() for term in terms))
    total = sum(terms)
    return p / {"B": 1 + total.abs(), "C": 0.1 + total.abs(), "nonsafe": 1 + total}[version]


def draw(degrees, version, seed=0, count=24):
    """Coefficients of both signs, without poles and x = 0; float64."""
    generator = torch.Generator().manual_seed(seed)
    m, n = degrees
    a = torch.randn(m + 1, generator=generator, dtype=torch.float64)
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    x = 3 * torch.randn(count, generator=generator, dtype=torch.float64)
    if version == "nonsafe":
        b = b.abs() * (torch.arange(n) % 2)
    # abs has a kink where the sum crosses zero: keep clear of it.
    total = sum(b[k] * x ** (k + 1) for k in range(n))
    return x[(x.abs() > 0.05) & ((total.abs() > 0.05) | (version in ("A", "nonsafe")))], a, b


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_value(degrees, version):
    x, a, b = draw(degrees, version)
    torch.testing.assert_close(ops.pade(x, a, b, version), naive(x, a, b, version))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_first_and_second_derivatives(degrees, version):
    x, a, b = draw(degrees, version, seed=1, count=8)
    inputs = [t.requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(lambda *t: ops.pade(*t, version), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: ops.pade(*t, version), inputs)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_derivative_equals_autograd_of_the_definition(version):
    x, a, b = draw((5, 4), version, seed=2)
    found = []
    for function in (ops.pade, naive):
        inputs = [t.clone().requires_grad_() for t in (x, a, b)]
        y = function(*inputs, version).sin()
        for _ in range(3):
            grads = torch.autograd.grad(y.sum(), inputs, create_graph=True)
            found.append(grads)
            y = torch.cat([grad.flatten() for grad in grads]).sin()
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


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
def test_large_inputs_stay_finite(version, dtype, values):
    a, b = (torch.tensor(c, requires_grad=True) for c in RELU)
    x = torch.tensor([s * v for v in values for s in (1, -1)], dtype=dtype, requires_grad=True)
    y = ops.pade(x, a, b, version)
    limit = a[-1] / b[-1]
    if version == "A":
        limit = a[-1].abs() / b[-1].abs()
    assert y.dtype == dtype
    # Towards infinity f(x) = x a_5 / b_4 + constant.
    reference = (x.double() * limit.double()).detach()
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    close = torch.tensor([0.0 if abs(v) > 1e6 else 10.0 for v in x.tolist()], dtype=torch.float64)
    assert bool(((y.double() - reference).abs() <= 2 * tolerance * reference.abs() + close).all())
    small = torch.full_like(y, 1e-30 if dtype != torch.float16 else 1e-3)
    grads = torch.autograd.grad(y, (x, a, b), small, create_graph=True)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    second = torch.autograd.grad(grads[0].sum(), (x, a, b))
    assert all(bool(grad.isfinite().all()) for grad in second)
    slope = torch.autograd.grad(ops.pade(x, a, b, version).sum(), x)[0]
    expected = limit.detach().to(dtype).expand_as(slope)
    far = x.abs() > 1e4
    torch.testing.assert_close(slope[far], expected[far], rtol=1e-2, atol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_derivatives_at_zero_take_abs_as_flat_there(version):
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    a, b = (torch.tensor(c, dtype=torch.float64) for c in RELU)
    (slope,) = torch.autograd.grad(ops.pade(x, a, b, version).sum(), x)
    (expected,) = torch.autograd.grad(naive(x, a, b, version).sum(), x)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_float32_rounded_once(dtype):
    x = (3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))).to(dtype)
    a, b = map(torch.tensor, RELU)
    assert torch.equal(ops.pade(x, a, b), ops.pade(x.float(), a, b).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.pade(x, a, b), ops.pade(x.float(), a, b).to(dtype))
    x.requires_grad_()
    a.requires_grad_()
    grads = torch.autograd.grad(ops.pade(x, a, b).float().sum(), (x, a))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32]


def test_float32_is_as_accurate_as_a_plain_horner_scheme():
    x = 3 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    numerator, denominator = map(torch.tensor, RELU)
    results = []
    for function in (ops.pade, naive):
        inputs = [t.clone().requires_grad_() for t in (x, numerator, denominator)]
        y = function(*inputs, "A")
        results.append((y.detach(), *torch.autograd.grad(y.sum(), inputs)))
    wide = [t.double().requires_grad_() for t in (x, numerator, denominator)]
    y = naive(*wide, "A")
    exact = (y.detach(), *torch.autograd.grad(y.sum(), wide))
    for ours, eager, truth in zip(*results, exact, strict=True):
        bound = 2 * (eager - truth).abs().max() + 1e-7 * truth.abs().max()
        assert (ours - truth).abs().max() <= bound


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(4, 6).t(),
    "strided": lambda: torch.randn(4, 12)[:, ::3],
    "expanded": lambda: torch.randn(4, 1).expand(4, 3),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3, 2, 2),
    "float64": lambda: torch.randn(2, 3, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(2, 3, 4, 5).bfloat16(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x = LAYOUTS[layout]()
    a, b = (torch.tensor(c, requires_grad=True) for c in RELU)
    y = ops.pade(x, a, b)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, torch.empty_like(x).stride())
    torch.testing.assert_close(y, ops.pade(x.contiguous(), a, b))
    checks = ["test_schema", "test_faketensor"]
    if layout in ("contiguous", "empty"):
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
        # Few coefficients: tracing the second derivative takes seconds otherwise.
        a, b = (c.detach()[:2].requires_grad_() for c in (a, b))
    x.requires_grad_()
    gradient = torch.randn_like(x).requires_grad_()
    for op, arguments in (("pade", (x, a, b, "A")), ("pade_backward", (gradient, x, a, b, "A"))):
        torch.library.opcheck(getattr(torch.ops.fastcil, op).default, arguments, test_utils=checks)


def test_gradient_of_another_layout_than_the_input():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    a, b = (torch.tensor(c, requires_grad=True) for c in RELU)
    weight = torch.randn(2, 3, 4, 5)
    ours = torch.autograd.grad(ops.pade(x, a, b), (x, a, b), weight)
    torch.testing.assert_close(ours, torch.autograd.grad(naive(x, a, b, "A"), (x, a, b), weight))


class Activation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.numerator = nn.Parameter(torch.tensor(RELU[0]))
        self.denominator = nn.Parameter(torch.tensor(RELU[1]))

    def forward(self, x):
        return ops.pade(self.layer(x), self.numerator, self.denominator)


def test_a_step_inside_functional_call_is_differentiated_through():
    module, x = Activation(), torch.randn(5, 3)
    parameters = dict(module.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    stepped = {
        name: value - 0.1 * grad
        for (name, value), grad in zip(
            parameters.items(),
            torch.autograd.grad(loss(parameters), list(parameters.values()), create_graph=True),
            strict=True,
        )
    }
    hyper = torch.autograd.grad(loss(stepped), module.numerator)[0]
    assert bool(hyper.isfinite().all()) and bool((hyper != 0).all())


def test_compiles_in_one_graph():
    module, x = Activation(), torch.randn(5, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for function in (module, compiled):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2), torch.ones(2), torch.ones(2), "D"), "version is 'D'.*noise"),
        ((torch.ones(2), torch.ones(2), torch.ones(2), "a"), "version is 'a'"),
        ((torch.ones(2).long(), torch.ones(2), torch.ones(2)), "x has dtype torch.int64"),
        ((torch.ones(2), torch.ones(2, 1), torch.ones(2)), "numerator has shape"),
        ((torch.ones(2), torch.ones(2), torch.ones(0)), "denominator has shape"),
        ((torch.ones(2), torch.ones(2).int(), torch.ones(2)), "numerator has dtype"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.pade(*arguments)
