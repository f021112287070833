"""Latents of stored streams: the right ones, cut at one place, replayed as the equation says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("constriction")

from fastcil.compression import CodecLearner, CodecModel, CodecRecipe, CodecTraining, StoredLatents
from fastcil.compression.bitstream import Bitstream
from fastcil.compression.codec import ImageCodec
from fastcil.compression.errors import BitstreamError
from fastcil.data import Examples, ImageStore
from fastcil.errors import FastcilError

Build = Callable[[str], CodecModel]
Draw = Callable[..., Tensor]
SIZES, RATES = [(64, 64), (130, 70), (64, 200), (129, 65)], [32.0, 900.0, 100.0, 50.5]
NAMES = ["hierarchical-tiny", "msh-vr", "gma-vr"]


def streams_of(model: CodecModel, images: Draw, sizes: list[tuple[int, int]]) -> list[Bitstream]:
    codec = ImageCodec(model)
    return [
        codec.encode_streams([(images(1, *size)[0].permute(1, 2, 0) * 255).byte()], rate)[0]
        for size, rate in zip(sizes, RATES, strict=False)
    ]


def training(**changes: Any) -> CodecTraining:
    recipe = CodecRecipe(epochs=1, lr=1e-3, batch_size=4)
    return CodecTraining(
        recipe, **{"epoch_steps": 1, "size": 64, "strategy": "kr", "target": "outputs", **changes}
    )


def whole(model: CodecModel, stream: Bitstream) -> list[Tensor]:
    """All latents of one stream, by the walk of a decoder."""
    ((_, latents),) = ImageCodec(model).latents_of_streams([stream])
    return [z[0] for z in latents]


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_those_that_were_coded(lively: Build, images: Draw, name: str) -> None:
    model = lively(name)
    (stream,) = streams_of(model, images, [(64, 100)])
    x = (images(1, 64, 100) * 255).byte().float() / 255
    with torch.no_grad():
        wanted = model(x, RATES[0])["latents"].values()
    for z, its in zip(whole(model, stream), wanted, strict=True):
        # In float64 here, and there in float32, where one in many may be rounded the other way.
        assert ((z - its[0]).abs() > 1e-3).float().mean() < 0.01


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_windows_are_cut_at_one_place(lively: Build, images: Draw, name: str, side: int) -> None:
    model = lively(name)
    sizes = SIZES if side == 64 else [(130, 100), (128, 300)]
    streams = streams_of(model, images, sizes)
    stored = StoredLatents.decode(ImageCodec(model), streams)
    assert len(stored) == len(streams)
    assert stored.nbytes == sum(z.nbytes for s in streams for z in whole(model, s))
    known = [whole(model, stream) for stream in streams]
    generator = torch.Generator().manual_seed(3)
    twin = torch.Generator().manual_seed(3)
    latents, rates = stored.draw(50, side, generator)
    which = torch.randint(len(streams), (50,), generator=twin)
    luck = torch.rand(50, 2, generator=twin, dtype=torch.float64)
    seen = set()
    for b, k in enumerate(which.tolist()):
        padded = model.padded(*sizes[k])
        top, left = (int(luck[b, d] * ((padded[d] - side) // 64 + 1)) * 64 for d in (0, 1))
        seen.add((k, top, left))
        assert rates[b] == RATES[k]
        for z, found, stride in zip(known[k], latents, model.latent_strides, strict=True):
            y, x, s = top // stride, left // stride, side // stride
            assert torch.equal(found[b], z[:, y : y + s, x : x + s])
    # Other places than the first of each stream are among them.
    assert len(seen) > len(streams)


@pytest.mark.parametrize("name", ["hierarchical-tiny", "msh-vr"])
def test_the_loss_is_that_of_the_equation(lively: Build, images: Draw, name: str) -> None:
    model = lively(name)
    old = copy.deepcopy(model)
    stored = StoredLatents.decode(ImageCodec(model), streams_of(model, images, SIZES))
    learner = CodecLearner(model, training(alpha=0.75, lambda_range=(4.0, 4096.0)), seed=5)
    x = images(1, 64, 64)
    twin = torch.Generator()
    twin.set_state(learner.generator.get_state())
    twin_learner = CodecLearner(copy.deepcopy(old), training(lambda_range=(4.0, 4096.0)), seed=0)
    twin_learner.generator = twin
    plain = twin_learner.losses(x, None)
    with torch.no_grad():
        for parameter in learner.model.decoder.parameters():
            parameter.mul_(1.05)
    losses = learner.losses(x, None, stored)
    latents, rates = stored.draw(3, 64, twin)
    naive = 0.0
    with torch.no_grad():
        for b in range(3):
            z = [latent[b : b + 1] for latent in latents]
            wanted = old.reconstruct(z, float(rates[b]), (64, 64)).clamp(0, 1)
            found = learner.model.reconstruct(z, float(rates[b]), (64, 64))
            error = (2 * found.double() - 2 * wanted.double()).square().mean()
            naive += float(rates[b]) * float(error) / 3
    assert losses["replay"].item() == pytest.approx(0.75 * naive, rel=1e-4)
    assert losses["bpp"].item() == pytest.approx(0.25 * plain["bpp"].item(), rel=1e-5)


def test_an_unchanged_decoder_loses_next_to_nothing(lively: Build, images: Draw) -> None:
    """What the old decoder overshoots 0..1, which its pixels can't show."""
    model = lively("msh-vr")
    stored = StoredLatents.decode(ImageCodec(model), streams_of(model, images, SIZES))
    learner = CodecLearner(model, training(), seed=0)
    assert learner.losses(None, None, stored)["replay"] < 1e-2


def test_what_cannot_be_replayed_is_refused(lively: Build, images: Draw) -> None:
    model = lively("msh-vr")
    streams = streams_of(model, images, SIZES)
    stored = StoredLatents.decode(ImageCodec(model), streams)
    store = ImageStore.from_batch(torch.zeros(4, 64, 64, 3, dtype=torch.uint8))
    new = Examples(store, torch.zeros(4, dtype=torch.int64))
    for changes, says in (
        ({"target": "originals"}, "target is 'originals', which stored streams don't hold"),
        ({"alpha": 1.0}, "alpha is 1.0, which leaves no new image in a batch of 4"),
        ({"size": 128}, "size is 128, and a stored stream's shorter side is 64"),
        ({"strategy": "enc"}, "replay is given with the strategy 'enc'"),
    ):
        learner = CodecLearner(copy.deepcopy(model), training(**changes), seed=0)
        with pytest.raises(FastcilError, match=says):
            learner.stage(new, stored)
    stage = CodecLearner(copy.deepcopy(model), training(), seed=0).stage(new, stored)
    assert [(s.parts, s.batch_size) for s in stage.streams] == [((new,), 2)]
    with pytest.raises(FastcilError, match="side is 65; it must be a multiple of 64 up to 64"):
        stored.draw(1, 65, torch.Generator())
    with pytest.raises(FastcilError, match="side is 128"):
        stored.draw(1, 128, torch.Generator())
    with pytest.raises(FastcilError, match="streams is empty"):
        StoredLatents.decode(ImageCodec(model), [])
    with torch.no_grad():
        next(model.entropy.parameters()).add_(0.1)
    with pytest.raises(BitstreamError, match="coded with the entropy model"):
        StoredLatents.decode(ImageCodec(model), streams)
