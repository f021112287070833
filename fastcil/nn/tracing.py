"""A network in evaluation as a graph of its layers and functions, batch norms folded away."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fastcil.errors import FastcilError

_NOTHING_IN_EVALUATION = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
# Of functions and methods whose result may be a part of their input's memory.
_VIEWS = frozenset(
    (
        "chunk",
        "contiguous",
        "flatten",
        "getitem",
        "permute",
        "reshape",
        "split",
        "squeeze",
        "transpose",
        "unsqueeze",
        "view",
    )
)


class _Proxy(fx.Proxy):
    """Keeps ``x += y`` apart from ``x = x + y``, which torch's own takes for the same."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})


class _Tracer(fx.Tracer):
    """Remembers which module it is in."""

    place = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        outer, self.place = self.place, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.place = outer
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["place"] = self.place
        return node


class Traced:
    """A copy of a network in evaluation: its calls in order, and the modules they call.

    Layers that do nothing in evaluation are left out. A batch norm that alone reads a convolution
    (``BatchNorm2d``) or a linear layer (``BatchNorm1d``) is folded into it (Mu et al. 2020):
    W' = a W, b' = a (b - mean) + beta with a = gamma / sqrt(var + eps).

    Args:
        module: The network; it stays as it is.

    Attributes:
        graph: The calls; ``node.meta["place"]`` is the path of the module each is in.
        modules: The modules by their paths in the network.
        folded: Paths of the layers that a batch norm was folded into.

    Raises:
        FastcilError: If the network cannot be traced, or overwrites what it still reads.

    Example:
        >>> traced = Traced(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
        >>> [node.target for node in traced.graph.nodes], traced.folded
        (['input', '0', '2', 'output'], {'0'})
    """

    def __init__(self, module: nn.Module) -> None:
        network = copy.deepcopy(module).eval()
        tracer = _Tracer()
        try:
            self.graph = tracer.trace(network)
        # A network may fail in any way on what only stands for a tensor.
        except Exception as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise FastcilError(
                f"{spoken(tracer.place)} cannot be traced ({reason}); a forward without conditions "
                "or loops on what is in a tensor would do."
            ) from error
        self.modules: dict[str, nn.Module] = dict(network.named_modules(remove_duplicate=False))
        self.folded: set[str] = set()
        _leave_out(self.graph, self.modules)
        _refuse_overwriting(self.graph, self.modules)
        self._fold()

    def _fold(self) -> None:
        calls = Counter(node.target for node in self.graph.nodes if node.op == "call_module")
        for node in list(self.graph.nodes):
            norm = self._module(node)
            if not isinstance(norm, NORMS) or norm.running_var is None:
                continue
            (source,) = node.all_input_nodes
            layer = self._module(source)
            fused: nn.Module
            if len(source.users) != 1 or calls[source.target] != 1:
                continue
            if type(layer) is nn.Conv2d and not isinstance(norm, nn.BatchNorm1d):
                fused = fuse_conv_bn_eval(layer, norm)
            elif type(layer) is nn.Linear and isinstance(norm, nn.BatchNorm1d):
                fused = fuse_linear_bn_eval(layer, norm)
            else:
                continue
            self.modules[source.target] = fused
            self.folded.add(source.target)
            _replace(node, source)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None


def spoken(place: str) -> str:
    """What a message calls the module at a path."""
    return repr(place) if place else "module's forward"


def _replace(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _leave_out(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Takes out what does nothing in evaluation."""
    for node in list(graph.nodes):
        if node.op == "call_module":
            nothing = type(modules[node.target]) in _NOTHING_IN_EVALUATION
        else:
            nothing = node.target is functional.dropout and node.kwargs["training"] is False
        if nothing:
            _replace(node, node.all_input_nodes[0])


def _overwrites(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return getattr(modules[str(node.target)], "inplace", False) is True
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return bool(node.kwargs.get("inplace")) or node.target in (operator.iadd, operator.isub)


def _is_view(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], (nn.Flatten, nn.Unflatten))
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _VIEWS


def _refuse_overwriting(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Refuses what reads, by an older name, values that have been overwritten in place."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # the node whose memory another's result lies in
    written: list[fx.Node] = []
    for node in graph.nodes:
        read = node.all_input_nodes
        overwrites = bool(read) and _overwrites(node, modules)
        shares = overwrites or (bool(read) and _is_view(node, modules))
        memory[node] = memory[read[0]] if shares else node
        for last in written:
            if any(memory[old] is memory[last] and order[old] < order[last] for old in read):
                raise FastcilError(
                    f"{spoken(last.meta['place'])} overwrites in place what "
                    f"{spoken(node.meta['place'])} reads afterwards; without inplace=True, or "
                    "x = x + y instead of x += y, would do."
                )
        if overwrites:
            written.append(node)
