"""The HTML report: one file, no network, light and dark, for one run or for many side by side."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from adaptive_merge import __version__
from adaptive_merge.engine.views import gain, percent
from adaptive_merge.errors import InputError
from adaptive_merge.files import replacing
from adaptive_merge.report.compare import Group, alike, comparison_plans, contrasts, group_runs
from adaptive_merge.report.figures import recovered
from adaptive_merge.report.panels import Panel, Section, draw
from adaptive_merge.report.sections import run_sections
from adaptive_merge.report.style import SERIES, VIEW_NAMES, short
from adaptive_merge.report.summary import Card, cards, duration, gap_closed, warnings_of
from adaptive_merge.report.terms import ORACLE, alarms, choice, sentence, start, start_choices, terms
from adaptive_merge.runs.measures import improvement, normalised
from adaptive_merge.runs.reading import Run, read_run
from adaptive_merge.runs.results import uses_labels

__all__ = ["report_run", "write_report"]

_log = logging.getLogger(__name__)
_TEMPLATES = Path(__file__).parent / "templates"
_DETAILED = 12  # with more runs than this, only the comparison carries figures


def write_report(run_folders: Sequence[str | Path], output: str | Path, tsne: bool = False) -> Path:
    """Write the report of one or several run folders.

    Args:
        run_folders: folders with `results.json`; `config.yaml`, `metrics.csv`, `history.safetensors` and
            `diagnostics.safetensors` are used where they are there.
        output: HTML file to write, atomically.
        tsne: also project features with t-SNE; takes seconds a run and scikit-learn (extra `report`).

    Returns:
        The path of the report.

    Raises:
        MissingFileError, InputError: a folder is not one of a finished run.
    """
    if not run_folders:
        raise InputError("no run to report on; name at least one run folder")
    runs = [read_run(folder) for folder in run_folders]
    page = _environment().get_template("report.html.j2").render(_content(runs, tsne))
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
        "series": SERIES,
        "title": name + mark,
        "oracle": bool(oracles),
        "labelled": all(run.measure == "accuracy" for run in runs),
    }


def _run_content(run: Run, prefix: str, tsne: bool, detailed: bool) -> dict[str, Any]:
    results = run.results
    return {
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
        "average": results["average"],
        "unseen": results["unseen"]["average"],
        "quantities": _quantities(run),
        "online": results["online"] is not None,
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
        "versions": results.get("versions", {}),
        "experts": [(short(task, 60), digest) for task, digest in results.get("experts", {}).items()],
        "notes": run.notes,
    }


def _tasks(run: Run) -> list[dict[str, Any]]:
    gaps, protocol = recovered(run.tasks), run.results["protocol"]
    nai = improvement(run.tasks, "adapted")
    return [
        {
            "name": short(task, 60),
            "unseen": task not in run.merged,
            "adapted_on": protocol["adapted_on"][task] if protocol else None,
            "row": row,
            "gap": gaps[task],
            "nai": nai[task],
        }
        for task, row in run.tasks.items()
    ]


def _quantities(run: Run) -> list[tuple[str, list[str]]]:
    """Name → a text per view, of what accuracy does not say; nothing where a run did not record it."""
    over = {view: normalised(run.merged, view) for view in VIEW_NAMES}
    named = {
        f"normalised {run.measure}, mean of ratios": [_percent(one["mean_of_ratios"]) for one in over.values()],
        f"normalised {run.measure}, ratio of means": [_percent(one["ratio_of_means"]) for one in over.values()],
        "calibration error (ECE)": [_percent(run.calibration_error(view)) for view in VIEW_NAMES],
        "agreement with the experts": [_percent(run.criterion(view, "agreement")) for view in VIEW_NAMES],
        "JS divergence to the experts, nats": [_decimal(run.criterion(view, "js")) for view in VIEW_NAMES],
        "normalised entropy": [_decimal(run.criterion(view, "entropy")) for view in VIEW_NAMES],
    }
    return [(name, texts) for name, texts in named.items() if set(texts) != {"–"}]


def _comparison(runs: list[Run]) -> dict[str, Any]:
    groups, notes = group_runs(runs), []
    sections = [Section("Side by side", draw(comparison_plans(groups), "all", notes))]
    several = alike(groups)
    top = [Card("runs", str(len(runs)), f"{len(groups)} method{'s' if len(groups) > 1 else ''}")]
    for shared, members in several.items():
        top += _best(members) if len(several) == 1 else [_best_on(shared, members[0])]
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
    found = [
        Card("best method", short(best.name, 26), f"of {len(best.runs)} run{'s' if len(best.runs) > 1 else ''}"),
        Card(
            f"its adapted {best.runs[0].measure}",
            _percent(mean),
            f"± {_percent(deviation)} over seeds" if deviation is not None else "one seed",
        ),
    ]
    if len(groups) > 1:
        found.append(Card("ahead of the next by", f"{gain(mean, groups[1].spread[0]):.1f}", "percentage points"))
    return found


def _best_on(shared: str, best: Group) -> Card:
    return Card(f"best, protocol {short(shared, 60)}", short(best.name, 26), f"{_percent(best.spread[0])} adapted")


def _row(run: Run, group: str) -> dict[str, Any]:
    results, stopped = run.results, run.results["guard"].get("stopped")
    return {
        "run": short(run.name, 40),
        "stopped": stopped["step"] if stopped else None,
        "method": short(group, 40),
        "terms": short(terms(run), 80),
        "seed": results.get("seed"),
        "average": results["average"],
        "gap": gap_closed(run),
        "ece": run.calibration_error("adapted"),
        "agreement": run.criterion("adapted", "agreement"),
        "steps": results.get("steps", 0),
        "seconds": results.get("seconds", {}).get("adapt", 0.0),
        "learned": results.get("trainable_parameters", 0),
    }


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, probability=_probability, duration=duration, svg=_svg)
    return environment


def _svg(panel: Panel) -> Markup:
    """Our own figure: matplotlib has escaped the text in it."""
    return Markup(panel.svg)


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{percent(value):.1f} %"


def _decimal(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _probability(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
