"""An array of runs in one folder: which cells it has, and how far each of them is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.files import save_json
from adaptive_merge.limits import read_json
from adaptive_merge.process.locks import holder
from adaptive_merge.process.signals import EXIT_REQUEUE
from adaptive_merge.runs.journal import Journal

__all__ = ["ARRAY", "STARTED", "STATES", "Cell", "last_words", "read_array", "save_array"]

ARRAY: Final = "array.json"
SCHEMA: Final = 1
STARTED: Final = "== adaptive-merge on %s, start %s, run %s =="
"""What a job says first, with host, number of the start, and name of the run's folder."""
STATES: Final = ("finished", "running", "stopped", "failed", "missing")
_STOPPED: Final = re.compile(rf"told to stop.*\(exit code {EXIT_REQUEUE}\)")  # as `cli.stopped` says it
_MARK: Final = re.compile(re.escape(STARTED).replace("%s", "(.*)") + "\n?")


@dataclass(frozen=True)
class Cell:
    """One run of an array: its number, name, folder, one of `STATES`, and what there is to say about that."""

    number: int
    name: str
    folder: Path
    state: str
    note: str = ""


def save_array(folder: Path, cells: Sequence[tuple[str, str]]) -> None:
    """Write down which runs an array has: name and folder within `folder` of each."""
    save_json(folder / ARRAY, {"schema": SCHEMA, "cells": [dict(zip(("name", "folder"), cell)) for cell in cells]})


def read_array(folder: str | Path) -> list[Cell]:
    """The cells of an array, as they are now.

    Raises:
        MissingFileError, InputError: no array was submitted there, or its file is damaged.
    """
    path = Path(folder) / ARRAY
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such file; name the folder of an array that `submit` has started")
    content: Any = read_json(path)
    try:
        cells = [(str(one["name"]), str(one["folder"])) for one in content["cells"]]
        if any(Path(place).is_absolute() or ".." in Path(place).parts for _, place in cells):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a list of cells as `submit` writes it; submit the array once more") from error
    logs = sorted(path.parent.glob("slurm-*.out"), key=lambda log: log.stat().st_mtime, reverse=True)
    said = [(log.name, log.read_text(errors="replace")) for log in logs]
    return [_cell(number, name, path.parent / place, said) for number, (name, place) in enumerate(cells)]


def _cell(number: int, name: str, folder: Path, logs: Sequence[tuple[str, str]]) -> Cell:
    if running := holder(folder / ".lock"):
        note = f"process {running.get('process')} on {running.get('host')}, since {running.get('since')}"
        return Cell(number, name, folder, "running", note)
    if (folder / "results.json").is_file():
        return Cell(number, name, folder, "finished")
    log = next((text for log, text in logs if _of_run(folder.name, number, log, text)), None)
    if log is None:
        begun = bool(Journal(folder).files)
        return Cell(number, name, folder, "stopped" if begun else "missing", "" if begun else "never started")
    *_, last = [None, *_MARK.finditer(log)]
    said = log[last.end() :] if last else log
    if not said.strip():
        return Cell(number, name, folder, "running", f"starting on {last[1]}" if last else "starting")
    words = last_words(said)
    return Cell(number, name, folder, "stopped" if _STOPPED.match(words) else "failed", words)


def _of_run(run: str, number: int, log: str, text: str) -> bool:
    """Whether a log is of a run: what it says of itself counts, for numbers change with the array."""
    marks = _MARK.findall(text)
    return marks[-1][2] == run if marks else log.endswith(f"_{number}.out") or "_" not in log


def last_words(log: str) -> str:
    """The message that a run ended with, or the last line of its log, but for what srun says after it."""
    _, ours, message = log.rpartition("adaptive-merge: ")
    if ours:
        return message.partition("\n")[0]
    lines = log.strip().splitlines()
    return next((line for line in reversed(lines) if not line.startswith("srun: ")), log.strip())
