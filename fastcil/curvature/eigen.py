"""EK-FAC: eigenvalues of the Fisher information corrected in the eigenbasis of K-FAC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcil.curvature.kronecker import Factors
from fastcil.curvature.layers import find_layers, gradients_at, watched
from fastcil.curvature.outputs import Estimator, Likelihood, output_vectors
from fastcil.errors import FastcilError


class EigenBlock(NamedTuple):
    """A layer's block: eigenvectors U_A ⊗ U_G and their eigenvalues."""

    input_basis: Tensor  # U_A, [n, n], or [groups, n, n]
    output_basis: Tensor  # U_G, [m, m], or [groups, m, m]
    values: Tensor  # S, [m, n], or [groups, m, n]


def eigenbasis(factors: Mapping[str, Factors]) -> dict[str, EigenBlock]:
    """The eigenvectors of Kronecker factors, and the products of their eigenvalues.

    Args:
        factors: One Kronecker product for each layer.

    Returns:
        For each layer the block of K-FAC itself, A ⊗ G; what rounding made negative is 0.
    """
    blocks = {}
    for name, (inner, output) in factors.items():
        a, ua = torch.linalg.eigh(inner)
        g, ug = torch.linalg.eigh(output)
        values = g.clamp(min=0)[..., :, None] * a.clamp(min=0)[..., None, :]
        blocks[name] = EigenBlock(ua, ug, values)
    return blocks


class EigenCorrection:
    r"""Second moments of gradients in a given eigenbasis, the best diagonal there is in it.

    .. math:: S = E_n\big[(U_G^\top \nabla_n U_A)^2\big]

    with :math:`\nabla_n` the gradient of sample n, all positions of a convolution summed (George et
    al. 2018): the diagonal of the layer's Fisher information in the basis
    :math:`U_A \otimes U_G`, exactly.

    Args:
        model: Any network.
        basis: Of each layer, from `eigenbasis`.
        likelihood: Of the labels, as in `fastcil.curvature.output_vectors`.
        estimator: Of the expectation over labels, as there.
        samples: Draws per sample, as there.

    Example:
        >>> from fastcil.curvature import KroneckerFactors
        >>> model, x = nn.Linear(4, 3), torch.randn(8, 4)
        >>> factors = KroneckerFactors(model, estimator="exact")
        >>> factors.update(x)
        >>> basis = eigenbasis({name: block for name, (block,) in factors.dense().items()})
        >>> correction = EigenCorrection(model, basis, estimator="exact")
        >>> correction.update(x)
        >>> correction.blocks()[""].values.shape
        torch.Size([3, 5])
    """

    # Entries of gradients of single samples that are held at a time.
    _MOST = 1 << 24

    def __init__(
        self,
        model: nn.Module,
        basis: Mapping[str, EigenBlock],
        *,
        likelihood: Likelihood = "categorical",
        estimator: Estimator = "sampled",
        samples: int = 1,
    ) -> None:
        self.model = model
        self._layers = find_layers(model, list(basis))
        self._basis = dict(basis)
        self._likelihood, self._estimator, self._samples = likelihood, estimator, samples
        self._sums = {name: torch.zeros_like(block.values) for name, block in basis.items()}
        self.count = 0

    def update(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Adds a batch; as `KroneckerFactors.update`."""
        with torch.enable_grad(), watched(self._layers):
            outputs = self.model(inputs)
            for vector in output_vectors(
                outputs,
                self._likelihood,
                self._estimator,
                labels=labels,
                samples=self._samples,
                generator=generator,
            ):
                found = gradients_at(outputs, self._layers, vector)
                for layer, calls in zip(self._layers, found, strict=True):
                    if len(calls) != 1:
                        raise FastcilError(
                            f"layer '{layer.name}' was used {len(calls)} times in one pass; "
                            f"eigenvalues are corrected for layers used once."
                        )
                    block, (x, _), (g,) = self._basis[layer.name], layer.calls[0], calls
                    one = block.values.numel()
                    step = max(1, self._MOST // one)
                    for k in range(0, len(x), step):
                        gradient = layer.gradients(x[k : k + step], g[k : k + step])
                        if block.values.ndim == 2:
                            gradient = gradient[:, 0]
                        turned = block.output_basis.mT @ gradient.to(block.values.dtype)
                        turned = turned @ block.input_basis
                        self._sums[layer.name] += turned.square().sum(0)
        self.count += len(outputs)

    def blocks(self) -> dict[str, EigenBlock]:
        """The corrected blocks.

        Raises:
            FastcilError: There was no update.
        """
        if not self.count:
            raise FastcilError("the correction is empty; call update with at least one sample.")
        return {
            name: block._replace(values=self._sums[name] / self.count)
            for name, block in self._basis.items()
        }


def turned_values(block: EigenBlock, into: EigenBlock) -> Tensor:
    r"""The diagonal of a block in the basis of another.

    With :math:`Q_A = U_A'^\top U_A` and :math:`Q_G` likewise, :math:`(Q_G \circ Q_G)\, S\,
    (Q_A \circ Q_A)^\top`: exact, and the trace is kept. This is how blocks of different tasks are
    added up in one basis.

    Args:
        block: The block.
        into: Whose basis; its values are not looked at.
    """
    qa = (into.input_basis.mT @ block.input_basis).square()
    qg = (into.output_basis.mT @ block.output_basis).square()
    return qg @ block.values @ qa.mT
