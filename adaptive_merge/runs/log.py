"""The CSV log that every run has; a resumed run goes on with the rows that it had."""

from __future__ import annotations

import csv
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment

from adaptive_merge.files import note, sparing

__all__ = ["RunLog"]

_LOG = logging.getLogger(__name__)


class RunLog(CSVLogger):
    """`metrics.csv` straight in the run folder.

    Lightning's logger deletes the file that it finds. Here the rows before `resumed_at` stay; later ones, which
    the interrupted run logged after its last checkpoint, are logged again.

    Args:
        folder: the run folder.
        resumed_at: step of the checkpoint that the run goes on from; 0 for a new run.
    """

    def __init__(self, folder: Path, resumed_at: int = 0) -> None:
        super().__init__(folder.parent, name=folder.name, version="", flush_logs_every_n_steps=1)
        self._resumed_at, self._started = resumed_at, False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, which starts with the rows that are kept."""
        if self._started:
            return super().experiment
        rows = self._rows_before()  # before the writer deletes the file
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*exists and is not empty.*")
            writer = super().experiment
        writer.metrics, self._started = rows, True
        return writer

    def save(self) -> None:
        """Append the rows since the last time; where that fails they wait, and the run goes on."""
        path = Path(self.log_dir) / "metrics.csv"
        with sparing(path):
            if self._experiment is not None and self._experiment.metrics:
                note(path)
            before = path.stat().st_size if path.is_file() else 0
            try:
                super().save()
            except OSError:
                _cut(path, before)
                raise

    def _rows_before(self) -> list[dict[str, str]]:
        path = Path(self.log_dir) / "metrics.csv"
        if not self._resumed_at or not path.is_file():
            return []
        rows = []
        try:
            with path.open(newline="") as file:
                rows += ({key: value for key, value in row.items() if key and value} for row in csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            _LOG.warning("%s is damaged: only what comes before is kept (%s)", path, error)
        # A killed process may have left half a line.
        return [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) < self._resumed_at]


def _cut(path: Path, size: int) -> None:
    """Take back a row that was written in part."""
    if path.is_file() and path.stat().st_size > size:
        os.truncate(path, size)
