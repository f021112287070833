"""The largest eigenvalue of a network's Fisher information, which is never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastcil.contract import evaluating
from fastcil.curvature.outputs import Likelihood
from fastcil.errors import FastcilError

Product = Callable[[Tensor], Tensor]


def largest_eigenvalue(
    model: nn.Module,
    inputs: Tensor,
    likelihood: Likelihood = "categorical",
    *,
    iterations: int = 50,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> float:
    r"""The largest eigenvalue of the Fisher information over all trained parameters together.

    .. math:: F = \frac1N \sum_n J_n^\top H_n J_n = E_n\, E_{y \sim p(y|x_n)}
        \big[\nabla \log p(y|x_n)\, \nabla \log p(y|x_n)^\top\big]

    (Shon et al. 2022, Eq. 4), with J the Jacobian of an image's outputs in the parameters and H the
    Hessian of the loss in the outputs: diag(p) - p pᵀ of softmax cross-entropy, which vanishes as p
    comes to be certain (Appendix A), or the identity of half the squared distance, which does not.

    With :math:`H = B B^\top` the eigenvalues of F other than zero are those of
    :math:`\tfrac1N B^\top J J^\top B`, on vectors as long as all outputs together. The Lanczos
    method (Lanczos 1950), reorthogonalised, finds the largest in ten or twenty products, each a
    backward pass and the derivative of one. It is at least what is returned; with r the residual
    of the vector found, some eigenvalue lies within r.

    The model is put in evaluation mode meanwhile; its parameters, their gradients and
    ``requires_grad`` stay as they are. The graphs of one forward and one backward pass on all
    inputs are held.

    Args:
        model: Any network whose operations have second derivatives; outputs are [N, K].
        inputs: What it reads.  # [N, ...]
        likelihood: ``categorical`` (softmax cross-entropy) or ``gaussian`` (half the squared
            distance).
        iterations: The most products.
        tolerance: It stops when r is at most this share of the eigenvalue.
        generator: Of the normal vector that it starts from, on the CPU; None for a fixed one.
        parameters: Those of the model that F is about; None for all that require gradients.

    Returns:
        The eigenvalue; NaN if the outputs are not finite.

    Raises:
        FastcilError: An unknown likelihood; outputs of another form; no input; no parameter, or
            one that is not the model's; an iteration or tolerance that is not positive.

    Example:
        >>> model = nn.Linear(2, 3, bias=False)  # J Jᵀ of an image x is |x|² times the identity
        >>> round(largest_eigenvalue(model, torch.tensor([[3.0, 4.0]]), "gaussian"), 4)
        25.0
    """
    if likelihood not in ("categorical", "gaussian"):
        raise FastcilError(f"likelihood is {likelihood!r}; it must be categorical or gaussian.")
    if iterations < 1:
        raise FastcilError(f"iterations is {iterations}; at least 1 is needed.")
    if not tolerance > 0:
        raise FastcilError(f"tolerance is {tolerance}; it must be above 0.")
    if not len(inputs):
        raise FastcilError("inputs is empty; the Fisher information is a mean over at least one.")
    named = _chosen(model, parameters)
    with evaluating(model), torch.enable_grad():
        outputs = torch.func.functional_call(model, named, (inputs,))
        if outputs.ndim != 2:
            raise FastcilError(f"outputs is {list(outputs.shape)}; a model must give [N, K].")
        if not outputs.isfinite().all():
            return math.nan
        product = _product(outputs, list(named.values()), likelihood)
    start = torch.randn(
        outputs.numel(),
        generator=torch.Generator().manual_seed(0) if generator is None else generator,
        dtype=torch.float64,
    )
    return _lanczos(product, start.to(outputs.device), iterations, tolerance)


def _chosen(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> dict[str, Tensor]:
    """The parameters by name, as leaves of a graph of their own that share their memory."""
    own = dict(model.named_parameters())
    if parameters is None:
        chosen = {name: p for name, p in own.items() if p.requires_grad}
    else:
        wanted = {id(p) for p in parameters}
        chosen = {name: p for name, p in own.items() if id(p) in wanted}
        if len(chosen) < len(wanted):
            raise FastcilError(
                f"parameters has {len(wanted) - len(chosen)} that are not of the model; pass its "
                f"own."
            )
    if not chosen:
        raise FastcilError("model has no parameter that requires gradients; name some.")
    return {name: p.detach().requires_grad_() for name, p in chosen.items()}


def _product(outputs: Tensor, parameters: list[Tensor], likelihood: Likelihood) -> Product:
    """w -> 1/N Bᵀ J Jᵀ B w, on float64 vectors of all outputs."""
    factor, transposed = _factors(outputs, likelihood)
    # Jᵀ u is linear in u: the derivative of <Jᵀ u, v> by u is J v, at any u.
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled: tuple[Tensor | None, ...] = ()
    if outputs.requires_grad:
        pulled = torch.autograd.grad(outputs, parameters, u, create_graph=True, allow_unused=True)
    leaves = [x for x, g in zip(parameters, pulled, strict=False) if g is not None]
    linear = [g for g in pulled if g is not None]

    def product(w: Tensor) -> Tensor:
        if not leaves:
            return torch.zeros_like(w)
        cotangent = factor(w.view(outputs.shape)).to(outputs.dtype)
        v = torch.autograd.grad(outputs, leaves, cotangent, retain_graph=True)
        (tangent,) = torch.autograd.grad(linear, u, v, retain_graph=True)
        return transposed(tangent.double()).flatten() / len(outputs)

    return product


def _factors(outputs: Tensor, likelihood: Likelihood) -> tuple[Product, Product]:
    """B and Bᵀ, with B Bᵀ the Hessian in the outputs."""
    if likelihood == "gaussian":
        return (lambda w: w), (lambda u: u)
    p = outputs.detach().double().softmax(1)
    root = p.sqrt()
    return (
        lambda w: root * w - p * (root * w).sum(1, keepdim=True),
        lambda u: root * (u - (p * u).sum(1, keepdim=True)),
    )


def _lanczos(product: Product, start: Tensor, iterations: int, tolerance: float) -> float:
    """The largest eigenvalue of a symmetric positive semi-definite map, from below."""
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    largest = 0.0
    for _ in range(min(iterations, len(start))):
        w = product(basis[-1])
        diagonal.append(float(basis[-1] @ w))
        known = torch.stack(basis)
        # Once leaves what rounding makes of nearly parallel vectors.
        for _ in range(2):
            w = w - known.T @ (known @ w)
        norm = float(w.norm())
        if not math.isfinite(norm):
            return math.nan
        off = torch.tensor(beside, dtype=torch.float64)
        projected = torch.tensor(diagonal, dtype=torch.float64).diag() + off.diag(1) + off.diag(-1)
        values, vectors = torch.linalg.eigh(projected)
        largest = max(0.0, float(values[-1]))
        if norm * abs(float(vectors[-1, -1])) <= tolerance * largest or norm == 0:
            break
        basis.append(w / norm)
        beside.append(norm)
    return largest
