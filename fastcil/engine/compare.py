"""Several methods, the same data, the same seeds, as a rule the same memory: one table."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from fastcil.engine.epoch_choice import PAPER_MODE, choice_notes
from fastcil.engine.first_task import SharedFirstTask
from fastcil.engine.first_task import share_first_task as share
from fastcil.engine.metrics import mean_interval
from fastcil.engine.needs import announce
from fastcil.engine.options import (
    GROUPS,
    check_keys,
    config_types,
)
from fastcil.engine.placement import place_images
from fastcil.engine.plan import Plan, check_folder, claim, make_plan
from fastcil.engine.preset_files import is_run_preset
from fastcil.engine.presets import merge_options, preset_arguments
from fastcil.engine.result import Result, rounded
from fastcil.engine.run import is_left, run_plan
from fastcil.engine.scenario import Scenario
from fastcil.engine.state import write_atomically
from fastcil.engine.variants import Methods, parse_variants
from fastcil.errors import FastcilError, RankLostError
from fastcil.memory import Budget

_MEASURES = ("average", "last", "forgetting", "bwt")
SESSION_MEASURES = {"base": "base %", "novel": "novel %", "harmonic": "harmonic", "drop": "drop"}
"""What few-shot streams are asked for besides: measure -> heading of its column."""


@dataclass(frozen=True)
class Row:
    """One method's figures; intervals are 95 % half-widths, None below three seeds.

    Args:
        method: The composition, or the label it goes by.
        readout: Which of its ways to classify; the first row of a method is its own.
        seeds: How many seeds.
        measures: measure -> (mean, half-width).
        differences: measure -> (mean, half-width) of the paired differences to the first
            method, seed by seed; empty for the first method itself.
        exemplars: Exemplars held at the end.
        nbytes: Bytes that the budget counts, at the end.
        all_nbytes: The same with curvature and networks beyond the first.
        seconds: Wall time.
        transfer: Forward transfer, mean and half-width; None where it was not measured, and for
            readouts beside the method's own.
        sessions: Of a few-shot stream (mean, half-width) of `SESSION_MEASURES`, empty else.
    """

    method: str
    readout: str
    seeds: int
    measures: dict[str, tuple[float, float | None]]
    differences: dict[str, tuple[float, float | None]]
    exemplars: float
    nbytes: int
    all_nbytes: int
    seconds: float
    transfer: tuple[float, float | None] | None = None
    sessions: dict[str, tuple[float, float | None]] = field(default_factory=dict)


class Comparison:
    """Results of several methods, at equal memory unless variants bring budgets of their own.

    Args:
        results: Composition or label -> result, in the order asked for; a result's ``config``
            says what its ``method`` is.
        run_dir: Where they were saved, or None.
    """

    def __init__(self, results: Mapping[str, Result], run_dir: Path | None = None) -> None:
        self.results = dict(results)
        self.run_dir = run_dir

    @property
    def memories(self) -> list[str]:
        """The budgets, each once; a single one is that of every method."""
        return list(dict.fromkeys(str(r.config["memory"]) for r in self.results.values()))

    @property
    def few_shot(self) -> bool:
        """Whether the stream is few-shot."""
        return next(iter(self.results.values())).few_shot

    def label(self, method: str) -> str:
        """What tables call a method: paper mode, which looks at test images, is always named."""
        return method + PAPER_MODE * (self.results[method].epoch_choice == "paper")

    def shown(self, row: Row) -> str:
        """What tables call a row."""
        own = row.readout == self.results[row.method].readouts[0]
        return self.label(row.method) if own else f"  {row.readout}"

    @property
    def notes(self) -> list[str]:
        """What must be said with every table: how epochs were chosen, what was not trained."""
        notes = choice_notes({m: result.epoch_choice for m, result in self.results.items()})
        configs = [result.config for result in self.results.values()]
        donors = {str(config["first_task"]) for config in configs if "first_task" in config}
        notes += [
            f"The first task was trained once per seed, by {donor}, and taken over by the others, "
            f"whose time leaves it out."
            for donor in sorted(donors)
        ]
        rules = {result.epoch_choice for result in self.results.values()}
        if any(self.results[d].epoch_choice == "held-out" for d in donors & {*self.results}):
            notes += ["It lacked the images held out."] if rules - {"held-out"} else []
        return notes

    def rows(self) -> list[Row]:
        """One row per method and readout."""
        base = next(iter(self.results.values()))
        return [
            self._row(method, result, readout, base)
            for method, result in self.results.items()
            for readout in result.readouts
        ]

    def _row(self, method: str, result: Result, readout: str, base: Result) -> Row:
        measures, differences = {}, {}
        for measure in _MEASURES:
            own = result.per_seed(measure, readout)
            measures[measure] = mean_interval(own)
            if result is not base:
                theirs = base.per_seed(measure)
                paired = [a - b for a, b in zip(own, theirs, strict=True)]
                differences[measure] = mean_interval(paired)
        last = [outcome.tasks[-1].nbytes for outcome in result.outcomes]
        ahead = [f for o in result.outcomes if (f := o.forward_transfer) is not None]
        told = readout == result.readouts[0] and len(ahead) == len(result.outcomes)
        return Row(
            method=method,
            readout=readout,
            seeds=len(result.outcomes),
            measures=measures,
            differences=differences,
            exemplars=result.exemplars,
            nbytes=max(n["budgeted"] for n in last),
            all_nbytes=max(n["all"] for n in last),
            seconds=result.seconds,
            transfer=mean_interval(ahead) if told else None,
            sessions={m: mean_interval(result.per_seed(m, readout)) for m in SESSION_MEASURES}
            if result.few_shot
            else {},
        )

    def table(self) -> Table:
        """The rows as a `rich` table; means with 95 % half-widths where there are three seeds."""
        base, rows = next(iter(self.results)), self.rows()
        title = f"mean of {rows[0].seeds} seed(s); difference to {base}, paired"
        table = Table(title=title, caption="\n".join(self.notes) or None)
        table.add_column("method", no_wrap=True)
        transfer = any(row.transfer for row in rows)
        own_memory = len(self.memories) > 1
        headings = ["average %", "last %", "forgetting", "BWT", *["FWT"] * transfer, "difference"]
        headings += [*["memory"] * own_memory, "exemplars", "bytes", "with networks", "minutes"]
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            result = self.results[row.method]
            table.add_row(
                self.shown(row),
                *(_figure(*row.measures[measure]) for measure in _MEASURES),
                *[_figure(*row.transfer) if row.transfer else ""] * transfer,
                _figure(*row.differences["average"], sign=True) if row.differences else "",
                *[str(result.config["memory"])] * own_memory,
                f"{row.exemplars:,.0f}",
                f"{row.nbytes:,}",
                f"{row.all_nbytes:,}",
                f"{row.seconds / 60:.1f}",
            )
        return table

    def sessions_table(self) -> Table | None:
        """The rows of a few-shot stream by session, as papers print them; None of other streams.

        Accuracy on all classes seen after each session, the base session's being 0, mean over
        seeds; then the figures after the last.
        """
        if not self.few_shot:
            return None
        title = "accuracy % on all classes seen, after each session"
        table = Table(title=title, caption="\n".join(self.notes) or None)
        table.add_column("method", no_wrap=True)
        sessions = range(len(next(iter(self.results.values())).curve()))
        for heading in (*map(str, sessions), *SESSION_MEASURES.values()):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows():
            result = self.results[row.method]
            table.add_row(
                self.shown(row),
                *(f"{accuracy:.2f}" for accuracy in result.curve(row.readout)),
                *(_figure(*row.sessions[measure]) for measure in SESSION_MEASURES),
            )
        return table

    def save(self, path: Path) -> None:
        """Writes rows, curves and environment as JSON, atomically."""
        content = {
            "environments": {m: result.environment for m, result in self.results.items()},
            "configs": {method: result.config for method, result in self.results.items()},
            "rows": [row.__dict__ for row in self.rows()],
            "notes": self.notes,
            "curves": {
                method: {name: np.round(result.curve(name), 3).tolist() for name in result.readouts}
                for method, result in self.results.items()
            },
        }
        if self.few_shot:
            content["sessions"] = {
                method: {
                    readout: {m: rounded(curve) for m, curve in result.sessions(readout).items()}
                    for readout in result.readouts
                }
                for method, result in self.results.items()
            }
        write_atomically(path, json.dumps(content, indent=1).encode())


class RunsFailedError(FastcilError):
    """Some of the runs of a comparison failed; those that didn't are its ``comparison``.

    Args:
        comparison: The others' results.
        failed: Label -> what was wrong.
    """

    def __init__(self, comparison: Comparison, failed: Mapping[str, FastcilError]) -> None:
        self.comparison = comparison
        reasons = "; ".join(f"'{label}': {str(why).rstrip('.')}" for label, why in failed.items())
        count = len(failed) + len(comparison.results)
        super().__init__(f"{len(failed)} of {count} runs failed ({reasons}); the others are done.")


def _figure(mean: float, half: float | None, sign: bool = False) -> str:
    text = f"{mean:+.2f}" if sign else f"{mean:.2f}"
    return text if half is None else f"{text} ± {half:.2f}"


def compare(
    methods: Methods,
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
    share_first_task: bool = False,
    **options: Any,
) -> Comparison:
    """Runs methods x seeds at equal memory, unless variants have budgets of their own.

    Finished runs in ``run_dir`` are read, not repeated.

    Args:
        methods: Compositions, or text with commas between; or a mapping from label to what is
            particular: ``{"foster": {}, "mu 0": {"method": "foster+cim", "cim.mu": 0.0}}`` or
            ``{"half": {"method": "er", "memory": "32MiB"}}`` (see
            `fastcil.engine.variants.parse_variants`). Differences are paired with the first.
        data: See `fastcil.train`.
        scenario: See `fastcil.train`.
        memory: The budget of every method, but for variants that bring their own.
        codec: Codec of the methods whose addons bring none.
        seeds: Seeds of every method.
        device: See `fastcil.train`.
        run_dir: Each method's run goes into a folder of its name or label there.
        preset: See `fastcil.train`; a name concerns the methods that have a preset of that name.
        backbone: See `fastcil.train`.
        share_first_task: Whether the first method alone trains the first task, once per seed, and
            the others take its network over (see `fastcil.engine.first_task.share_first_task`);
            refused, with the reason, where one of them can't.
        **options: Dotted option names; a method's options go to that method only, and to every
            variant of it. What a variant says of its own wins over these.

    Returns:
        The `Comparison`.

    Raises:
        FastcilError: As `fastcil.train`, before the first run begins.
        RunsFailedError: Runs that failed later, as by divergence, when all others are done.
    """
    variants = parse_variants(methods)
    names = [variant.method for variant in variants]
    merged = merge_options(preset, options, names)
    check_keys(merged, config_types(names, [codec, *(variant.codec for variant in variants)]))
    arguments = preset_arguments(preset, data=data, scenario=scenario, memory=memory)
    data = arguments["data"]
    announce(preset, data, merged)
    plans: dict[str, Plan] = {}
    for variant in variants:
        own_codec = variant.codec_beside(codec)
        plan = make_plan(
            variant.method,
            data if not plans else next(iter(plans.values())).dataset,
            arguments["scenario"],
            arguments["memory"] if variant.memory is None else variant.memory,
            own_codec,
            seeds,
            device,
            backbone,
            variant.options_over(merged, GROUPS, own_codec),
            str(preset) if is_run_preset(preset) else None,
        )
        if isinstance(data, (str, Path)):
            plan.data_name = str(data)
        plan.label = variant.label
        plans[variant.label] = plan
    folder = Path(run_dir) if run_dir is not None else None
    firsts = share(plans, folder) if share_first_task else None
    folders = {label: folder / label if folder else None for label in plans}
    for label, plan in plans.items():
        if folder:
            check_folder(folder / label, plan)
    place_images([plan for label, plan in plans.items() if is_left(plan, folders[label])])
    if folder:
        for label, plan in plans.items():
            claim(folder / label, plan)
    results, failed = _run_all(plans, folders, firsts)
    if not results:
        raise next(iter(failed.values()))
    comparison = Comparison(results, folder)
    if folder is not None:
        comparison.save(folder / "compare.json")
    if failed:
        raise RunsFailedError(comparison, failed)
    return comparison


def _run_all(
    plans: Mapping[str, Plan],
    folders: Mapping[str, Path | None],
    firsts: Mapping[int, SharedFirstTask] | None,
) -> tuple[dict[str, Result], dict[str, FastcilError]]:
    """Results of the runs that came to an end, and what ended the others."""
    results: dict[str, Result] = {}
    failed: dict[str, FastcilError] = {}
    for label, plan in plans.items():
        try:
            results[label] = run_plan(plan, folders[label], firsts)
        except RankLostError:
            raise
        except FastcilError as error:
            failed[label] = error
            warnings.warn(f"'{label}' failed: {error} The other runs go on.", stacklevel=3)
    return results, failed
