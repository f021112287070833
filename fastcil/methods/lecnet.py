"""LEC-Net: nodes added for each session, and compressed to those it needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import nn

from fastcil.contract import (
    Batch,
    Context,
    Losses,
    Method,
    Recipe,
    Record,
    Retained,
    Stage,
    Stream,
    Task,
    check_choices,
    check_not_negative,
    check_positive,
    evaluating,
)
from fastcil.methods.lecnet_records import Analysis
from fastcil.methods.recipes import BASE_SESSION
from fastcil.nn import ExpandedBackbone, Network, distillation
from fastcil.nn.expanded import Fuse, GammaOf
from fastcil.nn.expansion import Layer, Removal, check_rates, nodes_in_use, retention_curve
from fastcil.nn.growing import compress, expanded_backbone, without_settled
from fastcil.nn.lifecycle import frozen_copy, linear_head, start_network
from fastcil.nn.sessions import early_convolutions

_LATER = Recipe(epochs=300, lr=0.01, schedule="constant")


class LECNet(Method):
    r"""Learnable expansion-and-compression network (Yang et al. 2021).

    In every task but the first the backbone f gets as many new nodes as it has features, behind
    the same maps, and with alpha their indicator

    .. math:: f_t(x) = (\alpha_t \odot f'_t(x)) \oplus \gamma f_{t-1}(x)

    (Eq. 4; `fastcil.nn.Expansion` and `fastcil.nn.ExpandedBackbone`). With z the logits and z'
    those of the network before the task,

    .. math:: L = \mathrm{CE}(z, y) + \lambda_1 \mathrm{KD}_T(z, z') + \lambda_2 L_R(\alpha_t; \tau)

    on the new images alone (Eq. 8; batch means). The forms of Table 1 are ``expansion``: ``none``,
    the baseline (Eq. 2); ``ne``, nodes that all stay (Eq. 3); ``nc``, alpha = sigmoid(s) (Eq. 5);
    ``sa``, alpha = sigmoid(beta f') with beta = 1 + epoch and tau learned (Eqs. 6 to 8). What L_R
    is in each of them, and why tau has a ``price``, `fastcil.nn.Expansion.compression` says.

    As a task's training ends indicators become binary: nodes that are not used are removed for
    good, and the network that is saved is smaller. The others keep alpha, with the beta of the
    last epoch, which is saved with them. L_R has gradients for the new nodes and tau alone, as
    Eq. 8 has it. Nodes of earlier tasks stay as they were learned: Eq. 8 is minimised over theta
    and the newest theta'.

    After the first task the network is that of ``finetune``. No image is kept.

    Attributes:
        teacher: The network before the task, while it is trained.

    Example:
        >>> LECNet.Config().gamma, LECNet.PRESETS["fscil-cub"].trains
        (0.8, 'last-block')
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of LEC-Net.

        The recipes are the paper's, whose sessions are steps on all shots in one batch. It tells
        neither how many, for they end by test accuracy (see ``engine.epoch_choice``), nor lambda_1,
        lambda_2, T or where tau starts. 300 steps are ours: behind a head of unit features new
        classes overtook old ones after 110, at this learning rate (20 classes of CIFAR-100, one
        seed); the 35 to 70 of the authors' later code (DSN) go with rates of 0.05 and more.
        lambda_2 is that code's, whatever it weighs there; its gamma of 0.2 is for features of unit
        length.

        ``PRESETS`` have the head of Tao et al. (2020, TOPIC), on whose protocol the paper's tables
        are, and train what that code trains. lambda_1 is ours. In three 5-way 5-shot sessions of
        50 epochs behind a small network of 20 classes of CIFAR-100 (23.5 % right, one seed), with
        1 nothing of them was left by the last epoch, with 20 and T = 1 little was learned, and
        with 5 both went on for two sessions; all of it is gentler where the backbone stays.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            expansion: ``none``, ``ne``, ``nc`` or ``sa``.
            fuse: Whether new features are added to the old by ``sum`` or stand beside them
                (``concat``).
            layer: What the nodes are: ``fc`` on pooled features, or ``conv1x1`` or ``conv3x3`` on
                the last map (Table 2).
            gamma: Weight of the features there were (Table 3).
            gamma_of: Which these are: ``all``, so that gamma compounds from session to session, as
                Eqs. 3 and 4 have it, or those of the ``backbone``, as in that code.
            distillation_weight: lambda_1.
            temperature: T.
            compression_weight: lambda_2.
            tau: Retention rate, or where it starts: a half, as alpha does.
            learn_tau: Whether ``sa`` learns tau.
            price: rho, from 0 (as the paper has it) to below 1.
            removal: What of ``sa`` is removed: nodes ``unused`` by every training image, or with
                alpha below 1/2 in the ``mean``.
            trains: What later tasks train: ``all`` (Eq. 8); of the backbone's convolutions those
                of the ``last-block`` alone, as Tao et al. do; or nothing but the ``expansion`` and
                the head, the backbone staying as the first task left it (DSN).
            normalised: Whether the head reads feature vectors of unit length; see
                `fastcil.nn.LinearHead`.
            analyse: Whether to record indicators by epoch (Fig. 6), and the drift of features
                (Fig. 7) of some images of the first task, which are kept for that alone.
            samples: How many images are looked at in these.
        """

        first: Recipe = BASE_SESSION
        later: Recipe = _LATER
        expansion: Literal["none", "ne", "nc", "sa"] = "sa"
        fuse: Fuse = "sum"
        layer: Layer = "fc"
        gamma: float = 0.8
        gamma_of: GammaOf = "all"
        distillation_weight: float = 5.0
        temperature: float = 2.0
        compression_weight: float = 0.1
        tau: float = 0.5
        learn_tau: bool = True
        price: float = 0.5
        removal: Removal = "unused"
        trains: Literal["all", "last-block", "expansion"] = "all"
        normalised: bool = False
        analyse: bool = False
        samples: int = 256

        def __post_init__(self) -> None:
            check_choices(self)
            for name in ("gamma", "temperature", "samples"):
                check_positive(name, getattr(self, name))
            for name in ("distillation_weight", "compression_weight"):
                check_not_negative(name, getattr(self, name))
            check_rates(self.tau, self.price)

    PRESETS: ClassVar[dict[str, Config]] = dict.fromkeys(
        ("fscil-cifar100", "fscil-cub", "fscil-mini"),
        Config(trains="last-block", normalised=True),
    )

    config: Config
    keeps = "nothing"

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.teacher: Network | None = None
        self.analysis = Analysis(context, config.samples) if config.analyse else None

    def begin_task(self, task: Task) -> None:
        """Starts the network, or adds the new nodes and classes."""
        config = self.config
        if self.analysis is not None:
            self.analysis.begin(self._recipe(task).epochs)
        if task.first:
            backbone = self.context.make_backbone()
            self.network = start_network(backbone, task.total, normalised=config.normalised)
            return
        self.teacher = frozen_copy(self.network)
        if config.expansion == "none":
            if config.trains == "expansion":
                self.network.freeze(0)
        else:
            self._expand()
        linear_head(self.network).grow(task.total, self.network.out_channels)

    def _expand(self) -> None:
        """Adds nodes."""
        config, network = self.config, self.network
        assert config.expansion != "none"
        expanded = expanded_backbone(network)
        if expanded is None:
            backbone = network.extractors[0]
            expanded = ExpandedBackbone(backbone, config.fuse, config.gamma, config.gamma_of)
            network.extractors[0] = expanded
            if config.trains == "expansion":
                expanded.freeze()
        expanded.expand(config.layer, config.expansion, config.tau)

    def _recipe(self, task: Task) -> Recipe:
        return self.config.first if task.first else self.config.later

    def stages(self, task: Task) -> list[Stage]:
        """One stage on the new data."""
        recipe = self._recipe(task)
        grows = expanded_backbone(self.network) is not None
        return [
            Stage(
                name="lecnet",
                method=self,
                objective=partial(self._loss, task.known),
                streams=(Stream((task.examples,), recipe.batch_size),),
                recipe=recipe,
                parameters=partial(self._trained, task),
                primary=True,
                logits=self.logits,
                before_epoch=[partial(self._start_epoch, task)] if grows else [],
                finish=partial(self._compress, task) if grows else None,
            )
        ]

    def _trained(self, task: Task) -> list[nn.Parameter]:
        """The network, but for what earlier tasks added, and for what of the backbone stays."""
        parameters = self.network.trained_parameters()
        if task.first:
            return parameters
        expanded = expanded_backbone(self.network)
        backbone = self.network.extractors[0]
        if expanded is not None:
            parameters = without_settled(parameters, expanded, self.config.learn_tau)
            backbone = expanded.backbone
        left_out = _staying(backbone, self.config.trains)
        return [parameter for parameter in parameters if parameter not in left_out]

    def _loss(self, known: int, batch: Batch) -> Losses:
        """Cross-entropy over all known classes, distillation, compression (Eqs. 2, 3, 5, 8)."""
        config, losses = self.config, {}
        expanded = expanded_backbone(self.network)
        if expanded is None:
            logits = self.network(batch.images)  # [B, K]
        else:
            maps = expanded.own_maps(batch.images)
            logits = self.network.head(expanded.fuse(maps).mean((2, 3)))
            if expanded.newest.indicator != "ne":
                pressure = expanded.newest.compression(maps.detach(), config.price)
                losses["compression"] = config.compression_weight * pressure
        losses["classification"] = nn.functional.cross_entropy(logits, batch.labels)
        if self.teacher is not None:
            taught = distillation(logits[:, :known], self.teacher(batch.images), config.temperature)
            losses["distillation"] = config.distillation_weight * taught
        return losses

    def _start_epoch(self, task: Task, epoch: int) -> None:
        """Makes indicators sharper (Eq. 6)."""
        expanded = expanded_backbone(self.network)
        assert expanded is not None
        expanded.newest.beta.fill_(1.0 + epoch)
        self._note(task, expanded, epoch)

    def _note(self, task: Task, expanded: ExpandedBackbone, epoch: int) -> None:
        """Records the indicators, if that is wanted."""
        if self.analysis is not None and expanded.newest.indicator != "ne":
            with evaluating(self):
                self.analysis.note(expanded, self.analysis.some(task), epoch)

    def _compress(self, task: Task) -> None:
        """Removes the nodes that the task doesn't need."""
        expanded = expanded_backbone(self.network)
        assert expanded is not None
        newest = expanded.newest
        self._note(task, expanded, int(newest.beta))
        with evaluating(self):
            use = self.context.scan(
                lambda images: newest.use(expanded.own_maps(images)), task.examples
            )
        compress(self.network, nodes_in_use(newest, use, self.config.removal))

    def end_task(self, task: Task) -> None:
        """Lets the old network go; measures how far features have drifted."""
        self.teacher = None
        if self.analysis is not None:
            with evaluating(self):
                self.analysis.measure(task, self.network.features)

    def retained(self) -> list[Retained]:
        """The nodes that tasks have added, and for an analysis some images."""
        expanded = expanded_backbone(getattr(self, "network", None))
        held = []
        if expanded is not None:
            held.append(Retained("expansions", "network", expanded.added()))
        if self.analysis is not None and len(self.analysis.start):
            held.append(self.analysis.retained())
        return held

    def records(self) -> list[Record]:
        """Nodes kept and tau by task, and what an analysis found."""
        expanded = expanded_backbone(getattr(self, "network", None))
        records = [] if expanded is None else [Record("curve", *retention_curve(expanded.each()))]
        return records if self.analysis is None else [*records, *self.analysis.records()]


def _staying(backbone: nn.Module, trains: str) -> set[nn.Parameter]:
    """What of a backbone later tasks leave as it is."""
    if trains == "all":
        return set()
    return set(backbone.parameters()) if trains == "expansion" else early_convolutions(backbone)
