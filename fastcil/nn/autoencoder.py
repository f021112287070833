"""The small autoencoder that completes images of which some pixels are missing."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn.shares import in_shares

_WIDTHS = (3, 8, 16, 32)
_STEP = 2 ** (len(_WIDTHS) - 1)


class CompletionAutoencoder(nn.Module):
    r"""The autoencoder of SAMC, :math:`A_\xi(x') = p_{\xi_d}(p_{\xi_e}(x'))`.

    (Bai et al. 2023, Eq. 4.5, App. B.) Three convolutions of 4 x 4 with stride 2 to 8, 16 and 32
    channels, each with batch norm and a LeakyReLU of slope 0.2; three transposed ones of the same
    kind back to 16, 8 and 3, with ReLUs between and a sigmoid at the end. The paper gives the
    numbers of filters; kernel, slope and sigmoid are the released code's. 21 thousand parameters,
    86 KB.

    Images of any size go through: on the right and below they are continued by their last column
    and row to a multiple of 8, which is cut off again.

    Attributes:
        encoder: Images [B, 3, H, W] -> [B, 32, H / 8, W / 8].
        decoder: The way back.

    Example:
        >>> import torch
        >>> model = CompletionAutoencoder()
        >>> model(torch.rand(2, 3, 30, 41)).shape, sum(p.numel() for p in model.parameters())
        (torch.Size([2, 3, 30, 41]), 21443)
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(), nn.Sequential()
        for inputs, outputs in pairwise(_WIDTHS):
            self.encoder.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))
            self.encoder.append(nn.BatchNorm2d(outputs))
            self.encoder.append(nn.LeakyReLU(0.2))
        for inputs, outputs in pairwise(reversed(_WIDTHS)):
            self.decoder.append(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1))
            self.decoder.append(nn.Sigmoid() if outputs == _WIDTHS[0] else nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """Completes images.

        Args:
            images: Values from 0 to 1, what is missing filled in by a rule or by zeros.
                # [B, 3, H, W]

        Returns:
            Values from 0 to 1.  # [B, 3, H, W]

        Raises:
            FastcilError: If it is not [B, 3, H, W].
        """
        if images.ndim != 4 or images.shape[1] != _WIDTHS[0]:
            raise FastcilError(f"images has shape {tuple(images.shape)}; it must be [B, 3, H, W].")
        completed: Tensor = in_shares(self, self._complete, images)
        return completed

    def _complete(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        margins = (0, -width % _STEP, 0, -height % _STEP)
        if any(margins):
            images = functional.pad(images, margins, mode="replicate")
        completed: Tensor = self.decoder(self.encoder(images))
        return completed[..., :height, :width]
