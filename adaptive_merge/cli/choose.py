"""`adaptive-merge choose`: finished runs, ranked without labels."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.engine.scoring import CRITERIA
from adaptive_merge.errors import AdaptiveMergeError
from adaptive_merge.runs.ranking import BY, ORACLE, Candidate, check_by, conclusion, rank, table
from adaptive_merge.runs.reading import read_run

__all__ = ["choose"]


def choose(arguments: list[str]) -> None:
    """Rank finished run folders by a criterion that needs no labels."""
    parser = Parser("adaptive-merge choose", description=choose.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of one suite and protocol")
    parser.add_argument("--by", default=BY[0], help=f"{', '.join(CRITERIA)} or, with labels, {ORACLE}")
    options = parser.parse_args(arguments)
    check_by(options.by)
    ranked = rank([_candidate(path, len(options.runs) > 1) for path in options.runs], options.by)
    Console().print(table(ranked, options.by))
    write(conclusion(ranked, options.by))


def _candidate(path: str, among_others: bool) -> Candidate:
    """A run; among others, one that is not finished is listed with what is wrong."""
    try:
        return Candidate(path, Path(path), run=read_run(path))
    except AdaptiveMergeError as error:
        if not among_others:
            raise
        return Candidate(path, Path(path), problem=str(error))
