"""The same correlations kept as products at every frequency, where they are cheap to add up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcil import ops
from fastcil.curvature.lags import Lags, Pair, Window
from fastcil.ops.spectral_gram import (
    TILE,
    frequencies,
    from_tiles,
    panels,
    spectral_gram_shapes,
    transform_length,
)


@dataclass
class Spectra:
    """Sums of products of channels at all frequencies, of images of one size.

    Args:
        window: How the convolution looks at them.
        size: Lengths of the transform, such that no lag reaches around.
        channels: C of the images.
        sums: What `fastcil.ops.spectral_gram_` adds to.
    """

    window: Window
    size: Pair
    channels: int
    sums: tuple[Tensor, ...]

    @classmethod
    def zeros(
        cls, window: Window, channels: int, size: Pair, dtype: torch.dtype, device: torch.device
    ) -> Spectra:
        """Sums over nothing.

        Args:
            window: How the convolution looks at the images.
            channels: C of the images.
            size: Lengths of the transform, from `size_for`.
            dtype: float32 or float64.
            device: Where the images are.
        """
        shapes = spectral_gram_shapes(channels, size, window.border)
        sums = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
        return cls(window, size, channels, sums)

    @staticmethod
    def size_for(window: Window, image: Pair) -> Pair:
        """Lengths of the transform for images of some height and width."""
        (ry, rx), (height, width) = window.reach, image
        return transform_length(height + ry), transform_length(width + rx)

    def add_images_(self, x: Tensor, weights: Tensor | None, decay: float) -> None:
        """Adds images [N, C, H, W] with weights [N]; what was there is multiplied by ``decay``."""
        whole, rows, columns, corners = self.sums
        ops.spectral_gram_(
            whole, rows, columns, corners, x, self.size, self.window.border, weights, decay
        )

    def add_to(self, lags: Lags) -> None:
        """Adds these sums, turned from frequencies into lags."""
        whole, rows, columns, corners = self.sums
        (ky, kx), (dy, dx) = self.window.kernel, self.window.dilation
        ty, tx = self.window.border
        lags.whole += self._at(whole, self.size, self.window.shifts, 1)
        along_x, along_y = [(0, k * dx) for k in range(kx)], [(0, k * dy) for k in range(ky)]
        for side in range(2):
            if ty:
                lags.rows[side] += self._at(rows[side], (1, self.size[1]), along_x, ty)
            if tx:
                lags.columns[side] += self._at(columns[side], (1, self.size[0]), along_y, tx)
        if ty * tx:
            for corner in range(4):
                lags.corners[corner] += self._at(corners[corner][None], (1, 1), [(0, 0)], ty * tx)[
                    0
                ]

    def _at(self, state: Tensor, size: Pair, shifts: list[Pair], stacked: int) -> Tensor:
        """Correlations at lags from products at frequencies, [F, p, p, 16, 16] -> [L, M, M].

        R(δ) = 1 / |size| sum over f of cos(angle) Re H - sin(angle) Im H, angle = 2 pi <f, δ/size>;
        the lower triangle of what is stored holds Re H, the upper Im H.
        """
        kept = frequencies(*size)[:, :2].double()
        turns = torch.tensor(shifts, dtype=torch.float64) / torch.tensor(size)
        angle = 2 * math.pi * turns @ kept.T  # [L, F]
        flat = state.flatten(1)
        scale = 1 / (size[0] * size[1])

        def summed(coefficients: Tensor) -> Tensor:
            by = (coefficients * scale).to(state)
            return from_tiles((by @ flat).view(len(shifts), *state.shape[1:]))

        even, odd = summed(angle.cos()).tril(), summed(angle.sin()).triu(1)
        matrices = even + even.tril(-1).mT - odd + odd.mT
        padded = panels(self.channels) * TILE
        split = matrices.unflatten(-1, (stacked, padded)).unflatten(-3, (stacked, padded))
        own: Tensor = split[..., : self.channels, :, : self.channels]
        side = stacked * self.channels
        return own.reshape(len(shifts), side, side)
