"""`adaptive-merge data check`: is the data of a suite there, complete and readable? Asked without reading an expert."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from adaptive_merge.data.clip_folder import KIND, read_clip_suite
from adaptive_merge.data.clip_suite import ClipSuite
from adaptive_merge.data.image_cache import cached_images, resized
from adaptive_merge.data.suite import EMBEDDED, _read_manifest, load_suite
from adaptive_merge.errors import AdaptiveMergeError, InputError, MissingFileError
from adaptive_merge.models.clip import read_architecture

__all__ = ["TaskCheck", "check_suite", "data_command"]


@dataclass(frozen=True)
class TaskCheck:
    """What is known of one task's data; `problem` is the first that was met, or None."""

    task: str
    images: int = 0
    classes: int = 0
    problem: str | None = None


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


def check_suite(name: str, decode: bool = False) -> list[TaskCheck]:
    """Look at the data of every task of a suite.

    Args:
        name: `"embedded"` or a folder with `suite.json`.
        decode: decode every image into the cache, and compare caches that are there with their digest.

    Raises:
        MissingFileError, InputError: the suite itself cannot be read.
    """
    folder = EMBEDDED if name == "embedded" else Path(name)
    manifest = _read_manifest(folder)
    if manifest.get("kind") != KIND:
        return [_check_plain(name, task) for task in manifest["tasks"]]
    suite = read_clip_suite(folder, manifest)
    return [_check_clip(suite, task, decode) for task in suite.tasks]


def _check_plain(name: str, task: str) -> TaskCheck:
    try:
        images = load_suite(name, [task]).images[task]
    except AdaptiveMergeError as error:
        return TaskCheck(task, problem=str(error))
    return TaskCheck(task, len(images), len(images.classes))


def _check_clip(suite: ClipSuite, task: str, decode: bool) -> TaskCheck:
    """Lists and labels always; the first and the last image, or with `decode` all of them."""
    images = classes = 0
    try:
        source = suite.source(task)
        images, classes = len(source), len(source.classes)
        size = read_architecture(suite.architecture).image_size
        if decode:
            cached_images(source, suite.cache, size, name=task, workers=suite.workers, check=True)
        for index in {0, len(source) - 1}:
            resized(source.load(index), size)
    except AdaptiveMergeError as error:
        return TaskCheck(task, images, classes, str(error))
    return TaskCheck(task, images, classes)


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
