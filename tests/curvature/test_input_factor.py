from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional

from fastcil.curvature import ConvInputFactor
from fastcil.errors import FastcilError

ROUTES = ["patches", "lags", "spectra"]
# Of the whole factor, by the route that is taken and by one that was asked for.
ALLOWED = {torch.float64: (1e-12, 1e-12), torch.float32: (5e-7, 1e-5)}
SIZES = [(7, 9), (8, 5), (11, 11), (4, 4), (2, 3)]


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def patches(x, kernel, stride, padding, dilation, bias=False):
    """Rows (sample, position), as float64's unfold has them; padding (left, right, top, bottom)."""
    rows = functional.unfold(functional.pad(x.double(), padding), kernel, dilation, 0, stride)
    rows = rows.mT.reshape(-1, rows.shape[1])
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if bias else rows


def truth(x, weights=None, **layer):
    rows = patches(x, **layer)
    each = len(rows) // len(x)
    w = torch.ones(len(x)) if weights is None else weights
    return (rows.T * w.double().repeat_interleave(each)) @ rows / len(rows)


def fits(kernel, stride, padding, dilation, size, route):
    reach = dilation * (kernel - 1)
    border = max(0, reach - padding)
    return reach < min(size) + 2 * padding and (
        route in (None, "patches") or (stride == 1 and border <= min(size))
    )


GRID = [
    case
    for case in product((1, 2, 3, 5), (1, 2, 3), range(6), (1, 2), SIZES, [None, *ROUTES])
    if case[2] <= case[0] and fits(*case)
]


@pytest.mark.parametrize("kernel", (1, 2, 3, 5))
@pytest.mark.parametrize("route", [None, *ROUTES])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_it_is_the_mean_over_patches(kernel, route, dtype):
    """Every stride, padding, dilation and size of the grid, with a bias and with weights."""
    cases = [case for case in GRID if case[0] == kernel and case[5] == route]
    cases = cases if dtype == torch.float64 else cases[::3]
    assert cases
    for number, (_, stride, padding, dilation, size, _) in enumerate(cases):
        x = draw(3, 4, *size, seed=number, dtype=dtype)
        weights = torch.rand(3, generator=torch.Generator().manual_seed(number))
        layer = {"stride": stride, "dilation": dilation}
        factor = ConvInputFactor(
            4, kernel, padding=padding, bias=True, dtype=dtype, route=route, **layer
        )
        factor.update(x, weights=weights)
        wanted = truth(x, weights, kernel=kernel, padding=(padding,) * 4, bias=True, **layer)
        found = factor.dense()
        assert factor.route == (route or factor.route) and found.dtype == dtype
        assert torch.equal(found, found.mT)
        error = float((found - wanted).norm() / wanted.norm())
        assert error <= ALLOWED[dtype][route is not None], (stride, padding, dilation, size)


# Channels and side of what the layers of ResNet-18 see of CIFAR and of ImageNet.
RESNET18 = [(64, 32), (128, 16), (256, 8), (512, 4), (64, 56), (128, 28), (256, 14), (512, 7)]


@pytest.mark.parametrize("channels, side", RESNET18)
@pytest.mark.parametrize("positive", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_float32_at_the_sizes_of_real_layers(channels, side, positive):
    """Of inputs as a ReLU leaves them, with a mean, 5.2e-7 was the most: at 64 channels, 32x32."""
    x = draw(8, channels, side, side, dtype=torch.float32)
    x = x.relu_() if positive else x
    factor = ConvInputFactor(channels, 3, padding=1)
    factor.update(x)
    rows = patches(x, kernel=3, stride=1, padding=(1,) * 4, dilation=1)
    wanted = (rows.T @ rows).div_(len(rows))
    error = float((factor.dense() - wanted).norm() / wanted.norm())
    assert error <= (1e-6 if positive else ALLOWED[torch.float32][0])


@pytest.mark.parametrize(
    "kernel, padding, dilation", [((1, 3), (0, 1), (1, 1)), ((3, 2), (2, 0), (2, 1))], ids=str
)
@pytest.mark.parametrize("route", ROUTES)
def test_kernels_that_are_not_square(kernel, padding, dilation, route):
    x = draw(2, 18, 6, 9)
    factor = ConvInputFactor(18, kernel, 1, padding, dilation, dtype=torch.float64, route=route)
    factor.update(x)
    (py, px), layer = padding, {"kernel": kernel, "stride": 1, "dilation": dilation}
    assert torch.allclose(factor.dense(), truth(x, padding=(px, px, py, py), **layer))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding(mode):
    x = draw(2, 3, 6, 7)
    factor = ConvInputFactor(3, 3, padding=2, padding_mode=mode, dtype=torch.float64)
    factor.update(x)
    padded = functional.pad(x, (2, 2, 2, 2), mode)
    wanted = truth(padded, kernel=3, stride=1, padding=(0,) * 4, dilation=1)
    assert torch.allclose(factor.dense(), wanted)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel, dilation", [(3, 1), (2, 1), (4, 1), (2, 3)])
def test_padding_by_name(kernel, dilation):
    x = draw(2, 3, 6, 7)
    factor = ConvInputFactor(3, kernel, padding="same", dilation=dilation, dtype=torch.float64)
    factor.update(x)
    reach = dilation * (kernel - 1)
    less, more = reach // 2, reach - reach // 2
    layer = {"kernel": kernel, "stride": 1, "dilation": dilation}
    assert torch.allclose(factor.dense(), truth(x, padding=(less, more, less, more), **layer))
    # torch puts the odd one where we do.
    module = torch.nn.Conv2d(3, 5, kernel, padding="same", dilation=dilation).double()
    padded = functional.pad(x, (less, more, less, more))
    assert torch.allclose(
        module(x), functional.conv2d(padded, module.weight, module.bias, dilation=dilation)
    )


def test_groups_have_a_factor_each():
    x, weights = draw(4, 6, 5, 7), torch.rand(4)
    factor = ConvInputFactor(6, 3, 2, 1, groups=3, bias=True, dtype=torch.float64)
    factor.update(x, weights=weights)
    found = factor.dense()
    layer = {"kernel": 3, "stride": 2, "padding": (1,) * 4, "dilation": 1, "bias": True}
    assert found.shape == (3, 19, 19)
    for group, part in enumerate(x.chunk(3, dim=1)):
        assert torch.allclose(found[group], truth(part, weights, **layer))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("sizes", [[(6, 6), (6, 6), (6, 6)], [(6, 6), (8, 5), (6, 6)]], ids=str)
def test_decay_is_an_exponentially_weighted_mean(route, sizes):
    batches = [draw(n + 1, 3, *size, seed=n) for n, size in enumerate(sizes)]
    factor = ConvInputFactor(3, 3, padding=1, bias=True, dtype=torch.float64, route=route)
    layer = {"kernel": 3, "stride": 1, "padding": (1,) * 4, "dilation": 1, "bias": True}
    total, count = 0, 0
    for x in batches:
        factor.update(x, decay=0.6)
        rows = patches(x, **layer)
        total, count = 0.6 * total + rows.T @ rows, 0.6 * count + len(rows)
    assert torch.allclose(factor.dense(), total / count)
    # To look at it changes nothing.
    assert torch.allclose(factor.dense(), total / count)


@pytest.mark.parametrize("route", ROUTES)
def test_merging_is_linear(route):
    one, two = (
        ConvInputFactor(3, 3, padding=1, bias=True, dtype=torch.float64, route=route)
        for _ in range(2)
    )
    one.update(draw(2, 3, 6, 6, seed=1))
    two.update(draw(5, 3, 6, 6, seed=2))
    wanted, theirs = 0.25 * one.dense() + 0.75 * two.dense(), two.dense()
    one.merge(two, 0.25, 0.75)
    assert torch.allclose(one.dense(), wanted)
    assert torch.equal(two.dense(), theirs)


@pytest.mark.parametrize("route", [None, *ROUTES])
@pytest.mark.parametrize("side", [6, 8])
def test_a_saved_factor_goes_on(route, side):
    """By the route of one that was not saved, on images of other sizes too."""

    def make():
        return ConvInputFactor(3, 3, padding=1, bias=True, route=route)

    one, two = make(), make()
    one.update(draw(4, 3, 6, 6, dtype=torch.float32))
    two.load_state({name: tensor.clone() for name, tensor in one.state().items()})
    assert torch.equal(one.dense(), two.dense())
    for seed in (1, 2):
        for factor in (one, two):
            factor.update(draw(4, 3, side, 6, seed=seed, dtype=torch.float32), decay=0.5)
        assert one.route == two.route == (route or one.route)
    assert torch.allclose(one.dense(), two.dense(), rtol=1e-5, atol=1e-6)


def test_lags_that_were_loaded_stay_lags_where_patches_would_be_chosen():
    large, small = draw(2, 3, 9, 9), draw(2, 3, 4, 4, seed=1)
    one, other = (ConvInputFactor(3, 3, dtype=torch.float64) for _ in range(2))
    other.update(small)
    assert other.route == "patches"
    two = ConvInputFactor(3, 3, dtype=torch.float64, route="lags")
    two.update(large)
    one.load_state(two.state())
    one.update(small)
    layer = {"kernel": 3, "stride": 1, "padding": (0,) * 4, "dilation": 1}
    rows = torch.cat([patches(x, **layer) for x in (large, small)])
    assert one.route == "lags" and torch.allclose(one.dense(), rows.T @ rows / len(rows))


def test_what_is_saved_must_fit():
    factor = ConvInputFactor(3, 3, padding=1)
    factor.update(draw(1, 3, 6, 6))
    for other in (ConvInputFactor(4, 3, padding=1), ConvInputFactor(3, 3, padding=1, bias=True)):
        with pytest.raises(FastcilError, match="state has"):
            other.load_state(factor.state())


@pytest.mark.parametrize(
    "layer, size, route",
    [
        ({"kernel_size": 3, "padding": 1}, 8, "spectra"),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, 8, "patches"),
        ({"kernel_size": 1}, 8, "patches"),
        ({"kernel_size": 3, "padding": 1, "groups": 2}, 8, "patches"),
        ({"kernel_size": 5, "padding": 2}, 1, "patches"),
        ({"kernel_size": 3, "padding": 1}, 1024, "lags"),
    ],
    ids=str,
)
def test_the_route_follows_from_the_layer(layer, size, route):
    factor = ConvInputFactor(16, **layer)
    factor.update(torch.zeros(1, 16, size, size) + 1)
    assert factor.route == route


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 4.0, 0.25, 0.0])], ids=str)
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_half_inputs_are_rounded_and_sums_are_not(dtype, weights):
    x = draw(4, 8, 9, 6, dtype=dtype)
    layer = {"kernel": 3, "stride": 1, "padding": (1,) * 4, "dilation": 1, "bias": True}
    wanted = truth(x, weights, **layer)
    rough = ConvInputFactor(8, 3, padding=1, bias=True, dtype=dtype, half_inputs=True, route="lags")
    rough.update(x, weights=weights)
    found = rough.dense()
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 6e-3 and found.dtype == dtype
    # Batches beside which a single one is lost in bfloat16 still count.
    for _ in range(299):
        rough.update(x, weights=weights)
    assert float((rough.dense() - found).norm() / found.norm()) < 1e-5


@pytest.mark.parametrize("route", ["patches", "spectra"])
def test_routes_that_have_no_half_inputs_round_nothing(route):
    x, dense = draw(4, 3, 6, 6, dtype=torch.float32), []
    for half in (False, True):
        factor = ConvInputFactor(3, 3, padding=1, half_inputs=half, route=route)
        factor.update(x)
        dense.append(factor.dense())
    assert torch.equal(*dense)


def test_no_sample_adds_nothing():
    factor = ConvInputFactor(3, 3, padding=1)
    factor.update(torch.zeros(0, 3, 6, 6))
    with pytest.raises(FastcilError, match="is empty"):
        factor.dense()
    factor.update(draw(2, 3, 6, 6))
    before = factor.dense()
    factor.update(torch.zeros(0, 3, 6, 6))
    assert torch.equal(factor.dense(), before)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"in_channels": 0}, "in_channels is 0"),
        ({"groups": 2}, "in_channels is 3 for 2 groups"),
        ({"kernel_size": (3, 0)}, "kernel_size is"),
        ({"padding": "full"}, "padding is 'full'"),
        ({"padding_mode": "mirror"}, "padding_mode is 'mirror'"),
        ({"dtype": torch.bfloat16}, "dtype is"),
        ({"route": "fast"}, "route is 'fast'"),
        ({"route": "lags", "stride": 2}, "route is 'lags'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(FastcilError, match=f"^{words}"):
        ConvInputFactor(**({"in_channels": 3, "kernel_size": 3} | arguments))


@pytest.mark.parametrize(
    "x, options, words",
    [
        (torch.zeros(2, 4, 6, 6), {}, "x is"),
        (torch.zeros(2, 3, 6), {}, "x is"),
        (torch.zeros(2, 3, 6, 6), {"weights": torch.ones(3)}, "weights is"),
        (torch.zeros(2, 3, 6, 6), {"decay": 1.5}, "decay is 1.5"),
        (torch.zeros(2, 3, 1, 6), {}, "x is"),
    ],
)
def test_bad_batches_are_named_and_leave_nothing(x, options, words):
    factor = ConvInputFactor(3, 3, bias=True)
    with pytest.raises(FastcilError, match=f"^{words}"):
        factor.update(x, **options)
    assert factor.count == 0 and factor.nbytes == 0
