"""Frozen means cached: what a frozen network says about an image is computed once and looked up by its index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.files import save_json

__all__ = ["FrozenOutputs"]

Compute = Callable[[Tensor], Tensor]


class FrozenOutputs:
    """One table of float32 rows per task and kind ("expert", "merged"), filled as images are first seen.

    Args:
        folder: where to keep the tables between runs, memory-mapped; default: in memory, for this run.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder) if folder else None
        self._tables: dict[tuple[str, str], _Table] = {}

    def rows(
        self, task: str, kind: str, identity: Mapping[str, str], size: int, index: Tensor, compute: Compute
    ) -> Tensor:
        """The rows [B, k] of the images at `index` [B] of `size` images.

        Args:
            task, kind: which table.
            identity: fingerprints of all that the rows depend on. In memory another identity starts the table
                anew; a table on disk with another identity is an error, for the folder is somebody else's.
            compute: positions in the batch, int64 [M] → their rows [M, k]; called for unknown images only.

        Raises:
            InputError: the folder holds this table for another expert, other data or another model.
        """
        table = self._tables.get((task, kind))
        if table is None or table.identity != identity:
            table = self._tables[task, kind] = _Table(task, kind, dict(identity), size, self.folder)
        position = index.cpu()
        missing = (~table.known[position]).nonzero().flatten()
        if len(missing) or table.values is None:  # the first batch may be a process's empty share
            table.write(position[missing], compute(missing.to(index.device)))
        return table.read(position).to(index.device)

    def flush(self) -> None:
        """Make what was computed last: rows first, then the notes of which rows are there."""
        for table in self._tables.values():
            table.flush()


class _Table:
    """Rows and the note of which are known. Two processes may share a file: they write equal rows."""

    def __init__(self, task: str, kind: str, identity: dict[str, str], size: int, folder: Path | None) -> None:
        self.identity, self.size = identity, size
        self.known = torch.zeros(size, dtype=torch.bool)
        self.values: np.ndarray | Tensor | None = None
        # A task's name may be anything; its hash is a file name.
        self.stem = folder / f"{kind}-{hashlib.sha256(task.encode()).hexdigest()[:16]}" if folder else None
        if self.stem and self._path(".json").is_file():
            self._reuse(task, kind)

    def _path(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    def _reuse(self, task: str, kind: str) -> None:
        header = json.loads(self._path(".json").read_text())
        for what, wanted in {**self.identity, "images": self.size}.items():
            if header.get(what) != wanted:
                raise InputError(
                    f"{self._path('.json')}: the cached {kind} outputs of task {task!r} are of another {what} "
                    f"({header.get(what)}, this run has {wanted}); choose another cache folder, or remove this one"
                )
        self._map(header["width"])
        known = np.fromfile(self._path(".known"), dtype=bool) if self._path(".known").is_file() else np.zeros(0, bool)
        if len(known) == self.size:
            self.known = torch.from_numpy(known)

    def _map(self, width: int) -> None:
        path = self._path(".f32")
        mode = "r+" if path.is_file() and path.stat().st_size == self.size * width * 4 else "w+"
        self.values = np.memmap(path, dtype=np.float32, mode=mode, shape=(self.size, width))

    def write(self, position: Tensor, rows: Tensor) -> None:
        rows = rows.detach().float().cpu()
        if self.values is None and self.stem:
            save_json(self._path(".json"), {**self.identity, "images": self.size, "width": rows.shape[1]})
            self._map(rows.shape[1])
        elif self.values is None:
            self.values = torch.empty(self.size, rows.shape[1])
        self.values[position if isinstance(self.values, Tensor) else position.numpy()] = rows
        self.known[position] = True

    def read(self, position: Tensor) -> Tensor:
        return (
            self.values[position]
            if isinstance(self.values, Tensor)
            else torch.from_numpy(self.values[position.numpy()])
        )

    def flush(self) -> None:
        if isinstance(self.values, np.memmap):
            self.values.flush()
            self.known.numpy().tofile(self._path(".known"))
