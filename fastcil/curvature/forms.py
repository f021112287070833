"""Diagonal and Kronecker-factored curvatures, all with one face, and how they are made by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastcil.curvature.curvature import Curvature, Scan, grown
from fastcil.curvature.diagonal import DiagonalFisher, MemoryAwareSynapses, Per
from fastcil.curvature.eigen import EigenBlock, EigenCorrection, eigenbasis, turned_values
from fastcil.curvature.kronecker import Factors, KroneckerFactors, check_mean
from fastcil.curvature.layers import find_layers
from fastcil.curvature.outputs import Estimator, Likelihood
from fastcil.curvature.penalty import (
    Product,
    diagonal_product,
    eigen_product,
    kronecker_product,
)
from fastcil.errors import FastcilError

CurvatureKind = Literal["diagonal", "mas", "kfac", "tkfac", "xkfac", "ekfac"]


class DiagonalCurvature(Curvature):
    """One number for each parameter: `DiagonalFisher` or `MemoryAwareSynapses`.

    Args:
        model: The network.
        names: Parameters it is about.
        make: Makes an empty accumulator of the model.
        identity: Layers whose output factor is the identity, whatever units they have or come to
            have (Shon et al. 2022, Eq. 13): all have the mean of those measured.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        make: Callable[[], DiagonalFisher | MemoryAwareSynapses],
        identity: Sequence[str] = (),
    ) -> None:
        super().__init__(model, names)
        self._make = make
        self._alike = {name for name in names if name.rpartition(".")[0] in identity}
        self._values: dict[str, Tensor] = {}

    def measure(
        self, scan: Scan, generator: torch.Generator, old: float = 0.0, new: float = 1.0
    ) -> None:
        """By one pass; the sum is exact, and what was not there before is zero."""
        sums = self._make()
        scan(lambda images, labels: sums.update(images, labels, generator=generator))
        values = {
            name: value.mean(0, keepdim=True) if name in self._alike else value
            for name, value in sums.values().items()
        }
        held = self._values if old else {}
        self._values = {
            name: old * (grown(held[name], value.shape) if name in held else 0.0) + new * value
            for name, value in values.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """The values by parameter name."""
        return dict(self._values)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes values by parameter name."""
        self._values = dict(tensors)

    def products(self) -> list[tuple[tuple[str, ...], Product]]:
        """A block for each parameter."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        return [
            (
                (name,),
                diagonal_product(
                    value.expand(shapes[name])
                    if name in self._alike
                    else grown(value, shapes[name])
                ),
            )
            for name, value in self._values.items()
        ]


class _LayersCurvature(Curvature):
    """A curvature made of Kronecker factors of layers.

    Args:
        model: The network.
        layers: Paths of its layers.
        identity: Layers whose output factor is the identity, whatever units they have or come to
            have: the classifier under a Gaussian likelihood (Shon et al. 2022, Eq. 13).
        half_inputs: As in `KroneckerFactors`.
        **options: Of `KroneckerFactors`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        identity: Sequence[str] = (),
        half_inputs: bool = False,
        **options: Any,
    ) -> None:
        found = find_layers(model, layers)
        super().__init__(model, [name for layer in found for name in layer.parameters])
        self._layers, self._identity, self._options = tuple(layers), tuple(identity), options
        self._half_inputs = half_inputs
        self._parameters = {layer.name: tuple(layer.parameters) for layer in found}
        self._factors = self._empty()
        self.of_batches = options.get("kind") == "xkfac"

    def _empty(self) -> KroneckerFactors:
        # Where the output factor is the identity, inputs are not to be weighed by gradients.
        return KroneckerFactors(
            self.model,
            self._layers,
            plain=self._identity,
            half_inputs=self._half_inputs,
            **self._options,
        )

    def _loaded(self, tensors: Mapping[str, Tensor]) -> KroneckerFactors:
        factors = self._empty()
        factors.load_tensors(tensors)
        return factors

    def _measured(
        self, scan: Scan, generator: torch.Generator, old: float, new: float
    ) -> KroneckerFactors:
        """The average of the factors held and those of one pass; what is held stays as it is."""
        check_mean(old=old, new=new)
        found = self._empty()
        scan(lambda images, labels: found.update(images, labels, generator=generator))
        if not old:
            return found
        both = self._loaded({k: v.clone() for k, v in self._factors.tensors().items()})
        both.merge(found, old, new)
        return both


class KroneckerCurvature(_LayersCurvature):
    """K-FAC, TK-FAC or XK-FAC of layers: `KroneckerFactors`.

    Takes what `_LayersCurvature` takes.
    """

    def measure(
        self, scan: Scan, generator: torch.Generator, old: float = 0.0, new: float = 1.0
    ) -> None:
        """By one pass; averaged factor by factor (Shon et al. 2022, Sec. 4.1)."""
        self._factors = self._measured(scan, generator, old, new)

    def tensors(self) -> dict[str, Tensor]:
        """The sums."""
        return self._factors.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes sums."""
        self._factors = self._loaded(tensors)

    def products(self) -> list[tuple[tuple[str, ...], Product]]:
        """A block for each layer."""
        shapes = dict(self.model.named_parameters())
        blocks: list[tuple[tuple[str, ...], Product]] = []
        for name, terms in self._factors.dense().items():
            parameters = self._parameters[name]
            weight = shapes[parameters[0]]
            if name in self._identity:
                blocks.append((parameters, _right_product(terms)))
                continue
            wide = [
                Factors(a, grown(g, (*g.shape[:-2], weight.shape[0], weight.shape[0])))
                if g.ndim == 2
                else Factors(a, g)
                for a, g in terms
            ]
            blocks.append((parameters, _as_matrix(kronecker_product(wide), wide[0].output)))
        return blocks


class EigenCurvature(_LayersCurvature):
    """EK-FAC of layers: `EigenCorrection` in the basis of K-FAC.

    Its basis is that of the factors averaged over all tasks. A task's own eigenvalues are measured
    in it, exactly, and those held are turned into it (`turned_values`); so eigenvectors are
    computed once for a task. It takes what `_LayersCurvature` takes, but for ``kind``.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._turned = tuple(name for name in self._layers if name not in self._identity)
        self._blocks: dict[str, EigenBlock] = {}

    def measure(
        self, scan: Scan, generator: torch.Generator, old: float = 0.0, new: float = 1.0
    ) -> None:
        """By two passes: factors, then eigenvalues in the basis of all tasks' factors."""
        factors = self._measured(scan, generator, old, new)
        dense = factors.dense()
        basis = eigenbasis({name: dense[name][0] for name in self._turned})
        correction = EigenCorrection(self.model, basis, **self._options)
        scan(lambda images, labels: correction.update(images, labels, generator=generator))
        blocks = correction.blocks()
        if old:
            for name, block in blocks.items():
                held = turned_values(_grown_block(self._blocks[name], block), block)
                blocks[name] = block._replace(values=old * held + new * block.values)
        self._factors, self._blocks = factors, blocks

    def tensors(self) -> dict[str, Tensor]:
        """The factors' sums, and the blocks."""
        held = {f"factors/{key}": value for key, value in self._factors.tensors().items()}
        for name, block in self._blocks.items():
            held |= {f"blocks/{name}/{k}": v for k, v in block._asdict().items()}
        return held

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes sums and blocks."""
        own = "factors/"
        self._factors = self._loaded(
            {k[len(own) :]: v for k, v in tensors.items() if k.startswith(own)}
        )
        self._blocks = {
            name: EigenBlock(*(tensors[f"blocks/{name}/{k}"] for k in EigenBlock._fields))
            for name in self._turned
        }

    def products(self) -> list[tuple[tuple[str, ...], Product]]:
        """A block for each layer."""
        shapes = dict(self.model.named_parameters())
        blocks: list[tuple[tuple[str, ...], Product]] = []
        alike = [name for name in self._layers if name in self._identity]
        if alike:
            dense = self._factors.dense()
            blocks = [(self._parameters[name], _right_product(dense[name])) for name in alike]
        for name, block in self._blocks.items():
            parameters = self._parameters[name]
            rows = shapes[parameters[0]].shape[0]
            if block.values.ndim == 2 and rows > len(block.values):
                wider = block.values.new_zeros(rows, rows)
                block = _grown_block(block, block._replace(output_basis=wider))
            product = eigen_product(block.input_basis, block.output_basis, block.values)
            blocks.append((parameters, _as_matrix(product, block.output_basis)))
        return blocks


def _grown_block(block: EigenBlock, like: EigenBlock) -> EigenBlock:
    """A block with as many outputs as another has, of which the new ones have no curvature."""
    old, rows = block.output_basis, like.output_basis.shape[-1]
    if old.ndim != 2 or len(old) == rows:
        return block
    basis = torch.eye(rows, dtype=old.dtype, device=old.device)
    basis[: len(old), : len(old)] = old
    values = grown(block.values, (rows, block.values.shape[1]))
    return block._replace(output_basis=basis, values=values)


def _as_matrix(product: Product, output: Tensor) -> Product:
    """The map of a whole weight: without a bias it comes in its own shape, with groups stacked."""

    def on_weight(d: Tensor) -> Tensor:
        rows = d.flatten(1)
        if output.ndim == 3:
            rows = rows.unflatten(0, (len(output), -1))
        return product(rows).reshape(d.shape)

    return on_weight


def _right_product(terms: Sequence[Factors]) -> Product:
    """D -> D A, the output factor being the identity."""
    inner = terms[0].input
    return lambda d: (d.flatten(1) @ inner).reshape(d.shape)


def make_curvature(
    kind: CurvatureKind,
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    likelihood: Likelihood = "categorical",
    estimator: Estimator = "sampled",
    samples: int = 1,
    per: Per = "sample",
    identity: Sequence[str] = (),
    half_inputs: bool = False,
) -> Curvature:
    """An empty curvature of a kind.

    Args:
        kind: ``diagonal`` (Kirkpatrick et al. 2017), ``mas`` (Aljundi et al. 2018), ``kfac``
            (Martens and Grosse 2015), ``tkfac`` (Gao et al. 2021), ``xkfac`` (Lee et al. 2020),
            ``ekfac`` (George et al. 2018).
        model: The network, whose outputs are [N, K].
        names: Parameters to be about, or with a Kronecker form the layers; None for all that are
            trained, or all convolutions and linear layers.
        likelihood: Of the labels (`fastcil.curvature.output_vectors`).
        estimator: Of the expectation over labels, as there.
        samples: Draws per sample, as there.
        per: For diagonals, whose gradient is taken: a ``sample``'s, or a ``batch``'s.
        identity: Layers whose output factor is the identity, whatever units they have or come to
            have; with ``mas`` there are none.
        half_inputs: For Kronecker forms, whether input factors may be made of inputs rounded to
            bfloat16 (`KroneckerFactors`).

    Raises:
        FastcilError: An unknown kind, or arguments that don't go together.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> curvature = make_curvature("kfac", model, estimator="exact")
        >>> x, y = torch.randn(8, 3), torch.zeros(8, dtype=torch.int64)
        >>> curvature.measure(lambda update: update(x, y), torch.Generator())
        >>> from fastcil.curvature import Penalty
        >>> penalty = Penalty(curvature)
        >>> penalty({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
        tensor(0.)
    """
    options: dict[str, Any] = {
        "likelihood": likelihood, "estimator": estimator, "samples": samples
    }  # fmt: skip
    if kind == "diagonal":
        wanted = _trained(model, names)
        return DiagonalCurvature(
            model, wanted, lambda: DiagonalFisher(model, wanted, per=per, **options), identity
        )
    if kind == "mas":
        wanted = _trained(model, names)
        return DiagonalCurvature(model, wanted, lambda: MemoryAwareSynapses(model, wanted, per=per))
    if kind not in get_args(CurvatureKind):
        raise FastcilError(
            f"curvature is {kind!r}; it must be one of {', '.join(get_args(CurvatureKind))}."
        )
    layers = [layer.name for layer in find_layers(model, names)]
    if kind == "ekfac":
        return EigenCurvature(model, layers, identity, half_inputs, **options)
    return KroneckerCurvature(model, layers, identity, half_inputs, kind=kind, **options)


def _trained(model: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is not None:
        return tuple(names)
    return tuple(name for name, p in model.named_parameters() if p.requires_grad)
