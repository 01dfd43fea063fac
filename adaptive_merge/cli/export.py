"""`adaptive-merge export`: a run in, a folder that other libraries load out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from adaptive_merge.cli.loading import SOURCES, load_run_and_data
from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError
from adaptive_merge.export.formats import FORMATS
from adaptive_merge.export.model import export_model
from adaptive_merge.export.tall import export_tall, table
from adaptive_merge.export.verify import IMAGES

__all__ = ["export"]

TALL: Final = "tall"


def export(arguments: list[str]) -> None:
    """Write the adapted model of a run as a folder for open_clip, Hugging Face, ONNX Runtime or plain safetensors.

    Or (tall) its experts, as one vector and a bit mask for each.
    """
    parser = Parser("adaptive-merge export", description=export.__doc__)
    parser.add_argument("run", nargs="+", help=SOURCES)
    parser.add_argument("--format", required=True, choices=[*FORMATS, TALL], help="what to write")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist yet")
    parser.add_argument(
        "--task", help="this task's own model, tints folded in; default: the merge that all tasks share"
    )
    parser.add_argument("--text", help="open_clip only: a full CLIP whose text tower the folder is to have")
    parser.add_argument("--verify", action="store_true", help=f"load it again and compare on {IMAGES} images")
    parser.add_argument(
        "--threshold",
        type=float,
        nargs="+",
        help="tall only: λ of the masks, one for all tasks or one each, and no image is read; default: for each task "
        "the one of .2, .3 … .6 that agrees most with its expert on the suite's images",
    )
    options = parser.parse_args(arguments)
    _check(options)
    shown = [f"--format {options.format}"] + [f"--task {options.task}"] * bool(options.task)
    sources = " ".join(Path(run).name for run in options.run)
    command = f"adaptive-merge export {sources} {' '.join(shown)} --output FOLDER"
    module, stream = load_run_and_data(*options.run)
    if options.format == TALL:
        write(_tall(module, stream, options, command))
        return
    results = Path(options.run[0]) / "results.json"
    message = export_model(
        module,
        options.output,
        options.format,
        task=options.task,
        text=options.text,
        check=options.verify,
        results=json.loads(results.read_text()) if results.is_file() else None,
        command=command,
    )
    write(message)


def _check(options: argparse.Namespace) -> None:
    if options.format != TALL and options.threshold:
        raise InputError(f"a threshold belongs to masks, not to {options.format}; leave out --threshold")
    if options.format == TALL and (options.task or options.text):
        raise InputError("tall holds the experts of all tasks, and no text tower; leave out --task and --text")


def _tall(module: AdaptiveMerge, stream: TaskStream, options: argparse.Namespace, command: str) -> str:
    given = options.threshold
    thresholds = given[0] if given and len(given) == 1 else given
    kept, message = export_tall(module, options.output, None if given else stream, thresholds, command)
    header, *rows = table(kept)
    shown = Table(*header)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    return message
