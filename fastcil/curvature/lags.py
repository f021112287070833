"""Correlations of images with themselves, of which a convolution's input factor is made.

A patch is an image seen through the taps of a kernel. The product of what two taps see, summed
over all output positions of a convolution of stride 1, is the image's correlation with itself at
the lag between the taps, less what one of them misses because it never reaches some rows and
columns at the border: 29 matrices of C x C for a kernel of 3, where the factor has 81 blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]

# Bytes of a chunk of the matrix products, such that the lags find it in the cache: of a core, or of
# a GPU, where more of them would be too many launches.
_CHUNK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True)
class Window:
    """How a convolution of stride 1 looks at images.

    Args:
        kernel: Height and width.
        padding: Zeros at each side.
        dilation: Step from tap to tap.
    """

    kernel: Pair
    padding: Pair
    dilation: Pair

    @property
    def reach(self) -> Pair:
        """The largest shift between two taps."""
        (ky, kx), (dy, dx) = self.kernel, self.dilation
        return (ky - 1) * dy, (kx - 1) * dx

    @property
    def border(self) -> Pair:
        """Rows and columns at each side that some tap never sees."""
        (ry, rx), (py, px) = self.reach, self.padding
        return max(0, ry - py), max(0, rx - px)

    @property
    def shifts(self) -> list[Pair]:
        """Lags (y, x), one of each two that are opposite."""
        (ky, kx), (dy, dx) = self.kernel, self.dilation
        return [(y * dy, x * dx) for y in range(ky) for x in range(-(kx - 1) if y else 0, kx)]


@dataclass
class Lags:
    """Sums of products of channels at all lags of a window.

    Args:
        window: Whose lags.
        whole: R(δ) = sum over pixels of x(i) x(i + δ)ᵀ, in the order of ``window.shifts``.
            # [L, C, C]
        rows: The same of the bands of rows at the top and at the bottom, rows stacked as further
            channels, at the lags 0, d, ... along x.  # [2, kx, ty C, ty C]
        columns: Of the bands of columns at the left and right, along y.  # [2, ky, tx C, tx C]
        corners: Where bands cross, at lag 0.  # [4, ty tx C, ty tx C]
    """

    window: Window
    whole: Tensor
    rows: Tensor
    columns: Tensor
    corners: Tensor

    @classmethod
    def zeros(cls, window: Window, channels: int, dtype: torch.dtype, device: torch.device) -> Lags:
        """Sums over nothing."""
        (ky, kx), (ty, tx) = window.kernel, window.border

        def square(*leading: int) -> Tensor:
            return torch.zeros(
                *leading[:-1], leading[-1] * channels, leading[-1] * channels,
                dtype=dtype, device=device,
            )  # fmt: skip

        return cls(
            window,
            square(len(window.shifts), 1),
            square(2, kx, ty),
            square(2, ky, tx),
            square(4, ty * tx),
        )

    @property
    def channels(self) -> int:
        """Channels C of the images."""
        return self.whole.shape[-1]

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {
            "whole": self.whole,
            "rows": self.rows,
            "columns": self.columns,
            "corners": self.corners,
        }

    def scale_(self, factor: float) -> None:
        """Multiplies all sums."""
        for tensor in self.tensors().values():
            tensor.mul_(factor)

    def add_(self, other: Lags, factor: float = 1.0) -> None:
        """Adds another's sums, times ``factor``."""
        mine, theirs = self.tensors(), other.tensors()
        for name, tensor in mine.items():
            tensor.add_(theirs[name], alpha=factor)

    def add_images_(self, x: Tensor, weights: Tensor | None = None, decay: float = 1.0) -> None:
        """Adds the correlations of images by matrix products, without copies of patches.

        The images are laid out once as [row, column, image, channel] with zeros behind each row,
        so that a lag is an offset and its matrix the product of two views.

        Args:
            x: Of the sums' dtype, or bfloat16 for products of that (`add_product_`).
                # [N, C, H, W]
            weights: w of each image.  # [N]
            decay: Factor of what was there.
        """
        if decay != 1.0:
            self.scale_(decay)
        if not len(x):
            return
        if weights is not None:
            x = (x * weights.to(self.whole.dtype).sqrt()[:, None, None, None]).to(x.dtype)
        n, channels, height, width = x.shape
        ry, rx = self.window.reach
        ty, tx = self.window.border
        room = x.new_zeros(height + ry, width + rx, n, channels)
        room[:height, :width] = x.permute(2, 3, 0, 1)
        flat = room.view(-1, channels)
        count = height * (width + rx) * n
        chunk = max(1, _CHUNK_BYTES.get(x.device.type, 1 << 24) // (channels * x.element_size()))
        offsets = [(dy * (width + rx) + dx) * n for dy, dx in self.window.shifts]
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            # What a lag reaches behind the last row is zero.
            for matrix, offset in zip(self.whole, offsets, strict=True):
                end = min(stop, len(flat) - offset)
                add_product_(matrix, flat[start:end].T, flat[start + offset : end + offset])
        for side, band in enumerate((x[:, :, :ty], x[:, :, height - ty :])):
            _add_line(self.rows[side], band, self.window.dilation[1])
        for side, band in enumerate((x[..., :tx], x[..., width - tx :])):
            _add_line(self.columns[side], band.transpose(2, 3), self.window.dilation[0])
        for corner, matrix in enumerate(self.corners):
            top, left = corner // 2 * (height - ty), corner % 2 * (width - tx)
            block = x[:, :, top : top + ty, left : left + tx]
            values = block.permute(0, 2, 3, 1).reshape(n, -1)
            add_product_(matrix, values.T, values)

    def dense(self) -> Tensor:
        """Sum over samples and output positions of a aᵀ, a being the patch as (c, row, column).

        Returns:
            [C ky kx, C ky kx]
        """
        (ky, kx), (dy, dx) = self.window.kernel, self.window.dilation
        place = {shift: k for k, shift in enumerate(self.window.shifts)}
        taps = [(a, b) for a in range(ky) for b in range(kx)]
        c = self.channels
        blocks = self.whole.new_empty(len(taps), len(taps), c, c)
        for m, (a, b) in enumerate(taps):
            for n, (a2, b2) in enumerate(taps[m:], start=m):
                block = self.whole[place[(a2 - a) * dy, (b2 - b) * dx]].clone()
                for part, sign in self._missed(a, b, a2, b2):
                    block.add_(part, alpha=sign)
                blocks[m, n] = block
                if n > m:
                    blocks[n, m] = block.T
        return blocks.permute(2, 0, 3, 1).reshape(c * len(taps), c * len(taps))

    def _missed(self, a: int, b: int, a2: int, b2: int) -> Iterator[tuple[Tensor, int]]:
        """What the pair of taps (a, b), (a2, b2) does not see of the correlation at their lag.

        Pixels of rows or columns that the first tap never reaches, whose partner is in the image;
        those of both are subtracted twice, hence the corners.
        """
        c, (_, tx) = self.channels, self.window.border
        step_x, step_y = b2 - b, a2 - a
        unseen_rows = list(_unseen(a, step_y, self.window, 0))
        unseen_columns = list(_unseen(b, step_x, self.window, 1))
        for side, r, r2 in unseen_rows:
            yield _block(self.rows[side][abs(step_x)], step_x < 0, r, r2, c), -1
        for side, q, q2 in unseen_columns:
            yield _block(self.columns[side][abs(step_y)], step_y < 0, q, q2, c), -1
        for bottom, r, r2 in unseen_rows:
            for right, q, q2 in unseen_columns:
                corner = self.corners[2 * bottom + right]
                yield _block(corner, False, r * tx + q, r2 * tx + q2, c), 1


def _unseen(tap: int, step: int, window: Window, axis: int) -> Iterator[tuple[int, int, int]]:
    """Rows that a tap never sees and their partner, steps apart: (side, row in band, partner's).

    The tap's first output sees row ``tap * dilation - padding``, so that the rows above are unseen;
    of the band at the bottom those from ``tap * dilation`` on. Their partners lie in the same band.
    """
    dilation, padding = window.dilation[axis], window.padding[axis]
    thick = window.border[axis]
    for side, rows in enumerate((range(tap * dilation - padding), range(tap * dilation, thick))):
        for row in rows:
            if 0 <= row + step * dilation < thick:
                yield side, row, row + step * dilation


def _block(matrix: Tensor, opposite: bool, row: int, column: int, channels: int) -> Tensor:
    """The products of one band row's channels with another's; at an opposite lag, transposed."""
    if opposite:
        row, column = column, row
    block = matrix[
        row * channels : (row + 1) * channels, column * channels : (column + 1) * channels
    ]
    return block.T if opposite else block


def _add_line(matrices: Tensor, band: Tensor, step: int) -> None:
    """Adds the correlations of a band [N, C, t, L] along its last dimension: lags 0, step, ..."""
    n, _, thick, length = band.shape
    if not thick:
        return
    flat = band.permute(3, 0, 2, 1).reshape(length * n, -1)  # [L N, t C]
    for k, matrix in enumerate(matrices):
        offset = k * step * n
        if offset < len(flat):
            add_product_(matrix, flat[: len(flat) - offset].T, flat[offset:])


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a matrix product.

    Args:
        total: What it is added to.  # [n, m]
        left: Of the total's dtype, or bfloat16: such products are accumulated in float32. A CPU's
            are rounded to bfloat16 once, before they are added.  # [n, k]
        right: As ``left``.  # [k, m]
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        total.add_(left @ right)
