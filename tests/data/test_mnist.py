"""MNIST's idx files written here, and Keras's mnist.npz."""

import gzip
import struct

import numpy as np
import pytest

from fastcil.data import load, load_examples
from fastcil.errors import DataError

RNG = np.random.default_rng(0)
Y = {"train": np.tile(np.arange(10), 3).astype(np.uint8), "t10k": np.arange(10, dtype=np.uint8)}
X = {part: RNG.integers(0, 256, (len(y), 28, 28), dtype=np.uint8) for part, y in Y.items()}


def idx(array):
    head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.tobytes()


def write(folder, dot=False, zipped=False, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    mark = "." if dot else "-"
    for part in X:
        for kind, array in ((f"images{mark}idx3", X[part]), (f"labels{mark}idx1", Y[part])):
            data = changes.get(f"{part}_{kind[:6]}", idx(array))
            if data is None:
                continue
            name = folder / f"{part}-{kind}-ubyte{'.gz' if zipped else ''}"
            name.write_bytes(gzip.compress(data) if zipped else data)
    return folder


def check(data):
    assert data.class_names == tuple("0123456789")
    for part, examples in (("train", data.train), ("t10k", data.test)):
        assert examples.labels.tolist() == Y[part].tolist()
        images = np.stack([examples.images.image(i).numpy() for i in range(len(examples))])
        np.testing.assert_array_equal(images, np.repeat(X[part][..., None], 3, -1))


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
def test_the_four_files_are_read(tmp_path, dot, zipped, below):
    write(tmp_path / "digits" / below, dot, zipped)
    data = load(tmp_path / "digits")
    check(data)
    assert data.name == "digits"


def test_keras_file_is_read(tmp_path):
    np.savez(
        tmp_path / "mnist.npz",
        **{
            f"{k}_{'train' if p == 'train' else 'test'}": a[p]
            for k, a in (("x", X), ("y", Y))
            for p in X
        },
    )
    check(load(tmp_path / "mnist.npz"))


def test_a_part_and_examples(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    write(tmp_path / "mnist")
    data = load("mnist:classes=7+9,train_per_class=2")
    assert data.class_names == ("7", "9") and len(data.train) == 4 and len(data.test) == 2
    examples, names = load_examples("mnist:classes=3")
    assert names == ("3",) and len(examples) == 3 and set(examples.labels.tolist()) == {0}
    assert len(load_examples("mnist")[0]) == 30


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"t10k_labels": None}, "has no t10k-labels-idx1-ubyte; put MNIST's four files there"),
        ({"train_images": b""}, "train-images-idx3-ubyte is no idx file of uint8 with 3 axes"),
        ({"train_images": idx(Y["train"])}, "is no idx file of uint8 with 3 axes"),
        ({"train_labels": b"\0\0\x0d\1" + bytes(99)}, "is no idx file of uint8 with 1 axes"),
        ({"train_images": idx(X["train"])[:-1]}, "has 23519 values instead of 23520, for 30 x 28"),
        ({"train_labels": idx(Y["t10k"])}, r"y_train of .* has shape \[10\] for the 30 images"),
        ({"t10k_labels": idx(Y["t10k"] % 9)}, "class '9' has no image in test"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_files_are_one_sentence(tmp_path, changes, words, zipped):
    write(tmp_path / "mnist", zipped=zipped, **changes)
    with pytest.raises(DataError, match=words.replace("ubyte is", r"ubyte(\.gz)? is")) as caught:
        load(tmp_path / "mnist")
    assert "\n" not in str(caught.value)


def test_a_damaged_gzip_is_one_sentence(tmp_path):
    write(tmp_path / "mnist", zipped=True)
    for name, change in (("train-labels", lambda d: d[:-9]), ("train-images", lambda d: b"x" + d)):
        file = next((tmp_path / "mnist").glob(f"{name}*"))
        file.write_bytes(change(file.read_bytes()))
        with pytest.raises(DataError, match=rf"{name}.*cannot be read to its end"):
            load(tmp_path / "mnist")
