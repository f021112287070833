"""Products of channels at every frequency: what the input factor of a convolution is made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.ops._library import define

TILE = 16
"""Channels come in panels of so many; a matrix of products is stored tile by tile."""


def transform_length(length: int) -> int:
    """The least number not below ``length`` without a prime factor above 5.

    Example:
        >>> [transform_length(n) for n in (1, 7, 34, 58)]
        [1, 8, 36, 60]
    """
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


def frequencies(rows: int, columns: int) -> Tensor:
    """Of each pair of opposite frequencies of a transform the first, and how often it counts.

    Real signals have conjugate values at opposite frequencies, so one of the two is enough; it
    counts twice. A frequency that is its own opposite counts once.

    Args:
        rows: Length of the transform along y.
        columns: Length along x.

    Returns:
        Rows (fy, fx, 1 or 2), in the order in which they are stored.  # int64 [F, 3]

    Example:
        >>> frequencies(1, 5)
        tensor([[0, 0, 1],
                [0, 1, 2],
                [0, 2, 2]])
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    place = y * columns + x
    opposite = (-y % rows) * columns + (-x % columns)
    kept = place <= opposite
    times = 1 + (place != opposite).to(torch.int64)
    return torch.stack([y[kept], x[kept], times[kept]], dim=1)


def panels(channels: int) -> int:
    """Panels that hold so many channels."""
    return -(-channels // TILE)


def from_tiles(tiles: Tensor) -> Tensor:
    """Matrices stored tile by tile, [..., p, p, 16, 16], as they are, [..., 16 p, 16 p]."""
    side = tiles.shape[-3] * TILE
    return tiles.transpose(-3, -2).reshape(*tiles.shape[:-4], side, side)


def to_tiles(matrices: Tensor) -> Tensor:
    """The inverse of `from_tiles`, a view."""
    p = matrices.shape[-1] // TILE
    return matrices.unflatten(-1, (p, TILE)).unflatten(-3, (p, TILE)).transpose(-3, -2)


def _add(state: Tensor, values: Tensor, times: Tensor, decay: float) -> None:
    """Adds ``times`` conj(v) vᵀ, summed over samples; values [N, F, M], state [F, p, p, 16, 16]."""
    values = functional.pad(values, (0, state.shape[-3] * TILE - values.shape[-1]))
    products = torch.einsum("nfi,nfj->fij", values.conj(), values) * times[:, None, None]
    packed = products.real.tril() + products.imag.triu(1)
    state.mul_(decay).add_(to_tiles(packed))


def _stacked(x: Tensor) -> Tensor:
    """Boundary rows side by side with their channels padded to panels: [N, C, t, L] -> [N, tC', L].

    Boundary columns are rows of the transposed image.
    """
    n, channels, _, length = x.shape
    padded = functional.pad(x, (0, 0, 0, 0, 0, panels(channels) * TILE - channels))
    return padded.transpose(1, 2).reshape(n, -1, length)


def _spectral_gram(
    whole: Tensor,
    rows: Tensor,
    columns: Tensor,
    corners: Tensor,
    x: Tensor,
    weights: Tensor | None,
    decay: float,
    size: list[int],
    border: list[int],
) -> None:
    """Reference of the op, by torch's transforms."""
    if not x.numel():  # MKL refuses to transform nothing
        for state in (whole, rows, columns, corners):
            state.mul_(decay)
        return
    if weights is not None:
        x = x * weights.to(x.dtype).sqrt()[:, None, None, None]
    height, width = x.shape[2:]
    both = frequencies(*size).to(x.device)
    spectrum = torch.fft.fft2(x, s=size)[:, :, both[:, 0], both[:, 1]]  # [N, C, F]
    _add(whole, spectrum.transpose(1, 2), both[:, 2].to(x.dtype), decay)
    ty, tx = border
    if ty:
        for side, band in enumerate((x[:, :, :ty], x[:, :, height - ty :])):
            _add_line(rows[side], _stacked(band), size[1], decay)
    if tx:
        for side, band in enumerate((x[..., :tx], x[..., width - tx :])):
            _add_line(columns[side], _stacked(band.transpose(2, 3)), size[0], decay)
    for corner in range(4):
        top, left = corner // 2 * (height - ty), corner % 2 * (width - tx)
        block = x[:, :, top : top + ty, left : left + tx].flatten(2)[..., None]
        values = _stacked(block).transpose(1, 2)
        _add(corners[corner][None], values + 0j, values.new_ones(1), decay)


def _add_line(state: Tensor, band: Tensor, length: int, decay: float) -> None:
    """As `_add`, of the transform of [N, M, L] along its last dimension."""
    line = frequencies(1, length).to(band.device)
    spectrum = torch.fft.fft(band, n=length)[:, :, line[:, 1]]  # [N, M, F]
    _add(state, spectrum.transpose(1, 2), line[:, 2].to(band.dtype), decay)


def _fake(
    whole: Tensor,
    rows: Tensor,
    columns: Tensor,
    corners: Tensor,
    x: Tensor,
    weights: Tensor | None,
    decay: float,
    size: list[int],
    border: list[int],
) -> None:
    return None


define(
    "spectral_gram_(Tensor(a!) whole, Tensor(b!) rows, Tensor(c!) columns, Tensor(d!) corners, "
    "Tensor x, Tensor? weights, float decay, int[2] size, int[2] border) -> ()",
    _spectral_gram,
    _fake,
)


def spectral_gram_shapes(
    channels: int, size: tuple[int, int], border: tuple[int, int]
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the four tensors that `spectral_gram_` adds to.

    Args:
        channels: C of the images.
        size: Lengths of the transform, at least the image's and the largest shift's together.
        border: How many rows, and columns, at each side count apart.
    """
    p, (ty, tx) = panels(channels), border

    def tiles(stacked: int) -> tuple[int, int, int, int]:
        return (stacked * p, stacked * p, TILE, TILE)

    return (
        (len(frequencies(*size)), *tiles(1)),
        (2, len(frequencies(1, size[1])), *tiles(ty)),
        (2, len(frequencies(1, size[0])), *tiles(tx)),
        (4, *tiles(ty * tx)),
    )


def spectral_gram_(
    whole: Tensor,
    rows: Tensor,
    columns: Tensor,
    corners: Tensor,
    x: Tensor,
    size: tuple[int, int],
    border: tuple[int, int] = (0, 0),
    weights: Tensor | None = None,
    decay: float = 1.0,
) -> None:
    r"""Adds to running products of channels at every frequency, in place.

    With :math:`X_{nc}` the discrete Fourier transform of channel c of image n, filled up with
    zeros to ``size``, and for every frequency f of `frequencies`

    .. math:: H(f) \leftarrow \text{decay}\; H(f)
        + m_f \sum_n w_n \overline{X_{nc}(f)}\, X_{nc'}(f) ,

    :math:`m_f` being 2, or 1 for a frequency that is its own opposite. H is Hermitian: where
    c >= c' its real part is stored, where c < c' its imaginary part; channels count up to whole
    panels of 16, and matrices are stored tile by tile (`from_tiles`). By the theorem of
    correlation

    .. math:: \sum_n w_n \sum_i x_{nc}(i)\, x_{nc'}(i + \delta) = \frac{1}{|\text{size}|}
        \sum_f \mathrm{Re}\Big[ H_{cc'}(f)\, e^{2 \pi i \langle f, \delta / \text{size} \rangle}
        \Big] .

    The same is added up for the first and last ``border[0]`` rows, transformed along x, for the
    first and last ``border[1]`` columns, transformed along y, and for the four corners where both
    cross (not transformed): there the rows of a band count as further channels, row by row.

    Args:
        whole: Of whole images.  # [F, p, p, 16, 16]
        rows: Of the bands at the top and at the bottom.
        columns: Of the bands at the left and at the right.
        corners: Top left, top right, bottom left, bottom right.
        x: Images, float32 or float64 as all others.  # [N, C, H, W]
        size: Lengths of the transform, made of the factors 2, 3 and 5 (`transform_length`), not
            below H and W.
        border: Rows and columns of the bands, at most H and W.
        weights: w, not negative; None for ones.  # [N]
        decay: Factor of what was there.

    Raises:
        FastcilError: Shapes, dtypes or devices that do not fit.

    Example:
        >>> size, border = (4, 4), (1, 1)
        >>> states = [torch.zeros(s) for s in spectral_gram_shapes(2, size, border)]
        >>> x = torch.ones(1, 2, 2, 2)
        >>> spectral_gram_(*states, x, size, border)
        >>> from_tiles(states[0])[0, 1, :2]  # at frequency 0, the square of the sum
        tensor([16., 16.])
    """
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):
        raise FastcilError(
            f"x is {x.dtype} {list(x.shape)}; pass images [N, C, H, W] in float32 or float64."
        )
    for name, least, given, most in zip(
        ("height", "width"), x.shape[2:], size, border, strict=True
    ):
        if given < least or transform_length(given) != given:
            raise FastcilError(
                f"size is {tuple(size)} for images of {name} {least}; a length must be at least "
                f"that, and made of the factors 2, 3 and 5."
            )
        if not 0 <= most <= least:
            raise FastcilError(
                f"border is {tuple(border)}; it must be from 0 to the {name}, {least}."
            )
    states = (whole, rows, columns, corners)
    for name, state, shape in zip(
        ("whole", "rows", "columns", "corners"),
        states,
        spectral_gram_shapes(x.shape[1], size, border),
        strict=True,
    ):
        if state.shape != shape or state.dtype != x.dtype or state.device != x.device:
            raise FastcilError(
                f"{name} is {state.dtype} {list(state.shape)} on {state.device}; it must be "
                f"{x.dtype} {list(shape)} on {x.device}."
            )
        if not state.is_contiguous():
            raise FastcilError(f"{name} is not contiguous; pass a tensor as torch.zeros makes it.")
    if weights is not None and (weights.shape != x.shape[:1] or weights.device != x.device):
        raise FastcilError(
            f"weights is {list(weights.shape)} on {weights.device}; pass one for each of "
            f"{len(x)} images, on {x.device}."
        )
    torch.ops.fastcil.spectral_gram_(*states, x.detach(), weights, decay, list(size), list(border))
