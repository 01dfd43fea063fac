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
from adaptive_merge.errors import InputError
from adaptive_merge.files import replacing
from adaptive_merge.report.compare import comparison_plans, contrasts, group_runs
from adaptive_merge.report.figures import recovered
from adaptive_merge.report.runs import Run, read_run
from adaptive_merge.report.sections import Panel, Section, draw, run_sections
from adaptive_merge.report.style import SERIES, printable
from adaptive_merge.report.summary import Card, cards, duration, warnings_of

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
    content = {
        "runs": [_run_content(run, f"r{number}", tsne, detailed) for number, run in enumerate(runs)],
        "comparison": _comparison(runs) if len(runs) > 1 else None,
        "program": __version__,
        "series": SERIES,
    }
    content["title"] = f"{len(runs)} runs" if len(runs) > 1 else f"{printable(runs[0].name, 60)}"
    return content


def _run_content(run: Run, prefix: str, tsne: bool, detailed: bool) -> dict[str, Any]:
    results = run.results
    gaps = recovered(run.tasks)
    return {
        "name": printable(run.name, 60),
        "recipe": printable(results["recipe"], 60),
        "seed": results.get("seed"),
        "cards": cards(run),
        "warnings": warnings_of(run),
        "sections": run_sections(run, prefix, tsne) if detailed else [],
        "tasks": [(printable(task, 60), row, gaps[task]) for task, row in run.tasks.items()],
        "average": results["average"],
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
        "versions": results.get("versions", {}),
        "experts": [(printable(task, 60), digest) for task, digest in results.get("experts", {}).items()],
        "notes": run.notes,
    }


def _comparison(runs: list[Run]) -> dict[str, Any]:
    groups, notes = group_runs(runs), []
    sections = [Section("Side by side", draw(comparison_plans(groups), "all", notes))]
    best = groups[0]
    mean, deviation = best.spread
    top = [
        Card("runs", str(len(runs)), f"{len(groups)} method{'s' if len(groups) > 1 else ''}"),
        Card("best method", printable(best.name, 26), f"of {len(best.runs)} run{'s' if len(best.runs) > 1 else ''}"),
        Card(
            "its adapted accuracy",
            _percent(mean),
            f"± {_percent(deviation)} over seeds" if deviation is not None else "one seed",
        ),
    ]
    if len(groups) > 1:
        top.append(Card("ahead of the next by", f"{100 * (mean - groups[1].spread[0]):.1f}", "percentage points"))
    return {
        "cards": top,
        "rows": [_row(run, group.name) for group in groups for run in group.runs],
        "groups": [
            {"name": printable(group.name, 60), "runs": len(group.runs), "spread": group.spread, "gap": group.gap}
            for group in groups
        ],
        "contrasts": contrasts(groups),
        "sections": sections,
        "notes": notes,
    }


def _row(run: Run, group: str) -> dict[str, Any]:
    average, results = run.results["average"], run.results
    parts = [part for part in recovered(run.tasks).values() if part is not None]
    return {
        "run": printable(run.name, 40),
        "method": printable(group, 40),
        "seed": results.get("seed"),
        "average": average,
        "gap": sum(parts) / len(parts) if parts else None,
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
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def _probability(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
