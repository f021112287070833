from __future__ import annotations

import json

import pytest

from fastcil.engine.timings import StageTiming, read_timings


def task(number):
    return {"event": "task", "task": number, "tasks": 2, "seed": 0}


def epoch(stage, epoch, seconds, rate, number=0, **shares):
    told = {"stage": stage, "number": number, "epoch": epoch, "seconds": seconds, "rate": rate}
    told["shares"] = shares
    return {"event": "epoch", **told}


OTHERS = [
    {"event": "run", "method": "er"},
    {"event": "stage", "stage": "a", "epochs": 2, "steps": 1},
]


@pytest.mark.parametrize(
    ("events", "timings"),
    [
        ([], []),
        (OTHERS, []),
        (
            [
                *OTHERS,
                task(0),
                epoch("a", 0, 2.0, 10.0),
                epoch("a", 1, 3.0, 20.0),
                epoch("b", 0, 1.0, 5.0),
            ],
            [StageTiming(0, "a", 5.0, 80.0), StageTiming(0, "b", 1.0, 5.0)],
        ),
        # The same stage in the next task.
        (
            [task(0), epoch("a", 0, 2.0, 1.0), task(1), epoch("a", 0, 4.0, 1.0)],
            [StageTiming(0, "a", 2.0, 2.0), StageTiming(1, "a", 4.0, 4.0)],
        ),
        # Stopped after epoch 1, gone on from a checkpoint before it.
        (
            [
                task(0),
                epoch("a", 0, 2.0, 1.0),
                epoch("a", 1, 9.0, 1.0),
                task(0),
                epoch("a", 1, 3.0, 1.0),
            ],
            [StageTiming(0, "a", 5.0, 5.0)],
        ),
        # A companion beside it, in the second task alone.
        (
            [
                task(0),
                epoch("a", 0, 2.0, 1.0),
                task(1),
                epoch("a", 0, 4.0, 1.0, mask=0.25),
                epoch("a", 1, 2.0, 1.0, mask=0.5),
            ],
            [StageTiming(0, "a", 2.0, 2.0), StageTiming(1, "a", 6.0, 6.0, {"mask": 2.0})],
        ),
        # Two stages of one name in one task, stopped in the second of them.
        (
            [
                task(0),
                epoch("a", 0, 2.0, 1.0),
                epoch("a", 0, 9.0, 1.0, number=1),
                task(0),
                epoch("a", 0, 3.0, 1.0, number=1),
            ],
            [StageTiming(0, "a", 5.0, 5.0)],
        ),
    ],
)
def test_seconds_and_images_of_each_stage(tmp_path, events, timings):
    log = tmp_path / "events.jsonl"
    log.write_text("".join(json.dumps({"time": 1.0, **e}) + "\n" for e in events), encoding="utf-8")
    assert read_timings(log) == timings


def test_a_line_cut_short_is_passed_over(tmp_path):
    log = tmp_path / "events.jsonl"
    whole = json.dumps(task(0)) + "\n" + json.dumps(epoch("a", 0, 2.0, 3.0)) + "\n"
    log.write_text(whole + '{"event": "epo\n7\n', encoding="utf-8")
    assert read_timings(log) == [StageTiming(0, "a", 2.0, 6.0)]
