"""Trees without classes, written once and mapped: what a learned codec is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
import torch
from photo_files import encoded, picture, write_tar, write_tree

from fastcil.cli import main
from fastcil.data import Examples, load_images
from fastcil.data.ingest import ingest
from fastcil.data.mapped import check_pixels
from fastcil.errors import DataError

COCO = {
    "train2017/000000000009.jpg": (1, 40, 64),
    "train2017/000000000025.jpg": (2, 64, 30),
    "train2017/000000000030.jpg": (3, 9, 11),
    "val2017/000000000139.jpg": (4, 20, 20),
    "test2017/000000000001.jpg": (5, 20, 20),
}


def coco(prefix: str = "") -> dict[str, bytes]:
    """COCO's folders, with small images and the annotations that lie beside them."""
    files = {f"{prefix}{name}": encoded(*drawn) for name, drawn in COCO.items()}
    return {**files, "annotations/instances_train2017.json": b"{}"}


def cut() -> bytes:
    """An image whose header is good and whose pixels are not."""
    data = cv2.imencode(".png", picture(3, 40, 50))[1].tobytes()
    return data[:50] + bytes(len(data) - 50)


def assert_same(one: Examples, two: Examples) -> None:
    assert len(one) == len(two) and torch.equal(one.labels, two.labels)
    for k in range(len(one)):
        assert torch.equal(one.images.image(k), two.images.image(k)), k


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_a_store_is_what_is_read_of_the_tree(tmp_path: Path, prefix: str) -> None:
    root = write_tree(tmp_path / "coco", coco(prefix))
    out = ingest(root, tmp_path / "coco.store", workers=1, unlabelled=True, chunk_nbytes=9000)
    found = load_images(out)
    assert len(found) == 3 and found.images.mapped is not None
    assert found.images.pixels.numel() == (out / "pixels.bin").stat().st_size
    assert_same(found, load_images(root))
    assert_same(load_images(out, limit=2), load_images(root, limit=2))
    assert check_pixels(out) == 3 * (40 * 64 + 64 * 30 + 9 * 11)


def test_a_tar_and_a_short_side(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "coco.tar", coco())
    out = ingest(tar, tmp_path / "out", workers=1, unlabelled=True, short_side=20)
    assert load_images(out).images.sizes.tolist() == [[20, 32], [43, 20], [9, 11]]


def test_what_does_not_decode_is_refused_or_left_out(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "photos", {**coco(), "train2017/bad.png": cut()})
    with pytest.raises(DataError, match=r"bad\.png does not decode"):
        ingest(root, tmp_path / "out", workers=1, unlabelled=True)
    out = ingest(root, tmp_path / "out", workers=1, unlabelled=True, skip_bad=True)
    with pytest.warns(UserWarning, match="1 left out"):
        found = load_images(out)
    with pytest.warns(UserWarning, match="1 left out"):
        assert_same(found, load_images(root, skip_bad=True))


def test_the_form_is_part_of_what_was_made(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "photos", {**coco(), "train2017/bad.png": cut()})
    out = tmp_path / "out"
    with pytest.raises(DataError, match="does not decode"):
        ingest(root, out, workers=1, unlabelled=True)
    with pytest.raises(DataError, match=r"unlabelled is False, and was True when"):
        ingest(root, out, workers=1, skip_bad=True)
    ingest(root, out, workers=1, unlabelled=True, skip_bad=True)
    lines: list[str] = []
    ingest(root, out, unlabelled=True, tell=lines.append)
    assert lines == [f"{out}: complete already"]
    with pytest.raises(DataError, match="is there already; give another folder"):
        ingest(root, out)
    # Stores from before there was this form have classes.
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest.pop("unlabelled") is True
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    with pytest.raises(DataError, match="is there already; give another folder"):
        ingest(root, out, unlabelled=True)


def test_sources_without_files_are_refused(tmp_path: Path) -> None:
    for source in ("scenes", "cifar100"):
        with pytest.raises(DataError, match=r"no image files; load_images\(\) reads it"):
            ingest(source, tmp_path / "out", unlabelled=True)
    with pytest.raises(DataError, match="nowhere does not exist"):
        ingest(tmp_path / "nowhere", tmp_path / "out", unlabelled=True)
    with pytest.raises(DataError, match="no class folder in train/"):
        ingest(write_tree(tmp_path / "coco", coco()), tmp_path / "out")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write_tree(tmp_path / "coco", coco()), tmp_path / "out"
    assert main(["ingest", str(root), str(out), "--unlabelled", "true", "--workers=1"]) == 0
    assert capsys.readouterr().out == f"{out}\n" and len(load_images(out)) == 3
