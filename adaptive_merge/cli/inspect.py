"""`adaptive-merge inspect`: what is in a file or a run folder of ours, without Lightning."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.errors import InputError, MissingFileError, printable
from adaptive_merge.files import strict_json
from adaptive_merge.limits import check_header, read_json
from adaptive_merge.process.locks import holder
from adaptive_merge.runs.checkpoint import read_checkpoint
from adaptive_merge.runs.journal import Journal
from adaptive_merge.runs.measures import measures
from adaptive_merge.runs.reading import read_run
from adaptive_merge.runs.shown import table

__all__ = ["describe", "inspect"]

_TOLD = ("recipe", "seed", "steps", "trainable_parameters", "seconds", "peak_memory_bytes", "guard", "versions")
_LISTED = 12


def inspect(arguments: list[str]) -> None:
    """Say what is in a run folder, a checkpoint, a bank of task vectors or a safetensors file."""
    parser = Parser("adaptive-merge inspect", description=inspect.__doc__)
    parser.add_argument("path", help="a run folder, a .ckpt or a .safetensors file")
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON object, for machines")
    options = parser.parse_args(arguments)
    content = describe(options.path)
    if options.json:
        write(strict_json(content, indent=2, default=str))
    else:
        _show(content, Path(options.path))


def _show(content: dict[str, Any], path: Path) -> None:
    """As tables: accuracies of a finished run, and a row for each other fact or tensor."""
    facts, console = dict(content), Console()
    if "results" in facts:
        results = facts.pop("results")
        facts |= {name: results[name] for name in _TOLD if name in results}
        facts.pop("interference", None)
        with contextlib.suppress(InputError):
            console.print(table(read_run(path).results))
    view = Table("what", "found")
    for name, value in _rows(facts):
        view.add_row(Text(printable(name)), Text(printable(value)))
    console.print(view)


def _rows(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each plain value under the names that lead to it; of a long list its first entries."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _rows(value, f"{prefix}{key} · ")
        elif isinstance(value, list):
            more = f" … {len(value)} in all" if len(value) > _LISTED else ""
            yield f"{prefix}{key}", ", ".join(map(str, value[:_LISTED])) + more
        else:
            yield f"{prefix}{key}", f"{value:.4g}" if isinstance(value, float) else str(value)


def describe(path: str | Path) -> dict[str, Any]:
    """What a file or run folder of ours holds, as plain values.

    Raises:
        MissingFileError, InputError: there is nothing, or nothing that this program reads.
    """
    path = Path(path)
    if path.is_dir():
        return _describe_run(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such file or folder")
    return _describe_checkpoint(path) if path.suffix == ".ckpt" else _describe_safetensors(path)


def _describe_run(folder: Path) -> dict[str, Any]:
    results = folder / "results.json"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not results.is_file() and not checkpoint.is_file():
        raise InputError(f"{folder}: neither results.json nor checkpoints/last.ckpt is there; this is not a run folder")
    journal = Journal(folder)
    content: dict[str, Any] = {
        "run": str(folder),
        "files": sorted(str(path.relative_to(folder)) for path in journal.files),
    }
    if running := holder(folder / ".lock"):
        content["running"] = f"process {running['process']} on {running['host']}, since {running['since']}"
    if results.is_file():
        content["results"] = read_json(results, strict=False)
        content |= _measured(folder)
    if checkpoint.is_file():
        content["checkpoint"] = _describe_checkpoint(checkpoint)
    return content


def _measured(folder: Path) -> dict[str, Any]:
    """What follows from a finished run's numbers; nothing of files that only look like one."""
    try:
        run = read_run(folder)
        return {"measures": measures(run.merged), "interference": run.diagnostics and run.diagnostics.interference()}
    except (InputError, KeyError, TypeError, ValueError):
        return {}


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    tensors = {name: _statistics(value) for name, value in content["state_dict"].items()}
    return {"bytes": path.stat().st_size, "step": content["global_step"], "tensors": tensors} | content[
        "adaptive_merge"
    ]


def _describe_safetensors(path: Path) -> dict[str, Any]:
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: _plain(value) for key, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in tensors.items()}
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    return {"bytes": path.stat().st_size, "metadata": metadata, "tensors": shapes}


def _statistics(tensor: torch.Tensor) -> str:
    values = tensor.float()
    return f"{list(tensor.shape)} mean {values.mean():.4f} min {values.min():.4f} max {values.max():.4f}"


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
