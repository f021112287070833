"""Losses that several methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.errors import FastcilError


def _check(logits: Tensor, teacher: Tensor, temperature: float, names: tuple[str, str]) -> None:
    """Raises unless two sets of logits have the same shape and the temperature is positive."""
    if logits.ndim != 2 or logits.shape != teacher.shape:
        raise FastcilError(
            f"{names[0]} is {tuple(logits.shape)} and {names[1]} {tuple(teacher.shape)}; both must "
            "be the same [B, C]."
        )
    if not temperature > 0:
        raise FastcilError(f"temperature is {temperature}; it must be positive.")


def _full(logits: Tensor) -> Tensor:
    """In float32 or better: sums of small probabilities drown in the rounding of half."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy_among(logits: Tensor, labels: Tensor, among: Tensor | None) -> Tensor:
    """Cross-entropy over some of the outputs, as where every task has a head of its own.

    Args:
        logits: Of all outputs.  # [B, K]
        labels: Each one of those picked.  # int64 [B]
        among: Which outputs to pick, or None for all.  # bool [K]

    Returns:
        The mean over the batch; outputs that are not picked get no gradient.  # []

    Example:
        >>> logits, labels = torch.zeros(1, 4), torch.tensor([2])
        >>> cross_entropy_among(logits, labels, torch.tensor([False, False, True, True]))  # log 2
        tensor(0.6931)
    """
    if among is not None:
        logits = logits.masked_fill(~among, -torch.inf)
    return functional.cross_entropy(logits, labels)


def masked_mean(terms: Tensor, mask: Tensor) -> Tensor:
    """Mean of the terms that a mask picks; 0 if it picks none.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, True]))
        tensor(3.5000)
    """
    return torch.where(mask, terms, 0.0).sum() / mask.sum().clamp(min=1)


def outputs_of(classes: Sequence[int], known: int) -> Tensor:
    """Which of the ``known`` outputs belong to some classes, bool [K].

    Example:
        >>> outputs_of([1, 2], 4)
        tensor([False,  True,  True, False])
    """
    mask = torch.zeros(known, dtype=torch.bool)
    mask[list(classes)] = True
    return mask


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    rows: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy with a teacher's softened predictions.

    .. math:: L = -\frac{1}{B} \sum_i \sum_c p_{ic} \log q_{ic}, \qquad
        p = \mathrm{softmax}(z^{\mathrm{teacher}} / T), \quad q = \mathrm{softmax}(z / T)

    (Hinton et al. 2015, Eq. 1 and Sec. 2), without their factor T^2, as iCaRL, WA, FOSTER and
    others are implemented. Computed in float32 or better.

    Args:
        logits: The student's.  # [B, C]
        teacher_logits: The teacher's; gradients flow into them too unless they are detached.
            # [B, C]
        temperature: T.
        rows: Which images count, or None for all.  # bool [B]

    Returns:
        The mean over the images that count; 0 where none does.  # []

    Raises:
        FastcilError: If the shapes differ or the temperature is not positive.

    Example:
        >>> distillation(torch.zeros(1, 2), torch.zeros(1, 2))  # log 2
        tensor(0.6931)
    """
    _check(logits, teacher_logits, temperature, ("logits", "teacher_logits"))
    found, taught = _full(logits) / temperature, (_full(teacher_logits) / temperature).softmax(1)
    if rows is None:
        return functional.cross_entropy(found, taught)
    return masked_mean(functional.cross_entropy(found, taught, reduction="none"), rows)


def distillation_by_layer(
    logits: Tensor,
    teacher_logits: Tensor,
    layers: Sequence[int],
    temperature: float = 2.0,
    rows: Tensor | None = None,
) -> Tensor:
    r"""Distillation of several classification layers, each with a softmax of its own, summed up.

    .. math:: L = \sum_f L_{D_f}

    (Castro et al. 2018, Eq. 1), each term being ``distillation`` of the outputs of one layer.

    Args:
        logits: The student's, layer after layer.  # [B, C]
        teacher_logits: The teacher's.  # [B, C]
        layers: Outputs of each layer, with sum C.
        temperature: T.
        rows: Which images count, or None for all.  # bool [B]

    Returns:
        The sum of the means over the images that count.  # []

    Raises:
        FastcilError: As in ``distillation``, or if there is no layer.

    Example:
        >>> distillation_by_layer(torch.zeros(1, 4), torch.zeros(1, 4), [2, 2])  # 2 log 2
        tensor(1.3863)
    """
    _check(logits, teacher_logits, temperature, ("logits", "teacher_logits"))
    if not layers or sum(layers) != logits.shape[1]:
        raise FastcilError(
            f"layers is {list(layers)}, of {sum(layers)} outputs; logits has {logits.shape[1]}."
        )
    parts = zip(logits.split(list(layers), 1), teacher_logits.split(list(layers), 1), strict=True)
    return torch.stack([distillation(z, old, temperature, rows) for z, old in parts]).sum()


def alignment_weights(counts: Tensor, beta: float) -> Tensor:
    r"""Weights of classes by their number of images, by which FOSTER aligns logits.

    .. math:: w_c = C \, \frac{v_c}{\sum_j v_j}, \qquad v_c = \frac{1 - \beta}{1 - \beta^{n_c}}

    (Wang et al. 2022, FOSTER, logits alignment; the inverse effective number of samples of Cui et
    al. 2019, Proposition 1). Rare classes weigh more; logits are divided by w.

    Args:
        counts: Images n_c of each class, at least 1.  # [C]
        beta: Between 0 (all weights 1) and 1 (w_c proportional to 1 / n_c), both excluded.

    Returns:
        w, float32, with sum C.  # [C]

    Raises:
        FastcilError: If beta is not between 0 and 1, or a class has no image.

    Example:
        >>> alignment_weights(torch.tensor([1, 1, 500]), beta=0.5)
        tensor([1.2000, 1.2000, 0.6000])
    """
    if not 0 < beta < 1:
        raise FastcilError(f"beta is {beta}; it must be between 0 and 1, both excluded.")
    if counts.ndim != 1 or bool((counts < 1).any()):
        raise FastcilError(
            f"counts is {counts.tolist()}; it must be one number of images per class, at least 1."
        )
    # 1 - beta^n without cancellation where beta is near 1.
    v = -(1 - beta) / torch.expm1(counts.double() * math.log(beta))
    return (v * (len(v) / v.sum())).float()


def balanced_distillation(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, temperature: float = 2.0
) -> Tensor:
    r"""Distillation from a teacher whose predictions are reweighted by class.

    .. math:: L = -\frac{1}{B} \sum_i \sum_c \tilde p_{ic} \log q_{ic}, \qquad
        \tilde p_{ic} = \frac{w_c p_{ic}}{\sum_j w_j p_{ij}}

    with p and q as in ``distillation`` (Wang et al. 2022, FOSTER, balanced knowledge
    distillation). Teacher and student share the temperature; there is no factor T^2. Computed in
    float32 or better.

    Args:
        student_logits: The student's.  # [B, C]
        teacher_logits: The teacher's; gradients flow into them too unless they are detached.
            # [B, C]
        weights: w, such as ``alignment_weights``.  # [C]
        temperature: T.

    Returns:
        The mean over the batch.  # []

    Raises:
        FastcilError: If the shapes do not fit or the temperature is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, -2.0]])
        >>> balanced_distillation(student, teacher, torch.tensor([0.5, 1.5]))
        tensor(0.6931)
    """
    _check(student_logits, teacher_logits, temperature, ("student_logits", "teacher_logits"))
    if weights.shape != student_logits.shape[1:]:
        raise FastcilError(
            f"weights has shape {tuple(weights.shape)}; it must have one entry for each of "
            f"{student_logits.shape[1]} classes."
        )
    target = (_full(teacher_logits) / temperature).softmax(1) * weights
    target = target / target.sum(1, keepdim=True)
    return functional.cross_entropy(_full(student_logits) / temperature, target)
