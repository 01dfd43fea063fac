"""Class names and prompt templates: those of the 20 published CLIP tasks, and the user's own."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from adaptive_merge.errors import InputError, MissingFileError, did_you_mean

__all__ = ["ClipTask", "clip_task", "clip_task_names", "read_class_names"]


@dataclass(frozen=True)
class ClipTask:
    """One data set as the published heads name it: classes in label order, templates with one `{}` each."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    note: str = ""


def clip_task(name: str) -> ClipTask:
    """The published class names and templates of a data set, by its usual name (`SUN397`, `Cars` …)."""
    tasks = _tasks()
    if name not in tasks:
        raise InputError(
            f"no class names are known for data set {name!r}{did_you_mean(name, tasks)} Known: {', '.join(tasks)}; "
            "for another one, give a text file with one class name a line"
        )
    return tasks[name]


def clip_task_names() -> tuple[str, ...]:
    """The 20 data sets in the order of the published suites: the first 8, 14 or all 20 form one."""
    return tuple(_tasks())


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """A user's class names, in label order: UTF-8 text, one name a line, empty lines at the end ignored.

    Raises:
        MissingFileError, InputError: no file, no names, an empty line between names, or a name given twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except FileNotFoundError as error:
        raise MissingFileError(f"`{path}`: no such file; expected one class name a line") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`{path}`: not readable as UTF-8 text ({error})") from error
    names = tuple(line.strip() for line in lines)
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise InputError(f"`{path}`: line {number} is empty, expected a class name (the line is the label)")
        if name in seen:
            raise InputError(f"`{path}`: line {number}: {name!r} again, first in line {seen[name]}; names must differ")
        seen[name] = number
    if not names:
        raise InputError(f"`{path}`: no class names in it, expected one a line")
    return names


@functools.cache
def _tasks() -> dict[str, ClipTask]:
    text = resources.files("adaptive_merge.suites").joinpath("clip_tasks.json").read_text(encoding="utf-8")
    return {
        name: ClipTask(name, tuple(entry["classes"]), tuple(entry["templates"]), entry.get("note", ""))
        for name, entry in json.loads(text).items()
    }
