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
from adaptive_merge.files import reserve, save_json

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
        if len(missing) or not table.values.shape[1]:  # the first batch may be a process's empty share
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
        self.values = torch.empty(size, 0)  # as wide as the rows from the first write on
        self.file: np.memmap | None = None
        # A task's name may be anything; its hash is a file name.
        stem = f"{kind}-{hashlib.sha256(task.encode()).hexdigest()[:16]}"
        self.paths = {suffix: folder / f"{stem}{suffix}" for suffix in (".json", ".f32", ".known")} if folder else {}
        if self.paths and self.paths[".json"].is_file():
            self._reuse(task, kind)

    def _reuse(self, task: str, kind: str) -> None:
        header = json.loads(self.paths[".json"].read_text())
        for what, wanted in {**self.identity, "images": self.size}.items():
            if header.get(what) != wanted:
                raise InputError(
                    f"{self.paths['.json']}: the cached {kind} outputs of task {task!r} are of another {what} "
                    f"({header.get(what)}, this run has {wanted}); choose another cache folder, or remove this one"
                )
        self._map(header["width"])
        known = np.fromfile(self.paths[".known"], dtype=bool) if self.paths[".known"].is_file() else np.zeros(0, bool)
        if len(known) == self.size:
            self.known = torch.from_numpy(known)

    def _map(self, width: int) -> None:
        path = self.paths[".f32"]
        reserve(path, self.size * width * 4)
        self.file = np.memmap(path, dtype=np.float32, mode="r+", shape=(self.size, width))
        self.values = torch.from_numpy(self.file)

    def write(self, position: Tensor, rows: Tensor) -> None:
        rows = rows.detach().float().cpu()
        if not self.values.shape[1] and self.paths:
            save_json(self.paths[".json"], {**self.identity, "images": self.size, "width": rows.shape[1]})
            self._map(rows.shape[1])
        elif not self.values.shape[1]:
            self.values = torch.empty(self.size, rows.shape[1])
        self.values[position] = rows
        self.known[position] = True

    def read(self, position: Tensor) -> Tensor:
        return self.values[position]

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()
            self.known.numpy().tofile(self.paths[".known"])
