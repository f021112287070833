"""Image files written once, mapped ever after; killed at any moment, gone on with."""

import json
import multiprocessing
import os
import shutil
import signal
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from photo_files import encoded, picture, tree, write_tar, write_tree

from fastcil.cli import main
from fastcil.data import load, load_examples, load_images
from fastcil.data.ingest import ingest
from fastcil.data.ingest_work import Journal
from fastcil.data.mapped import check_pixels, is_mapped
from fastcil.errors import DataError
from fastcil.files.decode import decode_image, shrink
from fastcil.files.headers import image_size

FORKS = multiprocessing.get_context("forkserver")
IMPORTS = ["fastcil.cli", "fastcil.engine.arguments", "fastcil.data.ingest"]


def assert_same(one, two):
    """Two data sets with the same images, read one by one."""
    assert (one.class_names, one.train_files) == (two.class_names, two.train_files)
    for a, b in ((one.train, two.train), (one.test, two.test)):
        assert torch.equal(a.labels, b.labels) and len(a) == len(b)
        assert torch.equal(a.images.geometry, b.images.geometry)
        for k in range(len(a)):
            assert torch.equal(a.images.image(k), b.images.image(k)), k
    for a, b in ((one.train_boxes, two.train_boxes), (one.test_boxes, two.test_boxes)):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("source") / "pets", tree())


@pytest.fixture(scope="module")
def store(pets, tmp_path_factory):
    lines = []
    out = tmp_path_factory.mktemp("written") / "pets.store"
    assert ingest(pets, out, workers=2, chunk_nbytes=20_000, tell=lines.append) == out
    assert "18 images" in lines[1] and "GB free" in lines[1] and "images/s" in lines[1]
    return out


def test_every_image_is_that_of_load(pets, store):
    data = load(store)
    assert_same(data, load(pets))
    assert data.name == "pets" and data.skipped == ()
    names = {"files.json", "index.safetensors", "manifest.json", "pixels.bin"}
    names |= {"plan.json", "sizes.safetensors"}
    assert {file.name for file in store.iterdir()} == names
    assert [file.name for file in store.parent.iterdir()] == ["pets.store"]


def test_an_image_that_its_header_did_not_say_is_turned(pets, store):
    data = (pets / "train/emu/12.png").read_bytes()
    height, width = decode_image(data, "x").shape[:2]
    assert image_size(data) == (width, height)
    names = [name.rpartition("/")[2] for name in load(store).train_files]
    assert load(store).train.images.sizes[names.index("12.png")].tolist() == [height, width]


def test_nothing_is_read_or_copied(store):
    data = load(store)
    pixels = data.train.images.pixels
    assert data.test.images.pixels is pixels and data.train.images.mapped is not None
    assert pixels.numel() == (store / "pixels.bin").stat().st_size
    part = load(store, classes="0+2", train_per_class=2)
    assert part.train.images.pixels.numel() == pixels.numel() and part.train.images.shared
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert all(" r--s " in line for line in maps if "pets.store/pixels.bin" in line)


@pytest.mark.parametrize(("ending", "mode"), [("", "w"), (".gz", "w:gz")])
def test_a_tar_gives_the_same(pets, tmp_path, ending, mode):
    tar = write_tar(tmp_path / f"pets.tar{ending}", tree(), mode)
    out = ingest(tar, tmp_path / "out", workers=1)
    assert_same(load(out), load(pets))


@pytest.mark.parametrize(
    "options", ["classes=0+2", "train_per_class=2", "classes=1-2,test_per_class=1"]
)
def test_options_take_the_same_part(pets, store, options):
    assert_same(load(f"{store}:{options}"), load(f"{pets}:{options}"))


def test_others_read_it_too(pets, store):
    (one, names), (two, others) = load_examples(store), load_examples(pets)
    assert names == others and torch.equal(one.labels, two.labels)
    assert len(load_images(store, limit=3)) == 3


def test_shrunk_to_a_short_side(pets, tmp_path):
    whole = load(pets)
    small = load(ingest(pets, tmp_path / "out", workers=1, short_side=40))
    for k in range(len(whole.train)):
        expected = shrink(whole.train.images.image(k).numpy(), 40)
        assert np.array_equal(small.train.images.image(k).numpy(), expected)
    assert small.train.images.sizes.amin() <= 40 < whole.train.images.sizes.amin(1).amax()


def write_cub(root):
    """Two birds with boxes."""
    lists = dict.fromkeys(("images", "image_class_labels", "train_test_split"), "")
    boxes = ""
    for k in range(6):
        bird = ("1.Owl", "2.Wren")[k // 3]
        path = root / "images" / bird / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(k, 60, 80 + k))
        for name, value in zip(lists, (f"{bird}/{k}.jpg", bird[0], int(k % 3 > 0)), strict=True):
            lists[name] += f"{k} {value}\n"
        boxes += f"{k} 9 7 {20 + k} 31\n"
    for name, text in {**lists, "bounding_boxes": boxes}.items():
        (root / f"{name}.txt").write_text(text)
    return root


def test_boxes_go_with_their_images(tmp_path):
    root = write_cub(tmp_path / "CUB_200_2011")
    whole = load(root)
    assert_same(load(ingest(root, tmp_path / "same", workers=1)), whole)
    half = load(ingest(root, tmp_path / "half", workers=1, short_side=30))
    sizes = half.train.images.sizes.repeat(1, 2)
    exact = whole.train_boxes * sizes / whole.train.images.sizes.repeat(1, 2)
    assert half.train_boxes is not None and (half.train_boxes <= sizes).all()
    off = half.train_boxes - exact
    assert (off[:, :2] <= 0).all() and (off[:, 2:] >= 0).all() and off.abs().max() < 1


def test_bad_files_are_refused_or_left_out(tmp_path):
    files = tree()
    cut = cv2.imencode(".png", picture(3, 40, 50))[1].tobytes()
    files["train/cat/bad header.jpg"] = b"no image"
    files["train/cat/bad pixels.png"] = cut[:50] + bytes(len(cut) - 50)
    root = write_tree(tmp_path / "pets", files)
    with pytest.raises(DataError, match=r"bad header\.jpg does not decode"):
        ingest(root, tmp_path / "out", workers=1)
    (root / "train/cat/bad header.jpg").unlink()
    with pytest.raises(DataError, match=r"bad pixels\.png does not decode"):
        ingest(root, tmp_path / "out", workers=1, chunk_nbytes=9000)
    assert not (tmp_path / "out").exists()
    # What was decoded before stays; only what may be left out is another matter now.
    lines = []
    out = ingest(root, tmp_path / "out", workers=1, skip_bad=True, tell=lines.append)
    count = len(tree())
    assert lines[-1].startswith(f"{out}: complete, {count} images; 1 left out, first {root}/train/")
    with pytest.warns(UserWarning, match="1 left out"):
        data = load(out)
    with pytest.warns(UserWarning, match="1 left out"):
        assert_same(data, load(root, skip_bad=True))
    assert len(data.skipped) == 1 and "bad pixels.png" in data.skipped[0]
    assert check_pixels(out) == (out / "pixels.bin").stat().st_size


def test_a_class_without_a_good_image_is_left_out(tmp_path):
    files = {name: data for name, data in tree().items() if not name.startswith("test/dog/")}
    cut = cv2.imencode(".png", picture(3, 40, 50))[1].tobytes()
    files["test/dog/x.png"] = cut[:50] + bytes(len(cut) - 50)
    root = write_tree(tmp_path / "pets", files)
    with pytest.warns(UserWarning, match="2 left out"):
        data = load(ingest(root, tmp_path / "out", workers=1, skip_bad=True))
    assert data.class_names == ("cat", "emu") and len(data.skipped) == 2
    with pytest.warns(UserWarning, match="2 left out"):
        assert_same(data, load(root, skip_bad=True))


def test_what_is_there_already(pets, store, tmp_path):
    lines = []
    before = (store / "manifest.json").stat().st_mtime_ns
    ingest(pets, store, tell=lines.append)
    assert lines == [f"{store}: complete already"]
    assert (store / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="is there already; give another folder"):
        ingest(pets, store, short_side=9)
    with pytest.raises(DataError, match="is there already; give another folder"):
        ingest(pets, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": "cifar100"}, "whose images are no image files"),
        ({"source": "scenes:classes=4"}, "whose images are no image files"),
        ({"source": "nowhere"}, "does not exist"),
        ({"short_side": 0}, "short_side is 0; it must be at least 1"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_refused(pets, tmp_path, arguments, words):
    with pytest.raises(DataError, match=words):
        ingest(**{"source": pets, "out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small(pets, tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    assert free.f_bavail > 0
    with pytest.raises(DataError, match=r"takes [\d,]+ bytes more, and its disk has 1,000 free"):
        ingest(pets, tmp_path / "out", workers=1)
    assert not (tmp_path / ".out.ingest" / "pixels.bin").exists()


def test_a_flipped_byte_is_found_and_its_chunk_named(store, capsys):
    chunks = json.loads((store / "manifest.json").read_text())
    file = store / "pixels.bin"
    place = chunks["nbytes"] // 2
    with open(file, "r+b") as opened:
        opened.seek(place)
        was = opened.read(1)
        opened.seek(place)
        opened.write(bytes([was[0] ^ 1]))
    try:
        assert main(["ingest", "--verify", str(store)]) == 2
        err = capsys.readouterr().err
        assert "is damaged in chunk" in err and err.count("\n") == 1
        begin, end = (int(word) for word in err.split("bytes ")[1].split(",")[0].split(" to "))
        assert begin <= place < end
    finally:
        with open(file, "r+b") as opened:
            opened.seek(place)
            opened.write(was)
    assert main(["ingest", "--verify", str(store)]) == 0
    assert f"{chunks['nbytes']:,} bytes of pixels" in capsys.readouterr().out
    assert main(["ingest", "--verify", str(store), "--short_side", "3"]) == 2
    assert "or --verify OUT alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pixels.bin", "should have"),
        ("index.safetensors", "is damaged"),
        ("files.json", "is damaged"),
        ("manifest.json", "has no class folder"),
    ],
)
def test_a_file_that_was_cut_short(store, tmp_path, name, words):
    copy = tmp_path / "copy.store"
    copy.mkdir()
    for file in store.iterdir():
        content = file.read_bytes()
        (copy / file.name).write_bytes(content[:20] if file.name == name else content)
    with pytest.raises(DataError, match=words):
        load(copy)


def write_large(root):
    """Ten images that take a while each."""
    for k in range(10):
        path = root / ("train" if k % 2 else "test") / ("cat", "dog")[k % 4 // 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 256, (1100, 1300, 3), np.uint8)
        path.write_bytes(cv2.imencode(".jpg", noise)[1].tobytes())
    return root


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    FORKS.set_forkserver_preload(IMPORTS)
    return write_large(tmp_path_factory.mktemp("large") / "photos")


def journal_lines(folder):
    file = folder / "journal"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def begin(source, out, chunks):
    """Starts the command, and waits until so many chunks are on the disk."""
    arguments = ["ingest", str(source), str(out), "--workers=1", "--chunk_nbytes=1"]
    process = FORKS.Process(target=_exit_with, args=(arguments,))
    process.start()
    while process.is_alive() and journal_lines(out.with_name(f".{out.name}.ingest")) < chunks:
        time.sleep(0.001)
    return process


def _exit_with(arguments):
    raise SystemExit(main(arguments))


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_it_goes_on_where_it_was(large, tmp_path):
    out, folder = tmp_path / "out", tmp_path / ".out.ingest"
    process = begin(large, out, 2)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = journal_lines(folder)
    assert 2 <= done < 10 and workers and not out.exists() and not is_mapped(folder)
    with pytest.raises(DataError):
        load(folder)
    ended = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < ended:
        time.sleep(0.005)
    assert not any(map(is_running, workers)), "they end with the process that started them"
    # A line that a kill cut off says nothing; a chunk that is noted is not decoded again.
    with open(folder / "journal", "ab") as file:
        file.write(b'{"chunk": 9, "crc')
    flip(folder / "pixels.bin", 0)
    lines = []
    ingest(large, out, workers=1, tell=lines.append)
    assert f"{10 - done} left to decode" in lines[0]
    with pytest.raises(DataError, match="damaged in chunk 0 of 10"):
        check_pixels(out)
    flip(out / "pixels.bin", 0)
    check_pixels(out)
    assert_same(load(out), load(large))


def flip(file, place):
    with open(file, "r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 255]))


def test_a_killed_worker_ends_it_with_a_sentence(large, tmp_path):
    out = tmp_path / "out"
    process = begin(large, out, 1)
    for worker in children(process.pid):
        os.kill(worker, signal.SIGKILL)
    process.join()
    assert process.exitcode == 2 and not out.exists()
    done = journal_lines(tmp_path / ".out.ingest")
    assert 1 <= done < 10
    ingest(large, out, workers=2)
    assert_same(load(out), load(large))
    assert check_pixels(out) == 10 * 1100 * 1300 * 3


def test_a_source_that_changed_is_refused(tmp_path):
    root = write_tree(tmp_path / "pets", tree())
    bad = root / "train/cat/x.png"
    cut = cv2.imencode(".png", picture(3, 40, 50))[1].tobytes()
    bad.write_bytes(cut[:50] + bytes(len(cut) - 50))
    with pytest.raises(DataError, match="does not decode"):
        ingest(root, tmp_path / "out", workers=1)
    with pytest.raises(DataError, match="short_side is 8, and was None when"):
        ingest(root, tmp_path / "out", workers=1, short_side=8)
    os.utime(root / "train/dog/06.jpg", (1, 1))
    with pytest.raises(DataError, match="has changed since its ingest was planned"):
        ingest(root, tmp_path / "out", workers=1, skip_bad=True)


def test_a_source_that_changed_afterwards_is_refused_but_may_be_gone(tmp_path):
    root = write_tree(tmp_path / "pets", tree())
    out = ingest(root, tmp_path / "out", workers=1)
    lines = []
    ingest(root, out, tell=lines.append)
    (root / "train/cat/new.png").write_bytes((root / "train/dog/06.jpg").read_bytes())
    with pytest.raises(DataError, match="has changed since its ingest was planned"):
        ingest(root, out)
    shutil.rmtree(root)
    ingest(root, out, tell=lines.append)
    assert lines == [f"{out}: complete already"] * 2
    assert len(load(out).train) + len(load(out).test) == len(tree())


@pytest.mark.parametrize("damage", [b"\0" * 40 + b"\n", b'{"chunk": 2', b"\xff\xfe\n"])
def test_a_journal_that_was_damaged_is_cut_off(damage, tmp_path):
    good = b'{"chunk": 1, "bad": []}\n'
    (tmp_path / "journal").write_bytes(good + damage)
    assert list(Journal.open(tmp_path / "journal").done) == [1]
    assert (tmp_path / "journal").read_bytes() == good


def test_checksums_are_crc32(store):
    from safetensors.torch import load_file

    chunks = load_file(store / "index.safetensors")["chunks"]
    pixels, begin = (store / "pixels.bin").read_bytes(), 0
    assert len(chunks) > 3 and chunks[-1, 0] == len(pixels) and chunks[-1, 1] == 18
    for end, _, crc32 in chunks.tolist():
        assert zlib.crc32(pixels[begin:end]) == crc32
        begin = end
