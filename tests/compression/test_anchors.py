"""Formats to compare with: against Pillow where it writes them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcil.compression.anchors import ANCHORS, VTM_KODAK, Anchor, installed_anchors
from fastcil.compression.quality import psnr
from fastcil.errors import FastcilError


def picture(height: int = 48, width: int = 70) -> Tensor:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width][..., None] / 20
    waves = np.sin(y * rng.uniform(0.5, 2, 3) + x * rng.uniform(0.5, 2, 3)) * 90 + [90, 128, 160]
    return torch.from_numpy((waves + rng.normal(0, 3, waves.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", ANCHORS)
def test_more_bits_are_better(name: str) -> None:
    anchor = ANCHORS[name]
    if not anchor.installed():
        pytest.skip(f"{name} is not there")
    image = picture()
    files = [anchor.encode(image, q) for q in (anchor.qualities[0], 60, anchor.qualities[-1])]
    assert len(files[0]) < len(files[1]) < len(files[2])
    figures = [psnr(anchor.decode(data), image) for data in files]
    assert figures == sorted(figures) and figures[1] > 27 and figures[2] > 34


@pytest.mark.parametrize(
    ("name", "options"),
    [("jpeg", {"optimize": True}), ("webp", {}), ("avif", {"speed": 6})],
)
def test_files_are_as_good_as_pillows(name: str, options: dict[str, object]) -> None:
    image_module, features = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.features")
    if name not in installed_anchors() or not features.check("jpg" if name == "jpeg" else name):
        pytest.skip(f"{name} is not there")
    image, buffer = picture(), io.BytesIO()
    image_module.fromarray(image.numpy()).save(buffer, name, quality=60, **options)
    ours = ANCHORS[name].encode(image, 60)
    if name == "jpeg":
        assert ours == buffer.getvalue()
    assert abs(len(ours) - len(buffer.getvalue())) <= 0.03 * len(ours) + 40
    decoded = np.asarray(image_module.open(io.BytesIO(ours)).convert("RGB"))
    assert np.abs(decoded.astype(int) - ANCHORS[name].decode(ours).numpy()).mean() < 1.5


def test_what_is_not_there_says_what_to_install() -> None:
    absent = Anchor("jpegxl", (50,), lambda *_: b"", lambda _: np.zeros(0), lambda: False)
    with pytest.raises(FastcilError, match="jpegxl is not there; install imagecodecs"):
        absent.encode(picture(), 50)


def test_an_image_that_a_format_refuses() -> None:
    long = torch.zeros(1, 16384, 3, dtype=torch.uint8)
    with pytest.raises(FastcilError, match="webp does not take an image of 1 x 16384 pixels"):
        ANCHORS["webp"].encode(long, 50)


def test_published_points_rise() -> None:
    assert list(VTM_KODAK) == sorted(VTM_KODAK) and len(VTM_KODAK) == 4
