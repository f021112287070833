"""Ways to keep the running average of a layer's input factor: ours, the usual one, K-FAC packages'.

A is the mean of a aᵀ over samples and output positions, a being what a layer sees. "fastcil lags"
takes the correlations at lags, which need no compiled extension; "naive" is `unfold`, transposed,
and one product into the average. The others are called where they compute A from a layer's input,
and keep of it what they keep themselves:

- asdl (PyPI's asdfghjkl): `forward_post_process` of its operation on the layer, with `cov_kron`,
  after the scaling of what is kept, as its exponential average has it; A times N, here scaled.
- kfac-pytorch (its repository; PyPI has none): `save_layer_input` and `update_a_factor` of its
  layer, an exponential average; A over the square of the number of positions. It starts from
  zeros here, not from its identity, beside which so small an A could not be compared.
- curvlinops: the hook of KFACLinearOperator that accumulates input covariances; a sum of A.
- nngeometry: `kfac_xx` of its layer; a sum of A times N and positions.
- kronfluence: the flattened activation of its tracked layer, then its tracker's update; the same.
- backpack: the input's factor of its K-FAC extension; A times positions, put into an average.
- singd: the processed input and `from_inner` of the factor K that it multiplies A by on both sides,
  the identity here; A, put into an average. It is inverse-free, so this is two products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from op_case import OURS
from torch import Tensor, nn
from torch.nn import functional

from fastcil.curvature import ConvInputFactor

DECAY = 0.95


@dataclass(frozen=True)
class Layer:
    """A layer and the batch it sees, and where; a linear one sees images of one pixel."""

    images: int
    channels: int
    side: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    linear: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        if self.linear:
            return f"{self.images}x{self.channels}, linear"
        size = f"{self.images}x{self.channels}x{self.side}x{self.side}"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{size}, {self.kernel}x{self.kernel}{stride}"

    @property
    def rows(self) -> int:
        """Of the factor."""
        return self.channels * self.kernel**2

    @property
    def positions(self) -> int:
        """Of outputs, in an image."""
        return ((self.side + 2 * self.padding - self.kernel) // self.stride + 1) ** 2

    def small(self) -> Layer:
        return replace(self, images=3, channels=min(self.channels, 6), side=min(self.side, 10))

    def module(self) -> nn.Module:
        """A layer of PyTorch with a single output, for what is measured depends on none."""
        if self.linear:
            return nn.Linear(self.channels, 1, bias=False, device=self.device)
        return nn.Conv2d(
            self.channels,
            1,
            self.kernel,
            self.stride,
            self.padding,
            bias=False,
            device=self.device,
        )

    def batch(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.images, self.channels, self.side, self.side, generator=generator)
        x = x.to(self.device)
        return x.relu_().flatten(1) if self.linear else x.relu_()

    def patches(self, x: Tensor) -> Tensor:
        """[N L, rows]"""
        if self.linear:
            return x
        columns = functional.unfold(x, self.kernel, 1, self.padding, self.stride)
        return columns.mT.reshape(-1, self.rows)

    def zeros(self) -> Tensor:
        return torch.zeros(self.rows, self.rows, device=self.device)


@dataclass(frozen=True)
class Running:
    """A factor that is kept.

    Attributes:
        update: Adds a batch.
        mean: The average after so many updates, in the scale of A.
        decay: Factor of earlier batches.
        made: Bytes kept that the first update makes, before all else.
    """

    update: Callable[[Tensor], Any]
    mean: Callable[[int], Tensor]
    decay: float = DECAY
    made: Callable[[], int] = lambda: 0


def weight(updates: int) -> float:
    """The sum of an exponential average's weights when it began with nothing."""
    return 1 - DECAY**updates


def average(layer: Layer, factor: Callable[[Tensor], Tensor], scale: float = 1.0) -> Running:
    """An exponential average of what has none of its own, in so many times the scale of A."""
    kept = layer.zeros()

    def update(x: Tensor) -> None:
        kept.mul_(DECAY).add_(factor(x), alpha=1 - DECAY)

    return Running(update, lambda updates: kept / (weight(updates) * scale))


def ours(layer: Layer, route: Any = None) -> Running:
    factor = ConvInputFactor(layer.channels, layer.kernel, layer.stride, layer.padding, route=route)

    def update(x: Tensor) -> None:
        factor.update(x[:, :, None, None] if layer.linear else x, decay=DECAY)

    return Running(update, lambda _: factor.dense(), made=lambda: factor.nbytes)


def naive(layer: Layer) -> Running:
    kept = layer.zeros()

    def update(x: Tensor) -> None:
        rows = layer.patches(x)
        kept.addmm_(rows.T, rows, beta=DECAY, alpha=(1 - DECAY) / len(rows))

    return Running(update, lambda updates: kept / weight(updates))


def with_asdl(layer: Layer) -> Running:
    from asdl.operations import OP_COV_KRON, get_op_class

    module = layer.module()
    operation = get_op_class(module)(module, OP_COV_KRON)
    operation.set_cov_scale((1 - DECAY) / layer.images)
    kept = layer.zeros()
    operation.accumulate_result(kept, OP_COV_KRON, "A")

    def update(x: Tensor) -> None:
        kept.mul_(DECAY)
        operation.forward_post_process(x, None)

    return Running(update, lambda updates: kept / weight(updates))


def with_kfac(layer: Layer) -> Running:
    from kfac.distributed import TorchDistributedCommunicator
    from kfac.layers.base import KFACBaseLayer
    from kfac.layers.modules import Conv2dModuleHelper, LinearModuleHelper

    helper = LinearModuleHelper if layer.linear else Conv2dModuleHelper
    kept = KFACBaseLayer(helper(layer.module()), tdc=TorchDistributedCommunicator())
    kept.load_state_dict({"A": layer.zeros(), "G": None})

    def update(x: Tensor) -> None:
        kept.save_layer_input([x])
        kept.update_a_factor(DECAY)

    return Running(update, lambda updates: kept.a_factor * (layer.positions**2 / weight(updates)))


def with_curvlinops(layer: Layer) -> Running:
    from curvlinops import KFACLinearOperator

    model = nn.Sequential(layer.module())
    operator = KFACLinearOperator(
        model,
        nn.MSELoss(),
        list(model.parameters()),
        [(torch.zeros(layer.images), torch.zeros(layer.images))],
        check_deterministic=False,
        num_data=layer.images,
        num_per_example_loss_terms=1,
    )
    kept = layer.zeros()
    operator._input_covariances["0"] = kept
    accumulate = operator._hook_accumulate_input_covariance
    return Running(lambda x: accumulate(model[0], (x,), "0"), lambda updates: kept / updates, 1)


def with_nngeometry(layer: Layer) -> Running:
    from nngeometry.backend.torch_hooks.grads import FactoryMap
    from nngeometry.layercollection import LayerCollection

    model = nn.Sequential(layer.module())
    (described,) = LayerCollection.from_model(model).layers.values()
    factory, kept = FactoryMap[type(described)], layer.zeros()

    def update(x: Tensor) -> None:
        factory.kfac_xx(kept, model[0], described, x, None)

    return Running(update, lambda updates: kept / (updates * layer.images * layer.positions), 1)


def with_kronfluence(layer: Layer) -> Running:
    from kronfluence.module.tracked_module import ModuleMode, TrackedModule
    from kronfluence.utils.constants import (
        ACTIVATION_COVARIANCE_MATRIX_NAME,
        NUM_ACTIVATION_COVARIANCE_PROCESSED,
    )

    module, kept, count = layer.module(), layer.zeros(), torch.zeros(1, dtype=torch.int64)
    tracked = TrackedModule.SUPPORTED_MODULES[type(module)]("layer", module)
    tracked.storage[ACTIVATION_COVARIANCE_MATRIX_NAME] = kept
    tracked.storage[NUM_ACTIVATION_COVARIANCE_PROCESSED] = count
    tracker = tracked._trackers[ModuleMode.COVARIANCE]
    tracker._activation_covariance_initialized = True

    def update(x: Tensor) -> None:
        tracker._update_activation_covariance_matrix(*tracked.get_flattened_activation(x))

    return Running(update, lambda _: kept / count, 1)


def with_backpack(layer: Layer) -> Running:
    from backpack.extensions import KFAC
    from backpack.extensions.secondorder.hbp.conv2d import HBPConv2d
    from backpack.extensions.secondorder.hbp.linear import HBPLinear

    module = layer.module()
    part, extension = HBPLinear() if layer.linear else HBPConv2d(), KFAC()

    def factor(x: Tensor) -> Tensor:
        module.input0 = x
        return part._factors_from_input(extension, module)[0]

    return average(layer, factor, layer.positions)


def with_singd(layer: Layer) -> Running:
    from singd.optim.utils import process_input
    from singd.structures.dense import DenseMatrix

    module, identity = layer.module(), DenseMatrix.eye(layer.rows)

    def factor(x: Tensor) -> Tensor:
        return identity.from_inner(X=process_input(x, module, "expand").T).to_dense()

    return average(layer, factor)


LAGS = f"{OURS} lags"
OWN = {OURS: ours, LAGS: partial(ours, route="lags"), "naive": naive}
PEERS = {
    "asdl": ("asdl", with_asdl),
    "kfac-pytorch": ("kfac", with_kfac),
    "curvlinops": ("curvlinops", with_curvlinops),
    "nngeometry": ("nngeometry", with_nngeometry),
    "kronfluence": ("kronfluence", with_kronfluence),
    "backpack": ("backpack", with_backpack),
    "singd": ("singd", with_singd),
}


def build(name: str, layer: Layer) -> Running | None:
    """A factor that has seen nothing; None where the package is missing."""
    if name in OWN:
        return OWN[name](layer)
    package, start = PEERS[name]
    return start(layer) if find_spec(package) else None
