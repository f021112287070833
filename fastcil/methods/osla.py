"""Online structured Laplace approximation: weights held by Kronecker-factored curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastcil.contract import Task
from fastcil.curvature import Curvature, make_curvature
from fastcil.methods.anchored import (
    Anchored,
    AnchoredConfig,
    held_layers,
    of_mean,
)
from fastcil.methods.recipes import FINETUNING


class OSLA(Anchored):
    r"""Online structured Laplace approximation (Ritter et al. 2018).

    .. math:: L = \mathrm{CE} + \frac\lambda2 \langle \Delta, \Lambda_{t-1} \Delta \rangle, \qquad
        \Lambda_t = \Lambda_{t-1} + H_t

    with :math:`\Delta` the displacement from the last weights, and H the Fisher information at each
    task's weights by K-FAC, layer by layer. A sum of Kronecker products is none: every factor is
    averaged over tasks, and the product multiplied by their number (as Shon et al. 2022, Sec. 4.1,
    merge factors). Batch norms' scales and shifts are not held, having no Kronecker factors:
    ``network.norms=first`` keeps them as they are after the first task.

    Example:
        >>> OSLA.Config().curvature
        'kfac'
    """

    @dataclass(frozen=True)
    class Config(AnchoredConfig):
        """Settings of OSLA; the recipes are those of `Finetune`.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            lam: lambda.
            head: ``all`` known classes share one softmax; or each ``task`` has its own head.
            curvature: ``kfac``; ``tkfac``, ``ekfac``, which hold the trace or the diagonal;
                ``xkfac``, with the correlations that batch norm makes in a batch (Lee et al. 2020),
                on the weights as they are; or ``diagonal``.
            estimator: Labels of the Fisher information: ``sampled`` from the model, ``exact``, or
                ``empirical``.
        """

        curvature: Literal["kfac", "tkfac", "ekfac", "xkfac", "diagonal"] = "kfac"
        estimator: Literal["sampled", "exact", "empirical"] = "sampled"

    PRESETS: ClassVar[dict[str, Any]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "tkfac": Config(first=FINETUNING, later=FINETUNING, curvature="tkfac"),
        "finetuning-task": Config(first=FINETUNING, later=FINETUNING, head="task"),
    }

    config: Config

    def curvature(self) -> Curvature:
        """Of every layer that is held."""
        kind, names = self.config.curvature, self.names()
        if kind != "diagonal":
            names = held_layers(self.network, names)
        return make_curvature(kind, self.network, names, estimator=self.config.estimator)

    def weight(self, task: Task) -> float:
        """Lambda times the number of tasks, of which the mean is kept."""
        lam: float = self.config.lam
        return lam * task.index

    def shares(self, task: Task) -> tuple[float, float]:
        """Those of the mean over tasks."""
        return of_mean(task.index + 1)
