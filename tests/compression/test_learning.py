"""Losses against their equations, what each strategy may change, and what training is made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastcil.compression import (
    CodecLearner,
    CodecModel,
    CodecRecipe,
    CodecTraining,
    build_codec,
    draw_lambdas,
    entropy_hash,
    lambda_range,
)
from fastcil.compression.codec import ImageCodec
from fastcil.compression.training import is_trained_for
from fastcil.contract import Batch
from fastcil.data import Examples, ImageStore, read_batch
from fastcil.errors import FastcilError

TRAINED = {
    "enc": {"encoder", "posteriors"},
    "enc-dec": {"encoder", "posteriors", "decoder"},
    "kr": {"encoder", "posteriors", "decoder"},
    "all": {"encoder", "posteriors", "entropy", "decoder"},
}

COMPRESSAI = (0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483, 0.0932, 0.1800)


def training(strategy: str = "kr", **changes: Any) -> CodecTraining:
    recipe = CodecRecipe(epochs=1, lr=1e-3, batch_size=4)
    return CodecTraining(recipe, epoch_steps=1, size=64, strategy=strategy, **changes)


def examples(count: int, seed: int = 0, side: int = 80) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).byte().permute(0, 2, 3, 1).contiguous()
    return Examples(ImageStore.from_batch(pixels), torch.zeros(count, dtype=torch.int64))


class Steps:
    """Steps an optimiser as the trainer does, without one."""

    lr = 1e-3

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.optimizer = torch.optim.Adam(parameters, lr=self.lr)

    def update(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def step(learner: CodecLearner, new: torch.Tensor, old: torch.Tensor | None, times: int) -> None:
    """Trains on the same batches some times."""
    replayed = None if old is None else examples(len(old))
    stage = learner.stage(examples(4), replayed)
    stepper = Steps(list(stage.parameters()))
    for _ in range(times):
        batches = [labelled(images) for images in (new, old) if images is not None]
        stage.step(batches, stepper)


def labelled(images: torch.Tensor) -> Batch:
    zeros = torch.zeros(len(images), dtype=torch.int64)
    return Batch(images, zeros, zeros, zeros)


def naive_error(x_hat: torch.Tensor, x: torch.Tensor) -> float:
    """MSE of one image on the -1..1 scale, in float64."""
    a, b = (2 * image.detach().double().numpy() - 1 for image in (x_hat, x))
    return float(np.square(a - b).sum() / a.size)


@pytest.mark.parametrize(("name", "alpha"), [("hierarchical-tiny", 0.25), ("msh-vr", 0.5)])
def test_the_loss_is_that_of_the_equations(
    lively: Callable[[str], CodecModel],
    images: Callable[..., torch.Tensor],
    name: str,
    alpha: float,
) -> None:
    model = lively(name)
    config = training(alpha=alpha, lambda_range=(32.0, 4096.0))
    # So that the new decoder isn't the old one.
    learner = CodecLearner(copy.deepcopy(model), config, seed=3)
    step(learner, images(3, 64, 64), images(1, 64, 64), times=1)
    x, old_x = images(2, 64, 128), images(2, 64, 64)
    twin = torch.Generator()
    twin.set_state(learner.generator.get_state())
    losses = learner.losses(x, old_x)

    # The order of draws: rates of the new images, noise of each latent, rates of the old images.
    cube = [32 ** (1 / 3), 4096 ** (1 / 3)]
    luck = torch.rand(2, generator=twin, dtype=torch.float64)
    rates = ((cube[0] + luck * (cube[1] - cube[0])) ** 3).float()
    out = learner.model(x, rates, generator=twin)
    bits = [
        -sum(float(p[b].detach().double().log2().sum()) for p in out["likelihoods"].values())
        for b in range(2)
    ]
    bpp = sum(bits) / (64 * 128) / 2
    distortion = sum(float(rates[b]) * naive_error(out["x_hat"][b], x[b]) for b in range(2)) / 2
    cube = [32 ** (1 / 3), 1024 ** (1 / 3)]
    luck = torch.rand(2, generator=twin, dtype=torch.float64)
    old_rates = ((cube[0] + luck * (cube[1] - cube[0])) ** 3).float()
    replay = 0.0
    for b in range(2):
        # The walk of a real bitstream, by the model as it was.
        phases = model.begin(64, 64, float(old_rates[b]))
        features = model.features(old_x[b : b + 1], float(old_rates[b]))
        for i in range(phases.count):
            phases.prior(i)
            phases.feed(i, phases.quantise(i, features))
        latents = [z.float() for z in phases.latents]
        x_hat = learner.model.reconstruct(latents, float(old_rates[b]), (64, 64))
        replay += float(old_rates[b]) * naive_error(x_hat[0], old_x[b]) / 2

    assert list(losses) == ["bpp", "distortion", "replay"]
    assert losses["bpp"].item() == pytest.approx((1 - alpha) * bpp, rel=1e-4)
    assert losses["distortion"].item() == pytest.approx((1 - alpha) * distortion, rel=1e-4)
    assert losses["replay"].item() == pytest.approx(alpha * replay, rel=1e-3)


@pytest.mark.parametrize("strategy", ["enc", "enc-dec", "kr", "all"])
@pytest.mark.parametrize("name", ["hierarchical-tiny", "msh-vr"])
def test_a_strategy_changes_its_parts_and_no_other(
    lively: Callable[[str], CodecModel],
    images: Callable[..., torch.Tensor],
    name: str,
    strategy: str,
) -> None:
    model = lively(name)
    photo = (images(1, 70, 64)[0].permute(1, 2, 0) * 255).byte()
    stream = ImageCodec(model).encode(photo, lmbda=200.0)
    pixels = ImageCodec(model).decode(stream)
    before = {
        part: [m.state_dict() for m in ms] for part, ms in copy.deepcopy(model).parts().items()
    }
    known = entropy_hash(model)

    learner = CodecLearner(model, training(strategy, ema=0.5), seed=0)
    step(learner, images(2, 64, 64), images(2, 64, 64) if strategy == "kr" else None, times=2)
    for made in (learner.model, learner.result):
        changed = {
            part
            for part, modules in made.parts().items()
            for module, values in zip(modules, before[part], strict=True)
            if any(not torch.equal(v, values[k]) for k, v in module.state_dict().items())
        }
        assert changed == TRAINED[strategy] & before.keys()
        assert (entropy_hash(made) == known) == (strategy != "all")
        codec = ImageCodec(made.eval())
        if strategy == "all":
            with pytest.raises(FastcilError, match="was coded with the entropy model"):
                codec.verify(stream)
        else:
            # Every symbol is the encoder's, or this raises.
            codec.verify(stream)
            assert torch.equal(codec.decode(stream), pixels) == (strategy == "enc")


def test_replay_keeps_old_streams_better_than_none(
    lively: Callable[[str], CodecModel], images: Callable[..., torch.Tensor]
) -> None:
    new, old = 1 - 0.3 * images(2, 64, 64), images(2, 64, 65)[..., :64]
    drift = {}
    for strategy in ("enc-dec", "kr"):
        model = lively("hierarchical-tiny")
        with torch.no_grad():
            out = model(old, 200.0)
        learner = CodecLearner(model, training(strategy), seed=1)
        step(learner, new, old if strategy == "kr" else None, times=8)
        with torch.no_grad():
            again = learner.model.reconstruct(list(out["latents"].values()), 200.0, (64, 64))
        drift[strategy] = float((again - old).square().mean())
    assert drift["kr"] < drift["enc-dec"]


def test_replay_may_aim_at_what_the_old_decoder_made(
    lively: Callable[[str], CodecModel], images: Callable[..., torch.Tensor]
) -> None:
    x = images(2, 64, 64)
    losses = {}
    for target in ("originals", "outputs"):
        learner = CodecLearner(lively("msh-vr"), training(target=target), seed=0)
        losses[target] = learner.losses(None, x)["replay"].item()
    # The new decoder is still the old one, which overshoots 0..1 a little where it isn't clamped.
    assert losses["outputs"] < 0.1 * losses["originals"]
    moved = CodecLearner(lively("msh-vr"), training(target="outputs", alpha=1.0), seed=0)
    with torch.no_grad():
        for parameter in moved.model.decoder.parameters():
            parameter.mul_(1.1)
    twin = torch.Generator().manual_seed(0)
    rates = draw_lambdas(2, (32.0, 1024.0), twin)
    with torch.no_grad():
        out = moved.old(x, rates)
        x_hat = moved.model.reconstruct(list(out["latents"].values()), rates, (64, 64))
    naive = sum(float(rates[b]) * naive_error(x_hat[b], out["x_hat"][b]) for b in range(2)) / 2
    assert moved.losses(None, x)["replay"].item() == pytest.approx(naive, rel=1e-4)


@pytest.mark.parametrize("target", ["originals", "outputs"])
def test_the_old_decoder_runs_only_where_it_is_the_target(
    lively: Callable[[str], CodecModel],
    images: Callable[..., torch.Tensor],
    target: str,
) -> None:
    learner = CodecLearner(lively("hierarchical-tiny"), training(target=target), seed=0)
    runs = []
    learner.old.decoder.register_forward_hook(lambda *_: runs.append(1))
    learner.losses(images(1, 64, 64), images(2, 64, 64))
    assert len(runs) == (target == "outputs")


@pytest.mark.parametrize("name", ["hierarchical-tiny", "msh-vr"])
def test_quantised_latents_are_those_of_the_whole_pass(
    lively: Callable[[str], CodecModel], images: Callable[..., torch.Tensor], name: str
) -> None:
    model, x = lively(name), images(2, 50, 70)
    with torch.no_grad():
        wanted = model(x, 100.0)["latents"]
    # In training too: what is replayed carries no noise.
    found = model.train().quantised(x, 100.0)
    assert all(torch.equal(z, wanted[k]) for k, z in zip(wanted, found, strict=True))


def test_a_larger_range_rescales_the_learning_embeddings_once(
    lively: Callable[[str], CodecModel],
) -> None:
    model = lively("hierarchical-tiny")
    before = copy.deepcopy(model.embeddings)
    learner = CodecLearner(model, training("kr", lambda_range=(4.0, 4096.0)), seed=0)
    for part, embedding in learner.model.embeddings.items():
        grown = part != "entropy"
        assert embedding.range.tolist() == ([4, 4096] if grown else [32, 1024])
        for layer, factor in (("first", 1024 / 4096), ("last", 4 / 32)):
            weight, was = (getattr(e, layer).weight for e in (embedding, before[part]))
            assert torch.allclose(weight, was * (factor if grown else 1), rtol=1e-6, atol=0)
    assert (learner.old_range, learner.new_range) == ((32, 1024), (4, 4096))
    assert lambda_range(learner.old) == (32, 1024) and lambda_range(learner.result) == (4, 4096)
    # The new range is the model's own the next time.
    again = CodecLearner(learner.result, training("enc-dec"), seed=0)
    assert again.new_range == (4, 4096)
    with pytest.raises(FastcilError, match=r"lambda_range is \(4, 1024\); it must contain"):
        CodecLearner(learner.result, training("enc", lambda_range=(4, 1024)), seed=0)


def test_a_decoder_that_stood_still_grows_from_its_own_range(
    lively: Callable[[str], CodecModel],
) -> None:
    model = lively("hierarchical-tiny")
    encoder_alone = CodecLearner(model, training("enc", lambda_range=(32.0, 4096.0)), seed=0)
    ranges = {k: e.range.tolist() for k, e in encoder_alone.model.embeddings.items()}
    assert ranges["encoder"] == [32, 4096] and ranges["decoder"] == [32, 1024]
    before = encoder_alone.result.embeddings["decoder"].first.weight.clone()
    both = CodecLearner(encoder_alone.result, training("kr"), seed=0)
    ranges = {k: e.range.tolist() for k, e in both.model.embeddings.items()}
    assert ranges["encoder"] == ranges["decoder"] == [32, 4096] and ranges["entropy"] == [32, 1024]
    assert torch.equal(both.model.embeddings["decoder"].first.weight, before / 4)


def test_where_all_is_replayed_a_pass_may_end_in_a_shorter_batch(
    lively: Callable[[str], CodecModel], images: Callable[..., torch.Tensor]
) -> None:
    learner = CodecLearner(lively("hierarchical-tiny"), training(alpha=1.0), seed=0)
    store = ImageStore.from_images((255 * x).byte().permute(1, 2, 0) for x in images(3, 64, 64))
    replay = Examples(store, torch.zeros(3, dtype=torch.int64))
    stage = learner.stage(replay, replay)
    count = learner.config.recipe.batch_size
    for size in (count, 1):
        shown = images(size, 64, 64)
        zeros = torch.zeros(size, dtype=torch.int64)
        losses = stage.objective(Batch(shown, zeros, zeros, zeros, zeros))
        assert set(losses) == {"replay"} and losses["replay"].isfinite()


def test_a_model_of_one_rate_learns_one() -> None:
    with pytest.raises(FastcilError, match="hyperprior has one rate, so give one λ twice"):
        CodecLearner(build_codec("msh", hidden=4, latent=4), training("all"), seed=0)
    model = build_codec("msh", hidden=4, latent=4, lambda_range=(100.0, 100.0))
    assert CodecLearner(model, training("kr"), seed=0).new_range == (100, 100)


# CompressAI's λ of its eight qualities on the scale of this package, and others.
RATES = [*(lmbda * 255**2 / 4 for lmbda in COMPRESSAI), 29.26125, 0.1, 1 / 3, 1e-30, 1e30]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("strategy", ["all", "enc", "kr"])
def test_a_model_of_any_one_rate_learns_it(rate: float, strategy: str) -> None:
    model = build_codec("msh", hidden=4, latent=4, lambda_range=(rate, rate))
    kept = (float(np.float32(rate)),) * 2
    for given in (None, (rate, rate), kept):
        learner = CodecLearner(model, training(strategy, lambda_range=given), seed=0)
        assert learner.old_range == learner.new_range == lambda_range(model) == kept
        drawn = draw_lambdas(100, learner.new_range, learner.generator)
        assert (drawn == kept[0]).all()


@pytest.mark.parametrize("limits", [(29.26125, 785.2), (0.1, 0.7), (1 / 3, 1e5 / 3)])
def test_a_range_contains_itself(limits: tuple[float, float]) -> None:
    for name in ("msh-vr", "gma-vr"):
        small = {"msh-vr": {"latent": 4}, "gma-vr": {"parameters": 4}}[name]
        model = build_codec(name, hidden=4, embedding=4, lambda_range=limits, **small)
        weights = copy.deepcopy(model.embeddings.state_dict())
        learner = CodecLearner(model, training("kr", lambda_range=limits), seed=0)
        assert learner.new_range == learner.old_range == lambda_range(learner.result)
        assert all(torch.equal(v, weights[k]) for k, v in model.embeddings.state_dict().items())
        assert all(is_trained_for(model, rate) for rate in limits)
        assert not any(is_trained_for(model, rate) for rate in (0.999 * limits[0], 1e6))
        with pytest.raises(FastcilError, match="it must contain the range"):
            inner = (limits[0] * 1.001, limits[1])
            CodecLearner(model, training("kr", lambda_range=inner), seed=0)


@pytest.mark.parametrize("limits", [(32.0, 1024.0), (4.0, 1024.0), (7.0, 7.0)])
def test_the_cube_root_of_lambda_is_uniform(limits: tuple[float, float]) -> None:
    drawn = draw_lambdas(20_000, limits, torch.Generator().manual_seed(5))
    assert drawn.dtype == torch.float32 and drawn.min() >= limits[0] and drawn.max() <= limits[1]
    assert torch.equal(drawn, draw_lambdas(20_000, limits, torch.Generator().manual_seed(5)))
    if limits[0] < limits[1]:
        roots = drawn.double() ** (1 / 3)
        low, high = (limit ** (1 / 3) for limit in limits)
        ranks = ((roots - low) / (high - low)).sort().values
        gap = (ranks - torch.arange(20_000) / 20_000).abs().max()
        assert gap < 1.95 / math.sqrt(20_000)  # Kolmogorov and Smirnov, at a level of 0.1 %


def test_the_average_is_the_recurrence_with_its_ramp(
    lively: Callable[[str], CodecModel], images: Callable[..., torch.Tensor]
) -> None:
    learner = CodecLearner(lively("msh-vr"), training("all", ema=0.9, ema_ramp=3.0), seed=0)
    expected: dict[str, torch.Tensor] = {}
    for t in range(5):
        step(learner, images(1, 64, 64), None, times=1)
        decay = 0.9 * (1 - math.exp(-t / 3.0))
        for name, value in learner.model.named_parameters():
            before = expected.get(name, value.detach().double())
            expected[name] = decay * before + (1 - decay) * value.detach().double()
    for name, value in learner.result.named_parameters():
        assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-7), name
    assert learner.result is not learner.model and not learner.result.training


@pytest.mark.parametrize(
    ("alpha", "sizes"), [(0.25, [3, 1]), (0.5, [2, 2]), (0.75, [1, 3]), (1.0, [4]), (0.01, [3, 1])]
)
def test_alpha_divides_the_batch(
    lively: Callable[[str], CodecModel], alpha: float, sizes: list[int]
) -> None:
    learner = CodecLearner(lively("msh-vr"), training(alpha=alpha), seed=0)
    new, old = examples(8), examples(9)
    stage = learner.stage(new, old)
    assert [stream.batch_size for stream in stage.streams] == sizes
    assert stage.streams[-1].parts[0] is old
    assert stage.streams[0].parts[0] is (old if alpha == 1 else new)
    names = list(stage.objective(labelled(torch.rand(4, 3, 64, 64))))
    assert names == (["replay"] if alpha == 1 else ["bpp", "distortion", "replay"])


def test_images_are_read_as_they_are() -> None:
    photos = examples(3, side=64).images
    augmentation = CodecLearner(make_tiny(), training("all"), seed=0).augmentation
    generator = torch.Generator().manual_seed(0)
    crops, flips = augmentation.draw(photos.sizes, generator)
    program = augmentation.program(3, generator)
    where = (torch.zeros(3, dtype=torch.int64), torch.arange(3))
    got = read_batch([photos], *where, augmentation, crops, flips, None, program)
    for k in range(3):
        wanted = photos.image(k).permute(2, 0, 1).float() / 255
        assert torch.allclose(got[k], wanted.flip(2) if flips[k] else wanted, atol=1e-6)


def make_tiny() -> CodecModel:
    return build_codec("msh-vr", hidden=4, latent=4, embedding=4)


def test_state_puts_everything_back(
    lively: Callable[[str], CodecModel], images: Callable[..., torch.Tensor]
) -> None:
    x, old = images(2, 64, 64), images(2, 64, 128)[..., :64]

    def fresh() -> CodecLearner:
        return CodecLearner(lively("msh-vr"), training(ema=0.9, lambda_range=(4.0, 1024.0)), seed=7)

    learner = fresh()
    step(learner, x, old, times=2)
    state = copy.deepcopy(learner.state())
    other = fresh()
    other.load_state(state)
    for one in (learner, other):
        step(one, x, old, times=2)
    for a, b in zip(learner.state().values(), other.state().values(), strict=True):
        if isinstance(a, dict):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("strategy", "replay", "says"),
    [
        ("kr", None, "replay is None with the strategy 'kr'; 'kr' needs old images"),
        ("enc", 4, "replay is given with the strategy 'enc'"),
        ("kr", 0, "replay has no image"),
    ],
)
def test_replay_and_strategy_must_agree(strategy: str, replay: int | None, says: str) -> None:
    learner = CodecLearner(make_tiny(), training(strategy), seed=0)
    old = None if replay is None else Examples(examples(4).images, torch.zeros(4).long())
    old = old.select(torch.arange(replay)) if old is not None else None
    with pytest.raises(FastcilError, match=says):
        learner.stage(examples(2), old)
    with pytest.raises(FastcilError, match="examples has no image"):
        CodecLearner(make_tiny(), training("all"), seed=0).stage(
            examples(2).select(torch.arange(0))
        )
