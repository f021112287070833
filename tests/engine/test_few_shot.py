"""Few-shot streams: sessions drawn by seed, sessions of published lists, what methods are told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import cli
from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine.few_shot import draw_sessions, read_sessions, session_sizes
from fastcil.engine.lesson import Lesson
from fastcil.engine.localisation import QUALITY
from fastcil.engine.plan import make_plan
from fastcil.engine.rehearsal import rehearse
from fastcil.engine.result import Result
from fastcil.engine.run import train
from fastcil.engine.scenario import Arrival, Scenario, make_scenario, pick, split_classes
from fastcil.errors import FastcilError

CLASSES, EACH = 9, 7
NAMES = tuple(f"class {k}" for k in range(CLASSES))


def examples(labels):
    images = np.zeros((len(labels), 4, 4, 3), np.uint8)
    return Examples(ImageStore.from_batch(images), torch.as_tensor(labels))


def dataset(each=(EACH,) * CLASSES, files=None):
    """Classes mixed among one another; ``files`` names the images of each class."""
    labels = np.repeat(np.arange(len(each)), each)
    order = np.random.RandomState(5).permutation(len(labels))
    train_files = None
    if files is not None:
        every = [files(c, k) for c, count in enumerate(each) for k in range(count)]
        train_files = tuple(every[k] for k in order)
    test = examples(list(range(len(each))))
    names = NAMES[: len(each)]
    return Dataset("d", examples(labels[order]), test, names, train_files=train_files)


@pytest.mark.parametrize(
    ("text", "classes", "sizes"),
    [
        ("few-60-5x5", 100, [60] + [5] * 8),
        ("few-100-10x5", 200, [100] + [10] * 10),
        ("few-30-5x5", 50, [30] + [5] * 4),
        ("few-1-1x1", 2, [1, 1]),
    ],
)
def test_sizes(text, classes, sizes):
    assert session_sizes(text, classes) == split_classes(text, classes) == sizes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("few-6-2x3", "'few-6-2x3', which of 9 classes leaves 3 after the base session; 2-way"),
        ("few-9-1x1", "leaves none after the base session"),
        ("few-12-1x1", "leaves none after the base session"),
        ("few-5-6x1", "leaves 4 after the base session; 6-way sessions need a multiple of 6"),
        ("few-0-3x1", "use 'few-B-NxK'"),
        ("few-3-0x1", "use 'few-B-NxK'"),
        ("few-3-3x0", "use 'few-B-NxK'"),
        ("few-3-3", "use 'few-B-NxK'"),
        ("few-", "use 'few-B-NxK'"),
        ("few-3-2x5-online", "so leave '-online' away"),
        ("few", "'few-B-NxK' or 'few:FOLDER'"),
        ("few-3-2x8", r"class 'class \d' of 'd' has 7 training images, fewer than 8 shots"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(text, words):
    with pytest.raises(FastcilError, match=words) as caught:
        make_scenario(text, dataset())
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


def test_a_class_with_too_few_images_is_named_unless_it_is_a_base_class():
    scarce = dataset(each=(7, 7, 1, 7, 7))
    with pytest.raises(FastcilError, match="class 'class 2' of 'd' has 1 training image, fewer"):
        make_scenario("few-1-2x2", scarce, order_seed=None)
    assert len(make_scenario("few-3-2x2", scarce, order_seed=None).arrivals) == 2


@pytest.mark.parametrize("seed", [0, 1993, None])
def test_sessions_bring_all_base_images_and_then_the_shots_of_the_seed(seed):
    data = dataset()
    labels = data.train.labels.numpy()
    scenario = make_scenario("few-3-2x3", data, order_seed=seed)
    assert scenario.few_shot and not scenario.online and not scenario.task_aware
    assert [len(arrival.classes) for arrival in scenario.arrivals] == [3, 2, 2, 2]
    assert scenario.order == make_scenario("lfs-9", data, order_seed=seed).order
    assert len(pick(data.train, scenario.arrivals[0], scenario.order)) == 3 * EACH
    permuted = np.arange(63) if seed is None else np.random.RandomState(seed).permutation(63)
    for arrival in scenario.arrivals[1:]:
        # The first three of each class in the shuffled order, found naively.
        shots = {
            int(place)
            for c in arrival.classes
            for place in [k for k in permuted if labels[k] == c][:3]
        }
        assert arrival.images.tolist() == sorted(shots)
        new = pick(data.train, arrival, scenario.order)
        assert torch.bincount(new.labels).tolist()[-2:] == [3, 3]


def test_shots_are_seeded_nested_and_independent_of_the_order_of_classes():
    data = dataset()
    order = list(range(CLASSES))

    def shots(text, order, seed):
        sessions = draw_sessions(text, data, order, seed)[1:]
        images = torch.cat([images for _, images in sessions])
        return {c: set(images[data.train.labels[images] == c].tolist()) for c in range(3, 9)}

    drawn = shots("few-3-2x3", order, 7)
    assert drawn == shots("few-3-2x3", order, 7)
    assert drawn == shots("few-3-3x3", [2, 0, 1, *order[:2:-1]], 7)
    assert drawn != shots("few-3-2x3", order, 8)
    fewer = shots("few-3-2x1", order, 7)
    assert all(fewer[c] < drawn[c] for c in drawn)


def write(folder, sessions):
    folder.mkdir(parents=True, exist_ok=True)
    for number, lines in enumerate(sessions, 1):
        text = lines if isinstance(lines, str) else "".join(f"{line}\n" for line in lines)
        (folder / f"session_{number}.txt").write_text(text)
    return f"few:{folder}"


def of_class(data, c, count):
    return (data.train.labels == c).nonzero().flatten().tolist()[:count]


def test_lists_of_numbers_are_positions_in_the_training_part(tmp_path, monkeypatch):
    data = dataset()
    base = [*of_class(data, 4, 7), *of_class(data, 1, 5)]
    # Shuffled, classes backwards; a byte order mark and empty lines do no harm.
    second = [*of_class(data, 8, 2)[::-1], *of_class(data, 0, 2)]
    sessions = ["\ufeff" + "\n\n".join(map(str, base[::-1])), "\n".join(map(str, second)) + "\n \n"]
    text = write(tmp_path / "lists-online", sessions)
    scenario = make_scenario(text, data)
    assert scenario.name == text and scenario.few_shot and not scenario.online
    # Labels ascend within a session, however its list is shuffled.
    assert scenario.order == (1, 4, 0, 8)
    assert [arrival.images.tolist() for arrival in scenario.arrivals] == [
        sorted(base),
        sorted(second),
    ]
    new = pick(data.train, scenario.arrivals[1], scenario.order)
    assert torch.bincount(new.labels).tolist() == [0, 0, 2, 2]
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    relative = make_scenario("few:lists-online", data)
    assert relative.order == scenario.order
    (tmp_path / "lists-online" / "test_1.txt").write_text("0\n")
    assert make_scenario("few:lists-online", data).order == scenario.order


def test_ten_sessions_come_in_the_order_of_their_numbers(tmp_path):
    data = dataset(each=(2,) * 9)
    sessions = [of_class(data, c, 1) for c in (3, 1, 4, 0, 5, 8, 2, 6, 7)]
    # session_10 sorts before session_2 as text.
    extra = sessions.pop()
    text = write(tmp_path, [*sessions, extra])
    assert make_scenario(text, data).order == (3, 1, 4, 0, 5, 8, 2, 6, 7)


PATHS = {
    "cub200": (
        lambda c, k: f"{c:03}.Bird_{c}/Bird_{k}_{c}.jpg",
        lambda c, k: f"CUB_200_2011/images/{c:03}.Bird_{c}/Bird_{k}_{c}.jpg",
    ),
    "mini-imagenet in class folders": (
        lambda c, k: f"n{c:08}/n{c:08}{k:08}.jpg",
        lambda c, k: f"MINI-ImageNet/train/n{c:08}/n{c:08}{k:08}.jpg",
    ),
    "mini-imagenet in one folder": (
        lambda c, k: f"n{c:08}{k:08}.jpg",
        lambda c, k: f"MINI-ImageNet/train/n{c:08}/n{c:08}{k:08}.jpg",
    ),
    "deeper on disk than in the list": (
        lambda c, k: f"{c}/more/{k}-{c}.png",
        lambda c, k: f"{k}-{c}.png",
    ),
    "equal": (lambda c, k: f"{c}/{k}.png", lambda c, k: f"{c}/{k}.png"),
    # The same file names in every class.
    "numbered in each class": (lambda c, k: f"{c}/{k}.png", lambda c, k: f"photos/{c}/{k}.png"),
}


@pytest.mark.parametrize("form", PATHS)
def test_lists_of_paths(tmp_path, form):
    on_disk, in_list = PATHS[form]
    data = dataset(files=on_disk)
    sessions = [[in_list(c, k) for c in (0, 1) for k in range(7)], [in_list(5, 3), in_list(2, 6)]]
    scenario = make_scenario(write(tmp_path, sessions), data)
    assert scenario.order == (0, 1, 2, 5)
    found = [[data.train_files[k] for k in arrival.images] for arrival in scenario.arrivals]
    wanted = [[on_disk(c, k) for c in (0, 1) for k in range(7)], [on_disk(5, 3), on_disk(2, 6)]]
    assert [sorted(names) for names in found] == [sorted(names) for names in wanted]


@pytest.mark.parametrize(
    ("sessions", "words"),
    [
        (["1\n2"], r"has no session_2\.txt; give the folder that holds session_1\.txt"),
        ([], r"has no session_1\.txt"),
        (["", "3"], r"session_1\.txt lists no image"),
        (
            ["0\n\n63", "3"],
            r"line 3 of .*session_1\.txt is 63, but 'd' has training images 0 to 62",
        ),
        (["0\n1\n0", "3"], r"line 3 of .*session_1\.txt lists '0' again"),
        (["0", "-1"], r"line 1 of .*session_2\.txt is '-1', which is no training image of 'd'"),
        (["0", "x/1.png"], r"'x/1\.png', which is no training image of 'd'"),
        (["0", "9/1.png"], r"'9/1\.png', which is no training image"),
        (["0", "1.png"], r"line 1 of .*'1\.png', which may be \d/1\.png or \d/1\.png of 'd'"),
    ],
)
def test_bad_lists_are_one_sentence(tmp_path, sessions, words):
    data = dataset(files=lambda c, k: f"{c}/{k}.png")
    with pytest.raises(FastcilError, match=words) as caught:
        read_sessions(write(tmp_path, sessions), data)
    assert "\n" not in str(caught.value)


def test_a_gap_a_class_that_comes_again_and_images_without_names_are_refused(tmp_path):
    data = dataset()
    sessions = [of_class(data, 0, 3), of_class(data, 1, 2), [*of_class(data, 2, 1), 9999]]
    sessions[2] = [*of_class(data, 2, 1), of_class(data, 0, 7)[6]]
    text = write(tmp_path / "again", sessions)
    with pytest.raises(FastcilError, match=r"line 2 of .*class 'class 0', which session_1\.txt"):
        make_scenario(text, data)
    (tmp_path / "again" / "session_2.txt").unlink()
    with pytest.raises(FastcilError, match=r"has no session_2\.txt"):
        make_scenario(text, data)
    text = write(tmp_path / "paths", [["a/b.jpg"], ["a/c.jpg"]])
    with pytest.raises(FastcilError, match="the images of 'd' are no files; give lists of numbers"):
        make_scenario(text, data)
    (tmp_path / "paths" / "session_2.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "paths" / "session_1.txt").write_text("1")
    with pytest.raises(FastcilError, match=r"session_2\.txt cannot be read as text"):
        make_scenario(text, data)
    for name in ("few:", f"few:{tmp_path / 'nowhere'}", f"few:{tmp_path / 'paths/session_1.txt'}"):
        with pytest.raises(FastcilError, match=r"there is no folder .*session_1\.txt, session"):
            make_scenario(name, data)


def test_a_scenario_of_ones_own_is_checked():
    shots = torch.tensor(of_class(dataset(), 1, 2))
    base, later = Arrival((0, 2)), Arrival((1,), shots)
    own = Scenario("mine", (base, later), few_shot=True)
    assert make_scenario(own, dataset()) is own
    with pytest.raises(FastcilError, match="no class comes after its first task"):
        make_scenario(Scenario("mine", (base, base), few_shot=True), dataset())
    with pytest.raises(FastcilError, match=r"few_shot and scenario\.online are both True"):
        make_scenario(Scenario("mine", (base, later), few_shot=True, online=True), dataset())


def test_runs_of_session_lists_lie_in_a_folder_of_their_own():
    assert cli._default_dir("er", "cub200", "few:lists/cub/") == "runs/er-cub200-few-cub"
    assert cli._default_dir("er", "data/five", "few-3-1x2") == "runs/er-five-few-3-1x2"


OPTIONS = {
    "engine.progress": False,
    "engine.epoch_scale": 0.02,
    "engine.batch_size": 8,
    "augment.size": 12,
    "backbone": ConvNet,
    "memory": "8 images",
}


def pictures():
    rng = np.random.default_rng(0)
    parts = []
    for each in (6, 3):
        labels = torch.arange(5).repeat_interleave(each)
        images = rng.integers(0, 256, (len(labels), 12, 12, 3), np.uint8)
        parts.append(Examples(ImageStore.from_batch(images), labels))
    return Dataset("five", *parts, tuple("abcde"))


def test_methods_are_told_of_every_session_but_the_base_one(tmp_path, monkeypatch):
    told = []
    learn = Lesson.run

    def watch(lesson, task, resume=None):
        told.append((task.few_shot, torch.bincount(task.examples.labels).tolist()))
        return learn(lesson, task, resume)

    monkeypatch.setattr(Lesson, "run", watch)
    result = train("finetune", pictures(), "few-3-1x2", run_dir=tmp_path, **OPTIONS)
    assert told == [(False, [5] * 3), (True, [0] * 3 + [1]), (True, [0] * 4 + [1])], "one held out"
    (seed,) = result.outcomes
    assert result.few_shot and all(task.few_shot for task in seed.tasks)
    columns = [task.correct[result.readouts[0]] for task in seed.tasks]
    base = [100 * sum(c["top1"][:3]) / 9 for c in columns]
    novel = [100 * sum(c["top1"][3:]) / sum(c["count"][3:]) for c in columns[1:]]
    assert result.base_accuracy == pytest.approx(base)
    assert np.isnan(result.novel_accuracy[0]) and np.isnan(result.harmonic_mean[0])
    assert result.novel_accuracy[1:] == pytest.approx(novel)
    again = Result.load(tmp_path)
    assert again.few_shot and again.base_accuracy == pytest.approx(base)
    assert "novel" in repr(again)
    assert again.summary()["novel_accuracy"][0] is None
    told.clear()
    plan = make_plan(
        "finetune", pictures(), "few-3-1x2", "none", None, 0, "cpu", ConvNet, {"augment.size": 12}
    )
    rehearse(plan)
    assert [few_shot for few_shot, _ in told] == [False, True]
    shots = plan.identity()["tasks"]
    plan.scenario = replace(plan.scenario, few_shot=False)
    assert plan.identity()["tasks"] != shots


def test_boxes_are_judged_on_the_images_that_were_trained(tmp_path):
    data = "scenes:classes=4,size=32,train_per_class=6,test_per_class=2"
    options = {**OPTIONS, "augment.size": 32, "cam.threshold": 0.5}
    result = train("icarl+cam", data, "few-2-1x3", **options)
    assert [record["title"] for record in result.outcomes[0].tasks[-1].records].count(QUALITY) == 1
