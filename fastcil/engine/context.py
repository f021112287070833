"""What the engine lends to methods and addons."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcil.contract import Look
from fastcil.data import Augmentation, Examples
from fastcil.engine.reading import read_together
from fastcil.nn.folding import folding
from fastcil.ops import send


class EngineContext:
    """Makes backbones and reads images outside training, on the run's device.

    Args:
        backbone: Builds a feature extractor.
        augmentation: The run's augmentation: its test transform is what `scan` reads with.
        device: Where networks live.
        batch_size: Images per step of a scan.
        bare: Builds a feature extractor of the same shape whatever its weights; None: ``backbone``.
        scanned: What a scan's function computes in by autocast; None: as it is. Its outputs are
            float32 all the same.
    """

    def __init__(
        self,
        backbone: Callable[[], nn.Module],
        augmentation: Augmentation,
        device: torch.device,
        batch_size: int = 256,
        bare: Callable[[], nn.Module] | None = None,
        scanned: torch.dtype | None = None,
    ) -> None:
        self._backbone = backbone
        self._bare = bare or backbone
        self.augmentation = augmentation
        self.device = device
        self.batch_size = batch_size
        self.scanned = scanned

    def make_backbone(self) -> nn.Module:
        """A new feature extractor, on the run's device, in channels_last memory."""
        return self._placed(self._backbone())

    def bare_backbone(self) -> nn.Module:
        """The same with weights that are about to be replaced; see `fastcil.contract.Context`."""
        return self._placed(self._bare())

    def _placed(self, backbone: nn.Module) -> nn.Module:
        # torch's type stubs leave out the memory_format of Module.to.
        placed: nn.Module = backbone.to(  # type: ignore[call-overload]
            self.device, memory_format=torch.channels_last
        )
        return placed

    def scan(
        self,
        function: Callable[[Tensor], Tensor],
        examples: Examples,
        look: Look = "centre",
        flip: bool = False,
    ) -> Tensor:
        """Applies ``function`` to all images, unaugmented; see `fastcil.contract.Context`."""
        return self._scan(lambda images, *_: (function(images),), examples, look, flip)[0]

    def scan_labelled(
        self,
        function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
        examples: Examples,
        look: Look = "whole",
    ) -> tuple[Tensor, ...]:
        """Applies ``function`` to images, labels and sizes; see `fastcil.contract.Context`."""
        return self._scan(function, examples, look, False)

    @torch.no_grad()
    def _scan(
        self,
        function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
        examples: Examples,
        look: Look,
        flip: bool,
    ) -> tuple[Tensor, ...]:
        sizes, held = examples.images.sizes.cpu(), examples.labels.cpu()
        crop = self.augmentation.whole if look == "whole" else self.augmentation.centre
        outputs: list[tuple[Tensor, ...]] = []
        # An empty set still runs once, on no image, so that the outputs have their shapes.
        with folding():
            for start in range(0, max(len(examples), 1), self.batch_size):
                index = torch.arange(start, min(start + self.batch_size, len(examples)))
                pixels = self._read(examples, index, crop(sizes[index]), flip)
                labels, shapes = send((held[index], sizes[index]), self.device)
                with self._autocast():
                    row = function(pixels, labels, shapes)
                outputs.append(tuple(map(self._widened, row)))
        return tuple(torch.cat(column) for column in zip(*outputs, strict=True))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.scanned, enabled=self.scanned is not None)

    def _widened(self, output: Tensor) -> Tensor:
        return output.float() if output.dtype == self.scanned else output

    def _read(self, examples: Examples, index: Tensor, crops: Tensor, flip: bool) -> Tensor:
        """Normalised images, uncut by chance."""
        flips = torch.full((len(index),), flip)
        which = torch.zeros_like(index)
        return read_together(
            [examples.images], which, index, self.augmentation, crops, flips, self.device
        )
