"""Arrays, tensors, `.npz` files, Pillow images and torch data sets."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fastcil.data.arrays import examples_of_arrays, examples_of_dict, load_arrays, load_npz
from fastcil.data.convert import image_array, image_store, label_tensor
from fastcil.data.store import ImageStore
from fastcil.data.torch_datasets import load_torch_datasets
from fastcil.errors import DataError

X = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2])
GREY = X[..., 0]


def pixels(store, i=None):
    if i is None:
        return np.stack([store.image(k).numpy() for k in range(len(store))])
    return store.image(i).numpy()


def grey(x):
    return np.repeat(x[..., None], 3, -1)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, X),
        (torch.from_numpy(X), X),
        (torch.from_numpy(X).permute(0, 3, 1, 2), X),
        (X.transpose(0, 3, 1, 2), X),
        (X[:, ::-1], X[:, ::-1]),
        (GREY, grey(GREY)),
        (GREY[..., None], grey(GREY)),
        (torch.from_numpy(GREY)[:, None], grey(GREY)),
        (list(X), X),
        (tuple(torch.from_numpy(X)), X),
        ([x.transpose(2, 0, 1) for x in X], X),
        ([Image.fromarray(x) for x in X], X),
        (np.array([*map(Image.fromarray, X), None], dtype=object)[:-1], X),
        (torch.from_numpy(X)[:, :3, :3].permute(0, 3, 1, 2), X[:, :3, :3]),
    ],
)
def test_batches_of_every_layout(batch, expected):
    store = image_store(batch, "x")
    assert np.array_equal(pixels(store), expected)


def test_lists_keep_their_sizes():
    store = image_store([X[0], X[1, :3], GREY[2]], "x")
    assert store.sizes.tolist() == [[5, 4], [3, 4], [5, 4]]
    assert np.array_equal(pixels(store, 1), X[1, :3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_scaled_and_rounded(dtype):
    values = torch.tensor([[0.0, 1.0, 0.5, 0.25]], dtype=dtype)
    image = image_array(values.expand(3, 2, 4), "x")
    assert image[0, :, 0].tolist() == [0, 255, 128, 64]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY[0]), grey(GREY[0])),
        (Image.fromarray(X[0]).convert("RGBA"), X[0]),
        (Image.fromarray(X[0]).quantize(20), X[0]),
        (Image.fromarray(GREY[0].astype(np.uint16) * 257), grey(GREY[0])),
    ],
)
def test_pillow_images_become_rgb(image, expected):
    assert np.array_equal(image_array(image, "x"), expected)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (X[0].astype(np.int32), "x has dtype int32; give uint8"),
        (X[0].astype(np.float32), "x holds floats from 0 to 255|x holds floats from"),
        (np.full((4, 4, 3), np.nan), "x holds floats from nan to nan"),
        (torch.randn(3, 4, 4), "x holds floats from -"),
        (np.zeros((4, 4, 2), np.uint8), r"x has shape \[4, 4, 2\]"),
        (np.zeros(4, np.uint8), r"x has shape \[4\]"),
        (np.zeros((0, 4, 3), np.uint8), "x is 0 x 4 pixels"),
        (np.zeros((32768, 1, 3), np.uint8), "x is 32768 x 1 pixels"),
        (Image.new("F", (3, 3)), "mode 'F'"),
        ("cat.jpg", "x is a str"),
    ],
)
def test_bad_images_are_named(image, words):
    with pytest.raises(DataError, match=words):
        image_array(image, "x")


COLUMN = np.array([[0], [1], [2]], np.uint8)


@pytest.mark.parametrize("labels", [[0, 1, 2], COLUMN, torch.arange(3)])
def test_labels_of_every_kind(labels):
    assert torch.equal(label_tensor(labels, 3, "y", "x"), torch.arange(3))


def test_names_default_to_numbers():
    data = load_arrays((X, Y), (X, Y))
    assert data.class_names == ("0", "1", "2") and data.name == "arrays"
    assert np.array_equal(pixels(data.test.images), X)
    assert data.train.labels.tolist() == Y.tolist()


@pytest.mark.parametrize(
    ("train", "test", "names", "words"),
    [
        ((X, Y[:5]), (X, Y), None, r"y_train of arrays has shape \[5\] for the 6 images"),
        ((X, Y), (X, Y.astype(float)), None, "y_test of arrays has dtype float64; labels are int"),
        ((X, Y > 0), (X, Y), None, "y_train of arrays has dtype bool"),
        ((X, list("abcabc")), (X, Y), None, "y_train of arrays has dtype <U1"),
        (
            (X.astype(np.float32), Y),
            (X, Y),
            None,
            "x_train of arrays has dtype float32",
        ),
        ((X[:0], Y[:0]), (X, Y), None, "x_train of arrays holds no image"),
        ((X[..., :2], Y), (X, Y), None, r"x_train of arrays has shape \[6, 5, 4, 2\]"),
        ((X, Y - 1), (X, Y), None, r"y_train of arrays\[0\] is -1, out of range"),
        (
            (X, Y),
            (X, Y),
            ["a", "b"],
            r"y_train of arrays\[2\] is 2, .*labels are 0 to 1",
        ),
        ((X, Y), (X, Y), ["a", "b", "c", "d"], "class 'd' has no image in train or test"),
        ((X, Y), (X, Y), ["a", "b", "a"], "class name 'a' occurs twice"),
        ((X, Y), (X, Y), ["a", "b", 3], "class name 3 is not a string"),
        ((X, Y), (X[:5], Y[:5] % 2), None, "class '2' has no image in test"),
        ((X, Y % 2), (X, Y), None, "class '2' has no image in train"),
        ((X, Y * 10**12), (X, Y), None, "has no label 3 but has label 1000000000000"),
        ((X, Y * 0), (X, Y * 0), None, "at least 2 are needed"),
        (("x", Y), (X, Y), None, r"x_train of arrays\[0\] is a str"),
        ((3, Y), (X, Y), None, "x_train of arrays is a int"),
    ],
)
def test_arrays_that_do_not_hold_together(train, test, names, words):
    with pytest.raises(DataError, match=words):
        load_arrays(train, test, class_names=names)


def test_skip_bad_leaves_rows_and_classes_out_and_lists_them():
    y = np.array([0, 1, 3, 0, -7, 3])
    test = (X, np.array([0, 0, 3, 3, 9, 9]))
    data = load_arrays((X, y), test, class_names=list("abcd"), skip_bad=True)
    assert data.class_names == ("a", "d")
    assert data.train.labels.tolist() == [0, 1, 0, 1] and data.test.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(pixels(data.train.images), X[[0, 2, 3, 5]])
    assert len(data.skipped) == 5  # labels -7, 9 and 9, classes b and c


def save(path, **arrays):
    content = {"x_train": X, "y_train": Y, "x_test": X[:3], "y_test": Y[:3], **arrays}
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


def test_npz_is_named_after_its_file_and_may_name_its_classes(tmp_path):
    data = load_npz(save(tmp_path / "tiny.npz"))
    assert data.name == "tiny" and data.class_names == ("0", "1", "2")
    assert np.array_equal(pixels(data.train.images), X)
    named = save(tmp_path / "named.npz", class_names=np.array(["a", "b", "c"]))
    assert load_npz(named).class_names == ("a", "b", "c")
    assert load_npz(named, class_names=["d", "e", "f"]).class_names == ("d", "e", "f")


def test_npz_of_grey_images_and_compressed(tmp_path):
    np.savez_compressed(tmp_path / "g.npz", x_train=GREY, y_train=Y, x_test=GREY, y_test=Y)
    assert np.array_equal(pixels(load_npz(tmp_path / "g.npz").train.images), grey(GREY))


class Trap:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("an object of the file was unpickled",)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y_test": None}, r"bad\.npz has no array y_test; it has x_train, y_train, x_test"),
        ({"y_train": np.array([Trap()] * 6)}, "array y_train is not plain numbers"),
        ({"class_names": np.array([Trap()] * 3)}, "array class_names is not plain numbers"),
        ({"x_train": X.astype(float)}, r"x_train of .*bad\.npz has dtype float64; give uint8"),
        ({"y_train": Y - 5}, r"y_train of .*bad\.npz\[0\] is -5, out of range"),
    ],
)
def test_bad_npz_is_named(tmp_path, arrays, words):
    path = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=words):
        load_npz(path)


def test_npz_that_is_cut_or_damaged_or_none(tmp_path):
    whole = save(tmp_path / "a.npz").read_bytes()
    for content in (whole[:-40], b"", b"text", np.zeros(3).tobytes()):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"not a \.npz file or is cut short"):
            load_npz(tmp_path / "a.npz")
    changed = bytearray(whole)
    changed[whole.index(X.tobytes()[:30])] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(changed)
    with pytest.raises(DataError, match="array x_train is damaged"):
        load_npz(tmp_path / "a.npz")


class Items(torch.utils.data.Dataset):
    """A map-style data set of given items, with torchvision's attribute of names."""

    def __init__(self, items, classes=None):
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


@pytest.mark.parametrize(
    "convert",
    [
        Image.fromarray,
        lambda x: x,
        lambda x: x.transpose(2, 0, 1),
        torch.from_numpy,
        lambda x: torch.from_numpy(x).permute(2, 0, 1),
        lambda x: torch.from_numpy(x).permute(2, 0, 1) / 255,
    ],
    ids=["pillow", "array", "CHW array", "tensor", "CHW tensor", "float tensor"],
)
def test_torch_data_sets_of_every_kind_of_image(convert):
    labels = (0, np.int64(1), torch.tensor(2), np.array(0), 1, 2)
    items = Items([(convert(x), y) for x, y in zip(X, labels, strict=True)], ["a", "b", "c"])
    data = load_torch_datasets(items, items)
    assert data.class_names == ("a", "b", "c") and data.name == "items"
    assert data.train.labels.tolist() == Y.tolist()
    assert np.array_equal(pixels(data.train.images), X)


def test_tensor_dataset_and_given_names():
    data = TensorDataset(torch.from_numpy(X).permute(0, 3, 1, 2), torch.from_numpy(Y))
    loaded = load_torch_datasets(data, data, class_names=["x", "y", "z"])
    assert loaded.class_names == ("x", "y", "z")
    assert np.array_equal(pixels(loaded.test.images), X)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (OSError("truncated file"), r"\[1\] cannot be read: OSError: truncated file"),
        (X[0], r"\[1\] is a ndarray; it must be \(image, label\)"),
        ((X[0], 0.5), r"\[1\] has the label 0.5"),
        ((X[0], True), r"\[1\] has the label True"),
        ((X[0], "cat"), r"\[1\] has the label 'cat'"),
        ((X[0].astype(int), 0), r"\[1\] has dtype int64"),
        ((X[0], -1), r"labels of the train data set\[1\] is -1, out of range"),
    ],
)
def test_bad_items_are_named_or_listed(item, words):
    good = Items([(X[0], 0), (X[1], 1)])
    items = Items([(X[0], 0), item, (X[1], 1)])
    with pytest.raises(DataError, match=words):
        load_torch_datasets(items, good)
    data = load_torch_datasets(items, good, skip_bad=True)
    assert len(data.train) == 2 and len(data.skipped) == 1


def test_a_data_set_without_items_is_refused():
    with pytest.raises(DataError, match="the train data set holds no image"):
        load_torch_datasets(Items([]), Items([]))


def test_examples_without_names_take_the_labels_that_occur():
    examples, names = examples_of_arrays(X, [7, 5, 9, 7, 5, 9], None, False, [])
    assert names == ("5", "7", "9") and examples.labels.tolist() == [1, 0, 2, 1, 0, 2]
    assert np.array_equal(pixels(examples.images), X)


def test_examples_with_names():
    examples, names = examples_of_arrays(X, Y, ["a", "b", "c"], False, [])
    assert names == ("a", "b", "c") and examples.labels.tolist() == Y.tolist()
    with pytest.raises(DataError, match="class 'd' has no image in y; leave its name out"):
        examples_of_arrays(X, Y, list("abcd"), False, [])
    with pytest.raises(DataError, match=r"y\[2\] is 2, out of range"):
        examples_of_arrays(X, Y, ["a", "b"], False, [])
    skipped = []
    examples, _ = examples_of_arrays(X, Y, ["a", "b"], True, skipped)
    assert len(examples) == 4 and len(skipped) == 2
    with pytest.raises(DataError, match="no label in y is in range"):
        examples_of_arrays(X, Y - 9, None, True, [])


def test_examples_of_a_mapping_keep_its_order():
    examples, names = examples_of_dict({"zebra": X[:2], "ant": [X[2], X[3, :2]]})
    assert names == ("zebra", "ant") and examples.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(pixels(examples.images, 3), X[3, :2])
    for bad, words in (
        ({}, "is empty"),
        ({"a": []}, "class 'a' holds no image"),
        ({3: X}, "class name 3 is not a string"),
        ({"a": [X[0], "x"]}, r"class 'a'\[1\] is a str"),
    ):
        with pytest.raises(DataError, match=words):
            examples_of_dict(bad)


def test_stores_are_raw_image_stores():
    store = image_store(X, "x")
    assert isinstance(store, ImageStore)
    assert store.nbytes == X.nbytes + 24 * len(X)
