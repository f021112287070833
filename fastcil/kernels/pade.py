"""Launchers of the Padé activation, its gradient, and the gradient of that.

How many programs sum for the coefficients depends on the size of x alone, never on the GPU, and
what they sum is added in a fixed order: same input, same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastcil.kernels._launch import (
    ACCESS_BYTES,
    arranged,
    beside,
    dense,
    launch,
    power_of_two_divisor,
)
from fastcil.kernels._pade_kernels import (
    backward_kernel,
    collect_kernel,
    double_backward_kernel,
    pade_kernel,
)

_THREADS = 128  # of a program
_PROGRAMS = 1536  # that sum for the coefficients, about, at most
_TILES = 4  # of a program that sums nothing, at most
_SLOTS = 1024  # that the second kernel adds at once


class _Plan(NamedTuple):
    """How x lies in memory, [outer, groups, inner], and how programs share it."""

    constants: dict[str, Any]  # of every kernel
    sizes: tuple[int, int, int, int, int]  # count, groups, inner, stride, tiles
    chunks: int  # of a group: one program each

    @property
    def programs(self) -> int:
        return self.chunks * self.sizes[1]


def _plan(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    version: str,
    elements: int,
    most_tiles: int | None = None,
) -> _Plan:
    """The plan for a dense x of which a thread works on so many elements at a time."""
    m, n = numerator.shape[-1] - 1, denominator.shape[-1]
    groups = numerator.shape[0] if numerator.ndim == 2 else 1
    count = x.numel() // groups
    vec = ACCESS_BYTES // x.element_size()
    inner = stride = 1
    if groups > 1:
        # Channel c is the memory position divided by its stride, modulo their number, and the
        # channels of a group follow each other: so do that many elements.
        run = x.stride(1) * (x.shape[1] // groups)
        vec = power_of_two_divisor(run, vec)
        inner = run // vec
        stride = inner * groups
    tile = _THREADS * elements
    tiles = max(1, -(-x.numel() // (tile * _PROGRAMS)))
    tiles = tiles if most_tiles is None else min(tiles, most_tiles)
    double = x.dtype == torch.float64
    # The largest |x| whose powers keep far from overflow, whatever the coefficients within reason.
    limit = 2.0 ** ((960 if double else 96) // max(m, n))
    constants = {
        "M": m,
        "N": n,
        "VERSION": version,
        "LIMIT": limit,
        "GROUPED": groups > 1,
        "ROWS": tile // vec,
        "VEC": vec,
        "DTYPE": tl.float64 if double else tl.float32,
        "num_warps": _THREADS // 32,
    }
    return _Plan(constants, (count, groups, inner, stride, tiles), -(-count // (tile * tiles)))


def _elements(x: Tensor) -> int:
    """Of a thread at a time: two accesses of four bytes an element, else one."""
    return 2 if x.dtype == torch.float64 else 8


def _slots(plan: _Plan, x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Room for the sums of every program: [groups, m + 1 + n, chunks]."""
    sums = numerator.shape[-1] + denominator.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((plan.sizes[1], sums, plan.chunks), dtype=dtype)


def _collect(
    slots: Tensor, numerator: Tensor, denominator: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """The gradients by the coefficients, from the sums of all programs."""
    a, b = numerator.contiguous(), denominator.contiguous()
    grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
    constants = {name: plan.constants[name] for name in ("M", "N", "VERSION")}
    launch(
        collect_kernel,
        slots.shape[0] * slots.shape[1],
        grad_a,
        grad_b,
        b,
        slots,
        plan.chunks,
        SLOTS=_SLOTS,
        **constants,
    )
    return arranged(grad_a, numerator), arranged(grad_b, denominator)


def pade(x: Tensor, numerator: Tensor, denominator: Tensor, version: str) -> Tensor:
    """Launch ``fastcil::pade``: f(x) = P(x) / Q(x).

    Args:
        x: Floating point, of any strides.  # [...] or [B, C, ...]
        numerator: Coefficients of P.  # [m + 1] or [groups, m + 1]
        denominator: Coefficients of Q.  # [n] or [groups, n]
        version: "A", "B", "C" or "nonsafe".

    Returns:
        f(x), with the dtype of ``x`` and the strides of ``torch.empty_like(x)``.
    """
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel():
        plan = _plan(x, numerator, denominator, version, _elements(x), _TILES)
        launch(
            pade_kernel,
            plan.programs,
            y,
            x,
            numerator.contiguous(),
            denominator.contiguous(),
            *plan.sizes,
            **plan.constants,
        )
    return y


def pade_backward(
    gradient: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, version: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch ``fastcil::pade_backward``: the gradients by x and by the coefficients.

    Args:
        gradient: That by f(x), of any strides.  # as x
        x: As ``pade`` took it.
        numerator: As ``pade`` took it.
        denominator: As ``pade`` took it.
        version: As ``pade`` took it.

    Returns:
        Gradients with the shapes and dtypes of ``x``, ``numerator`` and ``denominator``: the same
        bits in every run and on every GPU of one kind.
    """
    x = dense(x)
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(numerator), torch.zeros_like(denominator)
    plan = _plan(x, numerator, denominator, version, _elements(x))
    slots = _slots(plan, x, numerator, denominator)
    few = x.dtype != torch.float64 and slots.shape[1] <= 10
    launch(
        backward_kernel,
        plan.programs,
        grad_x,
        beside(gradient, x),
        x,
        numerator.contiguous(),
        denominator.contiguous(),
        slots,
        plan.chunks,
        *plan.sizes,
        # Left to itself the assembler aims at fewer and spills.
        maxnreg=128 if few else 255,
        THREADS=_THREADS,
        **plan.constants,
    )
    return grad_x, *_collect(slots, numerator, denominator, plan)


def pade_double_backward(
    dx: Tensor,
    da: Tensor,
    db: Tensor,
    gradient: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    version: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch ``fastcil::pade_double_backward``: the gradients of <pade_backward, (dx, da, db)>.

    Args:
        dx: Direction of ``x``, of any strides.  # as x
        da: Direction of ``numerator``.  # as numerator
        db: Direction of ``denominator``.  # as denominator
        gradient: As ``pade_backward`` took it.
        x: As ``pade_backward`` took it.
        numerator: As ``pade_backward`` took it.
        denominator: As ``pade_backward`` took it.
        version: As ``pade_backward`` took it.

    Returns:
        Gradients by ``gradient``, ``x``, ``numerator`` and ``denominator``.
    """
    x = dense(x)
    grad_x = torch.empty_like(x)
    if not x.numel():
        zeros = torch.zeros_like(numerator), torch.zeros_like(denominator)
        return torch.empty_like(gradient), grad_x, *zeros
    plan = _plan(x, numerator, denominator, version, ACCESS_BYTES // x.element_size())
    slots = _slots(plan, x, numerator, denominator)
    phi = torch.empty_like(x, dtype=gradient.dtype)
    launch(
        double_backward_kernel,
        plan.programs,
        phi,
        grad_x,
        beside(dx, x),
        beside(gradient, x),
        x,
        da.contiguous(),
        db.contiguous(),
        numerator.contiguous(),
        denominator.contiguous(),
        slots,
        plan.chunks,
        *plan.sizes,
        maxnreg=255,
        THREADS=_THREADS,
        **plan.constants,
    )
    return arranged(phi, gradient), grad_x, *_collect(slots, numerator, denominator, plan)
