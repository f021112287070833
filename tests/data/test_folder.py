"""Folders and tars of image files, written here with OpenCV, Pillow and tarfile."""

import io
import os
import tarfile

import cv2
import numpy as np
import pytest
from PIL import Image

from fastcil.data.folder import examples_of_folder, load_folder
from fastcil.data.listing import list_source
from fastcil.errors import DataError
from fastcil.files.decode import decode_image

TREE = {
    "train/dog/b.png": (10, 8, 5),
    "train/dog/a.png": (20, 9, 7),
    "train/cat/deep/er/x.png": (30, 6, 6),
    "test/cat/y.png": (40, 5, 4),
    "test/dog/z.png": (50, 4, 9),
}


def png(value, height=6, width=5):
    return cv2.imencode(".png", np.full((height, width, 3), value, np.uint8))[1].tobytes()


def write_tree(root, tree):
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else png(*content))
    return root


def write_tar(path, tree, mode="w", prefix=""):
    with tarfile.open(path, mode) as tar:
        for name, content in tree.items():
            data = content if isinstance(content, bytes) else png(*content)
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def summary(examples):
    images = [examples.images.image(i) for i in range(len(examples))]
    return [
        (int(label), int(image[0, 0, 0]), *image.shape[:2])
        for label, image in zip(examples.labels, images, strict=True)
    ]


SUMMARY = [(0, 30, 6, 6), (1, 20, 9, 7), (1, 10, 8, 5)]


def check(data, name):
    assert data.name == name and data.class_names == ("cat", "dog") and data.skipped == ()
    assert summary(data.train) == SUMMARY
    assert summary(data.test) == [(0, 40, 5, 4), (1, 50, 4, 9)]


def test_folder_gives_images_by_class_and_path_at_their_own_size(tmp_path):
    check(load_folder(write_tree(tmp_path / "pets", TREE)), "pets")


@pytest.mark.parametrize(
    ("ending", "mode"), [("", ""), (".gz", ":gz"), (".bz2", ":bz2"), (".xz", ":xz")]
)
@pytest.mark.parametrize("prefix", ["", "./", "pets/", "/", "../"])
def test_tar_gives_the_same_in_any_compression_and_below_a_shared_root(
    tmp_path, ending, mode, prefix
):
    check(load_folder(write_tar(tmp_path / f"pets.tar{ending}", TREE, "w" + mode, prefix)), "pets")


def test_val_stands_in_for_test_and_is_left_aside_beside_it(tmp_path):
    tree = {name.replace("test/", "val/"): content for name, content in TREE.items()}
    check(load_folder(write_tree(tmp_path / "a", tree)), "a")
    both = {**TREE, "val/cat/other.png": (99,), "val/dog/other.png": (99,)}
    check(load_folder(write_tree(tmp_path / "b", both)), "b")


def test_classes_txt_gives_the_order(tmp_path):
    tree = {**TREE, "classes.txt": b"\xef\xbb\xbfdog\r\ncat\n\n"}
    for path in (write_tree(tmp_path / "a", tree), write_tar(tmp_path / "a.tar", tree)):
        data = load_folder(path)
        assert data.class_names == ("dog", "cat")
        assert summary(data.train) == [(0, 20, 9, 7), (0, 10, 8, 5), (1, 30, 6, 6)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"dog\n", "does not list the class 'cat'"),
        (b"dog\ncat\ndog\n", "'dog' occurs twice"),
        (b"dog\ncat\nemu\n", "class 'emu' has no image in train or test"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_classes_txt_that_does_not_fit(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        load_folder(write_tree(tmp_path, {**TREE, "classes.txt": text}))


def test_hidden_files_and_other_kinds_are_passed_over(tmp_path):
    tree = {
        **TREE,
        "train/dog/._a.png": b"AppleDouble",
        "train/dog/notes.txt": b"x",
        "train/.cache/a.png": b"x",
        "train/__MACOSX/dog/a.png": b"x",
        "train/readme.jpg": b"not in a class folder",
    }
    check(load_folder(write_tree(tmp_path / "a", tree)), "a")
    check(load_folder(write_tar(tmp_path / "a.tar", tree)), "a")


def test_linked_class_folders_are_read_and_a_loop_ends(tmp_path):
    write_tree(tmp_path / "store", {"x/1.png": (7,)})
    root = write_tree(tmp_path / "a", TREE)
    os.symlink(tmp_path / "store" / "x", root / "train" / "emu")
    os.symlink(tmp_path / "store" / "x", root / "test" / "emu")
    os.symlink(root, root / "train" / "dog" / "up")
    data = load_folder(root)
    assert data.class_names == ("cat", "dog", "emu") and len(data.train) == 4


def test_only_regular_members_of_a_tar_are_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", TREE)
    with tarfile.open(path, "a") as tar:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "/etc/hosts")):
            member = tarfile.TarInfo(f"train/dog/link{kind.decode()}.png")
            member.type, member.linkname = kind, target
            tar.addfile(member)
        device = tarfile.TarInfo("train/dog/device.png")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
    before = sorted(tmp_path.rglob("*"))
    check(load_folder(path), "a")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_of_a_tar_that_lies_outside_of_it_is_refused(tmp_path):
    path = tmp_path / "pets.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("train/dog/a.png", "../../escape.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"none"))
    with pytest.raises(DataError, match=r"a member '../../escape.png', which lies outside"):
        list_source(path)


def test_many_images_keep_their_order_over_threads(tmp_path):
    tree = {f"train/{c}/{i:03}.png": (i, 1 + i % 7, 3) for c in ("a", "b") for i in range(150)}
    tree |= {"test/a/0.png": (0,), "test/b/0.png": (0,)}
    data = load_folder(write_tar(tmp_path / "a.tar", tree))
    assert summary(data.train) == [(c, i, 1 + i % 7, 3) for c in (0, 1) for i in range(150)]


def pillow(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


GREY = np.arange(60, dtype=np.uint8).reshape(6, 10) * 4
RGB = np.stack([GREY, 255 - GREY, np.full_like(GREY, 9)], -1)


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        (pillow(Image.fromarray(RGB), "PNG"), RGB, 0),
        (pillow(Image.fromarray(GREY), "PNG"), np.stack([GREY] * 3, -1), 0),
        (pillow(Image.fromarray(RGB).convert("RGBA"), "PNG"), RGB, 0),
        (pillow(Image.fromarray(GREY).convert("LA"), "PNG"), np.stack([GREY] * 3, -1), 0),
        (pillow(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), np.stack([GREY] * 3, -1), 0),
        (pillow(Image.fromarray(RGB).quantize(60), "PNG"), RGB, 0),
        (pillow(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB, 2),
        (pillow(Image.fromarray(RGB), "WEBP", lossless=True), RGB, 0),
        (pillow(Image.fromarray(RGB), "BMP"), RGB, 0),
        (pillow(Image.fromarray(RGB), "JPEG", quality=100, subsampling=0), RGB, 3),
    ],
    ids=["rgb", "grey", "rgba", "grey-alpha", "16-bit", "palette", "cmyk", "webp", "bmp", "jpeg"],
)
def test_every_kind_becomes_rgb_uint8(data, expected, tolerance):
    image = decode_image(data, "x")
    assert image.dtype == np.uint8 and image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: RGB[::-1].transpose(1, 0, 2),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: RGB[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    data = pillow(Image.fromarray(RGB), "JPEG", quality=100, subsampling=0, exif=exif)
    image = decode_image(data, "x")
    assert image.shape == turned.shape and np.abs(image.astype(int) - turned).max() <= 3


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", png(3)[:-20], pillow(Image.fromarray(RGB), "JPEG")[:-40]],
    ids=["empty", "text", "cut png", "cut jpeg"],
)
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_an_image_that_does_not_decode_is_named_or_listed(tmp_path, content, form):
    tree = {**TREE, "train/dog/broken.jpg": content}
    write = write_tree if form == "folder" else write_tar
    path = write(tmp_path / "a.tar", tree)
    with pytest.raises(DataError, match=r"a\.tar/train/dog/broken\.jpg does not decode"):
        load_folder(path)
    data = load_folder(path, skip_bad=True)
    assert summary(data.train) == SUMMARY
    assert len(data.skipped) == 1 and "train/dog/broken.jpg" in data.skipped[0]


def test_a_side_over_32767_pixels_is_refused(tmp_path):
    path = write_tree(tmp_path, {**TREE, "train/dog/wide.png": (1, 1, 32768)})
    with pytest.raises(DataError, match=r"wide\.png is 1 x 32768 pixels"):
        load_folder(path)
    assert len(load_folder(path, skip_bad=True).skipped) == 1


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    path = write_tree(tmp_path, TREE)
    os.symlink(tmp_path / "nowhere.png", tmp_path / "train" / "dog" / "gone.png")
    with pytest.raises(DataError, match=r"gone\.png cannot be read: No such file"):
        load_folder(path)
    assert len(load_folder(path, skip_bad=True).skipped) == 1


@pytest.mark.parametrize(
    ("extra", "remove", "words"),
    [
        ({"train/emu/1.png": (1,)}, (), "'emu' has no image in test"),
        ({"test/emu/1.png": (1,)}, (), "'emu' has no image in train"),
        ({"train/emu/1.heic": b"x"}, (), "'emu' has no image in train or test"),
        ({}, ("train/dog/a.png", "train/dog/b.png"), "'dog' has no image in train"),
    ],
)
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_class_that_lacks_a_part_is_named_or_left_out(tmp_path, extra, remove, words, form):
    tree = {"train/ant/1.png": (1,), "test/ant/1.png": (2,), **TREE, **extra}
    tree = {name: content for name, content in tree.items() if name not in remove}
    write = write_tree if form == "folder" else write_tar
    path = write(tmp_path / "a.tar", tree)
    with pytest.raises(DataError, match=words):
        load_folder(path)
    data = load_folder(path, skip_bad=True)
    assert data.class_names == (("ant", "cat") if remove else ("ant", "cat", "dog"))
    assert data.train.labels.unique().tolist() == list(range(len(data.class_names)))
    assert len(data.skipped) == 1 and words in data.skipped[0]


def test_an_empty_class_folder_counts_as_a_class(tmp_path):
    path = write_tree(tmp_path, TREE)
    (path / "train" / "emu").mkdir()
    with pytest.raises(DataError, match="'emu' has no image in train or test"):
        load_folder(path)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a.png": (1,)}, "no class folder in train/"),
        ({"train/a.png": (1,), "test/a.png": (1,)}, "no class folder in train/"),
        ({"train/cat/a.png": (1,)}, "no class folder in test/ or val/"),
        ({"train/cat/a.png": (1,), "test/cat/a.png": (1,)}, "at least 2 are needed"),
    ],
)
def test_other_trees_are_refused(tmp_path, tree, words):
    with pytest.raises(DataError, match=words):
        load_folder(write_tree(tmp_path, tree))


@pytest.mark.parametrize("mode", ["", ":gz", ":bz2", ":xz"])
@pytest.mark.parametrize("part", [0.05, 0.4, 0.9])
def test_a_truncated_tar_is_refused(tmp_path, mode, part):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    tree = {**TREE, "test/dog/zz.png": cv2.imencode(".png", noise)[1].tobytes()}
    whole = write_tar(tmp_path / "whole.tar", tree, "w" + mode).read_bytes()
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[: int(part * len(whole.rstrip(b"\0")))])
    with pytest.raises(DataError, match=r"cut\.tar cannot be read as a tar archive to its end"):
        load_folder(path)


@pytest.mark.parametrize("blocks", range(1, 10))
def test_a_tar_cut_between_blocks_is_refused(tmp_path, blocks):
    whole = write_tar(tmp_path / "whole.tar", TREE).read_bytes()
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[: 512 * blocks])
    with pytest.raises(DataError, match=r"ends early|unexpected end"):
        load_folder(path)


def test_a_damaged_header_inside_a_tar_is_refused(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", TREE).read_bytes())
    data[2 * 1024 + 5] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match="ends early or is damaged"):
        load_folder(tmp_path / "a.tar")


def test_examples_of_class_folders_or_of_the_train_part(tmp_path):
    skipped = []
    plain = {name.split("/", 1)[1]: c for name, c in TREE.items() if name.startswith("train")}
    for path in (
        write_tree(tmp_path / "plain", plain),
        write_tar(tmp_path / "plain.tar", plain),
        write_tar(tmp_path / "below.tar", plain, prefix="photos/"),
        write_tree(tmp_path / "split", TREE),
    ):
        examples, names = examples_of_folder(path, False, skipped)
        assert names == ("cat", "dog") and summary(examples) == SUMMARY
    assert skipped == []


def test_examples_of_one_class_keep_its_name(tmp_path):
    for path in (
        write_tree(tmp_path / "a", {"mug/1.png": (1,)}),
        write_tar(tmp_path / "a.tar", {"mug/1.png": (1,)}),
    ):
        assert examples_of_folder(path, False, [])[1] == ("mug",)


def test_a_class_named_train_is_a_class(tmp_path):
    path = write_tree(tmp_path, {"train/1.png": (1,), "car/1.png": (2,)})
    examples, names = examples_of_folder(path, False, [])
    assert names == ("car", "train") and summary(examples) == [(0, 2, 6, 5), (1, 1, 6, 5)]


def test_examples_with_bad_images(tmp_path):
    path = write_tree(tmp_path, {"a/1.png": b"x", "b/1.png": (2,), "c/1.png": (3,), "c/2.png": b""})
    with pytest.raises(DataError, match="does not decode"):
        examples_of_folder(path, False, [])
    skipped = []
    examples, names = examples_of_folder(path, True, skipped)
    assert names == ("b", "c") and summary(examples) == [(0, 2, 6, 5), (1, 3, 6, 5)]
    assert len(skipped) == 3  # two images and the class that is empty without its image
    only = write_tree(tmp_path / "only", {"a/1.png": b"x"})
    with pytest.raises(DataError, match="no image that can be read"):
        examples_of_folder(only, True, [])


def test_examples_of_a_root_without_classes(tmp_path):
    with pytest.raises(DataError, match="no class folder"):
        examples_of_folder(write_tree(tmp_path, {"1.png": (1,)}), False, [])


def test_listing_holds_no_other_files(tmp_path):
    listing = list_source(write_tar(tmp_path / "a.tar", {**TREE, "index.csv": b"x" * 1000}))
    assert {"/".join(f) for f in listing.files} == set(TREE)


def test_images_are_called_by_their_path_from_the_class_on(tmp_path):
    names = ("cat/deep/er/x.png", "dog/a.png", "dog/b.png")
    assert load_folder(write_tree(tmp_path / "tree", TREE)).train_files == names
    write_tar(tmp_path / "t.tar", TREE)
    assert load_folder(tmp_path / "t.tar").train_files == names
    bad = write_tree(tmp_path / "bad", {**TREE, "train/dog/a.png": b"no image"})
    (bad / "train" / "eel").mkdir()
    write_tree(bad, {"train/ant/c.png": (7, 5, 5)})  # without a test image
    assert load_folder(bad, skip_bad=True).train_files == (names[0], names[2])
