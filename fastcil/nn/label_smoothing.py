"""Cross-entropy with smoothed labels, also where tasks have heads of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def smoothed_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float, among: Tensor | None = None
) -> Tensor:
    r"""Cross-entropy with smoothed labels, over some of the outputs.

    .. math:: L = -(1 - \epsilon) \log p_y - \frac{\epsilon}{|C|} \sum_{c \in C} \log p_c

    (Szegedy et al. 2016, Sec. 7), p being the softmax over C.

    Args:
        logits: Of all outputs.  # [B, K]
        labels: int64, each in its C.  # [B]
        smoothing: Epsilon.
        among: C of each image, or None for all outputs.  # bool [B, K]

    Returns:
        The terms.  # [B]

    Example:
        >>> smoothed_cross_entropy(torch.zeros(1, 4), torch.tensor([2]), 0.1)  # log 4
        tensor([1.3863])
    """
    if among is None:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    chances = logits.masked_fill(~among, -torch.inf).log_softmax(1)  # [B, K]
    even = chances.masked_fill(~among, 0.0).sum(1) / among.sum(1)
    hit = chances.gather(1, labels[:, None])[:, 0]
    return -(1 - smoothing) * hit - smoothing * even
