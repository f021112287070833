"""Batch norm over ranks against torch's own over the whole batch, in uneven shares."""

from __future__ import annotations

import pytest
import torch
from thread_ranks import run_ranks, sharing
from torch import Tensor, nn

from fastcil.errors import FastcilError
from fastcil.nn.ranks import Ranks
from fastcil.nn.shared_norm import plain_batch_norm, shared_batch_norm
from fastcil.nn.shares import in_shares

SHAPES = {"vectors": (5,), "sequences": (5, 3), "maps": (5, 4, 3)}
KINDS = {"vectors": nn.BatchNorm1d, "sequences": nn.BatchNorm1d, "maps": nn.BatchNorm2d}


def norm(form: str, **options) -> nn.Module:
    made = KINDS[form](5, **options).double()
    if made.affine:
        with torch.no_grad():
            made.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(5))
            made.bias.normal_(generator=torch.Generator().manual_seed(6))
    return made


def rows(form: str, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(count, *SHAPES[form], dtype=torch.float64) * 3 + 100
    return x.to(dtype)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("count", [2, 7])
def test_it_is_torch_s_batch_norm_of_the_whole_batch(form, options, count, monkeypatch) -> None:
    torch.manual_seed(0)
    whole, x = norm(form, **options), rows(form, count).requires_grad_()
    pull = torch.randn_like(x)
    expected = whole(x)
    expected.backward(pull)

    def work(ranks: Ranks) -> None:
        own, mine = norm(form, **options), x.detach().clone().requires_grad_()
        with working_as(ranks):
            found = in_shares(own, own, mine)
        found.backward(pull)
        assert torch.allclose(expected, found, rtol=1e-9, atol=1e-11)
        assert torch.allclose(x.grad, mine.grad, rtol=1e-7, atol=1e-11)
        for a, b in zip(whole.parameters(), own.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-11)
        for (name, a), b in zip(whole.named_buffers(), own.buffers(), strict=True):
            assert torch.allclose(a, b, rtol=1e-12), name

    with sharing(monkeypatch) as working_as:
        run_ranks(2, work)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_fused_one_is_the_plain_one_twice_differentiated(size) -> None:
    torch.manual_seed(1)
    x, pull, probe = (torch.randn(7, 5, 4, 3, dtype=torch.float64) for _ in range(3))
    weight, bias = torch.rand(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def both(ranks: Ranks) -> None:
        share = ranks.share(7)
        positions = [count * 12 for count in ranks.counts(7)]
        found = []
        for fused in (True, False):
            own = [t.clone().requires_grad_() for t in (x[share], weight, bias)]
            if fused:
                y, _, _ = shared_batch_norm(*own, 1e-5, positions, ranks)
            else:
                y = plain_batch_norm(*own, 1e-5, 84, ranks)
            plain_first = torch.autograd.grad(y, own, pull[share], retain_graph=True)
            first = torch.autograd.grad(y, own, pull[share], create_graph=True)
            second = torch.autograd.grad((first[0] * probe[share]).sum() + first[1].sum(), own[:2])
            found.append([y, *plain_first, *first, *second])
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-11)

    run_ranks(size, both)


def test_derivatives_pass_torch_s_checks() -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def value(*given: Tensor) -> Tensor:
        return shared_batch_norm(*given, 1e-3, [12], Ranks())[0]

    assert torch.autograd.gradcheck(value, (x, weight, bias))
    assert torch.autograd.gradgradcheck(value, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_single_and_half_precision_are_as_good_as_torch_s(dtype) -> None:
    """A mean a hundred deviations away from zero: sums of squares would cancel."""
    torch.manual_seed(3)
    x = rows("maps", 8, dtype)
    exact = nn.functional.batch_norm(x.double(), None, None, training=True)
    torchs = nn.functional.batch_norm(x, None, None, training=True)
    worst = (torchs.double() - exact).abs().max()

    def work(ranks: Ranks) -> Tensor:
        own = x[ranks.share(8)].clone().requires_grad_()
        y, _, _ = shared_batch_norm(own, None, None, 1e-5, [60, 36], ranks)
        y.sum().backward()
        assert y.dtype == dtype and own.grad.dtype == dtype
        return y.detach()

    found = torch.cat(run_ranks(2, lambda ranks: work(uneven(ranks))))
    assert (found.double() - exact).abs().max() <= 2 * worst


def uneven(ranks: Ranks) -> Ranks:
    """The same ranks, of whose rows the first has five and the second three."""
    ranks.share = lambda rows: [slice(0, 5), slice(5, 8)][ranks.rank]  # type: ignore[method-assign]
    return ranks


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(FastcilError, match="one value per channel"):
        shared_batch_norm(torch.zeros(1, 3), None, None, 1e-5, [1], Ranks())
