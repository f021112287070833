"""Smoothed cross-entropy against its equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil.nn.label_smoothing import smoothed_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("heads", [False, True])
def test_equation(smoothing: float, heads: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    among = (labels[:, None] < 2) == (torch.arange(5) < 2) if heads else None
    found = smoothed_cross_entropy(logits, labels, smoothing, among)
    for row, label, term in zip(
        logits.detach().numpy(), labels.tolist(), found.tolist(), strict=True
    ):
        classes = [c for c in range(5) if not heads or (c < 2) == (label < 2)]
        log_p = {c: row[c] - np.log(sum(np.exp(row[k]) for k in classes)) for c in classes}
        expected = -(1 - smoothing) * log_p[label]
        expected -= smoothing / len(classes) * sum(log_p.values())
        assert term == pytest.approx(expected, rel=1e-12)
    found.sum().backward()
    assert logits.grad.isfinite().all()
    if heads:
        assert (logits.grad[~among] == 0).all() and (logits.grad[among] != 0).any()
