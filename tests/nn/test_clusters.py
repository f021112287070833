"""k-means: what Lloyd's equations say of the centres, and how few points are dealt with."""

from __future__ import annotations

import pytest
import torch

from fastcil.errors import FastcilError
from fastcil.nn.clusters import cluster_centres


def blobs(count: int, each: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around ``count`` places far apart, and the mean of each."""
    generator = torch.Generator().manual_seed(count)
    places = 10 * torch.randn(count, 1, width, generator=generator)
    points = places + 0.01 * torch.randn(count, each, width, generator=generator)
    return points.flatten(0, 1)[torch.randperm(count * each, generator=generator)], points.mean(1)


@pytest.mark.parametrize("count, each, width", [(3, 20, 5), (10, 9, 8), (1, 4, 2)])
def test_clusters_that_are_far_apart_are_found(count, each, width):
    points, means = blobs(count, each, width)
    centres = cluster_centres(points, count, seed=0)
    assert centres.shape == (count, width) and centres.dtype == points.dtype
    distances = torch.cdist(means, centres)
    assert distances.min(1).values.max() < 1e-4
    assert len(distances.argmin(1).unique()) == count


def test_a_centre_is_the_mean_of_what_is_nearest_to_it():
    points = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    centres = cluster_centres(points, 4, seed=3)
    nearest = torch.cdist(points, centres).argmin(1)
    for k, centre in enumerate(centres):
        torch.testing.assert_close(points[nearest == k].mean(0), centre, rtol=0, atol=0.05)


def test_same_seed_same_bits():
    points = torch.rand(80, 6, generator=torch.Generator().manual_seed(2))
    first, again, other = (cluster_centres(points, 5, seed=s) for s in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("rows, clusters", [(1, 10), (3, 10), (4, 4), (3, 2)])
def test_few_points_come_again_in_turn(rows, clusters):
    points = torch.eye(rows, 5)
    repeated = points.repeat(3, 1)
    centres = cluster_centres(repeated, clusters, seed=0)
    assert centres.shape == (clusters, 5)
    if rows <= clusters:
        counts = [int((centres == point).all(1).sum()) for point in points]
        assert sum(counts) == clusters and max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    "points, clusters, says",
    [
        (torch.zeros(0, 3), 2, r"vectors has shape \(0, 3\)"),
        (torch.zeros(3), 2, r"vectors has shape \(3,\)"),
        (torch.zeros(2, 2), 0, "clusters is 0"),
        (torch.tensor([[1.0, torch.nan]]), 2, "vectors holds NaN or infinity"),
    ],
)
def test_bad_arguments(points, clusters, says):
    with pytest.raises(FastcilError, match=says):
        cluster_centres(points, clusters, seed=0)
