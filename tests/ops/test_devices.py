"""Every op on every device: against float64's definition, or where bytes come out, the CPU's.

On CUDA these are what `make gpu` runs, under compute-sanitizer as well: small, but of more than one
program, and in the layouts that the kernels tell apart.
"""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch
from torch.nn import functional

from fastcil import ops
from fastcil.curvature import ConvInputFactor
from fastcil.ops.pixel_program import AMOUNTS, OPERATIONS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Relative error of the whole tensor that a dtype allows where arithmetic is in float32 or wider.
ERROR = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
CONSTANT = {"A": 1, "B": 1, "C": 0.1, "nonsafe": 1}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}
device_of_test = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def filled(poison):
    """What no kernel wrote is NaN, or 255; a tool that looks for such bytes must find them."""
    if os.environ.get("FASTCIL_POISON") == "0":
        yield
        return
    with poison():
        yield


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(ours, truth, allowed):
    assert ours.shape == truth.shape
    scale = float(truth.norm()) or 1.0
    assert float((ours.detach().cpu().double() - truth).norm()) <= allowed * scale


def by_channel(coefficients, x):
    if coefficients.dim() == 1:
        return coefficients.unbind()
    rows = coefficients.repeat_interleave(x.shape[1] // len(coefficients), 0)
    return [column.view(-1, 1, 1) for column in rows.unbind(1)]


def rational(x, numerator, denominator, version):
    """The definition."""
    p = sum(a * x**k for k, a in enumerate(by_channel(numerator, x)))
    terms = [b * x**k for k, b in enumerate(by_channel(denominator, x), 1)]
    total = sum(term.abs() if version == "A" else term for term in terms)
    return p / (CONSTANT[version] + (total if version in ("A", "nonsafe") else total.abs()))


def to_second_order(function, leaves, gradient, directions):
    """The value, its gradient, and the gradient of <gradient, directions>."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    gradient = gradient.detach().requires_grad_()
    y = function(*leaves)
    first = torch.autograd.grad(y, leaves, gradient, create_graph=True)
    second = torch.autograd.grad(first, (gradient, *leaves), directions)
    return [y, *first, *second]


def compare(function, truth, leaves, gradient, directions, dtype, layout, device):
    """An op to second order; the first leaf is what it maps, the rest are parameters."""
    wide = torch.promote_types(dtype, torch.float32)

    def given(tensors):
        mapped, *rest = tensors
        return [LAYOUTS[layout](mapped.to(device, dtype)), *(t.to(device, wide) for t in rest)]

    given_gradient = LAYOUTS[layout](gradient.to(device, dtype))
    arguments = given(leaves), given_gradient, given(directions)
    ours, again = (to_second_order(function, *arguments) for _ in range(2))
    # float64 begins with the numbers that the dtype holds.
    held = [t.detach().cpu().double() for t in arguments[0]]
    ahead = [t.cpu().double() for t in arguments[2]]
    exact = to_second_order(truth, held, given_gradient.cpu().double(), ahead)
    for got, same, wanted in zip(ours, again, exact, strict=True):
        assert torch.equal(got, same)
        # The second order is taken from the first's output, which was rounded.
        assert_near(got, wanted.detach(), 8 * ERROR[dtype])


# Not all of their product: each brings three kernels to compile.
PADE = [
    *product(["A"], [(5, 4)], [1], LAYOUTS, ERROR),
    *product(["A"], [(5, 4)], [4], LAYOUTS, [torch.float32, torch.bfloat16]),
    *product("ABC", [(3, 3), (8, 8)], [1, 4], ["contiguous"], [torch.float32]),
    *product("C", [(2, 4)], [1], ["channels_last"], [torch.float64, torch.float16]),
    ("nonsafe", (4, 1), 1, "contiguous", torch.float32),
]


@device_of_test
@pytest.mark.parametrize("version, degrees, groups, layout, dtype", PADE, ids=str)
def test_pade(version, degrees, groups, layout, dtype, device):
    def coefficients(count, seed):
        rows = (groups, count) if groups > 1 else (count,)
        return normal(*rows, seed=seed) / 4

    def parts(seed):
        # Rows of 9 * 15 are no whole number of 128-bit accesses.
        a, b = coefficients(degrees[0] + 1, seed + 1), coefficients(degrees[1], seed + 2)
        return normal(3, 8, 9, 15, seed=seed), a, b

    x, a, b = parts(0)
    if version != "A":  # clear of poles, and of where a sum changes its sign
        x, b = x.abs(), b.abs()
    compare(
        lambda *leaves: ops.pade(*leaves, version),
        lambda *leaves: rational(*leaves, version),
        (x, a, b),
        normal(*x.shape, seed=9),
        parts(3),
        dtype,
        layout,
        device,
    )


@device_of_test
@pytest.mark.parametrize("size", [1e3, 1e8, 1e30], ids=str)
def test_pade_far_out(size, device):
    x = size * normal(64, 128, seed=0)
    a, b = normal(6, seed=1), normal(4, seed=2)
    leaves = [t.float().to(device).requires_grad_() for t in (x, a, b)]
    y = ops.pade(*leaves)
    (slope,) = torch.autograd.grad(y.sum(), leaves[0])
    held = [t.detach().cpu().double() for t in leaves]
    held[0].requires_grad_()
    exact = rational(*held, "A")
    assert_near(y, exact.detach(), ERROR[torch.float32])
    assert_near(slope, torch.autograd.grad(exact.sum(), held[0])[0], 1e-5)


def cam(features, weights):
    """Its definition."""
    map_ = torch.einsum("bchw,bc->bhw", features, weights)
    low, high = map_.amin((1, 2), keepdim=True), map_.amax((1, 2), keepdim=True)
    return (map_ - low) / (high - low)


@device_of_test
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cam(layout, dtype, device):
    leaves = normal(4, 32, 7, 5, seed=0), normal(4, 32, seed=1)
    directions = normal(4, 32, 7, 5, seed=2), normal(4, 32, seed=3)
    gradient = normal(4, 7, 5, seed=4)
    arguments = [[t.to(device, dtype) for t in part] for part in (leaves, [gradient], directions)]
    arguments[0][0] = LAYOUTS[layout](arguments[0][0])
    exact = [[t.cpu().double() for t in part] for part in arguments]
    ours, truth = (
        to_second_order(function, given, *gradient, ahead)
        for function, (given, gradient, ahead) in ((ops.cam, arguments), (cam, exact))
    )
    for got, wanted in zip(ours, truth, strict=True):
        assert_near(got, wanted.detach(), 20 * ERROR[dtype])


@device_of_test
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 33, 7, 7), (4, 512, 7, 7), (3, 8, 12, 5)], ids=str)
def test_cam_boxes(shape, layout, dtype, device):
    features = LAYOUTS[layout](normal(*shape, seed=0).to(device, dtype))
    weights = normal(*shape[:2], seed=1).to(device, dtype)
    sizes = torch.tensor([[224, 224], [31, 190], [7, 7], [3, 2], [500, 375]])[
        : len(shape) and shape[0]
    ]
    boxes, valid = ops.cam_boxes(features, weights, sizes.to(device), 0.6)
    assert bool(valid.all())
    near = 1e-12 if dtype == torch.float64 else 2e-6
    maps = cam(features.cpu().double(), weights.cpu().double())
    decided = 0
    for box, map_, (height, width) in zip(boxes.tolist(), maps, sizes.tolist(), strict=True):
        full = functional.interpolate(map_[None, None], (height, width), mode="bilinear")[0, 0]
        y, x = (full > 0.6).nonzero().unbind(1)
        wanted = [int(y.min()), int(x.min()), int(y.max()) + 1, int(x.max()) + 1]
        clear = float((full - 0.6).abs().min()) > near
        decided += clear
        assert box == wanted or not clear
    assert decided > len(sizes) // 2


@device_of_test
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("shape", [(5, 7, 7), (4, 33, 40), (3, 1, 5)], ids=str)
def test_salient_masks(shape, layout, dtype, device):
    maps = LAYOUTS[layout](normal(*shape, seed=0).to(device, dtype))
    maps[1] = 0.3  # says nothing
    sizes = torch.tensor([[224, 224], [31, 190], [7, 9], [3, 2], [500, 375]])[: len(maps)]
    masks, again = (ops.salient_masks(maps, sizes.to(device), 0.6) for _ in range(2))
    assert torch.equal(masks, again)
    parts = masks.cpu().split(sizes.prod(1).tolist())
    assert bool(parts[1].all())
    for k in {*range(len(maps))} - {1}:
        full = maps[k, None, None].cpu().double()
        full = functional.interpolate(full, tuple(sizes[k].tolist()), mode="bilinear").flatten()
        above = full - full.amin() - 0.6 * (full.amax() - full.amin())
        clear = above.abs() > 1e-5
        assert torch.equal(parts[k][clear], (above > 0)[clear])
        assert float(clear.double().mean()) > 0.99


def composed(images, map_, ratio):
    """The definition."""
    shown = []
    for side in images.shape[2:]:
        cells = max(1, int(side / ratio**0.5))
        shown.append(torch.arange(side) * cells // side * side // cells)
    coarse = images[:, :, shown[0]][:, :, :, shown[1]]
    mask = functional.interpolate(map_[:, None], images.shape[2:], mode="bilinear")
    return mask * images + (1 - mask) * coarse


@device_of_test
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 37, 301)], ids=str)
def test_soft_compose(shape, layout, dtype, device):
    compare(
        lambda *leaves: ops.soft_compose(*leaves, 4.0),
        lambda *leaves: composed(*leaves, 4.0),
        (normal(*shape, seed=0), normal(2, 7, 5, seed=1)),
        normal(*shape, seed=2),
        (normal(*shape, seed=3), normal(2, 7, 5, seed=4)),
        dtype,
        layout,
        device,
    )


@pytest.fixture(scope="module")
def stores(make_images):
    """Raw images and packed ones: the first arguments of the readers, and the packed parts."""
    images = make_images([(90, 131), (64, 64), (33, 200), (1, 1), (120, 7)])
    packed = ops.pack(*images.store, images.boxes(1), 4.0)
    count = len(images.arrays)
    rows = (
        [images.pixels, packed[0]],
        torch.arange(2).repeat_interleave(count),
        torch.cat([images.offsets, packed[1]]),
        torch.cat([images.geometry, packed[2]]),
    )
    return images, packed, rows


def moved(value, device):
    """The tensors in it, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [moved(each, device) for each in value] if isinstance(value, (list, tuple)) else value


@device_of_test
@pytest.mark.parametrize("nearest", ["opencv", "pillow"])
def test_pack_and_reconstruct(stores, nearest, device):
    images = stores[0]
    given = (*images.store, images.boxes(1))
    parts = ops.pack(*given, 4.0, nearest)
    there = ops.pack(*moved(given, device), 4.0, nearest)
    results = ops.reconstruct(*parts, nearest), ops.reconstruct(*there, nearest)
    for expected, got in [*zip(parts, there, strict=True), *zip(*results, strict=True)]:
        assert torch.equal(got.cpu(), expected)


def crops_of(geometry):
    sides = geometry[:, :2].double()
    generator = torch.Generator().manual_seed(2)
    low = (torch.rand(len(sides), 2, generator=generator) * 0.9 - 0.2) * sides
    high = low + (0.1 + torch.rand(len(sides), 2, generator=generator)) * sides
    return torch.cat([low, high], 1).float()


@device_of_test
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (50, 31), (224, 224)], ids=str)
def test_read(stores, size, antialias, device):
    rows = stores[2]
    flips = torch.arange(len(rows[1])) % 2 == 0
    given = (*rows, size, crops_of(rows[3]), flips)
    expected = ops.read(*given, antialias=antialias)
    got = ops.read(*moved(given[:4], device), size, *moved(given[5:], device), antialias=antialias)
    assert got.stride() == expected.stride() and torch.equal(got.cpu(), expected)


@device_of_test
@pytest.mark.parametrize("dtype", [torch.uint8, *list(ERROR)[1:]], ids=str)
@pytest.mark.parametrize("operation", [None, *OPERATIONS])
def test_read_batch(stores, operation, dtype, device):
    rows = stores[2]
    count = len(rows[1])
    program = None
    if operation is not None:
        amounts = torch.zeros(count, 2, AMOUNTS, dtype=torch.float64)
        amounts[..., 6:] = torch.tensor([128.0, 7.0, 255.0])
        affine = torch.tensor([0.9, 0.2, -1.0, -0.3, 1.1, 2.0])
        amounts[..., :6] = affine if operation == "affine" else 1.7
        if operation == "cutout":
            amounts[..., :3] = torch.tensor([2.0, 5.0, 5.0])
        steps = torch.tensor([[OPERATIONS[operation], OPERATIONS["brightness"]]], dtype=torch.int8)
        program = ops.PixelProgram(steps.repeat(count, 1), amounts)
    mean, std = (0.48, 0.45, 0.4), (0.23, 0.22, 0.27)
    options = {"antialias": True, "dtype": dtype}
    expected = ops.read_batch(
        *rows, (40, 37), mean, std, crops_of(rows[3]), program=program, **options
    )
    if program is not None:
        program = ops.PixelProgram(program.operations.to(device), program.amounts.to(device))
    got = ops.read_batch(
        *moved(rows, device),
        (40, 37),
        mean,
        std,
        crops_of(rows[3]).to(device),
        program=program,
        **options,
    )
    assert got.dtype == dtype and got.stride() == expected.stride()
    assert torch.equal(got.cpu(), expected)


@device_of_test
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_herding(dtype, device):
    starts = torch.tensor([0, 7, 7, 300, 301, 340])
    features = normal(340, 64, seed=0).to(dtype)
    expected = ops.herding(features.double(), starts, 20)
    assert torch.equal(ops.herding(features.to(device), starts.to(device), 20).cpu(), expected)


@device_of_test
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_patch_gram(weighted, layout, dtype, device):
    x = normal(5, 12, 13, 10, seed=0)
    weights = torch.rand(5, generator=torch.Generator().manual_seed(1)) if weighted else None
    geometry = {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    state = torch.zeros(72, 72, dtype=dtype, device=device)
    given = None if weights is None else weights.to(device)
    for _ in range(2):
        ops.patch_gram_(
            state, LAYOUTS[layout](x.to(device, dtype)), **geometry, weights=given, decay=0.5
        )
    rows = functional.unfold(x.to(dtype).double(), (3, 2), (1, 2), (1, 0), (2, 1))
    rows = rows * (1 if weights is None else weights.double().sqrt()[:, None, None])
    assert_near(state, 1.5 * torch.einsum("nil,njl->ij", rows, rows).tril(), ERROR[dtype])


@device_of_test
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("route", ["patches", "lags", "spectra"])
def test_input_factor(route, layout, dtype, device):
    x = normal(5, 20, 9, 11, seed=0)
    factor = ConvInputFactor(20, 3, padding=1, bias=True, dtype=dtype, route=route)
    for _ in range(2):
        factor.update(LAYOUTS[layout](x.to(device, dtype)), decay=0.5)
    rows = functional.unfold(x.to(dtype).double(), 3, padding=1).mT.reshape(-1, 180)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    assert_near(factor.dense(), rows.T @ rows / len(rows), ERROR[dtype])


@device_of_test
def test_input_factor_of_half_inputs(device):
    x = normal(5, 20, 9, 11, seed=0)
    factor = ConvInputFactor(20, 3, padding=1, half_inputs=True, route="lags")
    factor.update(x.to(device, torch.float32))
    rows = functional.unfold(x.bfloat16().double(), 3, padding=1).mT.reshape(-1, 180)
    # Rounded inputs apart, a GPU adds up in float32, though its tensor cores cut bits off as they
    # do; torch's products on a CPU end in bfloat16.
    allowed = 1e-5 if device == "cuda" else ERROR[torch.bfloat16]
    assert_near(factor.dense(), rows.T @ rows / len(rows), allowed)
