"""The published tree of MIT-67 with a few tiny rooms."""

import cv2
import numpy as np
import pytest

from fastcil.data import load, load_examples
from fastcil.errors import DataError

ROOMS = {"winecellar": 40, "airport_inside": 80, "living room": 120, "bar": 160}
LISTS = {"TrainImages.txt": 8, "TestImages.txt": 2}


def write(folder, lists="", **texts):
    """Eight images of each room listed for training, two for testing, one not at all."""
    lines = {name: [] for name in LISTS}
    for room, grey in ROOMS.items():
        (folder / "Images" / room).mkdir(parents=True)
        for k in range(11):
            image = np.full((6 + k, 7, 3), grey + k, np.uint8)
            cv2.imwrite(str(folder / "Images" / room / f"{10 - k:02} x.jpg"), image)
        lines["TrainImages.txt"] += [f"{room}/{k:02} x.jpg" for k in range(8)]
        lines["TestImages.txt"] += [f"{room}/{k:02} x.jpg" for k in (9, 8)]
    for name, listed in lines.items():
        text = texts.get(name.removesuffix("Images.txt").lower(), "\n".join(listed))
        if text is not None:
            (folder / lists / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def greys(examples):
    return [int(examples.images.image(i)[0, 0, 0]) for i in range(len(examples))]


@pytest.mark.parametrize("lists", ["", "Images"])
def test_the_lists_say_what_is_what(tmp_path, lists):
    data = load(write(tmp_path, lists))
    names = ("airport_inside", "bar", "living room", "winecellar")
    assert data.name == "mit67" and data.class_names == names
    assert data.train.labels.tolist() == [c for c in range(4) for _ in range(8)]
    assert data.test.labels.tolist() == [c for c in range(4) for _ in range(2)]
    # The file named k holds grey + 10 - k.
    assert greys(data.train) == [ROOMS[n] + 10 - k for n in names for k in range(8)]
    assert greys(data.test) == [ROOMS[n] + 10 - k for n in names for k in (9, 8)]


def test_a_part_and_examples(tmp_path):
    write(tmp_path)
    (tmp_path / "Images" / "bar" / "00 x.jpg").unlink()
    data = load(f"{tmp_path}:classes=0+3,train_per_class=4,test_per_class=1")
    assert data.class_names == ("airport_inside", "winecellar")
    assert greys(data.train) == [grey + 10 - k for grey in (80, 40) for k in (0, 2, 4, 6)]
    assert greys(data.test) == [81, 41] and data.name.startswith("mit67:classes=0+3")
    examples, names = load_examples(f"{tmp_path}:classes=2-3")
    assert names == ("living room", "winecellar") and len(examples) == 16
    (tmp_path / "Images" / "bar" / "00 x.jpg").write_bytes(
        (tmp_path / "Images" / "bar" / "01 x.jpg").read_bytes()
    )
    examples, names = load_examples(f"{tmp_path}:classes=1,train_per_class=3")
    assert names == ("bar",) and greys(examples) == [169, 168, 165]


def test_a_missing_image_can_be_left_out(tmp_path):
    write(tmp_path)
    (tmp_path / "Images" / "bar" / "00 x.jpg").unlink()
    (tmp_path / "Images" / "bar" / "01 x.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bar/00 x\.jpg cannot be read: No such file"):
        load(tmp_path)
    with pytest.warns(UserWarning, match="2 left out"):
        assert len(load(tmp_path, skip_bad=True).train) == 30
    with pytest.warns(UserWarning, match="2 left out"):
        assert len(load_examples(tmp_path, skip_bad=True)[0]) == 30


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"train": None}, "has no TrainImages.txt; put both published lists beside Images"),
        ({"test": None}, "has no TestImages.txt"),
        ({"test": b"\xff\xfe\x00"}, "TestImages.txt is not text"),
        ({"train": "bar/00 x.jpg\n\nbar"}, "line 3 of .*TrainImages.txt is 'bar'; every line"),
        ({"train": "../bar/00 x.jpg"}, "line 1 of .* every line names an image"),
        ({"train": "../x.jpg"}, "line 1 of .* every line names an image"),
        ({"test": "bar/09 x.jpg"}, "class 'airport_inside' has no image in TestImages.txt"),
    ],
)
def test_bad_lists_are_one_sentence(tmp_path, texts, words):
    write(tmp_path, **texts)
    with pytest.raises(DataError, match=words) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_of_the_general_form_is_still_one(tmp_path):
    for part in ("train", "test"):
        for name in ("Images", "raw"):
            (tmp_path / part / name).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / part / name / "a.png"), np.zeros((4, 4, 3), np.uint8))
    assert load(tmp_path).class_names == ("Images", "raw")
