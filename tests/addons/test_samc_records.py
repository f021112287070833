"""What SAMC leaves for the report: shares, pictures, the lemmas in figures."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from backbones import ConvNet
from compositions import every_other

from fastcil import Learner
from fastcil.addons.completed import first_of_each
from fastcil.contract import Task

OPTIONS = {
    "engine.epoch_scale": 0.02,
    "engine.batch_size": 16,
    "engine.progress": False,
    "augment.size": 16,
}


def draw(count: int, seed: int) -> list[np.ndarray]:
    """Smooth images of two sizes."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 6, 6, 3), np.uint8)
    sizes = [(18, 22), (22, 18)]
    return [cv2.resize(image, sizes[k % 2]) for k, image in enumerate(coarse)]


def learn(options, tasks: int = 3, memory: str = "12 images", method: str = "er+samc") -> Learner:
    learner = Learner(method, memory, backbone=ConvNet, **{**OPTIONS, **options})
    for index in range(tasks):
        images = draw(20, 10 + index)
        shelf = {f"{index}-{k}": images[10 * k : 10 * k + 10] for k in range(2)}
        learner.learn(shelf)
    return learner


def records_of(learner: Learner) -> dict:
    (addon,) = learner.parts.addons
    return {record.title: record for record in addon.records()}


def test_records_of_a_run():
    learner = learn({"samc.threshold": 0.5})
    records = records_of(learner)
    (pictures_title,) = (t for t in records if t.startswith("Saliency and completion"))
    shown = records[pictures_title].payload
    assert pictures_title.endswith("task 3") and len(shown["images"]) == 4
    assert all("original, saliency, stored" in caption for caption in shown["captions"])
    share = records["Of an exemplar's raw bytes, mu = 0.5"].payload
    assert share["x"] == [1, 2, 3]
    for kept, runs, smallest in zip(
        *(share["y"][n] for n in ("pixels kept", "with their mask: runs")),
        share["y"]["with their mask: smallest"],
        strict=True,
    ):
        assert 0 < kept < smallest <= runs < 1
    holes = records["Dropped pixels"].payload["y"]
    assert all(0 < error < 1 for curve in holes.values() for error in curve)
    assert holes["by the rule"] != holes["completed"]
    held = records["Images of a class, pixels dropped"].payload["y"]["exemplars of a class"]
    assert held[-1] == len(learner.memory) / 6 > 2
    table = records[next(t for t in records if t.startswith("Lemma 4.2, with"))].payload
    assert [row[0] for row in table["rows"]] == [1, 2, 3]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    flat = records["Images kept whole: saliency without contrast"].payload
    assert flat["x"] == [1, 2, 3]
    assert all(0 <= share < 1 for share in flat["y"]["of the task's images"])
    assert "originals of exemplars" not in learner.nbytes()


def test_pictures_show_what_is_stored_and_what_became_of_it():
    learner = learn({"samc.threshold": 0.5}, tasks=1)
    record = next(r for t, r in records_of(learner).items() if t.startswith("Saliency"))
    held = learner.memory.examples()
    first = first_of_each(Task(0, (0, 1), 0, held, held), 4)
    for place, picture in zip(first.tolist(), record.payload["images"], strict=True):
        exemplar = held.images.image(place).numpy()
        height, width = 96, round(exemplar.shape[1] * 96 / exemplar.shape[0])
        starts = [k * (width + 4) for k in range(4)]
        parts = [picture[:, s : s + width] for s in starts]
        rows = (np.arange(height) * exemplar.shape[0] // height)[:, None]
        columns = np.arange(width) * exemplar.shape[1] // width
        assert np.array_equal(parts[3], exemplar[rows, columns])
        grey = (parts[2] == 128).all(2)
        assert 0.2 < grey.mean() < 0.98
        assert np.array_equal(parts[2][~grey], parts[0][~grey])
        assert np.array_equal(parts[3][~grey], parts[0][~grey])
        assert not np.array_equal(parts[3], parts[0])


@pytest.mark.parametrize(
    "method", every_other(["er", "icarl", "darkpp", "lucir", "foster", "der", "gem", "mer"])
)
def test_gradients_are_compared_whatever_the_method(method):
    learner = learn({"samc.analyse": True, "samc.samples": 6}, method=f"{method}+samc")
    (addon,) = learner.parts.addons
    rows = addon.transfer.rows
    pairs = {(int(t), int(k)) for t, k in rows[:, :2].tolist()}
    assert pairs <= {(1, 0), (2, 0), (2, 1)} and (2, 1) in pairs and len(pairs) == len(rows)
    figures = rows[:, 2:].view(-1, 2, 6)
    assert bool((figures[..., 2:5].abs() <= 1 + 1e-9).all())
    assert bool(figures.isfinite().all())
    # A step along g changes the loss on memory as the products say: first order is enough, as far
    # as float32 shows so small a change of a loss.
    steps = addon.transfer.steps
    both = [[t, k, end] for t, k in rows[:, :2].tolist() for end in (0, 1)]
    assert sorted(steps[:, :3].tolist()) == sorted(both)
    torch.testing.assert_close(steps[:, 4], steps[:, 3], rtol=0.2, atol=0.01)
    nbytes = learner.nbytes()
    assert nbytes["originals of exemplars"] > 0
    held = nbytes["exemplars"] + nbytes["autoencoder"] + nbytes.get("logits of exemplars", 0)
    assert nbytes["budgeted"] == held


def test_gradients_on_what_is_kept_whole_are_those_on_the_originals():
    learner = learn({"samc.analyse": True, "samc.threshold": 0.0}, memory="24 images")
    (addon,) = learner.parts.addons
    figures = addon.transfer.rows[:, 2:].view(-1, 2, 6)
    torch.testing.assert_close(figures[..., 4], torch.ones_like(figures[..., 4]))
    torch.testing.assert_close(figures[..., 0], figures[..., 1])
    table = records_of(learner)[
        "Does a step that is good for completed exemplars serve the originals?"
    ].payload["rows"]
    met = (figures[:, :, 0] > 0).sum(0).tolist()
    for row, count in zip(table, met, strict=False):
        assert row[1:] == [3, count, f"{count} (100 %)" if count else "none"]


def test_looking_does_not_change_what_is_learned():
    plain, watched = learn({}), learn({"samc.analyse": True})
    state = plain.state()["parts"]["learners"][0]["tensors"]
    for name, value in watched.state()["parts"]["learners"][0]["tensors"].items():
        assert torch.equal(value, state[name])
    assert plain.memory.checksum() == watched.memory.checksum()


def test_a_saved_learner_completes_as_before(tmp_path):
    learner = learn({}, tasks=2)
    learner.save(tmp_path / "learner.safetensors")
    again = Learner.load(tmp_path / "learner.safetensors", backbone=ConvNet)
    assert torch.equal(
        again.memory.examples().images.pixels, learner.memory.examples().images.pixels
    )


def test_a_learner_saved_before_some_figures_were_goes_on():
    learner = learn({}, tasks=1)
    (addon,) = learner.parts.addons
    saved = {k: v for k, v in addon.tensors().items() if k not in ("figures.flat", "figures.whole")}
    assert len(saved) == len(addon.tensors()) - 2
    addon.load_tensors(saved)
    assert len(addon.figures.flat) == len(addon.figures.whole) == 0
    learner.learn({f"1-{k}": draw(10, k) for k in range(2)})
    records = records_of(learner)
    table = records[next(t for t in records if t.startswith("Lemma 4.2, with"))].payload
    assert [row[0] for row in table["rows"]] == [1, 2]
    assert table["rows"][0][-1] == "counted" and table["rows"][1][-1].endswith("%")
    assert records["Images kept whole: saliency without contrast"].payload["x"] == [2]
