"""What is computed in shares is what one process computes, derivatives of every order included."""

from __future__ import annotations

import copy

import pytest
import torch
from backbones import ConvNet
from thread_ranks import run_ranks, sharing
from torch import Tensor, nn

from fastcil.nn import LinearHead, Network, linearize, resnet20
from fastcil.nn.collectives import add_up, all_rows, enter, own_rows
from fastcil.nn.ranks import Ranks
from fastcil.nn.shares import in_shares

SIZES = [2, 3, 4]


@pytest.fixture
def working_as(monkeypatch: pytest.MonkeyPatch):
    with sharing(monkeypatch) as working:
        yield working


def close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def images(rows: int, side: int = 8) -> Tensor:
    made = torch.randn(rows, 3, side, side, dtype=torch.float64)
    return made.contiguous(memory_format=torch.channels_last)


def network() -> Network:
    return Network([ConvNet()], LinearHead(6, classes=5)).double()


# Collectives


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [5, 8])
def test_the_four_functions_have_derivatives_of_every_order(size, rows) -> None:
    """f(w, x) = sum of cubes of x W, done in shares, once and twice differentiated."""
    torch.manual_seed(0)
    weight, x = (torch.randn(*s, dtype=torch.float64) for s in ((3, 2), (rows, 3)))
    probe = torch.randn(3, 2, dtype=torch.float64)

    def value(w: Tensor, x: Tensor, ranks: Ranks) -> Tensor:
        (w,) = enter([w], ranks)
        own = own_rows(x, ranks)
        (scale,) = enter(add_up([own.square().sum()], ranks), ranks)
        y = all_rows((own @ w) * scale, len(x), ranks)
        return y.pow(3).sum()

    def derivatives(ranks: Ranks) -> list[Tensor]:
        w, z = (t.clone().requires_grad_() for t in (weight, x))
        f = value(w, z, ranks)
        dw, dz = torch.autograd.grad(f, (w, z), create_graph=True)
        second = torch.autograd.grad(
            (dw * probe).sum() + dz.pow(2).sum(), (w, z), create_graph=True
        )
        third = torch.autograd.grad(sum(s.sum() for s in second), (w, z))
        return [f, dw, dz, *second, *third]

    expected = derivatives(Ranks())
    for found in run_ranks(size, derivatives):
        for a, b in zip(expected, found, strict=True):
            assert torch.allclose(a, b, rtol=1e-9)


def test_what_has_no_gradient_has_none_in_shares() -> None:
    """An optimiser passes over parameters without a gradient; zeros would decay them."""

    def work(ranks: Ranks) -> tuple[bool, int]:
        used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
        one, _ = enter([used, unused], ranks)
        before = ranks.calls
        one.sum().backward()
        assert close(used.grad, torch.full((2,), 2.0))
        return unused.grad is None, ranks.calls - before

    assert run_ranks(2, work) == [(True, 1)] * 2


# Networks


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [4, 7, 9])
@pytest.mark.parametrize("training", [True, False])
def test_a_network_gives_the_same_and_learns_the_same(size, rows, training, working_as) -> None:
    torch.manual_seed(1)
    whole, x = network().train(training), images(rows)
    labels = torch.arange(rows) % 5
    x_whole = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(whole(x_whole), labels)
    loss.backward()

    def work(ranks: Ranks) -> None:
        own = copied[ranks.rank]
        own_x = x.clone().requires_grad_()
        with working_as(ranks):
            found = nn.functional.cross_entropy(own(own_x), labels)
            found.backward()
        assert ranks.calls > 0
        assert close(loss, found) and close(x_whole.grad, own_x.grad)
        for (name, a), b in zip(whole.named_parameters(), own.parameters(), strict=True):
            assert close(a.grad, b.grad), name
        for (name, a), b in zip(whole.named_buffers(), own.buffers(), strict=True):
            assert close(a, b) if a.is_floating_point() else torch.equal(a, b), name

    fresh = network().train(training)
    fresh.load_state_dict(whole_start(whole))
    copied = [copy.deepcopy(fresh) for _ in range(size)]
    run_ranks(size, work)


def whole_start(trained: Network) -> dict[str, Tensor]:
    """The weights it has, and the statistics it began with."""
    state = trained.state_dict()
    for name, value in network().state_dict().items():
        if "running" in name or "batches" in name:
            state[name] = value
    return state


@pytest.mark.parametrize("rows", [5, 6])
@pytest.mark.parametrize("training", [True, False])
def test_a_step_through_a_step_is_the_same(rows, training, working_as) -> None:
    """As CIM's mask step and mnemonics take it: functional, and differentiated twice."""
    torch.manual_seed(2)
    whole, x = network().train(training), images(rows)
    labels = torch.arange(rows) % 5

    def pixels(own: Network) -> tuple[Tensor, ...]:
        free = x.clone().requires_grad_()
        named = dict(own.named_parameters())
        theta = {name: value.detach().requires_grad_() for name, value in named.items()}

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            scores = torch.func.functional_call(own, parameters, (free,))
            return nn.functional.cross_entropy(scores, labels)

        gradients = torch.autograd.grad(loss(theta), list(theta.values()), create_graph=True)
        stepped = {n: v - 0.1 * g for (n, v), g in zip(theta.items(), gradients, strict=True)}
        after = loss(stepped)
        return after, *torch.autograd.grad(after, [free, *theta.values()])

    expected = pixels(whole)

    def work(ranks: Ranks) -> None:
        with working_as(ranks):
            found = pixels(copied[ranks.rank])
        for a, b in zip(expected, found, strict=True):
            assert close(a, b)

    copied = [copy.deepcopy(whole) for _ in range(2)]
    run_ranks(2, work)


def test_levels_and_tangents_are_gathered_one_by_one(working_as) -> None:
    torch.manual_seed(3)
    backbone = resnet20(width=4).double().eval()
    whole = Network([backbone], LinearHead(16, classes=2)).double()
    x = images(5)
    linear = linearize(backbone)

    def work(ranks: Ranks) -> None:
        with working_as(ranks), torch.no_grad():
            levels = copied[ranks.rank].levels(x)
            pair = in_shares(linear, linear.tangent, x)
        assert isinstance(levels, list) and isinstance(pair, tuple)
        for a, b in zip((*expected, *tangents), (*levels, *pair), strict=True):
            assert close(a, b) and a.stride() == b.stride()

    with torch.no_grad():
        expected, tangents = whole.levels(x), linear.tangent(x)
    copied = [copy.deepcopy(whole) for _ in range(2)]
    run_ranks(2, work)


@pytest.mark.parametrize("why", ["few rows", "hooks", "dropout", "vmap"])
def test_what_can_not_be_divided_is_computed_by_every_rank(why, working_as) -> None:
    whole = network().eval()
    x = images(2 if why == "few rows" else 6)
    seen: list[int] = []
    if why == "hooks":
        whole.extractors[0].layers[0].register_forward_hook(lambda *a: seen.append(len(a[1][0])))
    if why == "dropout":
        whole.extractors[0].layers.append(nn.Dropout2d().train())

    def work(ranks: Ranks) -> int:
        with working_as(ranks), torch.no_grad():
            if why == "vmap":
                torch.vmap(lambda image: whole(image[None]))(x)
            else:
                whole(x)
        return ranks.calls

    assert run_ranks(3, work) == [0, 0, 0]
    assert seen == ([6, 6, 6] if why == "hooks" else [])


def test_a_part_within_a_part_is_not_divided_again(working_as) -> None:
    inner = network().eval()

    def work(ranks: Ranks) -> int:
        with working_as(ranks), torch.no_grad():
            found = in_shares(inner, inner, images(4))
        assert found.shape == (4, 5)
        return ranks.calls

    assert run_ranks(2, work) == [1, 1]


def test_parameters_are_the_module_s_own_again_even_after_an_error(working_as) -> None:
    whole = network()
    before = list(whole.parameters())

    def fail(_: Tensor) -> Tensor:
        assert type(whole.head.weight) is Tensor
        raise KeyError

    def work(ranks: Ranks) -> None:
        with working_as(ranks), pytest.raises(KeyError):
            in_shares(whole, fail, images(4))

    class Two(Ranks):
        size = 2

    work(Two())
    assert all(a is b for a, b in zip(before, whole.parameters(), strict=True))
