"""Centres of clusters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcil.errors import FastcilError

_STARTS = 10


def cluster_centres(vectors: Tensor, clusters: int, seed: int) -> Tensor:
    """Centres that k-means finds (Lloyd 1982), by SciPy: the best of ten starts by k-means++.

    Where there are fewer vectors than ``clusters``, or fewer different ones, the centres that
    there are come again in turn.

    Args:
        vectors: At least one, of any floating dtype, on any device.  # [N, D]
        clusters: Number k of rows of the result.
        seed: Of the random starts.

    Returns:
        Of the vectors' dtype and device; the same bits for the same seed.  # [k, D]

    Raises:
        FastcilError: No vector, or one that isn't finite; k below 1.

    Example:
        >>> vectors = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
        >>> cluster_centres(vectors, 2, seed=0).sort(0).values.flatten()
        tensor([0.1000, 5.1000])
    """
    from scipy.cluster.vq import kmeans, kmeans2

    if vectors.ndim != 2 or not len(vectors):
        raise FastcilError(
            f"vectors has shape {tuple(vectors.shape)}; it must be [N, D] with at least one row."
        )
    if clusters < 1:
        raise FastcilError(f"clusters is {clusters}; it must be at least 1.")
    points = vectors.detach().double().cpu()
    if not points.isfinite().all():
        raise FastcilError(
            "vectors holds NaN or infinity; training has diverged: lower the learning rate."
        )
    different = points.unique(dim=0)
    if len(different) <= clusters:
        centres = different
    else:
        data, rng = points.numpy(), np.random.default_rng(seed)
        starts = (kmeans2(data, clusters, 1, minit="++", rng=rng)[0] for _ in range(_STARTS))
        found = min((kmeans(data, start) for start in starts), key=lambda pair: pair[1])
        centres = torch.from_numpy(found[0])
    return centres[torch.arange(clusters) % len(centres)].to(vectors)
