"""Real coding's walk: what forward says, in the same bits whatever the threads and the batch."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fastcil.compression.fixed import fixed_mode
from fastcil.compression.phases import Phases
from fastcil.compression.zoo import build_model
from fastcil.errors import FastcilError

NAMES = ["hierarchical-tiny", "msh-vr", "msh"]
RATES = torch.tensor([33.0, 40.0, 77.7, 100.1, 250.0, 500.0, 900.0, 1024.0])


def encode(model, x, rates):
    """Symbols, means and indices of each latent, and the walk."""
    phases = model.begin(*x.shape[-2:], rates, len(x))
    with torch.no_grad():
        features = model.features(x, rates)
    rows = []
    for i in range(phases.count):
        mean, index = phases.prior(i)
        symbols = phases.quantise(i, features)
        phases.feed(i, symbols)
        rows.append((symbols, mean, index))
    return rows, phases


def decode(model, symbols, sides, rates):
    phases = model.begin(*sides, rates, len(symbols[0]))
    rows = []
    for i in range(phases.count):
        mean, index = phases.prior(i)
        phases.feed(i, symbols[i])
        rows.append((symbols[i], mean, index))
    return rows, phases


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sides", [(64, 64), (70, 130), (1, 1)])
def test_the_walk_is_forward_s(lively, images, name, sides):
    model, x, rates = lively(name), images(2, *sides), RATES[2:4]
    out = model(x, rates)
    rows, phases = encode(model, x, rates)
    for i, key in enumerate(model.latent_names):
        symbols, mean, index = rows[i]
        assert symbols.dtype == torch.int32 and index.dtype == torch.uint8
        assert mean.dtype == torch.float64
        assert symbols.shape[1:] == phases.shapes[i]
        z = out["latents"][key].double()
        assert torch.equal((z - mean).round(), symbols.double())
        torch.testing.assert_close(z, phases.latents[i], atol=1e-4, rtol=0)
        assert phases.tables(i).slots[index.numpy()].min() >= 2
    assert any((symbols != 0).any() for symbols, _, _ in rows)
    image = phases.image()
    assert image.shape == x.shape and image.dtype == torch.float32
    torch.testing.assert_close(image, out["x_hat"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_cost_what_the_priors_estimate(lively, name):
    """For symbols such as the priors expect, and z of any probability."""
    model, generator = lively(name), torch.Generator().manual_seed(0)
    phases, rate = model.begin(64, 128, 100.0), torch.tensor([100.0])
    embedding, state = model.embed("entropy", rate), model.entropy.start(1, 64, 128)
    for i in range(phases.count):
        mean, index = phases.prior(i)
        state, prior = model.entropy.ahead(i, state, embedding)
        sigma = prior.log_sigma.exp() if hasattr(prior, "log_sigma") else torch.tensor(3.0)
        symbols = (sigma * torch.randn(mean.shape, generator=generator)).round().int()
        z = symbols + prior.mean
        estimate = -float(prior.log_likelihood(z).detach().double().sum()) / math.log(2)
        tables, rows = phases.tables(i), index.flatten().long().numpy()
        place = symbols.flatten().numpy() - tables.low[rows]
        assert (place >= 0).all() and (place < tables.slots[rows] - 1).all()
        bits = tables.costs[tables.starts[rows] + place].sum()
        # A scale is at most 2 % from that of its table, 3 % with scales up to 256.
        assert bits == pytest.approx(estimate, rel=0.01, abs=1)
        phases.feed(i, symbols)
        _, state = model.entropy.advance(i, state, z, embedding)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_for_any_batch_and_threads(lively, images, name):
    model, x = lively(name), images(8, 70, 100)
    known, _ = encode(model, x, RATES)
    symbols = [row[0] for row in known]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            rows, phases = decode(model, symbols, (70, 100), RATES)
            assert torch.get_num_threads() == count
            for found, expected in zip(rows, known, strict=True):
                assert all(map(torch.equal, found, expected))
        for b in (0, 3, 7):
            alone, one = decode(model, [s[b : b + 1] for s in symbols], (70, 100), float(RATES[b]))
            for found, expected in zip(alone, known, strict=True):
                assert torch.equal(found[1][0], expected[1][b])
                assert torch.equal(found[2][0], expected[2][b])
            for found, expected in zip(one.latents, phases.latents, strict=True):
                assert torch.equal(found[0], expected[b])
    finally:
        torch.set_num_threads(threads)


def test_the_same_bits_in_any_layout_mode_and_autocast(lively, images):
    model, x = lively("hierarchical-tiny"), images(2, 64, 64)
    known, _ = encode(model, x, 100.0)
    symbols = [row[0] for row in known]
    scattered = [s.to(memory_format=torch.channels_last).long() for s in symbols]
    model = model.to(memory_format=torch.channels_last)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows, _ = decode(model, scattered, (64, 64), torch.tensor([100.0, 100.0]))
    for found, expected in zip(rows, known, strict=True):
        assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
    assert model.training and torch.is_grad_enabled()


def test_lambda_is_what_a_float32_holds(lively):
    model = lively("hierarchical-tiny")
    lmbda = 100.1
    stored = float(torch.tensor(lmbda))
    assert stored != lmbda
    walks = [decode_zeros(model, value) for value in (lmbda, stored)]
    assert all(map(torch.equal, *walks))


def decode_zeros(model, lmbda):
    phases = model.begin(64, 64, lmbda)
    for i, shape in enumerate(phases.shapes):
        phases.prior(i)
        phases.feed(i, torch.zeros(1, *shape, dtype=torch.int32))
    return phases.latents


def test_float32_entropy_model(lively, images):
    model, x = lively("hierarchical-tiny"), images(2, 64, 64)
    single = build_model({**model.structure(), "entropy_dtype": "float32"})
    single.load_state_dict(model.state_dict())
    rows, _ = encode(single, x, 100.0)
    assert rows[0][1].dtype == torch.float32
    double, _ = encode(model, x, 100.0)
    for found, expected in zip(rows, double, strict=True):
        torch.testing.assert_close(found[1].double(), expected[1], atol=1e-4, rtol=0)


def test_a_walk_keeps_the_weights_it_began_with(lively, images):
    model, x = lively("hierarchical-tiny"), images(1, 64, 64)
    known, _ = encode(model, x, 100.0)
    phases = model.begin(64, 64, 100.0)
    for parameter in model.entropy.parameters():
        parameter.data.normal_()
    for i, (symbols, mean, _) in enumerate(known):
        assert torch.equal(phases.prior(i)[0], mean)
        phases.feed(i, symbols)


def test_fixed_mode_restores_what_it_changed():
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError), fixed_mode():
        assert not torch.is_grad_enabled() and torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.is_grad_enabled() and torch.get_num_threads() == threads


def test_what_is_out_of_turn_is_refused(lively):
    model = lively("hierarchical-tiny")
    phases = model.begin(64, 64, 100.0)
    with pytest.raises(FastcilError, match="the next one is 0"):
        phases.prior(1)
    with pytest.raises(FastcilError, match="integers of shape"):
        phases.feed(0, torch.zeros(1, 16, 2, 1, dtype=torch.int32))
    with pytest.raises(FastcilError, match="float"):
        phases.feed(0, torch.zeros(1, 16, 1, 1))
    with pytest.raises(FastcilError, match="0 are fed"):
        phases.image()
    with pytest.raises(FastcilError, match="at least"):
        Phases(model, 0, 64, 100.0)


@pytest.mark.parametrize("name", ["hierarchical-tiny", "msh-vr"])
def test_the_entropy_model_is_copied_once_for_weights_as_they_are(lively, images, name):
    model, x = lively(name), images(1, 64, 64)
    known, _ = encode(model, x, 100.0)
    first = model.fixed_entropy()
    assert model.begin(8, 8, 50.0) and model.fixed_entropy() is first
    optimiser = torch.optim.SGD(model.decoder.parameters(), lr=1.0)
    for parameter in model.decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    assert model.fixed_entropy() is first, "the decoder decides no probability"
    changes = (
        lambda: torch.nn.init.normal_(next(model.entropy.parameters())),
        lambda: model.embeddings["entropy"].range.add_(1),
        lambda: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}),
    )
    with torch.no_grad():
        for change in changes:
            change()
            assert model.fixed_entropy() is not first
            first = model.fixed_entropy()
    rows, _ = encode(model, x, 100.0)
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(rows, known, strict=True))
    model.half().float()
    assert model.fixed_entropy() is not first
    assert copy.deepcopy(model).fixed_entropy() is not model.fixed_entropy()


def test_weights_made_in_inference_mode_are_looked_at_every_time(lively, images):
    with torch.inference_mode():
        model = lively("hierarchical-tiny")
        before = model.fixed_entropy()
        next(model.entropy.parameters()).mul_(2)
        assert model.fixed_entropy() is not before
