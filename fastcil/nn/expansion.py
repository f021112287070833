"""Nodes that are added to a network for a task, and of which only those in use are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn.heads import fresh_entries

Layer = Literal["fc", "conv1x1", "conv3x3"]
Indicator = Literal["ne", "nc", "sa"]
Removal = Literal["unused", "mean"]

_FAR = 10.0
_START = 0.1
_STEEP = 4.0


class Expansion(nn.Module):
    r"""The nodes that one task adds: new features, each multiplied by an indicator.

    On the backbone's maps f a layer without bias gives the responses f', and what leaves is

    .. math:: \alpha \odot f'(x), \qquad \alpha = \begin{cases}
        1 & \text{ne (Eq. 3)} \\ \sigma(s) & \text{nc, } s \text{ learned (Eq. 5)} \\
        \sigma(\beta f'(x)) & \text{sa (Eq. 6)} \end{cases}

    (Yang et al. 2021, Eq. 4). alpha of ``sa`` is each image's own, as Eq. 6 has it; their later
    work takes one of the batch's mean. A node of ``fc`` has one response to an image, the mean of
    its map, and one alpha for the whole map; as nothing but the mean of the map is used by a
    head, this is a fully connected layer on pooled features whose class activation maps still say
    where. A node of a convolution has a response, and an alpha, at every position.

    The pressure on alpha while it is trained is `compression`.

    Weights start at a tenth of those of ``nn.Linear``, so that f' is close to 0 (App. A.2) and
    alpha of ``sa`` to a half. (Sec. 3.4 starts alpha near 1 / c, which f' = 0 is not.) s starts
    normal with mean 0 and deviation 1.

    Args:
        channels: Channels C of the backbone's maps.
        nodes: How many nodes there are, n; 0 if all were removed.
        width: How many there were, c; None for ``nodes``.
        layer: ``fc``, ``conv1x1`` or ``conv3x3``.
        indicator: ``ne``, ``nc`` or ``sa``.
        tau: Retention rate to start from, in (0, 1).

    Attributes:
        weight: Of the layer.  # [n, C, k, k]
        s: With ``nc``.  # [n]
        level: u, with tau = sigmoid(4 u); without it with ``ne``.  # []
        beta: As sharp as it was last; 1 at first.  # []
        place: For each of the c nodes the row of ``weight`` that is its, n for one that was
            removed.  # int64 [c]

    Example:
        >>> expansion = Expansion(8, 8)
        >>> expansion(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    beta: Tensor
    place: Tensor

    def __init__(
        self,
        channels: int,
        nodes: int,
        width: int | None = None,
        layer: Layer = "fc",
        indicator: Indicator = "sa",
        tau: float = 0.5,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.indicator = indicator
        side = 3 if layer == "conv3x3" else 1
        like = torch.empty(0)
        weight = _START * fresh_entries((nodes, channels, side, side), channels * side**2)
        self.weight = nn.Parameter(weight.to(like))
        if indicator == "nc":
            self.s = nn.Parameter(torch.empty(nodes, device="cpu").normal_().to(like))
        if indicator != "ne":
            self.level = nn.Parameter(like.new_tensor(math.log(tau / (1 - tau)) / _STEEP))
        self.register_buffer("beta", torch.ones(()))
        self.register_buffer("place", torch.arange(nodes if width is None else width))

    @property
    def nodes(self) -> int:
        """How many nodes there are, n."""
        return self.weight.shape[0]

    @property
    def tau(self) -> Tensor:
        """The retention rate, in (0, 1); it moves as fast with u as u itself does, at a half."""
        return torch.sigmoid(_STEEP * self.level)

    def responses(self, maps: Tensor) -> Tensor:
        """The layer's output f'.

        Args:
            maps: Of the backbone.  # [B, C, h, w]

        Returns:
            [B, n, h, w]
        """
        if not self.nodes:
            return maps.new_zeros(len(maps), 0, *maps.shape[2:])
        return functional.conv2d(maps, self.weight, padding=self.weight.shape[-1] // 2)

    def alpha(self, responses: Tensor) -> Tensor:
        """The indicator.

        Args:
            responses: What the layer gives.  # [B, n, h, w]

        Returns:
            [B, n, h, w] for a convolution with ``sa``; [B, n, 1, 1] for ``fc`` with it, and else
            [1, n, 1, 1].
        """
        if self.indicator == "sa":
            outputs = responses.mean((2, 3), keepdim=True) if self.layer == "fc" else responses
            return torch.sigmoid(self.beta * outputs)
        if self.indicator == "nc":
            return torch.sigmoid(self.s)[None, :, None, None]
        return responses.new_ones(1, self.nodes, 1, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, C, h, w] -> alpha times f', [B, n, h, w]."""
        responses = self.responses(maps)
        return self.alpha(responses) * responses

    def compression(self, maps: Tensor, price: float) -> Tensor:
        r"""What keeps alpha, and with it the number of nodes, small.

        .. math:: L_R = \mathrm{ReLU}(a - \tau) + \rho \, \tau, \qquad a = \|\alpha\|_1 / c

        with ``sa`` (Eq. 7; a is the mean over images too), and with ``nc``
        :math:`\sum_i (|s_i| - 10)^2 + \mathrm{ReLU}(a - \tau)` (Eq. 5, whose first term
        App. A.1 differentiates as a square), where tau stays as it is.

        Eq. 7 alone has rho = 0. Its derivative with respect to tau is -1 where a > tau and 0
        elsewhere: tau can only grow, until it has passed a and nothing is left of L_R. What a
        retention rate costs is missing. With a price rho between 0 and 1 the derivative is
        rho - 1 where a > tau and rho where a < tau, so that tau follows a from both sides, and

        .. math:: \min_\tau \; \mathrm{ReLU}(a - \tau) + \rho \tau = \rho a
            \qquad (a \ge 0, \; 0 < \rho < 1, \text{ at } \tau = a),

        for it falls with slope rho - 1 up to tau = a and rises with slope rho behind it. What is
        left, once tau has settled, is an L1 penalty on alpha with rho times the weight of L_R.

        Args:
            maps: Of the backbone; L_R is of theta' and tau alone (Eq. 8), so detach them.
                # [B, C, h, w]
            price: rho; 0 is the paper's literal form. It concerns ``sa`` alone.

        Returns:
            []; 0 with ``ne``, which nothing compresses.
        """
        if self.indicator == "ne":
            return maps.new_zeros(())
        rate = self.alpha(self.responses(maps)).mean()
        excess = functional.relu(rate - self.tau)
        if self.indicator == "nc":
            return (self.s.abs() - _FAR).square().sum() + excess
        return excess + price * self.tau

    def use(self, maps: Tensor) -> Tensor:
        """How much each node is used by each image: its largest and its mean alpha.

        Args:
            maps: Of the backbone.  # [B, C, h, w]

        Returns:
            [B, 2, n]
        """
        alpha = self.alpha(self.responses(maps)).expand(len(maps), -1, -1, -1)
        return torch.stack([alpha.amax((2, 3)), alpha.mean((2, 3))], 1)

    def remove(self, keep: Tensor) -> None:
        """Cuts nodes out for good: their weights, and their share of everything else.

        Args:
            keep: Which nodes stay.  # bool [n]
        """
        rows = keep.nonzero().flatten()
        for name in ("weight", "s"):
            value = getattr(self, name, None)
            if value is not None:
                smaller = nn.Parameter(value.detach()[rows], requires_grad=value.requires_grad)
                setattr(self, name, smaller)
        # One past the last: what was removed before stays so.
        moved = torch.full((len(keep) + 1,), len(rows), device=self.place.device)
        moved[rows] = torch.arange(len(rows), device=rows.device)
        self.place = moved[self.place]

    def structure(self) -> dict[str, Any]:
        """What ``build`` needs; JSON-able."""
        return {
            "channels": self.weight.shape[1],
            "nodes": self.nodes,
            "width": len(self.place),
            "layer": self.layer,
            "indicator": self.indicator,
        }

    @classmethod
    def build(cls, structure: Mapping[str, Any]) -> Expansion:
        """An expansion of that structure with arbitrary values, to be loaded."""
        return cls(**structure)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.layer}, {self.indicator}, {self.nodes} of {len(self.place)} nodes"


def nodes_in_use(expansion: Expansion, use: Tensor, removal: Removal) -> Tensor:
    """Which nodes stay when their indicators become binary for good.

    Args:
        expansion: The nodes; all of ``ne`` stay, and of ``nc`` those with alpha of at least 1/2.
        use: What `Expansion.use` says of the task's training images.  # [N, 2, n]
        removal: A node of ``sa`` goes that is ``unused``, its alpha below 1/2 wherever it was
            looked at; or that has alpha below 1/2 in the ``mean``.

    Returns:
        bool [n]

    Example:
        >>> use = torch.tensor([[[0.9, 0.4], [0.3, 0.1]]])  # one image, two nodes
        >>> nodes_in_use(Expansion(4, 2), use, "unused").tolist()
        [True, False]
        >>> nodes_in_use(Expansion(4, 2), use, "mean").tolist()
        [False, False]
    """
    if expansion.indicator == "ne":
        return torch.ones(expansion.nodes, dtype=torch.bool, device=use.device)
    if expansion.indicator == "nc":
        return expansion.s.detach() >= 0
    largest, mean = use.unbind(1)
    return largest.amax(0) >= 0.5 if removal == "unused" else mean.mean(0) >= 0.5


def retention_curve(expansions: Sequence[Expansion]) -> tuple[str, dict[str, Any]]:
    """What a record shows of nodes kept: title and payload.

    Args:
        expansions: One for each task after the first.

    Example:
        >>> retention_curve([Expansion(4, 1, width=4)])[1]["y"]
        {'nodes kept, of 1': [0.25], 'τ': [0.5]}
    """
    lines = {"nodes kept, of 1": [e.nodes / len(e.place) for e in expansions]}
    if expansions[0].indicator != "ne":
        lines["τ"] = [round(float(e.tau.detach()), 6) for e in expansions]
    tasks = list(range(1, len(expansions) + 1))
    payload = {"x": tasks, "y": lines, "xlabel": "task", "ylabel": "share"}
    return "Retention rate", payload


def check_rates(tau: float, price: float) -> None:
    """Raises unless a retention rate is in (0, 1), and its price in [0, 1).

    Example:
        >>> check_rates(0.5, 0.0)
    """
    if not 0 < tau < 1:
        raise FastcilError(f"tau is {tau}; it must lie between 0 and 1, without these.")
    if not 0 <= price < 1:
        raise FastcilError(f"price is {price}; it must lie from 0 to below 1.")
