"""What a Learner is made of once it knows what its images look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastcil.contract import Addon, Method, lookup
from fastcil.data import Augmentation
from fastcil.engine.context import EngineContext
from fastcil.engine.options import Settings
from fastcil.engine.resolve import make_augmentation, make_backbone_builder
from fastcil.memory import Budget, Codec, Memory, make_codec


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
    """

    method: Method
    addons: list[Addon]
    memory: Memory
    augmentation: Augmentation
    context: EngineContext
    device: torch.device

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
        """
        method_name, addon_names = settings.parts
        method_class: Any = lookup("method", method_name)
        augmentation = make_augmentation(
            settings.groups["augment"], size, crop, method_class.auto_augment
        )
        context = EngineContext(
            backbone or make_backbone_builder(settings.groups["network"], size),
            augmentation,
            device,
            settings.engine.scan_batch,
        )
        method: Method = method_class(settings.config(method_name), context)
        addons: list[Addon] = [
            lookup("addon", name)(settings.config(name), context, method) for name in addon_names
        ]
        memory = Memory(
            budget,
            codec=_make_codec(settings, addons),
            selection=method.selection,
            keeps=method.keeps,
        )
        return cls(method, addons, memory, augmentation, context, device)

    @property
    def learners(self) -> list[Method | Addon]:
        """The method, then its addons: who hears of each task, in this order."""
        return [self.method, *self.addons]

    def to_device(self) -> None:
        """Moves networks to the device; memory stays where the reader wants it."""
        for part in self.learners:
            # torch's type stubs leave out the memory_format of Module.to.
            part.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def state(self) -> dict[str, Any]:
        """Everything `restore` needs, and what `build` must be told again."""
        return {
            "size": self.augmentation.size,
            "crop": self.augmentation.crop,
            "memory": self.memory.state(),
            "learners": [
                {"structure": part.structure(), "tensors": part.tensors()} for part in self.learners
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts everything back to the moment of a `state`."""
        for part, saved in zip(self.learners, state["learners"], strict=True):
            part.restore(saved["structure"])
            part.load_tensors(saved["tensors"])
        self.memory.restore(state["memory"])
        self.to_device()


def _make_codec(settings: Settings, addons: list[Addon]) -> Codec:
    """The addon's codec, the one asked for, or raw."""
    for addon in addons:
        if addon.brings_codec is not None:
            return make_codec(addon.brings_codec, **addon.codec_options())
    return make_codec(settings.codec or "raw")
