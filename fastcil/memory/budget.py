"""How much may be kept between tasks, in bytes or in the papers' images."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from fastcil.contract import Kind, check_choices
from fastcil.errors import FastcilError

Unit = Literal["bytes", "images"]
Count = Literal["memory", "all"]

_SCALES = {
    "B": 1,
    **{f"{p}iB": 1024**n for n, p in enumerate("KMGT", start=1)},
    **{f"{p}B": 1000**n for n, p in enumerate("KMGT", start=1)},
}
_BYTES = {"byte": 1, "bytes": 1, **{name.lower(): scale for name, scale in _SCALES.items()}}
_TEXT = re.compile(
    r"(?P<amount>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]+)?\s*(?P<growing>/\s*class|per\s+class)?"
)
_COUNT_ALL = re.compile(r"\s*,\s*count\s*=\s*all\s*$", re.IGNORECASE)
_FORMS = (
    "'64MiB', '64MB', '100KiB/class', '2000 images', '20 images/class', 'none' or 'unlimited', "
    "with ', count=all' behind it to count curvature and networks too"
)


@dataclass(frozen=True)
class Budget:
    """What memory may hold at every task boundary.

    In ``bytes`` it is the sum over everything of the kinds exemplars, logits, generator and codec
    that is retained, counted from the buffers themselves; ``count="all"`` adds curvature and the
    networks beyond the first. In ``images`` it is the accounting of the papers: a raw image costs
    1 whatever its size, a compressed one its share of that (Luo et al. 2023, Eq. 4), and nothing
    else costs anything.

    Args:
        amount: Whole bytes or images, per class when ``growing``; ``math.inf`` for no limit.
        unit: ``bytes`` or ``images``.
        growing: Whether ``amount`` is granted for every class ("growing" memory, usual after a
            start with half the classes) rather than shared by all ("fixed" memory).
        count: ``memory``, or ``all`` to count curvature and further networks (in bytes only).

    Raises:
        FastcilError: An amount that is negative, not whole or not a number; an unknown unit or
            count; ``count="all"`` in images; no limit in images or per class.

    Example:
        >>> budget = Budget.parse("2000 images")
        >>> budget.quota(classes=30), budget.limit(classes=30)
        (66.0, 2000.0)
        >>> str(Budget(20, "images", growing=True))
        '20 images/class'
    """

    amount: float
    unit: Unit = "bytes"
    growing: bool = False
    count: Count = "memory"

    def __post_init__(self) -> None:
        check_choices(self)
        amount = self.amount
        number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not (number and amount >= 0 and (math.isinf(amount) or amount == int(amount))):
            raise FastcilError(
                f"amount is {amount!r}; it must be a whole number of {self.unit}, at least 0, or "
                f"infinity for no limit."
            )
        if math.isinf(amount) and (self.growing or self.unit == "images"):
            raise FastcilError("amount is infinite; an unlimited budget is in bytes and fixed.")
        if self.count == "all" and self.unit == "images":
            raise FastcilError(
                "count is 'all' for a budget in images, in which only exemplars count; "
                "give the budget in bytes."
            )

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """Reads a budget as people write it.

        Args:
            value: ``64MiB``, ``64 MB`` (decimal), ``1.5GiB``, ``100KiB/class``, ``2000 images``,
                ``20 images/class``, ``none`` or 0 for nothing, ``unlimited``; each in bytes may
                end in ``, count=all``. Fractions of a byte are dropped. A `Budget` is handed back.

        Raises:
            FastcilError: Anything else; a number without a unit could mean bytes or images.

        Example:
            >>> Budget.parse("1.5 GiB").amount
            1610612736
            >>> Budget.parse(2000)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            fastcil.errors.FastcilError: memory is 2000, without a unit; ...
        """
        if isinstance(value, Budget):
            return value
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise FastcilError(f"memory is {value!r}; pass text such as {_FORMS}.")
        text = "0" if value == 0 else str(value).strip()
        bare = _COUNT_ALL.sub("", text)
        count: Count = "memory" if bare == text else "all"
        if bare.lower() in ("none", "0"):
            return cls(0, count=count)
        if bare.lower() == "unlimited":
            return cls(math.inf, count=count)
        match = _TEXT.fullmatch(bare.lower())
        if match is None:
            raise FastcilError(f"memory is '{text}', which is no budget; write {_FORMS}.")
        if match["unit"] is None or match["unit"] == "per":
            raise FastcilError(
                f"memory is {text}, without a unit; write '{bare} images' or '{bare} bytes', or "
                f"one of {_FORMS}."
            )
        amount, growing = Fraction(match["amount"]), match["growing"] is not None
        if match["unit"] in ("image", "images"):
            if amount.denominator != 1:
                raise FastcilError(f"memory is '{text}'; images are counted whole.")
            return cls(int(amount), "images", growing, count)
        if match["unit"] not in _BYTES:
            raise FastcilError(f"memory is '{text}', whose unit is unknown; write {_FORMS}.")
        return cls(math.floor(amount * _BYTES[match["unit"]]), "bytes", growing, count)

    def __str__(self) -> str:
        """The text that `parse` reads back as the same budget."""
        if self.growing or self.unit == "images" or 0 < self.amount < math.inf:
            text = self._amount() + ("/class" if self.growing else "")
        else:
            text = "none" if self.amount == 0 else "unlimited"
        return text + (", count=all" if self.count == "all" else "")

    def _amount(self) -> str:
        """The amount with its unit, in the shortest exact form."""
        whole = int(self.amount)
        if self.unit == "images":
            return f"{whole} images"
        exact = [f"{whole // n}{unit}" for unit, n in _SCALES.items() if whole % n == 0]
        return min(exact, key=len)

    def counts(self, kind: Kind) -> bool:
        """Whether entries of a kind count towards this budget.

        Example:
            >>> Budget.parse("64MiB").counts("logits"), Budget.parse("64MiB").counts("network")
            (True, False)
        """
        memory = kind in ("exemplars", "logits", "generator", "codec")
        return memory or (self.count == "all" and kind != "analysis")

    def limit(self, classes: int) -> float:
        """The most that may be held of ``classes`` classes, in the budget's unit."""
        return float(self.amount * classes if self.growing else self.amount)

    def quota(self, classes: int, other_nbytes: int = 0) -> float:
        """What the exemplars of one class may cost, in the budget's unit.

        It is ``floor(M / C)`` images of a fixed budget, as in iCaRL (Rebuffi et al. 2017,
        Alg. 2, where the number kept is M / t), ``floor((M - other) / C)`` bytes, and of a
        growing budget the amount per class, less each class's share of ``other``.

        Args:
            classes: Classes known, C.
            other_nbytes: Bytes of everything else that counts; in images nothing else does.

        Raises:
            FastcilError: Fewer than one class.
        """
        if classes < 1:
            raise FastcilError(f"classes is {classes}; a quota needs at least one class.")
        left = self.limit(classes)
        if math.isinf(left):
            return left
        if self.unit == "bytes":
            left -= other_nbytes
        return float(max(0, int(left) // classes))

    def smallest(self, cost: float, classes: int, other_nbytes: int = 0) -> Budget:
        """The least budget of this kind whose quota is at least ``cost``.

        Example:
            >>> str(Budget(10, "images").smallest(cost=0.4, classes=50))
            '50 images'
        """
        each = math.ceil(cost)
        other = other_nbytes if self.unit == "bytes" else 0
        amount = each + math.ceil(other / classes) if self.growing else each * classes + other
        return Budget(amount, self.unit, self.growing, self.count)
