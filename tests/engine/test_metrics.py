"""Metrics against their definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcil.engine import metrics


def naive_matrix(correct, count, tasks):
    matrix = [[math.nan] * len(tasks) for _ in tasks]
    for t in range(len(tasks)):
        start = 0
        for j in range(t + 1):
            right = total = 0
            for c in range(start, start + tasks[j]):
                right += correct[t][c]
                total += count[t][c]
            start += tasks[j]
            matrix[t][j] = 100 * right / total
    return np.array(matrix)


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    tasks = [3, 2, 2, 1]
    known = np.cumsum(tasks)
    count = [rng.integers(5, 20, k).tolist() for k in known]
    correct = [[int(rng.integers(0, n + 1)) for n in row] for row in count]
    return tasks, correct, count


def test_accuracy_matrix_of_uneven_tasks(counts):
    tasks, correct, count = counts
    ours = metrics.accuracy_matrix(correct, count, tasks)
    np.testing.assert_allclose(ours, naive_matrix(correct, count, tasks))


def test_curve_pools_images_not_tasks(counts):
    _, correct, count = counts
    expected = [100 * sum(a) / sum(b) for a, b in zip(correct, count, strict=True)]
    np.testing.assert_allclose(metrics.accuracy_curve(correct, count), expected)


def test_forgetting_and_backward_transfer(counts):
    tasks, correct, count = counts
    a = naive_matrix(correct, count, tasks)
    last = len(tasks) - 1
    forgotten = [max(a[t][j] for t in range(j, last)) - a[last][j] for j in range(last)]
    moved = [a[last][j] - a[j][j] for j in range(last)]
    assert metrics.forgetting(a) == pytest.approx(sum(forgotten) / last)
    assert metrics.backward_transfer(a) == pytest.approx(sum(moved) / last)


def test_a_task_without_new_classes_has_nothing_to_forget(counts):
    tasks, correct, count = counts
    with_it = [3, 2, 0, 2, 1]
    correct, count = ([*rows[:2], rows[1], *rows[2:]] for rows in (correct, count))
    matrix = metrics.accuracy_matrix(correct, count, with_it)
    assert np.isnan(matrix[:, 2]).all()
    own = np.delete(np.delete(matrix, 2, 0), 2, 1)
    np.testing.assert_allclose(own, naive_matrix(counts[1], counts[2], tasks))
    assert metrics.forgetting(matrix) == pytest.approx(metrics.forgetting(own))
    assert metrics.backward_transfer(matrix) == pytest.approx(metrics.backward_transfer(own))
    again = np.array([[80.0, np.nan], [60.0, np.nan]])
    assert metrics.forgetting(again) == 20.0 and metrics.backward_transfer(again) == -20.0


def test_one_task_forgets_nothing():
    matrix = np.array([[70.0]])
    assert metrics.forgetting(matrix) == metrics.backward_transfer(matrix) == 0.0


def test_forward_transfer_is_accuracy_ahead_minus_chance():
    rng = np.random.default_rng(0)
    count, among = rng.integers(5, 30, 4).tolist(), [3, 5, 5, 7]
    correct = [int(rng.integers(0, n + 1)) for n in count]
    ahead = [
        {"correct": right, "count": total, "among": k}
        for right, total, k in zip(correct, count, among, strict=True)
    ]
    wanted = sum(100 * correct[t] / count[t] - 100 / among[t] for t in range(1, 4)) / 3
    for first in (None, ahead[0]):
        assert metrics.forward_transfer([first, *ahead[1:]]) == pytest.approx(wanted)
    assert metrics.forward_transfer([None, ahead[1], None]) is None, "not all were measured"
    assert metrics.forward_transfer([None]) is None and metrics.forward_transfer([]) is None


@pytest.mark.parametrize("old", [0, 2])
def test_outputs_drawn_at_random_are_right_by_chance(old):
    """What b_t stands on: fresh rows among themselves are each first as often."""
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).double() + 1
    labels = torch.arange(40) % 3
    rights = []
    torch.manual_seed(2)
    for _ in range(3000):
        scores = torch.nn.Linear(6, 3, dtype=torch.float64)(features)
        if old:  # Trained rows that are always first: among all classes no new one is right.
            scores = torch.cat([torch.full((40, old), 99.0), scores], 1)
        rights.append((scores.argmax(1) == labels + old).double().mean().item())
    wanted, spread = (0.0 if old else 1 / 3), np.std(rights) / 3000**0.5
    assert abs(np.mean(rights) - wanted) <= 4 * spread


@pytest.mark.parametrize("n, quantile", [(3, 4.302653), (5, 2.776445), (10, 2.262157)])
def test_interval_is_students(n, quantile):
    values = np.random.default_rng(n).normal(60, 5, n).tolist()
    mean, half = metrics.mean_interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert half == pytest.approx(quantile * np.std(values, ddof=1) / math.sqrt(n), rel=1e-5)


def test_no_interval_of_two():
    assert metrics.mean_interval([1.0, 3.0]) == (2.0, None)


def test_base_and_novel_pool_test_images():
    """Classes of different sizes: summed, not averaged over classes."""
    correct = [[3, 10], [2, 10, 1], [0, 0, 1, 30]]
    count = [[5, 40], [5, 40, 2], [5, 40, 2, 50]]
    base, novel = metrics.base_and_novel(correct, count, 2)
    assert base == pytest.approx([100 * 13 / 45, 100 * 12 / 45, 0.0])
    assert np.isnan(novel[0]) and novel[1:] == pytest.approx([50.0, 100 * 31 / 52])
    harmonic = metrics.harmonic_mean(base, novel)
    assert np.isnan(harmonic[0]) and harmonic[2] == 0.0
    assert harmonic[1] == pytest.approx(2 / (45 / 1200 + 1 / 50))
    curve = metrics.accuracy_curve(correct, count)
    assert metrics.performance_drop(curve) == pytest.approx(100 * (13 / 45 - 31 / 97))


def test_harmonic_mean_of_nothing_is_nothing():
    assert metrics.harmonic_mean(np.zeros(1), np.zeros(1)).tolist() == [0.0]
