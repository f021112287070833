"""A class-incremental learning experiment: a plan, a run for each seed, one result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastcil.engine.distributed import check_divisible, in_turn, joined, on_first
from fastcil.engine.environment import environment, together
from fastcil.engine.first_task import SharedFirstTask
from fastcil.engine.learner import Learner
from fastcil.engine.needs import announce, tell_needs
from fastcil.engine.options import make_settings
from fastcil.engine.placement import place_images
from fastcil.engine.plan import Plan, check_folder, claim, make_plan
from fastcil.engine.preset_files import is_run_preset
from fastcil.engine.presets import merge_options, preset_arguments
from fastcil.engine.result import Result
from fastcil.engine.scenario import Scenario
from fastcil.engine.seed_run import CHECKPOINT, LEARNER, RESULT, SeedRun
from fastcil.memory import Budget


def train(
    method: str,
    data: Any = None,
    scenario: str | Scenario | None = None,
    memory: str | Budget | None = None,
    codec: str | None = None,
    seeds: Sequence[int] | int = (0,),
    device: str = "auto",
    run_dir: str | Path | None = None,
    preset: str | Path | None = None,
    *,
    backbone: Callable[[], torch.nn.Module] | None = None,
    **options: Any,
) -> Result:
    """Runs a class-incremental learning experiment.

    Args:
        method: The composition, as in ``foster+cim``; `fastcil methods` lists what there is.
        data: ``scenes`` (drawn by fastcil; the default), a folder or ``.tar`` of
            ``train/<class>/...`` and ``test/<class>/...``, an ``.npz``, ``cifar100``, arrays, torch
            datasets, a `Dataset` or what else `fastcil.data.load` reads; relative names are also
            looked for in ``FASTCIL_DATA``. ``"cifar100:classes=0-49,train_per_class=100"`` is a
            part of one.
        scenario: New classes in each task: ``lfs-N`` (``lfs-5`` is the default), ``lfh-N``,
            ``bA-incB``; the same with the task known when predicting: ``task-N``; new images of all
            classes in each task: ``data-N``; each with ``-online`` behind it to see every image
            once (see `fastcil.engine.scenario.split_classes`); B classes and then N at a time
            with K images of each: ``few-B-NxK``, or, as published lists have them, ``few:FOLDER``
            (see `fastcil.engine.few_shot`); or a `Scenario`.
        memory: ``"64MiB"``, ``"2000 images"`` (default), ``"20 images/class"`` or a `Budget`.
        codec: How exemplars are stored, if no addon says; what can be set of it are options under
            its name: ``codec="jpeg", **{"jpeg.quality": 50}``.
        seeds: One run each; figures are means over them.
        device: ``auto``, ``cpu``, ``cuda``.
        run_dir: Where to keep config, log, checkpoints, result and report. A run that was
            stopped there goes on, to the same bits; a finished one is read.
        preset: The name of a published run, such as ``cim/food101-lfs10``, which sets data,
            scenario and memory too (`fastcil presets` lists them); or of a published configuration
            that the method or an addon has, such as ``cifar-b0`` of ``foster`` (`fastcil methods
            foster`); or a YAML file of options. What is passed here wins over it.
        backbone: Builds a feature extractor of the user's own.
        **options: Dotted option names -> values, as on the command line:
            ``**{"cim.threshold": 0.7}``.

    Where torchrun started several processes, all call this alike, and train together
    (`fastcil.engine.distributed`).

    Returns:
        The `Result`; its ``learner`` is the first seed's.

    Raises:
        FastcilError: Anything that can't be used, in one sentence, before anything is written.
        RankLostError: Another of several processes ended.

    Example:
        >>> result = train("er", data="scenes:classes=4,size=32,train_per_class=8,test_per_class=4",
        ...                scenario="lfs-2", memory="8 images",
        ...                **{"engine.epoch_scale": 0.01, "network.width": 4,
        ...                   "network.name": "resnet20", "engine.progress": False})
        >>> result.accuracy_matrix.shape
        (2, 2)
    """
    merged = merge_options(preset, options, [method])
    arguments = preset_arguments(preset, data=data, scenario=scenario, memory=memory)
    engine = make_settings(method, merged, codec).engine
    folder = Path(run_dir) if run_dir is not None else None
    with joined(device, engine.rank_timeout) as ranks:
        check_divisible(engine, ranks.size)
        if ranks.first:
            announce(preset, arguments["data"], merged)
        with in_turn():
            plan = make_plan(
                method,
                arguments["data"],
                arguments["scenario"],
                arguments["memory"],
                codec,
                seeds,
                device,
                backbone,
                merged,
                str(preset) if is_run_preset(preset) else None,
            )
        if folder is not None:
            on_first(partial(check_folder, folder, plan))
        place_images([plan] if is_left(plan, folder) else [])
        return run_plan(plan, folder)


def is_left(plan: Plan, folder: Path | None) -> bool:
    """Whether a plan's runs have something left to do, rather than all be read from a folder."""
    return folder is None or not all((folder / f"seed-{s}" / RESULT).is_file() for s in plan.seeds)


def run_plan(
    plan: Plan, folder: Path | None, firsts: Mapping[int, SharedFirstTask] | None = None
) -> Result:
    """Runs, or goes on with, or reads what a plan describes.

    ``firsts`` holds each seed's first task, if several runs share it.
    """
    if folder is not None:
        on_first(partial(claim, folder, plan))
    if plan.preset is not None and plan.settings.engine.progress:
        on_first(partial(_tell_needs, plan, folder))
    learners: list[Learner] = []
    outcomes = []
    for seed in plan.seeds:
        place = folder / f"seed-{seed}" if folder else None
        runner = SeedRun(plan, seed, place, (firsts or {}).get(seed))
        outcomes.append(runner.run())
        if folder is None and not learners and runner.learner is not None:
            learners.append(runner.learner)
    if folder is None:
        return Result(plan.config(), environment(plan.device), outcomes, None, lambda: learners[0])
    first = folder / f"seed-{plan.seeds[0]}"
    result = Result(
        plan.config(),
        # Of the processes that measured, which need not be this one.
        together([Result.load(folder / f"seed-{seed}").environment for seed in plan.seeds]),
        outcomes,
        folder,
        lambda: Learner.load(first / LEARNER, device=plan.device, backbone=plan.backbone),
    )
    on_first(lambda: result.save(folder / RESULT))
    return result


def _tell_needs(plan: Plan, folder: Path | None) -> None:
    """Tries the run out before it begins, in this process alone."""
    if not _begun(folder):
        tell_needs(plan)


def _begun(folder: Path | None) -> bool:
    """Whether some training was done there before."""
    return folder is not None and any(
        file.name in (CHECKPOINT, RESULT) for file in folder.glob("seed-*/*")
    )
