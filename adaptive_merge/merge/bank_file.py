"""A bank as a file that the processes of a node read together, and that one of them writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.process.locks import LockedError, in_turn

__all__ = ["code_of", "kept_bank", "kept_file", "written_bank"]

_ANEW = "remove it, and the next run writes it anew"


def kept_bank(bank: TaskVectors, folder: str | Path) -> TaskVectors:
    """The same bank, memory-mapped from a file in `folder` that is written where it is not there yet.

    Processes that map one file share its pages, so a node holds the bank once however many processes it runs, and
    may drop pages when memory is short. The file is named by the fingerprint of its content: a bank of other
    experts, or in another dtype, is another file.

    Raises:
        InputError: the file is damaged, or holds another bank than its name says.
    """
    path = _named(folder, bank.fingerprint)
    return _checked(kept_file(path, lambda: bank), path, bank.fingerprint)


def written_bank(fingerprint: str, folder: str | Path) -> TaskVectors | None:
    """What `kept_bank` has written into `folder` of the bank with this fingerprint; None where it has not.

    Raises:
        InputError: as in `kept_bank`.
    """
    path = _named(folder, fingerprint)
    return _checked(_mapped(path), path, fingerprint) if path.is_file() else None


def code_of(package: ModuleType) -> str:
    """sha256 of the Python files of a package: what it makes of the same files may change with them."""
    source = hashlib.sha256()
    for path in sorted(Path(package.__path__[0]).glob("*.py")):
        source.update(path.read_bytes())
    return source.hexdigest()


def _named(folder: str | Path, fingerprint: str) -> Path:
    return Path(folder) / f"bank-{fingerprint}.safetensors"


def _checked(mapped: TaskVectors, path: Path, fingerprint: str) -> TaskVectors:
    if mapped.fingerprint != fingerprint:
        raise InputError(f"{path}: it holds another bank than its name says; {_ANEW}")
    mapped.folder = path.parent
    return mapped


def kept_file(path: Path, make: Callable[[], TaskVectors], made_of: str = "") -> TaskVectors:
    """The bank in a file, memory-mapped; where there is none, it is made and written first, by one process of a node.

    The others wait for it, and make it themselves if it dies. The file appears whole.

    Args:
        path: of the file.
        make: gives the bank.
        made_of: what it is made of, for a bank whose fingerprint is not known before it is made.

    Raises:
        InputError: the file is damaged, or made of something else.
    """
    if not path.is_file():
        try:
            with in_turn(path.with_name(f".{path.name}.lock"), f"bank {path}"):
                for left_over in path.parent.glob(f".{path.name}.partial-*"):
                    left_over.unlink(missing_ok=True)  # of a process that died while it wrote
                if not path.is_file():
                    make().save(path, made_of)
        except LockedError:  # on another node, and the file system has no locks: both make it, and one's is kept
            make().save(path, made_of)
    mapped = _mapped(path)
    if mapped.made_of != made_of:
        raise InputError(f"{path}: it holds another bank than its name says; {_ANEW}")
    return mapped


def _mapped(path: Path) -> TaskVectors:
    try:
        return TaskVectors.load(path)
    except InputError as error:
        raise InputError(f"{error}; or {_ANEW}") from error
