"""The rows of Luo et al. 2023, Table 3: what each keeps, byte by byte, and that each resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch import nn

from fastcil import train
from fastcil.addons.cam import CAM
from fastcil.addons.cim import CIM
from fastcil.engine.result import Result
from fastcil.engine.seed_run import SeedRun
from fastcil.errors import CompositionError, FastcilError
from fastcil.nn import Pade

SIDE = 64
OPTIONS = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 12,
    "engine.progress": False,
    "augment.size": 16,
    "augment.crop": "resized",
}
# Row -> addon and options, and the share of a raw image's pixels that an exemplar keeps, of its
# box's share b.
ROWS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "2 artifact": ("cam", {"store": False}, lambda b: 1.0),
    "2 of cim": ("cim", {"boxes": "cam", "store": False}, lambda b: 1.0),
    "3 full": ("cam", {"boxes": "none"}, lambda b: 1 / 4),
    "3 of cim": ("cim", {"boxes": "none"}, lambda b: 1 / 4),
    "4 random": ("cam", {"boxes": "random"}, lambda b: b + (1 - b) / 4),
    "4 of cim": ("cim", {"boxes": "random"}, lambda b: b + (1 - b) / 4),
    "5 centre": ("cam", {"boxes": "centre"}, lambda b: 7 / 16),
    "5 of cim": ("cim", {"boxes": "centre"}, lambda b: 7 / 16),
    "6 class": ("cam", {}, lambda b: b + (1 - b) / 4),
    "6 of cim": ("cim", {"boxes": "cam"}, lambda b: b + (1 - b) / 4),
    "7 threshold": ("cam", {"threshold": "held-out"}, lambda b: b + (1 - b) / 4),
    "8 joint": ("cim", {"optimisation": "joint"}, lambda b: b + (1 - b) / 4),
    "9 bilevel": ("cim", {}, lambda b: b + (1 - b) / 4),
    "10 last block": ("cim", {"places": "last-block"}, lambda b: b + (1 - b) / 4),
    "11 foreground": ("cim", {"foreground_ratio": 2.0}, lambda b: b / 2 + (1 - b) / 4),
    "11 of cam": ("cam", {"boxes": "none", "foreground_ratio": 2.0}, lambda b: 1 / 4),
}


def draw(per_class: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Noise with a bright square somewhere, of a colour for each of four classes."""
    rng = np.random.default_rng(seed)
    labels = [label for label in range(4) for _ in range(per_class)]
    images = rng.integers(0, 90, (len(labels), SIDE, SIDE, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        y, x = rng.integers(0, SIDE // 2, 2)
        image[y : y + 24, x : x + 24] = 60 * label + 40
    return images, labels


DATA = draw(10, 0), draw(2, 1)


def run(row: str, run_dir: Path | None = None, method: str = "er", **options: Any) -> Result:
    addon, own, _ = ROWS[row]
    own = {"refresh": 1, "artifact_step": 0.5, **own}
    named = {f"{addon}.{name}": value for name, value in own.items()}
    return train(
        f"{method}+{addon}",
        DATA,
        "b2-inc2",
        "8 images",
        run_dir=run_dir,
        backbone=ConvNet,
        **{**OPTIONS, **named, **options},
    )


@pytest.fixture(scope="module")
def trained() -> dict[str, Result]:
    return {row: run(row) for row in ROWS}


@pytest.mark.parametrize("row", ROWS)
def test_an_exemplar_takes_the_bytes_of_its_rate(row, trained) -> None:
    result, rate = trained[row], ROWS[row][2]
    memory = result.learner.memory
    images = memory.examples().images
    sizes, boxes = images.sizes.double(), images.boxes.double()
    shares = (boxes[:, 2:] - boxes[:, :2]).prod(1) / sizes.prod(1)
    expected = torch.tensor([float(rate(b)) for b in shares.tolist()], dtype=torch.float64)
    kept = memory.codec.nbytes(images).double() - 28
    assert len(memory) > 0
    # Edges of cells and sides rounded down: within 2 % of a raw image at this size.
    assert torch.allclose(kept / (3 * SIDE * SIDE), expected, atol=0.02)
    assert torch.allclose(memory.codec.units(images), expected, atol=0.02)
    assert memory.units <= 8 + 1e-9
    held = sum(t.numel() * t.element_size() for t in memory.state().values())
    assert memory.nbytes == held == int(memory.codec.nbytes(images).sum())


EXACT = [  # images in a budget of 8, at 2 classes a task: two quotas of 2 units a class
    ("2 artifact", 8),
    ("3 full", 32),
    ("5 centre", 16),
]


@pytest.mark.parametrize(("row", "count"), EXACT)
def test_the_budget_holds_as_many_as_the_rate_says(row, count, trained) -> None:
    assert trained[row].exemplars == count


@pytest.mark.parametrize(("row", "side"), [("3 full", 64), ("11 foreground", 45)])
def test_exemplars_with_a_compressed_box_are_smaller_images(row, side, trained) -> None:
    sizes = trained[row].learner.memory.examples().images.sizes
    assert sizes.unique().tolist() == [side]


def test_artifacts_alone_keep_the_pixels_of_raw_exemplars(trained) -> None:
    images = trained["2 artifact"].learner.memory.examples().images
    originals = {image.tobytes() for image in DATA[0][0]}
    assert all(images.image(k).numpy().tobytes() in originals for k in range(len(images)))


def test_rows_of_cim_without_a_branch_are_those_of_cam(trained) -> None:
    for row in ("2 artifact", "3 full", "4 random", "5 centre", "6 class"):
        mine = trained[f"{row.split()[0]} of cim"]
        assert np.array_equal(mine.accuracy_matrix, trained[row].accuracy_matrix, equal_nan=True)
        states = [r.learner.memory.checksum() for r in (mine, trained[row])]
        assert states[0] == states[1]
        assert not mine.learner.parts.addons[0].retained()


def test_random_regions_differ_between_tasks_and_not_between_runs(trained) -> None:
    again = run("4 random")
    boxes = [r.learner.memory.examples().images.boxes for r in (again, trained["4 random"])]
    assert torch.equal(*boxes)
    labels = again.learner.memory.examples().labels
    assert not torch.equal(boxes[0][labels == 0][:2], boxes[0][labels == 2][:2])


def test_the_last_block_alone_is_learned(trained) -> None:
    addon = trained["10 last block"].learner.parts.addons[0]
    assert [len(curves) for curves in addon.phi] == [1]
    extractor = addon._branch().extractors[0]
    kinds = [type(extractor.layers[k]) for k in (2, 5)]
    assert kinds == [nn.ReLU, Pade]
    assert extractor.layers[5].numerator is addon.phi[0][0].numerator
    assert float(addon.distances[-1]) > 0
    every = trained["9 bilevel"].learner.parts.addons[0]
    assert [len(curves) for curves in every.phi] == [2]


RESUMED = [
    "4 random",
    "8 joint",
    *(pytest.param(r, marks=pytest.mark.slow) for r in ("7 threshold", "10 last block")),
    pytest.param("11 foreground", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("row", RESUMED)
def test_a_run_stopped_in_a_task_ends_in_the_same_bits(
    row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = {"engine.checkpoint_seconds": 0}
    whole = run(row, tmp_path / "whole", **always)
    steps, save = 0, SeedRun._save_between_steps

    def stopping(seed_run: SeedRun, trainer: Any) -> None:
        nonlocal steps
        save(seed_run, trainer)
        steps += 1
        if steps in (1, 3, 6):
            raise KeyboardInterrupt

    monkeypatch.setattr(SeedRun, "_save_between_steps", stopping)
    stops = 0
    while True:
        try:
            stopped = run(row, tmp_path / "stopped", **always)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 2
    for a, b in zip(whole.outcomes[0].tasks, stopped.outcomes[0].tasks, strict=True):
        assert {**vars(a), "seconds": 0} == {**vars(b), "seconds": 0}
    ends = [tmp_path / name / "seed-0" / "learner.safetensors" for name in ("whole", "stopped")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": "held_out"}, "threshold"),
        ({"thresholds": ()}, "thresholds is ()"),
        ({"thresholds": (0.5, 1.0)}, "thresholds is (0.5, 1.0)"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"foreground_ratio": 0.5}, "foreground_ratio is 0.5"),
        ({"foreground_ratio": 5.0}, "it must lie from 1 to ratio, which is 4.0"),
        ({"boxes": "center"}, "boxes is 'center'"),
    ],
)
def test_settings_that_are_none_are_named(options, says) -> None:
    for config in (CAM.Config, CIM.Config):
        with pytest.raises(FastcilError) as caught:
            config(**options)
        assert says in str(caught.value)
    with pytest.raises(FastcilError, match="boxes is 'learned'"):
        CAM.Config(boxes="learned")


def test_smaller_exemplars_and_cropping_by_padding_do_not_go_together() -> None:
    for crop in ("padded", "window"):
        with pytest.raises(CompositionError, match=rf"cim.foreground_ratio.*augment.crop '{crop}'"):
            run("11 foreground", **{"augment.crop": crop, "augment.size": SIDE})


def test_images_can_not_be_held_out_of_a_method_that_chooses_for_itself() -> None:
    with pytest.raises(CompositionError, match=r"cam.threshold.*DarkPP chooses"):
        run("7 threshold", method="darkpp")
