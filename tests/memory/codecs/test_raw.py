from __future__ import annotations

import numpy as np
import torch

from fastcil.data import ImageStore
from fastcil.memory import make_codec


def test_images_come_back_and_cost_what_they_are():
    rng = np.random.default_rng(0)
    sizes = [(5, 9), (8, 8), (1, 1)]
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]
    codec = make_codec("raw")
    kept = codec.encode(ImageStore.from_images(images), None)
    seen = codec.decode(kept)
    for i, image in enumerate(images):
        assert torch.equal(seen.image(i), torch.from_numpy(image))
    assert codec.units(kept).dtype == torch.float64
    assert codec.units(kept).tolist() == [1, 1, 1]
    assert codec.nbytes(kept).tolist() == [3 * h * w + 28 for h, w in sizes]
    assert int(codec.nbytes(kept).sum()) == kept.nbytes + 4 * len(images)
