"""The ops on a GPU, beside the bytes that they must move and other ways to the same result.

"copy" moves as many bytes as the op must at least: what it reads and what it writes, once each.
"eager" and "compiled" are the definitions in PyTorch that the cases for the CPU are timed with.
Sizes are such that nothing fits the second-level cache.

A way is timed only after its result has been compared with float64's, or bytes with the CPU's.
Small, the same code runs on the CPU, as a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import bench_cam_boxes
import bench_herding
import bench_input_factor
import bench_pade
import bench_penalty
import bench_read
import bench_salient_masks
import bench_soft_compose
import torch
from clocks import in_graph
from input_factor_ways import Layer
from op_case import OURS, OpCase, Step
from torch import Tensor
from torch.nn import functional

from fastcil import ops
from fastcil.ops.herding import _herding

SHORT = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def place(full: bool) -> torch.device:
    return torch.device("cuda" if full else "cpu")


def copy(nbytes: float, device: torch.device) -> Step:
    """Reads half of so many bytes and writes the other half."""
    source = torch.ones(max(int(nbytes / 2), 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def assert_near(name: str, results: Any, truth: Any, allowed: float) -> None:
    for got, exact in zip(results, truth, strict=True):
        got, exact = got.detach().double().cpu(), exact.detach().cpu()
        gap = float((got - exact).norm() / exact.norm())
        assert gap < allowed, f"{name} computes something else: relative error {gap}"


def pade_work(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bench_pade.Work:
    """What a way is given: few images to compare its results, many to time it."""
    work = bench_pade.make_work(shape, device=device)
    x, gradient = (t.detach().to(dtype).requires_grad_() for t in (work.x, work.gradient))
    return replace(work, x=x, gradient=gradient)


def activation(name: str) -> Callable[..., Tensor]:
    return {
        OURS: ops.pade,
        "F.gelu": lambda x, a, b: functional.gelu(x),
        "eager": bench_pade.horner,
        "compiled": torch.compile(bench_pade.horner, dynamic=False),
        "float64": bench_pade.powers,
    }[name]


def pade_step(part: str, name: str, work: bench_pade.Work) -> Step:
    """The forward pass, the backward pass, or both."""
    function, leaves = activation(name), work.inputs
    if name == "F.gelu":
        leaves = leaves[:1]
    if part == "forward":
        inputs = [leaf.detach() for leaf in work.inputs]
        return lambda: (function(*inputs),)
    if part == "backward":
        y = function(*work.inputs)
        return lambda: torch.autograd.grad(y, leaves, work.gradient, retain_graph=True)
    return lambda: (y := function(*work.inputs), *torch.autograd.grad(y, leaves, work.gradient))


def make_pade(dtype: torch.dtype, part: str, name: str, full: bool) -> Step:
    shape, device = (256, 64, 56, 56) if full else (4, 8, 7, 7), place(full)
    if name == "copy":
        arrays = {"forward": 2, "backward": 3, "forward and backward": 5}[part]
        return copy(arrays * torch.Size(shape).numel() * dtype.itemsize, device)
    if name != "F.gelu":
        few = (2, *shape[1:])
        small = pade_work(few, dtype, device)
        held = [t.detach().double().requires_grad_() for t in (*small.inputs, small.gradient)]
        exact = bench_pade.Work(*held, small.directions)
        allowed = 1e-4 if dtype == torch.float32 else 2e-2
        truth = pade_step(part, "float64", exact)()
        assert_near(name, pade_step(part, name, small)(), truth, allowed)
    return pade_step(part, name, pade_work(shape, dtype, device))


def make_second_order(name: str, full: bool) -> Step:
    shape, device = (64, 64, 56, 56) if full else (4, 4, 7, 7), place(full)
    few = pade_work((2, *shape[1:]), torch.float32, device)
    held = (t.detach().cpu().double().requires_grad_() for t in (*few.inputs, few.gradient))
    ahead = tuple(d.cpu().double() for d in few.directions)
    truth = bench_pade.second_order("float64", bench_pade.Work(*held, ahead))()
    assert_near(name, bench_pade.second_order(name, few)(), truth, 1e-4)
    return bench_pade.second_order(name, pade_work(shape, torch.float32, device))


def make_cam_boxes(dtype: torch.dtype, name: str, full: bool) -> Step:
    shape, side = ((256, 512, 7, 7), 224) if full else ((4, 8, 7, 7), 32)
    work = bench_cam_boxes.make_work(shape, side, False)
    device = place(full)
    features = work.features.to(device, dtype)
    weights = work.class_weights.to(device, dtype)
    sizes = torch.full((len(features), 2), side, device=device)
    if name == "copy":
        return copy(nbytes(features, weights), device)
    find = {
        OURS: lambda f, w, s: ops.cam_boxes(f, w, sizes[: len(f)], bench_cam_boxes.THRESHOLD)[0],
        "eager": bench_cam_boxes.eager,
        "loop": lambda f, w, s: bench_cam_boxes.loop(f.float().cpu(), w.float().cpu(), s),
    }[name]
    if dtype == torch.float32:  # eager's maps are of the features' dtype
        few = bench_cam_boxes.Work(features[:8], weights[:8], side)
        bench_cam_boxes.check(name, find, few)
    step = partial(find, features, weights, side)
    return in_graph(step) if full and name != "loop" else step


def make_salient_masks(form: bench_salient_masks.Form, name: str, full: bool) -> Step:
    work = bench_salient_masks.make_work(form, full, place(full))
    if name == "copy":
        return copy(nbytes(work.maps) + form.images * work.side**2, place(full))
    return bench_salient_masks.make_step(name, work)


def make_soft_compose(form: bench_soft_compose.Form, name: str, full: bool) -> Step:
    shape = (256, 3, 224, 224) if full else (2, 3, 18, 20)
    if name != "copies":
        bench_soft_compose.check(name, form, shape, place(full))
    return bench_soft_compose.make_step(
        name, bench_soft_compose.make_work(form, shape, place(full))
    )


def read_arguments(busy: bool, dtype: torch.dtype, count: int) -> tuple[tuple[Any, ...], Any]:
    """Of `ops.read_batch`, on the CPU, and its options."""
    work = bench_read.make_work(True, min(count, 64))
    number = torch.arange(count)
    index = number % len(work.photos)
    store, augmentation = work.store, bench_read.BUSY if busy else bench_read.PLAIN
    program = augmentation.program(count, torch.Generator().manual_seed(1))
    # Copies apart, so that each image comes from memory.
    turn = number // len(work.photos)
    offsets = store.offsets[index] + turn * len(store.pixels)
    pixels = store.pixels.repeat(int(turn[-1]) + 1)
    side, mean, std = bench_read.SIDE, augmentation.mean, augmentation.std
    rows = ([pixels], torch.zeros_like(index), offsets, store.geometry[index], (side, side))
    return (*rows, mean, std, work.crops[index], work.flips[index]), (program, dtype)


def on(device: torch.device, value: Any) -> Any:
    """Its tensors there."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, ops.PixelProgram):
        return ops.PixelProgram(value.operations.to(device), value.amounts.to(device))
    if isinstance(value, (list, tuple)):
        return type(value)(on(device, each) for each in value)
    return value


def make_read(busy: bool, name: str, full: bool) -> Step:
    given, (program, dtype) = read_arguments(busy, torch.float16, 256 if full else 4)
    device = place(full)
    if name == "copy":
        geometry, crops = given[3], given[7]
        area = (crops[:, 2:] - crops[:, :2]).prod(1) / geometry[:, :2].prod(1)
        seen = float((ops.packed_nbytes(geometry) * area).sum())
        return copy(seen + len(geometry) * 3 * bench_read.SIDE**2 * dtype.itemsize, device)
    expected = ops.read_batch(*given, program=program, dtype=dtype)
    there, steps = on(device, given), on(device, program)
    step = partial(ops.read_batch, *there, program=steps, dtype=dtype)
    assert torch.equal(step().cpu(), expected), f"{name} reads something else"
    return step


def make_reconstruct(name: str, full: bool) -> Step:
    store = bench_read.make_work(True, 64 if full else 4).store
    raw, _ = ops.reconstruct(store.pixels, store.offsets, store.geometry)
    if name == "copy":
        return copy(nbytes(store.pixels, raw), place(full))
    step = partial(ops.reconstruct, *on(place(full), (store.pixels, store.offsets, store.geometry)))
    assert torch.equal(step()[0].cpu(), raw), f"{name} shows something else"
    return step


def make_herding(name: str, full: bool) -> Step:
    step = bench_herding.make(OURS, full)
    given = on(place(full), step.args)
    pick = {OURS: ops.herding, "batched": _herding}[name]
    assert torch.equal(pick(*given).cpu(), step()), f"{name} picks others"
    return partial(pick, *given)


def make_factor(layer: Layer, name: str, full: bool) -> Step | None:
    return bench_input_factor.make(replace(layer, device=place(full).type), name, full)


def make_penalty(channels: int, name: str, full: bool) -> Step:
    return bench_penalty.make(channels, name, full, place(full).type)


def case(op: str, name: str, ways: tuple[str, ...], make: Any, **options: Any) -> OpCase:
    return OpCase(op, name, (OURS, *ways), make, device="cuda", **options)


AIMS = {
    (torch.bfloat16, "forward"): {"copy": 0.9},
    (torch.bfloat16, "backward"): {"copy": 0.8},
    (torch.bfloat16, "forward and backward"): {"F.gelu": 1 / 1.1},
}
CASES = [
    *(
        case(
            "pade",
            f"{part}, 256x64x56x56 {SHORT[dtype]}",
            # A compiled backward pass keeps nothing for another one.
            ("copy", "F.gelu", "eager", *(() if part == "backward" else ("compiled",))),
            partial(make_pade, dtype, part),
            aims=AIMS.get((dtype, part), {}),
        )
        for dtype in SHORT
        for part in ("forward", "backward", "forward and backward")
    ),
    case(
        "pade",
        "second order, 64x64x56x56 float32",
        ("eager",),
        make_second_order,
        aims={"eager": 5},
    ),
    *(
        case(
            "cam_boxes",
            f"256x512x7x7 {SHORT[dtype]} to 224x224, in a graph",
            ("copy", "eager", "loop"),
            partial(make_cam_boxes, dtype),
            most_ms=0.012,
        )
        for dtype in SHORT
    ),
    *(
        case(
            "salient_masks",
            str(form),
            ("copy", "eager", "compiled"),
            partial(make_salient_masks, form),
            aims={"eager": 4},
        )
        for form in (
            bench_salient_masks.Form(8000, 7, 224),
            bench_salient_masks.Form(100_000, 4, 32),
        )
    ),
    *(
        case(
            "soft_compose",
            f"forward and backward, 256x3x224x224, {form}",
            ("copies", "eager", "compiled"),
            partial(make_soft_compose, form),
            aims={"eager": 4},
        )
        for form in bench_soft_compose.FORMS
    ),
    case(
        "read_batch",
        "256 compressed images to 224x224 float16",
        ("copy",),
        partial(make_read, False),
        aims={"copy": 0.7},
    ),
    case(
        "read_batch",
        "256 compressed images to 224x224 float16, augmented",
        ("copy",),
        partial(make_read, True),
    ),
    case("reconstruct", "64 images, about 418x443", ("copy",), make_reconstruct),
    case("herding", "100 classes of 500x512, 20 picks", ("batched",), make_herding),
    *(
        case(
            "conv_input_factor",
            str(layer),
            ("naive",),
            partial(make_factor, layer),
            aims={"naive": 5},
        )
        for layer in (
            replace(each, images=256)
            for each in bench_input_factor.SMALL_IMAGES + bench_input_factor.LARGE_IMAGES
        )
    ),
    *(
        case(
            "penalty",
            f"value and gradient, 3x3 convolution of {channels} channels",
            ("autograd",),
            partial(make_penalty, channels),
            aims={"autograd": 1.5},
        )
        for channels in bench_penalty.CHANNELS
    ),
]
