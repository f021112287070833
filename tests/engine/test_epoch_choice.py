"""Few-shot sessions keep one of their epochs: which, by what, and that such runs go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import Arrival, FastcilError, Learner, Result, Scenario, compare, train
from fastcil.contract import Stage, Task
from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine.compare import Comparison
from fastcil.engine.epoch_choice import EpochChoice, prefers
from fastcil.engine.few_shot_sections import sessions_section
from fastcil.engine.lesson import Lesson
from fastcil.engine.memory_sections import memory_section
from fastcil.engine.plan import make_plan
from fastcil.engine.plots import plot_record
from fastcil.engine.sections import header, results_section
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.trainer import Trainer

EPOCHS = 5
RECIPE = {"epochs": EPOCHS, "lr": 0.1, "schedule": "constant", "batch_size": 3}
FIRST = {**RECIPE, "epochs": 1}
OPTIONS = {
    "engine.progress": False,
    "augment.size": 12,
    "engine.checkpoint_seconds": 0,
}


def part(per_class: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    labels = [c for c in range(5) for _ in range(per_class)]
    images = rng.integers(0, 200, (len(labels), 12, 12, 3)) + 11 * np.array(labels).reshape(
        -1, 1, 1, 1
    )
    return Examples(ImageStore.from_batch(images.astype(np.uint8)), torch.tensor(labels))


DATA = Dataset("five", part(6, 0), part(8, 1), tuple("abcde"))
SHOTS = 4


def stream(shots: int = SHOTS, sessions: int = 2) -> Scenario:
    """Two base classes, then two and one by a few images."""
    first = torch.arange(30) % 6 < shots
    base = Arrival((0, 1))
    few = [Arrival(classes, first.nonzero().flatten()) for classes in ((2, 3), (4,))]
    return Scenario("mine", (base, *few[:sessions]), few_shot=True)


def run(method: str = "finetune", scenario: Scenario | None = None, **changes: Any) -> Result:
    short: dict[str, Any] = {}
    if method in ("finetune", "icarl", "eeil", "lecnet", "topic"):
        short = {f"{method}.first": FIRST, f"{method}.later": RECIPE}
    if method == "eeil":
        short["eeil.finetuning.epochs"] = 2
    arguments = {"memory": "8 images", "backbone": ConvNet, **OPTIONS, **short, **changes}
    return train(method, DATA, scenario or stream(), **arguments)


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is told of each choice."""
    told: list[dict[str, Any]] = []
    settle = EpochChoice.settle

    def watch(choice: EpochChoice, stage: Stage) -> None:
        tell = choice.tell
        choice.tell = lambda event, fields: (told.append(fields), tell(event, fields))
        settle(choice, stage)
        choice.tell = tell

    monkeypatch.setattr(EpochChoice, "settle", watch)
    return told


# --- the images held out --------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [{}, {"engine.data_seed": 4}], ids=str)
def test_what_judges_is_neither_trained_on_nor_remembered(
    monkeypatch: pytest.MonkeyPatch, seeds: dict[str, int]
) -> None:
    trained, judged = [], []
    begin, plan_choice = Trainer.run, Lesson._plan_choice

    def pictures(examples: Examples) -> set[bytes]:
        return {examples.images.image(i).numpy().tobytes() for i in range(len(examples))}

    def look(trainer: Trainer, stages: list[Stage], *rest: Any) -> None:
        trained.append(pictures(stages[0].streams[0].parts[0]))
        begin(trainer, stages, *rest)

    def plan(lesson: Lesson, task: Task) -> Task:
        task = plan_choice(lesson, task)
        judged.append(pictures(lesson.choice._images) if lesson.choice else set())
        return task

    monkeypatch.setattr(Trainer, "run", look)
    monkeypatch.setattr(Lesson, "_plan_choice", plan)
    result = run("icarl", memory="unlimited", **seeds)
    assert [*map(len, trained)] == [2 * 5, 2 * 3, 3]
    # One image of each new class, and of each old one.
    assert [*map(len, judged)] == [0, 4, 5]
    assert not set.union(*trained) & set.union(*judged)
    assert not pictures(result.learner.memory.examples()) & set.union(*judged)
    assert result.outcomes[0].tasks[-1].exemplars == [5, 5, 3, 3, 3]
    for rule, counts in (("last", [0] * 3), ("paper", [0, 32, 40])):
        trained.clear()
        judged.clear()
        run("finetune", **{"engine.epoch_choice": rule})
        assert ([*map(len, trained)], [*map(len, judged)]) == ([12, 8, 4], counts)


def test_where_no_new_image_is_right_the_old_ones_decide() -> None:
    """A network begun anew has its lowest loss before it has learned anything."""
    curve = [(0.0, 20.0, 1.6), (0.0, 50.0, 2.9), (0.0, 50.0, 2.5), (0.0, 30.0, 1.2)]
    best = None
    for epoch, (new, old, loss) in enumerate(curve):
        figures = {"epoch": epoch, "new": new, "old": old, "loss": loss}
        best = figures if prefers("held-out", figures, best) else best
    assert best is not None and best["epoch"] == 2
    assert prefers("held-out", {"epoch": 4, "new": 1.0, "old": 1.0, "loss": 9.0}, best)


def test_joint_which_begins_anew_on_everything_keeps_its_last_epoch(choices) -> None:
    result = run("joint", **{"joint.recipe": RECIPE})
    assert choices == [] and result.epoch_choice == "last"


def test_where_no_class_can_spare_a_shot_the_last_epoch_stays(choices) -> None:
    result = run(scenario=stream(shots=1))
    assert choices == []
    assert [task.epoch_choice for task in result.outcomes[0].tasks] == [None, "last", "last"]


# --- what is put back -----------------------------------------------------------------------------


def weights(result: Result) -> dict[str, Any]:
    return result.learner.state()["parts"]


def test_the_chosen_epoch_is_as_if_training_had_ended_there(choices, assert_same) -> None:
    for seed in range(4):
        choices.clear()
        long = run("icarl", stream(sessions=1), seeds=seed)
        (found,) = choices
        if found["epoch"] + 1 < EPOCHS:
            break
    assert 0 <= found["epoch"] < EPOCHS - 1 and found["epochs"] == EPOCHS
    ended = {**RECIPE, "epochs": found["epoch"] + 1}
    short = run("icarl", stream(sessions=1), seeds=seed, **{"icarl.later": ended})
    assert_same(weights(short), weights(long))
    last = run("icarl", stream(sessions=1), seeds=seed, **{"icarl.later": {**RECIPE, "lr": 0.11}})
    with pytest.raises(AssertionError):
        assert_same(weights(last), weights(long))


def test_the_state_is_put_back_in_place_before_the_stage_finishes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A choice that always prefers the second epoch."""
    snapshots: list[dict[str, torch.Tensor]] = []
    states: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        "fastcil.engine.epoch_choice.prefers", lambda rule, figures, best: figures["epoch"] == 1
    )
    judge, settle = EpochChoice.judge, EpochChoice.settle

    def watch(choice: EpochChoice, stage: Stage, epoch: int) -> None:
        method: Any = choice._learners[0]
        assert method.network.training, "judging leaves the modes as they were"
        if epoch == 1:
            snapshots.append({k: v.clone() for k, v in method.state_dict().items()})
        judge(choice, stage, epoch)
        assert method.network.training

    def end(choice: EpochChoice, stage: Stage) -> None:
        method: Any = choice._learners[0]
        before = {k: id(p) for k, p in method.named_parameters()}
        moved = method.state_dict()
        assert any(not torch.equal(moved[k], v) for k, v in snapshots[-1].items())
        settle(choice, stage)
        assert {k: id(p) for k, p in method.named_parameters()} == before
        states.append({k: v.clone() for k, v in method.state_dict().items()})

    monkeypatch.setattr(EpochChoice, "judge", watch)
    monkeypatch.setattr(EpochChoice, "settle", end)
    run("finetune")
    assert len(states) == len(snapshots) == 2
    for kept, snapshot in zip(states, snapshots, strict=True):
        assert kept.keys() == snapshot.keys() and all(
            torch.equal(kept[k], v) for k, v in snapshot.items()
        )


def test_only_stages_that_learn_the_new_data_are_judged(choices) -> None:
    run("eeil")
    assert [(c["stage"], c["epochs"]) for c in choices] == [("training", EPOCHS)] * 2
    choices.clear()
    run("foster", **{"engine.epoch_scale": 0.01})
    assert [c["stage"] for c in choices] == ["boosting"] * 2


@pytest.mark.parametrize(("every", "judged"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_epochs_between_are_passed_over_and_the_last_never_is(every, judged) -> None:
    result = run(scenario=stream(sessions=1), **{"engine.epoch_choice_every": every})
    records = {r["title"]: r["payload"] for r in result.outcomes[0].tasks[-1].records}
    payload = records[
        "Epochs of 'finetune' in the last session, chosen on images held out, one of each class"
    ]
    assert payload["x"] == judged and set(payload["y"]) == {"new classes", "old classes"}
    assert set(payload["marks"].values()) <= set(judged)


def test_figures_are_those_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy and loss of new and old images, counted naively from logits."""
    seen: list[tuple[float, float, float]] = []
    measure = EpochChoice._measure

    def count(choice: EpochChoice) -> dict[str, Any]:
        found = measure(choice)
        method: Any = choice._learners[0]
        method.eval()
        scores = choice._context.scan(method.logits, choice._images)
        method.train()
        labels = choice._images.labels
        new = labels >= scores.shape[1] - choice._task_classes
        right = (scores.argmax(1) == labels).double()
        losses = -scores.log_softmax(1)[torch.arange(len(labels)), labels].double()
        sides = [new, ~new]
        assert found["new"] == pytest.approx(100 * float(right[new].mean()))
        assert found["old"] == pytest.approx(100 * float(right[~new].mean()))
        expected = float(sum(losses[side].mean() for side in sides)) / 2
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        seen.append((found["new"], found["old"], found["loss"]))
        return found

    monkeypatch.setattr(EpochChoice, "_measure", count)
    monkeypatch.setattr(EpochChoice, "_task_classes", 2, raising=False)
    run("finetune", stream(sessions=1), **{"engine.epoch_choice": "paper"})
    assert len(seen) == EPOCHS and len(set(seen)) > 1


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("eeil", "held-out"),
        ("lecnet", "paper"),
        pytest.param("finetune", "paper", marks=pytest.mark.slow),
        pytest.param("topic", "held-out", marks=pytest.mark.slow),
    ],
)
def test_stopped_again_and_again_ends_in_the_same_bits(
    method, rule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, assert_same
) -> None:
    options = {"engine.epoch_choice": rule, "engine.epoch_choice_every": 2}
    save, steps, stop_after = SeedRun._save_between_steps, [0], [0]

    def stop(seed_run: SeedRun, trainer: Trainer) -> None:
        save(seed_run, trainer)
        steps[0] += 1
        if steps[0] == stop_after[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(SeedRun, "_save_between_steps", stop)
    never = {"engine.checkpoint_seconds": 1e9}
    whole = run(method, run_dir=tmp_path / "whole", **options, **never)
    total, steps[0], stops = steps[0], 0, 0
    # Mostly between two epochs that are judged, and once as soon as the best of a session is known.
    share = stop_after[0] = max(3, total // 6)
    while True:
        try:
            stopped = run(method, run_dir=tmp_path / "stopped", **options)
            break
        except KeyboardInterrupt:
            stops += 1
            stop_after[0] += share
    assert steps[0] == total and stops >= 5
    for a, b in zip(whole.outcomes[0].tasks, stopped.outcomes[0].tasks, strict=True):
        assert_same({**vars(a), "seconds": 0}, {**vars(b), "seconds": 0})
    lines = (tmp_path / "stopped" / "seed-0" / "events.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert sum(event["event"] == "chosen" for event in told) == 2


# --- a Learner's own -----------------------------------------------------------------------------


def shelf(names: str, count: int = 4) -> dict[str, np.ndarray]:
    images = part(6, 3).images
    return {
        name: np.stack([images.image(6 * k + i).numpy() for i in range(count)])
        for k, name in enumerate(names)
    }


def test_a_learner_learns_a_few_shots(choices) -> None:
    options = {**OPTIONS, "finetune.first": FIRST, "finetune.later": RECIPE}
    learner = Learner("finetune", memory="unlimited", backbone=ConvNet, **options)
    learner.learn(shelf("ab")).learn(shelf("cd"), few_shot=True)
    assert [c["rule"] for c in choices] == ["held-out"]
    learner.learn(shelf("ef"))
    assert len(choices) == 1 and learner.class_names == tuple("abcdef")


def test_paper_mode_without_test_images_is_refused(assert_same) -> None:
    options = {**OPTIONS, "engine.epoch_scale": 0.01, "engine.epoch_choice": "paper"}
    learner = Learner("icarl", memory="4 images", backbone=ConvNet, **options)
    learner.learn(shelf("ab"))
    before = learner.state()
    with pytest.raises(FastcilError, match=r"engine.epoch_choice is 'paper'.*no") as caught:
        learner.learn(shelf("cd"), few_shot=True)
    assert "\n" not in str(caught.value)
    assert_same(learner.state(), before)


@pytest.mark.parametrize(
    "options", [{"engine.epoch_choice": "best"}, {"engine.epoch_choice_every": 0}]
)
def test_bad_options_are_a_sentence(options) -> None:
    with pytest.raises(FastcilError, match=next(iter(options))):
        run(**options)


# --- names ----------------------------------------------------------------------------------------


def test_paper_mode_is_named_in_every_table(tmp_path: Path) -> None:
    methods = {
        "finetune": {},
        "on test": {"method": "finetune", "engine.epoch_choice": "paper"},
    }
    recipes: dict[str, Any] = {"finetune.first": FIRST, "finetune.later": RECIPE}
    comparison = compare(
        methods, DATA, stream(sessions=1), "none", backbone=ConvNet, **OPTIONS, **recipes
    )
    paper = comparison.results["on test"]
    assert paper.epoch_choice == "paper" and "paper mode" in repr(paper)
    assert paper.summary()["epoch_choice"] == "paper"
    assert paper.config["engine"]["epoch_choice"] == "paper"
    assert comparison.results["finetune"].epoch_choice == "held-out"
    assert "paper mode" not in repr(comparison.results["finetune"])
    for table in (comparison.table(), comparison.sessions_table()):
        names = [str(cell) for cell in table.columns[0].cells]
        assert names == ["finetune", "on test (paper mode)"]
        assert "test images (paper mode) (on test)" in str(table.caption)
    for section in (results_section, sessions_section, memory_section):
        assert "on test (paper mode)" in section(comparison)
    alone = Comparison({"on test": paper})
    assert "chosen on test images (paper mode)" in header(alone)
    assert "chosen on test images" not in header(comparison), "the other's were not"
    comparison.save(tmp_path / "compare.json")
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert any("paper mode" in note for note in kept["notes"])
    record = paper.outcomes[0].tasks[-1].records[-1]
    assert "on test images (paper mode)" in record["title"]
    axes = plot_record(record).axes[0]
    lines = {line.get_label(): line.get_xdata() for line in axes.get_lines()}
    mark = next(name for name in lines if name.startswith("chosen: "))
    assert set(lines) == {"new classes", "old classes", mark}
    assert set(lines[mark]) == {int(mark.removeprefix("chosen: "))}


def identity(scenario: Any, rule: str) -> dict[str, Any]:
    options = {**OPTIONS, "engine.epoch_choice": rule}
    return make_plan("er", DATA, scenario, "none", None, 0, "cpu", ConvNet, options).identity()


def test_the_rule_is_part_of_what_a_few_shot_run_is_and_of_no_other() -> None:
    assert identity("lfs-2", "held-out") == identity("lfs-2", "paper")
    assert identity(stream(), "held-out") != identity(stream(), "paper")
