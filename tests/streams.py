"""Tasks of drawn images for a memory, and what it then holds."""

from __future__ import annotations

import numpy as np
import torch

from fastcil.contract import Task
from fastcil.data import Examples, ImageStore, read_images

STREAM = (3, 1, 4, 2, 2)  # new classes of each task


def draw(rng, labels, low=10, high=24):
    """Images of many sizes for the given labels, shuffled, and a box for each."""
    labels = rng.permutation(np.array(labels))
    images, boxes = [], []
    for label in labels:
        h, w = rng.integers(low, high, 2)
        images.append(rng.integers(0, 200 + label, (h, w, 3), dtype=np.uint8))
        y0, x0 = rng.integers(0, h // 2), rng.integers(0, w // 2)
        boxes.append((y0, x0, rng.integers(y0 + 1, h + 1), rng.integers(x0 + 1, w + 1)))
    examples = Examples(ImageStore.from_images(images), torch.from_numpy(labels))
    return examples, torch.tensor(np.array(boxes), dtype=torch.int16)


def stream(seed, classes=STREAM, low=6, high=12):
    """Yields tasks, with no exemplars, and boxes."""
    rng = np.random.default_rng(seed)
    known = 0
    for index, fresh in enumerate(classes):
        new = range(known, known + fresh)
        labels = [c for c in new for _ in range(rng.integers(low, high))]
        examples, boxes = draw(rng, labels)
        yield Task(index, tuple(new), known, examples, examples.select([])), boxes
        known += fresh


def embed(examples):
    """Features of the pixels themselves: the image at 3 x 3 pixels."""
    count = len(examples)
    store = torch.zeros(count, dtype=torch.int64)
    seen = read_images([examples.images], store, torch.arange(count), (3, 3))
    return seen.flatten(1).float() - 90


def arrays(images):
    """Every image of a store, as it is seen."""
    raw = images.reconstruct()
    flat = raw.pixels.split(raw.sizes.prod(1).mul(3).tolist())
    return [f.reshape(h, w, 3).numpy() for f, (h, w) in zip(flat, raw.sizes.tolist(), strict=True)]


def buffers_nbytes(memory):
    return sum(b.numel() * b.element_size() for b in memory.state().values())


def pictures(memory):
    """Each class's exemplars in order, as arrays."""
    held = memory.examples()
    by_class = {}
    for image, label in zip(arrays(held.images), held.labels.tolist(), strict=True):
        by_class.setdefault(label, []).append(image)
    return by_class
