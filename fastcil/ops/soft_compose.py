"""Soft compression: image and downsampled image mixed by an activation map, differentiably.

With N the operator that down- and upsamples by nearest neighbour, U bilinear upsampling, and both
transposes known, all derivatives are combinations of these: only images and map are saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.ops._library import LIBRARY, define


def _shown(side: int, ratio: float, device: torch.device) -> Tensor:
    """The source row (or column) that each row shows after nearest down- and upsampling."""
    cells = max(1, math.floor(side / math.sqrt(ratio)))
    pixel = torch.arange(side, device=device)
    return pixel * cells // side * side // cells


def _coarse(images: Tensor, ratio: float) -> Tensor:
    """N images."""
    rows, columns = (_shown(side, ratio, images.device) for side in images.shape[2:])
    return images.index_select(2, rows).index_select(3, columns)


def _coarse_transposed(gradient: Tensor, ratio: float) -> Tensor:
    """N^T gradient: to each pixel from those that show it."""
    for axis in (2, 3):
        shown = _shown(gradient.shape[axis], ratio, gradient.device)
        gradient = torch.zeros_like(gradient).index_add(axis, shown, gradient)
    return gradient


def _upsampled(cam: Tensor, size: Sequence[int]) -> Tensor:
    """U cam: [B, h, w] -> [B, 1, H, W]."""
    return functional.interpolate(cam[:, None], tuple(size), mode="bilinear")


def _upsampled_transposed(gradient: Tensor, cam: Tensor) -> Tensor:
    """U^T gradient: [B, 1, H, W] -> [B, h, w]."""
    batch, _, *size = gradient.shape
    shape = [batch, 1, *cam.shape[1:]]
    collected = torch.ops.aten.upsample_bilinear2d_backward(
        gradient.contiguous(), size, shape, False
    )
    return collected[:, 0]


def _working(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the precision of computation: float32, or float64 if the first is."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def _as(like: Tensor, value: Tensor) -> Tensor:
    """The value with the dtype of ``like`` and the strides that ``torch.empty_like(like)`` has."""
    result = torch.empty_like(like, device="meta")
    if value.dtype == result.dtype and value.stride() == result.stride():
        return value
    return torch.empty_like(like).copy_(value)


def _soft_compose(images: Tensor, cam: Tensor, ratio: float) -> Tensor:
    """Reference of the op."""
    if images.numel() == 0:
        return torch.empty_like(images)
    x, maps = _working(images, cam)
    mask = _upsampled(maps, images.shape[2:])
    return _as(images, torch.lerp(x, _coarse(x, ratio), 1 - mask))


def _soft_compose_backward(
    gradient: Tensor, images: Tensor, cam: Tensor, ratio: float
) -> tuple[Tensor, Tensor]:
    """Reference of the gradient: M g + N^T (1 - M) g, and U^T of g (x - N x) over channels."""
    if images.numel() == 0:
        return torch.empty_like(images), torch.zeros_like(cam)
    x, g, maps = _working(images, gradient, cam)
    mask = _upsampled(maps, images.shape[2:])
    by_images = _coarse_transposed((1 - mask) * g, ratio).addcmul_(mask, g)
    slope = (g * (x - _coarse(x, ratio))).sum(1, keepdim=True)
    return _as(images, by_images), _as(cam, _upsampled_transposed(slope, maps))


def _fake_backward(
    gradient: Tensor, images: Tensor, cam: Tensor, ratio: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(images), torch.empty_like(cam)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.ratio = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the op: another op, so that it can be fused and differentiated."""
    grads = torch.ops.fastcil.soft_compose_backward(gradient, *ctx.saved_tensors, ctx.ratio)
    return (*grads, None)


def _double_gradient(ctx: Any, dx: Tensor, dc: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of ``soft_compose_backward``, itself differentiable.

    Its pairing with a direction (dx, dc) is the sum of g phi, where
    phi = M dx + (1 - M) N dx + U dc (x - N x) is the derivative of the op in that direction; the
    first two terms are the op itself.
    """
    gradient, images, cam = ctx.saved_tensors
    direction = dx.to(images.dtype)
    x, g, turn = _working(images, gradient, dc)
    turn = _upsampled(turn, images.shape[2:])
    phi = torch.ops.fastcil.soft_compose(direction, cam, ctx.ratio)
    phi = phi + turn * (x - _coarse(x, ctx.ratio))
    turned = turn * g
    by_images = turned - _coarse_transposed(turned, ctx.ratio)
    _, by_cam = torch.ops.fastcil.soft_compose_backward(gradient, direction, cam, ctx.ratio)
    return phi.to(gradient.dtype), by_images.to(images.dtype), by_cam, None


define(
    "soft_compose(Tensor images, Tensor cam, float ratio) -> Tensor",
    _soft_compose,
    lambda images, cam, ratio: torch.empty_like(images),
    kernel="fastcil.kernels.soft_compose:soft_compose",
)
define(
    "soft_compose_backward(Tensor gradient, Tensor images, Tensor cam, float ratio)"
    " -> (Tensor, Tensor)",
    _soft_compose_backward,
    _fake_backward,
    kernel="fastcil.kernels.soft_compose:soft_compose_backward",
)
torch.library.register_autograd(
    "fastcil::soft_compose", _gradient, setup_context=_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "fastcil::soft_compose_backward", _double_gradient, setup_context=_setup, lib=LIBRARY
)


def soft_compose(images: Tensor, cam: Tensor, ratio: float = 4.0) -> Tensor:
    r"""Compresses images as softly as their activation maps say.

    .. math:: \tilde x = M \odot x + (1 - M) \odot x_\eta

    (Luo et al. 2023, Eq. S1c): M is ``cam`` upsampled bilinearly (align_corners=False) to the
    image's size, and x_eta is x downsampled by sqrt(eta) per side and upsampled again, both by
    nearest neighbour: cell r of floor(H / sqrt(eta)) holds row r H // cells, and row y shows cell
    y cells // H. Computed in float32, or in float64 if ``images`` is, also under autocast.
    Differentiable any number of times, eagerly; only ``images`` and ``cam`` are kept for it. On the
    CPU results of 4 MiB or more take the memory of earlier ones, as `read_batch` says.

    Args:
        images: Floating point, any scale, any number of channels.  # [B, C, H, W]
        cam: Maps in [0, 1], of any resolution.  # [B, h, w]
        ratio: eta, the ratio of areas; at least 1.

    Returns:
        The composed images, with the dtype and strides of ``images``.  # [B, C, H, W]

    Raises:
        FastcilError: If the shapes do not belong together, images or map are not floating point
            or have an empty side, or the ratio is below 1.

    Example:
        >>> image = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 1, 4, 4)
        >>> soft_compose(image, torch.full((1, 1, 1), 0.5))[0, 0, 0]
        tensor([0.0000, 0.5000, 2.0000, 2.5000])
    """
    if images.ndim != 4 or 0 in images.shape[2:] or not images.is_floating_point():
        raise FastcilError(
            f"images is {images.dtype} of shape {tuple(images.shape)}; it must be floating point "
            "of shape [B, C, H, W] with H and W at least 1."
        )
    if cam.ndim != 3 or len(cam) != len(images) or 0 in cam.shape[1:]:
        raise FastcilError(
            f"cam has shape {tuple(cam.shape)}; it must be [{len(images)}, h, w], one map per "
            "image, with h and w at least 1."
        )
    if not cam.is_floating_point():
        raise FastcilError(f"cam has dtype {cam.dtype}; it must be floating point.")
    if not 1 <= ratio < math.inf:
        raise FastcilError(f"ratio is {ratio}; it must be at least 1 (4 halves both sides).")
    return torch.ops.fastcil.soft_compose(images, cam, float(ratio))
