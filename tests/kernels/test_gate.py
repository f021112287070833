"""The kernels' machine code, compiled ahead of time for GPUs that need not be here.

Nothing spills, sums never meet in atomics, and memory is read and written 128 bits at a time.
"""

from __future__ import annotations

import importlib

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ARCHITECTURES = [80, 90]


def meta(*shape, dtype, layout=torch.contiguous_format):
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)


def pade(dtype, order, groups=None, layout=torch.contiguous_format):
    """Arguments of the op, of its gradient or of that one's."""
    x = meta(256, 64, 56, 56, dtype=dtype, layout=layout)
    working = torch.promote_types(dtype, torch.float32)
    rows = () if groups is None else (groups,)
    a, b = meta(*rows, 6, dtype=working), meta(*rows, 4, dtype=working)
    return ((), (x,), (x, a, b, x))[order] + (x, a, b, "A")


def cam_boxes(dtype, layout):
    features = meta(256, 512, 7, 7, dtype=dtype, layout=layout)
    return features, meta(256, 512, dtype=dtype), meta(256, 2, dtype=torch.int64), 0.6


def soft_compose(dtype, order, layout):
    images = meta(256, 3, 224, 224, dtype=dtype, layout=layout)
    maps = meta(256, 7, 7, dtype=torch.promote_types(dtype, torch.float32))
    return ((), (images,))[order] + (images, maps, 4.0)


# Module, launcher, and the arguments for a dtype.
CASES = {
    "pade": ("pade", "pade", lambda d: pade(d, 0)),
    "pade_backward": ("pade", "pade_backward", lambda d: pade(d, 1)),
    "pade_double_backward": ("pade", "pade_double_backward", lambda d: pade(d, 2)),
    "pade_backward, groups, channels_last": (
        "pade",
        "pade_backward",
        lambda d: pade(d, 1, 8, torch.channels_last),
    ),
    "cam_boxes": ("cam_boxes", "cam_boxes", lambda d: cam_boxes(d, torch.contiguous_format)),
    "cam_boxes, channels_last": (
        "cam_boxes",
        "cam_boxes",
        lambda d: cam_boxes(d, torch.channels_last),
    ),
    "soft_compose": (
        "soft_compose",
        "soft_compose",
        lambda d: soft_compose(d, 0, torch.channels_last),
    ),
    "soft_compose_backward": (
        "soft_compose",
        "soft_compose_backward",
        lambda d: soft_compose(d, 1, torch.contiguous_format),
    ),
}
OUTPUT_IS_SMALL = ("cam_boxes", "cam_boxes, channels_last")


def launched(launches, case, dtype):
    module, name, arguments = CASES[case]
    return launches(importlib.import_module(f"fastcil.kernels.{module}"), name, *arguments(dtype))


def spills(code):
    return code.stack > 0 or code.count(r"\b(LDL|STL)\b") > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_machine_code(case, dtype, architecture, launches, assemble):
    main, *collecting = [assemble(each, architecture) for each in launched(launches, case, dtype)]
    for code in (main, *collecting):
        assert not spills(code)
        assert not code.count(r"\b(ATOM|ATOMG|ATOMS|RED)\b")
    assert main.count(r"\bLDG\.E\.\S*128\b")
    assert case in OUTPUT_IS_SMALL or main.count(r"\bSTG\.E\.\S*128\b")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_instructions_of_the_gradient(dtype, architecture, launches, assemble):
    """An H200 has the time for 46 a bfloat16 element while memory brings the next."""
    code = assemble(launched(launches, "pade_backward", dtype)[0], architecture)
    loop = code.loop(r"\bLDG\.E\.\S*128\b")
    loads = sum("LDG" in line and "128" in line for line in loop)  # as many of x as of g
    elements = loads / 2 * 16 / dtype.itemsize
    assert len(loop) / elements <= 46


def test_what_spills_is_caught(launches, assemble):
    main = launched(launches, "pade_double_backward", torch.float32)[0]
    assert spills(assemble(main._replace(constants=main.constants | {"maxnreg": 32}), 90))
