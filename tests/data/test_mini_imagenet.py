"""mini-ImageNet as people have it on disk, with a few tiny classes of twelve images."""

import cv2
import numpy as np
import pytest

from fastcil.data import load, load_examples
from fastcil.data.mini_imagenet import load_mini_imagenet
from fastcil.errors import DataError

CLASSES = {"n02": 40, "n01": 80, "n05": 120, "n03": 160}
LISTS = {"train": ["n05", "n02"], "val": ["n01"], "test": ["n03"]}
NAMES = ("n01", "n02", "n03", "n05")
EACH = 12  # of which the last sixth, two, are for testing


def picture(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((8, 9, 3), grey, np.uint8))


def write_lists(folder, **texts):
    """The lists name each class's images backwards."""
    for name, grey in CLASSES.items():
        for k in range(EACH):
            picture(folder / "images" / f"{name}{k:02}.png", grey + k)
    for split, classes in LISTS.items():
        lines = [f"{c}{k:02}.png,{c}" for c in classes for k in reversed(range(EACH))]
        text = texts.get(split, "\n".join(["filename,label", *lines]))
        if text is not None:
            (folder / f"{split}.csv").write_text(text)
    return folder


def write_folders(folder, inside=None):
    """Class folders: here, in one folder, or in those of the lists."""
    for split, classes in LISTS.items():
        for name in classes:
            root = folder if inside == "" else folder / (inside or split)
            for k in range(EACH):
                picture(root / name / f"{k:02}.png", CLASSES[name] + k)
    return folder


def greys(examples):
    return [int(examples.images.image(i)[0, 0, 0]) for i in range(len(examples))]


def check(data, order):
    assert data.name == "mini-imagenet" and data.class_names == NAMES
    assert data.train.labels.tolist() == [c for c in range(4) for _ in range(10)]
    assert data.test.labels.tolist() == [c for c in range(4) for _ in range(2)]
    assert greys(data.train) == [CLASSES[n] + k for n in NAMES for k in order[:10]]
    assert greys(data.test) == [CLASSES[n] + k for n in NAMES for k in order[10:]]


def test_the_lists_say_what_there_is_and_in_which_order(tmp_path):
    check(load(write_lists(tmp_path)), range(EACH)[::-1])


@pytest.mark.parametrize("inside", ["", "images", None], ids=["here", "images", "three parts"])
def test_class_folders_go_by_the_names_of_files(tmp_path, monkeypatch, inside):
    write_folders(tmp_path / "mini-imagenet", inside)
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    check(load("mini-imagenet"), range(EACH))


@pytest.mark.parametrize("folder", ["miniImageNet", "mini_imagenet", "MiniImageNet"])
def test_it_goes_by_its_name(tmp_path, monkeypatch, folder):
    write_lists(tmp_path / folder)
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    part = load("mini-imagenet:classes=0+2,train_per_class=5,test_per_class=1")
    assert part.class_names == ("n01", "n03")
    assert greys(part.train) == [grey + k for grey in (80, 160) for k in (11, 9, 7, 5, 3)]
    assert greys(part.test) == [81, 161]
    examples, names = load_examples("mini-imagenet:classes=1")
    assert names == ("n02",) and greys(examples) == [40 + k for k in range(11, 1, -1)]


def test_a_hundred_class_folders_of_word_net_are_told_by_their_path(tmp_path):
    for c in range(100):
        for k in range(2):
            picture(tmp_path / f"n{c:08}" / f"{k}.png", c)
    data = load(tmp_path)
    assert data.name == "mini-imagenet" and len(data.class_names) == 100
    assert len(data.train) == len(data.test) == 100
    (tmp_path / "n00000007").rename(tmp_path / "other")
    with pytest.raises(DataError, match="has no class folder in train/"):
        load(tmp_path)


def test_600_images_are_500_and_100(tmp_path):
    for name in ("n01", "n02"):
        picture(tmp_path / "mini-imagenet" / name / "0000.png", 9)
        data = (tmp_path / "mini-imagenet" / name / "0000.png").read_bytes()
        for k in range(1, 600):
            (tmp_path / "mini-imagenet" / name / f"{k:04}.png").write_bytes(data)
    found = load_mini_imagenet(tmp_path / "mini-imagenet")
    assert (len(found.train), len(found.test)) == (1000, 200)


def test_nothing_there_says_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="'mini-imagenet', but there is no folder mini-imagenet"):
        load("mini-imagenet")
    (tmp_path / "mini-imagenet").mkdir()
    with pytest.raises(DataError, match="holds no mini-ImageNet; give the folder that holds"):
        load("mini-imagenet")


@pytest.mark.parametrize("whole", [True, False], ids=["the folder", "a file"])
def test_pickles_are_not_opened(tmp_path, whole):
    files = [tmp_path / f"mini-imagenet-cache-{split}.pkl" for split in ("train", "val", "test")]
    for file in files:
        file.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(DataError, match="is a pickle, which would run whatever is in it") as caught:
        load(tmp_path if whole else files[0])
    assert "images/ with train.csv" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"val": None}, "has no val.csv; all three lists are needed"),
        ({"train": ""}, "train.csv is no list of images; it begins with the line filename,label"),
        ({"test": "a.png,n03"}, "test.csv is no list of images"),
        ({"val": "filename,label\nn0100.png"}, "line 2 of .*val.csv is 'n0100.png'; every line"),
        ({"val": "filename,label\n../x.png,n01"}, "every line names an image as filename,label"),
        ({"val": "filename,label\nn0100.png,n01\n,n01"}, "line 3 of .* is ',n01'"),
        ({"val": "filename,label\nn0199.png,n01\nn0100.png,n01"}, "n0199.png cannot be read"),
        ({"val": "filename,label\nn0100.png,n01"}, "class 'n01' has no image in the first five"),
    ],
)
def test_bad_lists_are_one_sentence(tmp_path, texts, words):
    with pytest.raises(DataError, match=words) as caught:
        load(write_lists(tmp_path, **texts))
    assert "\n" not in str(caught.value)


def test_what_does_not_decode_can_be_left_out(tmp_path):
    write_lists(tmp_path)
    (tmp_path / "images" / "n0103.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"n0103\.png does not decode"):
        load(tmp_path)
    with pytest.warns(UserWarning, match="1 left out"):
        assert len(load(tmp_path, skip_bad=True).train) == 39


def check_divided(data):
    assert data.name == "mini-imagenet" and data.class_names == NAMES
    assert data.train.labels.tolist() == [c for c in range(4) for _ in range(9)]
    assert greys(data.train) == [CLASSES[n] + k for n in NAMES for k in range(3, 12)]
    assert greys(data.test) == [CLASSES[n] + k for n in NAMES for k in range(3)]


def test_folders_of_the_same_classes_say_what_is_for_testing(tmp_path, monkeypatch):
    """The tree of few-shot class-incremental learning; the first files are for testing."""
    for name, grey in CLASSES.items():
        for k in range(EACH):
            part = "test" if k < 3 else "train"
            picture(tmp_path / "MINI-ImageNet" / part / name / f"{name}{k:02}.png", grey + k)
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    data = load("mini-imagenet")
    check_divided(data)
    assert data.train_files[:2] == ("n01/n0103.png", "n01/n0104.png")


@pytest.mark.parametrize("place", ["", "split"])
def test_lists_of_the_same_classes_say_what_is_for_testing(tmp_path, place):
    write_lists(tmp_path, train=None, val=None, test=None)
    (tmp_path / place).mkdir(exist_ok=True)
    for part, numbers in (("train", range(3, EACH)), ("test", range(3))):
        lines = [f"{c}{k:02}.png,{c}" for c in CLASSES for k in numbers]
        text = "\n".join(["filename,label", *lines])
        (tmp_path / place / f"{part}.csv").write_text(text)
    data = load(tmp_path)
    check_divided(data)
    # All images lie in one folder, where their names tell them apart.
    assert data.train_files[:2] == ("n0103.png", "n0104.png")
    with pytest.raises(DataError, match=r"class 'n05' has no image in test\.csv"):
        text = (tmp_path / place / "test.csv").read_text().replace(",n05", ",n02")
        (tmp_path / place / "test.csv").write_text(text)
        load(tmp_path)


def test_images_are_called_by_class_and_file(tmp_path):
    data = load_mini_imagenet(write_folders(tmp_path, ""))
    assert data.train_files[9:11] == ("n01/09.png", "n02/00.png")
