from __future__ import annotations

import pytest
import torch
from fisher import build, draw, fisher, sample_gradients, small_cnn
from torch import nn

from fastcil.curvature import (
    DiagonalFisher,
    EigenCorrection,
    KroneckerFactors,
    Penalty,
    eigenbasis,
    half_quadratic,
    make_curvature,
    output_vectors,
)
from fastcil.curvature.eigen import turned_values
from fastcil.curvature.penalty import eigen_product, kronecker_product
from fastcil.errors import FastcilError

KINDS = ("diagonal", "mas", "kfac", "tkfac", "xkfac", "ekfac")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scan(x, labels=None, size=4):
    """Batches of a task."""

    def run(update):
        marks = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
        for images, own in zip(x.split(size), marks.split(size), strict=True):
            update(images, own)

    return run


def model():
    return build(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    )


def measured(kind, net, x, **options):
    curvature = make_curvature(kind, net, **options)
    curvature.measure(scan(x), generator())
    return curvature


def displaced(net, seed=3):
    """A displacement of every parameter."""
    return {
        name: draw(*p.shape, seed=seed + k) for k, (name, p) in enumerate(net.named_parameters())
    }


def vector(displacement, layer):
    """vec of a layer's displacement, columns stacked."""
    parts = [displacement[f"{layer}.weight"].flatten(1)]
    if f"{layer}.bias" in displacement:
        parts.append(displacement[f"{layer}.bias"][:, None])
    return torch.cat(parts, 1).T.flatten()


def test_kfac_penalises_by_the_kronecker_product():
    net, x = model(), draw(8, 2, 4, 4)
    curvature = measured("kfac", net, x, estimator="exact", likelihood="gaussian")
    factors = KroneckerFactors(net, estimator="exact", likelihood="gaussian", dtype=torch.float64)
    factors.update(x)
    step = displaced(net)
    wanted = 0
    for layer, ((a, g),) in factors.dense().items():
        d = vector(step, layer)
        wanted += 0.5 * d @ torch.kron(a, g) @ d
    assert float(Penalty(curvature)(step)) == pytest.approx(float(wanted), rel=1e-5)


def test_one_linear_layer_is_penalised_by_its_fisher_information():
    net, x = build(nn.Linear(5, 3)), draw(12, 5)
    truth = fisher(sample_gradients(net, ["0"], x, "gaussian")["0"], len(x))
    step = displaced(net)
    d = vector(step, "0")
    wanted = float(0.5 * d @ truth @ d)
    for kind in ("kfac", "ekfac"):
        curvature = measured(kind, net, x, estimator="exact", likelihood="gaussian")
        assert float(Penalty(curvature)(step)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_the_diagonal_is_the_fishers(estimator):
    net, x, labels = small_cnn(), draw(6, 2, 6, 6), torch.tensor([0, 1, 2, 2, 1, 0])
    sums = DiagonalFisher(net, estimator=estimator, chunk=4)
    for part in (slice(0, 2), slice(2, 6)):
        sums.update(x[part], labels[part])
    values = sums.values()
    truth = sample_gradients(net, ["0", "2", "5"], x, "categorical", labels, estimator)
    for layer, gradients in truth.items():
        total = sum(g.square() for _, g in gradients) / len(x)
        weight = values[f"{layer}.weight"]
        columns = weight.flatten(1).shape[1]
        assert torch.allclose(weight.flatten(1), total[:, :columns])
        if f"{layer}.bias" in values:
            assert torch.allclose(values[f"{layer}.bias"], total[:, columns])


def test_a_batch_s_gradient_squared():
    net, x, labels = small_cnn(), draw(6, 2, 6, 6), torch.tensor([0, 1, 2, 2, 1, 0])
    sums = DiagonalFisher(net, estimator="empirical", per="batch")
    sums.update(x, labels)
    nn.functional.cross_entropy(net(x), labels).backward()
    for name, parameter in net.named_parameters():
        assert torch.allclose(sums.values()[name], parameter.grad.square())


@pytest.mark.parametrize("kind", ["diagonal", "mas"])
def test_a_short_last_batch_counts_by_its_samples(kind):
    net, x = small_cnn(), draw(7, 2, 6, 6)
    whole = {}
    for size in (4, 7):
        curvature = make_curvature(kind, net, per="batch", estimator="empirical")
        curvature.measure(scan(x, size=size), generator())
        whole[size] = curvature.tensors()
    parts = []
    for some in x.split(4):
        curvature = make_curvature(kind, net, per="batch", estimator="empirical")
        curvature.measure(scan(some, size=4), generator())
        parts.append((len(some) / 7, curvature.tensors()))
    for name, value in whole[4].items():
        assert torch.allclose(value, sum(share * own[name] for share, own in parts))
    assert not all(torch.allclose(value, whole[7][name]) for name, value in whole[4].items())


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_mas_is_the_sensitivity_of_the_squared_output(per):
    net, x = small_cnn(), draw(5, 2, 6, 6)
    curvature = make_curvature("mas", net, per=per)
    curvature.measure(scan(x, size=5), generator())
    parts = x.split(1) if per == "sample" else [x]
    for name, parameter in net.named_parameters():
        total = 0
        for images in parts:
            norm = net(images).square().sum(1).mean()
            total = total + torch.autograd.grad(norm, parameter)[0].abs() / len(parts)
        assert torch.allclose(curvature.tensors()[name], total)


def test_ekfac_has_the_fishers_diagonal_in_its_basis():
    net, x = small_cnn(), draw(6, 2, 6, 6)
    factors = KroneckerFactors(net, ["0", "5"], estimator="exact", dtype=torch.float64)
    factors.update(x)
    basis = eigenbasis({name: block for name, (block,) in factors.dense().items()})
    correction = EigenCorrection(net, basis, estimator="exact")
    for part in x.split(4):
        correction.update(part)
    for name, block in correction.blocks().items():
        truth = fisher(sample_gradients(net, [name], x, "categorical")[name], len(x))
        q = torch.kron(block.input_basis, block.output_basis)
        wanted = (q.T @ truth @ q).diagonal()
        assert torch.allclose(block.values.T.flatten(), wanted)
        assert float(block.values.sum()) == pytest.approx(float(truth.trace()))


def test_corrected_eigenvalues_of_groups():
    net, x = small_cnn(), draw(5, 2, 6, 6)
    factors = KroneckerFactors(
        net, ["2"], likelihood="gaussian", estimator="exact", dtype=torch.float64
    )
    factors.update(x)
    basis = eigenbasis({name: block for name, (block,) in factors.dense().items()})
    correction = EigenCorrection(net, basis, likelihood="gaussian", estimator="exact")
    correction.update(x)
    total = sum(
        float(g.square().sum()) for _, g in sample_gradients(net, ["2"], x, "gaussian")["2"]
    )
    values = correction.blocks()["2"].values
    assert values.shape == (2, 3, 18) and float(values.sum()) == pytest.approx(total / 5)


def test_values_turn_into_another_basis_with_their_trace():
    def block(seed):
        factors = {"a": [m @ m.T for m in (draw(4, 4, seed=seed), draw(3, 3, seed=seed + 1))]}
        return eigenbasis(factors)["a"]

    one, two = block(0), block(5)
    q1, q2 = (torch.kron(b.input_basis, b.output_basis) for b in (one, two))
    dense = q1 @ torch.diag(one.values.T.flatten()) @ q1.T
    turned = turned_values(one, two)
    assert torch.allclose(turned.T.flatten(), (q2.T @ dense @ q2).diagonal())
    assert torch.allclose(turned.sum(), one.values.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_weighs_tasks(kind):
    """Exactly, where the form can hold a sum; what is merged can be saved."""
    net = model().float()
    tasks = [draw(6, 2, 4, 4, seed=s).float() for s in (1, 2)]
    one, two = (measured(kind, net, x) for x in tasks)
    step = {name: d.float() for name, d in displaced(net).items()}
    before = [float(Penalty(c)(step)) for c in (one, two)]
    loaded = one.tensors()
    kept = {name: value.clone() for name, value in loaded.items()}
    one = make_curvature(kind, net)
    one.load_tensors(loaded)
    one.measure(scan(tasks[1]), generator(), 0.25, 0.75)
    assert all(torch.equal(value, kept[name]) for name, value in loaded.items())
    merged = float(Penalty(one)(step))
    if kind in ("diagonal", "mas"):
        assert merged == pytest.approx(0.25 * before[0] + 0.75 * before[1], rel=1e-5)
    again = make_curvature(kind, net)
    again.load_tensors({k: v.clone() for k, v in one.tensors().items()})
    assert float(Penalty(again)(step)) == pytest.approx(merged, rel=1e-5)


@pytest.mark.parametrize("kind", ["kfac", "tkfac", "xkfac", "ekfac"])
def test_weights_of_factors_sum_to_1(kind):
    """Before anything is measured: two factors of twice the size make four times the block."""
    curvature, looked = measured(kind, model(), draw(6, 2, 4, 4)), []
    with pytest.raises(FastcilError, match=r"^old is 1\.0 and new is 1\.0; .* sum to 1"):
        curvature.measure(looked.append, generator(), 1.0, 1.0)
    assert not looked


def test_factors_are_merged_as_their_weighted_mean():
    """Shon et al. 2022, Eq. 11 with Sec. 4.1: (t - 1) : 1 for every factor, a running mean."""
    net = model()
    tasks = [draw(6, 2, 4, 4, seed=s) for s in range(3)]
    options = {"estimator": "exact", "likelihood": "gaussian"}
    merged = measured("kfac", net, tasks[0], **options)
    for t, x in enumerate(tasks[1:], start=2):
        merged.measure(scan(x), generator(), (t - 1) / t, 1 / t)
    step, wanted = displaced(net), 0
    single = []
    for x in tasks:
        factors = KroneckerFactors(net, dtype=torch.float64, **options)
        factors.update(x)
        single.append(factors.dense())
    for layer in single[0]:
        a, g = (sum(s[layer][0][k] for s in single) / 3 for k in range(2))
        d = vector(step, layer)
        wanted += 0.5 * d @ torch.kron(a, g) @ d
    assert float(Penalty(merged)(step)) == pytest.approx(float(wanted), rel=1e-5)


def test_ekfac_of_three_tasks_decomposes_each_factor_once_for_each(monkeypatch):
    """And has the diagonal of the old form and the new task's Fisher information, summed."""
    net, weights = model(), [(0.0, 1.0), (0.5, 0.5), (2 / 3, 1 / 3)]
    options = {"estimator": "exact"}
    layers = ("0", "3")
    eigh, decomposed = torch.linalg.eigh, []
    factors = dict.fromkeys(layers, (0.0, 0.0))
    held = dict.fromkeys(layers, 0.0)
    curvature = make_curvature("ekfac", net, **options)
    for t, (old, new) in enumerate(weights):
        x = draw(6, 2, 4, 4, seed=t)
        with monkeypatch.context() as watched:
            watched.setattr(torch.linalg, "eigh", lambda m: decomposed.append(m) or eigh(m))
            kept = curvature.tensors() if t else None
            curvature = make_curvature("ekfac", net, **options)
            if kept:
                curvature.load_tensors(kept)
            curvature.measure(scan(x), generator(), old, new)
            step = displaced(net)
            found = float(Penalty(curvature)(step))
        assert len(decomposed) == 2 * len(layers) * (t + 1)
        naive = KroneckerFactors(net, dtype=torch.float64, **options)
        naive.update(x)
        gradients = sample_gradients(net, layers, x, "categorical")
        wanted = 0.0
        for layer, ((a, g),) in naive.dense().items():
            merged = [old * p + new * q for p, q in zip(factors[layer], (a, g), strict=True)]
            factors[layer] = merged
            q = torch.kron(*(eigh(m)[1] for m in merged))
            both = old * held[layer] + new * fisher(gradients[layer], len(x))
            held[layer] = q @ (q.T @ both @ q).diagonal().diag() @ q.T
            d = vector(step, layer)
            wanted += float(0.5 * d @ held[layer] @ d)
        assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_grows_has_no_curvature_for_new_units(kind):
    net = model().float()
    curvature = measured(kind, net, draw(6, 2, 4, 4).float())
    step = {name: d.float() for name, d in displaced(net).items()}
    before = float(Penalty(curvature)(step))
    net[3] = nn.Linear(64, 5)
    grown = dict(step)
    grown["3.weight"] = torch.cat([step["3.weight"], torch.ones(2, 64)])
    grown["3.bias"] = torch.cat([step["3.bias"], torch.ones(2)])
    again = make_curvature(kind, net)
    again.load_tensors(curvature.tensors())
    assert float(Penalty(again)(grown)) == pytest.approx(before, rel=1e-4)
    again.measure(scan(draw(6, 2, 4, 4, seed=1).float()), generator(), 0.5, 0.5)
    assert torch.isfinite(Penalty(again)(grown))


@pytest.mark.parametrize("kind", ["kfac", "tkfac", "xkfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_with_squared_error_a_classifier_s_new_units_have_the_curvature_of_the_old(kind, estimator):
    """Shon et al. 2022, Eq. 13: E[z zᵀ] ⊗ I, new units included; of it the diagonal."""
    if (kind, estimator) == ("xkfac", "exact"):
        pytest.skip("draws")
    net = model()
    options = {"likelihood": "gaussian", "estimator": estimator, "identity": ["3"]}
    curvature = make_curvature(kind, net, **options)
    x = draw(8, 2, 4, 4)
    curvature.measure(scan(x), generator())
    # Of two tasks alike it is that of one.
    curvature.measure(scan(x), generator(), 0.5, 0.5)
    net[3] = nn.Linear(64, 5).double()
    step = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    step["3.weight"], step["3.bias"] = draw(5, 64), draw(5)
    z = torch.cat([net[:3](x).detach(), torch.ones(8, 1)], 1)
    d = torch.cat([step["3.weight"], step["3.bias"][:, None]], 1)
    gram = z.T @ z / 8
    if kind == "diagonal":
        gram = gram.diagonal().diag()
    wanted = 0.5 * torch.trace(d @ gram @ d.T)
    # What draws add to a mean over three units and eight images is noise.
    allowed = 0.5 if (kind, estimator) == ("diagonal", "sampled") else 1e-5
    assert float(Penalty(curvature)(step)) == pytest.approx(float(wanted), rel=allowed)


@pytest.mark.parametrize("form", ["kronecker", "groups", "eigen"])
def test_the_penalty_s_derivatives(form):
    lead = (2,) if form == "groups" else ()
    a, g = (m @ m.mT for m in (draw(*lead, 5, 5), draw(*lead, 3, 3, seed=1)))
    d = draw(*lead, 3, 5, seed=2).requires_grad_()
    if form == "eigen":
        (_, ua), (_, ug) = torch.linalg.eigh(a), torch.linalg.eigh(g)
        product = eigen_product(ua, ug, draw(3, 5, seed=3).square())
    else:
        product = kronecker_product([(a, g), (g.new_ones(()) * a, g)])
    assert torch.autograd.gradcheck(lambda d: half_quadratic([d], [product]), d)
    assert torch.autograd.gradgradcheck(lambda d: half_quadratic([d], [product]), d)
    if form == "kronecker":
        wanted = torch.einsum("ij,ik,kl,lj->", d, g, d, a)
        assert torch.allclose(half_quadratic([d], [product]), wanted)


def test_the_hessian_of_squared_error_and_cross_entropy():
    outputs = draw(4, 5)
    p = outputs.softmax(1)
    softmax = torch.diag_embed(p) - p[:, :, None] * p[:, None]

    def summed(*arguments, **options):
        return sum(
            v[:, :, None] * v[:, None] for v in output_vectors(outputs, *arguments, **options)
        )

    assert torch.allclose(summed("categorical", "exact"), softmax)
    assert torch.allclose(
        summed("gaussian", "exact"), torch.eye(5, dtype=torch.float64).expand(4, 5, 5)
    )
    for likelihood, truth in (("categorical", softmax), ("gaussian", torch.eye(5).double())):
        drawn = summed(likelihood, "sampled", samples=20000, generator=generator())
        assert float((drawn - truth).abs().max()) < 0.05
    labels = torch.tensor([0, 1, 2, 3])
    (v,) = output_vectors(outputs, "categorical", "empirical", labels=labels)
    leaf = outputs.clone().requires_grad_()
    nn.functional.cross_entropy(leaf, labels, reduction="sum").backward()
    assert torch.allclose(v, leaf.grad)


@pytest.mark.parametrize(
    "arguments, options, words",
    [
        (("categorical", "true"), {}, "estimator is 'true'"),
        (("gaussian", "empirical"), {}, "estimator is 'empirical'"),
        (("poisson", "exact"), {}, "likelihood is 'poisson'"),
        (("categorical", "empirical"), {}, "labels is None"),
        (("categorical", "sampled"), {"samples": 0}, "samples is 0"),
    ],
    ids=str,
)
def test_output_vectors_that_do_not_exist(arguments, options, words):
    with pytest.raises(FastcilError, match=words):
        output_vectors(draw(2, 3), *arguments, **options)


def test_bad_arguments_are_named():
    net = model()
    with pytest.raises(FastcilError, match="curvature is 'hessian'"):
        make_curvature("hessian", net)
    with pytest.raises(FastcilError, match="parameter '9"):
        make_curvature("diagonal", net, ["9.weight"]).measure(scan(draw(2, 2, 4, 4)), generator())
    with pytest.raises(FastcilError, match="per is 'epoch'"):
        make_curvature("mas", net, per="epoch").measure(scan(draw(2, 2, 4, 4)), generator())
    with pytest.raises(FastcilError, match="are empty"):
        Penalty(make_curvature("kfac", net))
    with pytest.raises(FastcilError, match="displacements has 0"):
        half_quadratic([], [])
