"""Memory aware synapses: weights are held by how much the output depends on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastcil.contract import Task
from fastcil.curvature import Curvature, make_curvature
from fastcil.methods.anchored import Anchored, AnchoredConfig, of_mean
from fastcil.methods.recipes import FINETUNING


class MAS(Anchored):
    r"""Memory aware synapses (Aljundi et al. 2018).

    .. math:: L = \mathrm{CE} + \lambda \sum_i \Omega_i (\theta_i - \theta_i^{t-1})^2, \qquad
        \Omega_i = E_x\big[\,\big|\partial_i \lVert f(x) \rVert^2\big|\,\big]

    with f the logits. Labels play no part in the importance, which is summed over tasks, as in the
    paper, or averaged.

    Example:
        >>> MAS.Config().merging
        'sum'
    """

    @dataclass(frozen=True)
    class Config(AnchoredConfig):
        """Settings of MAS; the recipes are those of `Finetune`.

        The paper's lambda of 1 goes with learning rates of fine-tuning (``PRESETS``): gradient
        descent diverges where 2 lambda Omega times the learning rate exceeds 2, and Omega grows
        with the logits.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            lam: lambda.
            head: ``all`` known classes share one softmax; or each ``task`` has its own head.
            per: Whether the absolute gradients of every ``sample`` are taken (the paper's), or
                those of a ``batch``'s mean, as common implementations do.
            merging: How importances of tasks are merged, ``sum`` or ``mean``.
        """

        lam: float = 0.01
        per: Literal["sample", "batch"] = "sample"
        merging: Literal["sum", "mean"] = "sum"

    PRESETS: ClassVar[dict[str, Any]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING, lam=1.0),
    }

    config: Config

    def curvature(self) -> Curvature:
        """The importances."""
        return make_curvature("mas", self.network, self.names(), per=self.config.per)

    def weight(self, task: Task) -> float:
        """Twice lambda: the penalty has a half, the paper's has none."""
        lam: float = self.config.lam
        return 2 * lam

    def shares(self, task: Task) -> tuple[float, float]:
        """Those of the sum or the mean."""
        return (1.0, 1.0) if self.config.merging == "sum" else of_mean(task.index + 1)
