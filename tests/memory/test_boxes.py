"""Boxes from activation maps against Luo et al. 2023, Eqs. 1 and 2, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcil.data import Examples, ImageStore
from fastcil.memory.boxes import box_shares, class_boxes, whole_boxes

SIDE = 32


class Reader:
    """A context that squeezes images by nearest neighbour."""

    def make_backbone(self):
        raise NotImplementedError

    scan = make_backbone

    def scan_labelled(self, function, examples, look):
        assert look == "whole"
        images = torch.stack(
            [
                torch.nn.functional.interpolate(
                    torch.as_tensor(examples.images.image(i)).permute(2, 0, 1)[None].double(),
                    (SIDE, SIDE),
                )[0]
                for i in range(len(examples))
            ]
        )
        return function(images, examples.labels, examples.images.sizes)


def examples_with_square(sizes, box=(0.25, 0.5, 0.5, 0.75)):
    """Noise, and a square at a relative place, in the channel that the label says."""
    generator = np.random.default_rng(0)
    images, squares = [], []
    for number, (height, width) in enumerate(sizes):
        image = generator.integers(0, 40, (height, width, 3), dtype=np.uint8)
        y0, x0, y1, x1 = (
            round(b * s) for b, s in zip(box, (height, width, height, width), strict=True)
        )
        image[y0:y1, x0:x1, number % 3] = 250
        images.append(image)
        squares.append((y0, x0, y1, x1))
    labels = torch.arange(len(sizes)) % 3
    return Examples(ImageStore.from_images(images), labels), squares


def pooled(images: Tensor) -> Tensor:
    """Maps of 16 x 16 that show each colour's brightness."""
    return torch.nn.functional.avg_pool2d(images, SIDE // 16)


def one_hot(labels: Tensor) -> Tensor:
    return torch.eye(3, dtype=torch.float64)[labels]


def naive_box(activation: np.ndarray, height: int, width: int, threshold: float):
    """Eq. 1, bilinear enlargement with half-pixel centres, Eq. 2, pixel by pixel."""
    mask = (activation - activation.min()) / (activation.max() - activation.min())

    def taps(position: int, side: int, cells: int):
        source = max((position + 0.5) * cells / side - 0.5, 0.0)
        low = min(math.floor(source), cells - 1)
        return low, min(low + 1, cells - 1), source - low

    inside = []
    for y in range(height):
        for x in range(width):
            r0, r1, fy = taps(y, height, mask.shape[0])
            c0, c1, fx = taps(x, width, mask.shape[1])
            top = mask[r0, c0] * (1 - fx) + mask[r0, c1] * fx
            bottom = mask[r1, c0] * (1 - fx) + mask[r1, c1] * fx
            if top * (1 - fy) + bottom * fy > threshold:
                inside.append((y, x))
    rows, columns = zip(*inside, strict=True)
    return [min(rows), min(columns), max(rows) + 1, max(columns) + 1]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_boxes_are_equations_1_and_2(threshold):
    sizes = [(40, 64), (64, 40), (33, 47), (90, 30)]
    examples, _ = examples_with_square(sizes)
    weights = torch.tensor([[1.0, -0.3, 0.2], [0.1, 2.0, 0.0], [-1.0, 0.5, 0.7]]).double()
    boxes = class_boxes(Reader(), examples, pooled, lambda labels: weights[labels], threshold)
    assert boxes.dtype == torch.int16

    def seen(images, labels, sizes):
        return (torch.einsum("bchw,bc->bhw", pooled(images), weights[labels]),)

    (activations,) = Reader().scan_labelled(seen, examples, look="whole")
    expected = [
        naive_box(a.numpy(), *size, threshold) for a, size in zip(activations, sizes, strict=True)
    ]
    assert boxes.tolist() == expected


def test_an_obvious_object_is_found_at_the_images_own_size():
    sizes = [(64, 96), (96, 64), (128, 128)]
    examples, squares = examples_with_square(sizes)
    boxes = class_boxes(Reader(), examples, pooled, one_hot, 0.6)
    for box, square, (height, width) in zip(boxes.tolist(), squares, sizes, strict=True):
        slack = max(height, width) / 16 + 1
        assert all(abs(b - s) <= slack for b, s in zip(box, square, strict=True)), (box, square)


def test_a_constant_map_keeps_the_whole_image():
    examples, _ = examples_with_square([(20, 30), (31, 17)])
    boxes = class_boxes(Reader(), examples, lambda x: torch.ones(len(x), 3, 4, 4), one_hot, 0.6)
    assert boxes.tolist() == [[0, 0, 20, 30], [0, 0, 31, 17]]


def test_no_image_no_box():
    examples, _ = examples_with_square([(20, 30)])
    empty = examples.select([])

    class Empty(Reader):
        def scan_labelled(self, function, examples, look):
            return function(torch.zeros(0, 3, SIDE, SIDE), examples.labels, examples.images.sizes)

    boxes = class_boxes(Empty(), empty, pooled, one_hot, 0.6)
    assert boxes.shape == (0, 4) and boxes.dtype == torch.int16


def test_shares_of_boxes():
    sizes = torch.tensor([[10, 20], [10, 20], [7, 3]])
    boxes = torch.tensor([[0, 0, 10, 20], [2, 5, 7, 15], [3, 1, 3, 2]], dtype=torch.int16)
    torch.testing.assert_close(
        box_shares(boxes, sizes), torch.tensor([1.0, 50 / 200, 0.0]).double()
    )
    assert box_shares(whole_boxes(sizes), sizes).tolist() == [1.0, 1.0, 1.0]
