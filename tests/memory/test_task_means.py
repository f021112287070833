"""The nearest mean of logits among a task's classes, written naively."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from fastcil.contract import Task
from fastcil.data import Examples, ImageStore
from fastcil.memory.task_means import TaskMeans
from fastcil.nn import TaskOutputs


class _Method(nn.Module):
    """Logits are a table's rows, as a scan reads them."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.network = SimpleNamespace(head=nn.Linear(2, 2))
        self.context = SimpleNamespace(scan=lambda function, examples: table)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 5, generator=generator)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 4, 4, 4])  # none of class 3
    images = ImageStore.from_batch(torch.zeros(9, 4, 4, 3, dtype=torch.uint8))
    task = Task(1, (3, 4), 3, Examples(images, labels), Examples(images, labels))
    outputs = TaskOutputs()
    outputs.add(3)
    outputs.add(2)
    means, method = TaskMeans(outputs), _Method(table)
    means.reserve(method.network, 5)  # type: ignore[arg-type]
    assert means.means.shape == (5, 5)
    means.take(method, task)  # type: ignore[arg-type]
    assert means.retained().nbytes == 100
    seen = torch.randn(4, 5, generator=generator)
    scores = means.readouts(lambda x: x)["nme"](seen)
    for b in range(4):
        for y in range(5):
            own = [0, 1, 2] if y < 3 else [3, 4]
            if y == 3:
                assert scores[b, y] == -torch.inf
                continue
            mean = table[labels == y].double().mean(0).numpy()
            expected = -sum((float(seen[b, c]) - mean[c]) ** 2 for c in own)
            np.testing.assert_allclose(float(scores[b, y]), expected, rtol=1e-5, atol=1e-5)


def test_without_exemplars_there_are_none() -> None:
    images = ImageStore.from_batch(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
    examples = Examples(images, torch.tensor([0, 1]))
    means = TaskMeans(TaskOutputs())
    method = _Method(torch.empty(0, 2))
    means.reserve(method.network, 2)  # type: ignore[arg-type]
    means.take(method, Task(0, (0, 1), 0, examples, examples.select([])))  # type: ignore[arg-type]
    assert means.readouts(lambda x: x) == {}
