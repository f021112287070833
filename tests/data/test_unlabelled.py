"""Images without labels: trees of any shape, archives, limits, what can't be used."""

from __future__ import annotations

import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fastcil.data import Examples, ImageStore
from fastcil.data.unlabelled import load_images
from fastcil.errors import DataError

# Files of several depths, whose grey tells which they are.
TREE = {"b.png": 1, "a/x.png": 2, "a/deep/y.png": 3, "train2017/000.png": 4, "z/notes.txt": None}
SORTED = [3, 2, 1, 4]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name, grey in TREE.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if grey is None:
            file.write_text("no image")
        else:
            cv2.imwrite(str(file), np.full((4 + grey, 9, 3), grey, np.uint8))
    return root


def greys(examples: Examples) -> list[int]:
    assert not examples.labels.any() and examples.labels.dtype == torch.int64
    return [int(examples.images.image(k)[0, 0, 0]) for k in range(len(examples))]


def test_every_image_of_a_tree_is_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert greys(load_images(tree)) == SORTED
    assert load_images(str(tree)).images.sizes[0].tolist() == [7, 9]
    monkeypatch.setenv("FASTCIL_DATA", str(tree.parent))
    assert len(load_images("photos")) == 4


def test_an_archive_is_read_like_its_tree(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(tree, arcname="photos")
    assert greys(load_images(path)) == greys(load_images(tree))


@pytest.mark.parametrize(("limit", "places"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (9, None)])
def test_a_limit_takes_images_evenly(tree: Path, limit: int, places: list[int] | None) -> None:
    expected = SORTED if places is None else [SORTED[k] for k in places]
    assert greys(load_images(tree, limit=limit)) == expected
    images = ImageStore.from_batch(
        torch.tensor(SORTED, dtype=torch.uint8)[:, None, None, None].expand(4, 5, 5, 3).contiguous()
    )
    assert greys(load_images(images, limit=limit)) == expected
    labelled = Examples(images, torch.arange(4))
    assert greys(load_images(labelled, limit=limit)) == expected


def test_of_parts_for_training_and_test_one_learns_from_the_former(tree: Path) -> None:
    (tree / "train2017").rename(tree / "train")
    assert greys(load_images(tree)) == SORTED
    (tree / "a").rename(tree / "test")
    assert greys(load_images(tree)) == [4]


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        (["train2017/a", "val2017/b", "test2017/c"], ["train2017/a"]),
        (["train/a", "val/b", "train/deep/c"], ["train/a", "train/deep/c"]),
        (["Training/a", "validation/b"], ["Training/a"]),
        (["train-set/a", "test_set/b", "valid/c"], ["train-set/a"]),
        (["images/train2017/a", "images/val2017/b", "c"], ["c", "images/train2017/a"]),
        (["train/x/a", "val/x/b", "celeba/train/male/c", "celeba/val/male/d"], ["train/x/a"]),
        (["coco/train2017/a", "coco/val2017/b", "more/d"], ["coco/train2017/a", "more/d"]),
        # No part of the other kind lies beside it, or what looks like one is a file.
        (["train2017/a", "photos/val2017/b"], ["photos/val2017/b", "train2017/a"]),
        (["train/a", "trains/b", "contest/c"], ["contest/c", "train/a", "trains/b"]),
        (["val/a", "test/b"], ["test/b", "val/a"]),
        (["train/a", "test"], ["test", "train/a"]),
    ],
)
def test_parts_for_training_go_by_their_names(
    tmp_path: Path, files: list[str], kept: list[str]
) -> None:
    for number, name in enumerate(files):
        file = tmp_path / "in" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.full((4, 5, 3), number, np.uint8))
    assert greys(load_images(tmp_path / "in")) == [files.index(name) for name in kept]


def test_labelled_sources_lose_their_labels() -> None:
    assert len(load_images("scenes:classes=2,size=32,train_per_class=3,test_per_class=1")) == 6
    pair = (np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))
    assert greys(load_images(pair)) == [0, 0, 0]


def test_what_cannot_be_used_is_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image; give a folder or a tar"):
        load_images(tmp_path / "empty")
    with pytest.raises(DataError, match="limit is 0"):
        load_images(tree, limit=0)
    with pytest.raises(DataError, match="nowhere"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no image that can be read"):
        load_images(ImageStore.empty())
    (tree / "a" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.jpg does not decode"):
        load_images(tree)
    with pytest.warns(UserWarning, match="1 left out"):
        assert greys(load_images(tree, skip_bad=True)) == SORTED
