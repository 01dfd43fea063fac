"""`adaptive-merge export`: a run in, a folder that other libraries load out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from adaptive_merge.cli.fit import load_run
from adaptive_merge.export.formats import FORMATS
from adaptive_merge.export.model import export_model
from adaptive_merge.export.verify import IMAGES

__all__ = ["export_command"]


def export_command(arguments: list[str]) -> None:
    """Write the adapted model of a run as a folder for open_clip, Hugging Face, ONNX Runtime or plain safetensors."""
    parser = argparse.ArgumentParser("adaptive-merge export", description=export_command.__doc__)
    parser.add_argument("run", help="a run folder, or a YAML configuration (the merge that it starts from)")
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="what to write")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist yet")
    parser.add_argument(
        "--task", help="this task's own model, tints folded in; default: the merge that all tasks share"
    )
    parser.add_argument("--text", help="open_clip only: a full CLIP whose text tower the folder is to have")
    parser.add_argument("--verify", action="store_true", help=f"load it again and compare on {IMAGES} images")
    options = parser.parse_args(arguments)
    results = Path(options.run) / "results.json"
    found = json.loads(results.read_text()) if results.is_file() else None
    shown = [f"--format {options.format}"] + [f"--task {options.task}"] * bool(options.task)
    told = export_model(
        load_run(options.run),
        options.output,
        options.format,
        task=options.task,
        text=options.text,
        check=options.verify,
        results=found,
        command=f"adaptive-merge export {Path(options.run).name} {' '.join(shown)} --output FOLDER",
    )
    Console().print(told, markup=False, highlight=False, soft_wrap=True)
