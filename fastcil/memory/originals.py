"""Which of a task's images an exemplar was made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.data import Examples

_COMPARED = 8192


def find_original(
    examples: Examples, label: int, exemplar: Tensor, faithful: Tensor | None = None
) -> int | None:
    """The image of a class that an exemplar shows.

    It is, among the images of its class, the one whose pixels differ least from what is remembered,
    whatever the codec; more than 8192 values are compared at as many, evenly spaced. An image that
    is larger is compared as the codecs shrink it, to the nearest pixel.

    Args:
        examples: A task's images.
        label: The exemplar's class.
        exemplar: What is remembered, uint8 [H, W, 3].
        faithful: Where that is the image itself, bool [H, W], as `Codec.faithful` says; None to
            compare all pixels.

    Returns:
        Its position; None if all images of its class are smaller.

    Example:
        >>> from fastcil.data import ImageStore
        >>> pixels = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 8, 8, 3)
        >>> examples = Examples(ImageStore.from_batch(pixels), torch.tensor([0, 1, 1]))
        >>> find_original(examples, 1, examples.images.image(2))
        2
    """
    images = examples.images
    sizes, size = images.sizes, torch.tensor(exemplar.shape[:2]).to(images.device)
    mine = (examples.labels == label).to(images.device)
    candidates = (mine & (sizes >= size).all(1)).nonzero().flatten()
    if not len(candidates):
        return None
    flat = exemplar.reshape(-1).cpu()
    looked_at = torch.arange(len(flat))
    if faithful is not None:
        looked_at = looked_at[faithful.reshape(-1, 1).expand(-1, 3).reshape(-1).cpu()]
    count = min(len(looked_at), _COMPARED)
    places = looked_at[torch.linspace(0, len(looked_at) - 1, count, dtype=torch.float64).long()]
    pixel, channel = places.to(images.device).div(3, rounding_mode="floor"), places % 3
    row, column = pixel.div(size[1], rounding_mode="floor"), pixel % size[1]
    height, width = sizes[candidates, None].unbind(2)  # [candidates, 1]
    begin = (row * height // size[0]) * width + column * width // size[1]
    begin = images.offsets[candidates, None] + 3 * begin
    nearby = images.pixels[begin + channel.to(images.device)]
    differences = (nearby.cpu().int() - flat[places].int()).abs().sum(1)  # [candidates]
    return int(candidates[int(differences.argmin())])
