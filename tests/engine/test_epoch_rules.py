"""The rules that choose an epoch, and which images are held out for them."""

from __future__ import annotations

import numpy as np
import torch

from fastcil.engine.epoch_choice import held_out, prefers


def chosen(rule: str, curve: list[tuple[float, float | None, float]]) -> int | None:
    best = None
    for epoch, (new, old, loss) in enumerate(curve):
        figures = {"epoch": epoch, "new": new, "old": old, "loss": loss}
        best = figures if prefers(rule, figures, best) else best
    return best and best["epoch"]


def test_the_papers_rule_is_a_loop_over_the_whole_curve() -> None:
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(300):
        # Coarse, so that new and old are often equal.
        curve = [(float(n), float(o), 0.0) for n, o in rng.integers(0, 6, (8, 2))]
        expected = None
        crossed = [e for e, (new, old, _) in enumerate(curve) if new > old]
        if crossed:
            expected = crossed[0]
            for e in range(crossed[0] + 1, len(curve)):
                if all(curve[e][k] > curve[expected][k] for k in (0, 1)):
                    expected = e
        assert chosen("paper", curve) == expected
        found.add(expected)
    assert None in found and len(found) > 6


def test_without_old_classes_the_papers_rule_has_no_say() -> None:
    assert chosen("paper", [(50.0, None, 1.0), (60.0, None, 1.0)]) is None


def test_held_out_shots_prefer_accuracy_then_loss_then_the_earlier() -> None:
    rng = np.random.default_rng(1)
    for old_known in (True, False):
        for _ in range(200):
            rows = rng.integers(0, 4, (8, 3)).astype(float)
            curve = [(n, o if old_known else None, loss) for n, o, loss in rows]
            score = [
                n if o is None else 0.0 if n * o == 0 else 1 / ((1 / n + 1 / o) / 2)
                for n, o, _ in curve
            ]
            expected = max(range(8), key=lambda e: (round(score[e], 9), -curve[e][2], -e))
            assert chosen("held-out", curve) == expected


def test_one_image_of_each_class_is_held_out_by_the_seed() -> None:
    labels = torch.tensor([3] * 5 + [4] * 2 + [5] + [6] * 4)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    drawn = set()
    for seed in range(20):
        held = held_out(labels, seed, 1)
        assert labels[held].sort().values.tolist() == [3, 4, 6], "a single image stays"
        assert torch.equal(held_out(labels, seed, 1), held)
        drawn.add(tuple(held.nonzero().flatten().tolist()))
    assert len(drawn) > 10
