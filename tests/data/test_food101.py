"""The published tree of Food-101 with a few tiny dishes."""

import json

import cv2
import numpy as np
import pytest

from fastcil.data import load, load_examples
from fastcil.errors import DataError

DISHES = {"tacos": 40, "apple_pie": 80, "pho": 120}
TRAIN, TEST = range(6), (8, 7)


def write(folder, lists="json", **texts):
    """Six images of each dish for training, two for testing, one in neither list."""
    (folder / "meta").mkdir(parents=True)
    for dish, grey in DISHES.items():
        (folder / "images" / dish).mkdir(parents=True)
        for k in range(9):
            image = np.full((6 + k, 7, 3), grey + k, np.uint8)
            cv2.imwrite(str(folder / "images" / dish / f"{100 - k}.jpg"), image)
    for part, numbers in (("train", TRAIN), ("test", TEST)):
        named = {dish: [f"{dish}/{100 - k}" for k in numbers] for dish in DISHES}
        lines = "\n".join(entry for entries in named.values() for entry in entries) + "\n"
        text = texts.get(part, json.dumps(named) if lists == "json" else lines)
        if text is not None:
            (folder / "meta" / f"{part}.{lists}").write_text(text)
    return folder


def greys(examples):
    return [int(examples.images.image(i)[0, 0, 0]) for i in range(len(examples))]


@pytest.mark.parametrize("lists", ["json", "txt"])
@pytest.mark.parametrize("above", [False, True], ids=["itself", "torchvision's root"])
def test_the_lists_say_what_is_what(tmp_path, lists, above):
    write(tmp_path / "food-101", lists)
    data = load(tmp_path if above else tmp_path / "food-101")
    names = ("apple_pie", "pho", "tacos")
    assert data.name == "food101" and data.class_names == names
    assert data.train.labels.tolist() == [c for c in range(3) for _ in TRAIN]
    assert greys(data.train) == [DISHES[n] + k for n in names for k in TRAIN]
    assert greys(data.test) == [DISHES[n] + k for n in names for k in TEST]


@pytest.mark.parametrize("folder", ["food-101", "food101", "Food-101"])
def test_it_goes_by_its_name(tmp_path, monkeypatch, folder):
    write(tmp_path / "data" / folder)
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path / "data"))
    assert len(load("food101").train) == 18
    part = load("food101:classes=0+2,train_per_class=2,test_per_class=1")
    assert part.class_names == ("apple_pie", "tacos") and greys(part.train) == [80, 83, 40, 43]
    examples, names = load_examples("food101:classes=1")
    assert names == ("pho",) and greys(examples) == [120 + k for k in TRAIN]
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path / "data")
    assert load("food101").name == "food101"


def test_nothing_there_says_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'food101', but there is no folder food101, food-101.*"):
        load("food101")
    (tmp_path / "food-101" / "meta").mkdir(parents=True)
    with pytest.raises(DataError, match="food-101 has no images/; give the folder that holds"):
        load("food101")


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"train": None}, "meta has neither train.json nor train.txt; the archive brings both"),
        ({"test": None}, "has neither test.json nor test.txt"),
        ({"test": "[1"}, "test.json is no list of <class>/<number>; unpack the archive again"),
        ({"test": "[1, 2]"}, "test.json is no list"),
        ({"train": '{"pho": ["pho/100/2"]}'}, "train.json names 'pho/100/2'; every image"),
        ({"train": '{"pho": ["../100"]}'}, "every image is named as <class>/<number>"),
        ({"train": '{"pho": ["pho/7"], "tacos": []}'}, "pho/7.jpg cannot be read: No such file"),
        ({"test": '{"pho": ["pho/92"]}'}, "class 'apple_pie' has no image in meta/test"),
    ],
)
def test_bad_lists_are_one_sentence(tmp_path, texts, words):
    with pytest.raises(DataError, match=words) as caught:
        load(write(tmp_path, **texts))
    assert "\n" not in str(caught.value)


def test_what_does_not_decode_can_be_left_out(tmp_path):
    write(tmp_path)
    (tmp_path / "images" / "pho" / "100.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"pho/100\.jpg does not decode"):
        load(tmp_path)
    with pytest.warns(UserWarning, match="1 left out"):
        assert len(load(tmp_path, skip_bad=True).train) == 17
