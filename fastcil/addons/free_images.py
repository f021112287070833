"""Images whose pixels are parameters: read as the network sees them, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.data import Augmentation, ImageStore
from fastcil.ops import send


class FreeImages:
    """Images at their own resolution whose pixels are to be trained.

    The pixels of all images are one vector of normalised values, as `start` gives it, for a caller
    to make a parameter of; nothing of them is held here. They are read by the test transform: the
    image, or the middle that test images are cut to, resized to the network's side by the
    weights of `fastcil.ops.read`, with no rounding in between. What that cuts away is not trained.

    Args:
        images: Raw or packed; from here on they are raw.
        augmentation: Gives the network's side, the test transform, mean and standard deviation.

    Example:
        >>> store = ImageStore.from_batch(torch.full((2, 4, 4, 3), 51, dtype=torch.uint8))
        >>> free = FreeImages(store, Augmentation(2, crop="none", mean=(0.2,) * 3, std=(0.5,) * 3))
        >>> values = free.start() + 0.1  # 0.05 of the 255 levels: 12.75
        >>> free.read(values, torch.tensor([1])).shape
        torch.Size([1, 3, 2, 2])
        >>> free.store(values).image(0)[0, 0]
        tensor([64, 64, 64], dtype=torch.uint8)
    """

    def __init__(self, images: ImageStore, augmentation: Augmentation) -> None:
        self.images = images.to("cpu").reconstruct()
        self.augmentation = augmentation
        self._sizes = self.images.sizes  # [N, 2]
        self._first = self.images.offsets // 3  # first pixel of each image
        self._crops = augmentation.centre(self._sizes).double()  # [N, 4]

    def __len__(self) -> int:
        return len(self.images)

    def start(self) -> Tensor:
        """The images' own pixels, normalised, float32 [P] on the CPU."""
        levels = self.images.pixels.view(-1, 3).float()
        return ((levels / 255 - self._mean(levels)) / self._std(levels)).flatten()

    def read(self, values: Tensor, entries: Tensor) -> Tensor:
        """Some images as the network takes them, differentiable in ``values``.

        Args:
            values: Pixels of all images, float [P].
            entries: Which images, int64 [B] on the CPU.

        Returns:
            [B, 3, size, size], channels_last, of the dtype of ``values``.
        """
        sizes, crops = self._sizes[entries], self._crops[entries]
        rows, columns, places = send(
            [
                self._weights(crops[:, 0], crops[:, 2], sizes[:, 0]).to(values.dtype),
                self._weights(crops[:, 1], crops[:, 3], sizes[:, 1]).to(values.dtype),
                torch.cat([sizes, self._first[entries, None]], 1),
            ],
            values.device,
        )  # [B, size, H], [B, size, W], [B, 3]
        heights, widths, first = places.T[:, :, None, None]  # [B, 1, 1] each
        y = torch.arange(rows.shape[2], device=values.device)[:, None].minimum(heights - 1)
        x = torch.arange(columns.shape[2], device=values.device).minimum(widths - 1)
        shown = values.view(-1, 3)[first + y * widths + x]  # [B, H, W, 3]
        images = torch.einsum("byh,bhwc,bxw->bcyx", rows, shown, columns)
        return images.contiguous(memory_format=torch.channels_last)

    def _weights(self, begin: Tensor, end: Tensor, side: Tensor) -> Tensor:
        """How much each pixel counts in each output along one axis, float64 [B, size, longest]."""
        size = self.augmentation.size
        begin, end = begin[:, None, None], end[:, None, None]
        scale = (end - begin) / size
        width = scale.clamp(min=1.0) if self.augmentation.antialias else torch.ones_like(scale)
        centre = begin + (torch.arange(size)[:, None] + 0.5) * scale  # [B, size, 1]
        pixel = torch.arange(int(side.max()))
        weight = (1 - (pixel + 0.5 - centre).abs() / width).clamp(min=0)
        last = end.ceil().minimum(side[:, None, None])
        weight = torch.where((pixel >= begin.floor()) & (pixel < last), weight, 0.0)
        return weight / weight.sum(-1, keepdim=True)

    @torch.no_grad()
    def clamp(self, values: Tensor) -> None:
        """Puts values that no pixel can have to the nearest that one can, in place."""
        mean, std = self._mean(values), self._std(values)
        values.view(-1, 3).clamp_(*send((-mean / std, (1 - mean) / std), values.device))

    def store(self, values: Tensor) -> ImageStore:
        """The images that the values are, rounded to the nearest of 256 levels.

        Args:
            values: float [P].

        Returns:
            Raw images on the CPU, of the same sizes.
        """
        rows = values.detach().cpu().view(-1, 3)
        levels = 255 * (rows * self._std(rows) + self._mean(rows))
        pixels = (levels + 0.5).floor().clamp(0, 255).to(torch.uint8).flatten()
        return ImageStore(pixels, self.images.offsets, self.images.geometry)

    def _mean(self, like: Tensor) -> Tensor:
        return torch.tensor(self.augmentation.mean, dtype=like.dtype)

    def _std(self, like: Tensor) -> Tensor:
        return torch.tensor(self.augmentation.std, dtype=like.dtype)
