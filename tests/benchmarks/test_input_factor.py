"""Ways to keep an input factor: what is compared, and what an update needs."""

from __future__ import annotations

import sys
from dataclasses import replace

import bench_input_factor
import pytest
from bench_input_factor import CASES, MEASURED, check, extra_apart, route
from input_factor_ways import OWN, PEERS, Layer, build

from fastcil.ops import extension_available

LAYER = MEASURED[0].small()


@pytest.mark.parametrize("name", (*OWN, *PEERS))
def test_another_average_is_found_out(name):
    running = build(name, LAYER)
    if running is None:
        pytest.skip(f"{name} cannot be had here")
    other = 1.0 if running.decay < 1 else 0.5
    with pytest.raises(AssertionError, match="something else"):
        check(name, LAYER, replace(running, decay=other))


def test_layers_are_named_apart_and_their_routes_told():
    assert len({case.name for case in CASES}) == len(CASES) == 14
    assert [str(case.group.name) for case in CASES if case.group] == ["batch 32"] * 4 + [
        "batch 8"
    ] * 4
    assert route(LAYER) == ("spectra" if extension_available() else "lags")
    assert route(replace(LAYER, stride=2)) == "patches"


@pytest.mark.parametrize(
    "layer, positions",
    [(Layer(8, 3, 224, 7, 2, 3), 112**2), (Layer(8, 64, 56), 56**2), (Layer(1, 4, 8, 1, 2, 0), 16)],
)
def test_positions_are_those_of_the_layers_output(layer, positions):
    assert layer.positions == positions == layer.module()(layer.batch()[:1])[0, 0].numel()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is read as Linux tells it")
def test_what_the_naive_way_needs_are_its_patches_twice(monkeypatch):
    """Copied out, and once more to be transposed."""
    number = MEASURED.index(Layer(8, 256, 14))
    monkeypatch.setattr(bench_input_factor, "REPETITIONS", 1)
    need, made = extra_apart("naive", number)
    layer = MEASURED[number]
    patches = layer.images * layer.positions * layer.rows * 4
    assert made == 0 and 1.9 * patches < need < 2.3 * patches
