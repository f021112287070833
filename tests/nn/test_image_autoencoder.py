"""EEC's autoencoder: shapes, and its decoder as a row of numbers."""

from __future__ import annotations

import pytest
import torch

from fastcil.errors import FastcilError
from fastcil.nn.image_autoencoder import ImageAutoencoder, code_length, decode, decoder_length


def trained(width: int) -> ImageAutoencoder:
    """One whose batch norms have seen something and have weights that differ."""
    torch.manual_seed(width)
    autoencoder = ImageAutoencoder(width)
    for module in autoencoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
            torch.nn.init.uniform_(module.bias, -1.0, 1.0)
    for _ in range(5):
        autoencoder(torch.randn(8, 3, 16, 16) + 1)
    return autoencoder.eval()


def test_published_shapes() -> None:
    autoencoder = ImageAutoencoder()
    strides = [m.stride[0] for m in autoencoder.encoder if isinstance(m, torch.nn.Conv2d)]
    shapes = [tuple(p.shape) for p in autoencoder.parameters() if p.ndim == 4]
    assert strides == [2, 2, 1]
    assert shapes == [
        (64, 3, 3, 3),
        (32, 64, 3, 3),
        (16, 32, 3, 3),
        (16, 32, 3, 3),
        (32, 64, 3, 3),
        (64, 3, 3, 3),
    ]
    assert autoencoder.encode(torch.zeros(2, 3, 32, 32)).shape == (2, 1024)


@pytest.mark.parametrize("size", [5, 8, 12, 30, 31, 33])
@pytest.mark.parametrize("width", [4, 12])
def test_any_size_comes_back(width: int, size: int) -> None:
    autoencoder = trained(width)
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        codes, restored = autoencoder.encode(images), autoencoder(images)
        assert codes.shape == (3, code_length(width, size)) and (codes >= 0).all()
        assert restored.shape == images.shape
        side = -(-size // 4)
        whole = autoencoder.decoder(codes.view(3, width // 4, side, side))
        assert torch.equal(restored, whole[:, :, :size, :size])


@pytest.mark.parametrize("width, size", [(4, 12), (12, 31), (64, 32)])
def test_folded_decoder_is_the_decoder(width: int, size: int) -> None:
    autoencoder = trained(width).double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        folded = autoencoder.folded_decoder()
        assert folded.shape == (decoder_length(width),)
        again = decode(folded, autoencoder.encode(images), width, size)
        torch.testing.assert_close(again, autoencoder(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [0, 2, 6, -4])
def test_widths_that_do_not_halve_twice(width: int) -> None:
    with pytest.raises(FastcilError, match=f"width is {width}; it must be a multiple of 4"):
        ImageAutoencoder(width)
