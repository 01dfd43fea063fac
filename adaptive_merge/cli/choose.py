"""`adaptive-merge choose`: finished runs, ranked without labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from adaptive_merge.engine.scoring import CRITERIA
from adaptive_merge.runs.ranking import BY, ORACLE, Candidate, check_by, conclusion, rank, table
from adaptive_merge.runs.reading import read_run

__all__ = ["choose_command"]


def choose_command(arguments: list[str]) -> None:
    """Rank finished run folders by a criterion that needs no labels."""
    parser = argparse.ArgumentParser("adaptive-merge choose", description=choose_command.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of one suite and protocol")
    parser.add_argument("--by", default=BY[0], help=f"{', '.join(CRITERIA)} or, with labels, {ORACLE}")
    options = parser.parse_args(arguments)
    check_by(options.by)
    ranked = rank([Candidate(path, Path(path), run=read_run(path)) for path in options.runs], options.by)
    console = Console()
    console.print(table(ranked, options.by))
    console.print(conclusion(ranked, options.by), markup=False, highlight=False, soft_wrap=True)
