"""Activation maps laid over images, beside each other."""

from __future__ import annotations

import numpy as np
import torch

from fastcil.addons.pictures import map_record

HEIGHT, GAP = 112, 4


def lit(rows, columns):
    """A network whose map is 1 in one part of 8 x 8 positions."""

    def maps(images):
        made = torch.zeros(len(images), 1, 8, 8, dtype=images.dtype)
        made[:, :, rows, columns] = 1.0
        return made

    return maps


def weights(labels):
    return torch.ones(len(labels), 1, dtype=torch.float64)


def test_each_map_lies_where_its_network_looks(world):
    examples = world.make_examples([3, 3, 4, 5, 6, 7, 7, 8], 0, sides=(56, 56))
    seers = {"A": lit(slice(0, 4), slice(0, 4)), "B": lit(slice(4, 8), slice(4, 8))}
    record = map_record(world.FakeContext(), examples, seers, weights, 0.5)
    assert record.kind == "images"
    assert record.title == "Activation maps: the image, A, B"
    assert record.payload["labels"] == [3, 5, 6, 8]
    for place, picture in zip((0, 3, 4, 7), record.payload["images"], strict=True):
        assert picture.shape == (HEIGHT, 3 * HEIGHT + 2 * GAP, 3) and picture.dtype == np.uint8
        image = examples.images.image(place).numpy().repeat(2, 0).repeat(2, 1)
        starts = [0, HEIGHT + GAP, 2 * (HEIGHT + GAP)]
        shown, first, second = (picture[:, s : s + HEIGHT].astype(int) for s in starts)
        # Bilinear enlarging shifts neighbouring pixels a little.
        assert abs(shown - image).mean() < 30
        assert (picture[:, HEIGHT : HEIGHT + GAP] == 255).all()
        quarter = slice(8, 40)
        far = slice(HEIGHT - 40, HEIGHT - 8)
        for overlay, near, other in ((first, quarter, far), (second, far, quarter)):
            warm, cold = overlay[near, near].mean((0, 1)), overlay[other, other].mean((0, 1))
            assert warm[0] > warm[2] + 30, "red where the map is 1"
            assert cold[2] > cold[0] + 30, "blue where it is 0"
        white = (first == 255).all(2)
        rows, columns = white.any(1).nonzero()[0], white.any(0).nonzero()[0]
        # The map's half is crossed half-way between positions 3 and 4.
        assert (rows.min(), columns.min()) == (0, 0)
        assert abs(int(rows.max()) - 56) <= 2 and abs(int(columns.max()) - 56) <= 2


def test_a_map_that_shows_nothing_has_the_whole_image_as_its_box(world):
    examples = world.make_examples([0, 1], 0, sides=(30, 60))
    record = map_record(
        world.FakeContext(), examples, {"flat": lit(slice(0, 0), slice(0, 0))}, weights, 0.5
    )
    for picture, width in zip(record.payload["images"], (224, 56), strict=True):
        overlay = picture[:, width + GAP :]
        assert overlay.shape[1] == width
        assert (overlay[0] == 255).all() and (overlay[:, -1] == 255).all()
