"""Images made again of the codes that are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcil.data import Augmentation, Examples, ImageStore
from fastcil.data.ranks import rank_in_class
from fastcil.memory.episodes import Episodes
from fastcil.nn.image_autoencoder import decode
from fastcil.nn.same_kernels import same_kernels


@dataclass(frozen=True)
class Regenerated:
    """Images made of what is kept.

    Args:
        examples: Raw images of the training size, and their classes.
        born: The task that brought each, int64 [N], on the CPU.
    """

    examples: Examples
    born: Tensor  # [N]

    def __len__(self) -> int:
        return len(self.born)


@torch.no_grad()
def regenerate(
    episodes: Episodes,
    rows: Tensor,
    width: int,
    augmentation: Augmentation,
    seed: int,
    per_class: int = 0,
    device: torch.device | str = "cpu",
) -> Regenerated:
    """As many images of each row as it stands for, decoded from draws of it.

    Args:
        episodes: What is kept.
        rows: Of which of its rows, int64 [R], on the CPU.
        width: The autoencoders'.
        augmentation: Gives the side of the images, and what normalised them.
        seed: Of the draws; the same images for the same seed.
        per_class: Most images of a class, drawn by chance; 0 for all.
        device: Where the images are wanted.

    Returns:
        The images, those of a decoder together.

    Example:
        >>> none = Episodes(torch.float32)
        >>> len(regenerate(none, torch.arange(0), 4, Augmentation.cifar(8), seed=0))
        0
    """
    generator = torch.Generator().manual_seed(seed)
    labels, born = episodes.labels.cpu().long(), episodes.born.cpu().long()
    drawn = rows.repeat_interleave(episodes.counts.cpu().long()[rows])
    if per_class and len(drawn):
        shuffled = drawn[torch.randperm(len(drawn), generator=generator)]
        drawn = shuffled[rank_in_class(labels[shuffled]) < per_class].sort().values
    reader = episodes.decoder_of.cpu().long()[born[drawn]] if len(drawn) else drawn
    pixels, found = [torch.empty(0, dtype=torch.uint8)], [drawn[:0]]
    for number in reader.unique().tolist():
        decoder = episodes.decoders[number].float()
        for some, codes in episodes.samples(drawn[reader == number], generator):
            # A resumed run makes them again: cuDNN must not choose how by chance.
            with same_kernels():
                images = decode(decoder, codes, width, augmentation.size)
            pixels.append(_as_bytes(images, augmentation).permute(0, 2, 3, 1).reshape(-1).cpu())
            found.append(some)
    order = torch.cat(found)
    sizes = torch.full((len(order), 2), augmentation.size)
    store = ImageStore.from_pixels(torch.cat(pixels).to(device), sizes)
    return Regenerated(Examples(store, labels[order].to(device)), born[order])


def _as_bytes(images: Tensor, augmentation: Augmentation) -> Tensor:
    """Normalised images [B, 3, S, S] as uint8: what `Augmentation.normalise` undoes."""
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in (augmentation.mean, augmentation.std)
    )
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
