"""CompressAI's calls for our models, for code that was written for CompressAI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcil.compression.coder import SymbolDecoder, SymbolEncoder
from fastcil.compression.model import CodecModel
from fastcil.errors import FastcilError

_SCALE = 255.0**2 / 4


def from_compressai_lambda(lmbda: float) -> float:
    r"""Our λ of CompressAI's: :math:`\lambda = \lambda' \, 255^2 / 4`.

    CompressAI weighs :math:`255^2 \, \mathrm{MSE}` of images in 0..1, we the MSE of images in
    -1..1, which is four times that of 0..1. Rate counts the same.

    Example:
        >>> [round(from_compressai_lambda(lmbda)) for lmbda in (0.0018, 0.0483)]
        [29, 785]
    """
    return lmbda * _SCALE


def to_compressai_lambda(lmbda: float) -> float:
    """CompressAI's λ of ours; the inverse of `from_compressai_lambda`.

    Example:
        >>> round(to_compressai_lambda(from_compressai_lambda(0.0018)), 6)
        0.0018
    """
    return lmbda / _SCALE


class CompressaiStyle(nn.Module):
    """A codec with the calls of a ``CompressionModel`` of CompressAI's, at one λ.

    The strings are the range coder's bytes, one run for each latent of each image, as CompressAI's
    are. They are no files: an `ImageCodec`'s file is one run through all latents, some bytes less,
    and says what it was coded with. Strings say nothing: λ and the image's size must be known, and
    strings that are damaged, or of another model or λ, may decode to some other image without a
    word. Code that keeps streams should keep files.

    Args:
        model: The model.
        lmbda: Trade-off of all calls, on our scale (`from_compressai_lambda`); may be set anew.

    Example:
        >>> from fastcil.compression.zoo import build_codec
        >>> net = CompressaiStyle(build_codec("hierarchical-tiny"), lmbda=64.0)
        >>> x = torch.rand(2, 3, 64, 64)
        >>> coded = net.compress(x)
        >>> len(coded["strings"]), len(coded["strings"][0]), coded["shape"]
        (4, 2, torch.Size([64, 64]))
        >>> net.decompress(**coded)["x_hat"].shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(self, model: CodecModel, lmbda: float) -> None:
        super().__init__()
        self.model = model
        self.lmbda = lmbda

    def forward(self, x: Tensor) -> dict[str, Any]:
        """``x_hat`` and ``likelihoods`` by latent, as `CodecModel.forward`.

        Args:
            x: RGB in 0..1.  # [B, 3, H, W]
        """
        out: dict[str, Any] = self.model(x, self.lmbda)
        return {"x_hat": out["x_hat"], "likelihoods": out["likelihoods"]}

    @torch.no_grad()
    def compress(self, x: Tensor) -> dict[str, Any]:
        """Codes images for real.

        Args:
            x: RGB in 0..1, any sides.  # [B, 3, H, W]

        Returns:
            ``strings``, for each latent a list with the bytes of each image, and ``shape``, to be
            handed on to `decompress`: the images' own H and W, where CompressAI has those of the
            last latent and leaves padding to the caller.

        Raises:
            FastcilError: x is not such a tensor.
        """
        features = self.model.features(x, self.lmbda)
        height, width = x.shape[-2:]
        phases = self.model.begin(height, width, self.lmbda, len(x))
        strings = []
        for i in range(phases.count):
            symbols = phases.quantise(i, features)
            runs = []
            for b, row in enumerate(symbols.flatten(1).numpy()):
                encoder = SymbolEncoder()
                phases.write(i, b, row, encoder)
                runs.append(encoder.finish())
            phases.feed(i, symbols)
            strings.append(runs)
        return {"strings": strings, "shape": x.shape[-2:]}

    def decompress(
        self, strings: Sequence[Sequence[bytes]], shape: Sequence[int]
    ) -> dict[str, Tensor]:
        """Images of what `compress` gave.

        Args:
            strings: For each latent, the bytes of each image.
            shape: H and W of the images.

        Returns:
            ``x_hat`` in 0..1.  # [B, 3, H, W]

        Raises:
            BitstreamError: Strings that do not decode.
            FastcilError: Strings of another number of latents, or latents of different numbers of
                images.
        """
        count = len(strings[0]) if strings else 0
        if len(strings) != len(self.model.latent_names) or {len(s) for s in strings} != {count}:
            raise FastcilError(
                f"strings has {[len(runs) for runs in strings]} strings; it must have "
                f"{len(self.model.latent_names)} latents of as many strings as images each."
            )
        height, width = shape
        phases = self.model.begin(height, width, self.lmbda, count)
        for i, runs in enumerate(strings):
            rows = [phases.read(i, b, SymbolDecoder(run)) for b, run in enumerate(runs)]
            symbols = torch.from_numpy(np.stack(rows))
            phases.feed(i, symbols.view(count, *phases.shapes[i]))
        return {"x_hat": phases.image()}

    def update(self, force: bool = False) -> bool:
        """`CodecModel.update`: makes the tables that the model has learned anew.

        A model that has none yet makes them when it first codes, so that forgetting this call does
        no harm before.

        Args:
            force: Even where there are some, with which files may have been coded.

        Returns:
            Whether there are other tables than before.
        """
        return self.model.update(force)

    def aux_loss(self) -> Tensor:
        """Zero: symbols are rounded to integers, not to learned quantiles, so none is trained."""
        return torch.zeros((), requires_grad=True)
