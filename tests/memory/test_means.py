"""Means of exemplars: in evaluation mode, mirror images as wanted, nothing without exemplars."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastcil.data import Examples, ImageStore
from fastcil.memory.means import exemplar_means


class Learner(nn.Module):
    """Its features are the pixels of a row and, as long as it trains, of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.context = SimpleNamespace(scan=self.scan)

    def embed(self, images: Tensor) -> Tensor:
        assert not self.training
        return images[:, :, 0].flatten(1)

    def scan(self, function, examples: Examples, flip: bool = False) -> Tensor:
        images = torch.stack([examples.images.image(i) for i in range(len(examples))])
        images = images.permute(0, 3, 1, 2).float()
        return function(images.flip(3) if flip else images)


@pytest.mark.parametrize("flip", [False, True])
def test_means(flip):
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (5, 2, 3, 3), np.uint8)
    labels = [2, 0, 2, 2, 0]
    learner = Learner()
    examples = Examples(ImageStore.from_batch(pixels), torch.tensor(labels))
    means = exemplar_means(learner, examples, 4, flip)
    assert learner.training and means.shape == (4, 9)
    for label in range(4):
        rows = [p for p, y in zip(pixels, labels, strict=True) if y == label]
        views = [*rows, *(row[:, ::-1] for row in rows)] if flip else rows
        vectors = [view[0].transpose(1, 0).ravel().astype(float) for view in views]
        mean = sum((v / np.linalg.norm(v) for v in vectors), np.zeros(9))
        length = np.linalg.norm(mean)
        np.testing.assert_allclose(means[label], mean / (length or 1), atol=1e-6)


def test_without_exemplars_there_is_no_mean():
    none = Examples(ImageStore.from_batch(np.zeros((1, 2, 2, 3), np.uint8)), torch.tensor([0]))
    assert exemplar_means(Learner(), none.select([]), 4, flip=True).shape == (0, 0)
