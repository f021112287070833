"""P/Q, its derivatives and their sums over a tile: the arithmetic of the Padé kernels.

A polynomial in u is evaluated as even(u²) + u odd(u²), and sums of weight times u^k come the same
way, so that one list of powers of u² serves them all. Two bases stand behind it:

* plain: u = x, and even and odd powers are both (x²)^j: few instructions, but for degrees (5, 4)
  x^5 overflows beyond |x| = 10^7;
* SAFE: everything times s^n, s = 1 / max(1, |x|), as in the op's reference: powers of x where
  |x| <= 1, of 1/x beyond.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A division takes eight instructions, this one. The interpreter knows no PTX, nor do AMD's GPUs.
_APPROXIMATE = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)


@triton.jit
def _reciprocal(q: tl.tensor, SAFE: tl.constexpr) -> tl.tensor:
    """1/q, to an ulp."""
    if SAFE or q.dtype == tl.float64 or not _APPROXIMATE:
        return 1.0 / q
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [q], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _power(x: tl.tensor, EXPONENT: tl.constexpr) -> tl.tensor:
    power = tl.full(x.shape, 1.0, x.dtype)
    for _ in tl.static_range(EXPONENT):
        power *= x
    return power


@triton.jit
def _basis(x: tl.tensor, M: tl.constexpr, N: tl.constexpr, SAFE: tl.constexpr) -> tl.tuple:
    """u and what its even and its odd powers are made of, for degrees M and N."""
    LARGEST: tl.constexpr = M if M > N else N
    even = (tl.full(x.shape, 1.0, x.dtype), x * x)
    if not SAFE:
        for j in tl.static_range(2, LARGEST // 2 + 1):
            even = even + (even[j // 2] * even[j - j // 2],)
        return x, even, even
    else:
        # Comparisons, because minimum and maximum would take a NaN for a number.
        u = tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))
        s = 1.0 / tl.where(tl.abs(x) > 1.0, tl.abs(x), 1.0)
        even = ()
        odd = ()
        for k in tl.static_range(LARGEST + 1):
            if k <= N:
                monomial = _power(u, k - k % 2) * _power(s, N - k)
            else:
                monomial = _power(u, N - k % 2) * _power(x, k - N)
            if k % 2 == 0:
                even = even + (monomial,)
            else:
                odd = odd + (monomial,)
        return u, even, odd


@triton.jit
def _polynomial(
    c: tl.tuple, u: tl.tensor, even: tl.tuple, odd: tl.tuple, COUNT: tl.constexpr
) -> tl.tensor:
    """The sum of c_k u^k over k < COUNT."""
    value = tl.zeros(u.shape, u.dtype)
    if COUNT > 0:
        value = c[0] * even[0]
    for k in tl.static_range(2, COUNT, 2):
        value += c[k] * even[k // 2]
    if COUNT > 1:
        rest = c[1] * odd[0]
        for k in tl.static_range(3, COUNT, 2):
            rest += c[k] * odd[k // 2]
        value += u * rest
    return value


@triton.jit
def _slope(c: tl.tuple, COUNT: tl.constexpr) -> tl.tuple:
    """The coefficients of the derivative of a polynomial that has COUNT of them."""
    result = ()
    for k in tl.static_range(1, COUNT):
        result = result + (k * c[k],)
    return result


@triton.jit
def _add_moments(
    sums: tl.tuple,
    weight: tl.tensor,
    u: tl.tensor,
    even: tl.tuple,
    odd: tl.tuple,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tuple:
    """Add weight u^k to sum k - FIRST, for COUNT exponents k from FIRST on."""
    weight_u = weight * u
    result = ()
    for k in tl.static_range(FIRST, FIRST + COUNT):
        product = weight * even[k // 2] if k % 2 == 0 else weight_u * odd[k // 2]
        result = result + (sums[k - FIRST] + _within_threads(product, sums[0].shape[0]),)
    return result


@triton.jit
def _add_slope_moments(
    sums: tl.tuple,
    weight: tl.tensor,
    u: tl.tensor,
    even: tl.tuple,
    odd: tl.tuple,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tuple:
    """The same with the derivatives k u^(k - 1) in place of the powers u^k."""
    weight_u = weight * u
    result = ()
    for k in tl.static_range(FIRST, FIRST + COUNT):
        if k == 0:
            result = result + (sums[0],)
        else:
            product = weight * even[k // 2] if k % 2 == 1 else weight_u * odd[k // 2 - 1]
            added = k * _within_threads(product, sums[0].shape[0])
            result = result + (sums[k - FIRST] + added,)
    return result


@triton.jit
def _within_threads(product: tl.tensor, THREADS: tl.constexpr) -> tl.tensor:
    """Add up what each thread holds of a tile, row t, t + THREADS, ...: [THREADS]."""
    rows = tl.sum(product, 1)
    return tl.sum(tl.reshape(rows, [product.shape[0] // THREADS, THREADS]), 0)


@triton.jit
def _signed(value: tl.tensor, by: tl.tensor) -> tl.tensor:
    """The value times the sign of ``by``, which is 0 at 0."""
    if value.dtype == tl.float64:
        bits = by.to(tl.int64, bitcast=True) & -0x8000000000000000
        turned = (value.to(tl.int64, bitcast=True) ^ bits).to(tl.float64, bitcast=True)
    else:
        bits = by.to(tl.int32, bitcast=True) & -0x80000000
        turned = (value.to(tl.int32, bitcast=True) ^ bits).to(tl.float32, bitcast=True)
    return tl.where(by == 0.0, 0.0, turned)


@triton.jit
def _times_sum_sign(value: tl.tensor, total: tl.tensor, VERSION: tl.constexpr) -> tl.tensor:
    """Times the sign of the sum whose absolute value the denominator takes, if it does."""
    return _signed(value, total) if VERSION == "B" or VERSION == "C" else value


@triton.jit
def _times_slope_sign(
    value: tl.tensor, x: tl.tensor, total: tl.tensor, VERSION: tl.constexpr
) -> tl.tensor:
    """The same for a derivative by x, which in version A brings the sign of x."""
    return _signed(value, x) if VERSION == "A" else _times_sum_sign(value, total, VERSION)


@triton.jit
def quotient(
    x: tl.tensor,
    a: tl.tuple,
    b: tl.tuple,
    M: tl.constexpr,
    N: tl.constexpr,
    VERSION: tl.constexpr,
    SAFE: tl.constexpr,
) -> tl.tuple:
    """P/Q, 1/Q and Q's sum; the variables of P and Q, and the powers of both."""
    u, even, odd = _basis(x, M, N, SAFE)
    v = tl.abs(u) if VERSION == "A" else u
    if VERSION == "B" or VERSION == "C":
        total = _polynomial((0.0,) + b, v, even, odd, N + 1)
        q = (0.1 if VERSION == "C" else 1.0) * even[0] + tl.abs(total)
    else:
        total = v
        q = _polynomial((1.0,) + b, v, even, odd, N + 1)
    inverse = _reciprocal(q, SAFE)
    y = _polynomial(a, u, even, odd, M + 1) * inverse
    return y, inverse, total, u, v, even, odd


@triton.jit
def gradients(
    g: tl.tensor,
    x: tl.tensor,
    a: tl.tuple,
    b: tl.tuple,
    sums_a: tl.tuple,
    sums_b: tl.tuple,
    M: tl.constexpr,
    N: tl.constexpr,
    VERSION: tl.constexpr,
    SAFE: tl.constexpr,
) -> tl.tuple:
    """The gradient by x; those by a_k and by -b_k (by -|b_k| in version A) join the sums."""
    y, inverse, total, u, v, even, odd = quotient(x, a, b, M, N, VERSION, SAFE)
    share = g * inverse
    p1 = _polynomial(_slope(a, M + 1), u, even, odd, M)
    q1 = _polynomial(_slope((0.0,) + b, N + 1), v, even, odd, N)
    grad_x = (p1 - _times_slope_sign(y, x, total, VERSION) * q1) * share
    bent = _times_sum_sign(share * y, total, VERSION)
    sums_a = _add_moments(sums_a, share, u, even, odd, 0, M + 1)
    sums_b = _add_moments(sums_b, bent, v, even, odd, 1, N)
    return grad_x, sums_a, sums_b


@triton.jit
def second_gradients(
    dx: tl.tensor,
    g: tl.tensor,
    x: tl.tensor,
    a: tl.tuple,
    b: tl.tuple,
    da: tl.tuple,
    db: tl.tuple,
    sums_a: tl.tuple,
    sums_b: tl.tuple,
    M: tl.constexpr,
    N: tl.constexpr,
    VERSION: tl.constexpr,
    SAFE: tl.constexpr,
) -> tl.tuple:
    """The gradients of g phi by g and by x, where phi = f' dx + (A - f B) / Q.

    phi is the derivative of f = P/Q in the direction (dx, da, db), in which A and B are those of
    P and Q. Gradients by the coefficients join the sums, as in ``gradients``.
    """
    y, inverse, total, u, v, even, odd = quotient(x, a, b, M, N, VERSION, SAFE)
    slope_a = _slope(a, M + 1)
    slope_b = _slope((0.0,) + b, N + 1)
    p1 = _polynomial(slope_a, u, even, odd, M)
    p2 = _polynomial(_slope(slope_a, M), u, even, odd, M - 1)
    q1 = _times_slope_sign(_polynomial(slope_b, v, even, odd, N), x, total, VERSION)
    q2 = _times_sum_sign(_polynomial(_slope(slope_b, N), v, even, odd, N - 1), total, VERSION)
    a0 = _polynomial(da, u, even, odd, M + 1)
    a1 = _polynomial(_slope(da, M + 1), u, even, odd, M)
    b0 = _times_sum_sign(_polynomial((0.0,) + db, v, even, odd, N + 1), total, VERSION)
    b1 = _polynomial(_slope((0.0,) + db, N + 1), v, even, odd, N)
    b1 = _times_slope_sign(b1, x, total, VERSION)

    y1 = (p1 - y * q1) * inverse
    y2 = (p2 - 2.0 * y1 * q1 - y * q2) * inverse
    turn = (a0 - y * b0) * inverse
    turn1 = (a1 - y1 * b0 - y * b1 - turn * q1) * inverse
    phi = dx * y1 + turn

    share = g * inverse
    along = share * dx
    shift = (dx * q1 + b0) * inverse
    sums_a = _add_moments(sums_a, 0.0 - share * shift, u, even, odd, 0, M + 1)
    sums_a = _add_slope_moments(sums_a, along, u, even, odd, 0, M + 1)
    bent = _times_sum_sign(share * (phi - y * shift), total, VERSION)
    along = _times_slope_sign(along * y, x, total, VERSION)
    sums_b = _add_moments(sums_b, bent, v, even, odd, 1, N)
    sums_b = _add_slope_moments(sums_b, along, v, even, odd, 1, N)
    return phi, g * (dx * y2 + turn1), sums_a, sums_b
