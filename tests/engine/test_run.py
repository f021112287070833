"""`fastcil.train`: what it measures is what brute force finds, and seeds are what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from backbones import ConvNet
from PIL import Image
from torch import Tensor

from fastcil import Arrival, FastcilError, Learner, Result, Scenario, train
from fastcil.contract import evaluating
from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.trainer import Trainer

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
# Seven classes, three at a time: the last task brings one.
SCENARIO = "b0-inc3"
SIZES = (3, 3, 1)
OPTIONS = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 16,
    "engine.progress": False,
    "augment.size": 16,
}


class Other(ConvNet):
    """Another backbone of the same shape."""


def part(per_class: int, seed: int) -> Examples:
    """Noise around a colour of each class, images of many sizes, uneven numbers of them."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for label in range(len(CLASSES)):
        colour = np.random.default_rng(100 + label).uniform(60, 195, 3)
        for _ in range(per_class + label % 3):
            noise = rng.normal(colour, 40, (*rng.integers(16, 24, 2), 3))
            images.append(noise.clip(0, 255).astype(np.uint8))
            labels.append(label)
    return Examples(ImageStore.from_images(images), torch.tensor(labels))


DATA = Dataset("beasts", part(8, 0), part(5, 1), CLASSES)


def run(method: str = "er", **changes: Any) -> Result:
    arguments = {"data": DATA, "scenario": SCENARIO, "memory": "14 images", "backbone": ConvNet}
    return train(method, **{**arguments, **OPTIONS, **changes})


def without_seconds(result: Result) -> list[list[dict[str, Any]]]:
    return [
        [{k: v for k, v in vars(task).items() if k != "seconds"} for task in outcome.tasks]
        for outcome in result.outcomes
    ]


def count_by_hand(learner: Learner, order: tuple[int, ...]) -> dict[str, dict[str, list[int]]]:
    """Each readout's hits, image by image, labels looked up in the data set itself."""
    known = len(learner.class_names)
    found: dict[str, dict[str, list[int]]] = {}
    for name, readout in learner.method.readouts().items():
        hits = {key: [0] * known for key in ("top1", "top5", "count")}
        for k in range(len(DATA.test)):
            label = int(DATA.test.labels[k])
            if label not in order[:known]:
                continue
            place = order.index(label)
            one = Examples(ImageStore.from_images([DATA.test.images.image(k)]), torch.tensor([0]))
            with evaluating(learner.method):
                scores = learner.parts.context.scan(readout, one)[0].tolist()
            ranked = sorted(range(known), key=lambda c, s=scores: -s[c])
            hits["top1"][place] += ranked[0] == place
            hits["top5"][place] += place in ranked[:5]
            hits["count"][place] += 1
        found[name] = hits
    return found


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, dict[str, list[int]]]]:
    """What brute force finds whenever a task is measured."""
    found: list[dict[str, dict[str, list[int]]]] = []
    measure = SeedRun._measure

    def measured(seed_run: SeedRun, *arguments: Any) -> Any:
        assert seed_run.learner is not None
        found.append(count_by_hand(seed_run.learner, seed_run.plan.scenario.order))
        return measure(seed_run, *arguments)

    monkeypatch.setattr(SeedRun, "_measure", measured)
    return found


@pytest.mark.parametrize(
    "method, readouts",
    [
        ("er", ["linear"]),
        ("icarl", ["nme", "linear"]),
        ("foster", ["student", "teacher"]),
        ("der+cam", ["linear"]),
    ],
)
def test_accuracies_are_those_of_brute_force(method, readouts, by_hand) -> None:
    result = run(method)
    assert result.readouts == readouts
    edges = np.cumsum([0, *SIZES])
    for readout in readouts:
        for top in (1, 5):
            matrix = result.matrix(readout, top)
            assert matrix.shape == (3, 3)
            for t, hits in enumerate(by_hand):
                row = hits.get(readout) or hits[readouts[0]]
                right, count = row[f"top{top}"], row["count"]
                assert result.curve(readout, top)[t] == pytest.approx(100 * sum(right) / sum(count))
                for j in range(3):
                    inside = slice(edges[j], edges[j + 1])
                    if j > t:
                        assert np.isnan(matrix[t, j])
                    else:
                        share = sum(right[inside]) / sum(count[inside])
                        assert matrix[t, j] == pytest.approx(100 * share)
    last = by_hand[-1][readouts[0]]
    assert sum(last["count"]) == len(DATA.test)
    assert result.last_accuracy == pytest.approx(100 * sum(last["top1"]) / len(DATA.test))
    assert result.average_accuracy == pytest.approx(result.curve().mean())
    # The Learner that is handed over says the same of the images themselves.
    learner = result.learner
    images = [DATA.test.images.image(k).numpy() for k in range(len(DATA.test))]
    names = [CLASSES[k] for k in DATA.test.labels.tolist()]
    right = [a == b for a, b in zip(learner.predict(images).names, names, strict=True)]
    assert 100 * sum(right) / len(right) == pytest.approx(result.last_accuracy)
    assert set(learner.class_names) == set(CLASSES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, run("icarl+cam", run_dir=folder, seeds=(3, 1))


def test_a_result_comes_back_from_disk(saved, tmp_path: Path) -> None:
    folder, result = saved
    result.save(tmp_path / "result.json")
    for path in (folder, folder / "result.json", tmp_path / "result.json"):
        loaded = Result.load(path)
        assert loaded.config == result.config and loaded.outcomes == result.outcomes
        assert loaded.summary() == result.summary() and repr(loaded) == repr(result)
        np.testing.assert_array_equal(loaded.accuracy_matrix, result.accuracy_matrix)
        for measure in ("average", "last", "average_top5", "last_top5", "forgetting", "bwt"):
            assert loaded.per_seed(measure, "linear") == result.per_seed(measure, "linear")
    with pytest.raises(FastcilError, match="holds no learner"):
        _ = Result.load(tmp_path).learner


def test_means_are_over_seeds(saved) -> None:
    _, result = saved
    assert [outcome.seed for outcome in result.outcomes] == [3, 1]
    assert result.last_accuracy == pytest.approx(np.mean(result.per_seed("last")))
    matrices = [outcome.accuracy_matrix() for outcome in result.outcomes]
    np.testing.assert_allclose(result.accuracy_matrix, np.mean(matrices, 0))
    assert not np.array_equal(*(m[-1] for m in matrices))


def test_a_seed_is_the_same_alone_in_company_and_on_disk(saved) -> None:
    folder, both = saved
    alone = run("icarl+cam", seeds=1)
    assert without_seconds(alone)[0] != without_seconds(both)[1], "only a first seed has a gallery"
    for task, other in zip(alone.outcomes[0].tasks, both.outcomes[1].tasks, strict=True):
        assert (task.correct, task.nbytes, task.units) == (other.correct, other.nbytes, other.units)
    images = [DATA.test.images.image(k).numpy() for k in range(12)]
    expected = alone.learner.predict(images)
    found = Result.load(folder / "seed-1", backbone=ConvNet).learner.predict(images)
    assert found.names == expected.names and torch.equal(found.scores, expected.scores)
    first = both.learner
    assert first is both.learner, "a Learner that learns on is not forgotten"
    assert first.seed == 3 and Result.load(folder, backbone=ConvNet).learner.seed == 3
    assert not torch.equal(first.predict(images).scores, expected.scores)


def test_the_run_directory_says_what_was_run(saved) -> None:
    folder, result = saved
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == result.config
    assert config["method"] == "icarl+cam" and config["memory"] == "14 images"
    assert config["scenario"] == SCENARIO and config["seeds"] == [3, 1]
    assert config["icarl"]["first"]["lr"] == 2.0 and config["cam"]["threshold"] == 0.6
    assert config["engine"]["epoch_scale"] == 0.01
    environment = yaml.safe_load((folder / "environment.yaml").read_text())
    assert {"fastcil", "commit", "torch", "python", "processor", "device", "threads"} <= set(
        environment
    )
    for seed in (3, 1):
        names = {file.name for file in (folder / f"seed-{seed}").iterdir()}
        assert names == {"events.jsonl", "learner.safetensors", "result.json"}
        lines = (folder / f"seed-{seed}" / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        assert [e["task"] for e in events if e["event"] == "evaluated"] == [0, 1, 2]
        assert all(e["seed"] == seed for e in events if e["event"] == "task")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(Trainer, "run", refuse)


def test_a_finished_run_is_read(saved, no_training) -> None:
    folder, result = saved
    times = {file: file.stat().st_mtime_ns for file in folder.glob("seed-*/*")}
    # How it is watched may be another; one seed of several may be asked for.
    again = run("icarl+cam", run_dir=folder, seeds=(1,), **{"engine.scan_batch": 7})
    assert again.outcomes == result.outcomes[1:]
    assert run("icarl+cam", run_dir=folder, seeds=(3, 1)).outcomes == result.outcomes
    assert {file: file.stat().st_mtime_ns for file in folder.glob("seed-*/*")} == times


def test_a_further_seed_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(run_dir=tmp_path / "run", seeds=0)
    both = run(run_dir=tmp_path / "run", seeds=(0, 1))
    assert both.outcomes[0] == first.outcomes[0] and len(both.outcomes) == 2


def arrivals(*classes: tuple[int, ...]) -> Scenario:
    return Scenario("mine", tuple(map(Arrival, classes)))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"memory": "15 images"}, "memory was 14 images, now 15 images"),
        ({"er.first.lr": 0.5}, "er.first.lr was 0.1, now 0.5"),
        ({"engine.order_seed": None}, "engine.order_seed was 1993, now None"),
        ({"backbone": Other}, "backbone was ConvNet, now Other"),
        ({"scenario": arrivals((0, 1), (3, 2))}, "tasks was 2 tasks"),
        ({"data": Dataset("beasts", part(8, 5), DATA.test, CLASSES)}, "images was"),
    ],
)
def test_another_run_in_the_directory_is_refused(changes, says, tmp_path: Path) -> None:
    base = {"scenario": arrivals((0, 1), (2, 3))}
    run(run_dir=tmp_path, **base)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(FastcilError, match="holds a run of another config") as caught:
        run(run_dir=tmp_path, **{**base, **changes})
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[dict[str, Tensor], Tensor]]]:
    """The weights each task begins with and the order of its first batch, taken before training."""
    seen: list[tuple[dict[str, Tensor], Tensor]] = []

    def look(trainer: Trainer, stages: Any, resume: Any = None) -> None:
        from fastcil.engine.loader import Loader

        key = (*trainer.key, 0, 0)
        loader = Loader(stages[0].streams, trainer.augmentation, trainer.device, key)
        weights = {name: p.detach().clone() for name, p in trainer.method.named_parameters()}
        seen.append((weights, loader.batches(0, 0)[0].index))

    monkeypatch.setattr(Trainer, "run", look)
    return seen


def test_seeds_of_weights_data_and_order_are_apart(starts) -> None:
    for init, data in ((0, 0), (0, 1), (1, 0)):
        run("finetune", **{"engine.init_seed": init, "engine.data_seed": data})
    run("finetune", seeds=1)
    by_seeds = dict(
        zip(["00", "01", "10", "11"], (starts[k] for k in range(0, 12, 3)), strict=True)
    )

    def weights(a: str, b: str) -> bool:
        x, y = by_seeds[a][0], by_seeds[b][0]
        return all(torch.equal(x[name], y[name]) for name in x)

    def shuffles(a: str, b: str) -> bool:
        return torch.equal(by_seeds[a][1], by_seeds[b][1])

    assert weights("00", "01") and not shuffles("00", "01")
    assert shuffles("00", "10") and not weights("00", "10")
    # Left out, both are the run's seed.
    assert weights("10", "11") and shuffles("01", "11")


def test_the_order_of_classes_has_a_seed_of_its_own(starts) -> None:
    def order(**options: Any) -> tuple[str, ...]:
        return run("finetune", **options).learner.class_names

    drawn = np.random.RandomState(1993).permutation(len(CLASSES))
    assert order() == order(seeds=5) == tuple(CLASSES[k] for k in drawn)
    assert order(**{"engine.order_seed": None}) == CLASSES
    assert order(**{"engine.order_seed": 7}) != order()
    assert order(scenario=arrivals((4, 1), (0,))) == ("elk", "bee", "ant")


def test_a_class_that_comes_again_is_no_new_class(by_hand) -> None:
    halves = torch.arange(len(DATA.train)).split(len(DATA.train) // 2)
    stream = Scenario(
        "drip", (Arrival((0, 1, 2)), Arrival((2, 0, 5), None), Arrival((5, 1), halves[0]))
    )
    with pytest.raises(FastcilError, match="has no image of class 5"):
        run(scenario=Scenario("x", (Arrival((5,), halves[0]),)))
    result = run(scenario=stream)
    assert [task.classes for task in result.outcomes[0].tasks] == [3, 1, 0]
    assert result.learner.class_names == ("ant", "bee", "cat", "fox")
    matrix = result.accuracy_matrix
    assert np.isnan(matrix[:, 2]).all() and not np.isnan(matrix[2, :2]).any()
    assert np.isfinite([result.forgetting, result.bwt, result.last_accuracy]).all()


def test_windows_of_resized_images(tmp_path: Path) -> None:
    """Images of any sizes are learned from windows, and judged by the middle one."""
    rng = np.random.default_rng(5)
    images = [rng.integers(0, 256, (20 + k % 30, 60 - k % 25, 3), np.uint8) for k in range(24)]
    part = Examples(ImageStore.from_images(images), torch.tensor([0, 1, 2, 3] * 6))
    data = Dataset("mixed", part, part.select(range(4)), ("a", "b", "c", "d"))
    more = {"augment.size": 32, "augment.crop": "window", "augment.resize": 40}
    result = train("finetune", data, "lfs-2", "none", backbone=ConvNet, **{**OPTIONS, **more})
    look = result.learner.parts.augmentation
    assert (look.size, look.crop, look.resize) == (32, "window", 40)
    result.learner.save(tmp_path / "learner.safetensors")
    again = Learner.load(tmp_path / "learner.safetensors", device="cpu", backbone=ConvNet)
    assert again.parts.augmentation == look
    # What the network sees of an image is the middle of it, resized.
    whole = Image.fromarray(images[3]).resize((40, 40), Image.Resampling.BILINEAR)
    seen = []
    network = result.learner.method.network
    hook = network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    result.learner.predict([images[3]])
    hook.remove()
    mean, std = (torch.tensor(v)[:, None, None] for v in (look.mean, look.std))
    shown = ((seen[0][0] * std + mean) * 255).permute(1, 2, 0)
    error = (shown - torch.from_numpy(np.asarray(whole)[4:36, 4:36].copy())).abs()
    assert error[1:-1, 1:-1].max() < 1.01


def test_images_decide_together_how_they_are_cut() -> None:
    """The first task's images are all 32 x 32; that others are not must not come as a surprise."""
    sides = [32, 32, 20, 44]
    images = [np.full((side, side, 3), 60 * k, np.uint8) for k, side in enumerate(sides)] * 6
    train_part = Examples(ImageStore.from_images(images), torch.tensor([0, 1, 2, 3] * 6))
    data = Dataset("mixed", train_part, train_part.select([0, 1, 2, 3]), ("a", "b", "c", "d"))
    options = {k: v for k, v in OPTIONS.items() if k != "augment.size"}
    for size in (None, 32):
        scenario = arrivals((0, 1), (2, 3))
        more = {**options, "augment.size": size or 40}
        result = train("finetune", data, scenario, "none", backbone=ConvNet, **more)
        assert result.learner.parts.augmentation.crop == "resized"
