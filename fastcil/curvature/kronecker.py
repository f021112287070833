"""Kronecker-factored curvature of any network: K-FAC, TK-FAC and XK-FAC."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fastcil.curvature.input_factor import ConvInputFactor
from fastcil.curvature.layers import Layer, find_layers, gradients_at, watched
from fastcil.curvature.outputs import Estimator, Likelihood, output_vectors
from fastcil.errors import FastcilError

Kind = Literal["kfac", "tkfac", "xkfac"]
"""Which approximation `KroneckerFactors` makes."""


class Factors(NamedTuple):
    """One Kronecker product A ⊗ G of a layer's block, vec taking the weight's columns."""

    input: Tensor  # [n, n], or [groups, n, n]
    output: Tensor  # [m, m], or [groups, m, m]


class KroneckerFactors:
    r"""Kronecker factors of the Fisher information of a network's layers.

    For a layer with weight W [m, n] (of a convolution the columns are (channel, row, column), and
    a bias is the last column), inputs :math:`a_{no}` and gradients :math:`g_{no}` of the loss of
    sample n at the output, o being an output position (one for a linear layer on vectors):

    .. math:: F = E_n\big[\mathrm{vec}(\nabla_n)\, \mathrm{vec}(\nabla_n)^\top\big], \qquad
        \nabla_n = \sum_o g_{no} a_{no}^\top

    where the expectation over labels is taken as `output_vectors` says. Losses are those of single
    samples: nothing is divided by the batch size. With ``|o|`` positions, the block is taken as

    - ``kfac``: :math:`A \otimes G`, :math:`A = E_n[\frac{1}{|o|}\sum_o a a^\top]`,
      :math:`G = E_n[\sum_o g g^\top]` (Martens and Grosse 2015, Eq. 1; of convolutions, Grosse and
      Martens 2016, KFC). Exact for one linear layer whose inputs and gradients are independent.
      ``sharing="reduce"`` takes :math:`A = E_n[\bar a \bar a^\top]` with the mean over positions
      and :math:`G = E_n[\bar g \bar g^\top]` with the sum (Eschenhagen et al. 2023), exact where
      inputs do not depend on the position.
    - ``tkfac``: :math:`\delta\, \Phi \otimes \Psi` with :math:`\Lambda_n, \Gamma_n` the two
      matrices of sample n above, :math:`\delta = E[\mathrm{tr}\Lambda_n \mathrm{tr}\Gamma_n]`,
      :math:`\Phi = E[\mathrm{tr}\Gamma_n \Lambda_n] / \delta`,
      :math:`\Psi = E[\mathrm{tr}\Lambda_n \Gamma_n] / \delta` (Gao et al. 2021), so that the trace
      is that of :math:`E[\Lambda_n \otimes \Gamma_n]`: the block's own for a linear layer, and for
      a convolution that of KFC's block before its expectation is factored.
    - ``xkfac``: :math:`A \otimes G + A' \otimes G'`, the second over pairs of different samples and
      positions of a batch, whose gradients batch norm in training mode mixes (Lee et al. 2020):
      :math:`A' = E[a_{no} a_{mp}^\top]` over pairs, :math:`G' = \frac1N \sum g_{no} g_{mp}^\top`.
      Put the model in training mode for it.

    Args:
        model: Any network; layers of `fastcil.nn.linearize` count with the inputs of the network
            they linearise and the gradients at their tangent.
        layers: Paths of convolutions and linear layers; None for all.
        kind: ``kfac``, ``tkfac`` or ``xkfac``.
        likelihood: Of the labels, as in `output_vectors`.
        estimator: Of the expectation over labels, as there.
        samples: Draws per sample, as there.
        sharing: ``expand`` or ``reduce``, for ``kfac``.
        plain: Layers that have the factors of ``kfac`` whatever the kind.
        dtype: Of the sums; None for that of the weights, or float32 where these are half.
        half_inputs: Whether input factors may be made of inputs rounded to bfloat16, as in
            `ConvInputFactor`.

    Attributes:
        count: Samples added so far, less what decayed.

    Raises:
        FastcilError: A name that is none, or arguments that don't go together.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
        >>> factors = KroneckerFactors(model, estimator="exact")
        >>> factors.update(torch.randn(8, 3, 6, 6))
        >>> for name, (block,) in factors.dense().items():
        ...     print(name, tuple(block.input.shape), tuple(block.output.shape))
        0 (28, 28) (4, 4)
        3 (65, 65) (5, 5)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        kind: Kind = "kfac",
        likelihood: Likelihood = "categorical",
        estimator: Estimator = "sampled",
        samples: int = 1,
        sharing: Literal["expand", "reduce"] = "expand",
        plain: Collection[str] = (),
        dtype: torch.dtype | None = None,
        half_inputs: bool = False,
    ) -> None:
        if kind not in ("kfac", "tkfac", "xkfac"):
            raise FastcilError(f"kind is {kind!r}; it must be kfac, tkfac or xkfac.")
        if sharing not in ("expand", "reduce"):
            raise FastcilError(f"sharing is {sharing!r}; it must be expand or reduce.")
        if sharing == "reduce" and kind != "kfac":
            raise FastcilError(f"sharing is 'reduce', which goes with kind 'kfac', not '{kind}'.")
        if kind == "xkfac" and estimator == "exact":
            raise FastcilError(
                "estimator is 'exact'; 'xkfac' needs gradients that are independent from sample to "
                "sample, so draw them ('sampled')."
            )
        self.model = model
        self.kind = kind
        self.count = 0.0
        self._likelihood, self._estimator, self._samples = likelihood, estimator, samples
        self._layers = find_layers(model, layers)
        if dtype is None:
            weight: Any = self._layers[0].module.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
        self._sums = {
            layer.name: _LayerSums(
                layer, "kfac" if layer.name in plain else kind, sharing, dtype, half_inputs
            )
            for layer in self._layers
        }

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers."""
        return tuple(self._sums)

    def update(
        self,
        inputs: Any,
        labels: Tensor | None = None,
        *,
        decay: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Adds a batch: one pass forward, and back once for every vector of the estimator.

        Args:
            inputs: What the model is called with.
            labels: True labels, for ``empirical``.  # int64 [N]
            decay: Factor of everything added before, its count included; None is 1.
            generator: Of draws.

        Raises:
            FastcilError: The model did not use one of the layers, or its outputs are no [N, K].
        """
        decay = 1.0 if decay is None else decay
        with torch.enable_grad(), watched(self._layers):
            outputs = self.model(inputs)
            self._check_calls()
            vectors = output_vectors(
                outputs,
                self._likelihood,
                self._estimator,
                labels=labels,
                samples=self._samples,
                generator=generator,
            )
            if not len(outputs):
                return
            for k, vector in enumerate(vectors):
                found = gradients_at(outputs, self._layers, vector)
                for layer, gradients in zip(self._layers, found, strict=True):
                    self._sums[layer.name].add_outputs(layer, gradients, 1.0 if k else decay)
            for layer in self._layers:
                self._sums[layer.name].add_inputs(layer, decay)
        self.count = self.count * decay + len(outputs)

    def _check_calls(self) -> None:
        for layer in self._layers:
            if not layer.calls:
                raise FastcilError(
                    f"layer '{layer.name}' was not used in the forward pass; leave it out."
                )

    def dense(self) -> dict[str, list[Factors]]:
        """The Kronecker products of every layer, whose sum is its block.

        Raises:
            FastcilError: There was no update.
        """
        if not self.count:
            raise FastcilError("the factors are empty; call update with at least one sample.")
        return {name: sums.dense(self.count) for name, sums in self._sums.items()}

    def merge(self, other: KroneckerFactors, mine: float, theirs: float) -> None:
        r"""Becomes the weighted mean of both, factor by factor.

        .. math:: (w A + w' A') \otimes (w G + w' G') = w\, A \otimes G + w' A' \otimes G'
            - w w' (A - A') \otimes (G - G'), \qquad w + w' = 1

        What Shon et al. (2022, Eq. 11) sum are blocks, of which this keeps one Kronecker product
        as they do (Sec. 4.1): the sum itself where the tasks have a factor in common. Of ``xkfac``
        it is both products, each by itself; of ``tkfac`` the sums that :math:`\delta`,
        :math:`\Phi` and :math:`\Psi` are made of, so that the trace is the weighted mean of
        traces. With weights of another sum, factors that are multiplied would be so twice.

        Args:
            other: Factors of the same layers and kind, which stay as they are.
            mine: w, weight of these.
            theirs: w', weight of the others.

        Raises:
            FastcilError: The others are of other layers or another kind; weights that do not sum
                to 1.
        """
        check_mean(mine=mine, theirs=theirs)
        if (self.layers, self.kind) != (other.layers, other.kind):
            raise FastcilError(
                f"other has {other.kind} factors of {other.layers}; it must have {self.kind} "
                f"factors of {self.layers}."
            )
        for name, sums in self._sums.items():
            sums.merge(other._sums[name], (mine, self.count), (theirs, other.count))
        self.count = 1.0

    def tensors(self) -> dict[str, Tensor]:
        """Every sum by name, for `load_tensors`."""
        held = {"count": torch.tensor(self.count, dtype=torch.float64)}
        for name, sums in self._sums.items():
            held |= {f"{name}/{key}": value for key, value in sums.tensors().items()}
        return held

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what another's `tensors` gave in place of its own sums.

        Raises:
            FastcilError: They are of other layers.
        """
        layers = {name.partition("/")[0] for name in tensors if "/" in name}
        if layers != set(self._sums) or "count" not in tensors:
            odd = sorted(layers ^ set(self._sums)) or ["count"]
            raise FastcilError(
                f"the saved factors do not fit: {', '.join(odd[:5])} missing or not known."
            )
        for name, sums in self._sums.items():
            own = f"{name}/"
            sums.load_tensors(
                {key[len(own) :]: value for key, value in tensors.items() if key.startswith(own)}
            )
        self.count = float(tensors["count"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the sums to a safetensors file."""
        kept = {name: value.contiguous().cpu() for name, value in self.tensors().items()}
        draft = Path(f"{os.fspath(path)}.part")
        save_file(kept, draft, {"kind": self.kind})
        os.replace(draft, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads what `save` wrote for the same layers; nothing in the file is executed."""
        self.load_tensors(load_file(path))


def check_mean(**weights: float) -> None:
    """Refuses two weights, by their names, that do not make a mean."""
    if not math.isclose(sum(weights.values()), 1, abs_tol=1e-6):
        told = " and ".join(f"{name} is {weight}" for name, weight in weights.items())
        raise FastcilError(
            f"{told}; Kronecker factors are averaged, so that weights must sum to 1: multiply "
            f"the penalty instead."
        )


class _LayerSums:
    """The sums of one layer."""

    def __init__(
        self, layer: Layer, kind: str, sharing: str, dtype: torch.dtype, half_inputs: bool
    ) -> None:
        self.kind, self.sharing = kind, sharing
        self.groups = layer.groups
        if kind != "kfac" and layer.groups > 1:
            raise FastcilError(
                f"layer '{layer.name}' has {layer.groups} groups, which '{kind}' does not know; "
                f"leave it out, or take 'kfac'."
            )
        if sharing == "reduce":
            side = layer.input_factor().side
            self.inputs = ConvInputFactor(side * self.groups, 1, groups=self.groups, dtype=dtype)
        else:
            self.inputs = layer.input_factor(dtype=dtype, half_inputs=half_inputs)
        module: Any = layer.module
        outputs = module.weight.shape[0]
        self.outputs = ConvInputFactor(outputs, 1, groups=self.groups, dtype=dtype)
        self.extra: dict[str, Tensor] = {}  # delta and rows of tkfac; sums over pairs of xkfac
        # Of every call of a batch under way: traces of output gradients, norms of inputs.
        self._traces: dict[int, Any] = {}
        self._norms: dict[int, Tensor] = {}

    def add_outputs(self, layer: Layer, gradients: list[Tensor], decay: float) -> None:
        """Adds the gradients of one vector, call by call."""
        for call, ((x, _), g) in enumerate(zip(layer.calls, gradients, strict=True)):
            first = decay if call == 0 else 1.0
            if self.sharing == "reduce":
                total = layer.output_rows(g).sum(3).flatten(1)
                self.outputs.update(total[..., None, None], first)
                continue
            images, each = layer.as_images(g)
            weights = None
            if self.kind == "tkfac":
                if call not in self._norms:
                    self._norms[call] = layer.patch_norms(x)
                weights = self._norms[call].repeat_interleave(each)
                norms = g.flatten(1).square().sum(1)
                self._traces[call] = self._traces.get(call, 0) + norms
            self.outputs.update(images, first, weights)
            if self.kind == "xkfac":
                total = layer.output_rows(g).sum((0, 3))[0]
                self._add_extra("output_pairs", torch.outer(total, total), first)

    def add_inputs(self, layer: Layer, decay: float) -> None:
        """Adds the inputs of all calls, once the gradients of all vectors are there."""
        for call, (x, _) in enumerate(layer.calls):
            first = decay if call == 0 else 1.0
            if self.sharing == "reduce":
                mean = layer.mean_patches(x).flatten(1)
                self.inputs.update(mean[..., None, None], first)
                continue
            images, each = layer.as_images(x)
            weights = None
            if self.kind == "tkfac":
                traces = self._traces.pop(call)
                self._add_extra("delta", (self._norms.pop(call) * traces).sum(), first)
                self._add_extra("rows", traces.new_tensor(float(len(traces))), first)
                weights = traces.repeat_interleave(each)
            self.inputs.update(images, first, weights)
            if self.kind == "xkfac":
                seen = layer.patches(x)
                count = seen.shape[0] * seen.shape[3]
                total = seen.sum((0, 3))[0]
                self._add_extra("input_pairs", torch.outer(total, total), first)
                self._add_extra("pairs", x.new_tensor(float(count * (count - 1))), first)

    def _add_extra(self, name: str, value: Tensor, decay: float) -> None:
        value = value.to(self.inputs.dtype)
        before = self.extra.get(name)
        self.extra[name] = value if before is None else before * decay + value

    def dense(self, count: float) -> list[Factors]:
        inner = self.inputs.dense()
        output = self.outputs.dense() * (self.outputs.count / count)
        if self.kind == "tkfac":
            # Sums of single traces, divided by the sum of their products; of a layer that is called
            # several times, or on several rows of a sample, sums over these.
            inner = inner * (self.extra["rows"] / count)
            return [Factors(inner, output * (count / self.extra["delta"].clamp(min=1e-30)))]
        if self.kind == "xkfac":
            pairs = self.extra["pairs"].clamp(min=1)
            inner2 = (self.extra["input_pairs"] - inner * self.inputs.count) / pairs
            output2 = self.extra["output_pairs"] / count - output
            return [Factors(inner, output), Factors(inner2, output2)]
        return [Factors(inner, output)]

    def merge(
        self, other: _LayerSums, mine: tuple[float, float], theirs: tuple[float, float]
    ) -> None:
        """Becomes the weighted sum of averages; each with its weight and count of samples."""
        (w, n), (w2, n2) = mine, theirs
        self._grow(other)
        pairs = None
        if self.kind == "xkfac":
            (_, one), (_, two) = self.dense(n), other.dense(n2)
            pairs = Factors(*(w * p + w2 * q for p, q in zip(one, two, strict=True)))
        self.inputs.merge(other.inputs, w, w2)
        self.outputs.merge(other.outputs, w * self.outputs.count / n, w2 * other.outputs.count / n2)
        for name, value in self.extra.items():
            self.extra[name] = value * (w / n) + other.extra[name] * (w2 / n2)
        if pairs is not None:
            # As `dense` takes them apart again.
            self.extra["pairs"] = torch.ones_like(self.extra["pairs"])
            self.extra["input_pairs"] = pairs.input + self.inputs.dense()
            self.extra["output_pairs"] = pairs.output + self.outputs.dense()

    def _grow(self, other: _LayerSums) -> None:
        """Takes on the outputs of a layer that grew: of those that were not, nothing is known."""
        more = other.outputs.in_channels - self.outputs.in_channels
        if more > 0 and self.groups == 1:
            grown = {
                name: functional.pad(value, (0, more, 0, more)) if name == "gram" else value
                for name, value in self.outputs.state().items()
            }
            self._load_outputs(grown)
            if "output_pairs" in self.extra:
                self.extra["output_pairs"] = functional.pad(
                    self.extra["output_pairs"], (0, more, 0, more)
                )

    def _load_outputs(self, state: Mapping[str, Tensor]) -> None:
        """Takes sums, of a layer that may have had fewer outputs then."""
        outputs = state["gram"].shape[-1] * self.groups
        self.outputs = ConvInputFactor(outputs, 1, groups=self.groups, dtype=self.outputs.dtype)
        self.outputs.load_state(state)

    def tensors(self) -> dict[str, Tensor]:
        parts = {"input": self.inputs.state(), "output": self.outputs.state(), "extra": self.extra}
        return {f"{part}/{k}": v for part, held in parts.items() for k, v in held.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        def of(part: str) -> dict[str, Tensor]:
            own = f"{part}/"
            return {k[len(own) :]: v for k, v in tensors.items() if k.startswith(own)}

        self.inputs.load_state(of("input"))
        self._load_outputs(of("output"))
        self.extra = of("extra")
