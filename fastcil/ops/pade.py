"""Padé activation: a rational function of x with learnable coefficients.

Numerator and denominator are both multiplied by s^n with s = 1 / max(1, |x|), so that every term
is e_k = x^k s^n: a power of x where |x| <= 1, a power of 1/x beyond. Nothing overflows before the
value itself does, and all derivatives are combinations of the same e_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.ops._library import LIBRARY, define


class _Form(NamedTuple):
    """A version's denominator: constant + sum b_k x^k, with absolute values where said."""

    constant: float
    absolute_terms: bool
    absolute_sum: bool


_FORMS = {
    "A": _Form(1.0, True, False),
    "B": _Form(1.0, False, True),
    "C": _Form(0.1, False, True),
    "nonsafe": _Form(1.0, False, False),
}


class _Rational:
    """P and Q at every element of x, both scaled by s^n, and the signs their derivatives need."""

    def __init__(self, x: Tensor, numerator: Tensor, denominator: Tensor, version: str) -> None:
        form = _FORMS[version]
        self.a = numerator.to(x.dtype)
        self.b = denominator.to(x.dtype)
        self.e = _monomials(x, len(self.a) - 1, len(self.b))
        self.d = self.e[: len(self.b) + 1]
        self.coefficient_sign = self.odd_sign = self.sum_sign = None
        if form.absolute_terms:
            # The denominator is then a polynomial in |x| with coefficients |b_k|; a derivative by
            # b_k brings the sign of b_k, an odd derivative by x the sign of x.
            self.d = [e.abs() if k % 2 else e for k, e in enumerate(self.d)]
            self.coefficient_sign, self.odd_sign = self.b.sign(), x.sign()
            self.b = self.b.abs()
        self.p = _polynomial(self.a, self.e)
        total = _polynomial(self.b, self.d[1:])
        if form.absolute_sum:
            self.sum_sign = total.sign()
        self.q = _signed(total, self.sum_sign).add_(self.e[0], alpha=form.constant)

    def denominator(self, b: Tensor) -> Tensor:
        """Derivative of Q in the direction ``b`` of its coefficients."""
        return _signed(_polynomial(b, self.d[1:]), self.sum_sign)

    def denominator_slope(self, b: Tensor) -> Tensor:
        """The derivative of ``denominator`` by x."""
        slope = _polynomial(_slope(b), self.d)
        return _signed(_signed(slope, self.odd_sign), self.sum_sign)

    def denominator_curvature(self, b: Tensor) -> Tensor:
        """The second derivative of ``denominator`` by x."""
        return _signed(_polynomial(_slope(_slope(b)[1:]), self.d), self.sum_sign)


def _monomials(x: Tensor, m: int, n: int) -> list[Tensor]:
    """The e_k = x^k / max(1, |x|)^n for k = 0 ... max(m, n)."""
    s = x.abs().clamp(min=1).reciprocal()
    u = x * s
    shrinking = [s]
    for _ in range(n - 1):
        shrinking.append(shrinking[-1] * s)
    e = [shrinking.pop()]
    power = u
    while shrinking:
        e.append(power * shrinking.pop())
        power = power * u
    e.append(power)
    for _ in range(n, m):
        e.append(e[-1] * x)
    return e


def _polynomial(coefficients: Tensor, monomials: Sequence[Tensor]) -> Tensor:
    """Sum over k of coefficient k times monomial k, one pass over memory per term."""
    if len(coefficients) == 0:
        return torch.zeros_like(monomials[0])
    first, *rest = coefficients.unbind()
    total = first * monomials[0]
    for coefficient, monomial in zip(rest, monomials[1:], strict=False):
        total.addcmul_(monomial, coefficient)
    return total


def _slope(coefficients: Tensor) -> Tensor:
    """The derivative of c_1 x + c_2 x^2 + ...: its coefficients from the constant on."""
    k = torch.arange(1, len(coefficients) + 1, dtype=coefficients.dtype, device=coefficients.device)
    return k * coefficients


def _signed(value: Tensor, sign: Tensor | None) -> Tensor:
    return value if sign is None else value * sign


def _moments(weight: Tensor, monomials: Sequence[Tensor]) -> Tensor:
    """Sum over all elements of weight times monomial, for each monomial."""
    return torch.stack([(weight * monomial).sum() for monomial in monomials])


def _working(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the precision of computation: float32, or float64 if the first is."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


def _as(x: Tensor, value: Tensor) -> Tensor:
    """The value with the dtype of x and the strides that ``torch.empty_like(x)`` has."""
    result = torch.empty_like(x, device="meta")
    if value.dtype == result.dtype and value.stride() == result.stride():
        return value
    return torch.empty_like(x).copy_(value)


def _pade(x: Tensor, numerator: Tensor, denominator: Tensor, version: str) -> Tensor:
    """Reference of the op."""
    (wide,) = _working(x)
    f = _Rational(wide, numerator, denominator, version)
    return _as(x, f.p.div_(f.q))


def _pade_backward(
    gradient: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, version: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of the gradient: with f = P/Q, f' = (P' - f Q') / Q and df/db_k = -f Q_k / Q."""
    wide, g = _working(x, gradient)
    f = _Rational(wide, numerator, denominator, version)
    y = f.p.div_(f.q)
    slope = _polynomial(_slope(f.a[1:]), f.e).addcmul_(y, f.denominator_slope(f.b), value=-1)
    share = g / f.q
    grad_x = _as(x, slope.mul_(share))
    grad_a = _moments(share, f.e[: len(numerator)])
    grad_b = _moments(_signed(share.mul_(y), f.sum_sign), f.d[1:]).neg_()
    return (
        grad_x,
        grad_a.to(numerator.dtype),
        _signed(grad_b, f.coefficient_sign).to(denominator.dtype),
    )


def _fake_backward(
    gradient: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, version: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(numerator), torch.empty_like(denominator)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.version = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the op: another op, so that it can be fused and differentiated."""
    grads = torch.ops.fastcil.pade_backward(gradient, *ctx.saved_tensors, ctx.version)
    return (*grads, None)


def _double_gradient(ctx: Any, dx: Tensor, da: Tensor, db: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of ``pade_backward``, itself differentiable.

    ``pade_backward`` is the transpose of the derivative of f, so its pairing with a direction
    (dx, da, db) is the sum of g phi, where phi = f' dx + (A - f B) / Q is the derivative of f in
    that direction, A = sum da_k x^k and B = sum db_k Q_k.
    """
    gradient, x, numerator, denominator = ctx.saved_tensors
    wide, g, dx = _working(x, gradient, dx)
    f = _Rational(wide, numerator, denominator, ctx.version)
    da = da.to(wide.dtype)
    db = _signed(db.to(wide.dtype), f.coefficient_sign)

    p1, p2 = _polynomial(_slope(f.a[1:]), f.e), _polynomial(_slope(_slope(f.a[1:])[1:]), f.e)
    q1, q2 = f.denominator_slope(f.b), f.denominator_curvature(f.b)
    a0, a1 = _polynomial(da, f.e), _polynomial(_slope(da[1:]), f.e)
    b0, b1 = f.denominator(db), f.denominator_slope(db)

    y = f.p / f.q
    y1 = (p1 - y * q1) / f.q
    y2 = (p2 - 2 * y1 * q1 - y * q2) / f.q
    turn = (a0 - y * b0) / f.q
    turn1 = (a1 - y1 * b0 - y * b1 - turn * q1) / f.q
    phi = dx * y1 + turn

    share = g / f.q
    along = share * dx
    shift = (dx * q1 + b0) / f.q
    grad_a = -_moments(share * shift, f.e[: len(da)])
    if len(da) > 1:
        along_a = _slope(_moments(along, f.e[: len(da) - 1]))
        grad_a = torch.cat([grad_a[:1], grad_a[1:] + along_a])
    bent = _signed(share * (y * shift - phi), f.sum_sign)
    along = _signed(_signed(along * y, f.sum_sign), f.odd_sign)
    grad_b = _moments(bent, f.d[1:]) - _slope(_moments(along, f.d[:-1]))
    return (
        phi.to(gradient.dtype),
        (g * (dx * y2 + turn1)).to(x.dtype),
        grad_a.to(numerator.dtype),
        _signed(grad_b, f.coefficient_sign).to(denominator.dtype),
        None,
    )


define(
    "pade(Tensor x, Tensor numerator, Tensor denominator, str version) -> Tensor",
    _pade,
    lambda x, numerator, denominator, version: torch.empty_like(x),
)
define(
    "pade_backward(Tensor gradient, Tensor x, Tensor numerator, Tensor denominator, str version)"
    " -> (Tensor, Tensor, Tensor)",
    _pade_backward,
    _fake_backward,
)
torch.library.register_autograd("fastcil::pade", _gradient, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd(
    "fastcil::pade_backward", _double_gradient, setup_context=_setup, lib=LIBRARY
)


def pade(x: Tensor, numerator: Tensor, denominator: Tensor, version: str = "A") -> Tensor:
    r"""Applies a rational function with learnable coefficients to every element.

    .. math:: f(x) = \frac{P(x)}{Q(x)}, \qquad P(x) = \sum_{k=0}^m a_k x^k

    (Molina et al. 2020, "Padé Activation Units", Eq. 1), where the version says how the
    denominator is kept away from zero:

    ========= =====================
    A         1 + sum_k abs(b_k x^k), the form of the CIM code
    B         1 + abs(sum_k b_k x^k) (Molina et al. 2020's safe form)
    C         0.1 + abs(sum_k b_k x^k)
    nonsafe   1 + sum_k b_k x^k, as Luo et al. 2023 print it: it has poles, and nothing hides them
    ========= =====================

    Computed in float32, or in float64 if ``x`` is, also under autocast; for large \|x\| in powers
    of 1/x, so that it stays finite where f does. The derivative of abs at 0 is 0. Differentiable
    any number of times, eagerly.

    Args:
        x: Any shape, floating point.  # [...]
        numerator: Coefficients a_0 ... a_m.  # [m + 1]
        denominator: Coefficients b_1 ... b_n.  # [n]
        version: "A", "B", "C" or "nonsafe".

    Returns:
        f(x), with the shape, dtype and strides of ``x``.

    Raises:
        FastcilError: On an unknown version, an integer ``x``, or coefficients that are not
            vectors of floating-point numbers.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 2.0, 1e30])
        >>> pade(x, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0]))  # x^2 / (1 + |x|)
        tensor([5.0000e-01, 0.0000e+00, 1.3333e+00, 1.0000e+30])
    """
    if version not in _FORMS:
        why = " ('D' is version B with random noise)" if version == "D" else ""
        raise FastcilError(f"version is {version!r}{why}; it must be one of {', '.join(_FORMS)}.")
    if not x.is_floating_point():
        raise FastcilError(f"x has dtype {x.dtype}; pade needs a floating-point tensor.")
    for name, coefficients in (("numerator", numerator), ("denominator", denominator)):
        if coefficients.ndim != 1 or len(coefficients) == 0:
            raise FastcilError(
                f"{name} has shape {tuple(coefficients.shape)}; it must be a vector of at least "
                "one coefficient."
            )
        if not coefficients.is_floating_point():
            raise FastcilError(f"{name} has dtype {coefficients.dtype}; it must be floating point.")
    return torch.ops.fastcil.pade(x, numerator, denominator, version)
