"""Epochs of every method for pytest-benchmark: `pytest benchmarks/bench_steps.py -k foster`.

Timed on CIFAR-100 as ``FASTCIL_DATA`` has it; with --benchmark-disable two steps of each on images
that are drawn. `step_run` keeps figures, beside PyCIL's.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from step_case import BEST, MODES, Run, Work
from step_sections import METHODS, few

from fastcil.errors import DataError, FastcilError

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
STEPS = 5
DRAWN = Work(
    "drawn",
    "scenes:classes=4,size=32,train_per_class=8,test_per_class=2",
    "lfs-2",
    "8 images",
    batch=8,
    options={"network.name": "resnet20", "network.width": 4},
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_epoch(benchmark: Any, request: pytest.FixtureRequest, method: str, mode: str) -> None:
    benchmark.group = method
    if request.config.getoption("benchmark_disable"):
        if mode != "fp32":
            pytest.skip("the other modes take long and are run where they are timed")
        epoch = benchmark(Run(method, DRAWN, "cpu").epoch, 2)
        assert epoch.images > 0 and epoch.phases["forward"] > 0
        return
    work = few(argparse.Namespace(data="cifar100", batch=128))
    try:
        run = Run(method, work, "cpu")
    except (DataError, FastcilError) as error:
        pytest.skip(f"CIFAR-100 is not here: {error}")
    run.epoch(2, mode)
    benchmark.pedantic(run.epoch, (STEPS, mode), rounds=3)
    benchmark.extra_info["images"] = STEPS * work.batch
    assert mode != BEST or run.stage.compiled is not None
