"""PSNR and MS-SSIM against their definitions in float64."""

from __future__ import annotations

import math
import sys

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torch import Tensor

from fastcil.compression.quality import LEAST_MS_SSIM_SIDE, ms_ssim, psnr
from fastcil.errors import FastcilError


def pair(height: int, width: int, noise: float) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(height + width)
    y, x = np.mgrid[:height, :width][..., None] / 9
    clean = np.sin(y * rng.uniform(0.5, 2, 3) + x * rng.uniform(0.5, 2, 3)) * 100 + 128
    noisy = (clean + rng.normal(0, noise, clean.shape)).clip(0, 255)
    return torch.from_numpy(noisy.astype(np.uint8)), torch.from_numpy(clean.astype(np.uint8))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 33)])
def test_psnr_is_opencvs(size: tuple[int, int]) -> None:
    image, reference = pair(*size, 12.0)
    assert psnr(image, reference) == pytest.approx(cv2.PSNR(image.numpy(), reference.numpy()))


def test_psnr_of_the_farthest_and_the_same() -> None:
    black = torch.zeros(1200, 900, 3, dtype=torch.uint8)
    assert psnr(black, black + 255) == 0
    assert psnr(black, black) == math.inf


def naive_ms_ssim(image: Tensor, reference: Tensor) -> float:
    """Wang et al. 2003: contrast and structure at five scales, luminance at the coarsest."""
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def smooth(a: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            a = correlate1d(a, window, axis=axis)
        return a[5:-5, 5:-5]

    def halve(a: np.ndarray) -> np.ndarray:
        a = a[: len(a) // 2 * 2, : a.shape[1] // 2 * 2]
        return (a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2]) / 4

    x, y = image.double().numpy(), reference.double().numpy()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    factors = []
    for scale in range(5):
        mx, my = smooth(x), smooth(y)
        vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
        structure = (2 * cov + c2) / (vx + vy + c2)
        luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1) if scale == 4 else 1
        factors.append((structure * luminance).mean((0, 1)))
        x, y = halve(x), halve(y)
    return float((np.stack(factors) ** weights[:, None]).prod(0).mean())


@pytest.mark.parametrize("noise", [3.0, 25.0])
def test_ms_ssim_is_its_definition(noise: float) -> None:
    pytest.importorskip("pytorch_msssim")
    image, reference = pair(176, 192, noise)
    found = ms_ssim(image, reference)
    assert found is not None and 0.3 < found < 0.9999
    assert found == pytest.approx(naive_ms_ssim(image, reference), abs=2e-5)


def test_ms_ssim_needs_room() -> None:
    image, reference = pair(LEAST_MS_SSIM_SIDE, 170, 3.0)
    assert ms_ssim(image[:-1], reference[:-1]) is None
    pytest.importorskip("pytorch_msssim")
    assert ms_ssim(image, reference) is not None


def test_ms_ssim_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_msssim", None)
    with pytest.raises(FastcilError, match=r"pip install 'fastcil\[codec\]'"):
        ms_ssim(*pair(161, 161, 3.0))


@pytest.mark.parametrize("measure", [psnr, ms_ssim])
def test_bad_images(measure: object) -> None:
    assert callable(measure)
    good = torch.zeros(4, 5, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"image is torch.float32; it must be uint8"):
        measure(good.float(), good)
    with pytest.raises(FastcilError, match=r"shapes \[4, 5, 3\] and \[4, 4, 3\]"):
        measure(good, good[:, 1:])
