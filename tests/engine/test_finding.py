from __future__ import annotations

import re

import numpy as np
import pytest

from fastcil.engine.compare import Comparison
from fastcil.engine.finding import exceeds_budget, finding
from fastcil.engine.metrics import mean_interval


def compared(*results):
    return Comparison({result.config["method"]: result for result in results})


def test_one_run_is_described(make_result):
    result = make_result("er", seeds=(0,))
    said = finding(compared(result))
    assert f"er classifies {result.last_accuracy:.1f} % of the test images of 6 classes" in said
    assert "guessing would give 16.7 %" in said
    assert "(one seed)" in said
    assert "±" not in said
    assert "(95 % interval over 3 seeds)" in finding(compared(make_result("er")))
    assert "forgotten" not in finding(compared(make_result("er", classes=(5,))))


def test_a_clear_difference(make_result):
    low, high = make_result("er", level=0.5), make_result("foster", level=0.9)
    said = finding(compared(low, high))
    gains = np.subtract(high.per_seed("average"), low.per_seed("average"))
    gain, half = mean_interval(gains.tolist())
    assert said.startswith("At equal memory, foster's average accuracy is the higher:")
    assert f"is {gain:+.1f} points" in said
    assert f"is {gain - half:+.1f} to {gain + half:+.1f} and excludes zero" in said
    assert "corrected" not in said


def test_a_difference_that_settles_nothing(make_result):
    said = finding(compared(make_result("er", 0.7, images=4), make_result("icarl", 0.7, images=4)))
    assert "includes zero: these seeds do not settle the order" in said


def test_the_best_of_many_is_said_to_be_chosen(make_result):
    said = finding(compared(*(make_result(name) for name in ("er", "der", "icarl"))))
    assert "highest of 3" in said
    assert "not corrected for having chosen the best" in said


@pytest.mark.parametrize(("seeds", "words"), [((0,), "one seed"), ((0, 1), "2 seeds")])
def test_few_seeds_give_no_interval(make_result, seeds, words):
    said = finding(compared(make_result("er", seeds=seeds), make_result("der", seeds=seeds)))
    assert f"points from {words}, without an interval: only an indication" in said
    assert "95 %" not in said


def test_what_the_budget_does_not_count_is_named(make_result):
    said = finding(compared(make_result("er", 0.5), make_result("der", 0.9, network=3 << 20)))
    assert "der keeps a further 3 MiB that this budget does not count." in said
    assert not re.search("er keeps a further .* er keeps", said)


@pytest.mark.parametrize(
    ("memory", "held", "exceeds"),
    [
        ("4KiB", 1.0, False),
        ("4KiB", 1.01, True),
        ("20 images", 1.0, False),
        ("20 images", 1.2, True),
        ("unlimited", 9.0, False),
        ("none", 0.0, False),
    ],
)
def test_who_exceeds_the_budget(make_result, memory, held, exceeds):
    assert exceeds_budget(make_result("joint", memory=memory, held=held)) == exceeds


def test_who_exceeds_the_budget_is_not_ranked(make_result):
    results = make_result("joint", 0.95, held=5.0), make_result("er", 0.5), make_result("der", 0.8)
    said = finding(compared(*results))
    assert said.startswith("At equal memory, der's average accuracy is the higher:")
    assert said.endswith("joint holds more than the budget: not ranked.")
    assert "er is the only method" in finding(compared(*results[:2]))
