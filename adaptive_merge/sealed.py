"""Our own small files: written atomically, and sealed by a digest over every byte, so that no change goes unseen."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.files import replacing

__all__ = ["SEAL", "load_sealed", "save_sealed", "seal", "unseal", "write_atomically"]

SEAL: Final = "sha256:" + "0" * 64
_SEAL: Final = re.compile(rb"sha256:[0-9a-f]{64}")


def seal(content: bytes) -> bytes:
    """`content`, in which `SEAL` occurs exactly once, with the digest of the whole in its place."""
    if content.count(SEAL.encode()) != 1:
        raise InputError(f"the text {SEAL!r} is reserved for the file's own digest; rename what contains it")
    return content.replace(SEAL.encode(), f"sha256:{hashlib.sha256(content).hexdigest()}".encode())


def unseal(content: bytes, path: str | Path) -> bytes:
    """`content` as it was before `seal`.

    Raises:
        InputError: a byte differs from what was written.
    """
    stored = _SEAL.search(content)
    blank = _SEAL.sub(SEAL.encode(), content, count=1)
    if stored is None or stored.group().decode() != f"sha256:{hashlib.sha256(blank).hexdigest()}":
        what = "its digest does not fit its content" if stored else "it has no digest"
        raise InputError(
            f"`{path}`: {what}; the file was cut short, changed or damaged on the way; write or copy it again"
        )
    return blank


def save_sealed(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whose metadata entry `seal` covers the whole file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, seal(safetensors_torch.save(plain, {**metadata, "seal": SEAL})))


def load_sealed(path: str | Path, old: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file of `save_sealed`.

    Args:
        path: of the file.
        old: take a file of an older version, which had no seal, as it is.
    """
    content = _read(path)
    if not old or _SEAL.search(content[: 8 + int.from_bytes(content[:8], "little")]):
        content = unseal(content, path)
    try:
        tensors = safetensors_torch.load(content)
        size = int.from_bytes(content[:8], "little")
        metadata = _metadata(content[8 : 8 + size])
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"`{path}`: not a readable safetensors file ({error}); write or copy it again") from error
    return tensors, metadata


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace the file in one step, see `files.replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MissingFileError(f"`{path}`: no such file") from error


def _metadata(header: bytes) -> dict[str, str]:
    metadata = json.loads(header)["__metadata__"]
    return {key: value for key, value in metadata.items() if key != "seal"}
