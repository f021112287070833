"""What a run found out: saved as JSON, reloadable, plottable."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fastcil.engine import metrics
from fastcil.engine.learner import Learner
from fastcil.engine.state import write_atomically
from fastcil.errors import FastcilError

Array = NDArray[np.float64]
_SESSIONS = ("base", "novel", "harmonic")


def rounded(values: Array) -> list[float | None]:
    """To three places, for JSON, which has no NaN.

    Example:
        >>> rounded(np.array([np.nan, 2 / 3]))
        [None, 0.667]
    """
    return [None if np.isnan(value) else round(float(value), 3) for value in values]


@dataclass
class TaskOutcome:
    """What was measured after one task.

    Args:
        classes: New classes that the task brought; 0 if all were known.
        correct: readout -> {"top1", "top5", "count"} -> one number per known class.
        exemplars: Exemplars kept of each known class.
        nbytes: Entry -> bytes held, with the sums "budgeted" and "all"; and "working_bytes", where
            exemplars are decoded to be read, which neither sum counts.
        limit: What the budget allows, in its unit; None for no limit.
        units: Exemplars held in the papers' image units.
        seconds: Wall time of the task, training to evaluation.
        records: What method and addons left for the report, `fastcil.contract.Record` as dicts.
        task_aware: Whether each test image was compared only among the classes of its own task.
        few_shot: Whether the task is of a few-shot stream, its base session included.
        epoch_choice: How its epochs were chosen (see `fastcil.engine.epoch_choice.RULES`); None of
            a task that is no few-shot session.
        ahead: Of the task's test images, how many of how many were classified correctly before
            anything was trained on them, among how many classes; None where it was not measured.
    """

    classes: int
    correct: dict[str, dict[str, list[int]]]
    exemplars: list[int]
    nbytes: dict[str, int]
    limit: float | None
    units: float
    seconds: float
    records: list[dict[str, Any]] = field(default_factory=list)
    task_aware: bool = False
    few_shot: bool = False
    epoch_choice: str | None = None
    ahead: dict[str, int] | None = None


@dataclass
class SeedOutcome:
    """One seed's run."""

    seed: int
    tasks: list[TaskOutcome] = field(default_factory=list)

    @property
    def readouts(self) -> list[str]:
        """Names of the ways to classify; the method's own first."""
        return list(self.tasks[-1].correct)

    def _columns(self, readout: str | None, top: int) -> tuple[list[list[int]], list[list[int]]]:
        """Correct and total counts per task; a readout that a task lacks is its own first one."""
        name = readout or self.readouts[0]
        rows = [task.correct.get(name) or next(iter(task.correct.values())) for task in self.tasks]
        return [row[f"top{top}"] for row in rows], [row["count"] for row in rows]

    def accuracy_matrix(self, readout: str | None = None, top: int = 1) -> Array:
        """Accuracy in percent [T, T]: row t after task t, column j on task j's new classes."""
        correct, count = self._columns(readout, top)
        return metrics.accuracy_matrix(correct, count, [task.classes for task in self.tasks])

    def curve(self, readout: str | None = None, top: int = 1) -> Array:
        """Accuracy in percent on all known classes after each task, [T]."""
        return metrics.accuracy_curve(*self._columns(readout, top))

    def sessions(self, readout: str | None = None) -> dict[str, Array]:
        """The curves of few-shot learning, each [T]; NaN where no class came after the first task.

        ``accuracy`` on all known classes, ``base`` on the first task's, ``novel`` on all later
        ones, and the ``harmonic`` mean of these two.
        """
        columns = self._columns(readout, 1)
        base, novel = metrics.base_and_novel(*columns, self.tasks[0].classes)
        harmonic = metrics.harmonic_mean(base, novel)
        accuracy = metrics.accuracy_curve(*columns)
        return {"accuracy": accuracy, "base": base, "novel": novel, "harmonic": harmonic}

    @property
    def forward_transfer(self) -> float | None:
        """See `fastcil.engine.metrics.forward_transfer`; None if it was not measured."""
        return metrics.forward_transfer([task.ahead for task in self.tasks])


class Result:
    """The outcome of `fastcil.train`: one or more seeds of one method.

    Accuracies are percentages, means over seeds; ``average_accuracy`` includes the first task
    ("phase 0"), as the literature's does. Of a task-incremental stream they are accuracies among
    the classes of each image's own task; of a data-incremental one all are on the same classes.

    Args:
        config: All settings, as saved in ``config.yaml``.
        environment: Device, versions, commit.
        outcomes: One per seed.
        run_dir: Where the run was saved, or None.
        learner: Hands over the first seed's Learner.
    """

    def __init__(
        self,
        config: dict[str, Any],
        environment: dict[str, Any],
        outcomes: list[SeedOutcome],
        run_dir: Path | None = None,
        learner: Callable[[], Learner] | None = None,
    ) -> None:
        self.config = config
        self.environment = environment
        self.outcomes = outcomes
        self.run_dir = run_dir
        self._learner = learner
        self._loaded: Learner | None = None

    @property
    def learner(self) -> Learner:
        """The trained Learner of the first seed, with its memory."""
        if self._learner is None:
            raise FastcilError("the result holds no learner; train with a run_dir to keep one.")
        if self._loaded is None:
            self._loaded = self._learner()
        return self._loaded

    @property
    def readouts(self) -> list[str]:
        """Names of the ways to classify; the method's own first."""
        return self.outcomes[0].readouts

    @property
    def accuracy_matrix(self) -> Array:
        """Accuracy in percent [T, T]: row t after task t, column j on task j's new classes.

        NaN for j > t, and in the column of a task that brought no new class.
        """
        return self.matrix()

    @property
    def task_aware(self) -> bool:
        """Whether each test image was compared only among the classes of its own task."""
        return self.outcomes[0].tasks[-1].task_aware

    @property
    def few_shot(self) -> bool:
        """Whether each task after the first brought a few images of each of its classes."""
        return self.outcomes[0].tasks[-1].few_shot

    @property
    def epoch_choice(self) -> str | None:
        """How epochs of few-shot sessions were chosen, ``held-out``, ``paper`` or ``last``."""
        return self.outcomes[0].tasks[-1].epoch_choice

    @property
    def data_incremental(self) -> bool:
        """Whether the first of several tasks brought all classes."""
        later = [task.classes for task in self.outcomes[0].tasks[1:]]
        return bool(later) and not any(later)

    def matrix(self, readout: str | None = None, top: int = 1) -> Array:
        """`accuracy_matrix` of another readout, or top-5."""
        return np.mean([o.accuracy_matrix(readout, top) for o in self.outcomes], axis=0)

    def curve(self, readout: str | None = None, top: int = 1) -> Array:
        """Accuracy on all known classes after each task, [T]."""
        return np.mean([o.curve(readout, top) for o in self.outcomes], axis=0)

    def per_seed(self, measure: str, readout: str | None = None) -> list[float]:
        """A measure of each seed.

        Args:
            measure: ``average``, ``last``, ``average_top5``, ``last_top5``, ``forgetting`` or
                ``bwt``; after the last task, ``base``, ``novel`` or ``harmonic`` (see `sessions`);
                or ``drop``.
            readout: Which way to classify; None for the method's own.
        """
        top = 5 if measure.endswith("top5") else 1
        compute: dict[str, Callable[[SeedOutcome], float]] = {
            "average": lambda o: float(o.curve(readout, top).mean()),
            "last": lambda o: float(o.curve(readout, top)[-1]),
            "forgetting": lambda o: metrics.forgetting(o.accuracy_matrix(readout)),
            "bwt": lambda o: metrics.backward_transfer(o.accuracy_matrix(readout)),
            "drop": lambda o: metrics.performance_drop(o.curve(readout)),
        }
        if measure in _SESSIONS:
            return [float(o.sessions(readout)[measure][-1]) for o in self.outcomes]
        return [compute[measure.removesuffix("_top5")](o) for o in self.outcomes]

    @property
    def average_accuracy(self) -> float:
        """Mean over tasks, the first included, of the accuracy on all known classes."""
        return float(np.mean(self.per_seed("average")))

    @property
    def last_accuracy(self) -> float:
        """Accuracy on all classes after the last task."""
        return float(np.mean(self.per_seed("last")))

    @property
    def forgetting(self) -> float:
        """See `fastcil.engine.metrics.forgetting`."""
        return float(np.mean(self.per_seed("forgetting")))

    @property
    def bwt(self) -> float:
        """See `fastcil.engine.metrics.backward_transfer`."""
        return float(np.mean(self.per_seed("bwt")))

    def sessions(self, readout: str | None = None) -> dict[str, Array]:
        """`SeedOutcome.sessions`, means over seeds."""
        seeds = [outcome.sessions(readout) for outcome in self.outcomes]
        return {name: np.mean([own[name] for own in seeds], axis=0) for name in seeds[0]}

    @property
    def base_accuracy(self) -> Array:
        """Accuracy in percent on the first task's classes, pooled, after each task, [T]."""
        return self.sessions()["base"]

    @property
    def novel_accuracy(self) -> Array:
        """Accuracy in percent on all later classes, pooled, after each task, [T]; NaN at first."""
        return self.sessions()["novel"]

    @property
    def harmonic_mean(self) -> Array:
        """Of `base_accuracy` and `novel_accuracy`, seed by seed, [T]; NaN at first."""
        return self.sessions()["harmonic"]

    @property
    def performance_drop(self) -> float:
        """See `fastcil.engine.metrics.performance_drop`."""
        return float(np.mean(self.per_seed("drop")))

    @property
    def forward_transfer(self) -> float | None:
        """See `fastcil.engine.metrics.forward_transfer`; None without engine.forward_transfer."""
        found = [f for o in self.outcomes if (f := o.forward_transfer) is not None]
        return float(np.mean(found)) if len(found) == len(self.outcomes) else None

    @property
    def nbytes(self) -> int:
        """Bytes that counted towards the budget after the last task; the largest seed's."""
        return max(outcome.tasks[-1].nbytes["budgeted"] for outcome in self.outcomes)

    @property
    def exemplars(self) -> float:
        """Exemplars held after the last task, mean over seeds."""
        return float(np.mean([sum(outcome.tasks[-1].exemplars) for outcome in self.outcomes]))

    @property
    def seconds(self) -> float:
        """Wall time of all tasks, mean over seeds."""
        return float(np.mean([sum(t.seconds for t in o.tasks) for o in self.outcomes]))

    def only(self, seeds: Sequence[int]) -> Result:
        """The same result on some of its seeds, in their order."""
        by_seed = {outcome.seed: outcome for outcome in self.outcomes}
        outcomes = [by_seed[seed] for seed in seeds]
        return Result(self.config, self.environment, outcomes, self.run_dir, self._learner)

    def save(self, path: str | Path) -> None:
        """Writes the result as JSON, atomically."""
        content = {
            "config": self.config,
            "environment": self.environment,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "summary": self.summary(),
        }
        write_atomically(Path(path), json.dumps(content, indent=1).encode())

    def summary(self) -> dict[str, Any]:
        """The headline figures, for people who read the JSON."""
        return {
            "method": self.config["method"],
            "seeds": [outcome.seed for outcome in self.outcomes],
            "average_accuracy": round(self.average_accuracy, 3),
            "last_accuracy": round(self.last_accuracy, 3),
            "forgetting": round(self.forgetting, 3),
            "bwt": round(self.bwt, 3),
            "forward_transfer": None
            if self.forward_transfer is None
            else round(self.forward_transfer, 3),
            "curve": [round(float(a), 3) for a in self.curve()],
            **(self._few_shot_summary() if self.few_shot else {}),
            "exemplars": self.exemplars,
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 1),
        }

    def _few_shot_summary(self) -> dict[str, Any]:
        """Figures that only few-shot streams are asked for."""
        curves = self.sessions()
        return {
            "epoch_choice": self.epoch_choice,
            "base_accuracy": rounded(curves["base"]),
            "novel_accuracy": rounded(curves["novel"]),
            "harmonic_mean": rounded(curves["harmonic"]),
            "performance_drop": round(self.performance_drop, 3),
        }

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        backbone: Callable[[], nn.Module] | None = None,
    ) -> Result:
        """Loads a result from its file, its run directory or one seed's folder there.

        Args:
            path: Where it is.
            device: Where its learner is put when it is asked for.
            backbone: The user's own backbone, which the learner needs if it was trained with one.

        Raises:
            FastcilError: No result there, or a damaged one.
        """
        path = Path(path)
        file = path / "result.json" if path.is_dir() else path
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            outcomes = [
                SeedOutcome(o["seed"], [TaskOutcome(**t) for t in o["tasks"]])
                for o in content["outcomes"]
            ]
            config, environment = content["config"], content["environment"]
        except OSError as error:
            raise FastcilError(
                f"path is '{path}', where no result.json can be read; pass a finished run."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise FastcilError(f"'{file}' is no result of fastcil's: {error}.") from error
        saved = file.parent / f"seed-{outcomes[0].seed}" / "learner.safetensors"
        if not saved.is_file():
            # One seed's own folder holds its result and its learner side by side.
            saved = file.parent / "learner.safetensors"
        return cls(
            config,
            environment,
            outcomes,
            file.parent,
            (lambda: Learner.load(saved, device=device, backbone=backbone))
            if saved.is_file()
            else None,
        )

    def __repr__(self) -> str:
        sessions = ""
        if self.few_shot:
            base, novel, both = (float(np.mean(self.per_seed(m))) for m in _SESSIONS)
            sessions = (
                f"base {base:.2f} %, novel {novel:.2f} %, harmonic mean {both:.2f}, "
                f"drop {self.performance_drop:.2f}, "
                + ("paper mode: epochs chosen on test images, " * (self.epoch_choice == "paper"))
            )
        return (
            f"Result({self.config['method']}: average {self.average_accuracy:.2f} %, "
            f"last {self.last_accuracy:.2f} %, {sessions}{self.exemplars:.0f} exemplars, "
            f"{self.nbytes:,} bytes)"
        )
