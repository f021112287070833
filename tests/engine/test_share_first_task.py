"""The first task trained once per seed, by one method for all: what they share, and who can't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import Arrival, FastcilError, Scenario, compare
from fastcil.contract import Task
from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine.arguments import parse_run
from fastcil.engine.compare import Comparison
from fastcil.engine.first_task import FILE, share_first_task
from fastcil.engine.lesson import Lesson
from fastcil.engine.plan import make_plan
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.state import load_state
from fastcil.engine.trainer import Trainer

OPTIONS = {
    "engine.progress": False,
    "augment.size": 12,
    "engine.checkpoint_seconds": 0,
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 6,
}
FIRST = {"epochs": 300, "lr": 0.1}


def part(per_class: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    labels = [c for c in range(4) for _ in range(per_class)]
    images = rng.integers(0, 256, (len(labels), 12, 12, 3), np.uint8)
    return Examples(ImageStore.from_batch(images), torch.tensor(labels))


DATA = Dataset("four", part(5, 0), part(5, 1), tuple("abcd"))
SHOTS = Arrival((2, 3), torch.tensor([10, 11, 12, 15, 16, 17]))
STREAM = Scenario("mine", (Arrival((0, 1)), SHOTS), few_shot=True)
METHODS = {"finetune": {}, "again": {"method": "finetune"}, "icarl": {}}


def run(methods: Any, run_dir: Path | None = None, **changes: Any) -> Comparison:
    arguments = {"share_first_task": True, "backbone": ConvNet, **OPTIONS, **changes}
    if any("finetune" in name for name in methods):
        arguments = {"finetune.first": FIRST, **arguments}
    return compare(methods, DATA, STREAM, run_dir=run_dir, **{"memory": "8 images", **arguments})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Method, seed and task of whatever is trained, trials left out."""
    found: list[tuple[str, int, int]] = []
    begin = Trainer.run

    def look(trainer: Trainer, stages: Any, *rest: Any) -> None:
        if trainer.save is not None:
            found.append((type(trainer.method).__name__, *trainer.key[1:]))
        begin(trainer, stages, *rest)

    monkeypatch.setattr(Trainer, "run", look)
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("shared") / "all"
    return folder, run(METHODS, folder, seeds=(0, 1))


def same(a: Any, b: Any) -> bool:
    return {**vars(a), "seconds": 0} == {**vars(b), "seconds": 0}


def test_first_rows_are_those_of_one_network(shared) -> None:
    _, comparison = shared
    own, again, icarl = comparison.results.values()
    for outcomes in zip(own.outcomes, again.outcomes, icarl.outcomes, strict=True):
        first, second, third = ([*outcome.tasks] for outcome in outcomes)
        # A method that takes its own first task over ends in the same bits.
        assert all(same(a, b) for a, b in zip(first, second, strict=True))
        assert third[0].correct["linear"] == first[0].correct["linear"]
        assert third[0].exemplars == [4, 4] and first[0].exemplars == [0, 0]


def test_the_network_is_the_one_that_its_own_training_makes(shared, assert_same) -> None:
    folder, _ = shared
    alone = run({"finetune": {}}, share_first_task=False)
    ends = (folder / method / "seed-0" / "learner.safetensors" for method in METHODS)
    ours, theirs, _ = map(load_state, ends)
    assert_same(ours["parts"], theirs["parts"])
    assert_same(alone.results["finetune"].learner.state()["parts"], ours["parts"])


def test_it_is_trained_once_per_seed_and_named(
    trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, assert_same
) -> None:
    networks: list[dict[str, torch.Tensor]] = []
    remember = Lesson._remember

    def look(lesson: Lesson, task: Task) -> None:
        if task.first:
            state = lesson.parts.method.network.state_dict()
            networks.append({name: value.clone() for name, value in state.items()})
        remember(lesson, task)

    monkeypatch.setattr(Lesson, "_remember", look)
    comparison = run({"finetune": {}, "icarl": {}}, tmp_path, seeds=(0, 1))
    assert sorted(trained) == [
        *[("Finetune", seed, task) for seed in (0, 1) for task in (0, 1)],
        *[("ICaRL", seed, 1) for seed in (0, 1)],
    ]
    assert [r.config.get("first_task") for r in comparison.results.values()] == [None, "finetune"]
    assert "trained once per seed, by finetune" in str(comparison.table().caption)
    events = (tmp_path / "icarl" / "seed-0" / "events.jsonl").read_text()
    assert '"event": "shared"' in events
    kept = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob(FILE))
    assert kept == [f"finetune/seed-{seed}/{FILE}" for seed in (0, 1)]
    files = [load_state(tmp_path / name)["tensors"] for name in kept]
    assert_same(networks, [*files, *files])
    assert any(not torch.equal(files[0][name], files[1][name]) for name in files[0])
    # All is there; and a method that comes later takes what was kept.
    trained.clear()
    run({"finetune": {}, "icarl": {}}, tmp_path, seeds=(0, 1))
    assert trained == []
    run({"finetune": {}, "icarl": {}, "ewc": {}}, tmp_path, seeds=(0, 1))
    assert trained == [("EWC", 0, 1), ("EWC", 1, 1)]


def test_stopped_again_and_again_ends_in_the_same_bits(
    shared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, whole = shared
    save, steps = SeedRun._save_between_steps, [0]

    def stop(seed_run: SeedRun, trainer: Trainer) -> None:
        save(seed_run, trainer)
        steps[0] += 1
        if steps[0] % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(SeedRun, "_save_between_steps", stop)
    while True:
        try:
            stopped = run({"finetune": {}, "icarl": {}}, tmp_path)
            break
        except KeyboardInterrupt:
            assert steps[0] < 200
    assert steps[0] >= 6
    for method, result in stopped.results.items():
        for a, b in zip(
            result.outcomes[0].tasks, whole.results[method].outcomes[0].tasks, strict=True
        ):
            assert same(a, b)


def test_a_first_task_that_was_not_kept_is_refused(tmp_path: Path) -> None:
    run({"finetune": {}}, tmp_path, share_first_task=False)
    with pytest.raises(FastcilError, match="whose first task was not kept"):
        run({"finetune": {}, "icarl": {}}, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"finetune", "compare.json"}


def test_one_that_trained_its_own_is_another_run(shared, tmp_path: Path) -> None:
    run({"icarl": {}}, tmp_path, share_first_task=False)
    with pytest.raises(FastcilError, match="first_task was None, now that of finetune, crc32"):
        run({"finetune": {}, "icarl": {}}, tmp_path)
    folder, _ = shared
    with pytest.raises(FastcilError, match="first task was not kept"):
        run({"icarl": {}, "finetune": {}}, folder, seeds=(0, 1))


def plans(*methods: tuple[str, dict[str, Any]], backbone: Any = ConvNet) -> dict[str, Any]:
    return {
        method: make_plan(
            method, DATA, STREAM, "8 images", None, 0, "cpu", backbone, {**OPTIONS, **options}
        )
        for method, options in methods
    }


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((name, {}) for name in ("icarl", "ewc", "eeil", "lwf", "joint", "icarl+cam")),
        ("wa", {"wa.bias": True}),
        ("finetune+lec", {}),
    ],
)
def test_who_can_take_over(method, options) -> None:
    both = plans(("finetune", {}), (method, options))
    before = torch.get_rng_state()
    share_first_task(both, None)
    assert [plan.first_task for plan in both.values()] == [None, "finetune"]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("si", {}, "training changes its SI.path"),
        ("dark", {}, "training changes its Dark.stored too, which is no part of the network"),
        ("icarl+cim", {}, "training changes its CIM."),
        ("der", {}, "'der' has network.head.bias False, and 'finetune', which"),
        ("lucir", {}, "'lucir' has network.head.kind cosine, and 'finetune'"),
        ("icarl", {"network.width": 8}, "'icarl' has network.width 8, and 'finetune', which"),
        ("icarl", {"augment.size": 10}, "augment.size 10"),
        ("icarl", {"engine.init_seed": 3}, "engine.init_seed 3"),
    ],
)
def test_who_can_not_says_why_in_a_sentence(method, options, says) -> None:
    with pytest.raises(FastcilError) as caught:
        share_first_task(plans(("finetune", {}), (method, options)), None)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_networks_that_make_something_else_of_the_same_weights_are_refused() -> None:
    small = {"network.name": "resnet20", "network.width": 4}
    with pytest.raises(FastcilError, match="of the same weights its network makes something else"):
        share_first_task(plans(("finetune", small), ("icarl", small), backbone=None), None)
    alike = {**small, "network.last_relu": True}
    share_first_task(plans(("finetune", alike), ("icarl", alike), backbone=None), None)


def test_refused_before_anything_is_written_or_trained(trained, tmp_path: Path) -> None:
    with pytest.raises(FastcilError, match="can't take over a first task"):
        run({"finetune": {}, "si": {}}, tmp_path)
    assert trained == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "asked"),
    [([], False), (["--share-first-task"], True), (["--share-first-task=false"], False)],
)
def test_on_the_command_line_and_in_a_file(flags, asked, tmp_path: Path) -> None:
    assert parse_run("compare", ["--methods", "er", *flags])["share_first_task"] is asked
    if asked:
        (tmp_path / "a.yaml").write_text("methods: er\nshare_first_task: true\n")
        config = ["--config", str(tmp_path / "a.yaml")]
        assert parse_run("compare", config)["share_first_task"] is True
        with pytest.raises(FastcilError, match="'--share-first-task' is unknown"):
            parse_run("train", flags)


def test_a_donor_must_hold_out_what_others_judge_by() -> None:
    variants = {"finetune": {"engine.epoch_choice": "paper"}, "icarl": {}}
    with pytest.raises(FastcilError, match="put one first that holds them out"):
        run(variants)
    variants = {"finetune": {}, "icarl": {"engine.epoch_choice": "paper"}}
    assert "It lacked the images held out." in run(variants).notes
