"""What all learned codecs share: forward, objective, freezing, ranges of λ, hash."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastcil.compression.model import TRAINED, entropy_hash
from fastcil.compression.objective import rate_distortion
from fastcil.compression.zoo import CODECS, build_codec, build_model
from fastcil.errors import FastcilError

NAMES = ["hierarchical-tiny", "msh-vr", "msh", "gma-vr", "gma"]
CONDITIONED = ["hierarchical-tiny", "msh-vr", "gma-vr"]
SIDES = [(1, 1), (2, 65), (64, 64), (70, 33)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sides", SIDES)
def test_shapes_at_any_side(lively, images, name, sides):
    model, x = lively(name), images(2, *sides)
    with torch.no_grad():
        out = model(x, torch.tensor([40.0, 900.0]))
    assert out["x_hat"].shape == x.shape
    assert float(out["x_hat"].min()) >= 0 and float(out["x_hat"].max()) <= 1
    shapes = dict(zip(model.latent_names, model.latent_shapes(*sides), strict=True))
    assert list(out["likelihoods"]) == list(model.latent_names)
    for key, shape in shapes.items():
        assert out["latents"][key].shape == (2, *shape)
        likelihood = out["likelihoods"][key]
        assert likelihood.shape == (2, *shape)
        assert float(likelihood.min()) >= 0 and float(likelihood.max()) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_padding_repeats_the_edge(lively, images, name):
    model, x = lively(name), images(1, 40, 50)
    framed = F.pad(x, (0, 14, 0, 24), mode="replicate")
    small, large = model(x, 100.0), model(framed, 100.0)
    torch.testing.assert_close(small["x_hat"], large["x_hat"][..., :40, :50])


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_batch_are_independent(lively, images, name):
    model, x = lively(name), images(3, 64, 64)
    rates = torch.tensor([32.0, 200.0, 1000.0])
    together = model(x, rates)
    for b in range(3):
        alone = model(x[b : b + 1], float(rates[b]))
        torch.testing.assert_close(alone["x_hat"][0], together["x_hat"][b], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONDITIONED)
@pytest.mark.parametrize("part", ["encoder", "entropy", "decoder"])
def test_every_part_is_told_lambda(lively, images, name, part):
    model, x = lively(name), images(1, 64, 64)
    if part != "encoder" or name != "hierarchical-tiny":
        for parameter in model.embeddings[part].parameters():
            parameter.data.mul_(30)
    before = model(x, 40.0)
    other = torch.tensor([900.0])
    embedding = copy.deepcopy(model.embeddings[part])
    model.embeddings[part].register_forward_pre_hook(lambda *_: (other,))
    after = model(x, 40.0)
    assert not torch.equal(embedding(other), embedding(torch.tensor([40.0])))
    changed = {
        "encoder": not torch.equal(_latents(before), _latents(after)),
        "entropy": not torch.equal(_logs(before), _logs(after)),
        "decoder": not torch.equal(before["x_hat"], after["x_hat"]),
    }
    assert changed[part]


def _latents(out):
    return torch.cat([z.flatten() for z in out["latents"].values()])


def _logs(out):
    return torch.cat([log.flatten() for log in out["log_likelihoods"].values()])


@pytest.mark.parametrize("name", NAMES)
def test_noise_of_training(lively, images, name):
    model, x = lively(name).train(), images(2, 64, 64)
    outs = [model(x, 100.0, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(_latents(outs[0]), _latents(outs[1]))
    assert torch.equal(outs[0]["x_hat"], outs[1]["x_hat"])
    assert not torch.equal(_latents(outs[0]), _latents(outs[2]))
    # The first latent does not depend on the noise of another.
    first = model.latent_names[0]
    rest = outs[0]["latents"][first] - outs[2]["latents"][first]
    assert 0 < float(rest.detach().abs().max()) < 1
    torch.manual_seed(5)
    a = _latents(model(x, 100.0))
    torch.manual_seed(5)
    assert torch.equal(a, _latents(model(x, 100.0)))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_and_are_finite(lively, images, name):
    model, x = lively(name).train(), images(2, 70, 64)
    rates = torch.tensor([40.0, 900.0])
    model.loss(model(x, rates), x, rates)["loss"].backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_objective_is_its_equation():
    torch.manual_seed(0)
    x, x_hat = torch.rand(3, 3, 4, 6).double(), torch.rand(3, 3, 4, 6).double()
    likelihoods = {"z": torch.rand(3, 2, 1, 1).double(), "y": torch.rand(3, 4, 2, 2).double()}
    out = {"x_hat": x_hat, "log_likelihoods": {k: v.log() for k, v in likelihoods.items()}}
    rates = torch.tensor([32.0, 100.0, 1024.0])
    found = rate_distortion(out, x, rates)
    bpp = distortion = mse = 0.0
    for b in range(3):
        bits = -sum(float(v[b].log2().sum()) for v in likelihoods.values())
        bpp += bits / 24 / 3
        error = float(((2 * x_hat[b] - 1) - (2 * x[b] - 1)).square().mean())
        mse += error / 3
        distortion += float(rates[b]) * error / 3
    expected = {"loss": bpp + distortion, "bpp": bpp, "distortion": distortion, "mse": mse}
    for key, value in expected.items():
        assert float(found[key]) == pytest.approx(value, rel=1e-5)


def test_lambda_in_compressai_s_terms():
    """CompressAI: lmbda * 255^2 * MSE(0..1) + bpp; its 0.0018 is 29 here, its 0.0483 is 785."""
    x = torch.rand(1, 3, 8, 8)
    out = {"x_hat": torch.rand(1, 3, 8, 8), "log_likelihoods": {"y": torch.zeros(1, 1)}}
    for theirs, ours in ((0.0018, 29), (0.0483, 785)):
        exact = theirs * 255**2 / 4
        assert round(exact) == ours
        found = rate_distortion(out, x, torch.tensor([exact]))["distortion"]
        expected = theirs * 255**2 * float((out["x_hat"] - x).square().mean())
        assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", list(TRAINED))
def test_freezing(lively, images, name, strategy):
    model, x = lively(name), images(1, 64, 64)
    learning = model.trainable(strategy)
    model.train()
    digest, old = entropy_hash(model), copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(learning, lr=1.0)
    model.loss(model(x, 100.0), x, 100.0)["loss"].backward()
    optimiser.step()
    for part, modules in model.parts().items():
        for module in modules:
            learns = part in TRAINED[strategy]
            assert module.training == learns
            assert all(p.requires_grad == learns for p in module.parameters())
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, old[key])}
    prefixes = tuple(
        prefix for part in TRAINED[strategy] for prefix in (f"{part}.", f"embeddings.{part}.")
    )
    assert moved and all(key.startswith(prefixes) for key in moved)
    for part in TRAINED[strategy]:
        owned = (f"{part}.", f"embeddings.{part}.")
        assert not hasattr(model, part) or any(key.startswith(owned) for key in moved)
    assert (entropy_hash(model) == digest) == (strategy != "all")
    model.trainable("all")
    assert all(p.requires_grad for p in model.parameters()) and model.entropy.training


@pytest.mark.parametrize("name", CONDITIONED)
def test_a_range_grows_in_the_parts_that_learn(lively, images, name):
    model, x = lively(name), images(1, 64, 64)
    old, digest = copy.deepcopy(model.state_dict()), entropy_hash(model)
    model.trainable("kr")
    model.rescale_embeddings((4.0, 4096.0))
    assert entropy_hash(model) == digest
    for part, factor in (("encoder", 0.25), ("decoder", 0.25), ("entropy", 1.0)):
        last = 0.125 if name == "hierarchical-tiny" and part != "entropy" else 1.0
        mlp = model.embeddings[part]
        assert torch.equal(mlp.first.weight, old[f"embeddings.{part}.first.weight"] * factor)
        assert torch.equal(mlp.last.weight, old[f"embeddings.{part}.last.weight"] * last)
        grown = [4.0, 4096.0] if part != "entropy" else [32.0, 1024.0]
        assert mlp.range.tolist() == grown
    for given, known in ((4.0, 32.0), (4096.0, 1024.0)):
        rates = [model.embed("entropy", torch.tensor([v])) for v in (given, known)]
        assert torch.equal(*rates)
        other = [model.embed("decoder", torch.tensor([v])) for v in (given, known)]
        assert not torch.equal(*other)
    grown = copy.deepcopy(model.state_dict())
    model.rescale_embeddings((4.0, 4096.0))
    assert all(torch.equal(value, grown[name]) for name, value in model.state_dict().items())
    with pytest.raises(FastcilError, match=r"contain the range so far, \(4.0, 4096.0\)"):
        model.rescale_embeddings((32.0, 1024.0))
    assert model(x, 4096.0)["x_hat"].isfinite().all()


def test_one_rate_has_no_range_to_grow(lively):
    with pytest.raises(FastcilError, match="depends on λ"):
        lively("msh").rescale_embeddings((4.0, 4096.0))


@pytest.mark.parametrize("name", NAMES)
def test_reconstruction_of_known_latents(lively, images, name):
    model, x = lively(name), images(2, 50, 70)
    out = model(x, 100.0)
    again = model.reconstruct(list(out["latents"].values()), 100.0, (50, 70))
    torch.testing.assert_close(again.clamp(0, 1), out["x_hat"], atol=1e-6, rtol=0)
    model.trainable("kr")
    again.square().sum().backward()
    graph = model.reconstruct([z.detach() for z in out["latents"].values()], 100.0, (50, 70))
    model.zero_grad()
    graph.square().sum().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())


@pytest.mark.parametrize("name", ["hierarchical-tiny", "msh-vr"])
def test_hash_is_of_all_that_symbols_depend_on(lively, name):
    model = lively(name)
    digest = entropy_hash(model)
    assert len(digest) == 64 and entropy_hash(copy.deepcopy(model)) == digest
    for module in model.parts()["entropy"]:
        for tensor in module.state_dict().values():
            kept = tensor.clone()
            tensor.view(-1)[-1] += 1e-3 if tensor.is_floating_point() else 1
            assert entropy_hash(model) != digest
            tensor.copy_(kept)
    for module in (model.encoder, model.decoder, model.embeddings["decoder"]):
        next(module.parameters()).data.add_(1)
    assert entropy_hash(model) == digest
    structure = {**model.structure(), "entropy_dtype": "float32"}
    other = build_model(structure)
    other.load_state_dict(model.state_dict())
    assert entropy_hash(other) != digest


@pytest.mark.parametrize("name", ["hierarchical-tiny", "msh-vr"])
def test_torch_averages_the_weights(lively, images, name):
    """What pre-training needs of an exponential moving average is torch's own."""
    model, x = lively(name), images(1, 64, 64)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(model)
    old = {key: value.clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    averaged.update_parameters(model)
    for key, value in averaged.module.named_parameters():
        torch.testing.assert_close(value, old[key] + 0.0025)
    assert entropy_hash(averaged.module) != entropy_hash(model)
    assert averaged.module.begin(64, 64, 100.0).count == len(model.latent_names)
    assert averaged(x, 100.0)["x_hat"].shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_structure_survives_json(lively, name):
    model = lively(name)
    again = build_model(json.loads(json.dumps(model.structure())))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config and type(again) is type(model)
    assert entropy_hash(again) == entropy_hash(model)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("hierarchical-small", 3.3e6, 3.7e6),
        ("hierarchical-tiny", 0, 250_000),
        ("msh", 16e6, 19e6),
        ("msh-vr", 16e6, 21e6),
        ("gma", 25e6, 32e6),
        ("gma-vr", 25e6, 36e6),
    ],
)
def test_sizes(name, low, high):
    with torch.device("meta"):
        model = build_codec(name)
    assert low < sum(p.numel() for p in model.parameters()) < high
    assert name in CODECS and math.isclose(sum(model.config.lambda_range), 1056)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m(torch.rand(3, 64, 64), 100.0), "x is"),
        (lambda m: m(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 100.0), "uint8"),
        (lambda m: m(torch.rand(1, 1, 64, 64), 100.0), "x is"),
        (lambda m: m(torch.rand(1, 3, 64, 0), 100.0), "x is"),
        (lambda m: m(torch.rand(2, 3, 64, 64), torch.ones(3)), "lmbda"),
        (lambda m: m(torch.rand(2, 3, 64, 64), 0.0), "positive"),
        (lambda m: m.trainable("both"), "strategy"),
        (lambda m: build_codec("bpg"), "name"),
        (lambda m: build_codec("msh", channels=3), "channels is no setting"),
        (lambda m: build_codec("msh", hidden=7), "hidden"),
        (lambda m: build_codec("msh", entropy_dtype="float16"), "entropy_dtype"),
        (lambda m: build_model({"kind": "vae"}), "kind"),
    ],
)
def test_bad_input(lively, call, said):
    with pytest.raises(FastcilError, match=said):
        call(lively("hierarchical-tiny"))
