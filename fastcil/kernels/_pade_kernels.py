"""The kernels of the Padé activation, its gradient, and the gradient of that.

A program walks over tiles of one channel group with that group's coefficients in registers. Whole
tiles take the plain basis, without masks, and the program notes the largest |x| it meets; where
powers of that could overflow, it does them again with the SAFE basis, element by element, as it
does what is left at the end. Sums for the coefficients go to slots, one per program, and a second
kernel adds the slots in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcil.kernels._rational import gradients, quotient, second_gradients
from fastcil.kernels._tiles import load_rows, place_of, start_of, store_rows

# Compiled once whatever these are: each would otherwise bring variants for 1 and for 16, 32, ...
_SIZES = ["count", "groups", "inner", "stride", "tiles", "chunks"]
_UNALIGNED = ["a_pointer", "b_pointer", "da_pointer", "db_pointer"]
_jit = triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)


@triton.jit
def _vector(
    pointer: tl.tensor, at: tl.tensor, COUNT: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tuple:
    """Row ``at`` of a matrix with COUNT columns, as scalars."""
    result = ()
    for k in tl.static_range(COUNT):
        result = result + (tl.load(pointer + at * COUNT + k).to(DTYPE),)
    return result


@triton.jit
def _magnitudes(b: tl.tuple, COUNT: tl.constexpr, VERSION: tl.constexpr) -> tl.tuple:
    """Version A's denominator is a polynomial in |x| with coefficients |b_k|."""
    result = ()
    for k in tl.static_range(COUNT):
        result = result + (tl.abs(b[k]) if VERSION == "A" else b[k],)
    return result


@triton.jit
def _turned(db: tl.tuple, b: tl.tuple, COUNT: tl.constexpr, VERSION: tl.constexpr) -> tl.tuple:
    """A direction of b as one of those magnitudes."""
    result = ()
    for k in tl.static_range(COUNT):
        result = result + (_times_sign(db[k], b[k]) if VERSION == "A" else db[k],)
    return result


@triton.jit
def _times_sign(value: tl.tensor, by: tl.tensor) -> tl.tensor:
    return tl.where(by > 0.0, value, tl.where(by < 0.0, -value, 0.0))


@triton.jit
def _zeros(COUNT: tl.constexpr, THREADS: tl.constexpr, DTYPE: tl.constexpr) -> tl.tuple:
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tl.zeros([THREADS], DTYPE),)
    return result


@triton.jit
def _kept(sums: tl.tuple, keep: tl.tensor, COUNT: tl.constexpr) -> tl.tuple:
    """The sums, or zeros, even where they are NaN."""
    result = ()
    for k in tl.static_range(COUNT):
        result = result + (tl.where(keep, sums[k], 0.0),)
    return result


@triton.jit
def _put(slot: tl.tensor, distance: tl.tensor, sums: tl.tuple, COUNT: tl.constexpr) -> None:
    """Add up each of the sums and store it, at this distance from the one before."""
    for k in tl.static_range(COUNT):
        tl.store(slot + k * distance, tl.sum(sums[k], 0))


@_jit
def pade_kernel(
    y_pointer: tl.tensor,
    x_pointer: tl.tensor,
    a_pointer: tl.tensor,  # [groups, M + 1]
    b_pointer: tl.tensor,  # [groups, N]
    count: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    tiles: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    VERSION: tl.constexpr,
    LIMIT: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    group, _chunk, first, base, column = start_of(
        tl.program_id(0).to(tl.int64), groups, inner, stride, tiles * ROWS, GROUPED
    )
    left = tl.minimum(count - first * VEC, tiles * (ROWS * VEC)).to(tl.int32)
    y_pointer += base * VEC
    x_pointer += base * VEC
    largest = tl.zeros([ROWS, VEC], DTYPE)
    start, stop = left * 0, left // (ROWS * VEC)
    for SAFE in tl.static_range(2):
        # In the loop: coefficients that both parts share would go to uniform registers, of which an
        # instruction takes one at most.
        a = _vector(a_pointer, group, M + 1, DTYPE)
        b = _magnitudes(_vector(b_pointer, group, N, DTYPE), N, VERSION)
        row = start * ROWS + tl.arange(0, ROWS)
        for _ in range(start, stop):
            at = place_of(row, column, inner, stride, VEC, GROUPED, SAFE)
            mask = row < left
            x = load_rows(x_pointer, at, mask, VEC, SAFE)
            if not SAFE:
                largest = tl.maximum(largest, tl.abs(x))
            y = quotient(x, a, b, M, N, VERSION, SAFE)[0]
            store_rows(y_pointer, at, y, mask, VEC, SAFE)
            row += ROWS
        if not SAFE:
            start, stop = stop * VEC, tl.cdiv(left, ROWS)
            fine = tl.max(tl.max(largest, 1), 0) <= LIMIT
            # What is stored again below need not be stored by the same thread.
            tl.debug_barrier()
            start = tl.where(fine, start, 0)


@_jit
def backward_kernel(
    grad_pointer: tl.tensor,
    g_pointer: tl.tensor,
    x_pointer: tl.tensor,
    a_pointer: tl.tensor,  # [groups, M + 1]
    b_pointer: tl.tensor,  # [groups, N]
    slots: tl.tensor,  # [groups, M + 1 + N, chunks]
    chunks: tl.tensor,
    count: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    tiles: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    VERSION: tl.constexpr,
    LIMIT: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    THREADS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    group, chunk, first, base, column = start_of(
        tl.program_id(0).to(tl.int64), groups, inner, stride, tiles * ROWS, GROUPED
    )
    left = tl.minimum(count - first * VEC, tiles * (ROWS * VEC)).to(tl.int32)
    grad_pointer += base * VEC
    g_pointer += base * VEC
    x_pointer += base * VEC
    sums_a = _zeros(M + 1, THREADS, DTYPE)
    sums_b = _zeros(N, THREADS, DTYPE)
    largest = tl.zeros([ROWS, VEC], DTYPE)
    start, stop = left * 0, left // (ROWS * VEC)
    for SAFE in tl.static_range(2):
        a = _vector(a_pointer, group, M + 1, DTYPE)
        b = _magnitudes(_vector(b_pointer, group, N, DTYPE), N, VERSION)
        row = start * ROWS + tl.arange(0, ROWS)
        for _ in range(start, stop):
            at = place_of(row, column, inner, stride, VEC, GROUPED, SAFE)
            mask = row < left
            g = load_rows(g_pointer, at, mask, VEC, SAFE)
            x = load_rows(x_pointer, at, mask, VEC, SAFE)
            if not SAFE:
                largest = tl.maximum(largest, tl.abs(x))
            grad, sums_a, sums_b = gradients(g, x, a, b, sums_a, sums_b, M, N, VERSION, SAFE)
            store_rows(grad_pointer, at, grad, mask, VEC, SAFE)
            row += ROWS
        if not SAFE:
            start, stop = stop * VEC, tl.cdiv(left, ROWS)
            fine = tl.max(tl.max(largest, 1), 0) <= LIMIT
            # What is stored again below need not be stored by the same thread.
            tl.debug_barrier()
            start = tl.where(fine, start, 0)
            sums_a = _kept(sums_a, fine, M + 1)
            sums_b = _kept(sums_b, fine, N)
    slot = slots + group * (M + 1 + N) * chunks + chunk
    _put(slot, chunks, sums_a, M + 1)
    _put(slot + (M + 1) * chunks, chunks, sums_b, N)


@_jit
def double_backward_kernel(
    phi_pointer: tl.tensor,
    grad_pointer: tl.tensor,
    dx_pointer: tl.tensor,
    g_pointer: tl.tensor,
    x_pointer: tl.tensor,
    da_pointer: tl.tensor,  # [groups, M + 1]
    db_pointer: tl.tensor,  # [groups, N]
    a_pointer: tl.tensor,  # [groups, M + 1]
    b_pointer: tl.tensor,  # [groups, N]
    slots: tl.tensor,  # [groups, M + 1 + N, chunks]
    chunks: tl.tensor,
    count: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    tiles: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    VERSION: tl.constexpr,
    LIMIT: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
    THREADS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    group, chunk, first, base, column = start_of(
        tl.program_id(0).to(tl.int64), groups, inner, stride, tiles * ROWS, GROUPED
    )
    left = tl.minimum(count - first * VEC, tiles * (ROWS * VEC)).to(tl.int32)
    phi_pointer += base * VEC
    grad_pointer += base * VEC
    dx_pointer += base * VEC
    g_pointer += base * VEC
    x_pointer += base * VEC
    sums_a = _zeros(M + 1, THREADS, DTYPE)
    sums_b = _zeros(N, THREADS, DTYPE)
    largest = tl.zeros([ROWS, VEC], DTYPE)
    start, stop = left * 0, left // (ROWS * VEC)
    for SAFE in tl.static_range(2):
        a = _vector(a_pointer, group, M + 1, DTYPE)
        b = _vector(b_pointer, group, N, DTYPE)
        da = _vector(da_pointer, group, M + 1, DTYPE)
        db = _turned(_vector(db_pointer, group, N, DTYPE), b, N, VERSION)
        b = _magnitudes(b, N, VERSION)
        row = start * ROWS + tl.arange(0, ROWS)
        for _ in range(start, stop):
            at = place_of(row, column, inner, stride, VEC, GROUPED, SAFE)
            mask = row < left
            dx = load_rows(dx_pointer, at, mask, VEC, SAFE)
            g = load_rows(g_pointer, at, mask, VEC, SAFE)
            x = load_rows(x_pointer, at, mask, VEC, SAFE)
            if not SAFE:
                largest = tl.maximum(largest, tl.abs(x))
            phi, grad, sums_a, sums_b = second_gradients(
                dx, g, x, a, b, da, db, sums_a, sums_b, M, N, VERSION, SAFE
            )
            store_rows(phi_pointer, at, phi, mask, VEC, SAFE)
            store_rows(grad_pointer, at, grad, mask, VEC, SAFE)
            row += ROWS
        if not SAFE:
            start, stop = stop * VEC, tl.cdiv(left, ROWS)
            fine = tl.max(tl.max(largest, 1), 0) <= LIMIT
            # What is stored again below need not be stored by the same thread.
            tl.debug_barrier()
            start = tl.where(fine, start, 0)
            sums_a = _kept(sums_a, fine, M + 1)
            sums_b = _kept(sums_b, fine, N)
    slot = slots + group * (M + 1 + N) * chunks + chunk
    _put(slot, chunks, sums_a, M + 1)
    _put(slot + (M + 1) * chunks, chunks, sums_b, N)


@_jit
def collect_kernel(
    grad_a_pointer: tl.tensor,  # [groups, M + 1]
    grad_b_pointer: tl.tensor,  # [groups, N]
    b_pointer: tl.tensor,  # [groups, N]
    slots: tl.tensor,  # [groups, M + 1 + N, chunks]
    chunks: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    VERSION: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64)
    group = index // (M + 1 + N)
    k = index % (M + 1 + N)
    sums = tl.zeros([SLOTS], slots.dtype.element_ty)
    for first in range(0, chunks, SLOTS):
        at = first + tl.arange(0, SLOTS)
        sums += tl.load(slots + index * chunks + at, mask=at < chunks, other=0.0)
    total = tl.sum(sums, 0)
    if k <= M:
        tl.store(grad_a_pointer + group * (M + 1) + k, total)
    else:
        at = group * N + k - (M + 1)
        if VERSION == "A":
            total = _times_sign(total, tl.load(b_pointer + at).to(total.dtype))
        tl.store(grad_b_pointer + at, -total)
