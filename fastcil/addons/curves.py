"""The learnable activations of a CIM branch: where they are, and how far they got from ReLU."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastcil.contract import Record
from fastcil.nn import AggregatedBackbone, Pade

LAST_BLOCK = "last-block"
_REACH = 3.0
_POINTS = 601
_SHOWN = 4


def blocks(extractor: nn.Module) -> list[list[str]]:
    """Names of an extractor's ReLU modules, by the block that they are in, from the input on.

    A block is a part of the extractor as its author divided it: its stem and each of its stages
    for a ResNet. Containers that only list parts, or hold but one that has activations, are no
    division. A module used in several places counts once. Of an extractor with two branches
    (`fastcil.nn.AggregatedBackbone`) a block is that of both, the stable branch's part first.

    Example:
        >>> from fastcil.nn import resnet18
        >>> [len(names) for names in blocks(resnet18(width=4))]
        [1, 4, 4, 4, 4]
    """
    if isinstance(extractor, nn.ReLU):
        return [[""]]
    if isinstance(extractor, AggregatedBackbone):
        branches = {"stable": extractor.stable, "plastic": extractor.plastic}
        named = [
            [[f"{branch}.{name}" for name in block] for block in blocks(part)]
            for branch, part in branches.items()
        ]
        return [[*ours, *theirs] for ours, theirs in zip(*named, strict=True)]
    found: list[tuple[str, nn.Module, list[str]]] = []
    seen: set[int] = set()
    for name, part in _divided(extractor):
        mine = []
        for inner, module in part.named_modules():
            if isinstance(module, nn.ReLU) and id(module) not in seen:
                seen.add(id(module))
                mine.append(f"{name}.{inner}" if inner else name)
        if mine:
            found.append((name, part, mine))
    if len(found) == 1 and len(found[0][2]) > 1:
        name, part, _ = found[0]
        return [[f"{name}.{inner}" for inner in block] for block in blocks(part)]
    return [mine for _, _, mine in found]


def _divided(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module's parts, lists of parts taken apart."""
    for name, part in module.named_children():
        if isinstance(part, nn.ModuleList):
            for inner, listed in _divided(part):
                yield f"{name}.{inner}", listed
        else:
            yield name, part


def learnable_blocks(extractor: nn.Module, places: str) -> list[list[str]]:
    """The blocks whose activations are learned: all, or the last (Luo et al. 2023, Table 3)."""
    found = blocks(extractor)
    return found[-1:] if places == LAST_BLOCK else found


def learnable(extractor: nn.Module, places: str) -> list[str]:
    """Names of the activations that a branch learns, from the input on."""
    return [name for block in learnable_blocks(extractor, places) for name in block]


def inherited(curves: Sequence[Pade], extractor: nn.Module, places: str) -> list[Pade]:
    """The curves of an extractor that comes after one that had these.

    Those of an extractor of the same build go on. Where one became two branches, as in AANets, each
    branch has its own, which start as the one's were. What is of another build starts as ReLU.

    Args:
        curves: Of the extractor before, from the input on.
        extractor: The one that needs curves.
        places: Which it learns, as in `learnable`.
    """
    wanted = [len(block) for block in learnable_blocks(extractor, places)]
    if len(curves) == sum(wanted):
        return list(curves)
    if isinstance(extractor, AggregatedBackbone) and 2 * len(curves) == sum(wanted):
        parts = torch.arange(len(curves)).split([count // 2 for count in wanted])
        return [
            curve if branch == 0 else copy.deepcopy(curve)
            for part in parts
            for branch in range(2)
            for curve in (curves[k] for k in part.tolist())
        ]
    return [Pade() for _ in range(sum(wanted))]


@torch.no_grad()
def distances(curves: Sequence[Pade]) -> Tensor:
    r"""How far each curve is from ReLU: :math:`\int_{-3}^{3} |f(x) - \max(0, x)|\,dx`.

    By the trapezoidal rule on 601 points, as in Luo et al. 2023, supplement 4 (Fig. S1).

    Returns:
        float64 [places], on the CPU.

    Example:
        >>> distances([Pade()]).shape
        torch.Size([1])
    """
    x, values = _drawn(curves)
    return torch.trapezoid((values - x.relu()).abs(), x).double()


def append_row(rows: Tensor, row: Tensor) -> Tensor:
    """``rows`` [T, P] with one more [P'], NaN where one of them is shorter, [T + 1, max(P, P')].

    Example:
        >>> append_row(torch.zeros(1, 2), torch.ones(1))
        tensor([[0., 0.],
                [1., nan]])
    """
    width = max(rows.shape[1], len(row))
    both = rows.new_full((len(rows) + 1, width), torch.nan)
    both[:-1, : rows.shape[1]] = rows
    both[-1, : len(row)] = row.to(rows)
    return both


def _drawn(curves: Sequence[Pade]) -> tuple[Tensor, Tensor]:
    """Points [P] and the curves there [places, P], on the CPU."""
    x = torch.linspace(-_REACH, _REACH, _POINTS).to(curves[0].numerator)
    return x.cpu(), torch.stack([curve(x) for curve in curves]).cpu()


@torch.no_grad()
def shape_record(curves: Sequence[Pade]) -> Record:
    """Some of the curves beside ReLU."""
    x, values = _drawn(curves)
    last = len(values) - 1
    shown = sorted({round(last * i / (_SHOWN - 1)) for i in range(_SHOWN)})
    thinned = slice(None, None, 10)
    return Record(
        "curve",
        "Learned activations",
        {
            "x": x[thinned].tolist(),
            "y": {
                "ReLU": x.relu()[thinned].tolist(),
                **{f"place {i}": values[i, thinned].tolist() for i in shown},
            },
            "xlabel": "x",
            "ylabel": "f(x)",
        },
    )


def place_record(measured: Tensor) -> Record:
    """The distance of each curve from ReLU, after the last task.

    Args:
        measured: `distances`, [places].
    """
    return Record(
        "curve",
        "Distance of the learned activations from ReLU",
        {
            "x": list(range(len(measured))),
            "y": {"integral of |f - ReLU| over [-3, 3]": measured.tolist()},
            "xlabel": "place, from the input on",
            "ylabel": "distance",
        },
    )


def task_record(measured: Tensor, sizes: Sequence[int]) -> Record:
    """The mean distance from ReLU in each block, by task (Luo et al. 2023, Fig. S1).

    Args:
        measured: `distances` after each task, [T, places]; NaN where there was no curve.
        sizes: Places of each block; their sum is the number of places.
    """
    parts = measured[:, : sum(sizes)].split(list(sizes), 1)
    means = torch.stack([part.mean(1) for part in parts]).tolist()
    names = [f"block {k}" for k in range(len(sizes))]
    names[-1] = "last block"
    return Record(
        "curve",
        "Distance from ReLU by block and task",
        {
            "x": list(range(len(measured))),
            "y": {
                name: [None if math.isnan(value) else value for value in row]
                for name, row in zip(names, means, strict=True)
            },
            "xlabel": "task",
            "ylabel": "mean distance",
        },
    )
