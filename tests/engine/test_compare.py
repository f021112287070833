"""Methods side by side: the same seeds, paired differences, and nothing computed twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backbones import ConvNet

from fastcil import FastcilError
from fastcil.engine.compare import Comparison, compare
from fastcil.engine.result import Result
from fastcil.engine.trainer import Trainer

METHODS = ["finetune", "der", "icarl+cam"]
SEEDS = (0, 1, 2)
SHARED = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 12,
    "engine.progress": False,
    "augment.size": 12,
}
OPTIONS = {
    # One method's options, an addon's, and one that all share.
    "icarl.outputs": 7,
    "icarl": {"temperature": 3.0},
    "cam.threshold": 0.5,
    "network.width": 8,
}


def draw(per_class: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    labels = [label for label in range(5) for _ in range(per_class)]
    images = rng.integers(0, 200, (len(labels), 16, 18, 3))
    return (images + 10 * np.array(labels)[:, None, None, None]).astype(np.uint8), labels


DATA = draw(7, 0), draw(6, 1)


def run(methods: Any, run_dir: Path | None, **changes: Any) -> Comparison:
    arguments = {"memory": "10 images", "seeds": SEEDS, "backbone": ConvNet, **SHARED, **changes}
    return compare(methods, DATA, "b2-inc2", run_dir=run_dir, **arguments)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("compared") / "all"
    return folder, run(METHODS, folder, **OPTIONS)


def test_every_method_ran_every_seed_in_a_folder_of_its_own(compared) -> None:
    folder, comparison = compared
    assert list(comparison.results) == METHODS
    assert {p.name for p in folder.iterdir()} == {*METHODS, "compare.json"}
    for method, result in comparison.results.items():
        assert [o.seed for o in result.outcomes] == list(SEEDS)
        assert Result.load(folder / method).outcomes == result.outcomes
        orders = {
            json.dumps(o.tasks[-1].correct[result.readouts[0]]["count"]) for o in result.outcomes
        }
        assert len(orders) == 1, "the order of classes does not change with the seed"


def test_finished_runs_are_skipped(compared, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, comparison = compared

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(Trainer, "run", refuse)
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*/seed-*/[!.]*")}
    assert len(times) == 3 * 3 * 3
    again = run(METHODS, folder, **OPTIONS)
    assert again.rows() == comparison.rows()
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/seed-*/[!.]*")} == times


def test_only_what_is_missing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, trained = Trainer.run, []

    def count(trainer: Trainer, *arguments: Any) -> None:
        trained.append(type(trainer.method).__name__)
        train(trainer, *arguments)

    monkeypatch.setattr(Trainer, "run", count)
    run(["finetune"], tmp_path, seeds=(0,))
    assert trained == ["Finetune"] * 3
    run("finetune,er", tmp_path, seeds=(0, 1))
    assert trained == ["Finetune"] * 6 + ["ExperienceReplay"] * 6


def test_rows_are_computed_by_hand(compared) -> None:
    _, comparison = compared
    base = comparison.results["finetune"]
    rows = comparison.rows()
    assert [(r.method, r.readout) for r in rows] == [
        ("finetune", "linear"),
        ("der", "linear"),
        ("icarl+cam", "nme"),
        ("icarl+cam", "linear"),
    ]
    for row in rows:
        result = comparison.results[row.method]
        assert row.seeds == 3
        for measure, get in (
            ("average", lambda o, r: o.curve(r).mean()),
            ("last", lambda o, r: o.curve(r)[-1]),
        ):
            own = [get(o, row.readout) for o in result.outcomes]
            theirs = [get(o, "linear") for o in base.outcomes]
            # Student's t, two degrees of freedom, 97.5 %: 4.302653.
            half = 4.302653 * np.std(own, ddof=1) / math.sqrt(3)
            assert row.measures[measure] == pytest.approx((np.mean(own), half), rel=1e-5)
            if row.method == "finetune":
                assert row.differences == {}
                continue
            paired = np.array(own) - np.array(theirs)
            half = 4.302653 * np.std(paired, ddof=1) / math.sqrt(3)
            assert row.differences[measure] == pytest.approx((paired.mean(), half), rel=1e-5)
        exemplars = [sum(o.tasks[-1].exemplars) for o in result.outcomes]
        assert row.exemplars == pytest.approx(np.mean(exemplars))
        assert row.nbytes == max(o.tasks[-1].nbytes["budgeted"] for o in result.outcomes)


def test_differences_are_paired_seed_by_seed(make_result) -> None:
    results = {m: make_result(m, seeds=(0, 1, 2, 3)) for m in ("er", "der")}
    own, theirs = (np.array(results[m].per_seed("last")) for m in ("der", "er"))
    assert len({*own}) == len({*theirs}) == 4
    paired = own - theirs
    # Student's t, three degrees of freedom: 3.182446.
    half = 3.182446 * np.std(paired, ddof=1) / math.sqrt(4)
    row = Comparison(results).rows()[1]
    assert row.differences["last"] == pytest.approx((paired.mean(), half), rel=1e-5)
    unpaired = 3.182446 * np.std(own - theirs[::-1], ddof=1) / math.sqrt(4)
    assert half != pytest.approx(unpaired, rel=1e-3)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_intervals_only_from_three_seeds_on(compared, seeds) -> None:
    _, comparison = compared
    few = Comparison(
        {
            method: Result(r.config, r.environment, [o for o in r.outcomes if o.seed in seeds])
            for method, r in comparison.results.items()
        }
    )
    for row, full in zip(few.rows(), comparison.rows(), strict=True):
        halves = [half for _, half in (*row.measures.values(), *row.differences.values())]
        assert halves and all(half is None for half in halves)
        assert all(half is not None for _, half in full.measures.values())
    assert "±" not in "".join(str(cell) for c in few.table().columns for cell in c.cells)
    assert "±" in "".join(str(cell) for c in comparison.table().columns for cell in c.cells)


def test_ders_networks_are_counted_both_ways(compared) -> None:
    folder, comparison = compared
    rows = {
        row.method: row
        for row in comparison.rows()
        if row.readout != "linear" or row.method == "der"
    }
    method = Result.load(folder / "der", backbone=ConvNet).learner.method
    extractors = list(method.network.extractors)
    assert len(extractors) == 3
    networks = sum(
        t.numel() * t.element_size() for e in extractors[1:] for t in e.state_dict().values()
    )
    assert rows["der"].all_nbytes - rows["der"].nbytes == networks > 0
    means = Result.load(folder / "icarl+cam", backbone=ConvNet).learner.method.nearest.means
    assert rows["icarl+cam"].all_nbytes - rows["icarl+cam"].nbytes == means.nbytes > 0


def test_options_of_a_method_go_to_it_only(compared) -> None:
    _, comparison = compared
    configs = {method: result.config for method, result in comparison.results.items()}
    assert configs["icarl+cam"]["icarl"]["outputs"] == 7
    assert configs["icarl+cam"]["icarl"]["temperature"] == 3.0
    assert configs["icarl+cam"]["cam"]["threshold"] == 0.5
    assert not {"icarl", "cam"} & {*configs["der"], *configs["finetune"]}
    assert {config["network"]["width"] for config in configs.values()} == {8}
    assert {config["memory"] for config in configs.values()} == {"10 images"}


def test_compare_json_is_strict_json(compared) -> None:
    folder, comparison = compared

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    content = json.loads((folder / "compare.json").read_text(), parse_constant=refuse)
    assert list(content["configs"]) == METHODS
    assert content["configs"] == {m: r.config for m, r in comparison.results.items()}
    assert all(content["environments"][method]["torch"] for method in METHODS)
    for row, kept in zip(comparison.rows(), content["rows"], strict=True):
        assert (kept["method"], kept["readout"]) == (row.method, row.readout)
        assert kept["measures"]["last"] == list(row.measures["last"])
    for method, result in comparison.results.items():
        assert set(content["curves"][method]) == set(result.readouts)
        assert content["curves"][method][result.readouts[0]] == pytest.approx(
            result.curve().tolist(), abs=1e-3
        )


@pytest.mark.parametrize(
    "methods, options, says",
    [
        ([], {}, "methods is ()"),
        (["er", "er"], {}, "name one or more different methods"),
        ("finetune,ft-cnn", {}, "name one or more different methods"),
        (["er", "fostre"], {}, "did you mean 'foster'"),
        (["er", "joint+cim"], {}, "Joint keeps everything"),
        (["er", "icarl"], {"der.aux_weight": 0.5}, "option 'der.aux_weight' is unknown"),
        (["er", "icarl"], {"icarl.outputs": "many"}, "option 'icarl.outputs' is 'many'"),
        (["er"], {"seeds": (0, 0)}, "seeds is (0, 0)"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_the_first_run(
    methods, options, says, tmp_path: Path
) -> None:
    with pytest.raises(FastcilError) as caught:
        run(methods, tmp_path / "x", **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_codec_is_for_the_methods_whose_addons_bring_none() -> None:
    comparison = run(["er", "er+cam"], None, seeds=0, codec="raw")
    assert comparison.results["er"].config["codec"] == "raw"
    assert comparison.results["er+cam"].config["codec"] is None
    assert comparison.results["er+cam"].learner.memory.codec.name == "bbox"
