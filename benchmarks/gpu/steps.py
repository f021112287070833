"""Steps of every method on a GPU: images per second and memory, in fp32, bf16 and bf16 compiled.

python benchmarks/gpu/steps.py [--data cifar100] [--pycil FOLDER]

With PyCIL's folder its epochs of FOSTER are timed in turn with ours. Within ten minutes; small, on
the CPU: --device cpu --data scenes:classes=20,size=32,train_per_class=8,test_per_class=1 --batch 8
"""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import step_sections
import torch
from kept import arguments, run_parts


def of_method(given: Namespace, method: str) -> list[dict[str, Any]]:
    """One row for each mode of a method."""
    found = []
    for row in step_sections.methods(Namespace(**{**vars(given), "methods": method})):
        shares = {f"{name}, %": round(100 * share, 1) for name, share in row["shares"].items()}
        head = {"method": row["method"], "mode": row["mode"], "images/s": row["rate"]}
        found.append({**head, "peak, MiB": _mib(row["peak"]), **shares})
    return found


def beside_peers(given: Namespace) -> list[dict[str, Any]]:
    """One row for each way of each method that a peer has."""
    found = []
    for row in step_sections.peers(given):
        for way, figures in row["ways"].items():
            head = {"method": row["method"], "mode": way, "images/s": figures["rate"]}
            found.append({**head, "peak, MiB": _mib(figures["peak"])})
    return found


def _mib(count: int | None) -> int | None:
    return None if count is None else count >> 20


def main() -> None:
    """Times, prints and keeps."""
    given = arguments(
        __doc__.partition("\n")[0],
        data="cifar100",
        batch=128,
        rounds=3,
        steps=40,
        pycil="",
        peers="foster",
        compiled="",
        methods=",".join(step_sections.METHODS),
    )
    given.pycil = Path(given.pycil) if given.pycil else None
    if given.device != "cpu":
        torch.set_float32_matmul_precision("high")
    parts = {name: partial(of_method, given, name) for name in given.methods.split(",")}
    run_parts(__file__, {**parts, "beside peers": partial(beside_peers, given)}, given)


if __name__ == "__main__":
    main()
