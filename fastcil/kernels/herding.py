"""Herding: one program per class, from the unit features to the last pick.

Unit features, their squares and their scores are float64 in memory, so that a class may be of any
size. A program's threads see what others wrote there behind a barrier only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcil.kernels._launch import launch

TIE = 1e-10  # that of fastcil.ops.herding, which imports this folder
_SMALLEST = 1e-12  # the norm below which torch's normalize does not divide
_COLUMNS = 128  # of the features, worked on at once
_ROWS = 16
_SCORES = 1024
_WARPS = 8


@triton.jit
def _normalise(
    unit: tl.tensor,
    own: tl.tensor,
    features: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Rows at unit norm, and their squared norms then."""
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        square = tl.zeros([ROWS, COLUMNS], tl.float64)
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            there = (row[:, None] < count) & (column[None, :] < width)
            at = row[:, None].to(tl.int64) * width + column[None, :]
            value = tl.load(features + at, mask=there, other=0.0).to(tl.float64)
            square += value * value
        norm = tl.maximum(tl.sqrt(tl.sum(square, 1)), SMALLEST)
        square = tl.zeros([ROWS, COLUMNS], tl.float64)
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            there = (row[:, None] < count) & (column[None, :] < width)
            at = row[:, None].to(tl.int64) * width + column[None, :]
            value = tl.load(features + at, mask=there, other=0.0).to(tl.float64) / norm[:, None]
            square += value * value
            tl.store(unit + at, value, mask=there)
        tl.store(own + row, tl.sum(square, 1), mask=row < count)


@triton.jit
def _mean(
    mean: tl.tensor,
    residual: tl.tensor,
    unit: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float64)
        for start in range(0, count, ROWS):
            row = start + tl.arange(0, ROWS)
            there = (row[:, None] < count) & (column[None, :] < width)
            at = row[:, None].to(tl.int64) * width + column[None, :]
            total += tl.load(unit + at, mask=there, other=0.0)
        value = tl.sum(total, 0) / tl.maximum(count, 1).to(tl.float64)
        tl.store(mean + column, value, mask=column < width)
        tl.store(residual + column, value, mask=column < width)


@triton.jit
def _score(
    scores: tl.tensor,
    own: tl.tensor,
    unit: tl.tensor,
    residual: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """How far each candidate would leave the mean; infinite for those picked before."""
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, COLUMNS], tl.float64)
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            there = (row[:, None] < count) & (column[None, :] < width)
            at = row[:, None].to(tl.int64) * width + column[None, :]
            aim = tl.load(residual + column, mask=column < width, other=0.0)
            total += tl.load(unit + at, mask=there, other=0.0) * aim[None, :]
        square = tl.load(own + row, mask=row < count, other=0.0)
        tl.store(scores + row, square - 2.0 * tl.sum(total, 1), mask=row < count)


@triton.jit
def _first_least(
    scores: tl.tensor, count: tl.tensor, TIE: tl.constexpr, SCORES: tl.constexpr
) -> tl.tensor:
    """The first of the candidates that are equally near but for rounding."""
    lowest = tl.full([SCORES], float("inf"), tl.float64)
    for start in range(0, count, SCORES):
        row = start + tl.arange(0, SCORES)
        lowest = tl.minimum(lowest, tl.load(scores + row, mask=row < count, other=float("inf")))
    bound = tl.min(lowest, 0) + TIE
    found = tl.zeros([SCORES], tl.int32) + count
    for start in range(0, count, SCORES):
        row = start + tl.arange(0, SCORES)
        score = tl.load(scores + row, mask=row < count, other=float("inf"))
        found = tl.minimum(found, tl.where((score <= bound) & (row < count), row, count))
    # Not even features that are not numbers lead beyond the last.
    return tl.minimum(tl.min(found, 0), count - 1)


@triton.jit(
    do_not_specialize=["total", "width", "limit"], do_not_specialize_on_alignment=["starts"]
)
def _herding_kernel(
    order: tl.tensor,  # int64 [K, limit], filled with -1
    features: tl.tensor,  # [total, width]
    starts: tl.tensor,  # int64 [K + 1]
    unit: tl.tensor,  # float64 [total, width]
    own: tl.tensor,  # float64 [total]
    scores: tl.tensor,  # float64 [total]
    means: tl.tensor,  # float64 [2, K, width]
    total: tl.tensor,
    width: tl.tensor,
    limit: tl.tensor,
    SMALLEST: tl.constexpr,
    TIE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCORES: tl.constexpr,
) -> None:
    number = tl.program_id(0).to(tl.int64)
    whole = tl.zeros([], tl.int64) + total
    begin = tl.minimum(tl.maximum(tl.load(starts + number), 0), whole)
    end = tl.minimum(tl.maximum(tl.load(starts + number + 1), begin), whole)
    count = (end - begin).to(tl.int32)
    features += begin * width
    unit += begin * width
    own += begin
    scores += begin
    mean = means + number * width
    residual = mean + tl.num_programs(0).to(tl.int64) * width
    order += number * limit
    _normalise(unit, own, features, count, width, SMALLEST, ROWS, COLUMNS)
    tl.debug_barrier()
    _mean(mean, residual, unit, count, width, ROWS, COLUMNS)
    for k in range(0, tl.minimum(limit, count)):
        tl.debug_barrier()
        _score(scores, own, unit, residual, count, width, ROWS, COLUMNS)
        tl.debug_barrier()
        pick = _first_least(scores, count, TIE, SCORES)
        tl.store(order + k, pick.to(tl.int64))
        tl.store(own + pick, float("inf"))
        picked = unit + pick.to(tl.int64) * width
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            there = column < width
            step = tl.load(mean + column, mask=there) - tl.load(picked + column, mask=there)
            # More threads than columns would each add the step.
            value = tl.load(residual + column, mask=there) + step
            tl.debug_barrier()
            tl.store(residual + column, value, mask=there)


def herding(features: Tensor, starts: Tensor, limit: int) -> Tensor:
    """Launch ``fastcil::herding``: the order in which herding picks the images of each class.

    Args:
        features: Of all images, those of a class one after the other.  # [N, D]
        starts: The first row of each class, and N; clamped to N, not checked.  # int64 [K + 1]
        limit: Number of picks of each class.

    Returns:
        Positions within the class, -1 where it has no more images.  # int64 [K, limit]
    """
    classes, (total, width) = len(starts) - 1, features.shape
    order = starts.new_full((classes, limit), -1)
    if not order.numel() or not total:
        return order
    launch(
        _herding_kernel,
        classes,
        order,
        features.contiguous(),
        starts.contiguous(),
        features.new_empty((total, width), dtype=torch.float64),
        features.new_empty(total, dtype=torch.float64),
        features.new_empty(total, dtype=torch.float64),
        features.new_empty((2, classes, width), dtype=torch.float64),
        total,
        width,
        limit,
        SMALLEST=_SMALLEST,
        TIE=TIE,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        SCORES=_SCORES,
        num_warps=_WARPS,
        maxnreg=255,  # left to itself the assembler aims at fewer and spills
    )
    return order
