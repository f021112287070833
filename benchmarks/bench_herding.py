"""Herding: fastcil.ops.herding beside the loops in which it is usually written.

100 classes of 500 images, float32 features of 512 numbers, 20 picks each. "loop" is the published
algorithm, class after class and pick after pick, in float64 as ours; "batched" takes one pick of
all classes at a time in PyTorch.

A way is timed only after its picks have been compared with the algorithm's.
"""

from __future__ import annotations

from functools import partial

import torch
from op_case import OURS, OpCase, Step
from torch import Tensor
from torch.nn import functional

from fastcil import ops
from fastcil.ops.herding import _herding


def loop(features: Tensor, starts: Tensor, limit: int) -> Tensor:
    """Rebuffi et al. 2017, Alg. 4."""
    orders = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        unit = functional.normalize(features[begin:end].double(), dim=1)
        mean, total = unit.mean(0), torch.zeros_like(unit[0])
        order: list[int] = []
        left = torch.ones(len(unit), dtype=torch.bool)
        for k in range(1, limit + 1):
            gap = (mean - (unit + total) / k).square().sum(1)
            pick = int(gap.masked_fill(~left, torch.inf).argmin())
            order.append(pick)
            left[pick] = False
            total += unit[pick]
        orders.append(torch.tensor(order))
    return torch.stack(orders)


def make(name: str, full: bool) -> Step:
    """A way to pick, checked."""
    classes, images, width, limit = (100, 500, 512, 20) if full else (4, 20, 8, 5)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(classes * images, width, generator=generator).relu()
    starts = torch.arange(classes + 1) * images
    pick = {OURS: ops.herding, "batched": _herding, "loop": loop}[name]
    few = min(classes, 5)
    some = features[: few * images], starts[: few + 1], limit
    assert torch.equal(pick(*some), loop(*some)), f"{name} picks others"
    return partial(pick, features, starts, limit)


CASES = [OpCase("herding", "100 classes of 500x512, 20 picks", (OURS, "batched", "loop"), make)]
