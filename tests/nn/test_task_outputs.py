"""Slices of one head that stand for heads of their own."""

import pytest
import torch

from fastcil.nn import TaskOutputs


@pytest.mark.parametrize("brought", [[3], [2, 3], [1, 0, 2, 2], [2, 2, 0]])
def test_each_row_is_the_softmax_of_its_own_task(brought):
    outputs = TaskOutputs()
    for count in brought:
        outputs.add(count)
    classes = sum(brought)
    labels = torch.arange(classes)
    logits = torch.randn(classes, classes, dtype=torch.float64, requires_grad=True)
    losses = outputs.cross_entropy(logits, labels, reduction="none")
    start, expected = 0, []
    for count in brought:
        for label in range(start, start + count):
            own = logits[label, start : start + count]
            expected.append(own.logsumexp(0) - logits[label, label])
        start += count
    assert torch.allclose(losses, torch.stack(expected), atol=1e-14)
    losses.sum().backward()
    assert torch.equal(logits.grad != 0, outputs.own(labels, classes) & (losses != 0)[:, None])
    assert torch.allclose(outputs.cross_entropy(logits, labels), losses.mean())


def test_outputs_are_saved_with_what_holds_them():
    outputs = TaskOutputs()
    outputs.add(2)
    assert outputs.state_dict()["brought"].tolist() == [2]


def test_one_softmax_for_all():
    outputs = TaskOutputs("all")
    outputs.add(2)
    outputs.add(3)
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 1])
    assert outputs.masked(logits, labels) is logits
    assert torch.equal(
        outputs.cross_entropy(logits, labels), torch.nn.functional.cross_entropy(logits, labels)
    )
