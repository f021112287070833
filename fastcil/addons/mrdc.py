"""Memory replay with data compression: exemplars as JPEG files of a quality chosen by volume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcil.addons.compression import check_exemplars
from fastcil.contract import Addon, Context, Fitting, Method, Record, Task, check_positive
from fastcil.data import Examples, ImageStore
from fastcil.errors import FastcilError
from fastcil.memory import ByteStore, herding
from fastcil.memory.codecs.jpeg import JpegCodec, check_quality

_FIRST_ENCODED = 64
_SHOWN_TASKS = 4


class MRDC(Addon):
    """Memory replay with data compression (Wang et al. 2022).

    Exemplars are kept as JPEG files, so that a budget holds more of them. Herding and class means
    look at the files' images; new classes are learned from the originals.

    How much to compress is settled after each task's training, the network as it is, by how much
    compression moves the features. With M_q the matrix of unit features of the N_q exemplars of a
    class that the budget holds at quality q, M* that of the same images uncompressed, and

        Vol(M) = sqrt(det(M M^T)) ,    R_q = Vol(M_q) / Vol(M*) ,

    the quality is the one of the largest N_q with |R_q - 1| < epsilon (Wang et al. 2022, Sec. 4.2,
    a determinantal point process on the stored subset). Volumes are geometric means over the
    task's classes, since their logarithms are averaged, as in the released code.

    What neither says is settled here. A class's images are put in the order of herding by their
    original features, of which every N_q takes a prefix (the released code herds at each quality
    anew). M has at most as many rows as features have dimensions: more vectors have no volume.
    Among equal N_q the higher quality wins, and if no quality will do, the highest does.

    Example:
        >>> MRDC.Config().grid, MRDC.Config(quality=50).quality
        ((10, 25, 50, 75, 90), 50)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of replay with data compression.

        That the choice is made anew for each task follows the paper's abstract ("currently-arrived
        training samples"); a file says its own quality, and old exemplars stay as they are. The
        grid and epsilon are those that published accounts of the method give; they could not be
        checked against the paper's own tables.

        Args:
            quality: JPEG quality, 1 to 100; None to choose it in every task.
            grid: Qualities to choose from.
            epsilon: How far R_q may lie from 1.
            floor: A class counts towards R_q if both log-volumes lie above this. The released
                code's -500 is where a determinant underflows, which here it doesn't; ``-inf``
                leaves out only classes without volume.
            bits_per_pixel: Of what counts as one image in a budget of images; see
                `fastcil.memory.codecs.jpeg.JpegCodec`.
        """

        quality: int | None = None
        grid: tuple[int, ...] = (10, 25, 50, 75, 90)
        epsilon: float = 0.5
        floor: float = -500.0
        bits_per_pixel: float = 24.0

        def __post_init__(self) -> None:
            if self.quality is not None:
                check_quality("quality", self.quality)
            if not self.grid or len(set(self.grid)) != len(self.grid):
                raise FastcilError(
                    f"grid is {self.grid}; it must hold at least one quality, each once."
                )
            for quality in self.grid:
                check_quality("grid", quality)
            check_positive("epsilon", self.epsilon)
            check_positive("bits_per_pixel", self.bits_per_pixel)
            if math.isnan(self.floor):
                raise FastcilError("floor is nan; it must be a number, and is -500 as released.")

    config: Config
    brings_codec: ClassVar[str | None] = "jpeg"
    chosen: Tensor
    rates: Tensor
    ratios: Tensor
    counts: Tensor

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__(config, context, method)
        tried = len(self._tried())
        # Of each task: the quality, raw bytes per byte of file, and R_q and N_q of those tried.
        self.register_buffer("chosen", torch.empty(0, dtype=torch.int64))
        self.register_buffer("rates", torch.empty(0, dtype=torch.float64))
        self.register_buffer("ratios", torch.empty(0, tried, dtype=torch.float64))
        self.register_buffer("counts", torch.empty(0, tried, dtype=torch.int64))

    def check(self, method: Method) -> None:
        """Raises `CompositionError` if there are no exemplars."""
        check_exemplars("mrdc", method)

    def codec_options(self) -> dict[str, Any]:
        """The quality of the task at hand."""
        quality = int(self.chosen[-1]) if len(self.chosen) else max(self._tried())
        return {"quality": quality, "bits_per_pixel": self.config.bits_per_pixel}

    def prepare_memory(self, task: Task, fitting: Fitting) -> None:
        """Chooses the quality, by what memory would keep of each class at each of the grid."""
        tried = self._tried()
        codecs = [JpegCodec(quality, self.config.bits_per_pixel) for quality in tried]
        counts = torch.zeros(len(tried), dtype=torch.int64)
        nbytes = torch.zeros(2, len(tried), dtype=torch.float64)  # raw, compressed
        volumes: list[list[tuple[float, float]]] = [[] for _ in tried]
        for label in task.classes:
            examples, features = self._ordered(task.examples, label)
            for number, codec in enumerate(codecs):
                kept = _encode_fitting(codec, examples.images, fitting)
                counts[number] += len(kept)
                nbytes[:, number] += torch.stack(
                    [3 * kept.sizes.double().prod(1).sum(), kept.lengths.double().sum()]
                ).cpu()
                if features is not None and len(kept):
                    volumes[number].append(self._volumes(codec, kept, examples, features))
        ratios = torch.tensor(
            [volume_ratio(pairs, self.config.floor) for pairs in volumes], dtype=torch.float64
        )
        number = choose(ratios.tolist(), counts.tolist(), tried, self.config.epsilon)
        rate = nbytes[0, number] / nbytes[1, number]
        self._append("chosen", torch.tensor([tried[number]]))
        self._append("rates", rate[None])
        self._append("ratios", ratios[None])
        self._append("counts", counts[None])

    def _tried(self) -> tuple[int, ...]:
        """The qualities to choose from."""
        fixed = self.config.quality
        return self.config.grid if fixed is None else (fixed,)

    def _ordered(self, examples: Examples, label: int) -> tuple[Examples, Tensor | None]:
        """A class's images, and their features; in the order of herding if there is a choice."""
        mine = examples.select(examples.labels == label)
        if len(self._tried()) < 2 or not len(mine):
            return mine, None
        features = self.context.scan(self.method.embed, mine)
        order = herding(features, len(mine))
        return mine.select(order.to(mine.labels.device)), features[order]

    def _volumes(
        self, codec: JpegCodec, kept: ByteStore, examples: Examples, features: Tensor
    ) -> tuple[float, float]:
        """Log-volume of the exemplars kept of a class, and that of their originals."""
        rows = min(len(kept), features.shape[1])
        first = torch.arange(rows, device=kept.device)
        seen = Examples(codec.decode(kept.select(first)), examples.labels[:rows])
        compressed = self.context.scan(self.method.embed, seen)
        return log_volume(compressed), log_volume(features[:rows])

    def _append(self, name: str, row: Tensor) -> None:
        """One more task's row of a buffer."""
        held = getattr(self, name)
        setattr(self, name, torch.cat([held, row.to(held)]))

    def records(self) -> list[Record]:
        """Quality and compression rate of every task, R_q over the grid, and the last choice."""
        chosen, rates, ratios = self.chosen.tolist(), self.rates.cpu(), self.ratios.cpu()
        measured = rates.isfinite().nonzero().flatten().tolist()
        curves = {"raw bytes per byte of file": rates[measured].tolist()}
        records = [
            _curve(
                "JPEG quality", list(range(len(chosen))), {"quality": chosen}, "task", "quality"
            ),
            _curve("Compression rate", measured, curves, "task", "rate"),
        ]
        if len(self._tried()) < 2 or not chosen:
            return records
        grid = list(self._tried())
        whole = ratios.isfinite().all(1).nonzero().flatten().tolist()
        shown = {whole[len(whole) * k // _SHOWN_TASKS] for k in range(_SHOWN_TASKS) if whole}
        if shown:
            lines = {f"task {task + 1}": ratios[task].tolist() for task in sorted(shown)}
            records.append(_curve("Volume ratio R_q", grid, lines, "quality", "R_q"))
        rows = [
            [quality, count, f"{ratio:.3f}" if math.isfinite(ratio) else "no volume"]
            for quality, count, ratio in zip(
                grid, self.counts[-1].tolist(), ratios[-1].tolist(), strict=True
            )
        ]
        title = "Choice of quality in the last task"
        columns = ["quality", "exemplars N_q of its classes", "R_q"]
        return [*records, Record("table", title, {"columns": columns, "rows": rows})]


def log_volume(features: Tensor) -> float:
    r"""The logarithm of the volume that unit features span.

    .. math:: \log \sqrt{\det(M M^\top)} = \sum_i \log \sigma_i(M)

    (Wang et al. 2022, Sec. 4.2), over the singular values of M, which lose half as many digits as
    the determinant; rows are scaled to length 1 first.

    Args:
        features: [N, D] of any floating dtype.

    Returns:
        At most 0, which it is without features; ``-inf`` where they are linearly dependent, as
        more than D are.

    Example:
        >>> round(log_volume(torch.tensor([[2.0, 0.0], [1.0, 1.0]])), 6)  # log sin 45 degrees
        -0.346574
        >>> log_volume(torch.ones(2, 3))
        -inf
    """
    rows, dimensions = features.shape
    if not rows:
        return 0.0
    unit = F.normalize(features.double().cpu(), dim=1)
    values = torch.linalg.svdvals(unit)
    smallest = float(values[0]) * max(rows, dimensions) * torch.finfo(torch.float64).eps
    if rows > dimensions or float(values[-1]) <= smallest:
        return -math.inf
    return float(values.log().sum())


def volume_ratio(volumes: Sequence[tuple[float, float]], floor: float = -500.0) -> float:
    """R_q: geometric mean of volumes compressed over that of the originals' (Wang et al. 2022).

    Args:
        volumes: Of each class, the log-volumes of its exemplars and of their originals.
        floor: Classes count if both lie above it.

    Returns:
        The ratio; NaN if no class counts.

    Example:
        >>> round(volume_ratio([(-2.0, -2.2), (-3.0, -3.4), (-600.0, -1.0)]), 6)  # exp(0.3)
        1.349859
    """
    gains = [
        compressed - original
        for compressed, original in volumes
        if compressed > floor and original > floor
    ]
    if not gains:
        return math.nan
    mean = sum(gains) / len(gains)
    return math.exp(mean) if mean < 700 else math.inf


def choose(
    ratios: Sequence[float], counts: Sequence[int], qualities: Sequence[int], epsilon: float
) -> int:
    """Which quality has the largest N_q with |R_q - 1| < epsilon (Wang et al. 2022, Sec. 4.2).

    Args:
        ratios: R_q, NaN where there is no volume.
        counts: N_q.
        qualities: q.
        epsilon: How far R_q may lie from 1.

    Returns:
        Its position; of equal N_q that of the highest quality, and that of the highest of all if
        none is near enough.

    Example:
        >>> choose([3.0, 1.4, 1.1], [90, 60, 40], [10, 50, 90], epsilon=0.5)
        1
    """
    places = range(len(qualities))
    near = [place for place in places if abs(ratios[place] - 1) < epsilon]
    if not near:
        return max(places, key=lambda place: qualities[place])
    return max(near, key=lambda place: (counts[place], qualities[place]))


def _encode_fitting(codec: JpegCodec, images: ImageStore, fitting: Fitting) -> ByteStore:
    """Those from the front that a class may keep, encoded; few more than these are."""
    count = min(len(images), _FIRST_ENCODED)
    while True:
        encoded = codec.encode(images.select(torch.arange(count, device=images.device)))
        kept = fitting(codec.units(encoded), codec.nbytes(encoded))
        if kept < count or count == len(images):
            return encoded.select(torch.arange(kept, device=encoded.device))
        count = min(len(images), 2 * count)


def _curve(title: str, x: list[int], y: dict[str, Any], xlabel: str, ylabel: str) -> Record:
    """A record of lines."""
    return Record("curve", title, {"x": x, "y": y, "xlabel": xlabel, "ylabel": ylabel})
