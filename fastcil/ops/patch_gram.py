"""The Gram matrix of a convolution's patches, added up without ever holding the patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.ops._library import define

Pair = tuple[int, int]

# Bytes of patches that the reference builds at a time.
_CHUNK = 1 << 26


def output_size(
    size: tuple[int, int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, int]:
    """Height and width of a convolution's output; 0 or less where the kernel does not fit.

    Example:
        >>> output_size((32, 31), (3, 3), (2, 2), (1, 1), (1, 1))
        (16, 16)
    """
    high, wide = (
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return high, wide


def _patch_gram(
    state: Tensor,
    x: Tensor,
    weights: Tensor | None,
    decay: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    """Reference of the op: a few images at a time, unfolded."""
    state.mul_(decay)
    if weights is not None:
        x = x * weights.to(x.dtype).sqrt()[:, None, None, None]
    sizes = tuple(kernel), tuple(dilation), tuple(padding), tuple(stride)
    one = x[:1].numel() * x.element_size() * kernel[0] * kernel[1]
    for images in x.split(max(1, _CHUNK // max(one, 1))):
        patches = functional.unfold(images, *sizes)  # [N, n, L]
        rows = patches.transpose(1, 2).reshape(-1, len(state))
        state.addmm_(rows.T, rows)
    state.tril_()


def _fake(
    state: Tensor,
    x: Tensor,
    weights: Tensor | None,
    decay: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    return None


define(
    "patch_gram_(Tensor(a!) state, Tensor x, Tensor? weights, float decay, int[2] kernel, "
    "int[2] stride, int[2] padding, int[2] dilation) -> ()",
    _patch_gram,
    _fake,
)


def patch_gram_(
    state: Tensor,
    x: Tensor,
    kernel: Pair = (1, 1),
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    weights: Tensor | None = None,
    decay: float = 1.0,
) -> None:
    r"""Adds to the running Gram matrix of the patches that a convolution looks at, in place.

    .. math:: S \leftarrow \text{decay}\; S + \sum_n w_n \sum_o a_{no} a_{no}^\top

    with :math:`a_{no}` the patch of image n at output position o, its entries ordered as the
    convolution's weight has them: (channel, row, column). Only the lower triangle of S is kept,
    the rest is zero. With a kernel of 1 it is the Gram matrix of an activation over images and
    positions, as Kronecker-factored curvature needs it of outputs, or of a linear layer's inputs
    [N, C, 1, 1].

    Args:
        state: S.  # [n, n], n = C * kernel[0] * kernel[1]
        x: Images, float32 or float64 as S.  # [N, C, H, W]
        kernel: Height and width.
        stride: Step from output to output.
        padding: Zeros at each side.
        dilation: Step from tap to tap.
        weights: w, not negative; None for ones.  # [N]
        decay: Factor of what was there.

    Raises:
        FastcilError: Shapes, dtypes or devices that do not fit; a kernel that fits nowhere.

    Example:
        >>> state = torch.zeros(2, 2)
        >>> patch_gram_(state, torch.tensor([[1.0, 2.0], [0.0, 3.0]])[:, :, None, None])
        >>> state
        tensor([[ 1.,  0.],
                [ 2., 13.]])
    """
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):
        raise FastcilError(
            f"x is {x.dtype} {list(x.shape)}; pass images [N, C, H, W] in float32 or float64."
        )
    for name, pair, least in (
        ("kernel", kernel, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(pair) != 2 or min(pair) < least:
            raise FastcilError(f"{name} is {tuple(pair)}; give two numbers of at least {least}.")
    high, wide = x.shape[2:]
    if min(output_size((high, wide), kernel, stride, padding, dilation)) < 1:
        raise FastcilError(
            f"kernel is {tuple(kernel)}, which fits nowhere in images of {high}x{wide}."
        )
    side = x.shape[1] * kernel[0] * kernel[1]
    if state.shape != (side, side) or state.dtype != x.dtype or state.device != x.device:
        raise FastcilError(
            f"state is {state.dtype} {list(state.shape)} on {state.device}; it must be {x.dtype} "
            f"{[side, side]} on {x.device}."
        )
    if not state.is_contiguous():
        raise FastcilError("state is not contiguous; pass a tensor as torch.zeros makes it.")
    if weights is not None and (weights.shape != x.shape[:1] or weights.device != x.device):
        raise FastcilError(
            f"weights is {list(weights.shape)} on {weights.device}; pass one for each of "
            f"{len(x)} images, on {x.device}."
        )
    torch.ops.fastcil.patch_gram_(
        state, x.detach(), weights, decay, list(kernel), list(stride), list(padding), list(dilation)
    )
