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

MOST = 8  # the highest degree


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
VERSIONS = ("A", "B", "C", "D", "nonsafe")


Coefficients = list[Tensor]  # one per term, each to be broadcast with the elements


class _Rational:
    """P and Q at every element of x, both scaled by s^n, and the signs their derivatives need.

    Where there are groups, x is [B, G, C / G, ...] and each coefficient [G, 1, ...].
    """

    def __init__(self, x: Tensor, numerator: Tensor, denominator: Tensor, version: str) -> None:
        form = _FORMS[version]
        x = _by_group(x, numerator)
        self.a = _terms(numerator, x)
        self.b = _terms(denominator, x)
        self.e = _monomials(x, len(self.a) - 1, len(self.b))
        self.d = self.e[: len(self.b) + 1]
        self.odd_sign = self.sum_sign = None
        if form.absolute_terms:
            # The denominator is then a polynomial in |x| with coefficients |b_k|; a derivative by
            # b_k brings the sign of b_k, an odd derivative by x the sign of x.
            self.d = [e.abs() if k % 2 else e for k, e in enumerate(self.d)]
            self.odd_sign = x.sign()
            self.b = [b.abs() for b in self.b]
        self.p = _polynomial(self.a, self.e)
        total = _polynomial(self.b, self.d[1:])
        if form.absolute_sum:
            self.sum_sign = total.sign()
        self.q = _signed(total, self.sum_sign).add_(self.e[0], alpha=form.constant)

    def denominator(self, b: Coefficients) -> Tensor:
        """Derivative of Q in the direction ``b`` of its coefficients."""
        return _signed(_polynomial(b, self.d[1:]), self.sum_sign)

    def denominator_slope(self, b: Coefficients) -> Tensor:
        """The derivative of ``denominator`` by x."""
        slope = _polynomial(_slope(b), self.d)
        return _signed(_signed(slope, self.odd_sign), self.sum_sign)

    def denominator_curvature(self, b: Coefficients) -> Tensor:
        """The second derivative of ``denominator`` by x."""
        return _signed(_polynomial(_slope(_slope(b)[1:]), self.d), self.sum_sign)


def _by_group(x: Tensor, coefficients: Tensor) -> Tensor:
    """Splits the channels where the coefficients are those of groups: [B, G, C / G, ...]."""
    if coefficients.dim() == 1:
        return x
    groups = len(coefficients)
    return x.unflatten(1, (groups, x.shape[1] // groups))


def _terms(coefficients: Tensor, x: Tensor) -> Coefficients:
    """The coefficients of each power, in the dtype of x."""
    shape = (-1,) + (1,) * (x.dim() - 2) if coefficients.dim() == 2 else ()
    return [column.reshape(shape) for column in coefficients.to(x.dtype).unbind(-1)]


def _sign_of(denominator: Tensor, version: str) -> Tensor | None:
    """What a derivative by b_k brings where Q has its absolute value."""
    return denominator.sign() if _FORMS[version].absolute_terms else None


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


def _polynomial(coefficients: Coefficients, monomials: Sequence[Tensor]) -> Tensor:
    """Sum over k of coefficient k times monomial k, one pass over memory per term."""
    if not coefficients:
        return torch.zeros_like(monomials[0])
    first, *rest = coefficients
    total = first * monomials[0]
    for coefficient, monomial in zip(rest, monomials[1:], strict=False):
        total.addcmul_(monomial, coefficient)
    return total


def _slope(coefficients: Coefficients) -> Coefficients:
    """The derivative of c_1 x + c_2 x^2 + ...: its coefficients from the constant on."""
    return [k * coefficient for k, coefficient in enumerate(coefficients, 1)]


def _signed(value: Tensor, sign: Tensor | None) -> Tensor:
    return value if sign is None else value * sign


def _moments(weight: Tensor, monomials: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Sum of weight times monomial over all elements, or over each group's if ``like`` has them."""
    products = [weight * monomial for monomial in monomials]
    if like.dim() == 1:
        return [product.sum() for product in products]
    return [product.transpose(0, 1).flatten(1).sum(1) for product in products]


def _working(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the precision of computation: float32, or float64 if the first is."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


def _as(x: Tensor, value: Tensor) -> Tensor:
    """The value with the shape and dtype of x and the strides that ``torch.empty_like(x)`` has."""
    value = value.reshape(x.shape)
    result = torch.empty_like(x, device="meta")
    if value.dtype == result.dtype and value.stride() == result.stride():
        return value
    return torch.empty_like(x).copy_(value)


def _coefficients_as(like: Tensor, sums: list[Tensor], sign: Tensor | None = None) -> Tensor:
    """Sums, one for each coefficient (of each group), as a gradient of ``like``."""
    return _as(like, _signed(torch.stack(sums, -1), sign))


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
    share = _by_group(g, numerator) / f.q
    bent = _signed(share * y, f.sum_sign).neg_()
    return (
        _as(x, slope.mul_(share)),
        _coefficients_as(numerator, _moments(share, f.e[: len(f.a)], numerator)),
        _coefficients_as(
            denominator, _moments(bent, f.d[1:], denominator), _sign_of(denominator, version)
        ),
    )


def _pade_double_backward(
    dx: Tensor,
    da: Tensor,
    db: Tensor,
    gradient: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    version: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference of the gradient of ``pade_backward``.

    ``pade_backward`` is the transpose of the derivative of f, so its pairing with a direction
    (dx, da, db) is the sum of g phi, where phi = f' dx + (A - f B) / Q is the derivative of f in
    that direction, A = sum da_k x^k and B = sum db_k Q_k.
    """
    sign = _sign_of(denominator, version)
    wide, *others = _working(x, gradient, dx)
    f = _Rational(wide, numerator, denominator, version)
    g, dx = (_by_group(other, numerator) for other in others)
    along_a, along_b = _terms(da, g), _terms(_signed(db, sign), g)

    p1, p2 = _polynomial(_slope(f.a[1:]), f.e), _polynomial(_slope(_slope(f.a[1:])[1:]), f.e)
    q1, q2 = f.denominator_slope(f.b), f.denominator_curvature(f.b)
    a0, a1 = _polynomial(along_a, f.e), _polynomial(_slope(along_a[1:]), f.e)
    b0, b1 = f.denominator(along_b), f.denominator_slope(along_b)

    y = f.p / f.q
    y1 = (p1 - y * q1) / f.q
    y2 = (p2 - 2 * y1 * q1 - y * q2) / f.q
    turn = (a0 - y * b0) / f.q
    turn1 = (a1 - y1 * b0 - y * b1 - turn * q1) / f.q
    phi = dx * y1 + turn

    share = g / f.q
    along = share * dx
    shift = (dx * q1 + b0) / f.q
    # A power's own sum, and what it adds to the sum of the power above, whose derivative it is.
    fixed = _moments(-share * shift, f.e[: len(f.a)], numerator)
    moved = _slope(_moments(along, f.e[: len(f.a) - 1], numerator))
    grad_a = fixed[:1] + [here + below for here, below in zip(fixed[1:], moved, strict=True)]
    bent = _signed(share * (y * shift - phi), f.sum_sign)
    along = _signed(_signed(along * y, f.sum_sign), f.odd_sign)
    fixed = _moments(bent, f.d[1:], denominator)
    moved = _slope(_moments(along, f.d[:-1], denominator))
    grad_b = [here - below for here, below in zip(fixed, moved, strict=True)]
    return (
        _as(gradient, phi),
        _as(x, g * (dx * y2 + turn1)),
        _coefficients_as(numerator, grad_a),
        _coefficients_as(denominator, grad_b, sign),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.version = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the op: another op, so that it can be fused and differentiated."""
    grads = torch.ops.fastcil.pade_backward(gradient, *ctx.saved_tensors, ctx.version)
    return (*grads, None)


def _double_gradient(ctx: Any, dx: Tensor, da: Tensor, db: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of ``pade_backward``: an op once more."""
    grads = torch.ops.fastcil.pade_double_backward(dx, da, db, *ctx.saved_tensors, ctx.version)
    return (*grads, None)


def _refuse(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise FastcilError(
        "pade is differentiated a third time; it has first and second derivatives only: call "
        "autograd.grad without create_graph for the second."
    )


_KERNELS = "fastcil.kernels.pade"
define(
    "pade(Tensor x, Tensor numerator, Tensor denominator, str version) -> Tensor",
    _pade,
    lambda x, numerator, denominator, version: torch.empty_like(x),
    kernel=f"{_KERNELS}:pade",
)
define(
    "pade_backward(Tensor gradient, Tensor x, Tensor numerator, Tensor denominator, str version)"
    " -> (Tensor, Tensor, Tensor)",
    _pade_backward,
    lambda gradient, *inputs: tuple(torch.empty_like(tensor) for tensor in inputs[:3]),
    kernel=f"{_KERNELS}:pade_backward",
)
define(
    "pade_double_backward(Tensor dx, Tensor da, Tensor db, Tensor gradient, Tensor x, "
    "Tensor numerator, Tensor denominator, str version) -> (Tensor, Tensor, Tensor, Tensor)",
    _pade_double_backward,
    lambda dx, da, db, *inputs: tuple(torch.empty_like(tensor) for tensor in inputs[:4]),
    kernel=f"{_KERNELS}:pade_double_backward",
)
for _op, _backward in (("pade", _gradient), ("pade_backward", _double_gradient)):
    torch.library.register_autograd(f"fastcil::{_op}", _backward, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd("fastcil::pade_double_backward", _refuse, lib=LIBRARY)


def _check(x: Tensor, numerator: Tensor, denominator: Tensor) -> None:
    """Refuses, by dtype and shape alone, what no kernel takes."""
    if not x.is_floating_point():
        raise FastcilError(f"x has dtype {x.dtype}; pade needs a floating-point tensor.")
    for name, coefficients, most in (
        ("numerator", numerator, MOST + 1),
        ("denominator", denominator, MOST),
    ):
        shape = tuple(coefficients.shape)
        if coefficients.dim() not in (1, 2) or not 1 <= shape[-1] <= most or shape[0] == 0:
            raise FastcilError(
                f"{name} has shape {shape}; it must be a vector of 1 to {most} coefficients, or "
                "one such row for each group."
            )
        if not coefficients.is_floating_point():
            raise FastcilError(f"{name} has dtype {coefficients.dtype}; it must be floating point.")
    if numerator.shape[:-1] != denominator.shape[:-1]:
        raise FastcilError(
            f"denominator has shape {tuple(denominator.shape)} and numerator "
            f"{tuple(numerator.shape)}; give both as vectors or both with a row for each group."
        )
    if numerator.dim() == 2 and (x.dim() < 2 or x.shape[1] % len(numerator)):
        raise FastcilError(
            f"x has shape {tuple(x.shape)}; with coefficients for {len(numerator)} groups it must "
            "be [B, C, ...] with C a multiple of them."
        )


def _noisy(coefficients: Tensor, deviation: float, generator: torch.Generator | None) -> Tensor:
    """The coefficients, each times a draw from [1 - deviation, 1 + deviation)."""
    device = coefficients.device if generator is None else generator.device
    draw = torch.rand(
        coefficients.shape, generator=generator, device=device, dtype=coefficients.dtype
    )
    return coefficients * (1 + deviation * (2 * draw - 1)).to(coefficients.device)


def pade(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    version: str = "A",
    *,
    deviation: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Applies a rational function with learnable coefficients to every element.

    .. math:: f(x) = \frac{P(x)}{Q(x)}, \qquad P(x) = \sum_{k=0}^m a_k x^k

    (Molina et al. 2020, "Padé Activation Units", Eq. 1), where the version says how the
    denominator is kept away from zero:

    ========= =====================
    A         1 + sum_k abs(b_k x^k), the form of the CIM code
    B         1 + abs(sum_k b_k x^k) (Molina et al. 2020's safe form)
    C         0.1 + abs(sum_k b_k x^k)
    D         B, with every coefficient of P and Q multiplied in each call by a fresh draw from
              U(1 - deviation, 1 + deviation) (Molina et al. 2020's randomised units)
    nonsafe   1 + sum_k b_k x^k, as Luo et al. 2023 print it: it has poles, and nothing hides them
    ========= =====================

    Computed in float32, or in float64 if ``x`` is, also under autocast; for large \|x\| in powers
    of 1/x, so that it stays finite where f does. The derivative of abs at 0 is 0. Differentiable
    twice: first and second derivatives are ops of their own, fused where there are kernels, and
    give the same bits whatever the number of threads. On the CPU results of 4 MiB or more take the
    memory of earlier ones that are gone; of such memory the process keeps 256 MiB at most.

    Args:
        x: Any shape, [B, C, ...] with groups, floating point.  # [...]
        numerator: Coefficients a_0 ... a_m, m <= 8, or a row of them for each of G groups, where
            channel c belongs to group c // (C / G).  # [m + 1] or [G, m + 1]
        denominator: Coefficients b_1 ... b_n, 1 <= n <= 8.  # [n] or [G, n]
        version: "A", "B", "C", "D" or "nonsafe".
        deviation: Of version D alone, from 0 to 1.
        generator: For the draws of version D; None is torch's global one of the coefficients'
            device.

    Returns:
        f(x), with the shape, dtype and strides of ``x``.

    Raises:
        FastcilError: On an unknown version, a deviation beyond [0, 1], an integer ``x``, or
            coefficients whose shapes or dtypes do not fit; and where it is differentiated a third
            time.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 2.0, 1e30])
        >>> pade(x, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0]))  # x^2 / (1 + |x|)
        tensor([5.0000e-01, 0.0000e+00, 1.3333e+00, 1.0000e+30])
    """
    if version not in VERSIONS:
        raise FastcilError(f"version is {version!r}; it must be one of {', '.join(VERSIONS)}.")
    _check(x, numerator, denominator)
    if version == "D":
        if not 0 <= deviation <= 1:
            raise FastcilError(f"deviation is {deviation}; it must be from 0 to 1.")
        version = "B"
        numerator = _noisy(numerator, deviation, generator)
        denominator = _noisy(denominator, deviation, generator)
    return torch.ops.fastcil.pade(x, numerator, denominator, version)
