from __future__ import annotations

import importlib

import pytest
import torch

from fastcil.ops.pixel_program import OPERATIONS

kernels = pytest.importorskip("fastcil.kernels.read_batch", reason="triton is not installed")
read = importlib.import_module("fastcil.kernels.read")

MEAN, STD = [0.48, 0.45, 0.4], [0.23, 0.22, 0.27]
# The code for sm_80 differs by a few registers: one dtype stands for it.
COMPILED = [
    (90, torch.float32),
    (90, torch.bfloat16),
    pytest.param(90, torch.float16, marks=pytest.mark.slow),
    pytest.param(80, torch.bfloat16, marks=pytest.mark.slow),
]
NUMBERS = {
    "affine": (0.9, 0.2, -1.0, -0.3, 1.1, 2.0),
    "solarize": (99.5,),
    "posterize": (3.0,),
    "brightness": (1.3,),
    "contrast": (1.7,),
    "colour": (0.3,),
    "sharpness": (1.9,),
    "cutout": (2.0, 5.0, 5.0),
}


def raw_images(count, side, generator):
    pixels = torch.randint(0, 230, (count * 3 * side * side,), generator=generator).byte()
    offsets = torch.arange(count) * 3 * side * side
    geometry = torch.tensor([[side, side, 0, 0, side, side, 0, 0]] * count, dtype=torch.int16)
    return [pixels], torch.zeros(count, dtype=torch.int64), offsets, geometry


def programs(rows):
    """A program of named operations for each image."""
    steps = max(map(len, rows))
    operations = torch.zeros(len(rows), steps, dtype=torch.int8)
    amounts = torch.zeros(len(rows), steps, 9, dtype=torch.float64)
    amounts[..., 6:] = torch.tensor([128.0, 7.0, 255.0])
    for i, row in enumerate(rows):
        for k, name in enumerate(row):
            operations[i, k] = OPERATIONS[name]
            for n, number in enumerate(NUMBERS.get(name, ())):
                amounts[i, k, n] = number
    return operations, amounts


def compare(rows, size, dtype, side=14):
    generator = torch.Generator().manual_seed(len(rows))
    store = raw_images(len(rows), side, generator)
    program = programs(rows) if rows[0] is not None else (None, None)
    given = *store, *size, None, None, None, True, *program, MEAN, STD, dtype
    ours, theirs = kernels.read_batch(*given), torch.ops.fastcil.read_batch(*given)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    if dtype == torch.uint8:
        assert torch.equal(ours, theirs)
    else:
        # The interpreter rounds products and sums apart, and to bfloat16 towards zero.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=eps, atol=2e-7)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
def test_without_a_program(dtype):
    compare([None], (8, 9), dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_operation(name, monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 128)
    compare([(name,)], (11, 13), torch.uint8)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_programs_of_several_operations(dtype):
    rows = [("affine", "equalize", "brightness"), ("sharpness", "cutout", "colour")]
    compare([*rows, ("none", "contrast", "affine"), ("autocontrast",)], (14, 14), dtype)


@pytest.mark.usefixtures("interpreted")
def test_tiny_images(monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 16)
    rows = [("equalize", "autocontrast", "sharpness", "contrast")]
    compare(rows, (1, 1), torch.uint8, 2)
    compare(rows, (2, 3), torch.uint8, 3)


def arguments(dtype, steps):
    """Those of the launcher, on "meta"."""

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    store = [empty(99, dtype=torch.uint8)], empty(8), empty(8), empty(8, 8, dtype=torch.int16)
    crops, flips = empty(8, 4, dtype=torch.float32), empty(8, dtype=torch.bool)
    program = empty(8, steps, dtype=torch.int8), empty(8, steps, 9, dtype=torch.float64)
    return *store, 224, 224, crops, flips, None, True, *program, MEAN, STD, dtype


@pytest.mark.parametrize(
    "architecture, dtype",
    [pytest.param(90, torch.uint8, marks=pytest.mark.slow), *COMPILED],
    ids=str,
)
def test_programs_compiled(launches, assemble, monkeypatch, architecture, dtype):
    monkeypatch.setattr(read, "launch", lambda *arguments, **constants: None)
    (launch,) = launches(kernels, "read_batch", *arguments(dtype, 3))
    code = assemble(launch, architecture)
    assert code.stack == 0
    assert code.count(r"\b(LDL|STL|ATOM\w*|REDG?)\b") == 0
    assert code.count(r"\bSTG\.E\.128\b") > 0


@pytest.mark.parametrize("architecture, dtype", COMPILED, ids=str)
def test_reading_compiled(launches, assemble, monkeypatch, architecture, dtype):
    # The fixture looks at one module, and here the other launches.
    monkeypatch.setattr(read, "read_batch", kernels.read_batch, raising=False)
    (launch,) = launches(read, "read_batch", *arguments(dtype, 0))
    code = assemble(launch, architecture)
    assert code.stack == 0
    assert code.count(r"\b(LDL|STL|ATOM\w*|REDG?)\b") == 0
    assert code.count(r"\bSTG\.E\.128\b") > 0
