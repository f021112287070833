"""What the embedded data set draws with: random numbers and sketches made of polygons and lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import cos, pi, prod, sin

import numpy as np

BODY, TRIM, DARK, LIGHT = range(4)  # tones: places in an object's palette
HOLE = -1  # shows the background again


class Draws:
    """Uniform random numbers straight from PCG64's 64-bit words.

    The bit stream of PCG64 and of SeedSequence is fixed by numpy, the methods of its Generator are
    not: taking the words keeps the images equal over numpy versions.
    """

    def __init__(self, *entropy: int) -> None:
        """Start the stream that belongs to these integers."""
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))
        self._ahead: list[float] = []

    def array(self, *shape: int) -> np.ndarray:
        """Give float64 numbers in [0, 1)."""
        words = self._bits.random_raw(prod(shape))
        return (words >> np.uint64(11)).reshape(shape) * 2.0**-53

    def grain(self, *shape: int) -> np.ndarray:
        """Give float32 numbers in [-0.5, 0.5), 256 levels: eight from each word."""
        count = prod(shape)
        words = self._bits.random_raw(-(-count // 8)).astype("<u8")
        return words.view(np.uint8)[:count].reshape(shape) * np.float32(1 / 256) - np.float32(0.5)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Give one number in [low, high)."""
        if not self._ahead:
            self._ahead = self.array(256).tolist()
        return low + (high - low) * self._ahead.pop()

    def integer(self, low: int, high: int) -> int:
        """Give one integer, both ends included."""
        return low + int(self.uniform() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """Be true with this probability."""
        return self.uniform() < probability


@dataclass(frozen=True)
class Part:
    """A filled polygon (width 0) or a polyline of some width."""

    points: np.ndarray  # [n, 2] (x, y)
    tone: int
    width: float = 0.0
    closed: bool = False


def _points(points: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    return np.asarray(points, dtype=np.float64).reshape(-1, 2)


def arc(
    x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 2 * pi, n: int = 28
) -> np.ndarray:
    """Give points on an elliptic arc, [n, 2]; angle 0 is right, pi / 2 is down."""
    angle = np.linspace(start, stop, n)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


@dataclass
class Sketch:
    """Parts in drawing order."""

    parts: list[Part] = field(default_factory=list)

    def fill(self, points: Sequence[Sequence[float]] | np.ndarray, tone: int = BODY) -> None:
        """Add a filled polygon."""
        self.parts.append(Part(_points(points), tone))

    def line(
        self,
        points: Sequence[Sequence[float]] | np.ndarray,
        width: float = 0.12,
        tone: int = BODY,
        closed: bool = False,
    ) -> None:
        """Add a polyline."""
        self.parts.append(Part(_points(points), tone, width, closed))

    def disc(
        self, x: float, y: float, rx: float, ry: float | None = None, tone: int = BODY
    ) -> None:
        """Add a filled ellipse."""
        self.fill(arc(x, y, rx, rx if ry is None else ry), tone)

    def box(self, x0: float, y0: float, x1: float, y1: float, tone: int = BODY) -> None:
        """Add a filled rectangle."""
        self.fill([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], tone)


def polar(radii: Sequence[float], turn: float = -pi / 2) -> list[tuple[float, float]]:
    """Give the polygon with these radii at equal angles."""
    step = 2 * pi / len(radii)
    return [(r * cos(turn + i * step), r * sin(turn + i * step)) for i, r in enumerate(radii)]
