"""Trees of ImageNet with a few tiny classes, and the two lists that "ImageNet-100" means."""

import zlib

import cv2
import numpy as np
import pytest
import torch
from scipy import io

from fastcil.data import load, load_examples
from fastcil.data.imagenet import class_ids, load_imagenet, read_class_list, subset_ids
from fastcil.data.subset import Subset
from fastcil.errors import DataError

WNIDS = ("n01440764", "n01514668", "n01531178", "n15075141")
# Checksum of the 100 ids in FOSTER's repository.
LUCIR = 0x405AE793
FLAT = [f"ILSVRC2012_val_{number:08}" for number in range(1, 9)]
# The class of each validation image, in the order of their numbers.
TRUTH = [WNIDS[k] for k in (3, 1, 0, 2, 0, 3, 2, 1)]


def picture(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((6, 7, 3), grey, np.uint8))


def write(root, wnids=WNIDS, flat=False, val="val", train="train"):
    """Three training and two validation images of each class, each of its own grey."""
    for c, wnid in enumerate(wnids):
        for k in range(3):
            picture(root / train / wnid / f"{wnid}_{9 - k}.JPEG", 40 * c + k)
        for k in range(0 if flat else 2):
            picture(root / val / wnid / f"ILSVRC2012_val_{k}.JPEG", 40 * c + 10 + k)
    for k, (stem, wnid) in enumerate(zip(FLAT, TRUTH, strict=True)) if flat else ():
        picture(root / val / f"{stem}.JPEG", 40 * wnids.index(wnid) + 10 + k)
    return root


def greys(examples):
    return [int(examples.images.image(i)[0, 0, 0]) for i in range(len(examples))]


def test_the_ids_and_what_papers_took_of_them():
    ids = class_ids()
    assert len(set(ids)) == 1000 and list(ids) == sorted(ids)
    # Tench, cock, goldfinch and toilet tissue, at their places of the common numbering.
    assert [ids.index(w) for w in WNIDS] == [0, 7, 11, 999]
    assert (ids[3], ids[281], ids[510]) == ("n01491361", "n02123045", "n03095699")
    lucir, podnet = subset_ids("lucir"), subset_ids("podnet")
    # As FOSTER's repository lists them (100 class lines of imagenet-sub/eval.txt).
    assert lucir[:5] == ("n01514668", "n01531178", "n01537544", "n01689811", "n01729322")
    assert lucir[-3:] == ("n12620546", "n12768682", "n15075141") and len(set(lucir)) == 100
    assert zlib.crc32(" ".join(lucir).encode()) == LUCIR
    # As PODNet's repository lists them (100 classes of imagenet_split/val_100.txt).
    assert podnet == ids[:100] and podnet[-1] == "n01855672"
    assert subset_ids("foster") == subset_ids("pycil") == lucir
    assert subset_ids("der") == subset_ids("dytox") == podnet


def test_folders_for_each_class(tmp_path, monkeypatch):
    write(tmp_path / "ILSVRC2012")
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    data = load("imagenet")
    assert data.name == "imagenet" and data.class_names == WNIDS
    # By path within a class: the file that ends in 7 first.
    assert greys(data.train) == [40 * c + k for c in range(4) for k in (2, 1, 0)]
    assert greys(data.test) == [40 * c + 10 + k for c in range(4) for k in range(2)]
    part = load("imagenet:classes=1+3,train_per_class=1")
    assert part.class_names == (WNIDS[1], WNIDS[3]) and greys(part.train) == [42, 122]


@pytest.mark.parametrize("kit", ["kaggle", "kit", "kit inside"])
def test_validation_images_in_one_folder(tmp_path, kit):
    if kit == "kaggle":
        write(tmp_path / "ILSVRC" / "Data" / "CLS-LOC", flat=True)
        rows = [f"{s},{w} 1 2 3 4 {w} 5 6 7 8" for s, w in zip(FLAT, TRUTH, strict=True)]
        text = "\n".join(["ImageId,PredictionString", *rows[::-1]])
        (tmp_path / "LOC_val_solution.csv").write_text(text)
    else:
        write(tmp_path, flat=True)
        folder = tmp_path / ("ILSVRC2012_devkit_t12/data" if kit == "kit inside" else "")
        folder.mkdir(parents=True, exist_ok=True)
        kinds = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
        numbers = {wnid: number for number, wnid in enumerate(sorted(WNIDS, reverse=True), 1)}
        synsets = np.array([(n, w, 0) for w, n in numbers.items()] + [(9, "n09", 4)], dtype=kinds)
        io.savemat(folder / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
        truth = "\n".join(str(numbers[w]) for w in TRUTH) + "\n"
        (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    data = load(tmp_path)
    assert data.class_names == WNIDS and data.test.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    wanted = [(w, k) for w in range(4) for k, name in enumerate(TRUTH) if WNIDS.index(name) == w]
    assert greys(data.test) == [40 * w + 10 + k for w, k in wanted]
    listed = load(f"{tmp_path}:classes=0+3")
    assert len(listed.test) == 4 and len(listed.train) == 6


def test_a_list_takes_classes_out(tmp_path):
    write(tmp_path / "data")
    file = tmp_path / "lists" / "two.txt"
    file.parent.mkdir()
    file.write_text(f"{WNIDS[3]}\n\n{WNIDS[1]}\n")
    two = (WNIDS[1], WNIDS[3])
    data = load(f"{tmp_path / 'data'}:list={file}")
    assert data.class_names == two and greys(data.train) == [42, 41, 40, 122, 121, 120]
    assert load(tmp_path / "data", list=str(file)).class_names == two
    images = f"train/{WNIDS[3]}/{WNIDS[3]}_18.JPEG 1\ntrain/{WNIDS[1]}/{WNIDS[1]}_2.JPEG 0\n" * 2
    file.write_text(images)
    assert read_class_list(str(file)) == two
    part = load(f"{tmp_path / 'data'}:list={file},train_per_class=1")
    assert part.class_names == two and len(part.train) == 2
    examples, names = load_examples(f"{tmp_path / 'data'}:list={file}")
    assert names == two and len(examples) == 6


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """A folder of PODNet's classes, an image each."""
    root = tmp_path_factory.mktemp("data") / "imagenet100"
    for c, wnid in enumerate(subset_ids("podnet")):
        for part in ("train", "val"):
            picture(root / part / wnid / "a.png", c)
    return root


def test_a_hundred_classes_of_their_own(hundred, monkeypatch):
    monkeypatch.setenv("FASTCIL_DATA", str(hundred.parent))
    data = load("imagenet100:list=podnet")
    assert data.class_names == subset_ids("podnet") and data.name == "imagenet100 (podnet)"
    assert load("imagenet100:list=der,classes=0-1").class_names == data.class_names[:2]
    with pytest.raises(DataError) as caught:
        load("imagenet100")
    lacking = len(set(subset_ids("lucir")) - set(subset_ids("podnet")))
    assert f"lacks {lacking} of the 100 classes of the list 'lucir'" in str(caught.value)
    assert str(caught.value).endswith("it holds those of 'podnet': write list=podnet")


def test_a_hundred_classes_out_of_the_whole(tmp_path, monkeypatch, hundred):
    more = tmp_path / "imagenet"
    for part in ("train", "val"):
        (more / part).mkdir(parents=True)
        for wnid in {*subset_ids("lucir"), *subset_ids("podnet")}:
            (more / part / wnid).symlink_to(next((hundred / "val").iterdir()))
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    assert load("imagenet100").class_names == subset_ids("lucir")
    assert load("imagenet100:list=podnet").class_names == subset_ids("podnet")
    assert len(load("imagenet").class_names) == len({*subset_ids("lucir"), *subset_ids("podnet")})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("imagenet", "'imagenet', but there is no folder imagenet, ImageNet, ILSVRC2012"),
        ("imagenet100", "there is no folder imagenet100, .*, imagenet, .*holds train and val"),
        ("{}/flat:list=podnet", r"val has 8 images and no class folders; sort .* LOC_val_solution"),
        ("{}/few:list=nolist", "list is 'nolist', which is neither a file nor known; give"),
        ("{}/few:list={}/none.txt", "none.txt does not exist"),
        ("{}/few:list={}/empty.txt", "empty.txt names no class; write one name per line"),
        ("{}/few:list={}/other.txt", r"train lacks 1 of the 2 classes of .*, the first: n99999999"),
        ("{}/few:list={}/one.txt", "1 of its classes have images in both train and val"),
        ("scenes:list=podnet", "scenes"),
        ("{}/kit", "has 2 labels for 8 validation images"),
        ("{}/kaggle", "LOC_val_solution.csv names no class"),
    ],
)
def test_what_is_missing_is_one_sentence(tmp_path, monkeypatch, source, words):
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "few")
    flat = write(tmp_path / "flat", subset_ids("podnet")[:1] + WNIDS[1:], flat=True)
    for wnid in subset_ids("podnet"):
        (flat / "train" / wnid).mkdir(exist_ok=True)
    (write(tmp_path / "kaggle", flat=True) / "LOC_val_solution.csv").write_text("ImageId,x\n")
    kit = write(tmp_path / "kit", flat=True)
    kinds = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O")])
    io.savemat(kit / "meta.mat", {"synsets": np.array([(1, WNIDS[0])], dtype=kinds)})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n1\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "other.txt").write_text(f"n99999999\n{WNIDS[0]}\n")
    (tmp_path / "one.txt").write_text(f"{WNIDS[0]}\n")
    with pytest.raises(DataError, match=words) as caught:
        load(source.format(tmp_path, tmp_path))
    assert "\n" not in str(caught.value)


def test_no_training_folder_says_where_it_looked(tmp_path):
    with pytest.raises(DataError, match="looked for the folders train, Data/CLS-LOC/train, ILSVRC"):
        load_imagenet(tmp_path)


def solution(*rows):
    return "\n".join(["ImageId,PredictionString", *rows])


@pytest.mark.parametrize("flat", [False, True])
def test_kaggles_lists_tell_the_objects_boxes(tmp_path, flat):
    """One box around all objects of an image's class, in whole pixels, inside; images are 6 x 7."""
    write(tmp_path / "ILSVRC" / "Data" / "CLS-LOC", flat=flat)
    first, second = WNIDS[:2]
    train = [
        f"{first}_9,{first} 1 2 4 5 ",
        f"{first}_8,{first} 2 1 3 4 {second} 0 0 7 6 {first} 4 0 6 3",  # the other class's is not
        f"{first}_7,{first} 5.5 3.2 90 80",
        f"{second}_9,{first} 1 1 2 2",  # none of its class
        f"{second}_8,{second} 9 9 12 12",  # outside
        "n99999999_1,n99999999 1 1 2",  # of an image that is not read
    ]
    (tmp_path / "LOC_train_solution.csv").write_text(solution(*train))
    for file in (tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val").glob("*/*"):
        file.rename(file.with_stem(f"{file.parent.name}_{file.stem}"))  # each name once
    row = f"{FLAT[2] if flat else first + '_ILSVRC2012_val_0'},{first} 1 2 3 4"
    rows = [f"{s},{w} 0 0 7 6" for s, w in zip(FLAT, TRUTH, strict=True)]
    rows = [*rows[:2], row, *rows[3:]] if flat else [row]
    (tmp_path / "LOC_val_solution.csv").write_text(solution(*rows))
    data = load_imagenet(tmp_path)
    names = {file: k for k, file in enumerate(data.train_files)}
    assert data.train_boxes.dtype == torch.int16 and data.train_boxes.shape == (12, 4)
    found = {file: data.train_boxes[k].tolist() for file, k in names.items()}
    assert found.pop(f"{first}/{first}_9.JPEG") == [2, 1, 5, 4]
    assert found.pop(f"{first}/{first}_8.JPEG") == [0, 2, 4, 6]
    assert found.pop(f"{first}/{first}_7.JPEG") == [3, 5, 6, 7]
    assert set(map(tuple, found.values())) == {(0, 0, 0, 0)}
    own = data.test_boxes[data.test.labels == 0].tolist()
    assert own[0] == [2, 1, 4, 3] and own[1] == ([0, 0, 6, 7] if flat else [0, 0, 0, 0])
    assert len(data.test_boxes) == len(data.test)
    # Of a part, the boxes of what is left of it.
    part = load_imagenet(tmp_path, subset=Subset(classes=(0, 2)))
    assert part.train_boxes.shape == (6, 4)
    assert part.train_boxes[:3].tolist() == data.train_boxes[:3].tolist()
    # Without training boxes there are none, with others' neither.
    (tmp_path / "LOC_train_solution.csv").write_text(solution("x,n1 1 1 2 2"))
    assert load_imagenet(tmp_path).train_boxes is None
    (tmp_path / "LOC_train_solution.csv").unlink()
    assert load_imagenet(tmp_path).train_boxes is None
    for bad in (f"{first} 1 2 3", f"{first} 1 2 3 four"):
        (tmp_path / "LOC_train_solution.csv").write_text(solution(f"{first}_9,{bad}"))
        with pytest.raises(DataError, match=r"line 2 of .*LOC_train_solution.csv has 'n01440764 1"):
            load_imagenet(tmp_path)


def test_a_class_that_is_left_out_takes_its_boxes_along(tmp_path):
    write(tmp_path)
    for file in (tmp_path / "val" / WNIDS[1]).iterdir():
        file.write_bytes(b"no image")
    rows = [f"{w}_{k},{w} {c} 1 5 5" for c, w in enumerate(WNIDS) for k in (7, 8, 9)]
    (tmp_path / "LOC_train_solution.csv").write_text(solution(*rows))
    data = load_imagenet(tmp_path, skip_bad=True)
    assert data.class_names == (WNIDS[0], *WNIDS[2:]) and len(data.train_boxes) == 9
    assert data.train_boxes[:, 1].tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
