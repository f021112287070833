"""Labels for the lines of a comparison: one method several times, with options of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from backbones import ConvNet

from fastcil import FastcilError
from fastcil.cli import main
from fastcil.engine.arguments import parse_run
from fastcil.engine.compare import Comparison, compare
from fastcil.engine.finding import finding
from fastcil.engine.report import load_comparison, render_report
from fastcil.engine.result import Result
from fastcil.engine.trainer import Trainer
from fastcil.engine.variants import parse_variants

SHARED = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 12,
    "engine.progress": False,
    "augment.size": 12,
}
SWEEP: dict[str, Any] = {
    "icarl+cam": {},
    "sharp": {"method": "icarl+cam", "cam.ratio": 9.0, "cam": {"threshold": 0.3}},
    "ft-cnn": None,
    "jpeg": {"method": "icarl", "codec": "jpeg"},
}


def draw(per_class: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    labels = [label for label in range(4) for _ in range(per_class)]
    return rng.integers(0, 256, (len(labels), 16, 18, 3), np.uint8), labels


DATA = draw(7, 0), draw(3, 1)


def run(methods: Any, run_dir: Path | None, **changes: Any) -> Comparison:
    arguments = {"memory": "8 images", "backbone": ConvNet, **SHARED, **changes}
    return compare(methods, DATA, "b2-inc2", run_dir=run_dir, **arguments)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("swept") / "all"
    return folder, run(SWEEP, folder, **{"cam.threshold": 0.7, "cam.artifact_max": 0.2})


def test_every_label_has_a_run_and_a_row_of_its_own(swept) -> None:
    folder, comparison = swept
    labels = ["icarl+cam", "sharp", "finetune", "jpeg"]
    assert list(comparison.results) == labels
    assert {p.name for p in folder.iterdir()} == {*labels, "compare.json"}
    assert list(dict.fromkeys(row.method for row in comparison.rows())) == labels
    for label, result in comparison.results.items():
        assert Result.load(folder / label).outcomes == result.outcomes
    cells = [str(c) for column in comparison.table().columns for c in column.cells]
    assert set(labels) <= set(cells)


def test_own_options_win_over_shared_ones_and_touch_nobody_else(swept) -> None:
    _, comparison = swept
    configs = {label: result.config for label, result in comparison.results.items()}
    cams = {label: config.get("cam") for label, config in configs.items()}
    assert (cams["icarl+cam"]["threshold"], cams["icarl+cam"]["ratio"]) == (0.7, 4.0)
    assert (cams["sharp"]["threshold"], cams["sharp"]["ratio"]) == (0.3, 9.0)
    assert cams["sharp"]["artifact_max"] == cams["icarl+cam"]["artifact_max"] == 0.2
    assert cams["finetune"] is None
    assert [config["method"] for config in configs.values()] == [
        *("icarl+cam", "icarl+cam", "finetune", "icarl"),
    ]
    assert [config["codec"] for config in configs.values()] == [None, None, None, "jpeg"]


def test_finished_variants_are_read_and_changed_ones_refused(swept, monkeypatch) -> None:
    folder, comparison = swept

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(Trainer, "run", refuse)
    options = {"cam.threshold": 0.7, "cam.artifact_max": 0.2}
    assert run(SWEEP, folder, **options).rows() == comparison.rows()
    changed = {**SWEEP, "sharp": {"method": "icarl+cam", "cam.ratio": 5.0}}
    with pytest.raises(FastcilError, match=r"cam.ratio was 9.0, now 5.0"):
        run(changed, folder, **options)


def test_the_report_says_what_a_label_stands_for(swept) -> None:
    folder, comparison = swept
    again = load_comparison(folder)
    assert list(again.results) == list(comparison.results)
    page = render_report(again)
    table = page[page.index("What is compared") :]
    table = table[: table.index("</table>")]
    assert "<b>sharp</b>" in table and ">icarl+cam<" in table and ">cam.ratio<" in table
    assert ">9.0<" in table and "–" in table
    assert "cam.artifact_max" not in table, "what all have alike is no difference"
    content = json.loads((folder / "compare.json").read_text())
    assert list(content["configs"]) == list(comparison.results)


def test_without_labels_the_report_has_no_such_table(swept) -> None:
    _, comparison = swept
    plain = Comparison({"icarl+cam": comparison.results["icarl+cam"]})
    assert "What is compared" not in render_report(plain)


def test_yaml_says_the_same_as_python(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    sweep = {"foster+cim": {}, "mu 0": {"method": "foster+cim", "cim.mu": 0.0}, "er": None}
    file.write_text(yaml.safe_dump({"methods": sweep, "cim": {"mu": 0.2}}))
    parsed = parse_run("compare", [f"--config={file}", "--cim.mu_prime=0.5"])
    assert parsed["methods"] == sweep
    assert (parsed["cim"]["mu"], parsed["cim"]["mu_prime"]) == (0.2, 0.5)
    assert "er" in parsed and "foster" in parsed
    parsed = parse_run("compare", [f"--config={file}", "--methods=er,foster+cim"])
    assert parsed["methods"] == "er,foster+cim", "flags win, and name compositions"


def test_the_command_line_runs_labels(tmp_path: Path, capsys) -> None:
    file, folder = tmp_path / "sweep.yaml", tmp_path / "runs"
    content = {
        "methods": {"er": {}, "slow": {"method": "er", "er.later.lr": 0.01}},
        "data": "scenes:classes=4,size=32,train_per_class=6,test_per_class=2",
        "scenario": "lfs-2",
        "memory": "4 images",
        "network": {"name": "resnet20", "width": 8},
        "engine": {"epoch_scale": 0.01, "progress": False},
        "run_dir": str(folder),
    }
    file.write_text(yaml.safe_dump(content))
    assert main(["compare", f"--config={file}"]) == 0
    assert "slow" in capsys.readouterr().out
    config = yaml.safe_load((folder / "slow" / "config.yaml").read_text())
    assert config["method"] == "er" and config["er"]["later"]["lr"] == 0.01
    assert "slow" in (folder / "report.html").read_text()


BAD = [
    ({}, "methods is ()"),
    ({"finetune": {}, "ft-cnn": {}}, "name one or more different methods"),
    ({"er": "fast"}, "methods has 'er': 'fast'"),
    ({"mine": {}}, "method 'mine' is unknown"),
    ({"mine": {"method": "er+cam+cam"}}, "twice"),
    ({"a/b": {"method": "er"}}, "label 'a/b', which names a folder"),
    ({"..": {"method": "er"}}, "label '..'"),
    ({"_hidden": {"method": "er"}}, "label '_hidden'"),
    ({" er": {"method": "er"}}, "label ' er'"),
    ({"": {"method": "er"}}, "label ''"),
    ({"compare.json": {"method": "er"}}, "label 'compare.json'"),
    ({"x" * 81: {"method": "er"}}, "1 to 80 characters"),
    ({"a": {"method": "er", "icarl.outputs": 3}}, "option 'icarl.outputs' is unknown"),
    ({"a": {"method": "er", "er.later": 3}}, "it is a group"),
    ({"a": {"method": "er", "memory": "much"}}, "memory is 'much', which is no budget"),
    ({"a": {"method": "er", "memory": 7}}, "memory is 7, without a unit"),
    ({"a": {"method": "er", "run_dir": "x"}}, "'run_dir' is no option"),
    ({"a": {"method": "er+cam", "codec": "raw"}}, "stores exemplars its own way"),
    ({"a": {"method": "er", "codec": "zip"}}, "codec 'zip' is unknown"),
]


@pytest.mark.parametrize(("methods", "says"), BAD)
def test_what_is_no_variant_is_refused_before_anything_is_written(
    methods, says, tmp_path: Path
) -> None:
    with pytest.raises(FastcilError) as caught:
        run(methods, tmp_path / "x")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_value_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(FastcilError, match=r"option 'cam.ratio' is 'much'"):
        run({"a": {"method": "er+cam", "cam.ratio": "much"}}, tmp_path / "x")


def test_a_variant_may_have_a_memory_of_its_own(tmp_path: Path) -> None:
    sweep: dict[str, Any] = {"er": {}}
    for label, memory in {"none": "none", "2 each": "2 images/class"}.items():
        sweep[label] = {"method": "er", "memory": memory}
    sweep["bytes"] = {"method": "icarl", "memory": "4 KiB"}
    comparison = run(sweep, tmp_path)
    memories = ["8 images", "none", "2 images/class", "4KiB"]
    assert [r.config["memory"] for r in comparison.results.values()] == memories
    assert comparison.memories == memories
    held = [result.exemplars for result in comparison.results.values()]
    assert held[:3] == [8, 0, 8] and held[3] > 0
    columns = {str(column.header): list(column.cells) for column in comparison.table().columns}
    assert [cell for cell in columns["memory"] if cell][:4] == memories
    again = load_comparison(tmp_path)
    said, page = finding(again), render_report(again)
    assert "Each with a memory of its own" in said and "At equal memory" not in said + page
    assert "a comparison at equal memory" not in page and "memory <b>8 images, none, 2" in page
    equal = Comparison({name: again.results[name] for name in ("er",)} | {"x": again.results["er"]})
    assert "At equal memory" in finding(equal) and "a comparison at equal memory" in render_report(
        equal
    )
    # The same label with another memory is another run.
    with pytest.raises(FastcilError, match="memory was none, now 5 images"):
        run({"none": {"method": "er", "memory": "5 images"}}, tmp_path)


@pytest.mark.parametrize("name", ["cim-ablations", "cim-sensitivity"])
def test_the_reproductions_of_ablations_are_read(name, request) -> None:
    file = request.config.rootpath / "benchmarks" / "reproduction" / f"{name}.yaml"
    variants = parse_variants(parse_run("compare", [f"--config={file}"])["methods"])
    assert len(variants) == {"cim-ablations": 11, "cim-sensitivity": 17}[name]
    assert {variant.parts[0] for variant in variants} == {"foster"}
