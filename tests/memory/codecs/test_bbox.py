from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcil.data import ImageStore
from fastcil.errors import FastcilError
from fastcil.memory import make_codec

CASES = [  # height, width, box
    (12, 16, (3, 4, 9, 12)),
    (13, 7, (0, 0, 13, 7)),
    (13, 7, (0, 0, 5, 7)),
    (20, 31, (11, 5, 20, 18)),
    (9, 9, (4, 4, 5, 5)),
    (9, 9, (3, 3, 3, 3)),
    (1, 1, (0, 0, 1, 1)),
    (1, 6, (0, 2, 1, 4)),
]


def store_and_boxes(cases):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w, _ in cases]
    boxes = torch.tensor([box for _, _, box in cases], dtype=torch.int16)
    return images, ImageStore.from_images(images), boxes


def remembered(image, box, ratio):
    """Luo et al. (2023), Eq. 3, pixel by pixel; and the pixels that its layout keeps."""
    h, w, _ = image.shape
    y0, x0, y1, x1 = box
    gh, gw = (max(1, math.floor(side / math.sqrt(ratio))) for side in (h, w))
    seen, cells = image.copy(), set()
    for y in range(h):
        for x in range(w):
            if not (y0 <= y < y1 and x0 <= x < x1):
                r, c = y * gh // h, x * gw // w
                cells.add((r, c))
                seen[y, x] = image[r * h // gh, c * w // gw]
    return seen, (y1 - y0) * (x1 - x0) + len(cells)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0, 9.0, 100.0])
def test_pixels_units_and_bytes(ratio):
    images, store, boxes = store_and_boxes(CASES)
    codec = make_codec("bbox", ratio=ratio)
    kept = codec.encode(store, boxes)
    units, nbytes = codec.units(kept), codec.nbytes(kept)
    assert units.dtype == torch.float64
    seen = codec.decode(kept)
    for i, (h, w, box) in enumerate(CASES):
        expected, stored = remembered(images[i], box, ratio)
        assert np.array_equal(seen.image(i).numpy(), expected)
        assert int(nbytes[i]) == 3 * stored + 28
        area = (box[2] - box[0]) * (box[3] - box[1])
        # Luo et al. (2023), Eq. 4, as printed.
        eq4 = area / (h * w) + 1 / ratio * (1 - area / (h * w))
        assert float(units[i]) == pytest.approx(eq4, rel=1e-12)
    assert int(nbytes.sum()) == kept.nbytes + 4 * len(kept)


def test_bytes_are_close_to_eq_4_on_photographs():
    rng = np.random.default_rng(1)
    cases = []
    for _ in range(30):
        h, w = rng.integers(200, 320, 2)
        y0, x0 = rng.integers(0, h // 2), rng.integers(0, w // 2)
        y1, x1 = rng.integers(y0 + 20, h + 1), rng.integers(x0 + 20, w + 1)
        cases.append((int(h), int(w), (int(y0), int(x0), int(y1), int(x1))))
    _, store, boxes = store_and_boxes(cases)
    codec = make_codec("bbox")
    kept = codec.encode(store, boxes)
    raw = torch.tensor([3 * h * w for h, w, _ in cases], dtype=torch.float64)
    assert torch.allclose((codec.nbytes(kept) - 28) / raw, codec.units(kept), rtol=0.02)
    total = (codec.nbytes(kept) - 28).sum() / (codec.units(kept) * raw).sum()
    assert abs(float(total) - 1) < 0.01


def test_boxes_are_needed():
    _, store, _ = store_and_boxes(CASES)
    with pytest.raises(FastcilError, match="marks is None, but the codec 'bbox'"):
        make_codec("bbox").encode(store, None)


@pytest.mark.parametrize(("ratio", "foreground"), [(4.0, 2.0), (4.0, 4.0), (9.0, 2.5), (16.0, 4.0)])
def test_a_box_downsampled_too_is_a_smaller_image_packed(ratio, foreground):
    cases = [*CASES, (240, 320, (40, 60, 200, 250)), (97, 131, (20, 0, 97, 131))]
    images, store, boxes = store_and_boxes(cases)
    codec = make_codec("bbox", ratio=ratio, foreground_ratio=foreground)
    kept = codec.encode(store, boxes)
    units, nbytes, seen = codec.units(kept), codec.nbytes(kept), codec.decode(kept)
    for i, (h, w, (y0, x0, y1, x1)) in enumerate(cases):
        sh, sw = (max(1, math.floor(side / math.sqrt(foreground))) for side in (h, w))
        assert kept.sizes[i].tolist() == [sh, sw]
        small = images[i][np.arange(sh) * h // sh][:, np.arange(sw) * w // sw]
        box = (0, 0, 0, 0)
        if y1 > y0 and x1 > x0:
            box = (y0 * sh // h, x0 * sw // w, -(-y1 * sh // h), -(-x1 * sw // w))
        assert tuple(kept.boxes[i].tolist()) == box
        # Every pixel kept of the box is a pixel of it, or of the row or column next to it.
        expected, stored = remembered(small, box, ratio / foreground)
        assert np.array_equal(seen.image(i).numpy(), expected)
        assert int(nbytes[i]) == 3 * stored + 28
        share = (box[2] - box[0]) * (box[3] - box[1]) / (sh * sw)
        rate = share / foreground + (1 - share) / ratio
        assert float(units[i]) == pytest.approx(rate)
        if min(h, w) > 90:
            own = (y1 - y0) * (x1 - x0) / (h * w)
            printed = own / foreground + (1 - own) / ratio
            assert 3 * stored / (3 * h * w) == pytest.approx(printed, rel=0.03)


@pytest.mark.parametrize("foreground", [0.5, 5.0, "2", float("nan"), True])
def test_foreground_ratios_that_are_none_are_named(foreground):
    with pytest.raises(FastcilError, match="foreground_ratio is"):
        make_codec("bbox", ratio=4.0, foreground_ratio=foreground)
