"""What completes images of which some pixels are missing: an autoencoder, and how it learns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.contract import Batch, Losses, Recipe, Retained, Stage, Stream, evaluating
from fastcil.data import ImageStore
from fastcil.nn import CompletionAutoencoder
from fastcil.nn.same_kernels import same_kernels
from fastcil.ops import send
from fastcil.ops.sizes import by_size


class Completion(nn.Module):
    r"""An autoencoder that repairs images which a rule has filled in, and its training.

    .. math:: \xi \leftarrow \xi - \beta \nabla_\xi \lVert x - A_\xi(R(x')) \rVert_2^2

    (Bai et al. 2023, Eq. 4.10), by the mean over a batch and its values.

    While the autoencoder trains, what it learns from is held, and exemplars are completed by the
    weights it had before, so that a run that stops meanwhile goes on with the same images.

    Args:
        paste: Whether only missing pixels are taken from the autoencoder.

    Attributes:
        autoencoder: A.
        settled: The weights before, float32 [P]; empty where the autoencoder's own are in force.
        originals: x, uint8 [n, H, W, 3]; empty between tasks.
        inputs: R(x'), likewise.
    """

    settled: Tensor
    originals: Tensor
    inputs: Tensor

    def __init__(self, paste: bool) -> None:
        super().__init__()
        self.paste = paste
        self.autoencoder = CompletionAutoencoder()
        self.register_buffer("settled", torch.empty(0))
        for name in ("originals", "inputs"):
            self.register_buffer(name, torch.empty(0, dtype=torch.uint8))

    def start(self) -> None:
        """Draws weights anew."""
        device = self.settled.device
        self.autoencoder = CompletionAutoencoder().to(device)

    def hold(self, originals: ImageStore, inputs: ImageStore) -> None:
        """Takes what to learn from, and remembers the weights.

        Args:
            originals: Raw images, all of one size.
            inputs: What the rule makes of the pixels that a mask keeps of them.
        """
        shape = (len(originals), *originals.sizes[0].tolist(), 3)
        device = self.settled.device
        self.originals = originals.pixels.view(shape).to(device)
        self.inputs = inputs.pixels.view(shape).to(device)
        self.settled = torch.cat([value.flatten() for value in self._values().values()])

    def settle(self) -> None:
        """Lets the weights that were learned complete from now on; drops what they learned from."""
        self.settled = self.settled[:0].clone()
        self.originals, self.inputs = self.originals[:0].clone(), self.inputs[:0].clone()

    def stage(self, stream: Stream, recipe: Recipe, begin: Callable[[], None]) -> Stage:
        """The autoencoder's training.

        Args:
            stream: Its ``subset`` are positions, in the order of what is held.
            recipe: How long and how fast.
            begin: Calls `hold`.
        """
        return Stage(
            name="completion",
            method=self.autoencoder,
            objective=self.objective,
            streams=(stream,),
            recipe=recipe,
            parameters=self.autoencoder.parameters,
            begin=begin,
            behind=True,
        )

    def objective(self, batch: Batch) -> Losses:
        """Mean squared error of the completed images; the batch only says which these are."""
        assert batch.entry is not None
        (rows,) = send((batch.entry,), self.inputs.device)
        completed = self.autoencoder(_unit(self.inputs[rows]))
        return {"completion": F.mse_loss(completed, _unit(self.originals[rows]))}

    @torch.no_grad()
    def complete(self, images: ImageStore, masks: Tensor) -> ImageStore:
        """Repairs images, those of one size together.

        Args:
            images: Filled in by the rule.
            masks: True where a pixel is known, bool [sum of H W], row-major, image after image.

        Returns:
            Raw images of the same sizes.
        """
        pixels, masks = images.reconstruct().pixels.view(-1, 3), masks.to(images.device)
        repaired = torch.empty_like(pixels)
        with evaluating(self.autoencoder), same_kernels():
            for _, places, height, width in by_size(images.sizes):
                shown = pixels[places]  # [n, H W, 3]
                made = self._repaired(shown.view(-1, height, width, 3)).view(shown.shape)
                if self.paste:
                    made = torch.where(masks[places][:, :, None], shown, made)
                repaired[places] = made
        return ImageStore.from_pixels(repaired.flatten(), images.sizes)

    def _repaired(self, shown: Tensor) -> Tensor:
        """Images of one size as the settled weights complete them, uint8 [n, H, W, 3]."""
        weights = self._settled_values()
        images = _unit(shown.to(self.settled.device))
        made: Tensor = torch.func.functional_call(self.autoencoder, weights, (images,))
        levels = (255 * made + 0.5).floor().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().to(shown.device)

    def _values(self) -> dict[str, Tensor]:
        """Weights and running statistics."""
        state = self.autoencoder.state_dict()
        return {name: value for name, value in state.items() if value.is_floating_point()}

    def _settled_values(self) -> dict[str, Tensor]:
        """Those by which exemplars are completed."""
        own = self._values()
        if not len(self.settled):
            return own
        parts = self.settled.split([value.numel() for value in own.values()])
        return {
            name: part.view(value.shape)
            for (name, value), part in zip(own.items(), parts, strict=True)
        }

    def retained(self) -> Retained:
        """The autoencoder, which counts with the exemplars that can't be read without it."""
        return Retained("autoencoder", "codec", dict(self.autoencoder.state_dict()))


def _unit(levels: Tensor) -> Tensor:
    """Bytes [n, H, W, 3] as values from 0 to 1, float32 [n, 3, H, W]."""
    return levels.permute(0, 3, 1, 2).float() / 255
