"""Reading the checkpoints of our own runs: tensors and plain values only, never code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptive_merge.runs.checkpoint_io import load_plain
from adaptive_merge.errors import InputError, MissingFileError

__all__ = ["read_checkpoint"]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a `last.ckpt`, on the CPU.

    Raises:
        MissingFileError: no such file.
        InputError: damaged, not a checkpoint of this program, or holding more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such checkpoint; give the path of a run's checkpoints/last.ckpt")
    content = load_plain(path, path)
    if not isinstance(content, dict) or not {"state_dict", "global_step", "adaptive_merge"} <= content.keys():
        raise InputError(f"{path}: not a checkpoint of an adaptive_merge run")
    return content
