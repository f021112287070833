"""Class-incremental masking: exemplars compressed around a box that the method learns to draw."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fastcil.addons.compression import (
    BoxConfig,
    Compression,
    check_exemplars,
    check_network,
    check_sizes,
)
from fastcil.addons.curves import (
    append_row,
    blocks,
    distances,
    inherited,
    learnable,
    learnable_blocks,
    place_record,
    shape_record,
    task_record,
)
from fastcil.addons.joint import JointObjective, train_jointly
from fastcil.addons.mask import MaskStage
from fastcil.addons.pictures import map_record
from fastcil.addons.regions import Regions
from fastcil.contract import (
    Addon,
    Context,
    Method,
    Recipe,
    Record,
    Retained,
    Stage,
    Stream,
    Task,
    check_not_negative,
    evaluating,
)
from fastcil.data import Examples
from fastcil.errors import CompositionError
from fastcil.memory.boxes import class_boxes
from fastcil.nn import Network, Pade, share_with_pade


class CIM(Addon):
    """Class-incremental masking (Luo et al. 2023, Sec. 4.2, Algorithm 1).

    As with CAM-based compression, an exemplar stays sharp inside the box of its class activation
    map; here the map comes from a second branch of the same network, which shares every weight
    and batch-norm statistic with it and has learnable Padé activations phi instead of ReLU. After
    each epoch of the stage that learns the new data, phi takes some bilevel steps (`MaskStage`)
    towards masks whose compression harms that learning least.

    phi has one set of curves per extractor and starts as ReLU. Those of the last extractor are
    learned; those of earlier ones stay. An extractor that comes anew starts from the newest set
    (phi_i <- phi_{i-1}, Algorithm 1), and so does one that takes the place of several, as FOSTER's
    student does. (In the released code FOSTER's curves start again from those of the first phase.)

    The rows of Table 3, its ablations, and their options:

    ======================= =======================================================
    row                     options
    ======================= =======================================================
    1 baseline              the method without addon
    2 artifact aug.         ``boxes="cam", store=False``
    3 full compression      ``boxes="none"``, 1/4 of the pixels
    4 random activation     ``boxes="random"``
    5 centre activation     ``boxes="centre"``, 7/16 of the pixels
    6 class activation      ``boxes="cam"``
    7 phase-wise threshold  ``boxes="cam", threshold="held-out"``
    8 joint train           ``optimisation="joint"``
    9 bilevel (CIM)         as it is
    10 last block only      ``places="last-block"``
    11 foreground too       ``foreground_ratio=2.0``, b/2 + (1 - b)/4 of the pixels
    ======================= =======================================================

    Example:
        >>> CIM.Config().mask.lr, CIM.Config(inner_lr=0.01).mu_prime
        (0.01, 0.2)
    """

    @dataclass(frozen=True)
    class Config(BoxConfig):
        """Settings of class-incremental masking; the defaults are those of Luo et al. 2023.

        To those of `BoxConfig` come those of the mask-level optimisation. Where the paper is
        silent they are the released code's: Adam, its weight decay of 5e-4, batches of 16, half
        a step per class and epoch. Where the two differ, the released code has ``inner_lr`` at
        0.1 times the task-level learning rate with FOSTER, that is 0.01, and at that rate itself
        with DER, whose ``mu`` is 0; and ``compress_all`` true. The term of ``mu`` spans the inner
        batch, exemplars included, as there. The outer batch is of new images alone, as in Eq. 9;
        the released code draws it from all. It has AutoAugment with DER too, which is
        ``augment.policy=imagenet`` here.

        Args:
            boxes: What stays sharp: the box of the learned branch's map (``learned``) or of the
                network's own (``cam``), the ``centre``, a ``random`` part, or nothing (``none``).
                But for the first, phi plays no part.
            optimisation: ``bilevel``, or ``joint``: phi, theta and omega in one step, on each batch
                of the stage that learns the new data (`fastcil.addons.joint.JointObjective`).
            places: Where curves are learned: in ``all`` places, or in the ``last-block`` with ReLU
                before it. A block is a stage of the backbone, so that of ResNet-18 4 of 17 places
                are learned; the paper doesn't say whether it means that or the last residual
                block, and its Fig. S1 speaks of blocks in the same way.
            mask: Recipe of phi, beta_2 its ``lr``; its ``epochs`` are those of the stage that
                it accompanies.
            inner_lr: beta_1 (Eq. 7) at the start; follows the schedule of ``mask``.
            mu: Weight of the masks' size (Eq. 8).
            mu_prime: Weight of the branch's own cross-entropy (Eq. 9).
            steps_per_class: Mask-level steps per epoch and class of the task; at least one step.
            compress_all: Whether the inner step composes exemplars too.
        """

        boxes: Literal["learned", "cam", "centre", "random", "none"] = "learned"
        optimisation: Literal["bilevel", "joint"] = "bilevel"
        places: Literal["all", "last-block"] = "all"
        mask: Recipe = field(
            default=Recipe(epochs=200, lr=0.01, optimizer="adam", batch_size=16, clip=1.0),
            metadata={"own_batch": True},
        )
        inner_lr: float = 0.1
        mu: float = 0.1
        mu_prime: float = 0.2
        steps_per_class: float = 0.5
        compress_all: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("inner_lr", "mu", "mu_prime", "steps_per_class"):
                check_not_negative(name, getattr(self, name))

    config: Config
    distances: Tensor  # [T, places], after each task
    brings_codec: ClassVar[str | None] = "bbox"

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__(config, context, method)
        self.compression = Compression(config)
        self.regions = Regions(config, config.boxes)
        self.phi = nn.ModuleList()
        self.register_buffer("distances", torch.empty(0, 0, dtype=torch.float64))
        self._pictures: list[Record] = []
        self._drop_branch()

    @property
    def learns(self) -> bool:
        """Whether there is a branch whose curves are learned."""
        return bool(self.config.boxes == "learned")

    def check(self, method: Method) -> None:
        """Raises `CompositionError` if there are no exemplars, no activation maps, or no ReLU."""
        check_exemplars("cim", method)
        regions = Regions(self.config, self.config.boxes)
        regions.check("cim", method)
        check_sizes("cim", self.config, self.context)
        if not self.learns:
            check_network("cim", method, ("maps", "cam_weights") if regions.asks else ())
            return
        check_network("cim", method, ("extractors", "maps", "head", "cam_weights"))
        if getattr(method, "network", None) is None:
            backbones: Iterable[nn.Module] = [self.context.bare_backbone()]
        else:
            backbones = method.localiser().extractors
        for backbone in backbones:
            if not learnable(backbone, self.config.places):
                raise CompositionError(
                    f"addon 'cim' puts learnable activations in the place of nn.ReLU modules, and "
                    f"{type(backbone).__name__} has none; make its activations nn.ReLU modules, "
                    f"one for each place."
                )

    def codec_options(self) -> dict[str, Any]:
        """The downsampling ratios."""
        return self.config.codec_options()

    def begin_task(self, task: Task) -> None:
        """Gives every extractor its curves."""
        self.check(self.method)
        self._pictures = []
        if self.learns:
            self._fit(self.method.localiser())
        self.regions.begin_task()
        self.compression.begin_task(task)

    def stages(self, task: Task, stages: list[Stage]) -> list[Stage]:
        """The method's stages; those that learn the new data with mask-level steps."""
        primary = self.primary("cim", stages)
        for stage in primary if self.learns else ():
            if self.config.optimisation == "joint":
                train_jointly(stage, self._joint_objective(task, stage))
            else:
                stage.companions.append(self._mask_stage(task, stage))
        self.regions.hold_out(task, stages)
        self.compression.simulate(task, stages, self._locate)
        return stages

    def _mask_stage(self, task: Task, main: Stage) -> MaskStage:
        """What learns phi beside a stage."""
        config = self.config
        size = config.mask.batch_size
        return MaskStage(
            main,
            (Stream((task.examples, task.exemplars), size), Stream((task.examples,), size)),
            dataclasses.replace(config.mask, epochs=main.recipe.epochs),
            max(1, int(config.steps_per_class * len(task.classes))),
            inner_lr=config.inner_lr,
            **self._terms(),
        )

    def _joint_objective(self, task: Task, stage: Stage) -> JointObjective:
        """What a stage minimises that learns phi as well."""
        return JointObjective(stage, task.classes, lr=self.config.mask.lr, **self._terms())

    def _terms(self) -> dict[str, Any]:
        """What the terms of phi are made of, however they are optimised."""
        config = self.config
        return {
            "network": self.method.localiser,
            "branch": self._branch,
            "curves": self._learned,
            "ratio": config.ratio,
            "foreground_ratio": config.foreground_ratio,
            "mu": config.mu,
            "mu_prime": config.mu_prime,
            "compress_all": config.compress_all,
        }

    def marks(self, examples: Examples) -> Tensor:
        """The box of each image, int16 [N, 4]."""
        boxes = self.compression.offer(examples, self._locate)
        if self.learns:
            self._pictures = [self._compare_maps(examples)]
        return boxes

    def end_task(self, task: Task) -> None:
        """Keeps the newest curves where the network shrank, and nothing of the task's images."""
        self.compression.end_task()
        if not self.learns:
            return
        self._drop_branch()
        self.distances = append_row(self.distances, distances(self._curves()[-1]))
        self._fit(self.method.network)

    def retained(self) -> list[Retained]:
        """phi: no exemplar is decoded with it, the next boxes are drawn with it."""
        if not self.learns:
            return []
        return [Retained("curves of masks", "network", dict(self.phi.state_dict()))]

    def _drop_branch(self) -> None:
        """Lets go of the localiser, which the method may be about to drop."""
        # Tuples hide the branch from nn.Module, which would save the method's weights again.
        self._held: tuple[object, ...] = ()
        self._made: tuple[Network, ...] = ()

    def _locate(self, examples: Examples) -> Tensor:
        """Boxes by the method and its branch as they are, if they depend on them."""
        return self.regions.locate(examples, self._activated, self.method, self.context)

    def _activated(self, examples: Examples, threshold: float) -> Tensor:
        """The boxes of activation maps, the branch's where there is one."""
        network = self.method.localiser()
        with evaluating(network):
            shown = self._branch() if self.learns else network
            return class_boxes(self.context, examples, shown.maps, network.cam_weights, threshold)

    def _compare_maps(self, examples: Examples) -> Record:
        """Some images with the maps of the network and of the branch (Fig. 4)."""
        network, tau = self.method.localiser(), self.regions.threshold
        with evaluating(network):
            seers = {"CAM": network.maps, "CIM": self._branch().maps}
            return map_record(self.context, examples, seers, network.cam_weights, tau)

    def _branch(self) -> Network:
        """The localiser with this addon's curves, made anew when any tensor of it was replaced."""
        network = self.method.localiser()
        self._fit(network)
        live = (network, *network.parameters(), *network.buffers(), *self.phi.parameters())
        held = self._held
        if len(live) != len(held) or any(a is not b for a, b in zip(live, held, strict=True)):
            self._held, self._made = live, (self._make_branch(network),)
        return self._made[0]

    def _make_branch(self, network: Network) -> Network:
        """A network's Padé branch with this addon's curves, in evaluation mode."""
        branch = cast("Network", share_with_pade(network))
        parts = zip(self._curves(), branch.extractors, network.extractors, strict=True)
        for own, shared, live in parts:
            chosen = learnable(live, self.config.places)
            for curve, place in zip(own, chosen, strict=True):
                fresh = cast("Pade", shared.get_submodule(place))
                fresh.numerator, fresh.denominator = curve.numerator, curve.denominator
            for place in {name for block in blocks(live) for name in block} - {*chosen}:
                shared.set_submodule(place, nn.ReLU())
        branch.eval()
        return branch

    def _learned(self) -> list[nn.Parameter]:
        """The curves of the last extractor."""
        self._fit(self.method.localiser())
        return list(self.phi[-1].parameters())

    def _fit(self, network: Network) -> None:
        """Makes ``phi`` one set of curves per extractor, the newest last."""
        extractors = list(network.extractors)
        curves = self._curves()[-len(extractors) :]
        for number, extractor in enumerate(extractors):
            if number == len(curves):
                curves.append([copy.deepcopy(curve) for curve in curves[-1]] if curves else [])
            curves[number] = inherited(curves[number], extractor, self.config.places)
        like = next(network.extractors.parameters())
        self.phi = nn.ModuleList(map(nn.ModuleList, curves)).to(like.device, like.dtype)
        self.phi.requires_grad_(False)
        self.phi[-1].requires_grad_(True)

    def _curves(self) -> list[list[Pade]]:
        """phi: for each extractor its activations, from the input on."""
        return [list(part) for part in cast("Iterable[Iterable[Pade]]", self.phi)]

    def structure(self) -> dict[str, Any]:
        """The number of curves of each extractor."""
        return {"curves": [len(curves) for curves in self._curves()]}

    def restore(self, structure: Mapping[str, Any]) -> None:
        """Makes as many curves, to be loaded."""
        self.phi = nn.ModuleList(
            nn.ModuleList(Pade() for _ in range(count)) for count in structure["curves"]
        )

    def records(self) -> list[Record]:
        """How large the boxes are, the maps, and the curves, how far they are from ReLU."""
        records = [self.compression.record(), *self.regions.records(), *self._pictures]
        curves = self._curves()
        if not curves:
            return records
        found = learnable_blocks(self.method.network.extractors[-1], self.config.places)
        records += [shape_record(curves[-1]), place_record(distances(curves[-1]))]
        if len(self.distances):
            records.append(task_record(self.distances, [len(block) for block in found]))
        return records
