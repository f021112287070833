"""The same cases for pytest-benchmark: `pytest benchmarks -k pade --benchmark-group-by=group`.

With --benchmark-disable each way runs once, on a small input, after its result has been checked.
"""

from __future__ import annotations

from typing import Any

import pytest
from op_case import OpCase, threads
from run import CASES

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
WAYS = [
    pytest.param(case, way, id=f"{case.op}-{case.name}-{case.device}-{way}".replace(" ", "_"))
    for case in CASES
    for way in case.ways
]


@pytest.mark.parametrize(("case", "way"), WAYS)
def test_way(benchmark: Any, request: pytest.FixtureRequest, case: OpCase, way: str) -> None:
    benchmark.group = str(case)
    timed = not request.config.getoption("benchmark_disable")
    if way == "compiled" and not timed:
        pytest.skip("compiling takes long and is done where it is timed")
    if case.device == "cuda" and timed:
        pytest.skip("timed by a GPU's own clock: python benchmarks/run.py time --device cuda")
    with threads(case.threads):
        step = case.make(way, timed)
        if step is None:
            pytest.skip(f"{way} cannot be had here")
        benchmark(step)
