"""A bank as a file that the processes of a node read together."""

from __future__ import annotations

from pathlib import Path

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["kept_bank"]


def kept_bank(bank: TaskVectors, folder: str | Path) -> TaskVectors:
    """The same bank, memory-mapped from a file in `folder` that is written where it is not there yet.

    Processes that map one file share its pages, so a node holds the bank once however many processes it runs, and
    may drop pages when memory is short. The file is named by the fingerprint of its content: a bank of other
    experts, or in another dtype, is another file. Several processes may write it at once; the file appears whole.

    Raises:
        InputError: the file is damaged, or holds another bank than its name says.
    """
    path = Path(folder) / f"bank-{bank.fingerprint}.safetensors"
    if not path.is_file():
        bank.save(path)
    try:
        mapped = TaskVectors.load(path)
    except InputError as error:
        raise InputError(f"{error}; or remove it, and the next run writes it anew") from error
    if mapped.fingerprint != bank.fingerprint:
        raise InputError(
            f"{path}: it holds another bank than its name says; remove it, and the next run writes it anew"
        )
    return mapped
