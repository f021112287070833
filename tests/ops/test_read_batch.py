"""The fused read against its steps, bit for bit: every operation, dtype and kind of image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcil.data.autoaugment import draw
from fastcil.ops import PixelProgram, grids, normalise, pack, read, read_batch
from fastcil.ops.pixel_ops import rotation
from fastcil.ops.pixel_program import AMOUNTS, OPERATIONS
from fastcil.ops.read_batch import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(25, 31), (60, 44), (1, 1), (32, 32), (90, 7), (3, 120)]


def rows(images: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The first arguments, for all images of one buffer."""
    pixels, offsets, geometry = images if type(images) is tuple else images.store
    return [pixels], torch.zeros_like(offsets), offsets, geometry


def batch_by_reference(
    arenas: list[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crops: Tensor | None = None,
    flips: Tensor | None = None,
    views: Tensor | None = None,
    antialias: bool = True,
    program: PixelProgram | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    steps = (None, None) if program is None else (program.operations, program.amounts)
    sources = (arenas, arena, offsets, geometry, *size, crops, flips, views, antialias)
    return reference(*sources, *steps, list(mean), list(std), dtype)


@pytest.fixture(params=[read_batch, batch_by_reference], ids=["op", "reference"])
def kernel(request: Any) -> Any:
    return request.param


def amounts(name: str, count: int, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Numbers for an operation, float64 [B, 9], in and a little out of their usual ranges."""
    out = np.zeros((count, AMOUNTS))
    out[:, 6:] = rng.integers(0, 256, (count, 3))
    if name == "affine":
        turn = rotation(torch.from_numpy(rng.uniform(-60, 60, count)), *size)
        out[:, :6] = turn.numpy() + rng.uniform(-0.3, 0.3, (count, 6)) * [1, 1, 20, 1, 1, 20]
    elif name == "solarize":
        out[:, 0] = rng.uniform(-20, 280, count)
    elif name == "posterize":
        out[:, 0] = rng.integers(0, 9, count)
    elif name == "cutout":
        out[:, :3] = rng.integers(-2, max(size) + 2, (count, 3))
    else:
        out[:, 0] = rng.uniform(-0.3, 2.5, count)
    return torch.from_numpy(out)


def random_program(
    count: int, steps: int, size: tuple[int, int], rng: np.random.Generator
) -> PixelProgram:
    names = list(OPERATIONS)
    tables = torch.stack([amounts(name, count, size, rng) for name in names])
    operations = torch.from_numpy(rng.integers(0, len(names), (count, steps)))
    return PixelProgram(operations.to(torch.int8), tables[operations, torch.arange(count)[:, None]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (24, 33), (1, 5), (70, 61)])
def test_reads_and_normalises(make_images, dtype, antialias, size):
    images = make_images(SIZES)
    packed = pack(*images.store, images.boxes(0))
    flips = torch.tensor([True, False, False, True, True, False])
    for source in (images, packed):
        arguments = (*rows(source), size)
        got = read_batch(*arguments, MEAN, STD, flips=flips, antialias=antialias, dtype=dtype)
        expected = read(*arguments, flips=flips, antialias=antialias)
        if dtype != torch.uint8:
            expected = normalise(expected, MEAN, STD, dtype)
        assert got.dtype == dtype and got.stride() == expected.stride()
        assert torch.equal(got, expected)


def test_normalises_as_the_equation_says(make_images, kernel):
    images = make_images(SIZES)
    got = kernel(*rows(images), (9, 11), MEAN, STD).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = (read(*rows(images), (9, 11)).double() / 255 - mean) / std
    assert (got - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (17, 31), (33, 64)])
def test_every_operation_alone_is_its_reference(make_images, name, size):
    rng = np.random.default_rng(7)
    images = make_images(SIZES * 2)
    count = len(images.arrays)
    numbers = amounts(name, count, size, rng)[:, None]
    program = PixelProgram(torch.full((count, 1), OPERATIONS[name], dtype=torch.int8), numbers)
    for dtype in DTYPES:
        arguments = (*rows(images), size, MEAN, STD)
        got = read_batch(*arguments, program=program, dtype=dtype)
        assert torch.equal(got, batch_by_reference(*arguments, program=program, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_programs_are_their_references(make_images, seed, dtype):
    rng = np.random.default_rng(seed)
    images = make_images([tuple(rng.integers(1, 80, 2).tolist()) for _ in range(30)], seed)
    size = tuple(rng.integers(1, 60, 2).tolist())
    views = torch.cat([images.boxes(seed), grids(images.geometry[:, :2], 4.0).short()], 1)
    options = {
        "crops": torch.tensor(rng.uniform(0, 20, (30, 4)) + [-15, -15, 10, 10]).float(),
        "flips": torch.from_numpy(rng.integers(0, 2, 30).astype(bool)),
        "views": views,
        "antialias": bool(seed % 2),
        "program": random_program(30, 6, size, rng),
        "dtype": dtype,
    }
    options["crops"][:, 2:] = torch.maximum(options["crops"][:, 2:], options["crops"][:, :2] + 1)
    arguments = (*rows(images), size, MEAN, STD)
    assert torch.equal(read_batch(*arguments, **options), batch_by_reference(*arguments, **options))


@pytest.mark.parametrize("policy", ["cifar", "imagenet"])
def test_policies_are_their_references(make_images, policy):
    images = make_images(SIZES * 20)
    plan = draw(len(images.arrays), policy, torch.Generator().manual_seed(0))
    arguments = (*rows(images), (21, 18), MEAN, STD)
    program = plan.program(21, 18)
    got = read_batch(*arguments, program=program)
    assert torch.equal(got, batch_by_reference(*arguments, program=program))


@pytest.mark.parametrize("kind", ["flat", "two levels", "ramp", "mostly black"])
@pytest.mark.parametrize("name", ["autocontrast", "equalize", "contrast", "sharpness"])
def test_images_with_few_levels(make_images, name, kind):
    images = make_images([(24, 27)])
    pixels = {
        "flat": torch.full_like(images.pixels, 77),
        "two levels": (images.pixels > 99) * torch.tensor(200).byte(),
        "ramp": torch.arange(images.pixels.numel()).remainder(211).byte(),
        "mostly black": (torch.arange(images.pixels.numel()) > 1900) * torch.tensor(200).byte(),
    }[kind]
    images = images._replace(pixels=pixels)
    program = PixelProgram.of(name, torch.tensor([1.7]))
    arguments = (*rows(images), (24, 27), MEAN, STD)
    got = read_batch(*arguments, program=program)
    assert torch.equal(got, batch_by_reference(*arguments, program=program))


def test_an_operation_leaves_other_images_alone(make_images, kernel):
    images = make_images(SIZES)
    program = PixelProgram.of("invert", count=6)
    program.operations[::2] = 0
    plain = kernel(*rows(images), (12, 12), MEAN, STD)
    changed = kernel(*rows(images), (12, 12), MEAN, STD, program=program)
    assert torch.equal(changed[::2], plain[::2])
    assert not torch.equal(changed[1], plain[1])


def test_threads_change_nothing(make_images, threads):
    images = make_images(SIZES * 5)
    program = random_program(30, 4, (20, 20), np.random.default_rng(0))
    arguments = (*rows(pack(*images.store, images.boxes(0))), (20, 20), MEAN, STD)
    with threads(1):
        expected = read_batch(*arguments, program=program)
    with threads(2):
        assert torch.equal(read_batch(*arguments, program=program), expected)


def test_writes_every_number(make_images, kernel, poison):
    images = make_images(SIZES, high=200)
    program = random_program(6, 3, (16, 37), np.random.default_rng(1))
    for size in ((1, 1), (5, 9), (16, 37)):
        for given in (None, program):
            with poison():
                out = kernel(*rows(images), size, MEAN, STD, program=given)
            assert not out.isnan().any()


def test_empty_batch(make_images, kernel):
    for program in (None, PixelProgram.empty(0), PixelProgram.of("invert", count=0)):
        out = kernel(*rows(make_images([])), (6, 5), MEAN, STD, program=program)
        assert out.shape == (0, 3, 6, 5) and out.dtype == torch.float32


def test_accepts_strided_programs(make_images, kernel):
    images = make_images(SIZES)
    program = random_program(6, 4, (7, 9), np.random.default_rng(0))
    strided = PixelProgram(
        torch.stack([program.operations] * 2, -1)[..., 0],
        torch.stack([program.amounts] * 2, 1)[:, 0],
    )
    arguments = (*rows(images), (7, 9), MEAN, STD)
    assert torch.equal(kernel(*arguments, program=strided), kernel(*arguments, program=program))


def test_opcheck(make_images):
    images = make_images(SIZES)
    program = random_program(6, 3, (9, 13), np.random.default_rng(0))
    flips = torch.arange(6) > 2
    for dtype in DTYPES:
        for steps in ((None, None), (program.operations, program.amounts)):
            arguments = (*rows(images), 9, 13, None, flips, None, True)
            torch.library.opcheck(
                torch.ops.fastcil.read_batch.default,
                (*arguments, *steps, list(MEAN), list(STD), dtype),
            )


def test_compiles_in_one_graph(make_images):
    images = make_images(SIZES)
    program = random_program(6, 3, (9, 13), np.random.default_rng(0))
    compiled = torch.compile(read_batch, fullgraph=True, backend="aot_eager")
    arguments = (*rows(images), (9, 13), MEAN, STD)
    expected = read_batch(*arguments, program=program)
    assert torch.equal(compiled(*arguments, program=program), expected)


def program_of(operation: int, column: int, number: float) -> PixelProgram:
    program = PixelProgram.of("none", count=2)
    program.operations[1, 0] = operation
    program.amounts[1, 0, column] = number
    return program


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (program_of(12, 0, 0), r"operations\[1, 0\] is 12"),
        (program_of(-1, 0, 0), r"operations\[1, 0\] is -1"),
        (program_of(7, 0, float("nan")), r"amounts\[1, 0\]"),
        (program_of(7, 0, float("inf")), r"amounts\[1, 0\]"),
        (program_of(1, 2, -16384), r"amounts\[1, 0\]"),
        (program_of(1, 6, -1), r"amounts\[1, 0\]"),
        (program_of(1, 8, 256), r"amounts\[1, 0\]"),
        (program_of(6, 0, 9), r"amounts\[1, 0\]"),
    ],
)
def test_says_which_row_is_wrong(make_images, kernel, program, says):
    with pytest.raises(ValueError, match=says):
        kernel(*rows(make_images(SIZES[:2])), (4, 4), MEAN, STD, program=program)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"mean": (0.5, 0.5)}, ValueError, "mean has 2 numbers"),
        ({"std": (1.0,) * 4}, ValueError, "std has 4 numbers"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std is"),
        ({"dtype": torch.float64}, ValueError, "dtype is torch.float64"),
        ({"size": (0, 4)}, ValueError, "size is"),
        ({"crops": torch.zeros(2, 4).double()}, TypeError, "crops has dtype"),
        ({"program": PixelProgram.of("invert", count=3)}, ValueError, "operations has shape"),
        (
            {"program": PixelProgram(torch.zeros(2, 1).char(), torch.zeros(2, 1, 9))},
            TypeError,
            "amounts has dtype",
        ),
    ],
)
def test_says_which_argument_is_wrong(make_images, changes, error, says):
    arguments = {"size": (4, 4), "mean": MEAN, "std": STD} | changes
    with pytest.raises(error, match=says):
        read_batch(*rows(make_images(SIZES[:2])), **arguments)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, 3).byte()])
def test_normalise_names_a_wrong_argument(images):
    with pytest.raises(ValueError, match="images"):
        normalise(images, MEAN, STD)
    with pytest.raises(ValueError, match=r"dtype is torch\.uint8"):
        normalise(torch.zeros(1, 3, 2, 2).byte(), MEAN, STD, torch.uint8)
