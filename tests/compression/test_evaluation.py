"""Rates and distortions, against the files and their pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("constriction")

from fastcil.compression.anchors import ANCHORS
from fastcil.compression.bitstream import Bitstream
from fastcil.compression.codec import ImageCodec
from fastcil.compression.errors import BitstreamError
from fastcil.compression.evaluation import (
    Photos,
    evaluate_anchor,
    evaluate_codec,
    evaluate_streams,
    spread,
)
from fastcil.compression.model import CodecModel
from fastcil.data import ImageStore
from fastcil.errors import FastcilError

Build = Callable[[str], CodecModel]
Draw = Callable[..., Tensor]
SIZES = {"a": (64, 70), "deep/b": (33, 20), "c": (1, 1)}


@pytest.fixture
def photos(images: Draw) -> Photos:
    drawn = [(images(1, *size)[0].permute(1, 2, 0) * 255).byte() for size in SIZES.values()]
    return Photos(tuple(SIZES), ImageStore.from_images(drawn))


@pytest.fixture
def codec(lively: Build) -> ImageCodec:
    return ImageCodec(lively("hierarchical-tiny"))


def naive_psnr(a: Tensor, b: Tensor) -> float:
    error = np.mean((a.double().numpy() - b.double().numpy()) ** 2)
    return 10 * math.log10(255**2 / error)


def test_figures_are_those_of_the_files(codec: ImageCodec, photos: Photos) -> None:
    point, files = evaluate_codec(codec, photos, 64.0)
    assert list(files) == list(SIZES) and point.setting == 64.0
    rates, qualities = [], []
    for k, (name, (height, width)) in enumerate(SIZES.items()):
        image = photos.images.image(k)
        assert files[name] == codec.encode(image, 64.0)
        rates.append(8 * len(files[name]) / (height * width))
        qualities.append(naive_psnr(codec.decode(files[name]), image))
        found = point.images[k]
        assert (found.name, found.height, found.width) == (name, height, width)
        assert found.nbytes == len(files[name]) and found.ms_ssim is None
        assert found.bpp == pytest.approx(rates[-1])
        assert found.psnr == pytest.approx(qualities[-1])
    # Means over images: neither pixels nor errors are pooled.
    assert point.bpp == pytest.approx(np.mean(rates))
    assert point.psnr == pytest.approx(np.mean(qualities))
    assert point.ms_ssim is None
    assert point.encode_seconds and point.decode_seconds


def test_ms_ssim_of_those_that_are_large_enough(codec: ImageCodec, images: Draw) -> None:
    pytest.importorskip("pytorch_msssim")
    drawn = [(images(1, *size)[0].permute(1, 2, 0) * 255).byte() for size in ((161, 161), (8, 8))]
    point = evaluate_anchor("jpeg", Photos(("a", "b"), ImageStore.from_images(drawn)), 50)
    assert point.ms_ssim == point.images[0].ms_ssim is not None
    assert 0.5 < point.ms_ssim < 1


def test_old_streams_through_a_new_decoder(codec: ImageCodec, photos: Photos) -> None:
    """The rate stays, and so does what the entropy model says; only PSNR moves."""
    files, before = [], {}
    for lmbda in (900.0, 32.0):
        before[lmbda], made = evaluate_codec(codec, photos, lmbda)
        files += made.items()
    same = evaluate_streams(codec, photos, files)
    assert list(same) == [32.0, 900.0]
    for lmbda, point in same.items():
        assert point.images == before[lmbda].images and point.encode_seconds is None
    with torch.no_grad():
        for parameter in codec.model.trainable("kr"):
            parameter.mul_(1.02)
    for lmbda, point in evaluate_streams(codec, photos, files).items():
        assert point.bpp == before[lmbda].bpp
        assert point.psnr != before[lmbda].psnr
    # Of some images only: files of 900 come first.
    some = evaluate_streams(codec, photos, files[2:4])
    names = {lmbda: [image.name for image in point.images] for lmbda, point in some.items()}
    assert names == {32.0: ["a"], 900.0: ["c"]}


def test_streams_that_cannot_be_measured(codec: ImageCodec, photos: Photos) -> None:
    _, files = evaluate_codec(codec, photos, 64.0)
    data = files["c"]
    with pytest.raises(FastcilError, match="files is empty"):
        evaluate_streams(codec, photos, [])
    with pytest.raises(FastcilError, match="holds 'd', of which there is no image"):
        evaluate_streams(codec, photos, [("d", data)])
    with pytest.raises(FastcilError, match="holds 'c' twice at lambda 64"):
        evaluate_streams(codec, photos, [("c", data), ("c", data)])
    with pytest.raises(FastcilError, match="'a' is an image of 64 x 70 pixels; its file holds one"):
        evaluate_streams(codec, photos, [("a", data)])
    with pytest.raises(BitstreamError, match=r"'c': The stream's CRC-32"):
        evaluate_streams(codec, photos, [("c", data[:-1] + b"?")])
    stream = Bitstream.parse(data)
    forged = Bitstream(stream.head, 1, 1, stream.check ^ 1, stream.payload).pack()
    with pytest.raises(BitstreamError, match="'c' at lambda 64: The decoded symbols"):
        evaluate_streams(codec, photos, [("c", forged)])


def test_an_anchor_is_its_format(photos: Photos) -> None:
    point = evaluate_anchor("jpeg", photos, 50)
    image = photos.images.image(0)
    data = ANCHORS["jpeg"].encode(image, 50)
    assert point.images[0].nbytes == len(data)
    assert point.images[0].psnr == pytest.approx(naive_psnr(ANCHORS["jpeg"].decode(data), image))
    with pytest.raises(FastcilError, match="name is 'gif'; the anchors are jpeg, webp"):
        evaluate_anchor("gif", photos, 50)


def test_spread() -> None:
    found = spread((4.0, 1024.0), 5)
    assert found == pytest.approx([4, 16, 64, 256, 1024])
    assert spread((4.0, 1024.0), 1) == (64.0,)
    with pytest.raises(FastcilError, match="count is 0"):
        spread((4.0, 1024.0), 0)
    with pytest.raises(FastcilError, match="lambda_range is"):
        spread((8.0, 4.0))


def test_photos_are_told_apart(photos: Photos) -> None:
    with pytest.raises(FastcilError, match="holds 'a' twice"):
        Photos(("a", "b", "a"), photos.images)
    with pytest.raises(FastcilError, match="names has 2 entries and images 3"):
        Photos(("a", "b"), photos.images)
