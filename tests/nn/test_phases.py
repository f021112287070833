"""Time is counted for the phase it was spent in, and nobody pays where nobody measures."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastcil.nn.phases import OTHER, PHASES, PhaseClock, phase

NAP = 0.02


def nap(name, *inside):
    with phase(name):
        time.sleep(NAP)
        for each in inside:
            nap(*each)


def test_time_counts_for_the_innermost_phase():
    with PhaseClock() as clock:
        nap("forward", ["backward"], ["optimiser"])
        nap("forward")
        time.sleep(NAP)
    found = clock.seconds()
    assert set(found) == {"forward", "backward", "optimiser", OTHER}
    assert 2 * NAP <= found["forward"] < found["forward"] + found["backward"]
    assert all(found[name] >= NAP for name in found)


def test_addon_takes_all_that_lies_within_it():
    with PhaseClock() as clock:
        nap("memory update", ["addon", ["data"], ["backward"]])
    found = clock.seconds()
    assert found["addon"] >= 3 * NAP and not {"data", "backward"} & set(found)
    assert found["memory update"] >= NAP


def test_the_sum_is_the_time_that_passed():
    started = time.perf_counter()
    with PhaseClock() as clock:
        nap("data", ["forward"])
    assert sum(clock.seconds().values()) <= time.perf_counter() - started
    assert sum(clock.seconds().values()) >= 2 * NAP


def test_reset_in_the_middle_of_a_phase():
    with PhaseClock() as clock, phase("forward"):
        time.sleep(NAP)
        clock.reset()
        nap("backward")
    assert clock.seconds()["backward"] >= NAP > clock.seconds()["forward"]


def test_other_threads_do_not_disturb():
    with PhaseClock() as clock:
        thread = threading.Thread(target=nap, args=("evaluation",))
        thread.start()
        nap("forward")
        thread.join()
    assert "evaluation" not in clock.seconds()


def test_an_error_leaves_the_phase():
    with PhaseClock() as clock:
        with pytest.raises(ValueError), phase("forward"):
            raise ValueError
        time.sleep(NAP)
    assert clock.seconds()[OTHER] >= NAP > clock.seconds()["forward"]


def test_clocks_within_clocks():
    with PhaseClock() as outer:
        with PhaseClock() as inner:
            nap("data")
        nap("forward")
    assert set(inner.seconds()) == {"data", OTHER}
    assert set(outer.seconds()) == {"forward", OTHER}


def test_a_trace_shows_phases():
    with profile(activities=[ProfilerActivity.CPU]) as tracer, phase("backward"):
        torch.ones(2).sum()
    assert "fastcil: backward" in {event.key for event in tracer.key_averages()}


def test_nobody_measures():
    seen = []
    before = torch.autograd.profiler.record_function.__enter__
    torch.autograd.profiler.record_function.__enter__ = lambda self: seen.append(self)
    try:
        for name in PHASES:
            with phase(name):
                pass
    finally:
        torch.autograd.profiler.record_function.__enter__ = before
    assert not seen
