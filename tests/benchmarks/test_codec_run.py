"""The run of a codec's life: what is trained is described right, and claims follow the figures."""

from __future__ import annotations

from typing import Any

import codec_run
import pytest
import torch

from fastcil.data import ImageStore


def test_recipes_are_those_of_the_strategies() -> None:
    recipes = codec_run.trainings(codec_run.Options("out", steps=400, size=64, batch_size=4))
    assert recipes["pre-trained"].strategy == "all" and recipes["pre-trained"].steps == 400
    assert recipes["pre-trained"].lambda_range is None and recipes["pre-trained"].ema > 0
    for name, (strategy, _, limits) in codec_run.FINETUNED.items():
        assert (recipes[name].strategy, recipes[name].lambda_range) == (strategy, limits)
        assert recipes[name].steps == 200 and recipes[name].ema == 0
    assert codec_run.trainings(codec_run.Options("out", steps=1))["data, kr"].steps == 1


def curve(shift: float) -> list[dict[str, float]]:
    """A curve that takes so many percent more bits at each PSNR."""
    rates = (0.1, 0.3, 0.6, 1.0)
    return [{"bpp": r * (1 + shift / 100), "psnr": 28 + 5 * k} for k, r in enumerate(rates)]


def results(**shifts: float) -> dict[str, Any]:
    given = {"kr old": -2.0, "enc-dec old": 8.0, "enc old": 0.0} | shifts
    own = {"enc": -3.0, "enc-dec": -10.0, "kr": -9.5}
    found = {}
    for what, prefix in (
        *(("data-kodak", "data"), ("data-clothing", "data")),
        *(("low-to-high", "low to high"), ("high-to-low", "high to low")),
    ):
        curves = {"pre-trained": curve(0.0)}
        for strategy in ("enc", "enc-dec", "kr"):
            curves[f"{prefix}, {strategy}"] = curve(own[strategy])
            curves[f"{prefix}, {strategy}, old bitstreams"] = curve(given[f"{strategy} old"])
        found[what] = {"curves": curves}
    return found


def test_claims_follow_the_figures() -> None:
    rows = {row["claim"]: row for row in codec_run.claims(results())}
    assert rows["data: enc-dec loses on old bitstreams"]["seen"]
    figures = rows["data: kr gains on old bitstreams"]["bd_rate"]
    assert figures == {"kr": pytest.approx(-2.0), "enc-dec": pytest.approx(8.0)}
    assert [row["claim"] for row in rows.values() if not row["seen"]] == [
        "low to high: kr is best at its own rates",
        "high to low: kr is best at its own rates",
    ]
    worse = codec_run.claims(results(**{"kr old": 1.0, "enc old": 0.5}))
    assert [row["claim"] for row in worse if not row["seen"]][:2] == [
        "data: kr gains on old bitstreams",
        "low to high: kr gains on old bitstreams",
    ]
    apart = results()
    for point in apart["data-kodak"]["curves"]["data, enc, old bitstreams"]:
        point["psnr"] += 100
    (row,) = [r for r in codec_run.claims(apart) if "leaves old" in r["claim"]]
    assert row["seen"] is None and row["bd_rate"] == {"enc": None}


def test_photos_are_shrunk_to_a_shorter_side() -> None:
    image = torch.arange(40 * 60 * 3).view(40, 60, 3).remainder(251).byte()
    assert codec_run._shrunk(image, 20).shape == (20, 30, 3)
    assert torch.equal(codec_run._shrunk(image, 40), image)
    assert len(ImageStore.from_images([codec_run._shrunk(image, None)])) == 1
