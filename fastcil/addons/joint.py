"""Learning masks and network in one step: what CIM's bilevel optimisation is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.addons.mask import compose_batch
from fastcil.contract import Batch, Losses, Stage
from fastcil.nn import Network
from fastcil.ops import cam, send


def train_jointly(stage: Stage, objective: JointObjective) -> None:
    """Makes a stage learn phi in each of its own steps; changes the stage in place.

    Args:
        stage: The stage that learns the new data.
        objective: What it minimises from now on.
    """
    parameters = stage.parameters
    stage.objective = objective
    stage.parameters = lambda: [*parameters(), *objective.start()]


class JointObjective:
    r"""The one-level loss of "joint train" (Luo et al. 2023, Table 3, row 8).

    .. math:: L_{CIL}(\tilde x; \theta, \omega) + \mu \, \mathrm{mean}(M^2)
        + \mu' L_{CE}(E \cup D_i; \theta, \phi, \omega)

    with phi's masks M (Eqs. S1a, S1b) and the new images composed as they say (Eq. S1c), is
    minimised over theta, omega and phi at once, on each batch of the stage. The paper says only
    that both models are trained "for each input batch"; this is Eq. 9 with theta in the place of
    theta+ and the stage's own loss in that of the outer one, so that nothing looks ahead.

    phi takes part in the stage's optimiser; its derivatives are scaled by beta_2 over the stage's
    learning rate, so that with SGD it learns at beta_2, by the stage's schedule. The branch
    keeps to the running statistics of batch norms, as its masks are made with them.

    Args:
        stage: The stage that learns the new data, as its method made it.
        classes: Labels of the new images; an exemplar of one of them counts as new.
        network: Gives the network whose maps become masks.
        branch: Gives that network with Padé activations, in evaluation mode.
        curves: Gives phi.
        lr: beta_2.
        ratio: eta.
        foreground_ratio: eta', 1 for sharp boxes.
        mu: Weight of the masks' size.
        mu_prime: Weight of the branch's own cross-entropy.
        compress_all: Whether exemplars are composed too.
    """

    def __init__(
        self,
        stage: Stage,
        classes: Iterable[int],
        *,
        network: Callable[[], Network],
        branch: Callable[[], Network],
        curves: Callable[[], Iterable[nn.Parameter]],
        lr: float,
        ratio: float,
        foreground_ratio: float,
        mu: float,
        mu_prime: float,
        compress_all: bool,
    ) -> None:
        self.objective = stage.objective
        self.classes = torch.tensor(sorted(classes))
        self.network = network
        self.branch = branch
        self.curves = curves
        self.scale = lr / stage.recipe.lr
        self.ratios = ratio, foreground_ratio
        self.mu = mu
        self.mu_prime = mu_prime
        self.compress_all = compress_all

    def start(self) -> Iterable[nn.Parameter]:
        """phi, as the stage begins; what steps need is made and sent then, not in the first."""
        self.branch()
        phi = list(self.curves())
        (self.classes,) = send((self.classes,), phi[0].device)
        return phi

    def __call__(self, batch: Batch) -> Losses:
        """The stage's terms on the composed batch, then ``cim masks`` and ``cim branch``."""
        network = self.network()
        maps = self._maps(batch.images)  # [B, C, h, w]
        masks = cam(maps, network.cam_weights(batch.labels).detach())  # [B, h, w]
        new = None
        if not self.compress_all:
            new = (batch.labels[:, None] == self.classes).any(1)
        composed = compose_batch(batch.images, masks, *self.ratios, new)
        scores = network.head(maps.mean((2, 3)))
        return {
            **self.objective(replace(batch, images=composed)),
            "cim masks": self.mu * masks.square().mean(),
            "cim branch": self.mu_prime * F.cross_entropy(scores, batch.labels),
        }

    def _maps(self, images: Tensor) -> Tensor:
        """The branch's maps, whose derivatives with respect to phi are scaled."""
        branch = self.branch()
        learned = {id(p) for p in self.curves()}
        scaled = {
            f"branch.{name}": p.detach() + self.scale * (p - p.detach())
            for name, p in branch.named_parameters()
            if id(p) in learned
        }
        # The network's own pass changes running statistics in place, before the backward pass of
        # the branch reads those that it was made with.
        kept = {f"branch.{name}": buffer.clone() for name, buffer in branch.named_buffers()}
        maps: Tensor = torch.func.functional_call(_Maps(branch), {**scaled, **kept}, (images,))
        return maps


class _Maps(nn.Module):
    """A network's maps as a module's forward."""

    def __init__(self, branch: Network) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, images: Tensor) -> Tensor:
        return self.branch.maps(images)
