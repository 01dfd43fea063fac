"""`adaptive-merge data check`: are the data and the checkpoints of a suite there, readable, of one kind?"""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from adaptive_merge.cli.configs import suite_name
from adaptive_merge.cli.parser import Parser
from adaptive_merge.errors import InputError, printable
from adaptive_merge.suites.check import check_suite

__all__ = ["data"]


def data(arguments: list[str]) -> None:
    """Say for each task of a suite: found or not, images, classes, and the first problem."""
    parser = Parser("adaptive-merge data", description=data.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help=data.__doc__)
    given = check.add_mutually_exclusive_group(required=True)
    given.add_argument("suite", nargs="?", help="`embedded`, or a folder with suite.json")
    given.add_argument("--config", action="append", help="a configuration whose `suite.name` is meant; may be repeated")
    check.add_argument("--decode", action="store_true", help="decode every image into the cache, which `fit` then uses")
    options = parser.parse_args(arguments)
    checks = check_suite(options.suite or suite_name(options.config), options.decode)
    table = Table("task", "found", "images", "classes", Column("first problem", overflow="fold"))
    for row in checks:
        counts = (f"{row.images:,}" if row.images else "", str(row.classes or ""))
        table.add_row(
            Text(printable(row.task)),
            "no" if row.problem else "yes",
            *counts,
            Text(printable(row.problem or "")),
            style="red" if row.problem else "",
        )
    Console().print(table)
    wrong = [row.task for row in checks if row.problem]
    if wrong:
        raise InputError(f"{len(wrong)} of {len(checks)} tasks cannot be used yet: {', '.join(wrong)}")
