"""What the machine code of the kernels must be like: this needs no GPU, only Triton's assembler.

On sm_90 every kernel is compiled for every dtype, on sm_80 for bfloat16 and, where instructions
are counted, float32; the rest of sm_80, which has differed by a few registers only, is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

from fastcil.kernels import cam_boxes, pade, soft_compose  # noqa: E402

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
IMAGES = 32
INSTRUCTIONS = 46  # per element, above which an H200 computes longer than it loads


class Variant(NamedTuple):
    """A launcher, the arguments for a dtype, and what its first kernel moves 128 bits at a time."""

    module: object
    launcher: str
    arguments: Callable[[torch.dtype], tuple]
    loads: int  # arrays
    stores: int
    only: bool  # in the innermost loop that loads, there is no other access


def empty(*shape, dtype, channels_last=False):
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if channels_last else tensor


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def rational(dtype, groups=None, channels_last=False):
    """x and its coefficients of degrees (5, 4)."""
    x = empty(IMAGES, 64, 56, 56, dtype=dtype, channels_last=channels_last)
    rows = () if groups is None else (groups,)
    return x, empty(*rows, 6, dtype=wide(dtype)), empty(*rows, 4, dtype=wide(dtype))


def pade_arguments(dtype, **layout):
    return (*rational(dtype, **layout), "A")


def pade_backward_arguments(dtype, **layout):
    x, a, b = rational(dtype, **layout)
    return x, x, a, b, "A"


def pade_double_backward_arguments(dtype):
    x, a, b = rational(dtype)
    return x, a, b, x, x, a, b, "A"


def cam_boxes_arguments(dtype, channels_last=False):
    features = empty(IMAGES, 512, 7, 7, dtype=dtype, channels_last=channels_last)
    sizes = empty(IMAGES, 2, dtype=torch.int64)
    return features, empty(IMAGES, 512, dtype=dtype), sizes, 0.6


def soft_compose_arguments(dtype):
    images = empty(IMAGES, 3, 224, 224, dtype=dtype)
    return images, empty(IMAGES, 7, 7, dtype=wide(dtype)), 4.0


def soft_compose_backward_arguments(dtype):
    images, *rest = soft_compose_arguments(dtype)
    return images, images, *rest


VARIANTS = {
    "pade": Variant(pade, "pade", pade_arguments, 1, 1, True),
    "pade_backward": Variant(pade, "pade_backward", pade_backward_arguments, 2, 1, True),
    "pade_double_backward": Variant(
        pade, "pade_double_backward", pade_double_backward_arguments, 3, 2, True
    ),
    # A tile of planes that are 49 positions long begins anywhere: the load of its weights is short.
    "cam_boxes": Variant(cam_boxes, "cam_boxes", cam_boxes_arguments, 1, 0, False),
    # The image itself is loaded so, the pixels that its cells show are gathered.
    "soft_compose": Variant(soft_compose, "soft_compose", soft_compose_arguments, 1, 1, False),
    "soft_compose_backward": Variant(
        soft_compose, "soft_compose_backward", soft_compose_backward_arguments, 2, 1, False
    ),
}
LAYOUTS = {
    "pade_backward, groups, channels last": Variant(
        pade,
        "pade_backward",
        lambda dtype: pade_backward_arguments(dtype, groups=8, channels_last=True),
        2,
        1,
        True,
    ),
    "cam_boxes, channels last": Variant(
        cam_boxes, "cam_boxes", lambda dtype: cam_boxes_arguments(dtype, True), 1, 0, False
    ),
}


def check(name, code, most=255):
    """Raise unless a kernel keeps everything in registers, so many at most, and adds in order."""
    assert code.registers <= most, f"{name} takes {code.registers} registers"
    assert code.stack == 0, f"{name} has {code.stack} bytes of stack"
    assert not code.count(r"\b(LDL|STL)\b"), f"{name} spills"
    assert not code.count(r"\b(ATOM\w*|RED)\b"), f"{name} has atomics"


def check_accesses(name, variant, code, dtype):
    """Raise unless the arrays move 128 bits at a time; instructions per element of that loop."""
    loop = code.loop(r"\bLDG\.\S*128\b")

    def count(pattern):
        return sum(text.count(pattern) for text in loop)

    loads, stores = (sum(f"{way}." in t and ".128" in t for t in loop) for way in ("LDG", "STG"))
    assert loads and loads % variant.loads == 0, f"{name} has {loads} wide loads"
    assert stores == loads // variant.loads * variant.stores, f"{name} has {stores} wide stores"
    if variant.only:
        assert (count("LDG."), count("STG.")) == (loads, stores), f"{name} has narrow accesses"
    return len(loop) / (loads // variant.loads * 16 // dtype.itemsize)


def examine(variants, dtype, architecture, launches, assemble_all, capsys):
    """Check all kernels of these variants; instructions per element of each one's first."""
    rows, found = [], []
    for name, variant in variants.items():
        for launch in launches(variant.module, variant.launcher, *variant.arguments(dtype)):
            rows.append((f"{name}: {launch.kernel.__name__}", name))
            found.append(launch)
    counts = {}
    for (title, name), code in zip(rows, assemble_all(found, architecture), strict=True):
        check(title, code)
        line = f"sm_{architecture} {dtype} {title}: {code.registers} registers"
        if name not in counts:
            counts[name] = check_accesses(title, variants[name], code, dtype)
            line += f", {counts[name]:.1f} instructions per element"
        print(line)
    return counts
