"""One exemplar of each class in every step."""

from __future__ import annotations

import torch

from fastcil.contract import Task
from fastcil.data import Examples, ImageStore
from fastcil.memory.one_each import OneEach

LABELS = torch.tensor([0, 0, 0, 2, 2, 5])


def test_one_of_each_class_uniformly() -> None:
    torch.manual_seed(0)
    draw, seen = OneEach(), torch.zeros(6)
    draw.begin()
    for _ in range(3000):
        found = draw.pool(LABELS, first=10) - 10
        assert sorted(LABELS[found].tolist()) == [0, 2, 5]
        assert torch.equal(found, draw.pool(LABELS, first=10) - 10), "the same until it goes on"
        seen[found] += 1
        draw.go_on()
    torch.testing.assert_close(
        seen / 3000, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5, 1.0]), atol=0.03, rtol=0
    )


def test_a_saved_draw_goes_on() -> None:
    draw, twin = OneEach(), OneEach()
    draw.begin()
    draw.go_on()
    twin.load_state_dict(draw.state_dict())
    for _ in range(5):
        assert torch.equal(draw.pool(LABELS, 0), twin.pool(LABELS, 0))
        draw.go_on()
        twin.go_on()


def test_stream_reads_exemplars_only() -> None:
    images = ImageStore.from_batch(torch.zeros(9, 4, 4, 3, dtype=torch.uint8))
    everything = Examples(images, torch.cat([torch.tensor([6, 6, 7]), LABELS]))
    task = Task(1, (6, 7), 6, everything.select([0, 1, 2]), everything.select(range(3, 9)))
    stream = OneEach().stream(task)
    assert stream.batch_size == 3 and stream.parts == (task.examples, task.exemplars)
    assert sorted(everything.labels[stream.pool()].tolist()) == [0, 2, 5]
    assert (stream.pool() >= 3).all()
