"""Downsampled ImageNet written here in its npz form, with a few images in each batch."""

import numpy as np
import pytest

from fastcil.data import imagenet32, load, load_examples
from fastcil.errors import DataError

RNG = np.random.default_rng(0)
CLASSES = 7


def images(count, side):
    return RNG.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def flat(x):
    """The published layout: the red plane of each image, then the green, then the blue."""
    return np.concatenate([x[..., c].reshape(len(x), -1) for c in range(3)], 1)


def write(folder, side=32, split=False, **changes):
    """Ten batches of 5 to 14 images and 14 validation images; labels from 1 on."""
    parts = {}
    for k in range(11):
        count = 14 if k == 0 else 4 + k
        name = f"train_data_batch_{k}" if k else "val_data"
        place = folder
        if split:
            place = folder / f"Imagenet{side}_{'train' if k else 'val'}"
        place.mkdir(parents=True, exist_ok=True)
        x, y = images(count, side), (np.arange(count) + k) % CLASSES
        parts[name] = x, y
        content = {"data": flat(x), "labels": y + 1, "mean": np.zeros(3 * side * side)}
        content.update(changes.get(name, {}))
        if content["data"] is not None:
            np.savez(place / f"{name}.npz", **content)
    return parts


def joined(parts):
    train = [parts[f"train_data_batch_{k}"] for k in range(1, 11)]
    return [np.concatenate(column) for column in zip(*train, strict=True)]


def same(examples, x, y):
    assert examples.labels.tolist() == list(y)
    found = np.stack([examples.images.image(i).numpy() for i in range(len(examples))])
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("side", [32, 8])
def test_all_batches_are_read_in_their_order(tmp_path, split, side):
    parts = write(tmp_path, side, split)
    data = load(tmp_path)
    assert data.name == f"imagenet{side}"
    assert data.class_names == tuple(str(k + 1) for k in range(CLASSES))
    same(data.train, *joined(parts))
    same(data.test, *parts["val_data"])


def test_a_part_reads_only_what_it_needs(tmp_path, monkeypatch):
    parts = write(tmp_path)
    x, y = joined(parts)
    data = load(f"{tmp_path}:classes=1+4-5,train_per_class=6,test_per_class=1")
    keep = [1, 4, 5]
    rows = []
    for c in keep:
        mine = np.flatnonzero(y == c)
        rows += [mine[i * len(mine) // 6] for i in range(6)]
    rows = sorted(rows)
    same(data.train, x[rows], [keep.index(c) for c in y[rows]])
    assert data.class_names == ("2", "5", "6") and len(data.test) == 3
    assert data.name == "imagenet32:classes=1+4-5,train_per_class=6,test_per_class=1"
    examples, names = load_examples(f"{tmp_path}:classes=6")
    same(examples, x[y == 6], [0] * int((y == 6).sum()))
    assert names == ("7",)

    read = []
    original = imagenet32.read_npz
    monkeypatch.setattr(
        imagenet32, "read_npz", lambda p, keys: read.append((p.name, *keys)) or original(p, keys)
    )
    load(tmp_path, train_per_class=1)
    pixels = {name for name, key in read if key == "data"}
    assert pixels == {"train_data_batch_1.npz", "train_data_batch_2.npz", "val_data.npz"}


@pytest.mark.parametrize("numbers", [list, lambda y: y.astype(np.uint16), lambda y: y[:, None]])
def test_labels_of_any_integer_form(tmp_path, numbers):
    write(tmp_path, val_data={"labels": numbers(np.arange(14) % CLASSES + 1)})
    assert load(tmp_path).test.labels.tolist() == [k % CLASSES for k in range(14)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_data_batch_4": {"data": None}}, "has no train_data_batch_4.npz, nor has a folder"),
        ({"val_data": {"data": None}}, "has no val_data.npz"),
        (
            {"val_data": {"labels": np.array([[1], [1, 2]], object)}},
            "val_data.npz: array labels is not plain numbers or strings but would need pickle",
        ),
        ({"val_data": {"labels": np.arange(14)}}, "val_data.npz are from 0 to 13; they must be"),
        ({"val_data": {"labels": np.arange(14) + 990}}, "from 990 to 1003; they must be from 1"),
        ({"val_data": {"labels": np.zeros(0, np.int64)}}, "are none; they must be from 1 to 1000"),
        ({"val_data": {"labels": np.ones(14)}}, "labels of .* has dtype float64"),
        ({"val_data": {"labels": np.ones(13, np.int64)}}, "has 14 images and 13 labels"),
        ({"val_data": {"labels": np.ones(14, np.int64)}}, "class '2' has no image in val"),
        ({"val_data": {"data": np.zeros((14, 3072))}}, "is float64 of shape"),
        ({"val_data": {"data": np.zeros((14, 3071), np.uint8)}}, r"uint8 of shape \[14, 3071\]"),
        (
            {"val_data": {"data": np.zeros((14, 32, 32, 3), np.uint8)}},
            r"must be uint8 \[n, 3 s s\]",
        ),
        (
            {"train_data_batch_3": {"data": np.zeros((7, 48), np.uint8)}},
            "holds images of 4 x 4 pixels, but train_data_batch_1.npz of 32 x 32",
        ),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, changes, words):
    write(tmp_path, **changes)
    with pytest.raises(DataError, match=words) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_not_read(tmp_path):
    (tmp_path / "train_data_batch_1").write_bytes(b"\x80\x04")
    with pytest.raises(DataError, match="as Python pickles, which could run code; get its npz"):
        load(tmp_path)
    (tmp_path / "train_data_batch_1").unlink()
    write(tmp_path)
    (tmp_path / "train_data_batch_9.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"train_data_batch_9\.npz is not a \.npz file or is cut"):
        load(tmp_path)


def test_a_class_without_validation_images_can_be_left_out(tmp_path):
    write(tmp_path, val_data={"labels": np.arange(14) % 6 + 1})
    with pytest.warns(UserWarning, match="1 left out, the first: .*class '7' has no image in val"):
        data = load(tmp_path, skip_bad=True)
    assert data.class_names == tuple("123456")
