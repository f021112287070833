"""The Gram matrix of patches, for convolutions whose patches do not overlap in lags."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastcil import ops
from fastcil.curvature.lags import Pair, Window

# Bytes of patches of grouped convolutions that are held at a time.
_CHUNK = 1 << 24


@dataclass
class PatchSums:
    """Sum over samples and output positions of a aᵀ, a being a patch as (channel, row, column).

    Args:
        window: Kernel, padding and dilation.
        stride: Step from output to output.
        gram: Of every group.  # [groups, n, n], of one group the lower triangle
    """

    window: Window
    stride: Pair
    gram: Tensor

    @classmethod
    def zeros(
        cls,
        window: Window,
        stride: Pair,
        channels: int,
        groups: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PatchSums:
        """Sums over nothing."""
        side = channels // groups * window.kernel[0] * window.kernel[1]
        return cls(window, stride, torch.zeros(groups, side, side, dtype=dtype, device=device))

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {"gram": self.gram}

    def scale_(self, factor: float) -> None:
        """Multiplies all sums."""
        self.gram.mul_(factor)

    def add_(self, other: PatchSums, factor: float = 1.0) -> None:
        """Adds another's sums, times ``factor``."""
        self.gram.add_(other.gram, alpha=factor)

    def add_images_(self, x: Tensor, weights: Tensor | None = None, decay: float = 1.0) -> None:
        """Adds images [N, C, H, W] with weights [N]; what was there is multiplied by ``decay``."""
        window = self.window
        if len(self.gram) == 1:
            ops.patch_gram_(
                self.gram[0], x, window.kernel, self.stride, window.padding, window.dilation,
                weights, decay,
            )  # fmt: skip
            return
        self.gram.mul_(decay)
        if weights is not None:
            x = x * weights.to(x.dtype).sqrt()[:, None, None, None]
        one = x[:1].numel() * x.element_size() * window.kernel[0] * window.kernel[1]
        for images in x.split(max(1, _CHUNK // max(one, 1))):
            patches = functional.unfold(
                images, window.kernel, window.dilation, window.padding, self.stride
            )
            rows = patches.unflatten(1, (len(self.gram), -1))  # [N, groups, n, L]
            rows = rows.permute(1, 2, 0, 3).flatten(2)
            self.gram.baddbmm_(rows, rows.mT)

    def dense(self) -> Tensor:
        """The sums as full matrices, [groups, n, n]."""
        return self.gram.tril() + self.gram.tril(-1).mT
