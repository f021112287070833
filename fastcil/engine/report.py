"""report.html: one file that shows a run, or a comparison, without network or scripts."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from string import Template

from fastcil import __version__
from fastcil.engine import few_shot_sections, memory_sections, sections
from fastcil.engine.compare import Comparison
from fastcil.engine.markup import Html, tag, text
from fastcil.engine.result import Result
from fastcil.engine.state import write_atomically
from fastcil.errors import FastcilError

REPORT = "report.html"

_SECTIONS = {
    "results": ("Results", sections.results_section),
    "accuracy": ("Accuracy", sections.accuracy_section),
    "sessions": ("Few-shot sessions", few_shot_sections.sessions_section),
    "tasks": ("Accuracy by task", sections.matrix_section),
    "forgetting": ("Forgetting", sections.forgetting_section),
    "sweeps": ("Accuracy by setting", sections.sweeps_section),
    "memory": ("Memory", memory_sections.memory_section),
    "exemplars": ("Exemplars beside their originals", memory_sections.gallery_section),
    "records": ("From inside the methods", memory_sections.records_section),
    "time": ("Time", sections.time_section),
    "setup": ("How it was run", sections.setup_section),
}


def write_report(run_dir: str | Path) -> Path:
    """Writes ``report.html`` into a run directory, atomically.

    The file needs nothing beside it: plots are inline SVG, pictures ``data:`` URIs, and there is
    no script. Names and settings are escaped.

    Args:
        run_dir: A directory that `fastcil.train` or `fastcil.engine.compare.compare` wrote, its
            run finished.

    Returns:
        The file's path.

    Raises:
        FastcilError: No finished run there, or a damaged one.
    """
    folder = Path(run_dir)
    path = folder / REPORT
    write_atomically(path, render_report(load_comparison(folder)).encode())
    return path


def load_comparison(folder: Path) -> Comparison:
    """The results in a run directory; a single run is a comparison of one method.

    Raises:
        FastcilError: No finished run there, or a damaged one.
    """
    if not folder.is_dir():
        raise FastcilError(
            f"run_dir is '{folder}', which is no folder; pass one that train or compare wrote."
        )
    listing = folder / "compare.json"
    if listing.is_file():
        try:
            methods = list(json.loads(listing.read_text(encoding="utf-8"))["configs"])
        except (ValueError, KeyError, TypeError) as error:
            raise FastcilError(f"'{listing}' is no comparison of fastcil's: {error}.") from error
        results = {method: Result.load(folder / method) for method in methods}
    elif (folder / "result.json").is_file():
        result = Result.load(folder)
        results = {str(result.config["method"]): result}
    else:
        started = any(folder.glob("**/identity.yaml"))
        advice = "run its command again, which goes on with it" if started else "pass another"
        state = "a run that is not finished" if started else "no run"
        raise FastcilError(f"run_dir is '{folder}', which holds {state}; {advice}.")
    if not results or not all(o.tasks for r in results.values() for o in r.outcomes):
        raise FastcilError(f"run_dir is '{folder}', whose results hold no task; run it again.")
    return Comparison(_common_seeds(results, folder), folder)


def _common_seeds(results: dict[str, Result], folder: Path) -> dict[str, Result]:
    """The results on the seeds that all methods have: an interrupted compare has more of some."""
    sets = [{outcome.seed for outcome in result.outcomes} for result in results.values()]
    common = sorted(set.intersection(*sets))
    if not common:
        raise FastcilError(
            f"run_dir is '{folder}', whose methods have no seed in common; compare again."
        )
    return {method: result.only(common) for method, result in results.items()}


def render_report(comparison: Comparison) -> str:
    """The report's HTML.

    Args:
        comparison: Methods and their results; of one, a report of that run.
    """
    made = {
        name: (heading, content)
        for name, (heading, make) in _SECTIONS.items()
        if (content := make(comparison))
    }
    links = [tag("a", heading, href=f"#{name}") for name, (heading, _) in made.items()]
    template = resources.files("fastcil.engine").joinpath("report.html.template")
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=text(f"{sections.title(comparison)} – fastcil"),
        header=Html(sections.header(comparison) + tag("nav", *links)),
        sections="\n".join(
            tag("section", tag("h2", heading), content, id=name)
            for name, (heading, content) in made.items()
        ),
        footer=text(f"Written by fastcil {__version__}."),
    )
