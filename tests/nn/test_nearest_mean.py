"""Class means and their scores against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil.nn.nearest_mean import class_means, nearest_mean_scores


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([0, 1, 2], 3), ([1, 1, 0, 1], 2), ([0, 3, 3], 5), ([], 2)],
    ids=str,
)
@pytest.mark.parametrize("width", [1, 7])
def test_against_loops(labels, classes, width):
    generator = torch.Generator().manual_seed(len(labels) + width)
    features = 3 * torch.randn(len(labels), width, generator=generator)
    queries = torch.randn(4, width, generator=generator)
    means = class_means(features, torch.tensor(labels, dtype=torch.int64), classes)
    scores = nearest_mean_scores(queries, means)
    assert means.shape == (classes, width) and scores.shape == (4, classes)
    for y in range(classes):
        rows = [f.double().numpy() for f, label in zip(features, labels, strict=True) if label == y]
        if not rows:
            assert (means[y] == 0).all() and (scores[:, y] == -torch.inf).all()
            continue
        mean = sum(r / np.linalg.norm(r) for r in rows)
        if np.linalg.norm(mean) < 1e-6:
            continue
        mean = mean / np.linalg.norm(mean)
        np.testing.assert_allclose(means[y], mean, atol=1e-5)
        for b, query in enumerate(queries.double().numpy()):
            unit = query / np.linalg.norm(query)
            assert float(scores[b, y]) == pytest.approx(-((unit - mean) ** 2).sum(), abs=1e-5)


def test_half_precision_features_give_float32():
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    means = class_means(features.bfloat16(), labels, 2)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, class_means(features, labels, 2), atol=1e-2, rtol=0)
    assert nearest_mean_scores(features.bfloat16(), means).dtype == torch.float32


def test_no_queries():
    assert nearest_mean_scores(torch.empty(0, 3), torch.eye(3)).shape == (0, 3)
