"""What the figures say, in a sentence or two, and no more than they say."""

from __future__ import annotations

from fastcil.engine.compare import Comparison
from fastcil.engine.markup import format_bytes
from fastcil.engine.metrics import mean_interval
from fastcil.engine.plots import held_amounts
from fastcil.engine.result import Result
from fastcil.memory import Budget


def finding(comparison: Comparison) -> str:
    """The headline: who is best by average accuracy, by how much, and how sure that is.

    Methods that held more than their budget (joint training) are named and not ranked. The
    difference is that of the best to the runner-up, paired seed by seed; its 95 % interval is
    given from three seeds on.

    Args:
        comparison: One method or several.
    """
    results = {comparison.label(m): result for m, result in comparison.results.items()}
    if len(results) == 1:
        return _of_one(*next(iter(results.items())))
    equally = (
        "At equal memory" if len(comparison.memories) == 1 else "Each with a memory of its own"
    )
    ranked = sorted(
        (method for method, result in results.items() if not exceeds_budget(result)),
        key=lambda method: -results[method].average_accuracy,
    )
    parts = []
    if len(ranked) > 1:
        parts = _of_first_two(ranked, results, equally)
    elif ranked:
        parts = [f"{ranked[0]} is the only method that kept to the budget."]
    left_out = [method for method in results if method not in ranked]
    if left_out:
        verb = "holds" if len(left_out) == 1 else "hold"
        parts.append(f"{' and '.join(left_out)} {verb} more than the budget: not ranked.")
    return " ".join(parts)


def _of_one(method: str, result: Result) -> str:
    classes = sum(task.classes for task in result.outcomes[0].tasks)
    tasks = len(result.outcomes[0].tasks)
    average, half = mean_interval(result.per_seed("average"))
    forgets = f", having forgotten {result.forgetting:.1f} points per earlier task"
    if result.data_incremental:
        forgets = f", {result.bwt:+.1f} points from the first on"
    return (
        f"{method} classifies {result.last_accuracy:.1f} % of the test images of "
        f"{classes} classes correctly after {tasks} task{'s' * (tasks > 1)}"
        f"{forgets if tasks > 1 else ''}; {_guessing(result)}. "
        f"Its average accuracy is {average:.1f} %"
        f"{_over_seeds(len(result.outcomes), half)}. "
        f"It keeps {result.exemplars:,.0f} exemplars; {format_bytes(result.nbytes)} count "
        f"towards the budget."
    )


def _guessing(result: Result) -> str:
    """The accuracy of drawing a class at random, and among which."""
    tasks = result.outcomes[0].tasks
    count = next(iter(tasks[-1].correct.values()))["count"]
    if not result.task_aware:
        return f"guessing would give {100 / max(1, len(count)):.1f} %"
    choices = [task.classes for task in tasks for _ in range(task.classes)]  # of each class
    hits = sum(images / among for images, among in zip(count, choices, strict=True))
    return (
        f"the task of each being known, guessing among its classes would give "
        f"{100 * hits / max(1, sum(count)):.1f} %"
    )


def _over_seeds(seeds: int, half: float | None) -> str:
    if half is not None:
        return f" ± {half:.1f} (95 % interval over {seeds} seeds)"
    return f" (mean of {seeds} seeds)" if seeds > 1 else " (one seed)"


def _of_first_two(ranked: list[str], results: dict[str, Result], equally: str) -> list[str]:
    best, second = results[ranked[0]], results[ranked[1]]
    seeds = len(best.outcomes)
    pairs = zip(best.per_seed("average"), second.per_seed("average"), strict=True)
    gain, half = mean_interval([a - b for a, b in pairs])
    superlative = "higher" if len(ranked) == 2 else f"highest of {len(ranked)}"
    parts = [
        f"{equally}, {ranked[0]}'s average accuracy is the {superlative}: "
        f"{best.average_accuracy:.1f} %, against {second.average_accuracy:.1f} % of {ranked[1]}.",
        _certainty(gain, half, seeds, len(ranked)),
        f"{ranked[0]} holds {best.exemplars:,.0f} exemplars, {ranked[1]} {second.exemplars:,.0f}.",
    ]
    for method, result in ((ranked[0], best), (ranked[1], second)):
        beyond = max(o.tasks[-1].nbytes["all"] for o in result.outcomes) - result.nbytes
        if beyond > 0:
            parts.append(
                f"{method} keeps a further {format_bytes(beyond)} that this budget does not count."
            )
    return parts


def _certainty(gain: float, half: float | None, seeds: int, methods: int) -> str:
    """The paired difference, and what may be concluded from it."""
    if half is None:
        few = "one seed" if seeds == 1 else f"{seeds} seeds"
        return f"That is {gain:+.1f} points from {few}, without an interval: only an indication."
    low, high = gain - half, gain + half
    chosen = "" if methods == 2 else ", not corrected for having chosen the best,"
    settled = "excludes zero" if low > 0 else "includes zero: these seeds do not settle the order"
    return (
        f"The paired difference over {seeds} seeds is {gain:+.1f} points; "
        f"its 95 % interval{chosen} is {low:+.1f} to {high:+.1f} and {settled}."
    )


def exceeds_budget(result: Result) -> bool:
    """Whether more was held after some task than the budget allows."""
    unit = Budget.parse(result.config["memory"]).unit
    held = held_amounts(result, unit).max(0)
    limits = [task.limit for task in result.outcomes[0].tasks]
    # Costs in images are sums of fractions.
    return any(
        limit is not None and amount > limit + 1e-6
        for amount, limit in zip(held, limits, strict=True)
    )
