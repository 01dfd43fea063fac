"""The journal of a run folder: the files that this program wrote there, so that no other is ever touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

from adaptive_merge.errors import InputError, StorageError
from adaptive_merge.files import observing

__all__ = ["JOURNAL", "KNOWN", "Journal", "recording"]

JOURNAL: Final = ".journal"
# What a run wrote before there was a journal.
KNOWN: Final = (
    *("config.yaml", "metrics.csv", "results.json", "coefficients.json", "report.html", "wandb.json"),
    *("history.safetensors", "diagnostics.safetensors", "images.safetensors", "checkpoints/last.ckpt"),
    *("start.safetensors", "start.partial.safetensors"),
)
# One of these, and a folder without a journal holds a run of an older version.
_OF_A_RUN: Final = ("results.json", "checkpoints/last.ckpt", "start.safetensors", "start.partial.safetensors")


class Journal:
    """One relative path a line, as JSON, written before the file itself is.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOURNAL
        self._root = folder.resolve()
        self.names = self._read()

    @property
    def files(self) -> list[Path]:
        """The files of the journal that are there."""
        return [path for path in (self.folder / name for name in sorted(self.names)) if path.is_file()]

    @property
    def foreign(self) -> list[Path]:
        """Files where a run would write that no run wrote."""
        others = (self.folder / name for name in KNOWN if name not in self.names)
        return [path for path in others if os.path.lexists(path)]

    def note(self, path: Path) -> None:
        """Add a file, if it lies in the folder and is not known."""
        place = path.parent.resolve() / path.name
        if not place.is_relative_to(self._root):
            return
        name = place.relative_to(self._root).as_posix()
        if name not in self.names:
            self._add([name])

    def begin(self) -> None:
        """Make the journal's file; a run of an older version gets one with what it wrote."""
        if not self.path.is_file():
            self._add([])

    def remove(self, keep: tuple[str, ...] = ()) -> None:
        """Remove the files of the journal but those named in `keep`, and folders that this leaves empty."""
        for path in self.files:
            if path.relative_to(self.folder).as_posix() not in keep:
                path.unlink(missing_ok=True)
        before, self.names = self.names, {name for name in keep if (self.folder / name).is_file()}
        self.path.unlink(missing_ok=True)
        self._add([])
        for parent in {(self.folder / name).parent for name in before} - {self.folder}:
            if parent.is_dir() and not any(parent.iterdir()):
                shutil.rmtree(parent, ignore_errors=True)

    def _add(self, names: list[str]) -> None:
        if not self.path.is_file():  # of a new run, or of one of an older version
            names = [*sorted(name for name in self.names if (self.folder / name).exists()), *names]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(f"\n{json.dumps(name)}" for name in names)  # after a line that a full disk cut
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written ({error.strerror or error}); make room, or choose another --run.root"
            ) from error
        self.names |= set(names)

    def _read(self) -> set[str]:
        if not self.path.is_file():
            return set(KNOWN) if any((self.folder / name).is_file() for name in _OF_A_RUN) else set()
        names = set()
        for line in self.path.read_text(errors="replace").splitlines():
            try:  # a full disk may have cut a line
                name = json.loads(line)
            except ValueError:
                continue
            if isinstance(name, str) and _inside(name):
                names.add(name)
        return names


@contextmanager
def recording(path: Path) -> Iterator[None]:
    """Note a file that a command writes into a run folder after the run; one that no run wrote is not replaced.

    Raises:
        InputError: the file is the user's own.
    """
    journal = Journal(path.parent)
    if path in journal.foreign and journal.path.is_file():
        raise InputError(f"{path} was not written by this program; choose another --output, or move it elsewhere")
    with observing(journal.note) if journal.path.is_file() else nullcontext():
        yield


def _inside(name: str) -> bool:
    """Whether a name stays in the folder: a journal may have been forged."""
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts
