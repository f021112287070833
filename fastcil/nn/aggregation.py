"""Two branches of one extractor, aggregated after each stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastcil.errors import FastcilError
from fastcil.nn.scaling import merge_scales, scale_convolutions


class AggregatedBackbone(nn.Module):
    r"""A stable and a plastic branch that meet after each stage (Liu et al. 2021, Sec. 4.1).

    .. math:: x^{[k]} = \alpha^{[k]} \, \phi^{[k]}(x^{[k-1]})
        + (1 - \alpha^{[k]}) \, \eta^{[k]}(x^{[k-1]})

    (Eqs. 1, 2; the two weights of a level add up to 1): phi is the stable branch, whose
    convolutions keep their weights and learn a scale per pair of channels, and eta the plastic
    one, all of which learns. Both stages of a level read the same aggregated map, and both stems
    the image; a stem counts to the first level. alpha starts at 0.5 and is not confined to [0, 1].

    Args:
        stable: phi; its convolutions are scaled, in place, where they aren't yet.
        plastic: eta, of the same shape. Both compute ``stem``, then one of ``stages`` after the
            other, and nothing else; a stage must leave its input as it is.

    Attributes:
        stable: phi.
        plastic: eta.
        alphas: alpha, a parameter, in the branches' dtype.  # [levels]
        out_channels: Channels C of the maps.

    Raises:
        FastcilError: If a branch has no ``stem`` and ``stages``, or something besides, or no
            ordinary convolution, or the branches differ in their number of stages.

    Example:
        >>> import torch
        >>> from fastcil.nn import resnet20
        >>> network = AggregatedBackbone(resnet20(width=4), resnet20(width=4))
        >>> [tuple(level.shape) for level in network.levels(torch.zeros(2, 3, 8, 8))]
        [(2, 4, 8, 8), (2, 8, 4, 4), (2, 16, 2, 2)]
        >>> network.alphas.tolist()
        [0.5, 0.5, 0.5]
    """

    kind = "aggregated"

    def __init__(self, stable: nn.Module, plastic: nn.Module) -> None:
        super().__init__()
        counts = [_stage_count(branch) for branch in (stable, plastic)]
        if counts[0] != counts[1]:
            raise FastcilError(
                f"plastic has {counts[1]} stages and stable {counts[0]}; make both by one builder."
            )
        self.stable = scale_convolutions(stable)
        self.plastic = plastic
        self.alphas = nn.Parameter(next(stable.parameters()).new_full(counts[:1], 0.5))
        self.out_channels = plastic.out_channels

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> feature maps [B, C, h, w]."""
        return self.levels(images)[-1]

    def levels(self, images: Tensor) -> list[Tensor]:
        """The aggregated map after each stage, the last one being what ``forward`` returns."""
        stable: Any = self.stable
        plastic: Any = self.plastic
        x, y = stable.stem(images), plastic.stem(images)
        levels: list[Tensor] = []
        for alpha, phi, eta in zip(self.alphas, stable.stages, plastic.stages, strict=True):
            x = y = alpha * phi(x) + (1 - alpha) * eta(y)
            levels.append(x)
        return levels

    def structure(self) -> dict[str, Any]:
        """What ``build`` needs; JSON-able."""
        return {"kind": self.kind}

    @classmethod
    def build(
        cls, structure: Mapping[str, Any], make_backbone: Callable[[], nn.Module]
    ) -> AggregatedBackbone:
        """Two branches with arbitrary weights, to be loaded.

        Args:
            structure: As ``structure()`` returned it.
            make_backbone: Makes one branch; scales of its own it loses in the plastic one.
        """
        return cls(make_backbone(), merge_scales(make_backbone()))


def aggregate(extractor: nn.Module) -> AggregatedBackbone:
    """Two branches that go on from one extractor and, before any training, compute the same.

    Args:
        extractor: Of which both are copies; it stays as it is.

    Returns:
        The branches, free to train but for what is never trained, in the extractor's mode.

    Raises:
        FastcilError: As `AggregatedBackbone` does.

    Example:
        >>> import torch
        >>> from fastcil.nn import resnet20
        >>> network, images = resnet20(width=4).eval(), torch.randn(2, 3, 8, 8)
        >>> torch.allclose(aggregate(network)(images), network(images), atol=1e-5)
        True
    """
    branches = [copy.deepcopy(extractor).requires_grad_(True) for _ in range(2)]
    return AggregatedBackbone(*branches).train(extractor.training)


def _stage_count(branch: nn.Module) -> int:
    """How many stages a branch has, once it is certain that it is a stem and these alone."""
    name = type(branch).__name__
    stem, stages = getattr(branch, "stem", None), getattr(branch, "stages", None)
    if not isinstance(stem, nn.Module) or not isinstance(stages, (nn.ModuleList, nn.Sequential)):
        raise FastcilError(
            f"branch {name} has no module stem with a ModuleList stages; an extractor whose stages "
            f"are aggregated must be made of these, as fastcil's ResNets are."
        )
    parts = [stem, *stages]
    known = {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}
    for tensor_name, tensor in branch.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            raise FastcilError(
                f"branch {name} has {tensor_name} outside its stem and stages; move it into one of "
                f"them, since what stands outside would not be computed."
            )
    return len(parts) - 1
