"""Frozen means cached: what a frozen network says about an image is computed once and looked up by its index."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.files import reserve, save_json
from adaptive_merge.sealed import load_sealed, save_sealed

__all__ = ["FrozenOutputs"]

_LOG = logging.getLogger(__name__)
_BLOCK: Final = 256  # rows under one checksum

Compute = Callable[[Tensor], Tensor]


class FrozenOutputs:
    """One table of float32 rows per task and kind ("expert", "merged"), filled as images are first seen.

    Rows that are read back have to be those that were written: what a checksum does not vouch for is computed anew,
    with a warning.

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
        missing = table.missing(position)
        if len(missing) or not table.values.shape[1]:  # the first batch may be a process's empty share
            table.write(position[missing], compute(missing.to(index.device)))
        return table.read(position).to(index.device)

    def forget(self, kind: str) -> None:
        """Start the tables of a kind anew when they are next asked for."""
        self._tables = {key: table for key, table in self._tables.items() if key[1] != kind}

    def flush(self) -> None:
        """Make what was computed last: rows first, then the notes of which rows are there."""
        for table in self._tables.values():
            table.flush()


class _Table:
    """Rows and the note of which are known, with a checksum of each block of them.

    Two processes may share a file: they write equal rows, but for the last bits, and the note of the last one holds.
    """

    def __init__(self, task: str, kind: str, identity: dict[str, str], size: int, folder: Path | None) -> None:
        self.identity, self.size, self.name = identity, size, f"{kind} outputs of task {task!r}"
        self.known = torch.zeros(size, dtype=torch.bool)
        self.values = torch.empty(size, 0)  # as wide as the rows from the first write on
        self.file: np.memmap | None = None
        self.damaged = False
        self.noted, self.sums = self.known, torch.zeros(0, dtype=torch.int64)
        self.unchecked = torch.zeros(-(-size // _BLOCK), dtype=torch.bool)  # blocks that were read back
        # A task's name may be anything; its hash is a file name.
        stem = f"{kind}-{hashlib.sha256(task.encode()).hexdigest()[:16]}"
        self.paths = {suffix: folder / f"{stem}{suffix}" for suffix in (".json", ".f32", ".note")} if folder else {}
        if self.paths and self.paths[".json"].is_file():
            self._reuse()

    def _reuse(self) -> None:
        header = _read_header(self.paths[".json"])
        for what, expected in {**self.identity, "images": self.size}.items():
            if header.get(what) != expected:
                raise InputError(
                    f"{self.paths['.json']}: the cached {self.name} are of another {what} "
                    f"({header.get(what)}, this run has {expected}); choose another cache folder, or remove this one"
                )
        data, bytes_ = self.paths[".f32"], self.size * header["width"] * 4
        whole = data.is_file() and data.stat().st_size == bytes_
        if self.paths[".note"].is_file():
            self._believe(whole)
        self._map(header["width"])

    def _believe(self, whole: bool) -> None:
        """Take over what the note says; blocks are checked when they are first asked for."""
        try:
            note = load_sealed(self.paths[".note"])[0]
            known, sums = note["known"].bool(), note["sums"]
            if not whole or (len(known), len(sums)) != (self.size, len(self.unchecked)):
                raise InputError("its file is not there or of another size")
        except (InputError, KeyError) as error:
            self._distrust(str(error))
        else:
            self.known, self.noted, self.sums = known, known.clone(), sums
            self.unchecked = torch.ones_like(self.unchecked)

    def _distrust(self, why: str) -> None:
        """One warning a table."""
        told, self.damaged = self.damaged, True
        if told:
            return
        _LOG.warning("%s: the cached %s are damaged (%s); computing them anew", self.paths[".f32"], self.name, why)

    def _map(self, width: int) -> None:
        path = self.paths[".f32"]
        reserve(path, self.size * width * 4)
        self.file = np.memmap(path, dtype=np.float32, mode="r+", shape=(self.size, width))
        self.values = torch.from_numpy(self.file)

    def missing(self, position: Tensor) -> Tensor:
        """Which of these rows, as places in `position`, are not known."""
        if bool(self.unchecked.any()):
            self._check(position)
        return (~self.known[position]).nonzero().flatten()

    def _check(self, position: Tensor) -> None:
        """Look at the blocks of these rows, where that has not been done; forget those that were changed."""
        blocks = (position // _BLOCK).unique()
        for block in blocks[self.unchecked[blocks]].tolist():
            self.unchecked[block] = False
            rows = slice(block * _BLOCK, (block + 1) * _BLOCK)
            if _checksum(self.values[rows][self.noted[rows]]) != int(self.sums[block]):
                self.known[rows] = False
                self._distrust(f"rows {rows.start} to {min(rows.stop, self.size) - 1} are not what was written")

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
            self._check(torch.arange(self.size))  # nothing is vouched for that was not looked at
            self.file.flush()
            parts = zip(self.values.split(_BLOCK), self.known.split(_BLOCK))
            sums = torch.tensor([_checksum(rows[known]) for rows, known in parts])
            save_sealed(self.paths[".note"], {"known": self.known.to(torch.uint8), "sums": sums}, {})


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text())
        if header["width"] > 0:
            return dict(header)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: not the header of a table of cached outputs; it is damaged, so remove the cache folder")


def _checksum(rows: Tensor) -> int:
    return zlib.crc32(rows.contiguous().numpy().data)
