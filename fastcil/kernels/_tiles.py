"""Tiles of dense memory: rows of VEC neighbours, which a thread moves in one access.

Row r of a tensor is its elements r * VEC ... (r + 1) * VEC - 1 in memory. With channel groups the
memory is [outer, groups, inner]: the rows of one group are numbered through, and ``place_of`` says
where in memory they are. What must be masked is taken as SINGLE elements, numbered likewise: then
neighbouring threads have neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(
    row: tl.tensor,
    column: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    VEC: tl.constexpr,
    GROUPED: tl.constexpr,
    SINGLE: tl.constexpr,
) -> tl.tensor:
    """Where the rows of a chunk are in memory, in rows from ``base``; SINGLE ones in elements."""
    if SINGLE:
        return _row_at(column + row // VEC, inner, stride, GROUPED) * VEC + row % VEC
    else:
        return _row_at(column + row, inner, stride, GROUPED)


@triton.jit
def _row_at(
    row: tl.tensor, inner: tl.tensor, stride: tl.tensor, GROUPED: tl.constexpr
) -> tl.tensor:
    """Where a group's row is in memory, in rows from the group's first.

    ``inner`` is the number of rows of the group that follow each other, ``stride`` the distance
    from the first of them to the first of the next ones.
    """
    if not GROUPED:
        return row
    else:
        outer = row // inner
        return outer.to(tl.int64) * stride + (row - outer * inner)


@triton.jit
def start_of(
    program: tl.tensor,
    groups: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    GROUPED: tl.constexpr,
) -> tl.tuple:
    """What a program with so many rows of one group works on: (group, chunk, first, base, column).

    Its chunk of the group starts at the group's row ``first``, which lies ``column`` rows behind
    ``base``, the row in memory from which ``place_of`` counts. Groups alternate, because those of
    one pixel may share a cache line.
    """
    if GROUPED:
        group = program % groups
        chunk = program // groups
        first = chunk * rows
        outer = first // inner
        column = (first - outer * inner).to(inner.dtype)
        return group, chunk, first, outer * stride + group * inner, column
    else:
        first = program * rows
        return program * 0, program, first, first, 0


@triton.jit
def load_rows(
    pointer: tl.tensor, place: tl.tensor, mask: tl.tensor, VEC: tl.constexpr, SINGLE: tl.constexpr
) -> tl.tensor:
    """Rows [rows, VEC] in the precision of computation; SINGLE elements [rows, 1] by the mask."""
    if SINGLE:
        value = tl.load(pointer + place[:, None], mask=mask[:, None], other=0.0)
    elif pointer.dtype.element_ty == tl.bfloat16 and VEC > 1:
        # Two at a time: a bfloat16 is the upper half of the float32, so that one shift or mask
        # widens it; to take it out of its word first would be one instruction more.
        words = pointer.to(tl.pointer_type(tl.int32))
        pair = tl.load(_elements(words, place, VEC // 2))
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -0x10000).to(tl.float32, bitcast=True)
        value = tl.reshape(tl.join(low, high), [place.shape[0], VEC])
    else:
        value = tl.load(_elements(pointer, place, VEC))
    return value if value.dtype == tl.float64 else value.to(tl.float32)


@triton.jit
def store_rows(
    pointer: tl.tensor,
    place: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    VEC: tl.constexpr,
    SINGLE: tl.constexpr,
) -> None:
    """Rows, or single elements in the mask, rounded to the tensor's dtype."""
    value = value.to(pointer.dtype.element_ty)
    if SINGLE:
        tl.store(pointer + place[:, None], value, mask=mask[:, None])
    else:
        tl.store(_elements(pointer, place, VEC), value)


@triton.jit
def _elements(pointer: tl.tensor, rows: tl.tensor, VEC: tl.constexpr) -> tl.tensor:
    """Where the elements of the rows are: [rows, VEC]."""
    return pointer + rows[:, None] * VEC + tl.arange(0, VEC)[None, :]
