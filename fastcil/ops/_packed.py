"""Where the pixels of a packed image lie: the layout that reading, unpacking and packing share.

An image's ``geometry`` is the row (H, W, y0, x0, y1, x1, gh, gw): its size, the box kept at full
resolution, and the size of the nearest-neighbour background grid, (0, 0) for a raw image. A packed
image is the box, row after row, then the grid's cells without those wholly under the box; all of
it uint8 RGB, interleaved. Cell (r, c) holds source pixel (r*H // gh, c*W // gw), and a pixel
(y, x) outside the box shows cell (y*gh // H, x*gw // W); Pillow's nearest neighbours, where they
are asked for, are those of `fastcil.ops._nearest`.

``csrc/packed.h`` says the same in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.ops._nearest import Nearest, shown

LARGEST_SIDE = 32767  # the largest int16


def layout(
    offsets: Tensor,
    geometry: Tensor,
    views: Tensor | None = None,
    nearest: Nearest = "opencv",
) -> Tensor:
    """All that the address of a pixel depends on, one row of integers per image.

    Args:
        offsets: first byte of each image, int64 [N].
        geometry: int16 [N, 8].
        views: int16 [N, 6] rows (y0, x0, y1, x1, gh, gw), each a compression to simulate on a raw
            image; none where gh is 0.
        nearest: whose nearest neighbours tell which cells lie wholly under the box.

    Returns:
        int64 [N, 14]: offset, H, W, y0, x0, y1, x1, gh, gw, the hole's first row and column and
        its numbers of rows and columns (cells left out), and 1 where a view is simulated.
    """
    fields = geometry.long()
    size, box, grid = fields[:, :2], fields[:, 2:6], fields[:, 6:]
    simulated = torch.zeros_like(offsets, dtype=torch.bool)[:, None]  # [N, 1]
    if views is not None:
        seen = views.long()
        simulated = seen[:, 4:5] > 0
        box = torch.where(simulated, seen[:, :4], box)
        grid = torch.where(simulated, seen[:, 4:], grid)
    box = box * (box[:, 2:] > box[:, :2]).all(1, keepdim=True)
    hole, stop = _under(box, size.clamp(min=1), grid, nearest)
    extent = stop - hole
    extent = extent * ((extent > 0).all(1, keepdim=True) & ~simulated)
    return torch.cat([offsets.long()[:, None], size, box, grid, hole, extent, simulated.long()], 1)


def _under(box: Tensor, size: Tensor, grid: Tensor, nearest: Nearest) -> tuple[Tensor, Tensor]:
    """First of the cells wholly under a box, and the first behind them: int64 [N, 2] each."""
    begin, end = box[:, :2], box[:, 2:]
    edges = torch.stack([begin - 1, end], 2).flatten(0, 1)  # [N * 2, 2]: both axes are alike
    inside = edges.clamp(min=0).minimum(size.view(-1, 1) - 1)
    cells = shown(inside, grid.flatten(), size.flatten(), nearest).view(-1, 2, 2)
    first = torch.where(begin > 0, cells[..., 0] + 1, 0)
    return first, torch.where(end < size, cells[..., 1], grid)


def stored_pixels(table: Tensor) -> Tensor:
    """Pixels that each image of a ``layout`` without views keeps: int64 [N]."""
    y0, x0, y1, x1, rows, columns = table[:, 3:9].unbind(1)
    return (y1 - y0) * (x1 - x0) + rows * columns - table[:, 11] * table[:, 12]


def addresses(
    table: Tensor, y: Tensor, x: Tensor, cells: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """First byte of the pixel that an image shows at (y, x).

    Args:
        table: rows of ``layout``, int64 [..., 14].
        y: row, int64, to be broadcast with ``x`` and ``table``'s leading dimensions.
        x: column, int64.
        cells: the grid's row that row y shows, and its column that column x shows, if these are
            not OpenCV's.

    Returns:
        int64, of the broadcast shape.
    """
    offset, height, width, y0, x0, y1, x1, rows, columns = table[..., :9].unbind(-1)
    hole_row, hole_column, hole_rows, hole_columns, simulated = table[..., 9:].unbind(-1)
    inside = ((y >= y0) & (y < y1)) & ((x >= x0) & (x < x1))
    # Terms of y and terms of x stay apart for as long as they can: each is small by itself.
    box_y = torch.where(simulated > 0, y * width, (y - y0) * (x1 - x0) - x0)
    r, c = cells or (y * rows // height, x * columns // width)
    below = r - hole_row
    grid_y = torch.where(
        simulated > 0,
        r * height // rows.clamp(min=1) * width,
        (y1 - y0) * (x1 - x0)
        + r * columns
        - torch.minimum(below.clamp(min=0), hole_rows) * hole_columns,
    )
    grid_x = torch.where(simulated > 0, c * width // columns.clamp(min=1), c)
    beside = (below >= 0) & (below < hole_rows)
    beyond = (c >= hole_column + hole_columns) * hole_columns
    in_box = (offset + 3 * box_y) + 3 * x
    in_grid = (offset + 3 * grid_y) + 3 * grid_x - beside * (3 * beyond)
    return torch.where(inside, in_box, in_grid)


def fetch(pixels: Tensor, begins: Tensor) -> Tensor:
    """The three bytes from each of these addresses on: uint8 [..., 3]."""
    if not begins.numel():
        return pixels.new_empty((*begins.shape, 3))
    return pixels.unfold(0, 3, 1).index_select(0, begins.flatten()).view(*begins.shape, 3)


def check_tensor(
    name: str, value: object, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    """Refuse an argument that is not a tensor of this dtype and shape (None: any length)."""
    wanted = "[" + ", ".join("n" if side is None else str(side) for side in shape) + "]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}; give a {dtype} tensor {wanted}")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; give {dtype} {wanted}")
    fits = value.dim() == len(shape) and all(
        side is None or side == length for side, length in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise FastcilError(f"{name} has shape {list(value.shape)}; give {dtype} {wanted}")


def check_images(pixels: Tensor, offsets: Tensor, geometry: Tensor) -> None:
    """Refuse, by dtype and shape alone, what cannot be the parts of an image store."""
    check_tensor("pixels", pixels, torch.uint8, (None,))
    check_tensor("offsets", offsets, torch.int64, (None,))
    check_tensor("geometry", geometry, torch.int16, (offsets.shape[0], 8))


def check_rows(
    room: Tensor | int,
    offsets: Tensor,
    geometry: Tensor,
    views: Tensor | None = None,
    nearest: Nearest = "opencv",
) -> None:
    """Refuse rows that describe no image inside ``room`` bytes; waits for the device."""
    fields = geometry.long()
    size, grid = fields[:, :2], fields[:, 6:]
    raw = (grid == 0).all(1)
    whole = (fields[:, 2:4] == 0).all(1) & (fields[:, 4:6] == size).all(1)
    sound = (size > 0).all(1) & _inside(fields[:, 2:6], size)
    sound &= torch.where(raw, whole, ((grid > 0) & (grid <= size)).all(1))
    _refuse(sound, "geometry", "(H, W, y0, x0, y1, x1, gh, gw) of an image", geometry)
    kept = stored_pixels(layout(offsets, geometry, nearest=nearest))
    last = room - 3 * kept  # a sum could wrap around
    _refuse((offsets >= 0) & (offsets <= last), "offsets", "an offset inside the pixels", offsets)
    if views is not None:
        seen, grid = views.long(), views[:, 4:].long()
        sound = raw & _inside(seen[:, :4], size) & ((grid > 0) & (grid <= size)).all(1)
        _refuse(sound | (grid[:, 0] == 0), "views", "a view that fits its raw image", views)


def _inside(box: Tensor, size: Tensor) -> Tensor:
    """Whether boxes, empty ones too, keep to their images: bool [N]."""
    return ((box >= 0) & (box <= size.repeat(1, 2))).all(1)


def _refuse(sound: Tensor, name: str, wanted: str, rows: Tensor) -> None:
    """Raise for the first row that is not sound."""
    if not bool(sound.all()):
        first = int((~sound).long().argmax())
        raise FastcilError(f"{name}[{first}] is {rows[first].tolist()}, not {wanted}")
