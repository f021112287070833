"""Codes of all classes reduced to what may be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fastcil.data import Examples
from fastcil.errors import FastcilError
from fastcil.memory.episodes import Costs, Group, Rows


def fitting_rows(
    sources: Mapping[Group, Rows | Examples],
    encode: Callable[[Examples], Tensor],
    allowed: float,
    costs: Costs,
    dtype: torch.dtype,
    seed: int,
) -> dict[Group, Rows]:
    """All rows if they fit, else of each group as many clusters as its share holds.

    Groups share alike, as in the released code of Ayub and Wagner (2021), whose budget is a number
    of centroids.

    Args:
        sources: Of each class and task the rows there are, or images to be encoded.
        encode: Images -> codes [n, D]; asked group by group.
        allowed: Bytes that all rows together may cost.
        costs: By which they are counted.
        dtype: In which they are kept.
        seed: Of the clusters' starts.

    Returns:
        The rows of each group, in float32 on the CPU.

    Raises:
        FastcilError: Codes that are not finite in that dtype.

    Example:
        >>> rows = Rows.single(torch.tensor([[0.0], [0.2], [5.0], [5.2]]))
        >>> sources, costs = {(0, 0): rows, (1, 0): rows}, Costs(1, 0, 4)
        >>> kept = fitting_rows(sources, torch.tensor, 80, costs, torch.float32, seed=0)
        >>> [len(part) for part in kept.values()]
        [2, 2]
    """
    cost = sum(
        costs.of(source) if isinstance(source, Rows) else len(source) * costs.row
        for source in sources.values()
    )
    kept = {}
    for (label, task), source in sources.items():
        rows = source if isinstance(source, Rows) else _encoded(source, encode, dtype)
        if cost > allowed:
            rows = reduce_rows(rows, int(allowed) // len(sources), costs, seed + label)
        kept[label, task] = rows
    return kept


def reduce_rows(rows: Rows, quota: int, costs: Costs, seed: int) -> Rows:
    """As many clusters of a class's rows as fit; the rows themselves if all do.

    Where not even one centroid with its covariance fits, the row nearest to the mean of all is
    kept as a single code.

    Args:
        rows: Of one class.
        quota: Bytes that they may cost, at least those of a single code.
        costs: By which they are counted.
        seed: Of the clusters' start.

    Example:
        >>> rows = Rows.single(torch.tensor([[0.0], [0.2], [5.0], [5.2]]))
        >>> few = reduce_rows(rows, quota=40, costs=Costs(1, 0, 4), seed=0)
        >>> few.centres.sort(0).values.flatten(), few.counts
        (tensor([0.1000, 5.1000]), tensor([2, 2]))
    """
    if costs.of(rows) <= quota:
        return rows
    clusters = quota // costs.cluster
    if clusters:
        return _merged(rows, _assignment(rows.centres, clusters, seed))
    share = (rows.counts / rows.counts.sum())[:, None]
    nearest = (rows.centres - (share * rows.centres).sum(0)).square().sum(1).argmin()
    return Rows.single(rows.centres[nearest][None])


def _encoded(images: Examples, encode: Callable[[Examples], Tensor], dtype: torch.dtype) -> Rows:
    """Codes of images, rounded as they will be kept."""
    codes = encode(images).to(dtype).float().cpu()
    if not codes.isfinite().all():
        raise FastcilError(
            f"the codes of images hold NaN or infinity as {dtype}; the autoencoder has diverged: "
            f"lower its learning rate, or keep codes as float32."
        )
    return Rows.single(codes)


def _assignment(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Cluster of each point [N] by k-means (Lloyd 1982), from different points as a start."""
    from scipy.cluster.vq import kmeans, vq

    data = points.double().numpy()
    different = np.unique(data, axis=0)
    if len(different) > clusters:
        start = np.random.default_rng(seed).permutation(len(different))[:clusters]
        different = kmeans(data, different[start])[0]
    found = torch.from_numpy(vq(data, different)[0]).long()
    return found.unique(return_inverse=True)[1]


def _merged(rows: Rows, assignment: Tensor) -> Rows:
    """Mean and variances of the codes that each cluster's rows stand for."""
    member = torch.nn.functional.one_hot(assignment).double().T  # [K, R]
    counts = member @ rows.counts.double()  # [K]
    weight = member * rows.counts / counts[:, None]  # [K, R]
    centres = weight @ rows.centres.double()  # [K, D]
    away = rows.centres.double() - centres[assignment]  # [R, D]
    variances = weight @ (rows.variances.double() + away.square())
    return Rows(centres.to(rows.centres), variances.to(rows.centres), counts.round().long())
