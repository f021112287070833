"""Activation maps laid over images, one network's beside another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcil.contract import Context, Record
from fastcil.data import Examples
from fastcil.memory.boxes import whole_boxes
from fastcil.ops import cam, cam_boxes

Picture = NDArray[np.uint8]

_IMAGES = 4
_HEIGHT, _GAP = 112, 4
_BOX = (255, 255, 255)


def map_record(
    context: Context,
    examples: Examples,
    seers: Mapping[str, Callable[[Tensor], Tensor]],
    class_weights: Callable[[Tensor], Tensor],
    threshold: float,
) -> Record:
    """Images beside the activation maps of their true class (Luo et al. 2023, Fig. 4).

    Args:
        context: Reads the images, squeezed whole.
        examples: One image each of up to four of its classes, taken evenly, is shown.
        seers: Name -> what makes final feature maps, in evaluation mode.
        class_weights: Labels [B] -> the classifier's rows [B, C].
        threshold: tau of the boxes drawn.

    Returns:
        A record of kind ``images``: the image, then what each of ``seers`` makes of it, blue for 0
        and red for 1, with the box of what lies above tau.
    """
    shown = examples.select(_one_of_each(examples.labels.cpu()))
    seen = [_look(context, shown, maps, class_weights, threshold) for maps in seers.values()]
    pictures = []
    for place in range(len(shown)):
        image = shown.images.image(place).cpu().numpy()
        parts = [_scaled(image)]
        for masks, boxes in seen:
            parts += [np.full((_HEIGHT, _GAP, 3), 255, np.uint8)]
            parts += [_overlay(image, masks[place].numpy(), boxes[place].tolist())]
        pictures.append(np.concatenate(parts, axis=1))
    return Record(
        "images",
        f"Activation maps: the image, {', '.join(seers)}",
        {"images": pictures, "labels": shown.labels.tolist()},
    )


def _one_of_each(labels: Tensor) -> Tensor:
    """Position of the first image of some classes, taken evenly."""
    classes = labels.unique()
    picked = np.linspace(0, len(classes) - 1, min(_IMAGES, len(classes))).round().astype(int)
    return torch.stack([(labels == classes[k]).nonzero()[0, 0] for k in picked])


def _look(
    context: Context,
    examples: Examples,
    maps: Callable[[Tensor], Tensor],
    class_weights: Callable[[Tensor], Tensor],
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Masks [N, h, w] and boxes [N, 4], on the CPU."""

    def find(images: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        features, weights = maps(images), class_weights(labels)
        boxes, valid = cam_boxes(features, weights, sizes, threshold)
        whole = whole_boxes(sizes).to(boxes)
        return cam(features, weights), torch.where(valid[:, None], boxes, whole)

    masks, boxes = context.scan_labelled(find, examples, look="whole")
    return masks.float().cpu(), boxes.cpu()


def _scaled(image: NDArray[Any]) -> Picture:
    """The image at the record's height."""
    height, width = image.shape[:2]
    size = max(1, round(width * _HEIGHT / height)), _HEIGHT
    how = cv2.INTER_AREA if height > _HEIGHT else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size, interpolation=how), dtype=np.uint8)


def _overlay(image: NDArray[Any], mask: NDArray[Any], box: list[int]) -> Picture:
    """An image under its map's colours, with a box in the image's own pixels."""
    picture = _scaled(image)
    width = picture.shape[1]
    heat = cv2.resize(mask, (width, _HEIGHT), interpolation=cv2.INTER_LINEAR)
    coloured = cv2.applyColorMap((255 * heat.clip(0, 1)).astype(np.uint8), cv2.COLORMAP_JET)
    mixed = cv2.addWeighted(picture, 0.5, cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB), 0.5, 0.0)
    scale = np.array([_HEIGHT, width, _HEIGHT, width]) / np.array([*image.shape[:2]] * 2)
    top, left, bottom, right = (np.array(box) * scale).round().astype(int).tolist()
    cv2.rectangle(mixed, (left, top), (right - 1, bottom - 1), _BOX, thickness=1)
    return np.asarray(mixed, dtype=np.uint8)
