"""Reconstruction: fastcil.ops.reconstruct beside OpenCV's and Pillow's ways.

64 photograph-like images of about 418 x 443, compressed by eta = 4 outside a box of half the area,
back to full images on one core. The peers are handed box and grid of each as arrays. Pillow's
nearest neighbour takes other cells, and is compared by shape only.

A way is timed only after its images have been compared, to the bit, with the store's own.
"""

from __future__ import annotations

from functools import partial

import cv2
import numpy as np
from bench_read import Work, make_work, put_together
from op_case import OURS, OpCase, Step

from fastcil import ops


def opencv(work: Work) -> list[np.ndarray]:
    images = []
    for photo in work.photos:
        size = photo.shown.shape[1::-1]
        image = cv2.resize(photo.grid, size, interpolation=cv2.INTER_NEAREST)
        (y, x), (h, w) = photo.corner, photo.box.shape[:2]
        image[y : y + h, x : x + w] = photo.box
        images.append(image)
    return images


def pillow(work: Work) -> list[np.ndarray]:
    return [np.asarray(put_together(photo)) for photo in work.photos]


def ours(work: Work) -> list[np.ndarray]:
    store = work.store
    pixels, offsets = ops.reconstruct(store.pixels, store.offsets, store.geometry)
    return [
        pixels[offset : offset + 3 * h * w].view(h, w, 3).numpy()
        for offset, (h, w) in zip(offsets.tolist(), store.sizes.tolist(), strict=True)
    ]


def make(name: str, full: bool) -> Step:
    """A way to reconstruct, checked."""
    work = make_work(True, 64 if full else 4)
    way = {OURS: ours, "OpenCV": opencv, "Pillow": pillow}[name]
    for got, photo in zip(way(work), work.photos, strict=True):
        assert got.shape == photo.shown.shape
        assert name == "Pillow" or np.array_equal(got, photo.shown), f"{name} shows something else"
    return partial(way, work)


CASES = [
    OpCase("reconstruct", "64 images, about 418x443", (OURS, "OpenCV", "Pillow"), make, threads=1)
]
