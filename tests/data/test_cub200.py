"""The published tree of CUB-200-2011 with a few tiny birds."""

import cv2
import numpy as np
import pytest

from fastcil.data import load, load_examples
from fastcil.errors import DataError

# Numbers of classes, in an order of folders that is not that of their names.
BIRDS = {"002.Auk": 1, "001.Albatross": 2, "010.Wren": 10, "003.Gull": 3}
EACH = 5  # the images 0, 2 and 4 of each class are for training


def write(folder, boxes=True, **texts):
    """Images and lists; ``texts`` replaces the content of a list, None leaves it out."""
    lists = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
    number = 0
    for bird, label in BIRDS.items():
        (folder / "images" / bird).mkdir(parents=True)
        for k in range(EACH):
            number += 1
            image = np.full((20 + k, 30, 3), 20 * label + k, np.uint8)
            cv2.imwrite(str(folder / "images" / bird / f"{bird[4:]}_{k}.png"), image)
            lists["images"].append(f"{number} {bird}/{bird[4:]}_{k}.png")
            lists["image_class_labels"].append(f"{number} {label}")
            lists["train_test_split"].append(f"{number} {(k + 1) % 2}")
            # x, y, width, height
            lists["bounding_boxes"].append(f"{number} {k}.0 {label}.5 {10 + k}.2 8.0")
    for name, lines in lists.items():
        text = texts.get(name, "\n".join(lines) + "\n")
        if text is not None and (boxes or name != "bounding_boxes"):
            (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def greys(examples):
    return [int(examples.images.image(i)[0, 0, 0]) for i in range(len(examples))]


NAMES = ("002.Auk", "001.Albatross", "003.Gull", "010.Wren")  # by their numbers


@pytest.mark.parametrize("way", ["the folder", "the one above", "its name"])
def test_the_lists_say_what_is_what(tmp_path, monkeypatch, way):
    root = write(tmp_path / "CUB_200_2011")
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    data = load({"the folder": root, "the one above": tmp_path, "its name": "cub200"}[way])
    assert data.name == "cub200" and data.class_names == NAMES
    labels = [BIRDS[name] for name in NAMES]
    assert data.train.labels.tolist() == [c for c in range(4) for _ in range(3)]
    assert data.test.labels.tolist() == [c for c in range(4) for _ in range(2)]
    assert greys(data.train) == [20 * label + k for label in labels for k in (0, 2, 4)]
    assert greys(data.test) == [20 * label + k for label in labels for k in (1, 3)]
    names = [f"{name}/{name[4:]}_{k}.png" for name in NAMES for k in (0, 2, 4)]
    assert list(data.train_files) == names


def test_boxes_are_the_smallest_of_whole_pixels(tmp_path):
    data = load(write(tmp_path))
    for boxes, kept, examples in (
        (data.train_boxes, (0, 2, 4), data.train),
        (data.test_boxes, (1, 3), data.test),
    ):
        assert boxes.dtype.is_signed and boxes.dtype.itemsize == 2
        for row, box in enumerate(boxes.tolist()):
            label, k = BIRDS[NAMES[row // len(kept)]], kept[row % len(kept)]
            # From y = label + 0.5, 8 pixels high; from x = k, 10.2 + k wide; rounded outwards.
            height = examples.images.sizes[row, 0].item()
            assert box == [label, k, min(label + 9, height), 2 * k + 11]


def test_boxes_end_at_the_image_and_follow_what_is_left_out(tmp_path):
    boxes = "\n".join(f"{n} 25.0 3.0 9.0 400" for n in range(1, 21))
    write(tmp_path, bounding_boxes=boxes)
    part = load(f"{tmp_path}:classes=1-2,train_per_class=2,test_per_class=1")
    assert part.class_names == NAMES[1:3] and part.name.startswith("cub200:classes=1-2")
    assert part.train_boxes.tolist() == [[3, 25, 20, 30], [3, 25, 22, 30]] * 2
    assert len(part.test_boxes) == len(part.test) == 2
    # A class without test images goes, with its boxes and its files.
    for k in (1, 3):
        (tmp_path / "images" / "002.Auk" / f"Auk_{k}.png").write_bytes(b"no image")
    (tmp_path / "images" / "010.Wren" / "Wren_2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Wren_2\.png does not decode"):
        load(tmp_path)
    with pytest.warns(UserWarning, match="4 left out"):
        data = load(tmp_path, skip_bad=True)
    assert data.class_names == NAMES[1:]
    assert len(data.train_boxes) == len(data.train_files) == len(data.train) == 8
    assert len(data.test_boxes) == len(data.test) == 6
    heights = data.train.images.sizes[:, 0].tolist()
    assert data.train_boxes[:, 2].tolist() == heights
    assert [int(f[-5]) + 20 for f in data.train_files] == heights


def test_without_boxes_and_as_examples(tmp_path):
    data = load(write(tmp_path, boxes=False))
    assert data.train_boxes is None and data.test_boxes is None
    examples, names = load_examples(f"{tmp_path}:classes=3")
    assert names == ("010.Wren",) and greys(examples) == [200, 202, 204]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"images": ""}, r"images\.txt names no image"),
        ({"images": "1 a.png"}, r"line 1 of .*images\.txt is '1 a\.png'; every line is the number"),
        ({"images": "1 ../a.png"}, r"names '\.\./a\.png', which is no file in images"),
        ({"images": "1 a/b.png\n1 a/c.png"}, "line 2 of .*each once"),
        ({"images": b"\xff\xfe"}, r"images\.txt cannot be read as a list"),
        ({"image_class_labels": None}, r"image_class_labels\.txt cannot be read"),
        ({"image_class_labels": "1 1"}, r"labels\.txt has no line for image 2 of images\.txt"),
        ({"image_class_labels": "1 x"}, "and the number of its class"),
        (
            {"image_class_labels": "\n".join(f"{n} {n}" for n in range(1, 21))},
            "Auk_1.png in class 2, but others of its folder in class 1",
        ),
        ({"train_test_split": "1 2"}, "and 1 for training or 0 for testing"),
        ({"train_test_split": "\n".join(f"{n} 1" for n in range(1, 21))}, "no image in the test"),
        ({"bounding_boxes": "1 2 3 4"}, "and x, y, width and height of the bird"),
        ({"bounding_boxes": "1 1 1 1 1"}, r"boxes\.txt has no line for image 2"),
    ],
)
def test_bad_lists_are_one_sentence(tmp_path, texts, words):
    with pytest.raises(DataError, match=words) as caught:
        load(write(tmp_path, **texts))
    assert "\n" not in str(caught.value)


def test_nothing_there_says_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="'cub200', but there is no folder CUB_200_2011"):
        load("cub200")
