"""A bank that the processes of a node build once: one reads the experts, the others map what it has written."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from adaptive_merge import merge, weights
from adaptive_merge.data.sources import identity_of_files
from adaptive_merge.errors import InputError, StorageError
from adaptive_merge.files import save_json, sparing
from adaptive_merge.limits import read_json
from adaptive_merge.merge.bank_file import code_of, kept_bank, written_bank
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.process.locks import LockedError, in_turn

__all__ = ["shared_bank"]

Notes = Mapping[str, Sequence[str]]
_SETTLED_SECONDS: Final = 2
"""A file that is younger may change again without another time: clocks of file systems are coarse."""


def shared_bank(
    folder: str | Path | None, sources: Sequence[str], settings: Any, build: Callable[[], tuple[TaskVectors, Notes]]
) -> tuple[TaskVectors, Notes]:
    """What `build` gives; with a folder, the bank mapped from a file there, and built by one process of the node.

    A note `sources-<sha256>.json` in the folder says which bank file the sources come to. It is named by their paths,
    sizes and times of change, by the settings, and by this package's code that reads them; their content is looked at
    when the bank is built. Where sources are fetched or a moment old, nothing is noted, and each process builds.

    Args:
        folder: of `kept_bank`; None: nothing is kept.
        sources: files and folders that the bank is made of.
        settings: what else it follows from, as JSON has it.
        build: the bank, and what its readers have to say.

    Raises:
        InputError: the bank file is damaged; what `build` raises.
    """
    if folder is None:
        return build()
    identity = _identity(sources, settings)
    if identity is None:
        return _built(folder, build)
    path = Path(folder) / f"sources-{identity}.json"
    if found := _found(path):
        return found
    with ExitStack() as stack:
        with suppress(LockedError, StorageError):  # of another node without locks, or a folder that can only be read
            stack.enter_context(in_turn(path.with_name(f".{path.name}.lock"), f"bank of {path}"))
        if found := _found(path):
            return found
        bank, notes = _built(folder, build)
        if _identity(sources, settings) == identity:
            with sparing(path):
                save_json(path, {"bank": bank.fingerprint, "notes": {name: list(own) for name, own in notes.items()}})
        return bank, notes


def _built(folder: str | Path, build: Callable[[], tuple[TaskVectors, Notes]]) -> tuple[TaskVectors, Notes]:
    bank, notes = build()
    return kept_bank(bank, folder), notes


def _found(path: Path) -> tuple[TaskVectors, Notes] | None:
    """The bank and the notes that a file of ours tells of; None where it or the bank is not there, or it is damaged."""
    try:
        content = read_json(path) if path.is_file() else {}
        fingerprint, notes = str(content["bank"]), {name: list(own) for name, own in content["notes"].items()}
    except (InputError, KeyError, TypeError, AttributeError):
        return None
    bank = written_bank(fingerprint, path.parent)
    return None if bank is None else (bank, notes)


def _identity(sources: Sequence[str], settings: Any) -> str | None:
    """Of what the bank is made of; None where files do not tell: of a hub, or changed this moment."""
    paths = [Path(source.removeprefix("local-dir:")) for source in sources]
    if not all(path.exists() for path in paths):
        return None
    files = [file.resolve() for path in paths for file in _files(path)]
    if max((file.stat().st_mtime for file in files), default=time.time()) > time.time() - _SETTLED_SECONDS:
        return None
    parts = [identity_of_files(Path(files[0].anchor), files), settings, [code_of(part) for part in (merge, weights)]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
