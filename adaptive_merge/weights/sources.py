"""`read_weights`: from what a user names (file, folder, `local-dir:`, `hf-hub:`, hub id) to a tower."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Final

from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.weights import huggingface, lora, open_clip  # noqa: F401 (importing a format makes it known)
from adaptive_merge.weights.manifest import Manifest, Weights
from adaptive_merge.weights.reader import Reader

__all__ = ["is_adapter", "locate", "read_weights", "reader_of"]

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES: Final = (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".safetensors", ".json")


def read_weights(
    path_or_id: str | Path,
    *,
    quick_gelu: bool | None = None,
    revision: str | None = None,
    base: Weights | None = None,
) -> Weights:
    """The image tower in a file, folder or hub repository, as float32 tensors under open_clip's names.

    Args:
        path_or_id: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.pkl` file (state dict, whole CLIP, or a whole
            pickled model, of which nothing is run), an open_clip or Hugging Face folder, a LoRA adapter as PEFT
            saves it, `local-dir:<folder>`, `hf-hub:<org>/<name>[@revision]` or a hub id.
        quick_gelu: the activation of the tower where the file cannot say it; True for OpenAI's weights and
            everything fine-tuned from them.
        revision: commit, tag or branch of a hub repository.
        base: the pre-trained tower, for forms that hold a difference to it.

    Raises:
        MissingFileError, InputError: naming the file, the tensor, what was expected, found, and the remedy.
    """
    path, origin = locate(str(path_or_id), revision)
    weights = reader_of(path).read(path, base)
    stated = weights.manifest.filled(
        Manifest("quick_gelu=", quick_gelu=quick_gelu),
        "leave out `quick_gelu=`, or correct the configuration, since the wrong one only shows as low accuracy",
    )
    manifest = dataclasses.replace(stated.filled(origin, ""), source=str(path_or_id))
    return Weights(weights.tensors, manifest, weights.changes)


def is_adapter(source: str) -> bool:
    """Whether what a user names is a LoRA adapter."""
    return lora.Lora().accepts(locate(source)[0])


def reader_of(path: Path) -> Reader:
    """The reader of a file or folder.

    Raises:
        InputError: its form is not known.
    """
    for kind in Reader.kinds:
        reader = kind()
        if reader.accepts(path):
            return reader
    expected = ", or ".join(kind.expects for kind in Reader.kinds)
    raise InputError(f"`{path}`: expected {expected}; found {sorted(entry.name for entry in path.iterdir())[:8]}")


def locate(source: str, revision: str | None = None) -> tuple[Path, Manifest]:
    """The file or folder behind a name, downloaded where it is a hub's, and what is known of where it is from.

    Raises:
        MissingFileError: nothing is there.
    """
    kind, _, rest = source.partition(":")
    if kind == "hf-hub":
        return _hub(rest, revision)
    path = Path(os.path.expanduser(rest if kind == "local-dir" else source))  # pathlib's raises without a home
    if kind == "local-dir" and not path.is_dir():
        raise MissingFileError(f"`{path}`: no such folder; `local-dir:` takes the path of an open_clip folder")
    if path.is_dir() or path.is_file():
        return path, Manifest(source)
    if _HUB_ID.fullmatch(source) and not source.endswith(_FILE_SUFFIXES) and not path.parent.exists():
        return _hub(source, revision)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise MissingFileError(f"`{path}`: no such file or folder{did_you_mean(path.name, siblings)}")


def _hub(name: str, revision: str | None) -> tuple[Path, Manifest]:
    repository, _, stated = name.partition("@")
    pinned = revision or stated or None
    folder = huggingface.snapshot(repository, pinned)
    note = f"revision not pinned; this was {folder.name}, pass `revision={folder.name!r}`"
    return folder, Manifest(name, revision=folder.name, notes=() if pinned else (note,))
