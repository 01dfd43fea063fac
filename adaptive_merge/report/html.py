"""The HTML report: one file, no network, light and dark, for one run or for many side by side."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from adaptive_merge import __version__
from adaptive_merge.engine.views import ROUTED, gain, percent
from adaptive_merge.errors import InputError
from adaptive_merge.files import replacing
from adaptive_merge.report.compare import Group, alike, comparison_plans, contrasts, difference, group_runs
from adaptive_merge.report.figures import recovered
from adaptive_merge.report.panels import Panel, Section, draw
from adaptive_merge.report.sections import run_sections
from adaptive_merge.report.statistics import half_width
from adaptive_merge.report.style import VIEW_NAMES, short
from adaptive_merge.report.summary import Card, cards, duration, gap_closed, probability, warnings_of
from adaptive_merge.report.terms import ORACLE, alarms, choice, sentence, start, start_choices, terms
from adaptive_merge.runs.measures import improvement, normalised
from adaptive_merge.runs.reading import Run, read_run
from adaptive_merge.runs.shown import uses_labels

__all__ = ["report_run", "write_report"]

_log = logging.getLogger(__name__)
_TEMPLATES = Path(__file__).parent / "templates"
_DETAILED = 12  # with more runs than this, only the comparison carries figures


def write_report(
    run_folders: Sequence[str | Path], output: str | Path, tsne: bool = False, missing: Sequence[str] = ()
) -> Path:
    """Write the report of one or several run folders.

    Args:
        run_folders: folders with `results.json`; `config.yaml`, `metrics.csv`, `history.safetensors` and
            `diagnostics.safetensors` are used where they are there.
        output: HTML file to write, atomically.
        tsne: also project features with t-SNE; takes seconds a run and scikit-learn (extra `report`).
        missing: runs that belong here and are not there, in words.

    Returns:
        The path of the report.

    Raises:
        MissingFileError, InputError: a folder is not one of a finished run.
    """
    if not run_folders:
        raise InputError("no run to report on; name at least one run folder")
    runs = [read_run(folder) for folder in run_folders]
    page = _environment().get_template("report.html.j2").render(_content(runs, tsne) | {"missing": missing})
    output = Path(output)
    with replacing(output) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
    return output


def report_run(folder: str | Path) -> Path | None:
    """Write `report.html` into a run folder at the end of `fit`: quick, and never a reason for the run to fail."""
    folder = Path(folder)
    try:
        return write_report([folder], folder / "report.html")
    except Exception as error:  # the results are there already
        _log.warning("the report of %s could not be written: %r", folder, error)
        return None


def _content(runs: list[Run], tsne: bool) -> dict[str, Any]:
    detailed = len(runs) <= _DETAILED
    oracles = sum(uses_labels(run.results) for run in runs)
    name = f"{len(runs)} runs" if len(runs) > 1 else short(runs[0].name, 60)
    mark = f" · {f'{oracles} ' if len(runs) > 1 else ''}{ORACLE}" if oracles else ""
    return {
        "runs": [_run_content(run, f"r{number}", tsne, detailed) for number, run in enumerate(runs)],
        "comparison": _comparison(runs) if len(runs) > 1 else None,
        "program": __version__,
        "title": name + mark,
        "oracle": bool(oracles),
        "labelled": all(run.measure == "accuracy" for run in runs),
    }


def _run_content(run: Run, prefix: str, tsne: bool, detailed: bool) -> dict[str, Any]:
    results = run.results
    return {
        "prefix": prefix,
        "name": short(run.name, 60) + (f" · {ORACLE}" if uses_labels(results) else ""),
        "recipe": short(results["recipe"], 60),
        "seed": results.get("seed"),
        "terms": sentence(run),
        "choice": choice(run),
        "start": start(run),
        "start_choices": start_choices(run),
        "cards": cards(run),
        "alarms": alarms(run),
        "warnings": warnings_of(run),
        "sections": run_sections(run, prefix, tsne) if detailed else [],
        "tasks": _tasks(run),
        "views": [(view, VIEW_NAMES[view]) for view in VIEW_NAMES if view in run.stages],
        "averages": _averages(run),
        "quantities": _quantities(run),
        "routes": _routes(run),
        "online": results["online"] is not None,
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
        "versions": results.get("versions", {}),
        "experts": [(short(task, 60), digest) for task, digest in results.get("experts", {}).items()],
        "notes": run.notes,
    }


def _tasks(run: Run) -> list[dict[str, Any]]:
    scores = {task: run.scores(row) for task, row in run.tasks.items()}
    gaps, protocol = recovered(scores), run.results["protocol"]
    nai = improvement(run.tasks, "adapted")
    return [
        {
            "name": short(task, 60),
            "unseen": task not in run.merged,
            "adapted_on": protocol["adapted_on"][task] if protocol else None,
            "row": row,
            "reach": half_width({task: row}, "adapted"),
            "gap": gaps[task],
            "nai": nai[task],
        }
        for task, row in scores.items()
    ]


def _averages(run: Run) -> list[dict[str, Any]]:
    """The rows at the foot of the table of tasks: means, and sums of images."""
    protocol, means = run.results["protocol"], [("average", run.merged, run.results["average"])]
    if unseen := run.results["unseen"]["average"]:
        others = {task: row for task, row in run.tasks.items() if task not in run.merged}
        means = [("average of the merged tasks", *means[0][1:]), ("average of the unseen tasks", others, unseen)]
    return [
        {
            "name": name,
            "adapted_on": sum(protocol["adapted_on"][task] for task in tasks) if protocol else None,
            "row": run.scores(average | {"n": sum(row["n"] for row in tasks.values())}),
            "reach": half_width(tasks, "adapted"),
            "gap": _mean(recovered({task: run.scores(row) for task, row in tasks.items()}).values()),
            "nai": _mean(improvement(tasks, "adapted").values()),
        }
        for name, tasks, average in means
    ]


def _quantities(run: Run) -> list[tuple[str, list[str]]]:
    """Name → a text per view, of what accuracy does not say; nothing where a run did not record it."""
    views = [run.stages[name] for name in VIEW_NAMES if name in run.stages]
    over = {view: normalised(run.merged, view) for view in views}
    named = {
        f"normalised {run.measure}, mean of ratios": [_percent(one["mean_of_ratios"]) for one in over.values()],
        f"normalised {run.measure}, ratio of means": [_percent(one["ratio_of_means"]) for one in over.values()],
        "calibration error (ECE)": [_percent(run.calibration_error(view)) for view in views],
        "agreement with the experts": [_percent(run.criterion(view, "agreement")) for view in views],
        "JS divergence to the experts, nats": [_decimal(run.criterion(view, "js")) for view in views],
        "normalised entropy": [_decimal(run.criterion(view, "entropy")) for view in views],
    }
    return [(name, texts) for name, texts in named.items() if set(texts) != {"–"}]


def _routes(run: Run) -> list[tuple[str, list[str]]]:
    """Task → how often a route finds it, and accuracy with the task known and unknown."""
    routing = run.results["routing"]
    rows = {**routing["tasks"], "average": routing["average"]} if routing else {}
    return [(short(task, 60), [_percent(row[name]) for name in ROUTED]) for task, row in rows.items()]


def _comparison(runs: list[Run]) -> dict[str, Any]:
    groups, notes = group_runs(runs), []
    sections = [Section("Side by side", draw(comparison_plans(groups), "all", notes))]
    several = alike(groups)
    seeds = len({run.results.get("seed") for run in runs})
    methods = f"{len(groups)} method{'s' if len(groups) > 1 else ''}, {seeds} seed{'s' if seeds > 1 else ''}"
    top = [Card("runs", str(len(runs)), methods)]
    for shared, members in several.items():
        top += _best(members) if len(several) == 1 else [_best_on(shared, members)]
    return {
        "cards": top,
        "several": len(several) > 1,
        "rows": [_row(run, group.name) for group in groups for run in group.runs],
        "groups": [
            {
                "name": short(group.name, 60),
                "terms": short(group.terms, 80),
                "runs": len(group.runs),
                "spread": group.spread,
                "gap": group.gap,
                "ece": group.calibration_error,
                "agreement": group.agreement,
            }
            for group in groups
        ],
        "contrasts": contrasts(groups),
        "sections": sections,
        "notes": notes,
    }


def _best(groups: list[Group]) -> list[Card]:
    """Of runs that may all be compared."""
    best = groups[0]
    mean, deviation = best.spread
    spread = f"± {100 * deviation:.1f} over {len(best.runs)} seeds" if deviation is not None else "one seed"
    top = [
        Card("best method", short(best.name, 26), f"of {len(best.runs)} run{'s' if len(best.runs) > 1 else ''}"),
        Card(f"its adapted {best.runs[0].measure}", _percent(mean), spread),
    ]
    return [*top, *([_ahead(best, groups[1])] if len(groups) > 1 else [])]


def _ahead(best: Group, other: Group) -> Card:
    """By how much the best is ahead, where a test says that it is; else that the two are not told apart."""
    test, name = difference(best, other), short(other.name, 26)
    if test is None:
        return Card("the next", name, "of other tasks, so they are not compared")
    points = f"{gain(best.spread[0], other.spread[0]):.1f}"
    tested = f"p {probability(test.p)}, {test.words}"
    if test.significant:
        return Card("ahead of the next by", points, f"points over {name}; {tested}")
    return Card("not told apart from", name, f"{points} points behind; {tested}")


def _best_on(shared: str, groups: list[Group]) -> Card:
    best, accuracy = groups[0], f"{_percent(groups[0].spread[0])} adapted"
    return Card(f"best, protocol {short(shared, 60)}", short(best.name, 26), accuracy)


def _row(run: Run, group: str) -> dict[str, Any]:
    results, stopped = run.results, run.results["guard"].get("stopped")
    return {
        "run": short(run.name, 40),
        "stopped": stopped["step"] if stopped else None,
        "method": short(group, 40),
        "terms": short(terms(run), 80),
        "seed": results.get("seed"),
        "average": run.scores(results["average"]),
        "gap": gap_closed(run),
        "ece": run.calibration_error("adapted"),
        "agreement": run.criterion("adapted", "agreement"),
        "steps": results.get("steps", 0),
        "seconds": results.get("seconds", {}).get("adapt", 0.0),
        "learned": results.get("trainable_parameters", 0) if results.get("steps", 0) else 0,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, probability=probability, duration=duration, svg=_svg, name=_name)
    return environment


def _svg(panel: Panel) -> Markup:
    """Our own figure: matplotlib has escaped the text in it."""
    return Markup(panel.svg)


def _name(text: str) -> Markup:
    """Escaped, and where there is no room, broken after its joints."""
    return Markup("<wbr>").join(re.split(r"(?<=[_-])(?=.)", text))


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{percent(value):.1f} %"


def _decimal(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"
