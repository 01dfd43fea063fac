"""Reading the checkpoints of our own runs: tensors and plain values only, never code."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.weights.pickles import read_pickle_stream

__all__ = ["load_plain", "read_checkpoint"]


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
    kinds = {"state_dict": dict, "global_step": int, "epoch": int, "adaptive_merge": dict}
    fits = isinstance(content, dict) and all(isinstance(content.get(key), kind) for key, kind in kinds.items())
    if not fits or content["global_step"] < 0 or not _holds_tensors(content["state_dict"]):
        raise InputError(f"{path}: not a checkpoint of an adaptive_merge run")
    return content


def _holds_tensors(state: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())


def load_plain(source: str | Path | io.BytesIO, path: str | Path) -> Any:
    """The content of a file of `torch.save`, on the CPU: tensors and plain values, and no byte of them changed.

    Args:
        source: the file, or its bytes.
        path: its name, for messages.

    Raises:
        InputError: damaged, or holding more than tensors and plain values.
    """
    try:
        return torch.load(_checked(source), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, some of them undocumented, for damaged files
        raise InputError(f"{path}: not a readable checkpoint of tensors and plain values ({error})") from error


def _checked(source: str | Path | io.BytesIO) -> io.BytesIO:
    """The same zip, packed anew from records that are as they were written.

    `torch.save` writes a checksum of each record and `torch.load` does not look at it; and it does not find its way
    through a damaged directory as others do, so it gets a new one. Its unpickler runs no code, but takes any time and
    memory that a pickle asks for, so ours reads it first.
    """
    packed = io.BytesIO()
    size = source.getbuffer().nbytes if isinstance(source, io.BytesIO) else Path(source).stat().st_size
    with zipfile.ZipFile(source) as written, zipfile.ZipFile(packed, "w") as new:
        if sum(record.file_size for record in written.infolist()) > size:
            raise ValueError("its records overlap")
        for record in written.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {record.filename!r} is compressed; torch.save stores without compression")
            content = written.read(record)
            if record.filename.endswith("/data.pkl"):
                read_pickle_stream(io.BytesIO(content), record.filename)
            new.writestr(record.filename, content)
    packed.seek(0)
    return packed
