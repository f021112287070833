"""The public function; what it computes is in test_pade_numerics.py."""

from __future__ import annotations

import pytest
import torch

from fastcil import ops

RELU = (
    [0.029975, 0.616908, 2.374325, 3.063234, 1.522585, 0.252338],
    [1.191093, 4.404015, 0.909820, 0.348195],
)
built = pytest.mark.skipif(not ops.extension_available(), reason="the C++ kernels are not built")


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("version", ["A", "B", "C", "nonsafe"])
@pytest.mark.parametrize("degrees", [(5, 4), (0, 2), (4, 1)], ids=str)
def test_gradients_are_registered(degrees, version, groups):
    generator = torch.Generator().manual_seed(0)
    rows = () if groups is None else (groups,)
    # Clear of poles, and of the kinks of abs.
    inputs = [
        0.1 + torch.rand(size, generator=generator, dtype=torch.float64)
        for size in ((2, 4), (*rows, degrees[0] + 1), (*rows, degrees[1]))
    ]
    inputs[0][:, ::3] *= -1 if version == "A" else 1
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: ops.pade(*t, version), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: ops.pade(*t, version), inputs)


def test_a_third_derivative_is_refused():
    x = torch.ones(3, requires_grad=True)
    a, b = map(torch.tensor, RELU)
    (first,) = torch.autograd.grad(ops.pade(x, a, b).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="differentiated a third time"):
        torch.autograd.grad(second.sum(), x)


@built
def test_there_are_kernels_for_the_cpu():
    for name in ("pade", "pade_backward", "pade_double_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcil::{name}", "CPU")


@built
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(10), torch.ones(2), "degrees are"),
        (torch.ones(2), torch.ones(0), "degrees are"),
        (torch.ones(2, 2), torch.ones(2), "have shapes"),
        (torch.ones(2, 2), torch.ones(2, 2), "multiple of 2"),
    ],
)
def test_kernels_touch_no_memory_for_what_they_cannot_take(a, b, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.fastcil.pade(torch.ones(3, 3), a, b, "A")


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


OPCHECK = {
    "contiguous": lambda: torch.randn(2, 4, 4, 5),
    "channels_last": lambda: torch.randn(2, 4, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(4, 6).t(),
    "strided": lambda: torch.randn(4, 12)[:, ::3],
    "expanded": lambda: torch.randn(4, 1).expand(4, 4),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4, 2, 2),
    "without channels": lambda: torch.randn(2, 0, 3),
    "float64": lambda: torch.randn(2, 4, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(2, 4, 4, 5).bfloat16(),
}


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("layout", OPCHECK)
def test_opcheck(layout, groups):
    x = OPCHECK[layout]()
    if groups and x.dim() < 2:
        pytest.skip("groups need channels")
    a, b = (torch.tensor(c, requires_grad=True) for c in RELU)
    if groups:
        a, b = (c.detach().repeat(groups, 1).requires_grad_() for c in (a, b))
    y = ops.pade(x, a, b)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, torch.empty_like(x).stride())
    torch.testing.assert_close(y, ops.pade(x.contiguous(), a, b))
    checks = ["test_schema", "test_faketensor"]
    if layout in ("contiguous", "empty"):
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
        # Few coefficients: tracing the second derivative takes seconds otherwise.
        a, b = (c.detach()[..., :2].contiguous().requires_grad_() for c in (a, b))
    x.requires_grad_()
    gradient, dx = (torch.randn_like(x).requires_grad_() for _ in range(2))
    inputs = (gradient, x, a, b, "A")
    for op, arguments in (
        ("pade", inputs[1:]),
        ("pade_backward", inputs),
        ("pade_double_backward", (dx, torch.ones_like(a), torch.ones_like(b), *inputs)),
    ):
        if op == "pade_double_backward":
            checks = ["test_schema", "test_faketensor"]
            arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        torch.library.opcheck(getattr(torch.ops.fastcil, op).default, arguments, test_utils=checks)


def test_version_d_is_version_b_with_fresh_noise():
    x = torch.linspace(-3, 3, 50)
    a, b = (torch.tensor(c, requires_grad=True) for c in RELU)
    first, again = (
        ops.pade(x, a, b, "D", generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, again)
    generator = torch.Generator().manual_seed(1)
    noise = [1 + 0.1 * (2 * torch.rand(c.shape, generator=generator) - 1) for c in (a, b)]
    assert all(bool(((n - 1).abs() <= 0.1).all()) and n.std() > 0.01 for n in noise)
    noisy = [c * n for c, n in zip((a, b), noise, strict=True)]
    assert torch.equal(first, ops.pade(x, *noisy, "B"))
    assert not torch.equal(first, ops.pade(x, a, b, "D", generator=generator))
    assert not torch.equal(ops.pade(x, a, b, "D"), ops.pade(x, a, b, "D"))
    assert torch.equal(ops.pade(x, a, b, "D", deviation=0), ops.pade(x, a, b, "B"))
    ours = torch.autograd.grad(first.sum(), a)[0]
    inner = torch.autograd.grad(ops.pade(x, *noisy, "B").sum(), noisy[0])[0]
    torch.testing.assert_close(ours, inner * noise[0])


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ONE, ONE, ONE, "a"), {}, "version is 'a'"),
        ((ONE, ONE, ONE, "D"), {"deviation": 1.5}, "deviation is 1.5"),
        ((ONE.long(), ONE, ONE), {}, "x has dtype torch.int64"),
        ((ONE, torch.ones(2, 1, 1), ONE), {}, "numerator has shape"),
        ((ONE, ONE, torch.ones(0)), {}, "denominator has shape"),
        ((ONE, torch.ones(10), ONE), {}, r"numerator has shape \(10,\); .* 1 to 9"),
        ((ONE, ONE, torch.ones(9)), {}, r"denominator has shape \(9,\); .* 1 to 8"),
        ((ONE, torch.ones(2, 2), ONE), {}, "denominator has shape .* numerator"),
        ((ONE, torch.ones(2, 2), torch.ones(2, 2)), {}, "x has shape"),
        ((torch.ones(1, 3), torch.ones(2, 2), torch.ones(2, 2)), {}, "2 groups"),
        ((ONE, ONE.int(), ONE), {}, "numerator has dtype"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.pade(*arguments, **options)
