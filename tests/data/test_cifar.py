"""CIFAR archives made here in the original binary format, with a few records per file."""

import dataclasses
import hashlib
import io
import tarfile

import numpy as np
import pytest

from fastcil.data import cifar
from fastcil.errors import DataError

LAYOUT = {  # file -> records; names; label bytes
    "cifar10": (
        {**{f"data_batch_{i}.bin": 4 for i in range(1, 6)}, "test_batch.bin": 20},
        [f"thing{i}" for i in range(10)],
        1,
    ),
    "cifar100": ({"train.bin": 200, "test.bin": 100}, [f"thing{i:02}" for i in range(100)], 2),
}


class Published:
    """One archive on disk, and what its images and labels are."""

    def __init__(self, name, folder, change=None):
        self.name, self.archive = name, cifar.ARCHIVES[name]
        records, names, label_bytes = LAYOUT[name]
        rng = np.random.default_rng(0)
        self.images, self.labels, files = {}, {}, {}
        for file, count in records.items():
            x = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            y = (np.arange(count) + sum(map(len, self.labels.values()))) % len(names)
            coarse = np.full((count, label_bytes - 1), 99, np.uint8)
            planes = np.concatenate([x[..., c].reshape(count, 1024) for c in range(3)], 1)
            rows = np.concatenate([coarse, y[:, None].astype(np.uint8), planes], 1)
            files[file] = rows.tobytes()
            self.images[file], self.labels[file] = x, y
        files[self.archive.names] = ("\n".join(names) + "\n\n").encode()
        files["readme.html"] = b"<html>"
        if change is not None:
            change(files)
        self.files, self.names = files, tuple(names)
        self.path = folder / self.archive.file
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(self.path, "w:gz") as tar:
            directory = tarfile.TarInfo(self.archive.folder)
            directory.type = tarfile.DIRTYPE
            tar.addfile(directory)
            for file, data in files.items():
                member = tarfile.TarInfo(f"{self.archive.folder}/{file}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    def publish(self, monkeypatch, url=None):
        archive = dataclasses.replace(
            self.archive,
            md5=hashlib.md5(self.path.read_bytes()).hexdigest(),
            records=LAYOUT[self.name][0],
            url=url or self.archive.url,
        )
        monkeypatch.setitem(cifar.ARCHIVES, self.name, archive)

    def unpack(self, folder):
        for file, data in self.files.items():
            path = folder / self.archive.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def check(self, data):
        assert data.name == self.name and data.class_names == self.names
        for part, files in ((data.train, self.archive.train), (data.test, (self.archive.test,))):
            x = np.concatenate([self.images[f] for f in files])
            y = np.concatenate([self.labels[f] for f in files])
            assert np.array_equal(part.images.pixels.numpy().reshape(-1, 32, 32, 3), x)
            assert np.array_equal(part.labels.numpy(), y)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "data", tmp_path / "home" / ".cache" / "fastcil"


both = pytest.mark.parametrize("name", ["cifar10", "cifar100"])


@both
@pytest.mark.parametrize("place", [0, 1], ids=["FASTCIL_DATA", "cache"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_found_as_archive_or_folder_in_either_place(name, place, unpacked, places, monkeypatch):
    published = Published(name, places[place])
    published.publish(monkeypatch)
    if unpacked:
        published.unpack(places[place])
        published.path.unlink()
    published.check(cifar.load_cifar(name))


@both
def test_read_from_a_path_or_the_folder_around_it(name, tmp_path, monkeypatch):
    published = Published(name, tmp_path / "here")
    published.publish(monkeypatch)
    for path in (published.path, tmp_path / "here"):
        assert cifar.find_cifar(path) == name
        published.check(cifar.load_cifar(name, path=path))
    published.unpack(tmp_path / "there")
    for path in (tmp_path / "there", tmp_path / "there" / published.archive.folder):
        assert cifar.find_cifar(path) == name
        published.check(cifar.load_cifar(name, path=path))


def test_checksums_are_the_published_ones():
    assert cifar.ARCHIVES["cifar10"].md5 == "c32a1d4ab5d03f1284b67883e8d87530"
    assert cifar.ARCHIVES["cifar100"].md5 == "03b5dce01913d631647c71ecec9e9cb8"
    for archive in cifar.ARCHIVES.values():
        assert archive.url.startswith("https://www.cs.toronto.edu/~kriz/")
        assert sum(archive.records.values()) == 60000


def test_missing_archive_says_where_and_how(places, monkeypatch):
    with pytest.raises(DataError) as caught:
        cifar.load_cifar("cifar100")
    for words in (*map(str, places), "FASTCIL_DATA is", "download=True", "cifar-100-binary.tar.gz"):
        assert words in str(caught.value)
    monkeypatch.delenv("FASTCIL_DATA")
    with pytest.raises(DataError, match="FASTCIL_DATA is not set"):
        cifar.load_cifar("cifar100")


def test_download_is_checked_and_atomic(places, tmp_path, monkeypatch):
    published = Published("cifar100", tmp_path / "web")
    url = published.path.as_uri()
    published.publish(monkeypatch, url)
    published.check(cifar.load_cifar("cifar100", download=True))
    assert [p.name for p in places[1].iterdir()] == ["cifar-100-binary.tar.gz"]
    published.path.unlink()
    published.check(cifar.load_cifar("cifar100", download=True))  # from the cache


@pytest.mark.parametrize("fault", ["damaged", "absent"])
def test_a_download_that_fails_leaves_nothing(fault, places, tmp_path, monkeypatch):
    published = Published("cifar10", tmp_path / "web")
    published.publish(monkeypatch, published.path.as_uri())
    if fault == "damaged":
        published.path.write_bytes(published.path.read_bytes()[:-100])
        words = "gave a file with MD5"
    else:
        published.path.unlink()
        words = "cannot be fetched"
    with pytest.raises(DataError, match=words):
        cifar.load_cifar("cifar10", download=True)
    assert list(places[1].iterdir()) == []


@both
def test_a_damaged_archive_is_refused_by_its_checksum(name, places, monkeypatch):
    published = Published(name, places[0])
    published.publish(monkeypatch)
    published.path.write_bytes(published.path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"has MD5 .* was published: it is cut short or changed"):
        cifar.load_cifar(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.pop("train.bin"), "lacks train.bin"),
        (lambda f: f.update({"test.bin": f["test.bin"][:-1]}), "test.bin has 307399 bytes instead"),
        (lambda f: f.update({"test.bin": f["test.bin"][:-3074]}), "instead of 307400"),
        (lambda f: f.update({"fine_label_names.txt": b"a\nb\n"}), "is 2, out of range"),
        (lambda f: f.update({"fine_label_names.txt": b"\xff"}), "is not text"),
    ],
)
@pytest.mark.parametrize("unpacked", [False, True])
def test_incomplete_content_is_refused(change, words, unpacked, places, monkeypatch):
    published = Published("cifar100", places[0], change)
    published.publish(monkeypatch)
    if unpacked:
        published.unpack(places[0])
        published.path.unlink()
    with pytest.raises(DataError, match=words):
        cifar.load_cifar("cifar100")


def test_a_folder_with_both_is_ambiguous(tmp_path):
    Published("cifar10", tmp_path)
    Published("cifar100", tmp_path)
    with pytest.raises(DataError, match="holds both cifar10 and cifar100"):
        cifar.find_cifar(tmp_path)
    assert cifar.find_cifar(tmp_path / "cifar-10-binary.tar.gz") == "cifar10"
