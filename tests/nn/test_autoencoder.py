"""SAMC's autoencoder: its layers, and images of any size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcil.errors import FastcilError
from fastcil.nn import CompletionAutoencoder


def by_hand(model, images):
    """The layers as the paper and the released code give them, one by one."""
    x = images
    for place in (0, 3, 6):
        convolution, norm = model.encoder[place], model.encoder[place + 1]
        x = F.conv2d(x, convolution.weight, convolution.bias, stride=2, padding=1)
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt()[
            :, None, None
        ]
        x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
        x = torch.where(x > 0, x, 0.2 * x)
    for place in (0, 2, 4):
        layer = model.decoder[place]
        x = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2, padding=1)
        x = x.clamp(min=0) if place < 4 else 1 / (1 + (-x).exp())
    return x


def make() -> CompletionAutoencoder:
    torch.manual_seed(0)
    model = CompletionAutoencoder().double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    return model.eval()


def test_layers_are_those_of_the_paper():
    model = make()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [(3, 8), (8, 16), (16, 32)]
    back = [m for m in model.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels) for m in back] == [(32, 16), (16, 8), (8, 3)]
    images = torch.rand(2, 3, 24, 16, dtype=torch.float64)
    assert model.encoder(images).shape == (2, 32, 3, 2)
    torch.testing.assert_close(model(images), by_hand(model, images))


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 31), (30, 7), (64, 40)])
def test_any_size_is_that_of_the_image_continued(size):
    model = make()
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    rows = torch.arange(-(-size[0] // 8) * 8).clamp(max=size[0] - 1)
    columns = torch.arange(-(-size[1] // 8) * 8).clamp(max=size[1] - 1)
    continued = images[:, :, rows][..., columns]
    expected = by_hand(model, continued)[..., : size[0], : size[1]]
    completed = model(images)
    assert completed.shape == images.shape
    torch.testing.assert_close(completed, expected)
    assert bool((completed > 0).all()) and bool((completed < 1).all())


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (2, 3, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(FastcilError, match="images has shape"):
        CompletionAutoencoder()(torch.rand(shape))
