"""Keeping a start's progress in one file, so that a start that was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.sealed import load_sealed, save_sealed

__all__ = ["FileStore"]

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
