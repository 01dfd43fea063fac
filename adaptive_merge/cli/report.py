"""`adaptive-merge report`: the HTML report from the command line."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.errors import AdaptiveMergeError, InputError
from adaptive_merge.files import check_output
from adaptive_merge.report.html import write_report
from adaptive_merge.runs.array import ARRAY, read_array
from adaptive_merge.runs.journal import recording
from adaptive_merge.runs.reading import read_run

__all__ = ["report"]


def report(arguments: list[str]) -> None:
    """Write one HTML file about a run, or about several side by side."""
    parser = Parser("adaptive-merge report", description=report.__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, or those of arrays that submit has started"
    )
    parser.add_argument(
        "--output", help="file to write (default: report.html in the run folder; with several runs, here)"
    )
    parser.add_argument(
        "--tsne",
        action=argparse.BooleanOptionalAction,
        default=importlib.util.find_spec("sklearn") is not None,
        help="project features with t-SNE beside PCA; needs scikit-learn (default: where it is installed)",
    )
    parser.add_argument("--force", action="store_true", help="replace the file of --output, if it is there")
    options = parser.parse_args(arguments)
    if options.output:
        check_output(options.output, options.force)
    folder = Path(options.runs[0]) if len(options.runs) == 1 else Path()
    output = Path(options.output or folder / "report.html")
    found, missing = _cells(options.runs)
    for one in missing:
        write(f"left out: {one}")
    with recording(output):
        written = write_report(_readable(found), output, options.tsne, missing)
    write(f"wrote {written}")


def _cells(folders: list[str]) -> tuple[list[str], list[str]]:
    """Run folders, in place of an array those of its finished cells; and what became of the others."""
    found, missing = [], []
    for folder in folders:
        cells = read_array(folder) if (Path(folder) / ARRAY).is_file() else []
        cells = [cell for cell in cells if cell.folder != Path(folder)]
        found += [str(cell.folder) for cell in cells if cell.state == "finished"] if cells else [folder]
        missing += [f"{one.name}: {one.state}, {one.note}".rstrip(", ") for one in cells if one.state != "finished"]
    if not found:
        raise InputError(f"none of {len(missing)} cells has finished; adaptive-merge submit --status says how far")
    return found, missing


def _readable(folders: list[str]) -> list[str]:
    """Of several folders those of finished runs; the others are named. One alone is left for the report to judge."""
    if len(folders) == 1:
        return folders
    kept = []
    for folder in folders:
        try:
            read_run(folder)
            kept.append(folder)
        except AdaptiveMergeError as error:
            write(f"left out: {error}")
    if not kept:
        raise InputError(f"none of {len(folders)} folders holds a finished run")
    return kept
