"""What the machine code of the kernels must be like: this needs no GPU, only Triton's assembler.

Every kernel is compiled for bfloat16 on sm_90, and Padé's gradient for float32 on sm_80, where the
same code has differed by a few registers. The other dtypes, and the rest of sm_80, are slow.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

pade = pytest.importorskip("fastcil.kernels.pade", reason="triton is not installed")
cam_boxes = pytest.importorskip("fastcil.kernels.cam_boxes")
soft_compose = pytest.importorskip("fastcil.kernels.soft_compose")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

IMAGES = 32
# Per element of Padé's gradient: with more an H200 computes longer than it takes to move bfloat16.
# Triton 3.8 and 3.9 order the same operations less well.
NEW = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 7)
MOST_INSTRUCTIONS = 56 if NEW else 46


class Variant(NamedTuple):
    """A launcher, its arguments for a dtype, and the arrays of its first kernel's inner loop."""

    module: ModuleType
    launcher: str
    arguments: Callable[[torch.dtype], tuple]
    loads: int  # arrays of which a thread loads 128 bits at a time
    stores: int
    narrow: bool = False  # whether the loop has other accesses beside


def empty(*shape, dtype, channels_last=False):
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if channels_last else tensor


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def rational(dtype, groups=(), channels_last=False):
    """x and its coefficients of degrees (5, 4)."""
    x = empty(IMAGES, 64, 56, 56, dtype=dtype, channels_last=channels_last)
    return x, empty(*groups, 6, dtype=wide(dtype)), empty(*groups, 4, dtype=wide(dtype))


def of_pade(dtype):
    return *rational(dtype), "A"


def of_pade_backward(dtype, **layout):
    x, a, b = rational(dtype, **layout)
    return x, x, a, b, "A"


def of_pade_double_backward(dtype):
    x, a, b = rational(dtype)
    return x, a, b, x, x, a, b, "A"


def of_cam_boxes(dtype, channels_last=False):
    features = empty(IMAGES, 512, 7, 7, dtype=dtype, channels_last=channels_last)
    sizes = empty(IMAGES, 2, dtype=torch.int64)
    return features, empty(IMAGES, 512, dtype=dtype), sizes, 0.6


def of_soft_compose(dtype):
    return empty(IMAGES, 3, 224, 224, dtype=dtype), empty(IMAGES, 7, 7, dtype=wide(dtype)), 4.0


def of_soft_compose_backward(dtype):
    images, cam, ratio = of_soft_compose(dtype)
    return images, images, cam, ratio


BACKWARD = Variant(pade, "pade_backward", of_pade_backward, 2, 1)
VARIANTS = {
    "pade": Variant(pade, "pade", of_pade, 1, 1),
    "pade_backward": BACKWARD,
    "pade_double_backward": Variant(pade, "pade_double_backward", of_pade_double_backward, 3, 2),
    # Beside the features their weights: planes of 49 positions end within a thread's share.
    "cam_boxes": Variant(cam_boxes, "cam_boxes", of_cam_boxes, 1, 0, narrow=True),
    # Beside the image the pixels that its cells show: they are gathered.
    "soft_compose": Variant(soft_compose, "soft_compose", of_soft_compose, 1, 1, narrow=True),
    "soft_compose_backward": Variant(
        soft_compose, "soft_compose_backward", of_soft_compose_backward, 2, 1, narrow=True
    ),
}
LAYOUTS = {
    "pade_backward of groups, channels last": BACKWARD._replace(
        arguments=lambda dtype: of_pade_backward(dtype, groups=(8,), channels_last=True)
    ),
    "cam_boxes, channels last": VARIANTS["cam_boxes"]._replace(
        arguments=lambda dtype: of_cam_boxes(dtype, channels_last=True)
    ),
}


def check(name, code):
    """Raise unless a kernel keeps to its registers and adds in a fixed order."""
    assert code.stack == 0, f"{name} has {code.stack} bytes of stack"
    assert not code.count(r"\b(LDL|STL)\b"), f"{name} spills"
    assert not code.count(r"\b(ATOM\w*|REDG?)\b"), f"{name} has atomics"


def instructions_per_element(name, variant, code, dtype):
    """Of the loop that loads 128 bits at a time; raise unless it moves all its arrays so."""
    loop = code.loop(r"\bLDG\.\S*128\b")
    loads, stores = (sum(f"{way}." in text for text in loop) for way in ("LDG", "STG"))
    far_loads = sum("LDG." in text and ".128" in text for text in loop)
    far_stores = sum("STG." in text and ".128" in text for text in loop)
    accesses, rest = divmod(far_loads, variant.loads)
    assert not rest and far_stores == accesses * variant.stores, f"{name}: {far_loads}/{far_stores}"
    assert variant.narrow or (loads, stores) == (far_loads, far_stores), f"{name} has narrow ones"
    return len(loop) / (accesses * 16 // dtype.itemsize)


@pytest.fixture
def gate(launches, assemble_all):
    """Checks every kernel of some variants; instructions per element of each one's first."""

    def run(variants, dtype, architecture):
        found = {
            name: launches(variant.module, variant.launcher, *variant.arguments(dtype))
            for name, variant in variants.items()
        }
        codes = iter(
            assemble_all([each for every in found.values() for each in every], architecture)
        )
        counts = {}
        for name, every in found.items():
            own = [next(codes) for _ in every]
            for launch, code in zip(every, own, strict=True):
                check(f"{name}: {launch.kernel.__name__}", code)
            counts[name] = instructions_per_element(name, variants[name], own[0], dtype)
            registers = [code.registers for code in own]
            print(f"sm_{architecture} {dtype} {name}: registers {registers}, {counts[name]:.1f}")
        return counts

    return run


def marked(dtype, architecture):
    # Half precision's code is bfloat16's but for its conversions, single precision's simpler.
    slow = (dtype, architecture) != (torch.bfloat16, 90)
    return pytest.param(dtype, architecture, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("dtype", "architecture"),
    [
        marked(dtype, architecture)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        for architecture in (90, 80)
    ],
    ids=str,
)
def test_kernels(dtype, architecture, gate):
    count = gate(VARIANTS, dtype, architecture)["pade_backward"]
    assert count <= MOST_INSTRUCTIONS or dtype == torch.float64


def test_gradient_of_pade_in_float32_on_sm_80(gate):
    assert (
        gate({"pade_backward": BACKWARD}, torch.float32, 80)["pade_backward"] <= MOST_INSTRUCTIONS
    )


def test_other_layouts(gate):
    gate(LAYOUTS, torch.bfloat16, 90)


@triton.jit
def add_to(total, values, BLOCK: tl.constexpr):
    tl.atomic_add(total, tl.sum(tl.load(values + tl.arange(0, BLOCK)), 0))


def test_spills_and_atomics_do_not_pass(launches, assemble_all):
    arguments = of_pade_backward(torch.float32)
    backward = launches(pade, "pade_backward", *arguments)[0]
    spilling = backward._replace(constants=backward.constants | {"maxnreg": 40})
    values = empty(128, dtype=torch.float32)
    adding = backward._replace(kernel=add_to, arguments=(values, values), constants={"BLOCK": 128})
    spilled, added = assemble_all([spilling, adding], 90)
    assert spilled.count(r"\bSTL\b") > 10
    with pytest.raises(AssertionError, match="bytes of stack"):
        check("spilling", spilled)
    with pytest.raises(AssertionError, match="spills"):
        check("spilling", spilled._replace(stack=0))
    with pytest.raises(AssertionError, match="atomics"):
        check("adding", added)
