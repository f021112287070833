"""What follows from the counts of correctly classified test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def accuracy_matrix(
    correct: Sequence[Sequence[int]], count: Sequence[Sequence[int]], tasks: Sequence[int]
) -> Array:
    """Accuracy in percent on each task's classes, after each task.

    Args:
        correct: [T][K_t] images of each known class classified correctly after task t.
        count: [T][K_t] test images of each class.
        tasks: Classes that each task brought.

    Returns:
        [T, T]; row t, column j is the accuracy on the classes that first came with task j, after
        task t; NaN for j > t and for a task that brought no new class. In a data-incremental
        stream, whose classes all come with the first task, only the first column has values:
        the accuracy on all classes after each task.

    Example:
        >>> accuracy_matrix([[8], [4, 9]], [[10], [10, 10]], [1, 1])
        array([[80., nan],
               [40., 90.]])
    """
    edges = np.concatenate([[0], np.cumsum(tasks)])
    matrix = np.full((len(correct), len(tasks)), np.nan)
    for t, (right, total) in enumerate(zip(correct, count, strict=True)):
        for j in range(t + 1):
            images = sum(total[edges[j] : edges[j + 1]])
            if images:
                matrix[t, j] = 100.0 * sum(right[edges[j] : edges[j + 1]]) / images
    return matrix


def accuracy_curve(correct: Sequence[Sequence[int]], count: Sequence[Sequence[int]]) -> Array:
    """Accuracy in percent over all test images of all classes known, after each task.

    Example:
        >>> accuracy_curve([[8], [4, 9]], [[10], [10, 10]])
        array([80., 65.])
    """
    pairs = zip(correct, count, strict=True)
    return np.array([100.0 * sum(right) / max(1, sum(total)) for right, total in pairs])


def forgetting(matrix: Array) -> float:
    """Mean over earlier tasks of the best past accuracy minus the last (Chaudhry et al. 2018).

    F = 1/(T-1) sum_{j<T} (max_{l<T} a_{l,j} - a_{T,j}), in percentage points (their Eq. 3 for
    k = T); 0 with a single task. Tasks that brought no new class are left out of the mean; what
    a data-incremental stream forgets is the best past accuracy on all classes minus the last,
    below 0 where it only gained.

    Example:
        >>> forgetting(np.array([[80.0, np.nan], [40.0, 90.0]]))
        40.0
    """
    if len(matrix) < 2:
        return 0.0
    past, last = matrix[:-1, :-1], matrix[-1, :-1]
    # A task that brought no new class has no column to forget.
    own = ~np.isnan(last)
    return float(np.mean(np.nanmax(past[:, own], axis=0) - last[own])) if own.any() else 0.0


def backward_transfer(matrix: Array) -> float:
    """Mean over earlier tasks of a_{T,j} - a_{j,j} (Lopez-Paz and Ranzato 2017, Eq. 3).

    In percentage points, averaged over the T - 1 earlier tasks; 0 with a single task. Code
    descended from theirs averages over all T, the last with its 0: (T - 1) / T of this. Tasks that
    brought no new class are left out of the mean; a data-incremental stream's figure is the last
    accuracy on all classes minus that after the first task.

    Example:
        >>> backward_transfer(np.array([[80.0, np.nan], [40.0, 90.0]]))
        -40.0
    """
    if len(matrix) < 2:
        return 0.0
    moved = (matrix[-1] - np.diag(matrix))[:-1]
    return float(np.nanmean(moved)) if not np.isnan(moved).all() else 0.0


def forward_transfer(ahead: Sequence[Mapping[str, int] | None]) -> float | None:
    r"""Mean over later tasks of a_{t-1,t} - b_t (Lopez-Paz and Ranzato 2017, Eq. 4).

    .. math:: \mathrm{FWT} = \frac{1}{T-1} \sum_{t=2}^{T} (a_{t-1,t} - b_t)

    in percentage points: a_{t-1,t} is the accuracy on task t's test images before anything was
    trained on the task, b_t that of a network at random initialisation. Heads grow here, so
    a_{t-1,t} is taken once there are outputs for the task's classes. b_t is chance, 1 / K of the K
    classes that are compared: the rows of a linear head are drawn alike, so exchanging two of them
    is as likely a draw, and each class is as often first as any other.

    By the same symmetry a_{t-1,t} is b_t in expectation wherever the outputs that are compared are
    all fresh: in a task-incremental stream whose heads start at random, any FWT is luck. Among all
    known classes trained outputs tend to outdo fresh ones, and FWT is near -1 / K. It tells
    something where new outputs are imprinted, or where tasks bring no new classes.

    Args:
        ahead: Of each task ``correct`` images of ``count`` before it was trained, compared
            ``among`` so many classes; the first is not looked at.

    Returns:
        None if a later task was not measured, or there is none.

    Example:
        >>> forward_transfer([None, {"correct": 6, "count": 8, "among": 2}])
        25.0
    """
    later = [task for task in ahead[1:] if task is not None]
    if not later or len(later) < len(ahead) - 1:
        return None
    return float(np.mean([100 * (t["correct"] / t["count"] - 1 / t["among"]) for t in later]))


def base_and_novel(
    correct: Sequence[Sequence[int]], count: Sequence[Sequence[int]], base: int
) -> tuple[Array, Array]:
    r"""Accuracy in percent on the first task's classes, and on all later ones, after each task.

    .. math:: A^b_t = 100 \frac{\sum_{c \le B} n_{t,c}}{\sum_{c \le B} N_c}, \qquad
              A^n_t = 100 \frac{\sum_{c > B} n_{t,c}}{\sum_{c > B} N_c}

    with n_{t,c} of the N_c test images of class c right after task t, and B base classes: test
    images are pooled, as in the accuracy on all classes seen that few-shot class-incremental
    learning reports (Tao et al. 2020).

    Args:
        correct: [T][K_t] images of each known class classified correctly after task t.
        count: [T][K_t] test images of each class.
        base: Classes of the first task.

    Returns:
        Two arrays [T]; the second is NaN where no later class was learned.

    Example:
        >>> base_and_novel([[8, 6], [4, 6, 9]], [[10, 10], [10, 10, 10]], 2)
        (array([70., 50.]), array([nan, 90.]))
    """

    def pooled(part: slice) -> Array:
        sums = [(sum(r[part]), sum(n[part])) for r, n in zip(correct, count, strict=True)]
        return np.array([100.0 * right / total if total else np.nan for right, total in sums])

    return pooled(slice(base)), pooled(slice(base, None))


def harmonic_mean(first: Array, second: Array) -> Array:
    r"""Harmonic mean of two accuracies (Xian et al. 2017).

    .. math:: H = \frac{2 A^b A^n}{A^b + A^n}

    High only where both are; 0 where one is 0, NaN where one is NaN. Theirs is of classes seen in
    training and not; few-shot class-incremental learning takes base and novel ones.

    Args:
        first: Accuracies [T].
        second: Others [T].

    Example:
        >>> harmonic_mean(np.array([60.0, 60.0]), np.array([20.0, 0.0]))
        array([30.,  0.])
    """
    total = first + second
    return np.where(total == 0, 0.0, 2 * first * second / np.where(total == 0, 1.0, total))


def performance_drop(curve: Array) -> float:
    """Accuracy after the first task minus that after the last, in points (Zhang et al. 2021).

    PD = A_0 - A_T, their "performance dropping rate" of few-shot class-incremental learning, of the
    accuracy on all classes seen.

    Args:
        curve: Accuracies [T].

    Example:
        >>> performance_drop(np.array([64.0, 40.0, 30.0]))
        34.0
    """
    return float(curve[0] - curve[-1])


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Mean and half-width of its confidence interval over seeds.

    Student's t with n - 1 degrees of freedom; None below three values, where the interval would
    say more about n than about the method.

    Example:
        >>> mean, half = mean_interval([70.0, 72.0, 74.0])
        >>> mean, round(half, 2)
        (72.0, 4.97)
    """
    mean = float(np.mean(values))
    if len(values) < 3:
        return mean, None
    from scipy import stats

    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.5 + level / 2, len(values) - 1)) * spread
