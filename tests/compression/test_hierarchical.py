"""The hierarchical model's shape against the published figures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastcil.compression.conditioning import ConditionedBlock
from fastcil.compression.hierarchical import HierarchicalConfig
from fastcil.compression.zoo import build_codec
from fastcil.errors import FastcilError


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return build_codec("hierarchical")


@pytest.mark.parametrize(
    ("part", "millions"),
    [("encoder", 11.3), ("posteriors", 7.2), ("entropy", 4.8), ("decoder", 11.8)],
)
def test_parameters_by_part(published, part, millions):
    assert round(count(getattr(published, part)) / 1e6, 1) == millions


def test_parameters_in_all(published):
    assert round(count(published) / 1e6, 1) == 35.5
    assert sorted(published.embeddings) == ["decoder", "encoder", "entropy"]
    assert [count(mlp) for mlp in published.embeddings.values()] == [2 * (256 * 256 + 256)] * 3
    parts = [p for modules in published.parts().values() for m in modules for p in m.parameters()]
    assert len(parts) == len({id(p) for p in parts}) == len(list(published.parameters()))


def test_symbols_of_an_image_of_256(published):
    shapes = published.latent_shapes(256, 256)
    assert shapes == ((128, 4, 4), (128, 8, 8), (256, 16, 16), (32, 32, 32))
    assert sum(math.prod(shape) for shape in shapes) == 108_544
    assert published.latent_shapes(193, 255) == shapes


def test_blocks_by_place(published):
    def blocks(module: nn.Module) -> int:
        return sum(isinstance(m, ConditionedBlock) for m in module.modules())

    assert [blocks(stage) for stage in published.encoder.stages] == [6, 6, 6, 4, 4]
    assert [blocks(stage) for stage in published.posteriors] == [3, 3, 3, 3]
    assert [blocks(phase) for phase in published.entropy.phases] == [1, 2, 2, 2]
    places = [(blocks(p.before), blocks(p.after)) for p in published.decoder.phases]
    assert places == [(0, 2), (2, 2), (3, 3), (3, 3)] and blocks(published.decoder.last) == 6
    kernels = [stage[-1].depthwise.kernel_size[0] for stage in published.encoder.stages]
    assert kernels == [7, 7, 7, 5, 3]


def test_decoder_does_not_reach_into_the_entropy_model(lively, images):
    """Changing every weight of the decoder leaves all priors as they are."""
    model, x = lively("hierarchical-tiny"), images(1, 64, 64)
    before = model(x, 100.0)
    for parameter in [*model.decoder.parameters(), *model.embeddings["decoder"].parameters()]:
        parameter.data.normal_()
    after = model(x, 100.0)
    for name in model.latent_names:
        assert torch.equal(before["latents"][name], after["latents"][name])
        assert torch.equal(before["log_likelihoods"][name], after["log_likelihoods"][name])
    assert not torch.allclose(before["x_hat"], after["x_hat"])


def test_first_prior_is_the_same_everywhere(lively):
    phases = lively("hierarchical-tiny").begin(200, 130, 50.0)
    mean, index = phases.prior(0)
    assert (mean == mean[..., :1, :1]).all() and (index == index[..., :1, :1]).all()


@pytest.mark.parametrize("place", range(4))
def test_every_latent_matters_to_those_after_it_and_to_the_image(lively, images, place):
    model, x = lively("hierarchical-tiny"), images(1, 64, 64)
    latents = list(model(x, 100.0)["latents"].values())
    image = model.reconstruct(latents, 100.0, (64, 64))
    phases, changed = (model.begin(64, 64, 100.0) for _ in range(2))
    for i in range(phases.count):
        (mean, _), (other, _) = phases.prior(i), changed.prior(i)
        assert torch.equal(mean, other) == (i <= place)
        symbols = (latents[i] - mean).round().int()
        phases.feed(i, symbols)
        changed.feed(i, symbols + (3 if i == place else 0))
    assert torch.allclose(phases.image(), image.clamp(0, 1), atol=1e-4)
    assert not torch.allclose(changed.image(), phases.image(), atol=1e-4)


def test_config_says_what_does_not_fit():
    with pytest.raises(FastcilError, match="latents"):
        HierarchicalConfig(latents=(1, 2, 3))
    with pytest.raises(FastcilError, match="odd"):
        HierarchicalConfig(kernels=(7, 7, 6, 5, 3))
