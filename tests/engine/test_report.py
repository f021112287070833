from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from fastcil.cli import main
from fastcil.contract import Record
from fastcil.engine import report
from fastcil.engine.compare import Comparison
from fastcil.engine.records import record_to_plain
from fastcil.engine.report import write_report
from fastcil.engine.run import train
from fastcil.errors import FastcilError

VOID = {"meta", "img", "br", "link", "input", "hr"}
ODD = "my<b>\"&'+cim"


class Page(HTMLParser):
    """Checks that elements nest, and gathers what a page holds."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.attributes, self.texts, self.counts = [], [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += [(tag, *pair) for pair in attributes]
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, attribute):
        return [value for _, key, value in self.attributes if key == attribute]


def pictures(title, count=2, **payload):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    captions = [f"<{title}> {k}" for k in range(count)]
    return Record("images", title, {"images": images, "captions": captions, **payload})


RECORDS = [
    record_to_plain(record)
    for record in (
        pictures("Exemplars of task 3", shares=[0.4, 0.6]),
        pictures("Odd <pictures>"),
        Record("curve", "Loss", {"x": [1, 2], "y": {"<a>": [1, 2], "b": [2, 1]}, "xlabel": "x"}),
        Record("matrix", "Angles", {"values": [[1.0]], "rows": ["r"], "columns": ["c"]}),
        Record("table", "Sizes", {"columns": ["<name>", "n"], "rows": [["<x>", 1]]}),
        Record("curve", "Broken", {"x": [1], "y": 3}),
    )
]


def save_run(result, folder, log=True):
    """What `train` leaves of a result."""
    result.save(folder / "result.json")
    result.run_dir = folder
    for outcome in result.outcomes if log else []:
        lines = []
        for t, task in enumerate(outcome.tasks):
            lines.append({"event": "task", "task": t})
            for stage in ("first <stage>", "second"):
                seconds = task.seconds / 4
                told = {"stage": stage, "epoch": 0, "seconds": seconds, "rate": 7.0}
                shares = {"<mask>": 0.25} if stage == "second" else {}
                lines.append({"event": "epoch", **told, "shares": shares})
        path = folder / f"seed-{outcome.seed}" / "events.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return result


def save_comparison(folder, *results):
    made = {r.config["method"]: save_run(r, folder / r.config["method"]) for r in results}
    Comparison(made, folder).save(folder / "compare.json")


def check(path):
    """What holds of every report; hands over the page."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|src=\"(?!data:image/)|@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "object", "b>"} & page.counts.keys()
    assert len(set(page.ids)) == len(page.ids)
    for value in page.values("href"):
        assert value.startswith("data:image/png") or value[1:] in page.ids
    return page


def test_a_run_has_every_section(tmp_path, make_result):
    result = save_run(make_result("er", readouts=("nme", "linear"), records=RECORDS), tmp_path)
    page = check(write_report(tmp_path))
    sections = [name for name in report._SECTIONS if name not in ("sweeps", "sessions")]
    assert [i for i in page.ids if i in report._SECTIONS] == sections
    assert "of it &lt;mask&gt; (25%)" in (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = page.values("aria-label")
    # Curves, top-5, matrix, forgetting twice, memory, exemplars, time and two records.
    assert page.counts["svg"] == len(shown) == 10
    assert {"er: Loss", "er: Angles", "Accuracy by task, er"} <= set(shown)
    kept = [uri for record in RECORDS[:2] for uri in record["payload"]["images"]]
    assert page.values("src") == kept
    text = " ".join(page.texts)
    assert f"{result.average_accuracy:.1f} %" in text
    assert "<Exemplars of task 3> 1" in text
    assert "50 % of the raw bytes" in text
    assert "Broken can't be shown" in text
    assert "fastcil train --x '<y>'" in text
    # 3,686 of 4,096 bytes, rounded down.
    assert "89.9 %" in page.texts
    for cell in ("first <stage>", "2.8", "8.2", "the rest", "16.5", "33.0"):
        assert cell in page.texts, cell


def test_a_comparison_shows_every_method(tmp_path, make_result):
    results = [
        make_result("er", 0.6),
        make_result(ODD, 0.8, records=RECORDS, network=5000),
        make_result("icarl", 0.7, readouts=("nme", "linear")),
    ]
    save_comparison(tmp_path, *results)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = check(path)
    for result in results:
        method = result.config["method"]
        # Heading, table, memory and the legends of four plots at the least.
        assert page.texts.count(method) >= 6
        assert f"Accuracy by task, {method}" in page.values("aria-label")
    text = " ".join(page.texts)
    for row in Comparison({r.config["method"]: r for r in results}).rows():
        mean, half = row.measures["average"]
        assert f"{mean:.2f} ± {half:.2f}" in text
        if row.differences:
            mean, half = row.differences["average"]
            assert f"{mean:+.2f} ± {half:.2f}" in text
    # The further network counts in all, not towards the budget.
    assert {"3,686", "8,686", "5,000", "extractor 1"} <= set(page.texts)


@pytest.mark.parametrize(
    ("classes", "memory"),
    [
        ((3,), "none"),
        ((2, 1), "unlimited"),
        ((1,) * 12, "30 images"),
        ((40, 30, 30), "1KiB/class"),
    ],
)
def test_reports_of_every_shape(tmp_path, make_result, classes, memory):
    save_run(make_result(classes=classes, memory=memory, seeds=(0,)), tmp_path, log=False)
    page = check(write_report(tmp_path))
    assert ("forgetting" in page.ids) == (len(classes) > 1)
    assert "exemplars" not in page.ids
    assert "records" not in page.ids
    assert (
        "Top-5 accuracy on all classes known, after each task" in page.values("aria-label")
    ) == (sum(classes) > 5)


def test_the_same_run_gives_the_same_file(tmp_path, make_result):
    save_run(make_result(classes=(2, 2), records=RECORDS), tmp_path)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_report_that_fails_leaves_the_old_one(tmp_path, make_result, monkeypatch):
    save_run(make_result(), tmp_path)
    path = write_report(tmp_path)
    before = path.read_bytes()

    def fail(_):
        raise RuntimeError("no")

    monkeypatch.setitem(report._SECTIONS, "time", ("Time", fail))
    with pytest.raises(RuntimeError, match="no"):
        write_report(tmp_path)
    assert path.read_bytes() == before


def no_folder(folder, _):
    folder.rmdir()


def a_file(folder, _):
    folder.rmdir()
    folder.write_text("x", encoding="utf-8")


def nothing(folder, _):
    pass


def unfinished(folder, _):
    (folder / "er").mkdir()
    (folder / "er" / "identity.yaml").write_text("method: er", encoding="utf-8")


def damaged(folder, _):
    (folder / "result.json").write_text("{", encoding="utf-8")


def foreign(folder, _):
    (folder / "compare.json").write_text('{"rows": []}', encoding="utf-8")


def a_method_missing(folder, make_result):
    save_comparison(folder, make_result("er"), make_result("der"))
    (folder / "der" / "result.json").unlink()


def no_task(folder, make_result):
    result = make_result()
    content = {"config": result.config, "environment": {}, "outcomes": [{"seed": 0, "tasks": []}]}
    (folder / "result.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_folder, "which is no folder"),
        (a_file, "which is no folder"),
        (nothing, "holds no run; pass another"),
        (unfinished, "a run that is not finished; run its command again"),
        (damaged, "is no result of fastcil's"),
        (foreign, "is no comparison of fastcil's"),
        (a_method_missing, "no result.json can be read"),
        (no_task, "hold no task"),
    ],
)
def test_what_is_no_run_gets_its_sentence(tmp_path, make_result, spoil, words, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    spoil(folder, make_result)
    with pytest.raises(FastcilError, match=re.escape(words)):
        write_report(folder)
    assert main(["report", str(folder)]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.rglob("report.html"))


def test_a_real_run_shows_its_exemplars_and_stages(tmp_path):
    options = {"engine.epoch_scale": 0.01, "network.width": 4, "engine.progress": False}
    data = "scenes:classes=4,size=32,train_per_class=8,test_per_class=4"
    result = train("er", data, "lfs-2", "8 images", run_dir=tmp_path, **options)
    page = check(write_report(tmp_path))
    records = [r for task in result.outcomes[0].tasks for r in task.records]
    assert [r["title"] for r in records] == [
        "Exemplars of task 1",
        "Exemplars of task 2",
        "Accuracy by object size, by true boxes",
    ]
    assert page.values("src") == [uri for r in records[:2] for uri in r["payload"]["images"]]
    for line in (tmp_path / "seed-0" / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "stage":
            assert event["stage"] in page.texts
