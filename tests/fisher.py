"""Small networks, and the gradients of single samples that curvature is defined by."""

from __future__ import annotations

import torch
from torch import nn

from fastcil.curvature import output_vectors


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(*layers, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*layers).double()


def small_cnn():
    return build(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, 2, groups=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def sample_gradients(model, names, x, likelihood, labels=None, estimator="exact"):
    """For every sample and vector the gradient of each layer's weight, bias in the last column."""
    modules = dict(model.named_modules())
    found = {name: [] for name in names}
    for n in range(len(x)):
        outputs = model(x[n : n + 1])
        mine = None if labels is None else labels[n : n + 1]
        for v in output_vectors(outputs, likelihood, estimator, labels=mine):
            model.zero_grad()
            outputs.backward(v, retain_graph=True)
            for name in names:
                m = modules[name]
                parts = [m.weight.grad.flatten(1)]
                parts += [m.bias.grad[:, None]] if m.bias is not None else []
                found[name].append((n, torch.cat(parts, 1)))
    return found


def fisher(gradients, count):
    """The dense block, vec stacking columns, so that A ⊗ G is torch.kron(A, G)."""
    rows = torch.stack([g.T.flatten() for _, g in gradients])
    return rows.T @ rows / count
