"""`AtomicCheckpointIO`: the newest checkpoint is always a whole one, wherever the process was killed."""

from __future__ import annotations

import io
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from adaptive_merge.errors import InputError, MissingFileError, StorageError
from adaptive_merge.files import replacing
from adaptive_merge.process.locks import alive
from adaptive_merge.runs.checkpoint import load_plain

__all__ = ["AtomicCheckpointIO", "StorageError", "check_writable", "nearest", "remove_orphans"]

_log = logging.getLogger(__name__)
_PARTIAL = re.compile(r"^\..+\.partial-(\d+)$")
# A process id may have been given to another program since: after this long nobody is still writing kilobytes.
_STALE_SECONDS = 3600


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint plugin, for local and network file systems.

    A save writes to a temporary file in the same folder, flushes it to the disk, reads it back, and only then
    renames it over the previous checkpoint. Lightning's own goes through the temporary folder, which is a plain
    copy where that is on another device. A load takes tensors and plain values only, never code, and no URLs.
    """

    def __init__(self) -> None:
        self._swept: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` so that `path` is the old or the new one at any moment.

        Raises:
            StorageError: the file cannot be written; the previous one is untouched.
            InputError: the checkpoint holds more than tensors and plain values, or `path` is a URL.
        """
        path = _local(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        load_plain(buffer, path)
        try:
            self._sweep(path.parent)
            with replacing(path) as partial:
                _write_and_verify(partial, buffer.getbuffer())
        except OSError as error:
            raise StorageError(
                f"{path}: the checkpoint cannot be written ({_reason(error)}); the previous one is untouched. "
                "Make room, or choose another --run.root"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The content of `path` on the CPU, with `weights_only=True` whatever the caller says.

        Raises:
            MissingFileError: there is no such file.
            InputError: a URL, a damaged file, or one that holds more than tensors and plain values.
        """
        path = _local(path)
        if not path.is_file():
            raise MissingFileError(f"{path}: there is no such checkpoint")
        self._sweep(path.parent)
        return load_plain(path, path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint file, if it is there."""
        _local(path).unlink(missing_ok=True)

    def _sweep(self, folder: Path) -> None:
        """What a killed process left in this folder, once per folder: from then on partial files are our own."""
        if folder not in self._swept:
            self._swept.add(folder)
            remove_orphans(folder)


def remove_orphans(folder: str | Path) -> list[Path]:
    """Delete the partial files of processes that are gone; returns them. Call before this process writes there."""
    found = []
    for path in sorted(Path(folder).glob(".*.partial-*")):
        match = _PARTIAL.match(path.name)
        if match and _abandoned(path, int(match[1])):
            path.unlink(missing_ok=True)
            found.append(path)
    if found:
        _log.info("removed %d partial files of processes that are gone from %s", len(found), folder)
    return found


@rank_zero_only
def check_writable(folder: str | Path) -> None:
    """StorageError, before any work is done, where no file can be written and renamed in `folder`.

    Of a folder that is not there yet, its nearest parent is tried; nothing is left behind.
    """
    existing = nearest(folder)
    probe = existing / f".writable-{os.getpid()}"
    try:
        with replacing(probe) as partial:
            partial.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written to ({_reason(error)}); choose another --run.root") from error


def nearest(folder: str | Path) -> Path:
    """The folder itself, or the first of its parents that exists."""
    folder = Path(folder).absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _reason(error: OSError) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return cause.strerror or str(cause)


def _abandoned(path: Path, process: int) -> bool:
    # In a container every start has the same process id: a partial file with ours is of an earlier start.
    if process == os.getpid() or not alive(process):
        return True
    try:
        return time.time() - path.stat().st_mtime > _STALE_SECONDS
    except FileNotFoundError:
        return False


def _write_and_verify(partial: Path, content: memoryview) -> None:
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if partial.read_bytes() != content:
        raise OSError(f"what was read back from {partial} is not what was written")


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise InputError(f"{path}: checkpoints are read from and written to files, not URLs; download it first")
    return Path(path)
