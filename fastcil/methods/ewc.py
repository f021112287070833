"""Elastic weight consolidation, with an anchor for each task or one for all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastcil.contract import Context, Recipe, Retained, Task, check_not_negative
from fastcil.curvature import Curvature, make_curvature
from fastcil.curvature.anchor import displacements, draws, kept_curvature
from fastcil.curvature.curvature import grown
from fastcil.data import Examples
from fastcil.methods.anchored import Anchored, AnchoredConfig
from fastcil.methods.recipes import FINETUNING, online
from fastcil.nn import Tensors

_CIFAR10 = Recipe(
    epochs=50, lr=0.03, schedule="constant", momentum=0.0, weight_decay=0.0, batch_size=32
)
_MNIST = replace(_CIFAR10, epochs=1, batch_size=10)


@dataclass(frozen=True)
class FisherConfig(AnchoredConfig):
    """Settings that both forms share; see `EWC.Config`.

    Example:
        >>> FisherConfig().estimator
        'empirical'
    """

    estimator: Literal["empirical", "sampled", "exact"] = "empirical"
    per: Literal["sample", "batch"] = "sample"
    images: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("images", self.images)


class EWC(Anchored):
    r"""Elastic weight consolidation (Kirkpatrick et al. 2017, Eq. 3), an anchor for every task.

    .. math:: L = \mathrm{CE} + \frac\lambda2 \sum_{k<t} \sum_i F_i^k (\theta_i - \theta_i^k)^2

    with :math:`F^k` the diagonal of the Fisher information of task k at its weights
    :math:`\theta^k` (`fastcil.curvature.DiagonalFisher`). The sum over tasks is kept as what it is,
    one quadratic function of the weights: about the last anchor, with a linear term; so memory
    does not grow, and nothing is approximated. Much released code leaves out the half: its lambda
    is half of this one.

    Example:
        >>> EWC.Config().lam
        1.0
    """

    @dataclass(frozen=True)
    class Config(FisherConfig):
        """Settings of EWC; the recipes are those of `Finetune`.

        The ``samc-...`` presets are Bai et al.'s (2023, SAMC, appendix E), whose code goes back
        to Lopez-Paz and Ranzato's: their lambda is doubled for the half, and the Fisher
        information is the square of the mean gradient of 10 images. These are drawn here, where
        that code takes the task's first, and batch norms use running statistics, there the
        batch's own.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            lam: lambda. The Fisher information grows by every task: gradient descent with momentum
                beta diverges where lr lambda times its largest entry exceeds 2 (1 + beta).
            head: ``all`` known classes share one softmax; or each ``task`` has its own head.
            estimator: Labels of the Fisher information: ``empirical``, the true ones;
                ``sampled`` from the model; ``exact``, all of them by their probability.
            per: Whether gradients of every ``sample`` are squared, or mean gradients of a
                ``batch``, as some released code does.
            images: How many of the task's, drawn at random, the Fisher information is measured on;
                0 for all.
        """

    PRESETS: ClassVar[dict[str, Any]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "finetuning-task": Config(first=FINETUNING, later=FINETUNING, head="task"),
        "samc-cifar10": Config(
            online(0.1), online(0.1), lam=2.0, head="task", per="batch", images=10
        ),
        **dict.fromkeys(
            ("samc-cifar100", "samc-mini"),
            Config(online(1.0), online(1.0), lam=2.0, head="task", per="batch", images=10),
        ),
    }

    config: Config
    pull: Tensors

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.pull = Tensors()

    def curvature(self) -> Curvature:
        """The diagonal of the Fisher information."""
        return make_curvature(
            "diagonal",
            self.network,
            self.names(),
            estimator=self.config.estimator,
            per=self.config.per,
        )

    def looked_at(self, task: Task) -> Examples:
        """As many of the task's images as the settings say."""
        return _some(task, self.config.images)

    def shares(self, task: Task) -> tuple[float, float]:
        """Those of the sum."""
        return 1.0, 1.0

    def end_task(self, task: Task) -> None:
        """As of all of them; about the new anchor, the old tasks pull back towards theirs."""
        pull = self.pull
        if len(self.kept):
            moved = displacements(self.kept, dict(self.network.named_parameters()))
            pull = _pull(pull, kept_curvature(self.kept), moved)
        super().end_task(task)
        self.pull = pull

    def penalty(self) -> Tensor:
        """Of all anchors, but for a constant."""
        value = super().penalty()
        if not len(self.pull):
            return value
        moved = displacements(self.kept, dict(self.network.named_parameters()))
        with torch.autocast(value.device.type, enabled=False):
            terms = [
                torch.sum(moved[name] * grown(pull, moved[name].shape))
                for name, pull in self.pull.group("").items()
            ]
            return value + torch.stack(terms).sum()

    def retained(self) -> list[Retained]:
        """The last anchor, the curvature, and how the earlier anchors pull."""
        pulls = {name: self.pull[name] for name in self.pull.names}
        return [*super().retained(), Retained("earlier anchors", "curvature", pulls)]


def _some(task: Task, images: int) -> Examples:
    """Some of the task's images, drawn; all for 0."""
    count = len(task.examples)
    if not 0 < images < count:
        return task.examples
    order = torch.randperm(count, generator=draws(task.index, torch.initial_seed()))
    return task.examples.select(order[:images])


def _pull(before: Tensors, fisher: dict[str, Tensor], moved: dict[str, Tensor]) -> Tensors:
    """Sum over anchors k of F^k (anchor now - anchor k): what F and the last step add to it."""
    with torch.no_grad():
        pulls = {}
        for name, step in moved.items():
            pulls[name] = step * grown(fisher[name], step.shape)
            if name in before.names:
                pulls[name] += grown(before[name], step.shape)
    return Tensors(pulls)


class OnlineEWC(Anchored):
    r"""Online elastic weight consolidation (Schwarz et al. 2018): one anchor.

    .. math:: L = \mathrm{CE} + \frac\lambda2 \sum_i F_i (\theta_i - \theta_i^{t-1})^2, \qquad
        F \leftarrow \gamma F + F^t

    (Chaudhry et al. 2018 and Huszár 2018 give the single anchor). Much released code leaves out
    the half: its lambda is half of this one.

    Example:
        >>> OnlineEWC.PRESETS["cifar10"].lam
        20.0
    """

    @dataclass(frozen=True)
    class Config(FisherConfig):
        """Settings of online EWC; the recipes are those of `Finetune`.

        ``PRESETS`` are those of Buzzega et al.'s released code for Seq-CIFAR-10 and Seq-MNIST,
        their lambdas doubled for the half in the loss.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            lam: lambda.
            head: ``all`` known classes share one softmax; or each ``task`` has its own head.
            estimator: Labels of the Fisher information, as in `EWC`.
            per: Whose gradients are squared, as in `EWC`.
            images: How many it is measured on, as in `EWC`.
            gamma: Factor of the old tasks' Fisher information.
        """

        gamma: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            check_not_negative("gamma", self.gamma)

    PRESETS: ClassVar[dict[str, Any]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "cifar10": Config(first=_CIFAR10, later=_CIFAR10, lam=20.0),
        "mnist": Config(first=_MNIST, later=_MNIST, lam=180.0),
    }

    config: Config

    def curvature(self) -> Curvature:
        """The diagonal of the Fisher information."""
        return make_curvature(
            "diagonal",
            self.network,
            self.names(),
            estimator=self.config.estimator,
            per=self.config.per,
        )

    def looked_at(self, task: Task) -> Examples:
        """As many of the task's images as the settings say."""
        return _some(task, self.config.images)

    def shares(self, task: Task) -> tuple[float, float]:
        """Gamma for the old one."""
        return self.config.gamma, 1.0
