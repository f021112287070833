"""Runs stages; nothing else trains anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcil.contract import Batch, Losses, Stage, restore_optimizer
from fastcil.data import Augmentation
from fastcil.engine.compiling import compile_alone
from fastcil.engine.epoch_choice import EpochChoice
from fastcil.engine.events import Listener
from fastcil.engine.free_memory import spare
from fastcil.engine.laps import Laps
from fastcil.engine.loader import Loader
from fastcil.errors import FastcilError
from fastcil.nn.phases import phase
from fastcil.nn.recall import Recall

LARGEST = 1e30
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Cursor:
    """How far the training of a task has come: what has been done, not what is under way.

    Args:
        stage: Stages finished.
        epoch: Epochs of the current stage finished.
        step: Steps of the current epoch finished, its companions' steps included.
        begun: Whether the current stage's ``begin`` was called.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    begun: bool = False


class _Lane:
    """A stage under way: its data, its optimiser, its share of an epoch."""

    def __init__(
        self,
        stage: Stage,
        key: tuple[int, ...],
        augmentation: Augmentation,
        device: torch.device,
        scaled: bool,
    ) -> None:
        self.stage = stage
        self.parameters = list(stage.parameters())
        if not self.parameters:
            raise FastcilError(f"stage '{stage.name}' trains no parameter; name at least one.")
        self.loader = Loader(stage.streams, augmentation, device, key)
        self.device = device
        self.optimizer = stage.recipe.make_optimizer(self.parameters)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        # Without any image there is nothing to step on.
        self.steps = stage.steps if stage.steps and self.loader.steps else self.loader.steps
        self.sums: dict[str, Tensor] = {}
        self.done = 0
        self.recall: Recall | None = None

    def remember(self) -> None:
        """Lets frozen extractors look once at images that are always the same."""
        constant = self.loader.constant
        if constant is not None and self.stage.recipe.epochs > 1:
            self.recall = Recall(*constant, spare(self.device))

    def recalling(self, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        """Lets what was said of these images be found."""
        if self.recall is None or not batches or batches[0].entry is None:
            return nullcontext()
        return self.recall.recalling(batches[0].images, batches[0].entry)

    @property
    def recalled(self) -> int:
        """How many extractors looked once."""
        return self.recall.extractors if self.recall is not None and self.recall.found else 0

    @property
    def lr(self) -> float:
        """The learning rate in force."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def start_epoch(self, epoch: int) -> None:
        """Sets the epoch's learning rate and forgets the last one's losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.recipe.lr_at(epoch)
        self.sums, self.done = {}, 0

    def train_only_own(self) -> None:
        """Makes this stage's parameters the only ones that collect gradients."""
        for parameter in self.stage.method.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def update(self, loss: Tensor) -> None:
        """Back-propagates, clips and steps the optimiser (the `Stepper` a stage sees)."""
        self.optimizer.zero_grad(set_to_none=True)
        # Backward takes its precision from the forward pass, not from autocast.
        with torch.autocast(loss.device.type, enabled=False):
            with phase("backward"):
                self.scaler.scale(loss).backward()
            with phase("optimiser"):
                self._advance()
        # A step may update several times: its next forward pass must not see the halves that
        # autocast made of the weights before.
        torch.clear_autocast_cache()

    def _advance(self) -> None:
        """Clips the gradients and steps the optimiser; what is not to move is put back."""
        recipe = self.stage.recipe
        if recipe.clip or recipe.clip_value:
            self.scaler.unscale_(self.optimizer)
        if recipe.clip_value:
            nn.utils.clip_grad_value_(self.parameters, recipe.clip_value)
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        unmoved = self.stage.unmoved() if self.stage.unmoved is not None else ()
        still = [(p, mask, p.detach().clone()) for p, mask in unmoved]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for parameter, mask, before in still:
                parameter.copy_(torch.where(mask, before, parameter))

    def add(self, losses: Losses) -> None:
        """Sums losses on the device: reading them would wait for it."""
        self.done += 1
        for name, value in losses.items():
            # In half precision a sum over an epoch would stand still.
            value = value.float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def mean_losses(self) -> dict[str, float]:
        """The epoch's mean losses; waits for the device, once."""
        if not self.sums:
            return {}
        values = (torch.stack(list(self.sums.values())) / self.done).tolist()
        # JSON has no infinity; a mask's loss may pass through one and come back.
        return {
            name: round(min(max(value, -LARGEST), LARGEST), 6) if value == value else LARGEST
            for name, value in zip(self.sums, values, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Puts the optimiser back where it was."""
        restore_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


class Trainer:
    """Trains one task's stages, from any point of them.

    Args:
        method: What the stages train, a `Method` or another module; put in training mode as each
            stage begins.
        augmentation: How training images are cut and changed.
        device: Where batches go.
        key: Non-negative numbers that set this task's draws apart: data seed, task.
        tell: Hears ``stage``, ``epoch`` and ``step`` events.
        precision: ``fp32``, or autocast to ``bf16`` or ``fp16`` (with loss scaling).
        compiled: Whether objectives are compiled; each stage compiles its own, so a head that
            grew is a new graph, not a failed guard.
        save: Called between steps with this trainer; decides for itself whether it is time.
        choice: Judges the epochs of primary stages, and puts back the one to go on from.
    """

    def __init__(
        self,
        method: nn.Module,
        augmentation: Augmentation,
        device: torch.device,
        key: tuple[int, ...],
        tell: Listener,
        precision: str = "fp32",
        compiled: bool = False,
        save: Callable[[Trainer], None] | None = None,
        choice: EpochChoice | None = None,
    ) -> None:
        self.method = method
        self.augmentation = augmentation
        self.device = device
        self.key = key
        self.tell = tell
        self.precision = precision
        self.compiled = compiled
        self.save = save
        self.choice = choice
        self.cursor = Cursor()
        self._lanes: list[_Lane] = []

    def state(self) -> dict[str, Any]:
        """Where training stands, for a checkpoint taken between two steps."""
        return {
            "cursor": asdict(self.cursor),
            "lanes": [lane.state() for lane in self._lanes],
            "choice": None if self.choice is None else self.choice.state(),
        }

    def run(self, stages: Sequence[Stage], resume: dict[str, Any] | None = None) -> None:
        """Runs the stages in order.

        Args:
            stages: What to train.
            resume: A `state` taken while the same stages ran; the method, the addons and torch's
                generators must have been put back to that moment too.
        """
        if resume is not None:
            self.cursor = Cursor(**resume["cursor"])
            if self.choice is not None:
                self.choice.restore(resume["choice"])
        for number in range(self.cursor.stage, len(stages)):
            self._run_stage(stages[number], number, resume)
            resume = None
            self.cursor = Cursor(stage=number + 1)
        self._lanes = []

    def _run_stage(self, stage: Stage, number: int, resume: dict[str, Any] | None) -> None:
        if not self.cursor.begun:
            self.method.train()
            if stage.begin is not None:
                stage.begin()
        elif resume is not None:
            self.method.train()
        scaled = self.precision == "fp16"
        self._lanes = [
            _Lane(part, (*self.key, number, place), self.augmentation, self.device, scaled)
            for place, part in enumerate([stage, *stage.companions])
        ]
        if resume is not None and self.cursor.begun:
            for lane, state in zip(self._lanes, resume["lanes"], strict=True):
                lane.restore(state)
        self.cursor.begun = True
        if self.compiled:
            stage.compiled = compile_alone(stage.objective)
        main = self._lanes[0]
        if not self.compiled:
            main.remember()
        self.tell(
            "stage",
            {"stage": stage.name, "epochs": stage.recipe.epochs, "steps": main.steps},
        )
        choice = self.choice if stage.primary else None
        for epoch in range(self.cursor.epoch, stage.recipe.epochs):
            self._run_epoch(stage, epoch)
            self.cursor.epoch, self.cursor.step = epoch + 1, 0
            if choice is not None:
                choice.judge(stage, epoch)
        if choice is not None:
            choice.settle(stage)
        for lane in self._lanes:
            # What is frozen next would keep its last gradients for good.
            lane.optimizer.zero_grad(set_to_none=True)
        if stage.finish is not None:
            stage.finish()

    def _run_epoch(self, stage: Stage, epoch: int) -> None:
        started = time.perf_counter()
        if self.cursor.step == 0:
            for call in stage.before_epoch:
                with phase("addon"):
                    call(epoch)
        images, passed, laps = 0, 0, Laps(self.device)
        for lane in self._lanes:
            laps.mark()
            lane.start_epoch(epoch)
            first = min(max(self.cursor.step - passed, 0), lane.steps)
            if first < lane.steps:
                lane.train_only_own()
            for step in range(first, lane.steps):
                images += self._run_step(lane, epoch, step)
            passed += lane.steps
        laps.mark()
        # Reading the losses waits for the device: the time is that of the work, not of its launch.
        losses = self._lanes[0].mean_losses()
        seconds = time.perf_counter() - started
        if max(map(abs, losses.values()), default=0.0) >= LARGEST:
            raise FastcilError(
                f"stage '{stage.name}' diverged in epoch {epoch} (losses {losses}); "
                f"lower its lr or a penalty's weight, or clip its gradients."
            )
        self.tell(
            "epoch",
            {
                "stage": stage.name,
                "number": self.cursor.stage,
                "epoch": epoch,
                "epochs": stage.recipe.epochs,
                "losses": losses,
                "companions": {lane.stage.name: lane.mean_losses() for lane in self._lanes[1:]},
                "shares": {
                    lane.stage.name: round(lap / max(seconds, 1e-9), 4)
                    for lane, lap in zip(self._lanes[1:], laps.seconds()[1:], strict=True)
                },
                "lr": self._lanes[0].lr,
                "seconds": round(seconds, 4),
                "rate": round(images / max(seconds, 1e-9), 1),
                "recalled": self._lanes[0].recalled,
            },
        )

    def _run_step(self, lane: _Lane, epoch: int, step: int) -> int:
        """One step of one lane; returns how many images it saw."""
        with phase("addon", when=lane is not self._lanes[0]):
            with phase("data"):
                batches = lane.loader.batches(epoch, step)
            with self._autocast(), phase("forward"), lane.recalling(batches):
                lane.add(lane.stage.step(batches, lane))
        self.cursor.step += 1
        self.tell("step", {"stage": lane.stage.name, "epoch": epoch, "step": step})
        if self.save is not None:
            self.save(self)
        return sum(len(batch) for batch in batches)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
