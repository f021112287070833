"""Adaptive aggregation: a stable and a plastic branch, weighed against each other as they learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastcil.addons.alpha import AlphaStage, sum_gradients
from fastcil.contract import (
    Addon,
    Context,
    Method,
    Record,
    Retained,
    Stage,
    Stream,
    Task,
    check_choices,
    check_not_negative,
    check_positive,
)
from fastcil.errors import CompositionError, FastcilError
from fastcil.memory.balance import drawn_subset
from fastcil.nn import AggregatedBackbone
from fastcil.nn.aggregation import aggregate
from fastcil.nn.scaling import has_scales


class AANets(Addon):
    r"""Adaptive aggregation networks (Liu, Schiele and Sun 2021, Sec. 4).

    From the second task on the extractor is two: a stable branch phi, whose convolutions keep the
    weights of the first task and learn a scale per pair of channels, and a plastic one eta, all of
    which learns; both start as the extractor of the first task and go on from task to task. After
    each level their maps are added with weights alpha and 1 - alpha (`AggregatedBackbone`).

    Two problems are solved in turn, each by first-order steps (Eqs. 4, 5): the method's stages
    learn phi, eta and the head on the new data D and the exemplars E with alpha fixed, and after
    each epoch of a stage that learns the new data, alpha takes steps of its own,

    .. math:: \alpha \leftarrow \alpha - \gamma \, \nabla_\alpha L_{CE}(\phi, \eta, \alpha; B) ,

    on B, the exemplars and as many images of each new class, drawn by chance once per task, both
    branches in evaluation mode (`AlphaStage`). Without any exemplar alpha stays where it is.

    The released code's gamma of 1e-8 moves alpha only because its LUCIR program never clears
    alpha's gradient, so that each step follows the sum of all gradients so far, those of the
    method's own loss included: ``AANets.PRESETS["released"]``. (Its iCaRL program clears it, and
    alpha stays at 0.5.) Here each step follows its own gradient by default. At gamma 0.001 alpha
    moved by up to 0.1 in 120 steps of iCaRL on `scenes`, its gradients being of the order of 0.1;
    at 0.01 it left [0, 1]. ``AANets.PRESETS["pod"]`` keeps alpha at 0.5, as the
    code released for PODNet does, by which the published figures of AANets on PODNet were made.

    Example:
        >>> AANets.Config().fixed, AANets.PRESETS["released"].lr
        (False, 1e-08)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of adaptive aggregation; only rates and numbers, the rest is the method's.

        alpha's steps have the schedule, the batch size and the momentum of the stage they
        accompany, without weight decay, which would draw alpha to the plastic branch. (The
        released 5e-4 is nothing beside sums of gradients.)

        Args:
            lr: gamma at the start; follows the schedule of the stage.
            per_class: Images of each new class in B; 0: as many as the old class with the most
                exemplars has. 20 in the released code, whatever memory holds.
            most_steps: Steps of alpha after an epoch, at most; one pass over B if that is shorter.
            gradients: ``own``: each step follows the gradient of its batch (paper); ``summed``:
                the sum of all so far, the method's own steps included (released LUCIR program).
            fixed: Whether alpha stays at 0.5.
        """

        lr: float = 0.001
        per_class: int = 0
        most_steps: int = 501
        gradients: Literal["own", "summed"] = "own"
        fixed: bool = False

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive("lr", self.lr)
            check_not_negative("per_class", self.per_class)
            check_positive("most_steps", self.most_steps)

    PRESETS: ClassVar[dict[str, Config]] = {
        "released": Config(lr=1e-8, per_class=20, gradients="summed"),
        "pod": Config(fixed=True),
    }

    config: Config
    summed: Tensor  # [levels], once there are two branches
    history: Tensor  # float64 [n, 1 + levels]: task, alpha of each level

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__(config, context, method)
        self.register_buffer("summed", torch.zeros(0))
        self.register_buffer("history", torch.empty(0, 0, dtype=torch.float64))

    def check(self, method: Method) -> None:
        """Raises `CompositionError` without exemplars, or without one extractor made of stages."""
        name = type(method).__name__
        if method.keeps != "exemplars":
            raise CompositionError(
                f"addon 'aanets' weighs old classes against new ones by exemplars, and {name} "
                f"keeps {method.keeps}; compose it with a method that keeps exemplars, as 'icarl'."
            )
        network = getattr(method, "network", None)
        extractors = [self.context.bare_backbone()] if network is None else network.extractors
        if method.adds_extractors or len(extractors) > 1:
            raise CompositionError(
                f"addon 'aanets' makes two branches of a method's one extractor, and {name} has "
                f"several; compose it with a method that has one, as 'icarl'."
            )
        if isinstance(extractors[0], AggregatedBackbone):
            return
        if has_scales(extractors[0]):
            raise CompositionError(
                f"addon 'aanets' makes a branch that is free to learn, and {name} has frozen the "
                f"convolutions of its extractor and scales them; switch that off, for aanets does "
                f"it in the other branch."
            )
        try:
            aggregate(extractors[0])
        except FastcilError as error:
            raise CompositionError(f"addon 'aanets' makes two branches, but {error}") from error

    def begin_task(self, task: Task) -> None:
        """Makes two branches of the extractor, in the second task; later they go on."""
        self.check(self.method)
        extractors = self.method.network.extractors
        if task.first or isinstance(extractors[0], AggregatedBackbone):
            return
        extractors[0] = aggregate(extractors[0])
        self.summed = torch.zeros_like(self._alphas().detach())

    def _branches(self) -> AggregatedBackbone | None:
        """The method's extractor, once there are two branches."""
        network = getattr(self.method, "network", None)
        extractor = None if network is None else network.extractors[0]
        return extractor if isinstance(extractor, AggregatedBackbone) else None

    def _alphas(self) -> nn.Parameter:
        branches = self._branches()
        assert branches is not None
        return branches.alphas

    def stages(self, task: Task, stages: list[Stage]) -> list[Stage]:
        """The method's stages without alpha, and with its steps where they learn the new data."""
        primary = self.primary("aanets", stages)
        if self._branches() is None:
            return stages
        for stage in stages:
            stage.parameters = partial(self._without_alphas, stage.parameters)
        if self.config.fixed or not len(task.exemplars):
            return stages
        for stage in primary:
            stage.companions.append(self._alpha_stage(task, stage))
            if self.config.gradients == "summed":
                sum_gradients(stage, self._alphas, self._sum)
        return stages

    def _without_alphas(self, parameters: Callable[[], Iterable[nn.Parameter]]) -> list[Any]:
        """What a stage trains, but alpha."""
        alphas = self._alphas()
        return [parameter for parameter in parameters() if parameter is not alphas]

    def _alpha_stage(self, task: Task, main: Stage) -> AlphaStage:
        """What learns alpha beside a stage."""
        config = self.config
        stream = Stream(
            (task.examples, task.exemplars),
            main.recipe.batch_size,
            drawn_subset(task, config.per_class),
        )
        return AlphaStage(
            main,
            stream,
            lr=config.lr,
            most_steps=config.most_steps,
            logits=main.logits or self.method.logits,
            alphas=self._alphas,
            summed=self._sum if config.gradients == "summed" else None,
        )

    def _sum(self) -> Tensor:
        return self.summed

    def end_task(self, task: Task) -> None:
        """Notes where alpha has come to."""
        branches = self._branches()
        if branches is None:
            return
        alphas = branches.alphas.detach().to(self.history)
        row = torch.cat([alphas.new_tensor([task.index]), alphas])[None]
        self.history = torch.cat([self.history, row]) if len(self.history) else row

    def retained(self) -> list[Retained]:
        """The second branch, and alpha."""
        branches = self._branches()
        if branches is None:
            return []
        held = {**branches.stable.state_dict(), "alphas": branches.alphas.detach()}
        return [Retained("stable branch", "network", held)]

    def records(self) -> list[Record]:
        """alpha of each level after each task."""
        if not len(self.history):
            return []
        tasks, *levels = self.history.cpu().unbind(1)
        return [
            Record(
                "curve",
                "Aggregation weights",
                {
                    "x": tasks.int().tolist(),
                    "y": {f"level {k}": alphas.tolist() for k, alphas in enumerate(levels, 1)},
                    "xlabel": "task",
                    "ylabel": "weight of the stable branch",
                },
            )
        ]
