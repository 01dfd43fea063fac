"""`merge` and `inspect`: commands that need no trainer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open

from adaptive_merge.cli.doctor import doctor
from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.files import save_tensors
from adaptive_merge.runs.checkpoint import read_checkpoint

__all__ = ["COMMANDS", "describe"]


def _merge(arguments: list[str]) -> None:
    """Write the merged weights of a run or of a configuration as safetensors."""
    parser = argparse.ArgumentParser("adaptive-merge merge", description=_merge.__doc__)
    parser.add_argument(
        "source", help="a run folder (adapted merge), or a YAML configuration (the merge that it starts from)"
    )
    parser.add_argument("--output", default="merged.safetensors", help="file to write (default: merged.safetensors)")
    options = parser.parse_args(arguments)
    # Here, because the command line imports this module.
    from adaptive_merge.cli.fit import load_run

    module = load_run(options.source)
    metadata = {
        "recipe": module.recipe,
        "tasks": json.dumps(module.tasks),
        "experts": json.dumps(module.merged_fingerprints),
    }
    tensors = module.merged_state_dict()
    save_tensors(options.output, tensors, metadata)
    _say(f"wrote {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} entries, to {options.output}")


def _inspect(arguments: list[str]) -> None:
    """Say what is in a run folder, a checkpoint, a bank of task vectors or a safetensors file."""
    parser = argparse.ArgumentParser("adaptive-merge inspect", description=_inspect.__doc__)
    parser.add_argument("path", help="a run folder, a .ckpt or a .safetensors file")
    _say(json.dumps(describe(parser.parse_args(arguments).path), indent=2))


def _report(arguments: list[str]) -> None:
    """Write one HTML file about a run, or about several side by side."""
    from adaptive_merge.cli.report import report_command  # here, because matplotlib takes a second to import

    report_command(arguments)


def _export(arguments: list[str]) -> None:
    """Write a run's adapted model for open_clip, Hugging Face, ONNX Runtime or as safetensors."""
    from adaptive_merge.cli.export import export_command  # here, because it imports the module of all parts

    export_command(arguments)


def _data(arguments: list[str]) -> None:
    """Say whether a suite's data is there."""
    from adaptive_merge.cli.data import data_command  # here, because it imports torchvision's data sets

    data_command(arguments)


def _tune(arguments: list[str]) -> None:
    """Run `fit` over a grid of settings and rank the runs without labels."""
    from adaptive_merge.cli.tune import tune_command  # here, because it imports the command line, which imports this

    tune_command(arguments)


def _choose(arguments: list[str]) -> None:
    """Rank finished runs by a criterion that needs no labels."""
    from adaptive_merge.cli.choose import choose_command  # here, because matplotlib takes a second to import

    choose_command(arguments)


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
    found: dict[str, Any] = {
        "run": str(folder),
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()),
    }
    if results.is_file():
        found["results"] = json.loads(results.read_text())
    if checkpoint.is_file():
        found["checkpoint"] = _describe_checkpoint(checkpoint)
    return found


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    tensors = {name: _statistics(value) for name, value in content["state_dict"].items()}
    return {"bytes": path.stat().st_size, "step": content["global_step"], "tensors": tensors} | content[
        "adaptive_merge"
    ]


def _describe_safetensors(path: Path) -> dict[str, Any]:
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


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "merge": _merge,
    "inspect": _inspect,
    "report": _report,
    "doctor": doctor,
    "export": _export,
    "data": _data,
    "tune": _tune,
    "choose": _choose,
}
