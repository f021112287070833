"""How long and how fast a stage trains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastcil.contract.checks import check_choices
from fastcil.errors import FastcilError

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Recipe:
    """Optimiser, schedule and length of one stage; part of a method's Config.

    The learning rate of epoch e (from 0) of E is ``lr * factor(e)``:

    - ``cosine``: (1 + cos(pi e / E)) / 2 (Loshchilov and Hutter 2017, Eq. 5, one period);
    - ``step``: gamma ** (number of milestones <= e);
    - ``constant``: 1;

    with e and E counted from the end of a linear warm-up of ``warmup`` epochs, whose factors are
    1/(warmup+1), 2/(warmup+1), ...

    Args:
        epochs: Passes over the stage's first stream.
        lr: Peak learning rate.
        schedule: ``cosine``, ``step`` or ``constant``.
        milestones: Epochs at which ``step`` multiplies by ``gamma``, counted after the warm-up.
        gamma: Factor at each milestone.
        warmup: Epochs of linear warm-up, part of ``epochs``.
        optimizer: ``sgd`` (with ``momentum``) or ``adam``.
        momentum: SGD's momentum.
        nesterov: Whether it is Nesterov's, which looks a step ahead.
        weight_decay: L2 penalty as the optimiser applies it.
        batch_size: Images per step of the first stream.
        clip: Largest gradient norm, 0 for none.
        clip_value: Largest magnitude of a gradient's entry, cut before ``clip``; 0 for none.

    Example:
        >>> [round(Recipe(epochs=4, lr=0.1).lr_at(e), 4) for e in range(4)]
        [0.1, 0.0854, 0.05, 0.0146]
    """

    epochs: int
    lr: float
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: int = 0
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    batch_size: int = 128
    clip: float = 0.0
    clip_value: float = 0.0

    def __post_init__(self) -> None:
        counts = (("epochs", 0), ("batch_size", 1), ("warmup", 0))
        rates = (("momentum", 0), ("weight_decay", 0), ("clip", 0), ("clip_value", 0))
        for name, low in (*counts, *rates):
            value = getattr(self, name)
            if not low <= value < math.inf:
                raise FastcilError(f"{name} is {value}; it must be at least {low}.")
        for name in ("lr", "gamma"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise FastcilError(f"{name} is {value}; it must be a positive number.")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum):
            raise FastcilError(
                f"nesterov is True with optimizer '{self.optimizer}' and momentum {self.momentum}; "
                f"set it to False, or use 'sgd' and a momentum above 0."
            )
        check_choices(self)

    def factor(self, epoch: int) -> float:
        """The schedule's multiplier of ``lr`` in epoch ``epoch``."""
        if epoch < self.warmup:
            return (epoch + 1) / (self.warmup + 1)
        done, length = epoch - self.warmup, max(1, self.epochs - self.warmup)
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done / length))
        if self.schedule == "step":
            return self.gamma ** sum(m <= done for m in self.milestones)
        return 1.0

    def lr_at(self, epoch: int) -> float:
        """The learning rate of epoch ``epoch``."""
        return self.lr * self.factor(epoch)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimiser over ``parameters`` with this recipe's settings.

        It is torch's fused one, a pass over memory per step, where there is one for the parameters.
        What was saved of its state is put back by `restore_optimizer`.
        """
        trained = list(parameters)
        form = "fused" if all(map(_fusible, trained)) else "foreach"
        settings: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, form: True}
        if self.optimizer == "adam":
            return torch.optim.Adam(trained, **settings)
        settings |= {"momentum": self.momentum, "nesterov": self.nesterov}
        optimizer = torch.optim.SGD(trained, **settings)
        if form == "fused" and self.momentum:
            # A first step that loss scaling skips would leave torch's own uninitialised.
            for parameter in trained:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


def _fusible(parameter: Tensor) -> bool:
    """Whether a fused optimiser takes it: its entries have to lie side by side.

    Fused kernels go through memory from end to end. Backward passes give a gradient the strides of
    such a parameter.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    side_by_side = parameter.is_contiguous() or (
        parameter.ndim in formats and parameter.is_contiguous(memory_format=formats[parameter.ndim])
    )
    known = parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
    return known and side_by_side


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts an optimiser back to a saved state, however the parameters lie in memory now.

    A file keeps no strides, and a fused optimiser takes it that momenta have their parameter's.

    Args:
        optimizer: Over parameters of the same shapes, in the same order.
        state: Its ``state_dict()`` of another time.
    """
    # Which form was saved does not matter: this one's parameters say which it takes.
    groups = [
        {**saved, "fused": group["fused"], "foreach": group["foreach"]}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, held in optimizer.state.items():
        for name, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                held[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def scale_epochs(config: ConfigT, factor: float) -> ConfigT:
    """A copy of a Config whose every length counted in epochs is multiplied by ``factor``.

    Recipes keep their shape: milestones and warm-up shrink with the epochs. Other fields counted
    in epochs say so by ``field(metadata={"epochs": True})``. Nothing falls below one epoch that
    was not zero before, but for the warm-up, which may vanish.

    Example:
        >>> scale_epochs(Recipe(epochs=200, lr=0.1, milestones=(60, 120)), 0.1).milestones
        (6, 12)
    """
    if factor == 1.0 or not dataclasses.is_dataclass(config):
        return config

    def scaled(epochs: int) -> int:
        return max(1, round(epochs * factor)) if epochs else 0

    changes: dict[str, Any] = {}
    if isinstance(config, Recipe):
        changes = {
            "epochs": scaled(config.epochs),
            "warmup": round(config.warmup * factor),
            "milestones": tuple(scaled(m) for m in config.milestones),
        }
    else:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                changes[field.name] = scale_epochs(value, factor)
            elif field.metadata.get("epochs"):
                changes[field.name] = scaled(value)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def replace_batch_size(config: ConfigT, batch_size: int | None) -> ConfigT:
    """A copy of a Config whose every Recipe not marked as fixed uses ``batch_size``.

    A field with ``metadata={"own_batch": True}`` (a bilevel step's small batch, say) keeps its own.
    """
    if batch_size is None or not dataclasses.is_dataclass(config):
        return config
    if isinstance(config, Recipe):
        return dataclasses.replace(config, batch_size=batch_size)
    changes = {
        field.name: replace_batch_size(getattr(config, field.name), batch_size)
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, field.name))
        and not field.metadata.get("own_batch")
    }
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
