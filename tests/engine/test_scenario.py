"""Scenarios: class order, splits, and the labels that tasks see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine.scenario import (
    Arrival,
    Scenario,
    class_order,
    make_scenario,
    pick,
    split_classes,
    split_images,
)
from fastcil.errors import FastcilError


@pytest.mark.parametrize(
    "text, classes, sizes",
    [
        ("lfs-5", 20, [4] * 5),
        ("lfs-10", 101, [11] + [10] * 9),
        ("lfs-3", 20, [7, 7, 6]),
        ("lfs-1", 7, [7]),
        ("lfh-5", 100, [50] + [10] * 5),
        ("lfh-2", 7, [4, 2, 1]),
        ("b0-inc10", 100, [10] * 10),
        ("b0-inc30", 100, [30, 30, 30, 10]),
        ("b50-inc5", 100, [50] + [5] * 10),
        ("b20-inc20", 20, [20]),
        ("task-3", 20, [7, 7, 6]),
        ("data-3", 20, [20, 0, 0]),
        ("data-1", 20, [20]),
        ("lfs-3-online", 20, [7, 7, 6]),
        ("b5-inc10-online", 20, [5, 10, 5]),
        ("data-3-online", 20, [20, 0, 0]),
    ],
)
def test_splits(text, classes, sizes):
    assert split_classes(text, classes) == sizes
    assert sum(sizes) == classes


@pytest.mark.parametrize(
    "text",
    [
        *("lfs-0", "lfs-21", "lfs", "LFS-5", "b0-inc0", "b30-inc5", "5", "lfh-11", "b5"),
        *("task-0", "task-21", "task", "data-0", "data-", "data-x"),
        *(
            "online",
            "-online",
            "lfs-online",
            "lfs-5-online-online",
            "online-lfs-5",
            "lfs-21-online",
        ),
    ],
)
def test_bad_names_are_refused_in_one_sentence(text):
    with pytest.raises(FastcilError, match="scenario is") as caught:
        split_classes(text, 20)
    assert "\n" not in str(caught.value)


def test_order_is_the_literatures():
    assert class_order(100, 1993)[:5] == [68, 56, 78, 8, 23]
    assert sorted(class_order(100, 1993)) == list(range(100))
    assert class_order(4, None) == [0, 1, 2, 3]


@pytest.fixture
def dataset():
    labels = torch.tensor([0, 1, 2, 3] * 3)
    pixels = np.zeros((12, 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0] = labels.numpy()
    examples = Examples(ImageStore.from_batch(pixels), labels)
    return Dataset("four", examples, examples, ("a", "b", "c", "d"))


def test_tasks_get_labels_in_learning_order(dataset):
    scenario = make_scenario("lfs-2", dataset, 1993)
    order = scenario.order
    assert sorted(order) == [0, 1, 2, 3]
    for number, arrival in enumerate(scenario.arrivals):
        task = pick(dataset.train, arrival, order)
        assert sorted(set(task.labels.tolist())) == [2 * number, 2 * number + 1]
        for k in range(len(task)):
            original = int(task.images.image(k)[0, 0, 0])
            assert order[int(task.labels[k])] == original


def test_few_shot_and_data_incremental_streams_fit_the_type(dataset):
    scenario = Scenario(
        "mine",
        (
            Arrival((0, 1, 2, 3), torch.arange(0, 6)),
            Arrival((0, 1, 2, 3), torch.arange(6, 12)),
        ),
    )
    checked = make_scenario(scenario, dataset)
    assert checked.order == (0, 1, 2, 3)
    assert [len(pick(dataset.train, a, checked.order)) for a in checked.arrivals] == [6, 6]


@pytest.mark.parametrize(
    "scenario, says",
    [
        (Scenario("mine", ()), "has no task"),
        (Scenario("mine", (Arrival(()),)), "task 0 has classes ()"),
        (Scenario("mine", (Arrival((0,)), Arrival((0, 9)))), "task 1 has classes (0, 9)"),
        (Scenario("mine", (Arrival((0, 0)),)), "name each once"),
        (Scenario("mine", (Arrival((0,), torch.tensor([12])),)), "positions from 0 to 11"),
        (Scenario("mine", (Arrival((0,), torch.tensor([-1])),)), "positions from 0 to 11"),
        (Scenario("mine", (Arrival((0,), torch.tensor([True])),)), "int64 positions"),
        (Scenario("mine", (Arrival((0, 1), torch.tensor([0, 4])),)), "no image of class 1"),
        (
            Scenario("mine", (Arrival((0, 1)), Arrival((0,), torch.tensor([1])))),
            "task 1 has no image of class 0",
        ),
        (
            Scenario("mine", (Arrival((0, 3)), Arrival((2, 3))), task_aware=True),
            "scenario.task_aware is True, but its task 1 brings class 3 again",
        ),
        ("data-10", "the 12 training images of 'four' cannot fill; ask for at most 9 tasks"),
        ("data-0", "scenario is 'data-0'"),
        ("data-999999999999", "at most 9 tasks"),
        ("task-5", "scenario is 'task-5', which 4 classes cannot fill"),
    ],
)
def test_a_scenario_that_does_not_fit_is_refused(dataset, scenario, says):
    with pytest.raises(FastcilError, match="scenario") as caught:
        make_scenario(scenario, dataset)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_task_incremental_stream_is_the_class_incremental_one_with_the_task_known(dataset):
    named, plain = make_scenario("task-2", dataset, 7), make_scenario("lfs-2", dataset, 7)
    assert named.task_aware and not plain.task_aware
    assert named.arrivals == plain.arrivals
    mine = Scenario("mine", (Arrival((2, 0)), Arrival((1,))), task_aware=True)
    assert make_scenario(mine, dataset) is mine


@pytest.mark.parametrize("name", ["lfs-2", "lfh-1", "b1-inc2", "task-2", "data-3"])
def test_an_online_stream_is_the_same_one_seen_once(dataset, name):
    once, plain = make_scenario(f"{name}-online", dataset, 7), make_scenario(name, dataset, 7)
    assert once.online and not plain.online and once.task_aware == plain.task_aware
    assert once.name == f"{name}-online" and once.order == plain.order
    for mine, theirs in zip(once.arrivals, plain.arrivals, strict=True):
        assert mine.classes == theirs.classes
        assert mine.images is theirs.images or torch.equal(mine.images, theirs.images)
    own = Scenario("mine", (Arrival((2, 0)), Arrival((1, 3))), online=True)
    assert make_scenario(own, dataset) is own


def test_natural_order_is_the_data_sets(dataset):
    scenario = make_scenario("task-2-online", dataset, None)
    assert [arrival.classes for arrival in scenario.arrivals] == [(0, 1), (2, 3)]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("seed", [None, 0, 1993])
def test_every_image_is_dealt_once_and_evenly(parts, seed):
    rng = np.random.default_rng(parts)
    sizes = rng.integers(1, 14, 6)
    labels = torch.from_numpy(rng.permutation(np.repeat(np.arange(6), sizes)))
    dealt = split_images(labels, parts, seed)
    assert sorted(torch.cat(dealt).tolist()) == list(range(len(labels)))
    counts = np.stack([np.bincount(labels[images], minlength=6) for images in dealt])
    assert (counts[0] > 0).all(), "a class is learned when it first comes"
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert all((images.diff() > 0).all() for images in dealt)
    rare = int((sizes < parts).sum())
    totals = counts.sum(1)
    assert totals[0] - totals.min() <= rare + 1
    if rare == 0:
        assert np.ptp(totals) <= 1


def test_parts_of_a_large_set_are_as_large_as_they_can_be():
    labels = torch.arange(100).repeat_interleave(53)
    assert {len(images) for images in split_images(labels, 10, 3)} == {530}
    first, again, other = (split_images(labels, 10, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    # In order, every tenth image of a class goes to a part.
    assert split_images(labels, 10, None)[0][:6].tolist() == [0, 10, 20, 30, 40, 50]


def test_a_data_incremental_stream_brings_every_class_and_each_image_once(dataset):
    scenario = make_scenario("data-3", dataset, 5)
    assert [set(a.classes) for a in scenario.arrivals] == [{0, 1, 2, 3}] * 3
    assert not scenario.task_aware and scenario.order == tuple(class_order(4, 5))
    tasks = [pick(dataset.train, a, scenario.order) for a in scenario.arrivals]
    assert [len(task) for task in tasks] == [4, 4, 4]
    images = torch.cat([a.images for a in scenario.arrivals])
    assert sorted(images.tolist()) == list(range(12))


def test_later_parts_name_only_the_classes_they_have(dataset):
    scenario = make_scenario("data-9", dataset)
    assert set(scenario.arrivals[0].classes) == {0, 1, 2, 3}
    for arrival in scenario.arrivals:
        assert set(arrival.classes) == set(dataset.train.labels[arrival.images].tolist())
    assert sum(len(a.images) for a in scenario.arrivals) == 12
    assert make_scenario(scenario, dataset) is scenario
