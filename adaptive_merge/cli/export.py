"""`adaptive-merge export`: a run in, a folder that other libraries load out."""

from __future__ import annotations

from pathlib import Path

from adaptive_merge.cli.loading import SOURCES, load_run
from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.export.formats import FORMATS
from adaptive_merge.export.model import export_model
from adaptive_merge.export.verify import IMAGES
from adaptive_merge.limits import read_json

__all__ = ["export"]


def export(arguments: list[str]) -> None:
    """Write the adapted model of a run as a folder for open_clip, Hugging Face, ONNX Runtime or plain safetensors."""
    parser = Parser("adaptive-merge export", description=export.__doc__)
    parser.add_argument("run", nargs="+", help=SOURCES)
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="what to write")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist yet")
    parser.add_argument(
        "--task", help="this task's own model, tints folded in; default: the merge that all tasks share"
    )
    parser.add_argument("--text", help="open_clip only: a full CLIP whose text tower the folder is to have")
    parser.add_argument("--verify", action="store_true", help=f"load it again and compare on {IMAGES} images")
    options = parser.parse_args(arguments)
    results = Path(options.run[0]) / "results.json"
    sources = " ".join(Path(run).name for run in options.run)
    shown = [f"--format {options.format}"] + [f"--task {options.task}"] * bool(options.task)
    message = export_model(
        load_run(*options.run),
        options.output,
        options.format,
        task=options.task,
        text=options.text,
        check=options.verify,
        results=read_json(results, strict=False) if results.is_file() else None,
        command=f"adaptive-merge export {sources} {' '.join(shown)} --output FOLDER",
    )
    write(message)
