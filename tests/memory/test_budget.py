from __future__ import annotations

import math
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcil.contract import Kind
from fastcil.errors import FastcilError
from fastcil.memory import Budget


@pytest.mark.parametrize(
    ("text", "amount", "unit", "growing", "count"),
    [
        ("64MiB", 64 * 2**20, "bytes", False, "memory"),
        ("64 MB", 64_000_000, "bytes", False, "memory"),
        ("64mb", 64_000_000, "bytes", False, "memory"),
        ("1.5GiB", 3 * 2**29, "bytes", False, "memory"),
        ("2TiB", 2**41, "bytes", False, "memory"),
        ("0.1KiB", 102, "bytes", False, "memory"),
        ("7 B", 7, "bytes", False, "memory"),
        ("1000 bytes", 1000, "bytes", False, "memory"),
        ("100KiB/class", 102_400, "bytes", True, "memory"),
        ("100KiB per class", 102_400, "bytes", True, "memory"),
        ("2000 images", 2000, "images", False, "memory"),
        ("1 image", 1, "images", False, "memory"),
        (" 20 images / class ", 20, "images", True, "memory"),
        ("none", 0, "bytes", False, "memory"),
        ("0", 0, "bytes", False, "memory"),
        (0, 0, "bytes", False, "memory"),
        (0.0, 0, "bytes", False, "memory"),
        ("0 images", 0, "images", False, "memory"),
        ("Unlimited", math.inf, "bytes", False, "memory"),
        ("64MiB, count=all", 64 * 2**20, "bytes", False, "all"),
        ("none, count=all", 0, "bytes", False, "all"),
        ("unlimited, count=all", math.inf, "bytes", False, "all"),
    ],
)
def test_parse(text, amount, unit, growing, count):
    budget = Budget.parse(text)
    assert budget == Budget(amount, unit, growing, count)
    assert Budget.parse(str(budget)) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (2000, "memory is 2000, without a unit; write '2000 images' or '2000 bytes'"),
        ("2000", "without a unit"),
        (2.5, "without a unit"),
        ("20/class", "without a unit"),
        ("20 per class", "without a unit"),
        (True, "memory is True"),
        (None, "memory is None"),
        (["64MiB"], "pass text such as '64MiB'"),
        ("", "no budget"),
        ("lots", "no budget"),
        ("-5 images", "no budget"),
        (-5, "no budget"),
        (math.nan, "no budget"),
        ("64 MiB extra", "no budget"),
        ("64MiB, count=some", "no budget"),
        ("1e6 B", "no budget"),
        ("64M", "unit is unknown"),
        ("64 megs", "unit is unknown"),
        ("64 Mibit/class", "unit is unknown"),
        ("2.5 images", "counted whole"),
        ("2000 images, count=all", "give the budget in bytes"),
    ],
)
def test_parse_refuses(value, says):
    with pytest.raises(FastcilError, match=r"^memory is|^count is") as caught:
        Budget.parse(value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"amount": -1},
        {"amount": 1.5},
        {"amount": math.nan},
        {"amount": True},
        {"amount": "64MiB"},
        {"amount": 1, "unit": "pixels"},
        {"amount": 1, "count": "some"},
        {"amount": 1, "unit": "images", "count": "all"},
        {"amount": math.inf, "unit": "images"},
        {"amount": math.inf, "growing": True},
    ],
)
def test_constructor_refuses(arguments):
    with pytest.raises(FastcilError):
        Budget(**arguments)


budgets = st.builds(
    lambda amount, kind, growing: Budget(amount, kind[0], growing, kind[1]),
    st.one_of(st.integers(0, 2**45), st.integers(0, 3000).map(lambda n: n * 2**20)),
    st.sampled_from([("bytes", "memory"), ("bytes", "all"), ("images", "memory")]),
    st.booleans(),
)


@given(budgets)
def test_text_reads_back_as_the_same_budget(budget):
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(64 * 2**20), "64MiB"),
        (Budget(64_000_000), "64MB"),
        (Budget(3 * 2**29), "1536MiB"),
        (Budget(1001), "1001B"),
        (Budget(0), "none"),
        (Budget(math.inf), "unlimited"),
        (Budget(20, "images", growing=True), "20 images/class"),
        (Budget(2**20, count="all"), "1MiB, count=all"),
    ],
)
def test_text(budget, text):
    assert str(budget) == text


@pytest.mark.parametrize(
    ("text", "classes", "other", "quota", "limit"),
    [
        ("2000 images", 10, 0, 200, 2000),
        ("2000 images", 30, 0, 66, 2000),
        ("2000 images", 30, 10**9, 66, 2000),
        ("5 images", 6, 0, 0, 5),
        ("20 images/class", 70, 0, 20, 1400),
        ("1000 B", 3, 0, 333, 1000),
        ("1000 B", 3, 200, 266, 1000),
        ("1000 B", 3, 1001, 0, 1000),
        ("1000 B/class", 3, 0, 1000, 3000),
        ("1000 B/class", 3, 200, 933, 3000),
        ("none", 3, 0, 0, 0),
        ("unlimited", 3, 10**12, math.inf, math.inf),
    ],
)
def test_quota_and_limit(text, classes, other, quota, limit):
    budget = Budget.parse(text)
    assert budget.quota(classes, other) == quota
    assert budget.limit(classes) == limit


@given(budgets, st.integers(1, 300), st.integers(0, 2**30))
def test_quotas_never_add_up_to_more_than_the_limit(budget, classes, other):
    quota = budget.quota(classes, other)
    own = Fraction(quota) * classes
    if budget.unit == "bytes" and quota:
        own += other
    assert quota == int(quota) >= 0
    assert own <= Fraction(budget.limit(classes))


def test_kinds_that_count():
    memory = {kind for kind in get_args(Kind) if Budget(1).counts(kind)}
    assert memory == {"exemplars", "logits", "generator", "codec"}
    every = {kind for kind in get_args(Kind) if Budget(1, count="all").counts(kind)}
    assert every == set(get_args(Kind)) - {"analysis"}


def test_quota_needs_a_class():
    with pytest.raises(FastcilError, match="classes is 0"):
        Budget(5).quota(0)


@given(budgets, st.integers(1, 300), st.integers(0, 2**20), st.integers(1, 10**6), st.booleans())
def test_smallest_holds_the_cost_and_one_less_does_not(budget, classes, other, cost, partly):
    need = cost - 0.25 if partly else cost
    least = budget.smallest(need, classes, other)
    assert least.quota(classes, other) >= need
    less = Budget(least.amount - 1, least.unit, least.growing, least.count)
    assert less.quota(classes, other) < need
