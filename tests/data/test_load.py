"""The dispatch: which reader takes a source, with which options, and what is said otherwise."""

import tarfile

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fastcil.data.load import load
from fastcil.data.load_examples import load_examples
from fastcil.data.places import resolve
from fastcil.errors import DataError, FastcilError

X = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
Y = np.array([0, 1, 0, 1])


@pytest.fixture
def home(tmp_path, monkeypatch):
    """FASTCIL_DATA with one source of each kind: pets, pets.tar, pets.npz."""
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            for i in np.flatnonzero(np.equal(Y, label)):
                cv2.imwrite(str(folder / f"{i}.png"), X[i, ..., ::-1])
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(tmp_path / "pets", "pets")
    np.savez(tmp_path / "pets.npz", x_train=X, y_train=Y, x_test=X, y_test=Y)
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def by_class(examples):
    order = examples.labels.argsort(stable=True)
    return [examples.images.image(int(i)).numpy().tolist() for i in order]


EXPECTED = X[[0, 2, 1, 3]].tolist()


@pytest.mark.parametrize("source", ["pets", "pets.tar", "pets.npz"])
def test_names_are_looked_up_under_fastcil_data(home, source):
    for given in (source, home / source):
        data = load(given)
        assert data.name == "pets" and len(data.class_names) == 2
        assert by_class(data.train) == by_class(data.test) == EXPECTED


def test_arrays_tensors_and_torch_data_sets(home):
    t, y = torch.from_numpy(X), torch.from_numpy(Y)
    items = TensorDataset(t.permute(0, 3, 1, 2), y)
    pair_list = [(x, int(label)) for x, label in zip(X, Y, strict=True)]
    for source in (((X, Y), (X, Y)), ((t, y), (t, y)), (items, items), (pair_list, pair_list)):
        data = load(source, class_names=["a", "b"])
        assert data.class_names == ("a", "b") and by_class(data.train) == EXPECTED


def test_a_dataset_passes_through():
    data = load(((X, Y), (X, Y)))
    assert load(data) is data


def test_scenes_take_their_options():
    data = load("scenes", classes=3, size=40, train_per_class=2, test_per_class=1, seed=5)
    assert len(data.train) == 6 and data.train.images.sizes.unique().tolist() == [40]


def test_cifar_is_recognised_by_name_and_by_path(home):
    for name in ("cifar10", "cifar100"):
        with pytest.raises(DataError, match="download=True"):
            load(name)
    (home / "sets").mkdir()
    archive = home / "sets" / "cifar-10-binary.tar.gz"
    archive.write_bytes(b"not it")
    for source in ("sets", archive):
        with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz has MD5"):
            load(source)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("scenes", {"clases": 3}, "scenes has no option 'clases'; it takes classes, size"),
        (
            "cifar10",
            {"size": 3},
            "cifar10 has no option 'size'; it takes classes, train_per_class, test_per_class",
        ),
        ("pets.npz:size=8", {}, "has no option 'size'; it takes class_names, classes, train_per"),
        ("pets:classes=0-1,train_per_class=few", {}, "write options as in 'cifar100:classes=0-49"),
        ("pets:classes=0-1,", {}, "write options as in 'cifar100:classes=0-49"),
        ("scenes:classes=0-3", {}, "write whole numbers, as in 'scenes:classes=8"),
        ("nowhere:classes=0-1", {}, r"nowhere does not exist"),
        ("pets:lr=0.1/x", {}, r"pets:lr=0.1/x does not exist"),
        ("C:/pets", {}, r"C:/pets does not exist"),
        ("pets", {"class_names": ["a"]}, "pets has no option 'class_names'"),
        ("pets.npz", {"size": 8}, "pets.npz has no option 'size'; it takes class_names"),
        ("nowhere", {}, r"nowhere does not exist \(FASTCIL_DATA is .*\); give the path"),
        ("text.txt", {}, "text.txt is neither a folder nor a .tar nor a .npz"),
        ("text.tar.gz", {}, "text.tar.gz cannot be read as a tar archive"),
        (3, {}, "source is a int; give a path"),
        (X, {}, "source is a ndarray"),
        ((X, Y, X, Y), {}, r"source is a tuple of 4 \(ndarray, ndarray, ndarray, ndarray\)"),
        ((X, Y), {}, r"source is a tuple of 2 \(ndarray, ndarray\)"),
        (None, {}, "source is a NoneType"),
    ],
)
def test_bad_sources_are_one_sentence(home, source, options, words):
    (home / "text.txt").write_text("hello")
    (home / "text.tar.gz").write_text("hello")
    with pytest.raises(DataError, match=words) as caught:
        load(source, **options)
    assert isinstance(caught.value, FastcilError) and "\n" not in str(caught.value)


def test_skip_bad_reaches_every_reader(home):
    (home / "pets" / "train" / "cat" / "broken.jpg").write_bytes(b"no image")
    items = [(X[0], 0), (X[1], 1), (X[2], "?")]
    y = np.array([0, 1, -1, 1])
    np.savez(home / "y.npz", x_train=X, y_train=y, x_test=X, y_test=Y)
    for source, count in (
        ("pets", 1),
        ((items, items), 2),
        (((X, y), (X, Y)), 1),
        ("y.npz", 1),
    ):
        with pytest.warns(UserWarning, match=f"{count} left out, the first: ") as told:
            data = load(source, skip_bad=True)
        assert len(data.skipped) == count and len(told) == 1 and told[0].filename == __file__
        assert load(data).skipped == data.skipped, "and it is told once"


def test_resolve_prefers_what_exists(home, tmp_path, monkeypatch):
    assert resolve("pets.tar") == home / "pets.tar"
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "pets.tar").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert str(resolve("pets.tar")) == "pets.tar"
    assert resolve("pets.npz") == home / "pets.npz"
    (home / "home").mkdir()
    assert resolve("~") == home / "home"
    with pytest.raises(DataError, match="FASTCIL_DATA is not set"):
        monkeypatch.delenv("FASTCIL_DATA")
        resolve("pets.npz")
    with pytest.raises(DataError, match=r"/pets\.npz does not exist"):
        resolve("/pets.npz")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda home: "pets", ("cat", "dog")),
        (lambda home: home / "pets" / "train", ("cat", "dog")),
        (lambda home: "pets.tar", ("cat", "dog")),
        (lambda home: "pets.npz", ("0", "1")),
        (lambda home: (X, Y), ("0", "1")),
        (lambda home: (list(X), Y + 7), ("7", "8")),
        (lambda home: (torch.from_numpy(X), torch.from_numpy(Y), ["a", "b"]), ("a", "b")),
        (lambda home: {"a": X[Y == 0], "b": list(X[Y == 1])}, ("a", "b")),
        (lambda home: TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), ("0", "1")),
        (lambda home: [(x, int(y)) for x, y in zip(X, Y, strict=True)], ("0", "1")),
        (lambda home: load(((X, Y), (X[:2], Y[:2]))), ("0", "1")),
    ],
    ids=[
        "folder",
        "train",
        "tar",
        "npz",
        "arrays",
        "list",
        "named",
        "dict",
        "data",
        "items",
        "Dataset",
    ],
)
def test_examples_of_every_source(home, make, names):
    examples, found = load_examples(make(home))
    assert found == names and by_class(examples) == EXPECTED
    assert examples.labels.dtype == torch.int64


def test_examples_of_scenes_are_the_training_part():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastcil.data.scenes.make_scenes", lambda: load(((X, Y), (X, Y))))
        assert len(load_examples("scenes")[0]) == 4


def test_an_npz_for_learning_needs_no_test_part(home):
    np.savez(home / "new.npz", x_train=X, y_train=Y, class_names=np.array(["a", "b"]))
    assert load_examples("new.npz")[1] == ("a", "b")


def test_examples_left_out_are_counted_in_a_warning(home):
    (home / "pets" / "train" / "cat" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg does not decode"):
        load_examples("pets")
    with pytest.warns(UserWarning, match=r"1 left out, the first: .*broken\.jpg"):
        examples, _ = load_examples("pets", skip_bad=True)
    assert len(examples) == 4


@pytest.mark.parametrize("source", [3, None, X, (X,), ((X, Y), (X, Y), (X, Y), 1)])
def test_bad_examples_say_what_would_do(source):
    with pytest.raises(DataError, match=r"give a path, \(x, y\)"):
        load_examples(source)
