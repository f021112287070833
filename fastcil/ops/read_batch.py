"""``read_batch``: a training batch straight out of packed images.

``read``, a program of pixel operations and normalisation in one: on the CPU each image goes through
all of them while it is in cache, and the batch of bytes between them never exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.ops._library import define
from fastcil.ops.pixel_ops import pixel_rows
from fastcil.ops.pixel_program import PixelProgram, check_program, run
from fastcil.ops.read import check_images_to_read

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Makes bytes the network's input: (v / 255 - mean) / std for each channel.

    It is one multiply-add, v * (1 / (255 std)) - mean / std, in float32; a smaller dtype is
    rounded to at the end only.

    Args:
        images: uint8 [B, 3, H, W].
        mean: Each channel's mean, of values from 0 to 1.
        std: Each channel's standard deviation, likewise.
        dtype: float32, bfloat16 or float16.

    Returns:
        dtype [B, 3, H, W], channels_last.

    Raises:
        ValueError: Images are not uint8 [B, 3, H, W], or dtype is another.

    Example:
        >>> images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
        >>> normalise(images, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).flatten()
        tensor([-1., -1., -1.])
    """
    if dtype not in DTYPES:
        raise FastcilError(f"dtype is {dtype}; use float32, bfloat16 or float16.")
    rows = pixel_rows(images)
    count, height, width, _ = rows.shape
    affine = [[1 / (255 * value) for value in std]]
    affine.append([-middle / value for middle, value in zip(mean, std, strict=True)])
    scale, shift = torch.tensor(affine).to(rows.device, non_blocking=True).unbind(0)
    # Whole rows of pixels, and in place: on the CPU a new tensor costs more than the sum.
    values = rows.float().view(count, height, width * 3)
    torch.addcmul(shift.repeat(width), values, scale.repeat(width), out=values)
    return values.view_as(rows).to(dtype).permute(0, 3, 1, 2)


def reference(
    arenas: list[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    height: int,
    width: int,
    crops: Tensor | None,
    flips: Tensor | None,
    views: Tensor | None,
    antialias: bool,
    operations: Tensor | None,
    amounts: Tensor | None,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """The op in plain PyTorch, after ``read``'s own kernel."""
    images: Tensor = torch.ops.fastcil.read(
        arenas, arena, offsets, geometry, height, width, crops, flips, views, antialias
    )
    if operations is not None and amounts is not None:
        images = run(images, operations, amounts)
    return images if dtype == torch.uint8 else normalise(images, mean, std, dtype)


def fake(
    arenas: list[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    height: int,
    width: int,
    crops: Tensor | None,
    flips: Tensor | None,
    views: Tensor | None,
    antialias: bool,
    operations: Tensor | None,
    amounts: Tensor | None,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """An empty output, channels_last."""
    return torch.empty(
        (geometry.shape[0], 3, height, width),
        dtype=dtype,
        device=geometry.device,
        memory_format=torch.channels_last,
    )


define(
    "read_batch(Tensor[] arenas, Tensor arena, Tensor offsets, Tensor geometry, SymInt height, "
    "SymInt width, Tensor? crops, Tensor? flips, Tensor? views, bool antialias, "
    "Tensor? operations, Tensor? amounts, float[] mean, float[] std, ScalarType dtype) -> Tensor",
    reference,
    fake,
    kernel="fastcil.kernels.read_batch:read_batch",
)


def read_batch(
    arenas: Sequence[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    crops: Tensor | None = None,
    flips: Tensor | None = None,
    views: Tensor | None = None,
    antialias: bool = True,
    program: PixelProgram | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Read a batch of raw and packed images as a network takes it.

    Each image is read as by `fastcil.ops.read` and rounded to bytes v, goes through its program
    of pixel operations, and is normalised: out = (v / 255 - mean) / std for each channel, as by
    `normalise`. The result is the same to the last bit, whatever the number of threads.

    On the CPU a batch of 4 MiB or more takes the memory of an earlier result that nothing refers to
    any longer; of such memory the process keeps 256 MiB at most.

    Args:
        arenas: the pixel buffers, each uint8 [P_k].
        arena: which buffer each image is in, int64 [B].
        offsets: the image's first byte in it, int64 [B].
        geometry: int16 [B, 8], rows (H, W, y0, x0, y1, x1, gh, gw).
        size: height and width of the output, (h, w).
        mean: each channel's mean, of values from 0 to 1.
        std: each channel's standard deviation, likewise.
        crops: float32 [B, 4], rows (y0, x0, y1, x1) in source pixels; None: the whole image.
        flips: bool [B], images to mirror left to right.
        views: int16 [B, 6], compression to simulate on raw images; see `fastcil.ops.read`.
        antialias: widen the filter where an image shrinks.
        program: what happens to the pixels of each image, for B images.
        dtype: float32, bfloat16, float16; or uint8 for bytes that are not normalised.

    Returns:
        dtype [B, 3, h, w], in channels_last memory.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or a row of it does not describe an image, a
            view, a crop or a program. (Kernels on a GPU cannot look at values, and don't.)

    Example:
        >>> pixels = torch.arange(12, dtype=torch.uint8)  # one image of 2 x 2
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> geometry = torch.tensor([[2, 2, 0, 0, 2, 2, 0, 0]], dtype=torch.int16)
        >>> program = PixelProgram.of("brightness", torch.full((1,), 2.0))
        >>> out = read_batch(
        ...     [pixels], zero, zero, geometry, (1, 2), (0.0,) * 3, (1 / 255,) * 3, program=program
        ... )
        >>> out[0, 0]
        tensor([[ 6., 12.]])
    """
    batch = check_images_to_read(arenas, arena, offsets, geometry, size, crops, flips, views)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise FastcilError(f"{name} has {len(values)} numbers; give three, one per channel")
    if not all(value > 0 for value in std):
        raise FastcilError(f"std is {tuple(std)}; all three must be above 0")
    if dtype not in (torch.uint8, *DTYPES):
        raise FastcilError(f"dtype is {dtype}; use float32, bfloat16, float16 or uint8")
    if program is not None:
        check_program(program.operations, program.amounts, batch)
    out: Tensor = torch.ops.fastcil.read_batch(
        list(arenas),
        arena,
        offsets,
        geometry,
        *size,
        crops,
        flips,
        views,
        antialias,
        None if program is None else program.operations,
        None if program is None else program.amounts,
        list(mean),
        list(std),
        dtype,
    )
    return out
