"""What exemplars cost in a budget's unit, how many of them fit, and that no more are held."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.memory.budget import Budget
from fastcil.memory.codecs import Codec, Encoded

# Costs in images are sums of fractions, good to about 1e-12; bytes are whole numbers.
SLACK = 1e-9


def costs(images: Encoded, codec: Codec[Any], budget: Budget) -> Tensor:
    """What each image costs in the budget's unit, float64 [N]."""
    if budget.unit == "images":
        return codec.units(images).double()
    return codec.nbytes(images).double()


def affordable(cost: Tensor, quota: float) -> int:
    """Length of the longest prefix that costs no more than the quota; every cost is positive.

    Example:
        >>> affordable(torch.tensor([2.0, 1.0, 1.0]), quota=3)
        2
    """
    return int((cost.cumsum(0) <= quota + SLACK).sum())


def most_picks(cost: Tensor, quota: float) -> int:
    """As many picks as could fit, whichever they are, and one more.

    Example:
        >>> most_picks(torch.tensor([2.0, 4.0, 2.0, 3.0]), quota=4)
        3
    """
    if not len(cost) or math.isinf(quota):
        return len(cost)
    return min(len(cost), int((quota + SLACK) / float(cost.amin())) + 1)


def prefixes(
    labels: Tensor, cost: Tensor, quota: float, without: Collection[int]
) -> tuple[Tensor, list[float]]:
    """Of each class the longest prefix within the quota.

    Args:
        labels: Ascending, [N], on the CPU.
        cost: What each exemplar costs, [N], on the CPU.
        quota: What a class may cost.
        without: Classes left out.

    Returns:
        Positions, int64 [n], and what the first exemplar of each class that keeps none would cost.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 2, 3])
        >>> prefixes(labels, torch.tensor([1.0, 1.0, 1.0, 5.0, 1.0]), 2, {3})
        (tensor([0, 1]), [5.0])
    """
    index, too_dear, start = [labels.new_empty(0, dtype=torch.int64)], [], 0
    for label, count in enumerate(torch.bincount(labels).tolist()):
        if count and label not in without:
            length = affordable(cost[start : start + count], quota)
            index.append(torch.arange(start, start + length))
            if length == 0:
                too_dear.append(float(cost[start]))
        start += count
    return torch.cat(index), too_dear


def check_others(budget: Budget, classes: int, other_nbytes: int) -> None:
    """Refuses a budget that cannot even hold what is not exemplars."""
    if budget.unit == "bytes" and other_nbytes > budget.limit(classes):
        least = budget.smallest(0, classes, other_nbytes)
        raise FastcilError(
            f"memory is '{budget}', but the method keeps {other_nbytes} bytes beside "
            f"exemplars; pass at least '{least}'."
        )


def check_fit(
    kept: Sequence[Encoded], codec: Codec[Any], budget: Budget, classes: int, other_nbytes: int
) -> None:
    """Holds the promise of the budget, whatever a codec says its exemplars cost."""
    in_bytes = budget.unit == "bytes"
    if in_bytes:
        labels = 4 * sum(len(images) for images in kept)
        total = float(sum(images.nbytes for images in kept) + labels + other_nbytes)
    else:
        total = sum(float(costs(images, codec, budget).sum()) for images in kept)
    limit = budget.limit(classes)
    if total > limit + (0 if in_bytes else SLACK * max(1, classes)):
        raise FastcilError(
            f"internal error: memory would hold {total:.12g} {budget.unit}, more than "
            f"its budget '{budget}'; codec '{codec.name}' counts less than it keeps."
        )


def too_small(budget: Budget, dear: Sequence[float], classes: int, other_nbytes: int) -> str:
    """Says that some classes have no exemplar, and what budget would hold one each.

    Args:
        budget: The budget.
        dear: Of each such class, what its first exemplar would cost.
        classes: Classes known.
        other_nbytes: Bytes of everything else that counts.
    """
    quota = budget.quota(classes, other_nbytes)
    least = budget.smallest(max(dear), classes, other_nbytes)
    return (
        f"memory is '{budget}', which leaves {quota:.0f} {budget.unit} for each of "
        f"{classes} classes, too little for one exemplar of {len(dear)} of them; '{least}' "
        f"would hold one of each."
    )
