"""Where the pixels of a packed image lie: `fastcil.ops._packed` for the kernels.

Numbers of pixels and cells fit int32, because no side exceeds 32767; only bytes need int64. What
depends on a row and what depends on a column stay apart, so that a tile of pixels takes little
more than a choice and a sum for each.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _hole(
    begin: tl.tensor, end: tl.tensor, side: tl.tensor, cells: tl.tensor, kept: tl.tensor
) -> tl.tuple:
    """First and number of the cells wholly under a box along one axis."""
    first = tl.where(begin > 0, tl.maximum(begin - 1, 0) * cells // side + 1, 0)
    return first, tl.where(kept, end * cells // side - first, 0)


@triton.jit
def open_image(geometry: tl.tensor, view: tl.tensor) -> tl.tuple:
    """An image from its row of geometry and that of its view, or None.

    Returns:
        Its sides; the box, the grid, the hole (first row and column, rows and columns), and
        whether a view is simulated, for `row_terms` and `column_terms`.
    """
    height = tl.maximum(tl.load(geometry).to(tl.int32), 1)
    width = tl.maximum(tl.load(geometry + 1).to(tl.int32), 1)
    simulated = height < 0
    shift = tl.zeros([], tl.int32)
    box = geometry + 2
    if view is not None:
        simulated = tl.load(view + 4) > 0
        box = tl.where(simulated, view, box)
    y0 = tl.load(box).to(tl.int32)
    x0 = tl.load(box + 1).to(tl.int32)
    y1 = tl.load(box + 2).to(tl.int32)
    x1 = tl.load(box + 3).to(tl.int32)
    rows = tl.load(box + 4).to(tl.int32)
    columns = tl.load(box + 5).to(tl.int32)
    empty = (y1 <= y0) | (x1 <= x0)
    y0 = tl.where(empty, shift, y0)
    x0 = tl.where(empty, shift, x0)
    y1 = tl.where(empty, shift, y1)
    x1 = tl.where(empty, shift, x1)
    hole_row, hole_rows = _hole(y0, y1, height, rows, (not empty) & (not simulated))
    hole_column, hole_columns = _hole(x0, x1, width, columns, (not empty) & (not simulated))
    there = (hole_rows > 0) & (hole_columns > 0)
    hole_rows = tl.where(there, hole_rows, 0)
    hole_columns = tl.where(there, hole_columns, 0)
    box_ = (y0, x0, y1, x1)
    grid = (rows, columns)
    hole = (hole_row, hole_column, hole_rows, hole_columns)
    return height, width, box_, grid, hole, simulated


@triton.jit
def row_terms(
    y: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    box: tl.tuple,
    grid: tl.tuple,
    hole: tl.tuple,
    simulated: tl.tensor,
) -> tl.tuple:
    """Of rows: whether they cross the box, where they begin in it and in the grid, in pixels.

    And whether their grid row has a hole.
    """
    across = box[3] - box[1]
    r = y * grid[0] // height
    below = r - hole[0]
    left_out = tl.minimum(tl.maximum(below, 0), hole[2]) * hole[3]
    shown = r * height // tl.maximum(grid[0], 1) * width
    packed = (box[2] - box[0]) * across + r * grid[1] - left_out
    in_box = tl.where(simulated, y * width, (y - box[0]) * across - box[1])
    in_grid = tl.where(simulated, shown, packed)
    return (y >= box[0]) & (y < box[2]), in_box, in_grid, (below >= 0) & (below < hole[2])


@triton.jit
def column_terms(
    x: tl.tensor,
    width: tl.tensor,
    box: tl.tuple,
    grid: tl.tuple,
    hole: tl.tuple,
    simulated: tl.tensor,
) -> tl.tuple:
    """Of columns: whether they cross the box, their place in a grid row, and what a hole takes."""
    c = x * grid[1] // width
    in_grid = tl.where(simulated, c * width // tl.maximum(grid[1], 1), c)
    beyond = tl.where(c >= hole[1] + hole[3], hole[3], 0)
    return (x >= box[1]) & (x < box[3]), in_grid, beyond
