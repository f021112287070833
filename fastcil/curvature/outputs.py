"""Vectors whose outer products make the curvature of a loss in the network's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.errors import FastcilError

Likelihood = Literal["categorical", "gaussian"]
"""Whose negative logarithm is the loss: softmax cross-entropy, or half the squared distance."""

Estimator = Literal["exact", "sampled", "empirical"]
"""How the expectation over labels is taken: in full, by draws from the model, by the true ones."""


def output_vectors(
    outputs: Tensor,
    likelihood: Likelihood = "categorical",
    estimator: Estimator = "sampled",
    *,
    labels: Tensor | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    r"""Gradients v of a loss in the outputs, of which the sum of v vᵀ is its Hessian there.

    For every sample, with p the softmax of the outputs and :math:`e_k` a unit vector:

    | likelihood | estimator | vectors | sum of v vᵀ |
    |---|---|---|---|
    | categorical | exact | sqrt(p_k) (p - e_k), k = 1..K | diag(p) - p pᵀ |
    | categorical | sampled | (p - e_y) / sqrt(S), y drawn from p, S times | the same on average |
    | categorical | empirical | p - e_y, y the label | the empirical Fisher's |
    | gaussian | exact | e_k, k = 1..K | identity |
    | gaussian | sampled | standard normal / sqrt(S), S times | identity on average |

    (Martens and Grosse 2015, Sec. 2; Kunstner et al. 2019 on the empirical one; the Hessian of
    the squared distance is the identity, Shon et al. 2022, Eq. 5.)

    Args:
        outputs: Of the network.  # [N, K]
        likelihood: Of the labels given the outputs.
        estimator: Of the expectation over labels.
        labels: True labels, for ``empirical``.  # int64 [N]
        samples: S, for ``sampled``.
        generator: Of the draws, on the CPU; None for torch's own.

    Yields:
        v, without a graph.  # [N, K]

    Raises:
        FastcilError: A combination that is not in the table, or no labels where they are needed.

    Example:
        >>> outputs = torch.zeros(1, 3)
        >>> sum(v.T @ v for v in output_vectors(outputs, "gaussian", "exact"))
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    if outputs.ndim != 2:
        raise FastcilError(f"outputs is {list(outputs.shape)}; pass [N, K].")
    known = {"categorical": ("exact", "sampled", "empirical"), "gaussian": ("exact", "sampled")}
    if likelihood not in known:
        raise FastcilError(f"likelihood is {likelihood!r}; it must be categorical or gaussian.")
    if estimator not in known[likelihood]:
        raise FastcilError(
            f"estimator is {estimator!r}; with a {likelihood} likelihood it must be one of "
            f"{', '.join(known[likelihood])}."
        )
    if samples < 1:
        raise FastcilError(f"samples is {samples}; at least 1 is drawn.")
    if estimator == "empirical" and labels is None:
        raise FastcilError("labels is None; the empirical Fisher needs the true ones.")
    outputs = outputs.detach()
    if likelihood == "gaussian":
        return _gaussian(outputs, estimator, samples, generator)
    return _categorical(outputs, estimator, labels, samples, generator)


def _gaussian(
    outputs: Tensor, estimator: str, samples: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    if estimator == "exact":
        for k in range(outputs.shape[1]):
            unit = torch.zeros_like(outputs)
            unit[:, k] = 1
            yield unit
        return
    for _ in range(samples):
        # Drawn on the CPU, so that a seed means the same on every device.
        drawn = torch.randn(outputs.shape, generator=generator, dtype=torch.float32)
        yield drawn.to(outputs) / samples**0.5


def _categorical(
    outputs: Tensor,
    estimator: str,
    labels: Tensor | None,
    samples: int,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    p = outputs.softmax(1)
    if estimator == "empirical":
        assert labels is not None
        yield p - _one_hot(labels, p)
    elif estimator == "exact":
        for k in range(p.shape[1]):
            away = p.clone()
            away[:, k] -= 1
            yield away * p[:, k, None].sqrt()
    else:
        totals = p.double().cumsum(1)
        for _ in range(samples):
            drawn = torch.rand(len(p), 1, generator=generator, dtype=torch.float64).to(p.device)
            label = torch.searchsorted(totals, drawn * totals[:, -1:])[:, 0]
            yield (p - _one_hot(label.clamp(max=p.shape[1] - 1), p)) / samples**0.5


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    return functional.one_hot(labels, like.shape[1]).to(like)
