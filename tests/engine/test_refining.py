"""What addons do to exemplars that memory has chosen: in memory, in bytes, and after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import FastcilError, Learner, train
from fastcil.addons.mnemonics import Mnemonics
from fastcil.contract import evaluating
from fastcil.contract.registry import ADDONS, CODECS
from fastcil.data import ImageStore
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.state import load_state
from fastcil.engine.trainer import Trainer
from fastcil.memory import Memory
from fastcil.memory.codecs.raw import RawCodec
from fastcil.nn.nearest_mean import class_means

OPTIONS = {
    "engine.epoch_scale": 0.005,
    "engine.batch_size": 6,
    "engine.progress": False,
    "augment.size": 12,
}
RELEASED = {"mnemonics.form": "released", "mnemonics.recipe.lr": 0.1}


def draw(classes: int, per_class: int, seed: int, sides: tuple[int, int] | None = None) -> Any:
    rng = np.random.default_rng(seed)
    labels = [label for label in range(classes) for _ in range(per_class)]
    images = [
        rng.integers(0, 256, (*(sides or rng.integers(12, 20, 2)), 3), np.uint8) for _ in labels
    ]
    return images, labels


def shelf(seed: int, names: str, sides: tuple[int, int] | None = (14, 15)) -> dict[str, Any]:
    return {name: draw(1, 6, seed + k, sides)[0] for k, name in enumerate(names)}


def learn(method: str, shelves: list[dict[str, Any]], memory: str = "8 images", **options: Any):
    learner = Learner(method, memory=memory, backbone=ConvNet, **{**OPTIONS, **options})
    for one in shelves:
        learner.learn(one)
    return learner


def pixels(learner: Learner) -> list[torch.Tensor]:
    images = learner.memory.examples().images
    return [images.image(k) for k in range(len(images))]


@pytest.mark.parametrize("options", [{}, RELEASED], ids=["bilevel", "released"])
@pytest.mark.parametrize("sides", [(14, 15), None], ids=["alike", "of all sizes"])
@pytest.mark.parametrize("budget", ["8 images", "9KiB"])
def test_memory_holds_the_refined_images_and_no_byte_more(options, sides, budget):
    data = [shelf(0, "ab", sides)]
    plain = learn("icarl", data, budget)
    refined = learn("icarl+mnemonics", data, budget, **options)
    assert len(plain.memory) > 4
    assert refined.memory.nbytes == plain.memory.nbytes <= 9 * 1024
    assert torch.equal(plain.memory.state()["geometry"], refined.memory.state()["geometry"])
    assert torch.equal(plain.memory.state()["labels"], refined.memory.state()["labels"])
    pairs = zip(pixels(plain), pixels(refined), strict=True)
    changes = [float((a.float() - b.float()).abs().mean()) for a, b in pairs]
    assert all(0 < change < 30 for change in changes)
    assert refined.nbytes()["all"] == plain.nbytes()["all"]
    # The method sees them as they are kept: its means are of the images that memory holds.
    method, held = refined.method, refined.memory.examples()
    with evaluating(method):
        features = refined.parts.context.scan(method.embed, held)
        mirrored = refined.parts.context.scan(method.embed, held, flip=True)
    expected = class_means(torch.cat([features, mirrored]), held.labels.repeat(2), 2)
    assert torch.allclose(method.nearest.means, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "moves"), [({}, True), ({"mnemonics.adjust_old": False}, False), (RELEASED, False)]
)
def test_old_exemplars_are_adjusted_or_stay(options, moves):
    first, second = shelf(0, "ab"), shelf(9, "cd")
    learner = learn("er+mnemonics", [first], **options)
    before = pixels(learner)
    learner.learn(second)
    after = pixels(learner)
    assert learner.memory.counts(4) == [2, 2, 2, 2]
    kept = [(before[0], after[0]), (before[1], after[1]), (before[4], after[2])]
    assert all(torch.equal(a, b) != moves for a, b in kept)
    originals = [torch.from_numpy(image) for name in "cd" for image in second[name]]
    assert not any(torch.equal(a, b) for a in after[4:] for b in originals)


def test_without_memory_there_is_nothing_to_refine():
    learner = learn("er+mnemonics", [shelf(0, "ab"), shelf(9, "cd")], "none")
    assert len(learner.memory) == 0 and learner.parts.addons[0].records() == []


class Coarse(RawCodec):
    """Keeps the upper half of every byte's bits."""

    name = "coarse"

    def encode(self, images: ImageStore, boxes: torch.Tensor | None = None) -> ImageStore:
        return ImageStore(images.pixels & 0xF0, images.offsets, images.geometry)


def test_a_codec_encodes_them_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(CODECS, "coarse", Coarse)
    data = [shelf(0, "ab")]
    options = {"codec": "coarse", "mnemonics.recipe.lr": 0.1, "mnemonics.recipe.epochs": 2000}
    plain, refined = learn("icarl", data, codec="coarse"), learn("icarl+mnemonics", data, **options)
    before, after = (learner.memory.state()["pixels"] for learner in (plain, refined))
    assert not (after & 0x0F).any() and (before != after).float().mean() > 0.1


class Other(Mnemonics):
    """Another addon that changes exemplars."""


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("icarl+cim+mnemonics", {}, "codec 'bbox' keeps only some of them"),
        ("icarl+mnemonics+cam", {}, "compose it without 'cam' or 'cim'"),
        ("icarl+mnemonics", {"codec": "bbox"}, "codec 'bbox' keeps only some of them"),
        ("icarl+mnemonics+other", {}, "'mnemonics' and 'other', and each changes"),
        ("lwf+mnemonics", {}, "LwF keeps nothing"),
        ("joint+mnemonics", {}, "Joint keeps everything"),
        ("darkpp+mnemonics", {}, "DarkPP chooses its own"),
    ],
)
def test_compositions_that_make_no_sense(method, options, says, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ADDONS, "other", Other)
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises(FastcilError, match=says):
        learn(method, [shelf(0, "ab")], **options)


DATA = draw(4, 6, 0, (14, 15)), draw(4, 2, 1, (14, 15))


def run(run_dir: Path, **options: Any) -> list[dict[str, Any]]:
    result = train(
        "icarl+mnemonics",
        DATA,
        "lfs-2",
        "8 images",
        run_dir=run_dir,
        backbone=ConvNet,
        **{**OPTIONS, "engine.checkpoint_seconds": 0, **options},
    )
    learner = {**load_state(run_dir / "seed-0" / "learner.safetensors"), "settings": None}
    return [*({**vars(t), "seconds": 0} for t in result.outcomes[0].tasks), learner]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of each step so far, the task's number if it was one of a refinement; where to stop."""
    told: dict[str, Any] = {"refining": [], "stop": None}
    save = SeedRun._save_between_steps

    def saved(seed_run: SeedRun, trainer: Trainer) -> None:
        save(seed_run, trainer)
        state = load_state(seed_run.folder / "checkpoint.safetensors")
        told["refining"].append(state["remembered"])
        if len(told["refining"]) == told["stop"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(SeedRun, "_save_between_steps", saved)
    return told


@pytest.mark.parametrize("options", [{}, RELEASED], ids=["bilevel", "released"])
def test_stopped_within_a_refinement_ends_in_the_same_bits(options, steps, tmp_path, assert_same):
    whole = run(tmp_path / "whole", **options)
    refining = [k for k, yes in enumerate(steps["refining"], start=1) if yes]
    total = len(steps["refining"])
    # Two steps on new exemplars in either task; then one on old ones, or one more with them.
    assert len(refining) == 5 and refining[-1] == total
    for stop in refining[::2]:
        steps["refining"], steps["stop"] = [], stop
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(stop), **options)
        steps["stop"] = None
        assert_same(whole, run(tmp_path / str(stop), **options))
        assert len(steps["refining"]) == total, "no step is lost, and none is done twice"


@pytest.mark.parametrize("where", ["before", "after"])
def test_stopped_beside_a_refinement_ends_in_the_same_bits(
    where, steps, tmp_path, assert_same, monkeypatch: pytest.MonkeyPatch
):
    """Between memory's update and the first step; between the last step and memory's change."""
    whole = run(tmp_path / "whole")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if where == "before":
                patch.setattr(Mnemonics, "refinements", stop)
            else:
                patch.setattr(Memory, "replace", stop)
            run(tmp_path / "stopped")
    assert_same(whole, run(tmp_path / "stopped"))


def test_a_learner_that_is_stopped_within_a_refinement_is_as_it_was(assert_same, monkeypatch):
    learner, other = (
        learn("icarl+mnemonics", [shelf(0, "ab")]),
        learn("icarl+mnemonics", [shelf(0, "ab")]),
    )

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Memory, "replace", stop)
        learner.learn(shelf(9, "cd"))
    assert_same(other.state(), learner.state())
    assert_same(other.learn(shelf(9, "cd")).state(), learner.learn(shelf(9, "cd")).state())
