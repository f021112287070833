"""The input factor of a layer's Kronecker-factored curvature, without patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.curvature.lags import Lags, Pair, Window
from fastcil.curvature.patches import PatchSums
from fastcil.curvature.spectra import Spectra
from fastcil.errors import FastcilError
from fastcil.ops import extension_available
from fastcil.ops.patch_gram import output_size
from fastcil.ops.spectral_gram import TILE, frequencies, panels

Route = Literal["patches", "lags", "spectra"]
"""How a factor is added up: `ConvInputFactor` tells which is for what."""

# Products at all frequencies of large maps are many: beyond so many bytes lags are kept.
_MOST_SPECTRA = 128 << 20


class ConvInputFactor:
    r"""The second moment of what a convolution sees, added up batch by batch.

    .. math:: A = \frac{\sum_b d_b \sum_n w_n \sum_o a_{no} a_{no}^\top}
        {\sum_b d_b\, N_b\, |o|}

    with :math:`a_{no}` the patch of sample n at output position o, its entries ordered as the
    weight's (channel, row, column), followed by a one if there is a bias; b counts batches of
    :math:`N_b` samples and :math:`|o|` positions, and :math:`d_b` is the product of the decays of
    all later updates. So it is the average over samples and output positions (Grosse and Martens
    2016, KFC, with their sum over positions made a mean); weights of samples multiply, and are not
    divided by their sum.

    Three routes lead to it:

    - ``spectra``, for stride 1 and more than one tap: the products of channels at every frequency
      of the images' Fourier transform (`fastcil.ops.spectral_gram_`), from which the correlations
      below follow in the end; the fastest, where the compiled extension is there and maps are not
      so large that there are too many frequencies;
    - ``lags``, for stride 1: correlations at every lag between two taps (`Lags`), by matrix
      products, on any device;
    - ``patches``, for everything else: the Gram matrix of patches, a block of them at a time
      (`fastcil.ops.patch_gram_`).

    All are exact up to rounding; where a convolution with little padding has less than two thirds
    as many outputs as inputs, ``patches`` loses fewer digits and is chosen. None ever holds the
    patches of a batch; decay, weights and merging act on the sums, of which `dense` makes the
    matrix.

    Args:
        in_channels: Channels of the input.
        kernel_size: Height and width, or one number for both.
        stride: As ``torch.nn.Conv2d`` has it, like the following.
        padding: At each side; numbers, ``"same"`` or ``"valid"``.
        dilation: Step from tap to tap.
        bias: Whether there is a bias, for which patches end with a one.
        groups: Groups of channels that are convolved apart: one factor each.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        dtype: Of the sums, float32 or float64; inputs are converted to it.
        half_inputs: Whether ``lags`` multiplies inputs rounded to bfloat16, faster where the
            hardware does that, with an error of 0.001 or 0.002; sums stay in ``dtype``. The
            other routes round nothing, and on a CPU ``spectra`` is faster still.
        route: One of the routes; None chooses at the first update, and again at the first after
            sums were loaded.

    Attributes:
        count: Samples times output positions added so far, less what decayed.
        route: The route that is taken; None before an update has chosen it.

    Raises:
        FastcilError: Arguments out of range, or a route that can't be taken.

    Example:
        >>> factor = ConvInputFactor(3, kernel_size=3, padding=1)
        >>> x = torch.randn(8, 3, 10, 10)
        >>> factor.update(x)
        >>> patches = functional.unfold(x, 3, padding=1).mT.reshape(-1, 27)
        >>> torch.allclose(factor.dense(), patches.T @ patches / len(patches), atol=1e-5)
        True
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        bias: bool = False,
        *,
        groups: int = 1,
        padding_mode: str = "zeros",
        dtype: torch.dtype = torch.float32,
        half_inputs: bool = False,
        route: Route | None = None,
    ) -> None:
        _check(in_channels, groups, padding_mode, dtype, route)
        self.in_channels, self.groups, self.bias = in_channels, groups, bias
        self.stride = _pair("stride", stride, 1)
        self.dtype, self.half_inputs = dtype, half_inputs
        kernel, dilation = _pair("kernel_size", kernel_size, 1), _pair("dilation", dilation, 1)
        margins = _margins(padding, kernel, dilation)
        # The sums pad with zeros, as much on one side as on the other; all else is done before.
        (top, bottom), (left, right) = margins
        own = padding_mode == "zeros" and top == bottom and left == right
        self.window = Window(kernel, (top, left) if own else (0, 0), dilation)
        self._pad = None if own else (left, right, top, bottom)
        self._pad_mode = "constant" if padding_mode == "zeros" else padding_mode
        if route in ("lags", "spectra") and not self._correlates:
            raise FastcilError(f"route is '{route}', which needs stride 1 and one group.")
        self.route = self._asked = route
        self.count = 0.0
        self._sums: Lags | PatchSums | None = None
        self._spectra: Spectra | None = None
        self._column: Tensor | None = None  # [groups, n], sum of w a
        self._weight: Tensor | None = None  # [], sum of w

    @property
    def side(self) -> int:
        """Rows of the factor, the bias's included."""
        ky, kx = self.window.kernel
        return self.in_channels // self.groups * ky * kx + self.bias

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        held = [] if self._sums is None else list(self._sums.tensors().values())
        held += [] if self._spectra is None else list(self._spectra.sums)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def _correlates(self) -> bool:
        return self.stride == (1, 1) and self.groups == 1

    def update(self, x: Tensor, decay: float | None = None, weights: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            x: The layer's input, of any floating dtype.  # [N, C, H, W]
            decay: Factor of everything added before, the count of samples included, so that a
                decay below 1 makes an exponentially weighted average without a bias towards its
                start; None is 1.
            weights: w of each sample, not negative.  # [N]

        Raises:
            FastcilError: Another shape, or a kernel that fits nowhere.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise FastcilError(
                f"x is {x.dtype} {list(x.shape)}; pass a floating [N, {self.in_channels}, H, W]."
            )
        if weights is not None and weights.shape != x.shape[:1]:
            raise FastcilError(
                f"weights is {list(weights.shape)}; pass one for each of {len(x)} samples."
            )
        decay = 1.0 if decay is None else decay
        if not 0 <= decay <= 1:
            raise FastcilError(f"decay is {decay}; it must be between 0 and 1.")
        with torch.no_grad():
            self._add(self.padded(x.detach().to(self.dtype)), decay, weights)

    def padded(self, x: Tensor) -> Tensor:
        """Images with the padding that ``window`` leaves out: all but equal zeros at both sides."""
        return x if self._pad is None else functional.pad(x, self._pad, self._pad_mode)

    def _add(self, x: Tensor, decay: float, weights: Tensor | None) -> None:
        window = self.window
        image = (x.shape[2], x.shape[3])
        outputs = output_size(image, window.kernel, self.stride, window.padding, window.dilation)
        if min(outputs) < 1:
            raise FastcilError(
                f"x is {list(x.shape)}, padded; a kernel of {window.kernel} fits nowhere in it."
            )
        self._check_size(x, image, outputs)
        positions = outputs[0] * outputs[1]
        if self.half_inputs and self.route == "lags":
            x = x.bfloat16()
        if self.bias:
            self._add_bias(x.to(self.dtype), decay, weights, positions)
        if self.route == "spectra":
            spectra = self._spectra_for(x, image)
            if self._sums is not None:
                self._sums.scale_(decay)
            spectra.add_images_(x, weights, decay)
        else:
            self._sums = self._sums or self._no_sums(self.route, x.device)
            self._sums.add_images_(x, weights, decay)
        self.count = self.count * decay + len(x) * positions

    def _check_size(self, x: Tensor, image: Pair, outputs: Pair) -> None:
        """Chooses the route if there is none yet, and checks whether it can take these images."""
        if self.route is None:
            self.route = self._choose(x, image, outputs)
            if isinstance(self._sums, Lags) and self.route == "patches":
                self.route = "lags"  # as what was loaded is
        high, wide = self.window.border
        if self.route != "patches" and (high > image[0] or wide > image[1]):
            raise FastcilError(
                f"x is {list(x.shape)}, smaller than the border of {high}x{wide} that some tap "
                f"never sees; make the factor with route='patches'."
            )

    def _no_sums(self, route: Route | None, device: torch.device) -> Lags | PatchSums:
        window = self.window
        if route == "patches":
            return PatchSums.zeros(
                window, self.stride, self.in_channels, self.groups, self.dtype, device
            )
        return Lags.zeros(window, self.in_channels, self.dtype, device)

    def _spectra_for(self, x: Tensor, image: Pair) -> Spectra:
        """Where frequencies of images of this size are added up."""
        size = Spectra.size_for(self.window, image)
        if self._spectra is not None and self._spectra.size != size:
            self._fold()
        if self._spectra is None:
            self._spectra = Spectra.zeros(self.window, self.in_channels, size, self.dtype, x.device)
        return self._spectra

    def _choose(self, x: Tensor, image: Pair, outputs: Pair) -> Route:
        (ky, kx), border = self.window.kernel, self.window.border
        if not self._correlates or ky * kx == 1 or border[0] > image[0] or border[1] > image[1]:
            return "patches"
        if 3 * outputs[0] * outputs[1] < 2 * image[0] * image[1]:
            # Much of a correlation would be taken away again, and with it digits.
            return "patches"
        if not extension_available() or x.device.type != "cpu":
            return "lags"
        matrix = (panels(self.in_channels) * TILE) ** 2 * x.element_size()
        many = len(frequencies(*Spectra.size_for(self.window, image))) * matrix
        return "spectra" if many <= _MOST_SPECTRA else "lags"

    def _add_bias(self, x: Tensor, decay: float, weights: Tensor | None, positions: int) -> None:
        """Adds to the sums of w a and of w, per output position."""
        window = self.window
        total = x.sum(0) if weights is None else torch.einsum("n,nchw->chw", weights.to(x), x)
        seen = functional.unfold(
            total[None], window.kernel, window.dilation, window.padding, self.stride
        )
        column = seen.sum(2).view(self.groups, -1)
        weight = x.new_tensor(float(len(x))) if weights is None else weights.to(x).sum()
        if self._column is None or self._weight is None:
            self._column, self._weight = torch.zeros_like(column), torch.zeros_like(weight)
        self._column.mul_(decay).add_(column)
        self._weight.mul_(decay).add_(weight * positions)

    def _fold(self) -> None:
        """Turns frequencies into lags."""
        if self._spectra is not None:
            device = self._spectra.sums[0].device
            self._sums = self._sums or self._no_sums("spectra", device)
            assert isinstance(self._sums, Lags)
            self._spectra.add_to(self._sums)
            self._spectra = None

    def _filled(self) -> Lags | PatchSums:
        """The sums, all in one."""
        self._fold()
        if self._sums is None or not self.count:
            raise FastcilError("the factor is empty; call update with at least one sample.")
        return self._sums

    def dense(self) -> Tensor:
        """The factor, as averaged so far.

        Returns:
            [n, n] with n = `side`; [groups, n, n] for several groups.

        Raises:
            FastcilError: There was no update.
        """
        gram = self._filled().dense()
        if gram.ndim == 2:
            gram = gram[None]
        if self._column is not None and self._weight is not None:
            side = gram.shape[-1]
            gram = functional.pad(gram, (0, 1, 0, 1))
            gram[:, :side, side] = gram[:, side, :side] = self._column
            gram[:, side, side] = self._weight
        gram = gram / self.count
        return gram if self.groups > 1 else gram[0]

    def merge(self, other: ConvInputFactor, mine: float, theirs: float) -> None:
        """Becomes mine * A + theirs * A of another factor of the same layer, on the sums.

        Args:
            other: The other, which stays as it is but for frequencies turned into lags.
            mine: Weight of this factor's average.
            theirs: Weight of the other's.

        Raises:
            FastcilError: The other is of another layer or route, or one is empty.
        """
        ours, others = self._filled(), other._filled()
        same = self._layer() == other._layer() and type(ours) is type(others)
        if not same:
            raise FastcilError(
                f"other is a factor of {other._layer()}, added up as {type(others).__name__}; it "
                f"must be of {self._layer()} and {type(ours).__name__}."
            )
        scale = mine / self.count
        ours.scale_(scale)
        ours.add_(others, theirs / other.count)  # type: ignore[arg-type]
        for name in ("_column", "_weight"):
            own = getattr(self, name)
            if own is not None:
                own.mul_(scale).add_(getattr(other, name), alpha=theirs / other.count)
        self.count = 1.0

    def _layer(self) -> tuple[Any, ...]:
        return (self.in_channels, self.groups, self.bias, self.stride, self.window)

    def state(self) -> dict[str, Tensor]:
        """The sums by name, for `load_state`: the tensors themselves, frequencies made lags."""
        tensors = dict(self._filled().tensors())
        tensors["count"] = torch.tensor(self.count, dtype=torch.float64)
        if self._column is not None and self._weight is not None:
            tensors |= {"column": self._column, "weight": self._weight}
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes the tensors of another factor's `state` in place of its own sums.

        Lags may go on as frequencies: they are the same sums in the end.

        Raises:
            FastcilError: They are of another layer.
        """
        route: Route = "patches" if "gram" in state else "lags"
        sums = self._no_sums(route, next(iter(state.values())).device)
        wanted = {name: t.shape for name, t in sums.tensors().items()}
        given = {name: t.shape for name, t in state.items() if name in wanted}
        if given != wanted or self.bias != ("column" in state):
            raise FastcilError(
                f"state has {sorted(state)}, which do not fit a factor of {self._layer()}."
            )
        for name in wanted:
            setattr(sums, name, state[name].to(self.dtype))
        if route == "lags" and self._asked in (None, "spectra"):
            self.route = self._asked
        else:
            self.route = route
        self._sums, self._spectra = sums, None
        self._column, self._weight = state.get("column"), state.get("weight")
        self.count = float(state["count"])


def _pair(name: str, value: Any, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise FastcilError(f"{name} is {value}; give one or two numbers of at least {least}.")
    return pair


def _margins(padding: Any, kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Padding (top, bottom), (left, right)."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        # torch puts the odd one at the end.
        high, wide = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return (high // 2, high - high // 2), (wide // 2, wide - wide // 2)
    if isinstance(padding, str):
        raise FastcilError(f"padding is '{padding}'; give numbers, 'same' or 'valid'.")
    top, left = _pair("padding", padding, 0)
    return (top, top), (left, left)


def _check(
    in_channels: int, groups: int, padding_mode: str, dtype: torch.dtype, route: str | None
) -> None:
    if in_channels < 1 or groups < 1 or in_channels % groups:
        raise FastcilError(
            f"in_channels is {in_channels} for {groups} groups; it must be a multiple of them."
        )
    if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
        raise FastcilError(
            f"padding_mode is {padding_mode!r}; it must be zeros, reflect, replicate or circular."
        )
    if dtype not in (torch.float32, torch.float64):
        raise FastcilError(f"dtype is {dtype}; sums are kept in float32 or float64.")
    if route not in (None, "patches", "lags", "spectra"):
        raise FastcilError(f"route is {route!r}; it must be patches, lags, spectra or None.")
