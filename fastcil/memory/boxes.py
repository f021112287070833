"""Where the object of each image is, as its class activation map shows it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcil.contract import Context
from fastcil.data import Examples
from fastcil.ops import cam_boxes


def class_boxes(
    context: Context,
    examples: Examples,
    maps: Callable[[Tensor], Tensor],
    class_weights: Callable[[Tensor], Tensor],
    threshold: float = 0.6,
) -> Tensor:
    r"""The tight box of each image's true-class activation map, in the image's own pixels.

    .. math:: M = \frac{A - \min A}{\max A - \min A}, \quad A = w_y^\top F(x), \qquad
        B = [\min h, \min w; \max h, \max w]_{M(h, w) > \tau}

    (Luo et al. 2023, Eqs. 1, 2), on the whole image squeezed to the square ("CAM transformation",
    Table S2). M is scaled to [0, 1] at the map's resolution and then enlarged to the image's own
    size, as in the released code. A constant map shows nothing, and the box is the whole image:
    what is not understood is kept.

    Args:
        context: Reads the images.
        examples: N images and their labels.
        maps: Normalised images [B, 3, h, w] -> final feature maps [B, C, h', w'], in evaluation
            mode.
        class_weights: Labels [B] -> the classifier's rows [B, C].
        threshold: tau, from 0 to below 1; what lies above it is inside.

    Returns:
        Boxes (y0, x0, y1, x1), ends exclusive, int16 [N, 4].
    """

    def find(images: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor]:
        boxes, valid = cam_boxes(maps(images), class_weights(labels), sizes, threshold)
        return (torch.where(valid[:, None], boxes, whole_boxes(sizes).to(boxes)),)

    (boxes,) = context.scan_labelled(find, examples, look="whole")
    return boxes.to(torch.int16)


def whole_boxes(sizes: Tensor) -> Tensor:
    """Boxes that hold the whole of each image.

    Args:
        sizes: Heights and widths, [N, 2].

    Returns:
        int16 [N, 4].

    Example:
        >>> whole_boxes(torch.tensor([[48, 64]]))
        tensor([[ 0,  0, 48, 64]], dtype=torch.int16)
    """
    sizes = sizes.to(torch.int16)
    return torch.cat([torch.zeros_like(sizes), sizes], dim=1)


def box_shares(boxes: Tensor, sizes: Tensor) -> Tensor:
    """The part of each image's area that its box covers.

    Args:
        boxes: [N, 4].
        sizes: Heights and widths, [N, 2].

    Returns:
        float64 [N].

    Example:
        >>> box_shares(torch.tensor([[0, 0, 5, 10]]), torch.tensor([[10, 10]]))
        tensor([0.5000], dtype=torch.float64)
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).double().clamp_min(0)
    return sides.prod(1) / sizes.to(boxes.device).double().prod(1)
