"""`adaptive-merge data check`: is the data of a suite there, complete and readable?"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.suites.check import check_suite

__all__ = ["data_command"]


def data_command(arguments: list[str]) -> None:
    """Say for each task of a suite: found or not, images, classes, and the first problem."""
    parser = argparse.ArgumentParser("adaptive-merge data", description=data_command.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help=data_command.__doc__)
    given = check.add_mutually_exclusive_group(required=True)
    given.add_argument("suite", nargs="?", help="`embedded`, or a folder with suite.json")
    given.add_argument("--config", help="a YAML configuration whose `suite.name` is meant")
    check.add_argument("--decode", action="store_true", help="decode every image into the cache, which `fit` then uses")
    options = parser.parse_args(arguments)
    found = check_suite(options.suite or _suite_of(options.config), options.decode)
    table = Table("task", "found", "images", "classes", Column("first problem", overflow="fold"))
    for row in found:
        counts = (f"{row.images:,}" if row.images else "", str(row.classes or ""))
        found_it = "no" if row.problem else "yes"
        table.add_row(Text(row.task), found_it, *counts, Text(row.problem or ""), style="red" if row.problem else "")
    Console().print(table)
    wrong = [row.task for row in found if row.problem]
    if wrong:
        raise InputError(f"{len(wrong)} of {len(found)} tasks cannot be used yet: {', '.join(wrong)}")


def _suite_of(config: str) -> str:
    try:
        content = yaml.safe_load(Path(config).read_text())
    except FileNotFoundError as error:
        raise MissingFileError(f"{config}: there is no such configuration") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{config}: not readable as YAML ({error})") from error
    suite = content.get("suite") if isinstance(content, dict) else None
    name = suite.get("name") if isinstance(suite, dict) else None
    return name if isinstance(name, str) else "embedded"
