"""Diagonal curvature: one number for every parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fastcil.curvature.outputs import Estimator, Likelihood, output_vectors
from fastcil.errors import FastcilError

Per = Literal["sample", "batch"]
"""Whose gradient is squared (or taken the absolute value of): a sample's, or a batch's mean."""


class DiagonalFisher:
    r"""The diagonal of the Fisher information, for all parameters of any network.

    .. math:: F_i = E_n\Big[\sum_v \big(v^\top \partial_i f(x_n)\big)^2\Big]

    over the vectors v of `fastcil.curvature.output_vectors`: with ``sampled`` or ``exact`` ones the
    Fisher information's own diagonal, with ``empirical`` ones the empirical Fisher's that EWC is
    often implemented with (Kirkpatrick et al. 2017, Eq. 3). ``per="batch"`` squares the mean
    gradient of a batch instead, as much released code does: smaller by the batch size where
    gradients are independent. A batch counts by its samples.

    Gradients of single samples are taken by torch.func over the whole network, in evaluation mode:
    batch statistics would mix samples.

    Args:
        model: Any network.
        names: Of the parameters wanted; None for all that are trained.
        likelihood: Of the labels.
        estimator: Of the expectation over labels.
        samples: Draws per sample.
        per: Whose gradient is squared.
        chunk: Samples whose gradients are held at a time.

    Attributes:
        count: Samples added so far.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> fisher = DiagonalFisher(model, estimator="exact")
        >>> fisher.update(torch.randn(8, 3))
        >>> {name: tuple(value.shape) for name, value in fisher.values().items()}
        {'weight': (2, 3), 'bias': (2,)}
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str] | None = None,
        *,
        likelihood: Likelihood = "categorical",
        estimator: Estimator = "sampled",
        samples: int = 1,
        per: Per = "sample",
        chunk: int = 16,
    ) -> None:
        self.model = model
        self.names = _names(model, names)
        self._likelihood, self._estimator, self._samples = likelihood, estimator, samples
        self._per, self._chunk = _checked(per), chunk
        self._sums = _zeros(model, self.names)
        self.count = 0

    def update(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            inputs: What the model is called with.  # [N, ...]
            labels: True labels, for ``empirical``.  # int64 [N]
            generator: Of draws.
        """
        with torch.no_grad():
            outputs = self.model(inputs)
        vectors = output_vectors(
            outputs,
            self._likelihood,
            self._estimator,
            labels=labels,
            samples=self._samples,
            generator=generator,
        )
        each = 1 if self._per == "sample" else len(inputs)
        for vector in vectors:
            found = gradients_of_samples(
                self.model, self.names, inputs, vector, self._per, self._chunk
            )
            for gradients in found:
                for name, gradient in gradients.items():
                    self._sums[name] += each * gradient.square().sum(0)
        self.count += len(inputs)

    def values(self) -> dict[str, Tensor]:
        """F by parameter name, of the parameters' shapes.

        Raises:
            FastcilError: There was no update.
        """
        return _mean(self._sums, self.count)


class MemoryAwareSynapses:
    r"""The sensitivity of the squared output to every parameter (Aljundi et al. 2018).

    .. math:: \Omega_i = E_n\big[\,\big|\partial_i \lVert f(x_n) \rVert^2\big|\,\big]

    with :math:`f` the outputs of the network (they take the squared norm to save one backward pass
    for each output). ``per="batch"`` takes the absolute value of the mean gradient of a batch, as
    common implementations do. Labels play no part.

    Args:
        model: Any network.
        names: Of the parameters wanted; None for all that are trained.
        per: Whose gradient's absolute value is taken.
        chunk: Samples whose gradients are held at a time.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> synapses = MemoryAwareSynapses(model)
        >>> synapses.update(torch.ones(4, 3))
        >>> synapses.values()["bias"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str] | None = None,
        *,
        per: Per = "sample",
        chunk: int = 16,
    ) -> None:
        self.model = model
        self.names = _names(model, names)
        self._per, self._chunk = _checked(per), chunk
        self._sums = _zeros(model, self.names)
        self.count = 0

    def update(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Adds a batch; labels and generator are not needed."""
        with torch.no_grad():
            vector = 2 * self.model(inputs)
        each = 1 if self._per == "sample" else len(inputs)
        for gradients in gradients_of_samples(
            self.model, self.names, inputs, vector, self._per, self._chunk
        ):
            for name, gradient in gradients.items():
                self._sums[name] += each * gradient.abs().sum(0)
        self.count += len(inputs)

    def values(self) -> dict[str, Tensor]:
        """Ω by parameter name.

        Raises:
            FastcilError: There was no update.
        """
        return _mean(self._sums, self.count)


def gradients_of_samples(
    model: nn.Module,
    names: Iterable[str],
    inputs: Tensor,
    vectors: Tensor,
    per: Per,
    chunk: int,
) -> Any:
    """Yields, a chunk of samples at a time, the gradients of <v_n, f(x_n)>, [n, ...] by name.

    With ``per="batch"`` it is one gradient, of their mean.
    """
    own = dict(model.named_parameters())
    wanted = {name: own[name].detach() for name in names}
    if per == "batch":
        with torch.enable_grad():
            leaves = {name: value.clone().requires_grad_() for name, value in wanted.items()}
            outputs = functional_call(model, leaves, (inputs,))
            found = torch.autograd.grad(outputs, list(leaves.values()), vectors / len(inputs))
        yield {name: g[None] for name, g in zip(leaves, found, strict=True)}
        return

    def value(parameters: Mapping[str, Tensor], x: Tensor, v: Tensor) -> Tensor:
        outputs: Tensor = functional_call(model, dict(parameters), (x[None],))
        return (outputs[0] * v).sum()

    each: Callable[..., dict[str, Tensor]] = vmap(grad(value), in_dims=(None, 0, 0))
    for x, v in zip(inputs.split(chunk), vectors.split(chunk), strict=True):
        yield each(wanted, x, v)


def _names(model: nn.Module, names: Iterable[str] | None) -> tuple[str, ...]:
    own = dict(model.named_parameters())
    if names is None:
        return tuple(name for name, p in own.items() if p.requires_grad)
    names = tuple(names)
    for name in names:
        if name not in own:
            raise FastcilError(f"parameter '{name}' is none of the model's.")
    return names


def _checked(per: Per) -> Per:
    if per not in ("sample", "batch"):
        raise FastcilError(f"per is {per!r}; it must be sample or batch.")
    return per


def _zeros(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    return {name: torch.zeros_like(own[name], requires_grad=False) for name in names}


def _mean(sums: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    if not count:
        raise FastcilError("the curvature is empty; call update with at least one sample.")
    return {name: value / count for name, value in sums.items()}
