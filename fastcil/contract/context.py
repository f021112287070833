"""What the engine lends to methods and addons, so that they know no device, rank or file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor, nn

from fastcil.data import Augmentation, Examples

Look = Literal["centre", "whole"]
"""How images are read outside training: the test transform, or squeezed whole (for CAMs)."""


class Context(Protocol):
    """Services of the engine."""

    @property
    def augmentation(self) -> Augmentation:
        """How the run's images are cut, changed and normalised."""
        ...

    def make_backbone(self) -> nn.Module:
        """A new feature extractor, on the run's device, ready to be trained.

        Its weights are those that the run's extractors start from: random ones, or those of
        ``network.weights``.
        """
        ...

    def bare_backbone(self) -> nn.Module:
        """A feature extractor of the same shape whose weights are about to be replaced.

        On the run's device; it reads no ``network.weights``, which need not be there any more
        when saved state is restored.
        """
        ...

    def scan(
        self,
        function: Callable[[Tensor], Tensor],
        examples: Examples,
        look: Look = "centre",
        flip: bool = False,
    ) -> Tensor:
        """Applies ``function`` to all images, unaugmented, batch by batch, without gradients.

        Args:
            function: Normalised images [B, 3, h, w] -> [B, ...]. Modules it uses are put in
                evaluation mode by the caller (`fastcil.contract.evaluating`).
            examples: What to read, in order.
            look: ``centre`` for the test transform, ``whole`` for the squeezed whole image.
            flip: Whether to mirror every image.

        Returns:
            The outputs, concatenated, on the run's device.
        """
        ...

    def scan_labelled(
        self,
        function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
        examples: Examples,
        look: Look = "whole",
    ) -> tuple[Tensor, ...]:
        """As `scan`, for functions that also need labels [B] and image sizes [B, 2].

        The function may return several tensors; each comes back concatenated.
        """
        ...
