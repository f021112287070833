"""What a Learner is made of once it knows what its images look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcil.contract import Addon, Method, Retained, Task, lookup
from fastcil.data import Augmentation, ImageStore
from fastcil.engine.context import EngineContext
from fastcil.engine.options import Settings
from fastcil.engine.resolve import make_augmentation, make_backbone_builder, natural_look, settle
from fastcil.engine.weights import StartingFrom
from fastcil.errors import CompositionError, FastcilError
from fastcil.memory import (
    Budget,
    Codec,
    Memory,
    allowance,
    check_codec,
    codec_overhead,
    likely_room,
    make_codec,
)
from fastcil.memory.checksum import checksum
from fastcil.memory.limits import affordable

_FINDERS = {"boxes": "'cam' or 'cim'", "maps": "'samc'"}


@dataclass
class Parts:
    """A method, its addons and its memory, and how they see images.

    Args:
        method: The learner proper.
        addons: In the order of the composition.
        memory: What is kept of old tasks.
        augmentation: How images are cut and changed.
        context: What the engine lends to method and addons.
        device: Where networks live.
        offered: Marks by which the last task's images were offered to memory, or None.
        start: What builds extractors from ``network.weights``, or None.
    """

    method: Method
    addons: list[Addon]
    memory: Memory
    augmentation: Augmentation
    context: EngineContext
    device: torch.device
    offered: Tensor | None = None
    start: StartingFrom | None = None

    @classmethod
    def for_images(
        cls,
        images: ImageStore,
        settings: Settings,
        budget: Budget,
        device: torch.device,
        backbone: Callable[[], nn.Module] | None,
    ) -> Parts:
        """Makes everything for these images, and memory where they are; see `build`."""
        size, crop = natural_look(images, settings.groups["augment"])
        parts = cls.build(settings, budget, device, size, crop, backbone)
        # A batch is read from stores on one device.
        parts.memory.to(images.device)
        return parts

    @classmethod
    def build(
        cls,
        settings: Settings,
        budget: Budget,
        device: torch.device,
        size: int,
        crop: str,
        backbone: Callable[[], nn.Module] | None,
    ) -> Parts:
        """Makes everything for images of one kind.

        Args:
            settings: The composition and its options.
            budget: Of the memory.
            device: Where networks live.
            size: Side of the square that the network sees.
            crop: How training images are cut.
            backbone: Builds a feature extractor of the user's own.

        Raises:
            FastcilError: Options out of range, or parts that don't fit together.
        """
        if isinstance(backbone, nn.Module):
            raise FastcilError(
                "backbone is a network; pass what builds one, such as its class, since a method "
                "may need several."
            )
        method_name, addon_names = settings.parts
        method_class: Any = lookup("method", method_name)
        augmentation = make_augmentation(
            settings.groups["augment"], size, crop, method_class.auto_augment
        )
        network = settings.groups["network"]
        if network.norms == "first" and method_class.adds_extractors:
            raise CompositionError(
                f"network.norms is 'first', but {method_name} adds an extractor in every task, "
                f"whose batch norms must train; leave it 'train'."
            )
        published = method_class.published_network(settings.config(method_name))
        bare = backbone or make_backbone_builder(network, size, published)
        make, start = bare, None
        if network.weights is not None:
            settled = None if backbone else settle(network, size)
            make = start = StartingFrom(bare, network.weights, settings.state_dict, settled)
        engine = settings.engine
        scanned = torch.bfloat16 if engine.scan_precision == "bf16" else None
        context = EngineContext(make, augmentation, device, engine.scan_batch, bare, scanned)
        method: Method = method_class(settings.config(method_name), context)
        addons: list[Addon] = [
            lookup("addon", name)(settings.config(name), context, method) for name in addon_names
        ]
        codec = _make_codec(settings, addons)
        _check_refining(settings, addons, codec)
        memory = Memory(
            budget,
            codec=codec,
            selection=method.selection,
            keeps=method.keeps,
        )
        return cls(method, addons, memory, augmentation, context, device, start=start)

    @property
    def learners(self) -> list[Method | Addon]:
        """The method, then its addons: who hears of each task, in this order."""
        return [self.method, *self.addons]

    def checksums(self) -> dict[str, str]:
        """One number for what memory holds, and one for what the learners do."""
        tensors = {
            f"{number}.{name}": tensor
            for number, part in enumerate(self.learners)
            for name, tensor in part.tensors().items()
        }
        return {"memory": self.memory.checksum(), "weights": checksum(tensors)}

    def check(self, images: ImageStore) -> None:
        """Makes sure, before any training, that what is made as it goes can be made.

        Args:
            images: The data, or the first of them.

        Raises:
            FastcilError: The backbone can't be built or is none, or ``network.weights`` can't be
                read or don't fit it; the codec's marks come from nowhere, or it can't encode the
                images, or needs more than the budget.
        """
        backbone = self.context.make_backbone()
        if not hasattr(backbone, "out_channels"):
            raise FastcilError(
                f"backbone makes a module of type {type(backbone).__name__}, which has no "
                f"out_channels; set it to the number of channels of its feature maps."
            )
        codec = self.memory.codec
        if codec.marks and all(type(addon).marks is Addon.marks for addon in self.addons):
            raise CompositionError(
                f"codec is '{codec.name}', which must be told what matters in each image, by "
                f"{codec.marks}; add an addon that finds them "
                f"({_FINDERS[codec.marks]}), or leave codec out."
            )
        check_codec(self.memory, images)

    def others(self) -> list[Retained]:
        """What codec, method and addons keep beside exemplars."""
        parts = [entry for part in self.learners for entry in part.retained()]
        return [*codec_overhead(self.memory), *parts]

    def other_nbytes(self) -> int:
        """Bytes that the budget must leave for what is kept beside exemplars."""
        return sum(e.nbytes for e in self.others() if self.memory.budget.counts(e.kind))

    def with_room(self, task: Task) -> Task:
        """The task, told how much may be kept, and in images if the method chooses them itself.

        Asked at a boundary, when what is kept beside exemplars is that of those held.

        Raises:
            FastcilError: The codec can't encode the task's images, or needs more than the budget.
        """
        check_codec(self.memory, task.examples.images, task.total)
        task = replace(task, allowance=allowance(self.memory.budget, task))
        if self.method.selection != "own":
            return task
        others = self.other_nbytes() - len(self.memory) * self.method.beside(task.known)
        room = likely_room(self.memory, task, self.method.beside(task.total), others)
        return replace(task, room=room)

    def prepare_memory(self, task: Task) -> None:
        """Lets addons look at what is about to be kept, and asks anew how their codec is set."""
        budget = self.memory.budget
        quota = budget.quota(task.total, self.other_nbytes())

        def fitting(units: Tensor, nbytes: Tensor) -> int:
            cost = units if budget.unit == "images" else nbytes
            return affordable(cost.double(), quota)

        for addon in self.addons:
            addon.prepare_memory(task, fitting)
        self._set_codec()

    def _set_codec(self) -> None:
        """Gives memory the codec of the addon that brings one, with its settings of now."""
        for addon in self.addons:
            if addon.brings_codec is not None:
                self.memory.use(make_codec(addon.brings_codec, **addon.codec_options()))

    def to_device(self) -> None:
        """Moves networks to the device; memory stays where the reader wants it."""
        for part in self.learners:
            # torch's type stubs leave out the memory_format of Module.to.
            part.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.memory.codec.to(self.device)

    def state(self) -> dict[str, Any]:
        """Everything `restore` needs, and what `build` must be told again."""
        return {
            "size": self.augmentation.size,
            "crop": self.augmentation.crop,
            "codec": self.memory.codec.state(),
            "memory": self.memory.state(),
            "learners": [
                {"structure": part.structure(), "tensors": part.tensors()} for part in self.learners
            ],
        }

    def snapshot(self) -> dict[str, Any]:
        """A `state` that training does not change; memory replaces its buffers, never writes."""
        state = self.state()
        for part in state["learners"]:
            part["tensors"] = {name: value.clone() for name, value in part["tensors"].items()}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts everything back to the moment of a `state`."""
        for part, saved in zip(self.learners, state["learners"], strict=True):
            part.restore(saved["structure"])
            part.load_tensors(saved["tensors"])
        self._set_codec()
        self.memory.codec.restore(state.get("codec", {}))
        self.memory.restore(state["memory"])
        self.to_device()


def _make_codec(settings: Settings, addons: list[Addon]) -> Codec[Any]:
    """The addon's codec, the one asked for, or raw."""
    bringing = [
        name
        for name, addon in zip(settings.parts[1], addons, strict=True)
        if addon.brings_codec is not None
    ]
    if len(bringing) > 1:
        raise CompositionError(
            f"method '{settings.method}' has {' and '.join(map(repr, bringing))}, and each stores "
            f"exemplars its own way; compose with one of them."
        )
    for addon in addons:
        if addon.brings_codec is not None:
            return make_codec(addon.brings_codec, **addon.codec_options())
    return settings.make_codec()


def _check_refining(settings: Settings, addons: list[Addon], codec: Codec[Any]) -> None:
    """Refuses two addons that change exemplars, or one whose images can't be encoded again."""
    refining = [
        name
        for name, addon in zip(settings.parts[1], addons, strict=True)
        if type(addon).refinements is not Addon.refinements
    ]
    if len(refining) > 1:
        raise CompositionError(
            f"method '{settings.method}' has {' and '.join(map(repr, refining))}, and each changes "
            f"the exemplars its own way; compose with one of them."
        )
    if refining and codec.marks:
        raise CompositionError(
            f"addon '{refining[0]}' changes the pixels of exemplars, and codec '{codec.name}' "
            f"keeps only some of them, so that what was learned would be lost; compose it without "
            f"{_FINDERS[codec.marks]}, and leave codec 'raw'."
        )
