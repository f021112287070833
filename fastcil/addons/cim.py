"""Class-incremental masking: exemplars compressed around a box that the method learns to draw."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastcil.addons.compression import (
    BoxConfig,
    Compression,
    check_exemplars,
    check_network,
)
from fastcil.addons.mask import MaskStage
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

_DISTANCE_POINTS = 601
_SHOWN_CURVES = 4


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
        the released code draws it from all.

        Args:
            mask: Recipe of phi, beta_2 its ``lr``; its ``epochs`` are those of the stage that
                it accompanies.
            inner_lr: beta_1 (Eq. 7) at the start; follows the schedule of ``mask``.
            mu: Weight of the masks' size (Eq. 8).
            mu_prime: Weight of the branch's own cross-entropy (Eq. 9).
            steps_per_class: Mask-level steps per epoch and class of the task; at least one step.
            compress_all: Whether the inner step composes exemplars too.
        """

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
    brings_codec: ClassVar[str | None] = "bbox"

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__(config, context, method)
        self.compression = Compression(config)
        self.phi = nn.ModuleList()
        self._drop_branch()

    def check(self, method: Method) -> None:
        """Raises `CompositionError` if there are no exemplars, no activation maps, or no ReLU."""
        check_exemplars("cim", method)
        check_network("cim", method, ("extractors", "maps", "head", "cam_weights"))
        if getattr(method, "network", None) is None:
            backbones: Iterable[nn.Module] = [self.context.bare_backbone()]
        else:
            backbones = method.localiser().extractors
        for backbone in backbones:
            if not _places(backbone):
                raise CompositionError(
                    f"addon 'cim' puts learnable activations in the place of nn.ReLU modules, and "
                    f"{type(backbone).__name__} has none; make its activations nn.ReLU modules, "
                    f"one for each place."
                )

    def codec_options(self) -> dict[str, Any]:
        """The downsampling ratio."""
        return {"ratio": self.config.ratio}

    def begin_task(self, task: Task) -> None:
        """Gives every extractor its curves."""
        self.check(self.method)
        self._fit(self.method.localiser())
        self.compression.begin_task(task)

    def stages(self, task: Task, stages: list[Stage]) -> list[Stage]:
        """The method's stages; those that learn the new data with mask-level steps."""
        primary = [stage for stage in stages if stage.primary]
        if not primary:
            raise CompositionError(
                f"addon 'cim' accompanies the stage that learns the new data, and "
                f"{type(self.method).__name__} marks none of its stages with primary=True."
            )
        for stage in primary:
            stage.companions.append(self._mask_stage(task, stage))
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
            network=self.method.localiser,
            branch=self._branch,
            curves=self._learned,
            inner_lr=config.inner_lr,
            ratio=config.ratio,
            mu=config.mu,
            mu_prime=config.mu_prime,
            compress_all=config.compress_all,
        )

    def boxes(self, examples: Examples) -> Tensor:
        """The box of each image, int16 [N, 4]."""
        boxes = self._locate(examples)
        self.compression.count(boxes, examples)
        return boxes

    def end_task(self, task: Task) -> None:
        """Keeps the newest curves where the network shrank, and nothing of the task's images."""
        self.compression.end_task()
        self._drop_branch()
        self._fit(self.method.network)

    def retained(self) -> list[Retained]:
        """phi: no exemplar is decoded with it, the next boxes are drawn with it."""
        return [Retained("curves of masks", "network", dict(self.phi.state_dict()))]

    def _drop_branch(self) -> None:
        """Lets go of the localiser, which the method may be about to drop."""
        # Tuples hide the branch from nn.Module, which would save the method's weights again.
        self._held: tuple[object, ...] = ()
        self._made: tuple[Network, ...] = ()

    def _locate(self, examples: Examples) -> Tensor:
        """Boxes by the branch as it is."""
        network = self.method.localiser()
        with evaluating(network):
            return class_boxes(
                self.context,
                examples,
                self._branch().maps,
                network.cam_weights,
                self.config.threshold,
            )

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
            for curve, place in zip(own, _places(live), strict=True):
                fresh = cast("Pade", shared.get_submodule(place))
                fresh.numerator, fresh.denominator = curve.numerator, curve.denominator
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
            places = len(_places(extractor))
            if number == len(curves):
                curves.append([copy.deepcopy(curve) for curve in curves[-1]] if curves else [])
            # An extractor of another build can't take over what was learned.
            if len(curves[number]) != places:
                curves[number] = [Pade() for _ in range(places)]
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
        """How large the boxes are, the curves learned, and how far they are from ReLU."""
        records = [self.compression.record()]
        curves = self._curves()
        if not curves:
            return records
        with torch.no_grad():
            x = torch.linspace(-3, 3, _DISTANCE_POINTS).to(curves[-1][0].numerator)
            values = torch.stack([curve(x) for curve in curves[-1]]).cpu()  # [places, points]
        x = x.cpu()
        distances = torch.trapezoid((values - x.relu()).abs(), x)  # [places]
        last = len(values) - 1
        shown = sorted({round(last * i / (_SHOWN_CURVES - 1)) for i in range(_SHOWN_CURVES)})
        thinned = slice(None, None, 10)
        return [
            *records,
            Record(
                "curve",
                "Learned activations",
                {
                    "x": x[thinned].tolist(),
                    "y": {
                        "ReLU": x.relu()[thinned].tolist(),
                        **{f"place {i}": values[i, thinned].tolist() for i in shown},
                    },
                    "xlabel": "x",
                    "ylabel": "f(x)",
                },
            ),
            Record(
                "curve",
                "Distance of the learned activations from ReLU",
                {
                    "x": list(range(len(distances))),
                    "y": {"integral of |f - ReLU| over [-3, 3]": distances.tolist()},
                    "xlabel": "place, from the input on",
                    "ylabel": "distance",
                },
            ),
        ]


def _places(module: nn.Module) -> list[str]:
    """Names of the activations that a Padé branch replaces."""
    return [name for name, part in module.named_modules() if isinstance(part, nn.ReLU)]
