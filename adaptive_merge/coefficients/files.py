"""Merging coefficients as files: ours (by name, sealed), and the three published kinds (by row).

A published table has one row or column per tensor in the order of somebody's state dict. Here every coefficient
carries the name of its parameter: `{task: {parameter name: λ}}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.sealed import SEAL, load_sealed, save_sealed, seal, unseal, write_atomically

__all__ = ["Coefficients", "load_coefficients", "save_coefficients"]

Coefficients = dict[str, dict[str, float]]

FORMAT: Final = "adaptive_merge.coefficients"
VERSION: Final = 1


def save_coefficients(
    path: str | Path,
    coefficients: Mapping[str, Mapping[str, float]],
    *,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write coefficients by name, atomically and sealed; kilobytes.

    Args:
        path: ends in `.safetensors` (λ as float64) or `.json` (readable by people).
        coefficients: the same parameter names for every task.
        notes: anything to keep with them (recipe, experts' hashes …), text to text.
    """
    names = _check(coefficients, str(path))
    path, header = Path(path), {"format": FORMAT, "version": VERSION, "notes": dict(notes or {})}
    if path.suffix == ".json":
        content = {
            **header,
            "seal": SEAL,
            "coefficients": {task: dict(row) for task, row in coefficients.items()},
        }
        write_atomically(path, seal(json.dumps(content, indent=1).encode()))
    elif path.suffix == ".safetensors":
        table = [[float(row[name]) for name in names] for row in coefficients.values()]
        header |= {"tasks": list(coefficients), "names": names}
        save_sealed(path, {"coefficients": torch.tensor(table, dtype=torch.float64)}, {FORMAT: json.dumps(header)})
    else:
        raise InputError(f"`{path}`: expected a path that ends in .safetensors or .json, found {path.suffix!r}")


def load_coefficients(path: str | Path) -> Coefficients:
    """What `save_coefficients` wrote, `{task: {parameter name: λ}}`, bit for bit.

    Raises:
        MissingFileError, InputError: not there, not ours, or changed since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"`{path}`: no such file; expected coefficients (.safetensors or .json)")
    try:
        rows = _load_json(path) if path.suffix == ".json" else _load_safetensors(path)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"`{path}`: not a file of coefficients ({error!r}); expected one written by `save_coefficients`"
        ) from error
    _check(rows, str(path))
    return rows


def _load_json(path: Path) -> Coefficients:
    content = json.loads(unseal(path.read_bytes(), path))
    _check_header(content, path)
    return {
        str(task): {str(name): float(value) for name, value in row.items()}
        for task, row in content["coefficients"].items()
    }


def _load_safetensors(path: Path) -> Coefficients:
    tensors, metadata = load_sealed(path)
    header = json.loads(metadata[FORMAT])
    _check_header(header, path)
    table = tensors["coefficients"].tolist()
    if len(table) != len(header["tasks"]) or any(len(row) != len(header["names"]) for row in table):
        raise InputError(f"`{path}`: table and names differ in size; write the file again")
    return {task: dict(zip(header["names"], row)) for task, row in zip(header["tasks"], table)}


def _check_header(header: dict[str, object], path: Path) -> None:
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise InputError(
            f"`{path}`: expected format {FORMAT!r} version {VERSION}, found {header.get('format')!r} version "
            f"{header.get('version')!r}; read it with the version of the program that wrote it"
        )


def _check(coefficients: Mapping[str, Mapping[str, float]], path: str) -> Sequence[str]:
    """The parameter names, after refusing empty tables, tasks with different names, and NaN."""
    if not coefficients or not all(coefficients.values()):
        raise InputError(f"`{path}`: expected coefficients for at least one task and one parameter, found none")
    names = list(next(iter(coefficients.values())))
    for task, row in coefficients.items():
        if list(row) != names:
            other = sorted(set(row) ^ set(names)) or ["the order"]
            raise InputError(f"`{path}`: task {task!r} has other parameter names than the first task: {other[:3]}")
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise InputError(f"`{path}`: task {task!r}, parameter `{bad[0]}`: expected a number, found {row[bad[0]]}")
    return names
