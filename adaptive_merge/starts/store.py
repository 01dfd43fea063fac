"""Keeping a start's progress in one file, so that a start that was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.sealed import load_sealed, save_sealed

__all__ = ["FileStore", "SharedStore"]

_KEY = "adaptive_merge.start"


class FileStore:
    """One safetensors file, replaced after each block.

    What another start left there is not read: method, settings, bank and anchor have to be the same.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def load(self, identity: str) -> tuple[int, dict[str, Tensor]] | None:
        """Blocks done and the tensors after them; None without a file, or where it is another start's.

        Raises:
            InputError: the file is damaged.
        """
        if not self.path.is_file():
            return None
        try:
            tensors, metadata = load_sealed(self.path, old=True)
            header = json.loads(metadata[_KEY])
        except (KeyError, ValueError) as error:
            raise InputError(f"{self.path}: not the progress of a start ({error}); delete it to begin anew") from error
        return (header["done"], tensors) if header["identity"] == identity else None

    def save(self, identity: str, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file."""
        save_sealed(self.path, dict(tensors), {_KEY: json.dumps({"identity": identity, "done": done})})


class SharedStore:
    """The first process's file, for all processes of a run: what is solved is the same on all of them.

    Args:
        file: which the first process reads and writes.
        first: whether this is that process.
        broadcast: hands on what the first process has; called by all.
    """

    def __init__(self, file: FileStore, first: bool, broadcast: Callable[[Any], Any]) -> None:
        self.file, self.first, self.broadcast = file, first, broadcast

    def load(self, identity: str) -> tuple[int, dict[str, Tensor]] | None:
        """As `FileStore.load`, on all processes at once.

        Raises:
            InputError: the first process's file is damaged.
        """
        kept: tuple[int, dict[str, Tensor]] | InputError | None = None
        if self.first:
            try:
                kept = self.file.load(identity)
            except InputError as error:
                kept = error
        kept = self.broadcast(kept)
        if isinstance(kept, InputError):
            raise kept
        return kept

    def save(self, identity: str, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file."""
        if self.first:
            self.file.save(identity, done, tensors)
