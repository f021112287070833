"""What a method or addon leaves for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Record:
    """One thing to show in the report.

    Args:
        kind: ``curve``: payload {"x": [...], "y": {name: [...]}, "xlabel", "ylabel"}, and, for
            places on the x axis to mark, "marks": {name: x};
            ``matrix``: {"values": [[...]], "rows": [...], "columns": [...]};
            ``images``: {"images": uint8 [N, H, W, 3] array, "captions": [...]}, and, for images
            of classes, their "labels": [...], whose names the report puts before the captions;
            ``table``: {"columns": [...], "rows": [[...]]};
            ``scatter``: {"points": {name: [[x, y], ...]}}, places whose scale means nothing.
        title: Heading.
        payload: The figures, as plain Python (arrays only in ``images``).
    """

    kind: Literal["curve", "matrix", "images", "table", "scatter"]
    title: str
    payload: dict[str, Any] = field(default_factory=dict)
