"""Augmented propagation: the rule by which each operation carries a value and its tangent.

The rules are those of Shon et al. 2022, Table 4, and what follows from them for other maps that are
linear, which apply to both parts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn.tangent import (
    FrozenAffine,
    TangentConv2d,
    TangentLinear,
    TangentPair,
    activation_tangent,
    pooled_tangent,
)
from fastcil.nn.tracing import NORMS, Traced, spoken

Values = list[Any]  # a TangentPair in each slot; sizes too, as primal parts

_LINEAR_MODULES = (
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Unflatten,
    nn.ZeroPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
)
_LINEAR_FUNCTIONS = frozenset(
    (
        functional.adaptive_avg_pool2d,
        functional.avg_pool2d,
        functional.pad,
        operator.getitem,
        operator.mul,
        operator.neg,
        operator.truediv,
        torch.cat,
        torch.chunk,
        torch.flatten,
        torch.mean,
        torch.mul,
        torch.permute,
        torch.reshape,
        torch.split,
        torch.squeeze,
        torch.stack,
        torch.sum,
        torch.transpose,
        torch.unsqueeze,
        Tensor.chunk,
        Tensor.contiguous,
        Tensor.flatten,
        Tensor.mean,
        Tensor.permute,
        Tensor.reshape,
        Tensor.split,
        Tensor.squeeze,
        Tensor.sum,
        Tensor.transpose,
        Tensor.unsqueeze,
    )
)
_SUMS = {
    operator.add: operator.add,
    operator.iadd: operator.add,
    operator.sub: operator.sub,
    operator.isub: operator.sub,
    torch.add: torch.add,
    torch.sub: torch.sub,
}
_RELUS = frozenset((functional.relu, functional.relu_, torch.relu, torch.relu_))
_MAX_POOLS = frozenset((functional.max_pool2d, torch.max_pool2d))
_ALSO_METHODS = frozenset(("add", "sub", "mul", "relu", "relu_"))
_WOULD_DO = (
    "convolutions, linear layers, batch norms with running statistics, ReLU, LeakyReLU, pooling, "
    "padding, reshaping, slicing, sums, means and cat would do."
)


class _Slot(NamedTuple):
    """Stands for a value in the arguments of a rule."""

    number: int


class _Linear(NamedTuple):
    """A linear map, of both parts alike; a module by its path, or a function."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tangent_args: tuple[Any, ...]
    tangent_kwargs: dict[str, Any]
    slots: tuple[int, ...]

    def __call__(self, network: nn.Module, values: Values) -> TangentPair:
        of = self.function
        function = network.get_submodule(of) if isinstance(of, str) else of
        y = function(*_filled(self.args, values, _primal), **_filled(self.kwargs, values, _primal))
        if all(values[slot].tangent is None for slot in self.slots):
            return TangentPair(y, None)
        args = _filled(self.tangent_args, values, _tangent)
        return TangentPair(y, function(*args, **_filled(self.tangent_kwargs, values, _tangent)))


class _Layer(NamedTuple):
    """A layer of ``fastcil.nn.tangent``, by its path."""

    place: str
    slot: int

    def __call__(self, network: nn.Module, values: Values) -> TangentPair:
        pair: TangentPair = network.get_submodule(self.place)(*values[self.slot])
        return pair


class _Activation(NamedTuple):
    """A (leaky) ReLU."""

    slope: float
    slot: int

    def __call__(self, network: nn.Module, values: Values) -> TangentPair:
        x, dx = values[self.slot]
        y = functional.leaky_relu(x, self.slope) if self.slope else torch.relu(x)
        return TangentPair(y, None if dx is None else activation_tangent(y, dx, self.slope))


class _MaxPool(NamedTuple):
    """A max-pool."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int

    def __call__(self, network: nn.Module, values: Values) -> TangentPair:
        x, dx = values[self.slot]
        y, places = functional.max_pool2d_with_indices(x, *self.args, **self.kwargs)
        return TangentPair(y, None if dx is None else pooled_tangent(dx, places))


Rule = _Linear | _Layer | _Activation | _MaxPool


class Step(NamedTuple):
    """One call of the network."""

    rule: Rule
    slot: int  # where its result goes
    done: tuple[int, ...]  # slots that nothing reads after it


def _primal(pair: TangentPair) -> Any:
    return pair.primal


def _tangent(pair: TangentPair) -> Any:
    if pair.tangent is None and isinstance(pair.primal, Tensor):
        return torch.zeros_like(pair.primal)
    return pair.primal if pair.tangent is None else pair.tangent


def _filled(template: Any, values: Values, part: Callable[[TangentPair], Any]) -> Any:
    """Arguments with one part of each value in its place."""
    if isinstance(template, _Slot):
        return part(values[template.number])
    if isinstance(template, tuple):
        return tuple([_filled(entry, values, part) for entry in template])
    if isinstance(template, list):
        return [_filled(entry, values, part) for entry in template]
    if isinstance(template, dict):
        return {name: _filled(entry, values, part) for name, entry in template.items()}
    if isinstance(template, slice):
        ends = template.start, template.stop, template.step
        return slice(*[_filled(end, values, part) for end in ends])
    return template


class Program:
    """The steps of a network's augmented propagation.

    Args:
        traced: The network.

    Attributes:
        steps: The calls in order; the network's input is in slot 0.
        slots: Number of values.
        result: Slot of the network's output.
        layers: Modules that the steps call, by their paths.

    Raises:
        FastcilError: If the network does what there is no rule for.

    Example:
        >>> program = Program(Traced(nn.Sequential(nn.Linear(3, 4), nn.ReLU())))
        >>> [type(step.rule).__name__ for step in program.steps], list(program.layers)
        (['_Layer', '_Activation'], ['0'])
    """

    def __init__(self, traced: Traced) -> None:
        self.steps: list[Step] = []
        self.layers: dict[str, nn.Module] = {}
        self._traced = traced
        *calls, output = traced.graph.nodes
        self._slot = {node: number for number, node in enumerate(calls)}
        self.slots = len(calls)
        self._carried: set[fx.Node] = set()  # nodes whose value has a tangent, or zero for one
        for node in calls:
            self._add(node)
        (result,) = output.args
        if not isinstance(result, fx.Node) or result not in self._carried:
            raise FastcilError("module's forward gives no tensor; it must return a single one.")
        self.result = self._slot[result]

    def _add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self._carried:
                raise FastcilError(
                    f"module's forward takes {str(node.target)!r} too; it must take one tensor."
                )
            self._carried.add(node)
            return
        if node.op == "get_attr":
            raise FastcilError(
                f"module reads its tensor {str(node.target)!r} outside of a layer; nn.Conv2d or "
                "nn.Linear would do, in nn.Sequential where it is the whole network."
            )
        done = tuple(self._slot[read] for read in node.all_input_nodes if self._is_last(read, node))
        self.steps.append(Step(self._rule(node), self._slot[node], done))

    def _is_last(self, read: fx.Node, user: fx.Node) -> bool:
        return all(self._slot.get(other, self.slots) <= self._slot[user] for other in read.users)

    def _rule(self, node: fx.Node) -> Rule:
        carried = [read for read in node.all_input_nodes if read in self._carried]
        if not carried or _reads_shape(node):
            return self._linear(node, _function(node), [])
        self._carried.add(node)
        if node.op == "call_module":
            place = str(node.target)
            module = self._traced.modules[place]
            rule = self._module(node, place, module, self._slot[carried[0]])
            what = f"{place!r} is {type(module).__name__}({module.extra_repr()})"
        else:
            rule = self._call(node, carried)
            name = getattr(node.target, "__name__", node.target)
            what = f"{spoken(node.meta['place'])} calls {name}"
        if rule is None:
            raise FastcilError(f"{what}, for which linearize has no rule; {_WOULD_DO}")
        return rule

    def _module(self, node: fx.Node, place: str, module: nn.Module, slot: int) -> Rule | None:
        if type(module) is nn.Conv2d:
            self.layers[place] = TangentConv2d(module)
        elif type(module) is nn.Linear:
            self.layers[place] = TangentLinear(module, place in self._traced.folded)
        elif isinstance(module, NORMS) and module.running_var is not None:
            self.layers[place] = FrozenAffine(module)
        elif type(module) in _LINEAR_MODULES:
            self.layers[place] = module
            return self._linear(node, place, [node.all_input_nodes[0]])
        elif isinstance(module, nn.MaxPool2d) and not module.return_indices:
            window = module.kernel_size, module.stride, module.padding, module.dilation
            return _MaxPool((*window, module.ceil_mode), {}, slot)
        elif type(module) is nn.ReLU:
            return _Activation(0.0, slot)
        elif isinstance(module, nn.LeakyReLU) and module.negative_slope >= 0:
            return _Activation(module.negative_slope, slot)
        else:
            return None
        return _Layer(place, slot)

    def _call(self, node: fx.Node, carried: list[fx.Node]) -> Rule | None:
        function, args = _function(node), node.args
        if function in _SUMS and len(args) == 2:
            # Numbers that are added have no derivative.
            zeroed = tuple(entry if entry in carried else 0 for entry in args)
            return self._linear(node, _SUMS[function], carried, zeroed)
        first, others = _nodes(args[:1]), _nodes((args[1:], node.kwargs))
        if any(read in others for read in carried):
            swapped = function in (operator.mul, torch.mul) and not set(first) & set(carried)
            return self._linear(node, function, carried) if swapped else None
        if function in _LINEAR_FUNCTIONS:
            return self._linear(node, function, carried)
        slot = self._slot[carried[0]]
        if function in _RELUS:
            return _Activation(0.0, slot)
        slope: Any = node.kwargs.get("negative_slope")
        if function is functional.leaky_relu and slope >= 0:
            return _Activation(slope, slot)
        if function in _MAX_POOLS:
            window = dict(node.kwargs)
            window.pop("return_indices", None)
            return _MaxPool(self._template(args[1:]), self._template(window), slot)
        return None

    def _linear(
        self,
        node: fx.Node,
        function: Any,
        carried: list[fx.Node],
        tangent_args: tuple[Any, ...] | None = None,
    ) -> _Linear:
        args, kwargs = self._template(node.args), self._template(node.kwargs)
        of_tangent = args if tangent_args is None else self._template(tangent_args)
        # Nor has what padding is filled with.
        zeroed = {name: None if name == "value" else kwargs[name] for name in kwargs}
        slots = tuple(self._slot[read] for read in carried)
        return _Linear(function, args, kwargs, of_tangent, zeroed, slots)

    def _template(self, arguments: Any) -> Any:
        return map_arg(arguments, lambda node: _Slot(self._slot[node]))


def _function(node: fx.Node) -> Any:
    """The function that a node calls, also where it calls it as a method or an operator."""
    if node.op != "call_method":
        return node.target
    name = "reshape" if node.target == "view" else str(node.target)
    return getattr(torch, name) if name in _ALSO_METHODS else getattr(Tensor, name)


def _reads_shape(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim", "numel")


def _nodes(argument: Any) -> list[fx.Node]:
    """The nodes in an argument."""
    found: list[fx.Node] = []
    map_arg(argument, found.append)
    return found
