"""``reconstruct``: packed images, unpacked into raw ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.ops._library import define
from fastcil.ops._nearest import Nearest, check_nearest, shown
from fastcil.ops._packed import addresses, check_images, check_rows, fetch, layout

CHUNK = 1 << 20  # pixels gathered at a time by the reference


def reference(
    pixels: Tensor, offsets: Tensor, geometry: Tensor, nearest: Nearest = "opencv"
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch. It waits for the device to learn the size of the result."""
    check_rows(pixels.numel(), offsets, geometry, nearest=nearest)
    table = layout(offsets, geometry, nearest=nearest)
    sizes = table[:, 1] * table[:, 2]  # [N], in pixels
    starts = 3 * (sizes.cumsum(0) - sizes)
    raw = [pixels.new_empty(0)]
    for images in table.split(max(1, CHUNK // max(sizes.tolist(), default=1))):
        if not len(images):
            break
        y = torch.arange(int(images[:, 1].max()), device=pixels.device)
        x = torch.arange(int(images[:, 2].max()), device=pixels.device)
        r = shown(y, images[:, 7], images[:, 1], nearest)  # [b, H]
        c = shown(x, images[:, 8], images[:, 2], nearest)  # [b, W]
        images = images[:, None, None]
        real = (y[:, None] < images[..., 1]) & (x < images[..., 2])  # [b, H, W]: not padding
        places = addresses(images, y[:, None], x, (r[:, :, None], c[:, None]))
        raw.append(fetch(pixels, places[real]).view(-1))
    return torch.cat(raw), starts


def fake(pixels: Tensor, offsets: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor]:
    """Empty outputs; how many bytes there are depends on the data."""
    total = torch.library.get_ctx().new_dynamic_size()
    return pixels.new_empty(total), torch.empty_like(offsets)


define(
    "reconstruct(Tensor pixels, Tensor offsets, Tensor geometry) -> (Tensor, Tensor)",
    reference,
    fake,
    kernel="fastcil.kernels.reconstruct:reconstruct",
)


def reconstruct(
    pixels: Tensor, offsets: Tensor, geometry: Tensor, nearest: Nearest = "opencv"
) -> tuple[Tensor, Tensor]:
    r"""Unpack images: the raw pixels that each of them shows, one image after the other.

    With the box B of a packed image and its background grid g of gh x gw cells, the image is

    .. math::
        \tilde x_{yx} = \begin{cases} x_{yx} & (y, x) \in B \\
        g_{\lfloor y\,gh/H \rfloor,\ \lfloor x\,gw/W \rfloor} & \text{elsewhere}\end{cases}

    (Luo et al. 2023, Eq. 3, with the nearest-neighbour resize of OpenCV that their supplement
    names). A raw image is copied.

    Their released code resizes with Pillow, which takes other neighbours. Images packed so are
    unpacked so, in plain PyTorch on every device: an option to compare with, not the fast way.

    On the CPU results of 4 MiB or more take the memory of earlier ones, as `read_batch` says.

    Args:
        pixels: packed or raw images, uint8 [P].
        offsets: first byte of each image, int64 [N].
        geometry: int16 [N, 8], rows (H, W, y0, x0, y1, x1, gh, gw).
        nearest: whose nearest neighbours, ``"opencv"`` or ``"pillow"``: those it was packed with.

    Returns:
        The raw images, uint8 [sum of 3*H*W] (row-major, RGB interleaved), and the first byte of
        each of them, int64 [N].

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, a row of it does not describe an image, or
            ``nearest`` is neither of the two. (Kernels on a GPU cannot look at values, and don't.)

    Example:
        >>> pixels = torch.tensor([7, 8, 9], dtype=torch.uint8)  # one cell, and no box
        >>> geometry = torch.tensor([[1, 2, 0, 0, 0, 0, 1, 1]], dtype=torch.int16)
        >>> reconstruct(pixels, torch.zeros(1, dtype=torch.int64), geometry)[0]
        tensor([7, 8, 9, 7, 8, 9], dtype=torch.uint8)
    """
    check_images(pixels, offsets, geometry)
    check_nearest(nearest)
    if nearest == "pillow":
        return reference(pixels, offsets, geometry, nearest)
    out: tuple[Tensor, Tensor] = torch.ops.fastcil.reconstruct(pixels, offsets, geometry)
    return out
