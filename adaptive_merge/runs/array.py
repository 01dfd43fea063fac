"""An array of runs in one folder: which cells it has, and how far each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.files import save_json
from adaptive_merge.limits import read_json
from adaptive_merge.process.locks import holder
from adaptive_merge.runs.journal import Journal

__all__ = ["ARRAY", "STARTED", "STATES", "Cell", "last_words", "read_array", "save_array"]

ARRAY: Final = "array.json"
SCHEMA: Final = 1
STARTED: Final = "== adaptive-merge on %s, start %s =="
"""What a job says first, with host and number of the start."""
STATES: Final = ("finished", "running", "stopped", "failed", "missing")
_STOPPED: Final = "told to stop"  # as `cli.stopped` says it


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
    return [_cell(number, name, path.parent, place) for number, (name, place) in enumerate(cells)]


def _cell(number: int, name: str, array: Path, place: str) -> Cell:
    folder = array / place
    if running := holder(folder / ".lock"):
        note = f"process {running.get('process')} on {running.get('host')}, since {running.get('since')}"
        return Cell(number, name, folder, "running", note)
    if (folder / "results.json").is_file():
        return Cell(number, name, folder, "finished")
    log = _log(array, number)
    if log is None:
        begun = bool(Journal(folder).files)
        return Cell(number, name, folder, "stopped" if begun else "missing", "" if begun else "never started")
    _, mark, told = log.rpartition(STARTED.partition("%s")[0])
    host, _, said = told.partition(",")
    said = said.partition("\n")[2] if mark else log
    if not said.strip():
        return Cell(number, name, folder, "running", f"starting on {host}" if mark else "starting")
    words = last_words(said)
    return Cell(number, name, folder, "stopped" if words.startswith(_STOPPED) else "failed", words)


def _log(array: Path, number: int) -> str | None:
    """What the newest job of a cell has said."""
    logs = [*array.glob(f"slurm-*_{number}.out"), *(path for path in array.glob("slurm-*.out") if "_" not in path.name)]
    return max(logs, key=lambda path: path.stat().st_mtime).read_text(errors="replace") if logs else None


def last_words(log: str) -> str:
    """The message that a run ended with, or the last line of its log, but for what srun says after it."""
    _, ours, message = log.rpartition("adaptive-merge: ")
    if ours:
        return message.partition("\n")[0]
    lines = log.strip().splitlines()
    return next((line for line in reversed(lines) if not line.startswith("srun: ")), log.strip())
