from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from fisher import build, draw, fisher, sample_gradients, small_cnn
from torch import nn
from torch.nn import functional

from fastcil.curvature import KroneckerFactors, output_vectors
from fastcil.curvature.layers import find_layers, gradients_at, watched
from fastcil.errors import FastcilError
from fastcil.nn import linearize


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_one_linear_layer_with_a_gaussian_is_exact(likelihood):
    """Its output gradients do not depend on the input, nor do those of equal probabilities."""
    model = build(nn.Linear(5, 3))
    if likelihood == "categorical":
        nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    x = draw(20, 5)
    factors = KroneckerFactors(model, likelihood=likelihood, estimator="exact", dtype=torch.float64)
    factors.update(x)
    (block,) = factors.dense()["0"]
    truth = fisher(sample_gradients(model, ["0"], x, likelihood)["0"], len(x))
    assert torch.allclose(torch.kron(block.input, block.output), truth)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_factors_are_their_definition(estimator):
    """A and G of every layer, from the patches and gradients of single samples."""
    model, x, labels = small_cnn(), draw(5, 2, 6, 6), torch.tensor([0, 2, 1, 1, 0])
    factors = KroneckerFactors(model, estimator=estimator, dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 5)):
        factors.update(x[part], labels[part])
    found = factors.dense()
    assert list(found) == ["0", "2", "5"]
    hidden = [x]
    for module in (m for m in model):
        hidden.append(module(hidden[-1].clone()).detach())
    ins = {"0": hidden[0], "2": hidden[2], "5": hidden[5]}
    # Gradients at outputs, by running on from there.
    for name in found:
        k = int(name)
        start = model[k](ins[name].clone()).detach().requires_grad_()
        outputs = model[k + 1 :](start.clone()) if k < 5 else start * 1
        outer = 0
        for v in output_vectors(outputs, "categorical", estimator, labels=labels):
            (g,) = torch.autograd.grad(outputs, start, v, retain_graph=True)
            g = g.flatten(2) if g.ndim == 4 else g[..., None]
            parts = (
                [torch.einsum("nil,njl->ij", h, h) / len(x) for h in g.chunk(model[k].groups, 1)]
                if k == 2
                else [torch.einsum("nil,njl->ij", g, g) / len(x)]
            )
            outer = outer + torch.stack(parts)
        (block,) = found[name]
        assert torch.allclose(block.output, outer if k == 2 else outer[0])
        if k == 5:
            a = torch.cat([ins[name], torch.ones(5, 1)], 1)
            assert torch.allclose(block.input, a.T @ a / 5)


def test_reduced_sharing_is_exact_where_positions_are_alike():
    """Constant images, a kernel of 1: every position sees the same."""
    model = build(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 6, 3))
    x = draw(1, 3, 1, 1).expand(1, 3, 2, 3).contiguous()
    factors = KroneckerFactors(
        model, ["0"], likelihood="gaussian", estimator="exact", sharing="reduce",
        dtype=torch.float64,
    )  # fmt: skip
    factors.update(x)
    (block,) = factors.dense()["0"]
    truth = fisher(sample_gradients(model, ["0"], x, "gaussian")["0"], 1)
    assert torch.allclose(torch.kron(block.input, block.output), truth)


def test_the_trace_of_tkfac_is_the_fishers():
    """Of linear layers; K-FAC's own is another."""
    model, x = build(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), draw(30, 5)
    traces = {}
    for kind in ("kfac", "tkfac"):
        factors = KroneckerFactors(model, kind=kind, estimator="exact", dtype=torch.float64)
        for part in x.split(12):
            factors.update(part)
        traces[kind] = {
            name: float(block.input.trace() * block.output.trace())
            for name, (block,) in factors.dense().items()
        }
    truth = {
        name: float(fisher(gradients, len(x)).trace())
        for name, gradients in sample_gradients(model, ["0", "2"], x, "categorical").items()
    }
    for name, wanted in truth.items():
        assert traces["tkfac"][name] == pytest.approx(wanted, rel=1e-12)
        assert traces["kfac"][name] != pytest.approx(wanted, rel=1e-3)


class Twice(nn.Module):
    """A layer on seven rows of every sample, and called twice on each."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.layer, self.twice = nn.Linear(5, 4), twice

    def forward(self, x):
        rows = self.layer(x.reshape(-1, 5))
        if self.twice:
            rows = rows + self.layer(x.reshape(-1, 5).square())
        return rows.unflatten(0, (len(x), 7)).sum(1)


@pytest.mark.parametrize("twice", [False, True])
def test_the_trace_of_tkfac_sums_over_rows_and_calls(twice):
    model, x = Twice(twice).double(), draw(6, 7, 5)
    factors = KroneckerFactors(
        model, kind="tkfac", likelihood="gaussian", estimator="exact", dtype=torch.float64
    )
    for part in x.split(4):
        factors.update(part)
    (block,) = factors.dense()["layer"]
    # Each of the four outputs has the gradient 1 at every row and call.
    seen = [x.reshape(-1, 5), *([x.reshape(-1, 5).square()] if twice else [])]
    total = sum(float((rows.square().sum(1) + 1).sum()) for rows in seen) * 4 / len(x)
    assert float(block.input.trace() * block.output.trace()) == pytest.approx(total, rel=1e-12)


def test_tkfac_of_a_convolution_keeps_the_trace_of_its_samples_factors():
    model, x = small_cnn(), draw(6, 2, 6, 6)
    factors = KroneckerFactors(
        model, ["0", "5"], kind="tkfac", likelihood="gaussian", estimator="exact",
        dtype=torch.float64,
    )  # fmt: skip
    factors.update(x)
    (block,) = factors.dense()["0"]
    total = 0
    for n in range(len(x)):
        single = KroneckerFactors(
            model, ["0"], likelihood="gaussian", estimator="exact", dtype=torch.float64
        )
        single.update(x[n : n + 1])
        ((a, g),) = single.dense()["0"]
        total += float(a.trace() * g.trace()) / len(x)
    assert float(block.input.trace() * block.output.trace()) == pytest.approx(total, rel=1e-12)


def test_samples_average_to_the_exact_factors():
    model, x = small_cnn(), draw(4, 2, 6, 6)
    exact = KroneckerFactors(model, estimator="exact", dtype=torch.float64)
    drawn = KroneckerFactors(model, samples=3000, dtype=torch.float64)
    exact.update(x)
    drawn.update(x, generator=torch.Generator().manual_seed(0))
    for name, (block,) in exact.dense().items():
        (rough,) = drawn.dense()[name]
        assert torch.allclose(rough.input, block.input)
        assert float((rough.output - block.output).norm() / block.output.norm()) < 0.1


def test_xkfac_adds_the_pairs_of_a_batch():
    model = build(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    batches = draw(2, 6, 4)
    vectors = []
    factors = KroneckerFactors(
        model, ["0"], kind="xkfac", likelihood="gaussian", dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(1)
    for x in batches:
        factors.update(x, generator=generator)
    generator.manual_seed(1)
    first = second = inner = inner2 = 0
    for x in batches:
        hidden = model[0](x).detach().requires_grad_()
        outputs = model[1:](hidden)
        (v,) = output_vectors(outputs, "gaussian", generator=generator)
        (g,) = torch.autograd.grad(outputs, hidden, v)
        a = torch.cat([x, torch.ones(6, 1)], 1)
        for m, n in product(range(6), range(6)):
            if m == n:
                inner = inner + torch.outer(a[m], a[n]) / 12
                first = first + torch.outer(g[m], g[n]) / 12
            else:
                inner2 = inner2 + torch.outer(a[m], a[n]) / 60
                second = second + torch.outer(g[m], g[n]) / 12
        vectors.append(v)
    one, two = factors.dense()["0"]
    for got, wanted in (
        (one.input, inner),
        (one.output, first),
        (two.input, inner2),
        (two.output, second),
    ):
        assert torch.allclose(got, wanted)
    # Batch norm leaves nothing of the sum of all gradients.
    assert torch.allclose(two.output, -one.output)


@pytest.mark.parametrize("kind", ["kfac", "tkfac", "xkfac"])
@pytest.mark.parametrize("saved", [False, True])
def test_merging_is_the_weighted_sum_of_averages(kind, saved, tmp_path):
    model = build(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    make = partial(KroneckerFactors, model, kind=kind, dtype=torch.float64)
    parts = [make(), make()]
    for seed, factors in enumerate(parts):
        factors.update(
            draw(3 + seed, 2, 6, 6, seed=seed), generator=torch.Generator().manual_seed(seed)
        )
    numerators = []
    for factors in parts:
        blocks = factors.dense()
        if kind == "tkfac":
            # What is averaged: both numerators, and delta.
            delta = {n: s.extra["delta"] / factors.count for n, s in factors._sums.items()}
            numerators.append(
                {n: [(a, g * delta[n], delta[n]) for a, g in b] for n, b in blocks.items()}
            )
        else:
            numerators.append({n: [(a, g, 1.0) for a, g in b] for n, b in blocks.items()})
    one, two = parts
    if saved:
        one.save(tmp_path / "one.safetensors")
        one = make()
        one.load(tmp_path / "one.safetensors")
    one.merge(two, 0.25, 0.75)
    for name, found in one.dense().items():
        for (a, g), first, second in zip(
            found, numerators[0][name], numerators[1][name], strict=True
        ):
            merged = [0.25 * p + 0.75 * q for p, q in zip(first, second, strict=True)]
            assert torch.allclose(a, merged[0])
            assert torch.allclose(g, merged[1] / merged[2])


def test_what_merging_factors_leaves_out_of_the_sum_of_blocks():
    """Of blocks w A ⊗ G + w' A' ⊗ G' it is w w' (A - A') ⊗ (G - G'); TK-FAC keeps the trace."""
    model = build(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
    for kind in ("kfac", "tkfac"):
        one, two = (
            KroneckerFactors(model, kind=kind, estimator="exact", dtype=torch.float64)
            for _ in range(2)
        )
        one.update(draw(3, 2, 6, 6))
        two.update(2 * draw(5, 2, 6, 6, seed=1))
        before, other = one.dense(), two.dense()
        one.merge(two, 0.3, 0.7)
        for name, ((a, g),) in one.dense().items():
            (a1, g1), (a2, g2) = before[name][0], other[name][0]
            blocks = 0.3 * torch.kron(a1, g1) + 0.7 * torch.kron(a2, g2)
            left_out = 0.21 * torch.kron(a1 - a2, g1 - g2)
            assert float(left_out.norm()) > 1e-3 * float(blocks.norm())
            if kind == "kfac":
                assert torch.allclose(torch.kron(a, g), blocks - left_out)
            else:
                assert torch.allclose(torch.kron(a, g).trace(), blocks.trace())


def test_half_inputs_reach_the_layers_that_take_lags():
    model = build(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(), nn.Linear(216, 3))
    x = draw(8, 4, 6, 6)
    dense = []
    for half in (False, True):
        factors = KroneckerFactors(model, estimator="exact", half_inputs=half)
        for sums in factors._sums.values():
            sums.inputs.route = "lags" if sums.inputs.window.kernel == (3, 3) else None
        factors.update(x)
        dense.append(factors.dense())
    (plain,), (half,) = (d["0"] for d in dense)
    # Two operands are rounded by 2^-9 at most, on a CPU their products too.
    assert 0 < float((plain.input - half.input).norm() / plain.input.norm()) < 6e-3
    assert torch.equal(plain.output, half.output)
    assert all(torch.equal(a, b) for a, b in zip(*(d["2"][0] for d in dense), strict=True))


@pytest.mark.parametrize("mine, theirs", [(1.0, 1.0), (0.5, 0.25), (0.0, 0.0)])
def test_weights_that_make_no_mean_are_refused(mine, theirs):
    model = build(nn.Linear(4, 3))
    one, two = KroneckerFactors(model), KroneckerFactors(model)
    for factors in (one, two):
        factors.update(draw(5, 4))
    with pytest.raises(FastcilError, match=f"^mine is {mine} and theirs is {theirs}; .* sum to 1"):
        one.merge(two, mine, theirs)
    one.merge(two, 2 / 3, 1 / 3)


def test_decay_weighs_batches():
    model, batches = small_cnn(), draw(3, 4, 2, 6, 6)
    factors = KroneckerFactors(model, estimator="exact", likelihood="gaussian", dtype=torch.float64)
    single = []
    for x in batches:
        factors.update(x, decay=0.5)
        one = KroneckerFactors(model, estimator="exact", likelihood="gaussian", dtype=torch.float64)
        one.update(x)
        single.append(one.dense())
    for name, (block,) in factors.dense().items():
        for part in range(2):
            wanted = (
                sum(w * s[name][0][part] for w, s in zip((0.25, 0.5, 1), single, strict=True))
                / 1.75
            )
            assert torch.allclose(block[part], wanted)


def test_a_linear_layer_on_sequences_has_positions():
    model = build(nn.Linear(4, 3), nn.Flatten(), nn.Linear(15, 2))
    x = draw(6, 5, 4)
    factors = KroneckerFactors(model, ["0"], estimator="exact", dtype=torch.float64)
    factors.update(x)
    (block,) = factors.dense()["0"]
    a = torch.cat([x.flatten(0, 1), torch.ones(30, 1)], 1)
    assert torch.allclose(block.input, a.T @ a / 30)
    hidden = model[0](x).detach().requires_grad_()
    outputs, total = model[1:](hidden), 0
    for v in output_vectors(outputs, "categorical", "exact"):
        (g,) = torch.autograd.grad(outputs, hidden, v, retain_graph=True)
        total = total + torch.einsum("nti,ntj->ij", g, g) / 6
    assert torch.allclose(block.output, total)


def test_frozen_weights_and_changes_in_place_do_not_matter():
    model, x = small_cnn(), draw(4, 2, 6, 6)
    wanted = KroneckerFactors(model, estimator="exact", dtype=torch.float64)
    wanted.update(x)
    frozen = KroneckerFactors(model.requires_grad_(False), estimator="exact", dtype=torch.float64)
    with torch.no_grad():
        frozen.update(x)
    for name, (block,) in frozen.dense().items():
        for got, truth in zip(block, wanted.dense()[name][0], strict=True):
            assert torch.allclose(got, truth)
    model[1].inplace = False
    plain = KroneckerFactors(model, estimator="exact", dtype=torch.float64)
    plain.update(x)
    for name, (block,) in plain.dense().items():
        assert torch.allclose(block.output, wanted.dense()[name][0].output)


def test_a_linearised_network_has_the_factors_of_what_it_linearises():
    model = build(nn.Conv2d(2, 4, 3, padding=1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(144, 3))
    x = draw(4, 2, 6, 6)
    base = KroneckerFactors(model, likelihood="gaussian", estimator="exact", dtype=torch.float64)
    base.update(x)
    linear = linearize(model)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter += 0.1
    names = [name for name, m in linear.named_modules() if hasattr(m, "base_weight")]
    mine = KroneckerFactors(
        linear, names, likelihood="gaussian", estimator="exact", dtype=torch.float64
    )
    mine.update(x)
    for (block,), (wanted,) in zip(mine.dense().values(), base.dense().values(), strict=True):
        assert torch.allclose(block.input, wanted.input)
        assert torch.allclose(block.output, wanted.output)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"layers": ["9"]}, "layer '9' is no module"),
        ({"layers": ["1"]}, "layer '1' is ReLU"),
        ({"kind": "kfra"}, "kind is 'kfra'"),
        ({"kind": "tkfac"}, "layer '2' has 2 groups"),
        ({"kind": "tkfac", "sharing": "reduce"}, "sharing is 'reduce'"),
        ({"kind": "xkfac", "estimator": "exact"}, "estimator is 'exact'"),
        ({"sharing": "none"}, "sharing is 'none'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(FastcilError, match=words):
        KroneckerFactors(small_cnn(), **options)


def test_what_cannot_be_used_is_named():
    with pytest.raises(FastcilError, match="without a convolution"):
        KroneckerFactors(nn.ReLU())
    model = small_cnn()
    factors = KroneckerFactors(model)
    with pytest.raises(FastcilError, match="are empty"):
        factors.dense()
    model.add_module("7", nn.Linear(2, 2).double())
    model.forward = lambda x: model[:6](x)
    with pytest.raises(FastcilError, match="layer '7' was not used"):
        KroneckerFactors(model, ["7"]).update(draw(1, 2, 6, 6))


def test_gradients_of_samples():
    """Of every kind of layer, the definition of the Fisher information."""
    model, x = small_cnn(), draw(3, 2, 6, 6)
    layers = find_layers(model)
    truth = sample_gradients(model, [layer.name for layer in layers], x, "gaussian")
    with watched(layers):
        outputs = model(x)
        for k, v in enumerate(output_vectors(outputs, "gaussian", "exact")):
            found = gradients_at(outputs, layers, v)
            for layer, (g,) in zip(layers, found, strict=True):
                mine = layer.gradients(layer.calls[0][0], g).flatten(1, 2)
                wanted = [grad for n, grad in truth[layer.name]][k::3]
                assert torch.allclose(mine, torch.stack(wanted))
                a = functional.pad(layer.patches(layer.calls[0][0]), (0, 0, 0, 0))
                norms = layer.patch_norms(layer.calls[0][0])
                if layer.groups == 1:
                    assert torch.allclose(norms, a.square().sum((1, 2)).mean(1))
