"""The trainer: resumed anywhere to the same bits, and only what a stage names is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch import nn
from torch.nn import functional as F

from fastcil.contract import Batch, Losses, Method, Recipe, Stage, Stepper, Stream, Task, Views
from fastcil.data import Augmentation, Examples, ImageStore
from fastcil.engine.state import load_state, random_state, save_state, set_random_state
from fastcil.engine.trainer import Trainer
from fastcil.errors import FastcilError
from fastcil.nn import LinearHead, Network

CPU = torch.device("cpu")
AUGMENTATION = Augmentation(8, min_scale=0.5)


class Lender:
    """What of the context a method needs while it trains."""

    def make_backbone(self) -> nn.Module:
        return ConvNet()

    bare_backbone = make_backbone


FIT = Recipe(epochs=2, lr=0.1, batch_size=4, clip=1.0)
SIDE = Recipe(epochs=2, lr=0.02, schedule="step", milestones=(1,), optimizer="adam")
TUNE = Recipe(epochs=2, lr=0.05, schedule="constant", batch_size=4, warmup=1)


@dataclass(frozen=True)
class Settings:
    fit: Recipe = FIT
    side: Recipe = SIDE
    tune: Recipe = TUNE


class Restless(Method):
    """Two stages and a companion that draw, count, replace modules and keep statistics."""

    Config = Settings

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)
        self.side = LinearHead(6, 3)
        self.register_buffer("drawn", torch.zeros(0))
        self.log: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def begin_task(self, task: Task) -> None:
        self.network = Network([ConvNet()], LinearHead(6, task.total))

    def stages(self, task: Task) -> list[Stage]:
        config = self.config
        views = Views(torch.tensor([[2, 2, 7, 7]], dtype=torch.int16).expand(10, 4), 4.0, 0.5)
        streams = (
            Stream((task.examples, task.exemplars), 4, torch.arange(10), views),
            Stream((task.exemplars,), 3),
        )
        side = Stage(
            name="side",
            method=self,
            objective=self._side,
            streams=(Stream((task.examples,), 4),),
            recipe=config.side,
            parameters=lambda: self.side.parameters(),
            steps=2,
        )
        fit = Stage(
            name="fit",
            method=self,
            objective=self._loss,
            streams=streams,
            recipe=config.fit,
            parameters=lambda: self.network.parameters(),
            begin=lambda: self.log.append("begin fit"),
            finish=lambda: self.log.append("finish fit"),
            before_epoch=[self._draw],
            companions=[side],
        )
        tune = Stage(
            name="tune",
            method=self,
            objective=self._loss,
            streams=(Stream((task.examples, task.exemplars), 4, torch.arange(2, 12)),),
            recipe=config.tune,
            parameters=lambda: self.network.head.parameters(),
            begin=self._begin_tune,
            finish=lambda: self.log.append("finish tune"),
            before_epoch=[self._draw],
        )
        return [fit, tune]

    def _draw(self, epoch: int) -> None:
        self.log.append(f"epoch {epoch}")
        self.drawn = torch.cat([self.drawn, torch.rand(1)])

    def _begin_tune(self) -> None:
        """A new head, drawn at random, on an extractor that is frozen from now on."""
        self.log.append("begin tune")
        self.network.freeze(0)
        self.network = Network(list(self.network.extractors), LinearHead(6, 3))
        self.network.freeze(0)

    def _loss(self, batch: Batch) -> Losses:
        # Dropout draws from torch's own generator in every step.
        features = F.dropout(self.network.features(batch.images), 0.3)
        logits = self.network.head(features)
        self.dtypes.add(logits.dtype)
        return {"ce": F.cross_entropy(logits, batch.labels), "decay": 1e-3 * logits.square().mean()}

    def _side(self, batch: Batch) -> Losses:
        features = F.dropout(self.network.features(batch.images).detach(), 0.3)
        return {"side": F.cross_entropy(self.side(features), batch.labels)}


def examples(count: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    store = ImageStore.from_batch(rng.integers(0, 256, (count, 10, 9, 3), np.uint8))
    return Examples(store, torch.arange(count) % 3)


TASK = Task(0, (0, 1, 2), 0, examples(10, 0), examples(5, 1))
# 3 steps and 2 of the companion in each of two epochs, then 3 in each of two.
STEPS = 2 * (3 + 2) + 2 * 3


def start(config: Settings | None = None) -> Restless:
    torch.manual_seed(5)
    method = Restless(config or Settings(), Lender())
    method.begin_task(TASK)
    return method


def make_trainer(method: Method, **options: Any) -> Trainer:
    tell = options.pop("tell", lambda *_: None)
    return Trainer(method, AUGMENTATION, CPU, (3, 1), tell, **options)


@dataclass
class Watcher:
    """Keeps a copy of everything after each step."""

    method: Restless
    moments: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, trainer: Trainer) -> None:
        self.method.log.append("step")
        moment = {
            "structure": self.method.structure(),
            "tensors": self.method.tensors(),
            "trainer": trainer.state(),
            "random": random_state(),
        }
        self.moments.append(copy.deepcopy(moment))


@pytest.fixture(scope="module")
def whole() -> tuple[Restless, list[dict[str, Any]], dict[str, Any]]:
    """An uninterrupted task, and a copy of everything after each of its steps."""
    method = start()
    watcher = Watcher(method)
    make_trainer(method, save=watcher).run(method.stages(TASK))
    end = copy.deepcopy({"tensors": method.tensors(), "random": random_state()})
    return method, watcher.moments, end


@pytest.mark.parametrize("k", range(STEPS))
def test_resumed_after_any_step_everything_is_the_same_bits(
    whole, tmp_path: Path, k: int, assert_same
) -> None:
    method, moments, end = whole
    assert len(moments) == STEPS
    save_state(tmp_path / "s", moments[k])
    state = load_state(tmp_path / "s")
    torch.manual_seed(99)  # another process would stand anywhere
    again = Restless(Settings(), Lender())
    again.restore(state["structure"])
    again.load_tensors(state["tensors"])
    stages = again.stages(TASK)
    set_random_state(state["random"])
    watcher = Watcher(again)
    make_trainer(again, save=watcher).run(stages, state["trainer"])
    assert_same(moments[k + 1 :], watcher.moments, f"after step {k}")
    assert_same(end, {"tensors": again.tensors(), "random": random_state()}, "end")
    log = method.log
    place = [i for i, entry in enumerate(log) if entry == "step"][k]
    assert again.log == log[place + 1 :]


def test_begin_finish_and_epochs_are_called_once_each_in_order(whole) -> None:
    method = whole[0]
    fit = ["epoch 0", *["step"] * 5, "epoch 1", *["step"] * 5]
    tune = ["epoch 0", *["step"] * 3, "epoch 1", *["step"] * 3]
    expected = ["begin fit", *fit, "finish fit", "begin tune", *tune, "finish tune"]
    assert method.log == expected


def test_a_step_changes_only_its_stages_parameters(whole) -> None:
    _, moments, _ = whole
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    for k, (before, after) in enumerate(pairwise(moments)):
        changed = {
            name
            for name, value in after["tensors"].items()
            if name in before["tensors"]
            and not torch.equal(value, before["tensors"][name])
            and name != "drawn"
        }
        parameters = {n for n in changed if n.rpartition(".")[2] not in statistics}
        step = k + 1
        if step < 10 and step % 5 >= 3:
            assert parameters == {"side.weight", "side.bias"}
        elif step < 10:
            assert parameters and all(n.startswith("network.") for n in parameters)
        elif step > 10:  # step 10 is the first of a head that is drawn anew
            assert changed == {"network.head.weight", "network.head.bias"}


def test_gradients_are_wanted_and_kept_only_while_a_stage_trains() -> None:
    method = start()
    wanted: dict[str, set[str]] = {}

    def note(trainer: Trainer) -> None:
        name = trainer._lanes[0].stage.name
        wanted.setdefault(name, set()).update(
            n for n, p in method.named_parameters() if p.requires_grad
        )

    make_trainer(method, save=note).run(method.stages(TASK)[1:])
    assert wanted["tune"] == {"network.head.weight", "network.head.bias"}
    assert all(p.grad is None for p in method.parameters())


def test_learning_rates_are_the_recipes() -> None:
    config = Settings(
        fit=Recipe(epochs=5, lr=0.3, schedule="step", milestones=(2, 3), warmup=1, batch_size=4),
        side=Recipe(epochs=5, lr=0.02),
        tune=Recipe(epochs=4, lr=0.05, batch_size=4),
    )
    method = start(config)
    told: list[tuple[str, int, float]] = []

    def tell(event: str, fields: dict[str, Any]) -> None:
        if event == "epoch":
            told.append((fields["stage"], fields["epoch"], fields["lr"]))

    trainer = make_trainer(method, tell=tell)
    rates: dict[tuple[str, int], set[float]] = {}

    def note_rates(stage: Stage) -> None:
        step = stage.step

        def noted(batches: Sequence[Batch], stepper: Stepper) -> Losses:
            rates.setdefault((stage.name, trainer.cursor.epoch), set()).add(stepper.lr)
            return step(batches, stepper)

        stage.step = noted

    stages = method.stages(TASK)
    for stage in (*stages, *stages[0].companions):
        note_rates(stage)
    trainer.run(stages)
    # Warm-up 1/2; then milestones count from its end: after epochs 1 + 2 and 1 + 3.
    fit = [0.15, 0.3, 0.3, 0.03, 0.003]
    side = [0.02 * (1 + math.cos(math.pi * e / 5)) / 2 for e in range(5)]
    tune = [0.05 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]
    expected = [("fit", e, r) for e, r in enumerate(fit)]
    expected += [("tune", e, r) for e, r in enumerate(tune)]
    assert [t[:2] for t in told] == [e[:2] for e in expected]
    assert [t[2] for t in told] == pytest.approx([e[2] for e in expected])
    for name, values in (("fit", fit), ("side", side), ("tune", tune)):
        for epoch, value in enumerate(values):
            assert list(rates[name, epoch]) == [pytest.approx(value)]


def test_mean_losses_are_those_of_the_steps() -> None:
    method, losses, told = start(), [], []
    (fit, _) = method.stages(TASK)
    objective = fit.objective

    def keep(batch: Batch) -> Losses:
        terms = objective(batch)
        losses.append({name: float(value.detach()) for name, value in terms.items()})
        return terms

    fit.objective = keep
    make_trainer(method, tell=lambda e, f: told.append(f) if e == "epoch" else None).run([fit])
    for epoch, fields in enumerate(told):
        steps = losses[3 * epoch : 3 * epoch + 3]
        for name in ("ce", "decay"):
            mean = sum(step[name] for step in steps) / 3
            assert fields["losses"][name] == pytest.approx(mean, abs=1e-6)
        assert set(fields["companions"]["side"]) == {"side"}
        assert 0 < fields["shares"]["side"] < 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e35])
def test_a_loss_that_diverged_is_a_sentence(value: float) -> None:
    method = start()
    (fit, _) = method.stages(TASK)
    objective = fit.objective
    fit.objective = lambda batch: {"ce": objective(batch)["ce"] * 0.0 + value}
    with pytest.raises(FastcilError, match="stage 'fit' diverged in epoch 0") as caught:
        make_trainer(method).run([fit])
    assert "lr" in str(caught.value) and "\n" not in str(caught.value)


def test_clipping_bounds_the_step() -> None:
    clip, lr = 1e-3, 0.1
    method = start(Settings(fit=Recipe(epochs=1, lr=lr, momentum=0.0, weight_decay=0.0, clip=clip)))
    (fit, _) = method.stages(TASK)
    fit.companions = []
    before = [p.detach().clone() for p in method.network.parameters()]
    make_trainer(method).run([fit])
    after = list(method.network.parameters())
    moved = sum((a - b).square().sum() for a, b in zip(after, before, strict=True)).sqrt()
    steps = 3
    assert 0 < float(moved.detach()) <= steps * lr * clip * 1.001


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip, clip_value", [(0.0, 1e-3), (1.5e-3, 1e-3), (0.0, 1e3)])
def test_clipping_bounds_every_entry_and_then_the_norm(clip, clip_value, precision) -> None:
    """One step from gradients known: cut entry by entry, and only then by their norm."""
    recipe = Recipe(1, 0.1, momentum=0.0, weight_decay=0.0, clip=clip, clip_value=clip_value)
    method = start(Settings(fit=recipe))
    (fit, _) = method.stages(TASK)
    fit.companions, fit.streams = [], (replace(fit.streams[0], batch_size=10),)
    head = method.network.head
    fit.objective = lambda _: {"sum": 3.0 * head.weight[0, :2].sum() - 5e-4 * head.bias.sum()}
    before = [p.detach().clone() for p in head.parameters()]
    make_trainer(method, precision=precision).run([fit])
    gradients = [torch.zeros_like(p) for p in before]
    gradients[0][0, :2], gradients[1][:] = min(3.0, clip_value), -5e-4
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    factor = min(1.0, clip / norm) if clip else 1.0
    assert factor < 1 or not clip
    for old, gradient, new in zip(before, gradients, head.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * factor * gradient, rtol=1e-5, atol=1e-7)


def test_a_stage_that_trains_nothing_is_a_sentence() -> None:
    method = start()
    (fit, _) = method.stages(TASK)
    with pytest.raises(FastcilError, match="stage 'fit' trains no parameter"):
        make_trainer(method).run([replace(fit, parameters=lambda: [])])


def test_a_stage_of_no_epochs_begins_and_finishes(assert_same) -> None:
    method = start(Settings(fit=Recipe(epochs=0, lr=0.1)))
    before = copy.deepcopy(method.tensors())
    make_trainer(method).run(method.stages(TASK)[:1])
    assert method.log == ["begin fit", "finish fit"]
    assert_same(before, dict(method.tensors()))


def test_a_companion_without_images_takes_no_step() -> None:
    method = start()
    (fit, _) = method.stages(TASK)
    none = TASK.examples.select([])
    fit.companions[0].streams = (Stream((none,), 4),)
    make_trainer(method, save=Watcher(method)).run([fit])
    assert method.log.count("step") == 2 * 3


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_trains_in_it_and_keeps_full_weights(precision, dtype, assert_same) -> None:
    method = start()
    stages = method.stages(TASK)
    before = copy.deepcopy(method.tensors())
    told: list[dict[str, Any]] = []
    watcher = Watcher(method)
    make_trainer(
        method,
        precision=precision,
        save=watcher,
        tell=lambda e, f: told.append(f) if e == "epoch" else None,
    ).run(stages)
    assert method.dtypes == {dtype}
    for name, value in method.named_parameters():
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert not torch.equal(value, before[name])
    assert all(math.isfinite(v) for f in told for v in f["losses"].values())
    k = 6
    state = watcher.moments[k]
    assert bool(state["trainer"]["lanes"][0]["scaler"]) == (precision == "fp16")
    again = Restless(Settings(), Lender())
    again.restore(state["structure"])
    again.load_tensors(state["tensors"])
    set_random_state(state["random"])
    second = Watcher(again)
    make_trainer(again, precision=precision, save=second).run(
        again.stages(TASK), copy.deepcopy(state["trainer"])
    )
    assert_same(watcher.moments[k + 1 :], second.moments)
