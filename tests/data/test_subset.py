"""Parts of data sets: which classes, which images, for every kind of source."""

import dataclasses
import hashlib
import tarfile

import cv2
import numpy as np
import pytest
import torch

from fastcil.data import cifar
from fastcil.data.load import load
from fastcil.data.load_examples import load_examples
from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.data.subset import Subset
from fastcil.errors import DataError, FastcilError
from fastcil.files.decode import decode_image

CLASSES = 6
NAMES = [f"kind{k}" for k in range(CLASSES)]
Y = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), [5, 3, 8, 1, 6, 4]))
X = np.random.default_rng(1).integers(0, 256, (len(Y), 5, 4, 3), dtype=np.uint8)


def expected(labels, keep, per_class):
    """Rows in order and their new labels, written as the words of `Subset` have it."""
    chosen = []
    for c in keep:
        mine = [k for k, label in enumerate(labels) if label == c]
        count = len(mine) if per_class is None else min(per_class, len(mine))
        chosen += [mine[i * len(mine) // count] for i in range(count)]
    return sorted(chosen), [keep.index(labels[k]) for k in sorted(chosen)]


def same(examples, rows, labels):
    assert examples.labels.tolist() == labels
    assert [examples.images.image(i).tolist() for i in range(len(rows))] == X[rows].tolist()


@pytest.fixture
def sources(tmp_path):
    """The same data as npz, folder, tar, arrays, Dataset and torch data sets."""
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X, y_test=Y, class_names=NAMES)
    for k, (image, label) in enumerate(zip(X, Y, strict=True)):
        for part in ("train", "test"):
            folder = tmp_path / "tree" / part / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / f"{k:02}.png"), image[..., ::-1])
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        tar.add(tmp_path / "tree", "tree")
    items = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
    return {
        "npz": str(tmp_path / "a.npz"),
        "folder": str(tmp_path / "tree"),
        "tar": tmp_path / "tree.tar",
        "arrays": ((X, Y), (X, Y)),
        "items": (items, items),
        "Dataset": load(((X, Y), (X, Y)), class_names=NAMES),
    }


KINDS = ["npz", "folder", "tar", "arrays", "items", "Dataset"]
PARTS = [
    ({"classes": "1-3"}, [1, 2, 3]),
    ({"classes": "5+0+2-3", "train_per_class": 3}, [0, 2, 3, 5]),
    ({"classes": [4, 2], "train_per_class": 4, "test_per_class": 1}, [2, 4]),
    ({"classes": range(2), "test_per_class": 100}, [0, 1]),
    ({"train_per_class": 2}, list(range(CLASSES))),
]


def in_order(data, kind):
    """A tree's images are by class and then by file, which is the order of the arrays."""
    if kind not in ("folder", "tar"):
        return data
    lookup = {image.tobytes(): k for k, image in enumerate(X)}

    def sort(part):
        places = [lookup[part.images.image(i).numpy().tobytes()] for i in range(len(part))]
        return part.select(torch.tensor(places).argsort())

    return dataclasses.replace(data, train=sort(data.train), test=sort(data.test))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "keep"), PARTS)
def test_every_source_gives_its_part(sources, kind, options, keep):
    data = in_order(load(sources[kind], **options), kind)
    named = kind not in ("arrays", "items")
    assert list(data.class_names) == [NAMES[k] if named else str(k) for k in keep]
    same(data.train, *expected(Y, keep, options.get("train_per_class")))
    same(data.test, *expected(Y, keep, options.get("test_per_class")))


@pytest.mark.parametrize("kind", ["npz", "folder"])
@pytest.mark.parametrize(("options", "keep"), PARTS)
def test_written_options_are_the_same(sources, kind, options, keep):
    classes = options.get("classes", "0-5")
    text = classes if isinstance(classes, str) else "+".join(map(str, classes))
    written = ",".join(f"{k}={v}" for k, v in {**options, "classes": text}.items())
    data, other = load(f"{sources[kind]}:{written}"), load(sources[kind], **options)
    assert data.class_names == other.class_names
    for part in ("train", "test"):
        mine, theirs = getattr(data, part), getattr(other, part)
        assert torch.equal(mine.labels, theirs.labels)
        assert torch.equal(mine.images.pixels, theirs.images.pixels)
    examples, names = load_examples(f"{sources[kind]}:{written}")
    assert names == other.class_names and torch.equal(examples.labels, other.train.labels)
    assert torch.equal(examples.images.pixels, other.train.images.pixels)


def test_cifar_by_name(tmp_path, monkeypatch):
    archive = cifar.ARCHIVES["cifar10"]
    files = {name: 20 if name == archive.test else 4 for name in (*archive.train, archive.test)}
    folder = tmp_path / archive.folder
    folder.mkdir()
    start = 0
    for name, count in files.items():
        rows = np.full((count, 3073), 7, np.uint8)
        rows[:, 0] = (np.arange(count) + start) % 10
        start += count
        (folder / name).write_bytes(rows.tobytes())
    (folder / archive.names).write_text("\n".join(f"thing{k}" for k in range(10)))
    changed = dataclasses.replace(archive, records=files, md5=hashlib.md5(b"").hexdigest())
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", changed)
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    data = load("cifar10:classes=2+8-9,train_per_class=1")
    assert data.class_names == ("thing2", "thing8", "thing9") and len(data.train) == 3
    assert data.name == "cifar10:classes=2+8-9,train_per_class=1"
    assert sorted(data.test.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert load_examples("cifar10:classes=4")[1] == ("thing4",)
    assert load_examples("scenes:classes=2,train_per_class=1,test_per_class=1")[1][0] == "wheel"


def test_boxes_follow_their_images():
    boxes = torch.arange(4 * len(Y)).reshape(-1, 4).to(torch.int16)
    whole = Examples(ImageStore.from_batch(X), torch.from_numpy(Y))
    data = Dataset("d", whole, whole, tuple(NAMES), boxes, boxes.flip(0), ("left out",))
    part = load(data, classes="0-2", train_per_class=2)
    rows, _ = expected(Y, [0, 1, 2], 2)
    assert torch.equal(part.train_boxes, boxes[rows])
    rows, _ = expected(Y, [0, 1, 2], None)
    assert torch.equal(part.test_boxes, boxes.flip(0)[rows])
    assert part.name == "d:classes=0-2,train_per_class=2" and part.skipped == ("left out",)
    assert load(data) is data and len(data.train) == len(Y)


def test_a_folder_decodes_only_its_part(sources, monkeypatch):
    decoded = []

    def decode(data, path):
        decoded.append(path)
        return decode_image(data, path)

    monkeypatch.setattr("fastcil.data.image_files.decode_image", decode)
    load(sources["folder"], classes="1-2", train_per_class=2, test_per_class=1)
    assert len(decoded) == 6 and all("kind1" in p or "kind2" in p for p in decoded)


def test_a_path_may_have_a_colon(sources, tmp_path, monkeypatch):
    odd = tmp_path / "run:lr=0.1"
    (tmp_path / "tree").rename(odd)
    assert len(load(str(odd)).class_names) == CLASSES
    assert load(f"{odd}:classes=0-1").class_names == ("kind0", "kind1")
    monkeypatch.chdir(tmp_path)
    odd.rename("C:")
    assert len(load("C:").class_names) == CLASSES
    assert len(load("C:/../C::classes=0-1").class_names) == 2


@pytest.mark.parametrize("per_class", [1, 2, 3, 4, 7, 50])
def test_images_are_taken_evenly(per_class):
    rng = np.random.default_rng(per_class)
    labels = rng.integers(0, 4, 60)
    rows, renumbered = Subset().rows(torch.from_numpy(labels), [0, 1, 3], per_class)
    assert (rows.tolist(), renumbered.tolist()) == expected(labels, [0, 1, 3], per_class)


@pytest.mark.parametrize("text", ["0-9", "3", "0+2+4", "0-1+5+7-9"])
def test_a_part_is_written_as_it_is_read(text):
    assert str(Subset.of_options({"classes": text})) == f"classes={text}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": "0-9"}, r"classes is '0-9', but .* has the classes 0 to 5"),
        ({"classes": "3"}, "classes is '3', one class of .*; take at least 2"),
        ({"classes": 3}, "classes is '3', one class of"),
        ({"classes": "3-1"}, "classes is '3-1'; give class numbers"),
        ({"classes": ""}, "classes is ''; give class numbers"),
        ({"classes": "0;1"}, "classes is '0;1'; give class numbers from 0 on, each once"),
        ({"classes": "0-3+2"}, "names a class twice"),
        ({"classes": [0, -1]}, r"classes is \[0, -1\]; give class numbers"),
        ({"classes": []}, r"classes is \[\]; give class numbers"),
        ({"classes": [True, False]}, "give class numbers"),
        ({"classes": 1.5}, r"classes is \[?1\.5\]?; give class numbers"),
        ({"train_per_class": 0}, "train_per_class is 0; give a whole number from 1 on"),
        ({"test_per_class": "2"}, "test_per_class is '2'; give a whole number"),
    ],
)
@pytest.mark.parametrize("kind", ["arrays", "folder"])
def test_bad_parts_are_one_sentence(sources, kind, options, words):
    with pytest.raises(DataError, match=words) as caught:
        load(sources[kind], **options)
    assert "\n" not in str(caught.value)


def test_bad_written_parts_are_one_sentence_in_examples_too(sources):
    for written, words in (
        ("classes=7", "classes is '7', but"),
        ("size=3", "has no option 'size'"),
        ("train_per_class=x", "write options as in"),
    ):
        with pytest.raises(DataError, match=words):
            load_examples(f"{sources['npz']}:{written}")


def test_names_of_files_go_with_their_images():
    both = Examples(ImageStore.from_batch(X), torch.from_numpy(Y))
    files = tuple(f"{label}/{k}.png" for k, label in enumerate(Y))
    data = Dataset("d", both, both, tuple(NAMES), train_files=files)
    part = Subset((1, 4), train_per_class=2).of(data)
    rows, _ = expected(Y, [1, 4], 2)
    assert part.train_files == tuple(files[k] for k in rows)
    with pytest.raises(FastcilError, match="train_files has 3 names for 27 images"):
        dataclasses.replace(data, train_files=files[:3])
