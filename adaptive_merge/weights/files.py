"""One file of tensors: safetensors, or anything that `torch.save` and `pickle.dump` have written."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.limits import TENSOR_NAME, TENSORS, LimitError, check_header
from adaptive_merge.weights.headers import without_numbers
from adaptive_merge.weights.manifest import Manifest, Weights
from adaptive_merge.weights.modules import facts_of_module, named_records
from adaptive_merge.weights.reader import Loader, Reader, assemble
from adaptive_merge.weights.torch_files import open_torch_file

__all__ = ["File", "open_entries", "read_files"]

# A safetensors type → torch's, as the first tensor of each has told: a slice costs a thousand times its description.
_DTYPES: dict[str, torch.dtype] = {}


class File(Reader):
    """A file by itself: a state dict, a whole CLIP, or a whole pickled model, of which nothing is run."""

    expects = "a .safetensors, .pt, .pth, .bin or .pkl file"

    def accepts(self, path: Path) -> bool:
        return path.is_file()

    def read(self, path: Path, base: Weights | None = None) -> Weights:
        return read_files([path], path)


def read_files(files: list[Path], path: Path, statements: Sequence[Manifest] = (), format: str = "") -> Weights:
    """The tower whose tensors lie in these files.

    Args:
        path: how messages call it.
        statements: of the tower, beside those of the files.
        format: default: as the file is.
    """
    loaders: dict[str, Loader] = {}
    statements = [*statements]
    for file in files:
        entries, form, statement = open_entries(file)
        loaders |= entries
        statements.append(statement)
    return assemble(loaders, statements, path, files, format or form)


def open_entries(path: Path) -> tuple[dict[str, Loader], str, Manifest]:
    """Every named tensor of a file as a loader, the file's format, and what the file itself states of the tower."""
    if _is_safetensors(path):
        return _open_safetensors(path)
    file = open_torch_file(path)
    records = named_records(file)
    loaders = {name: _torch_loader(file.tensor, record, name) for name, record in records.items()}
    whole = not isinstance(file.root, dict)
    return loaders, f"{file.kind} {'module' if whole else 'state dict'}", facts_of_module(file)


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors":
        return True
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= path.stat().st_size


def _open_safetensors(path: Path) -> tuple[dict[str, Loader], str, Manifest]:
    check_header(path)
    try:
        file = safe_open(path, framework="pt")
        names, metadata = list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"`{path}`: not a readable safetensors file ({error}); it is damaged, so copy or download it again"
        ) from error
    if len(names) > TENSORS or max(map(len, names), default=0) > TENSOR_NAME:
        raise LimitError(
            f"`{path}`: refused, more than {TENSORS:,} tensors, or a name of more than {TENSOR_NAME} characters"
        )
    loaders = {name: _safetensors_loader(file, name) for name in names}
    return loaders, "safetensors", Manifest.from_metadata(metadata, path)


def _torch_loader(load: Callable[[Any, str], Tensor], record: Any, name: str) -> Loader:
    return lambda: load(record, name)


def _safetensors_loader(file: Any, name: str) -> Loader:
    return lambda: _outline(file, name) if without_numbers() else file.get_tensor(name)


def _outline(file: Any, name: str) -> Tensor:
    """The tensor without its numbers, but for a scalar, which is no more than its header."""
    part = file.get_slice(name)
    shape, kind = part.get_shape(), part.get_dtype()
    if kind not in _DTYPES:
        _DTYPES[kind] = (part[:0] if shape else file.get_tensor(name)).dtype
    return torch.empty(shape, dtype=_DTYPES[kind], device="meta")
