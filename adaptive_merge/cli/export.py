"""`adaptive-merge export`: a run in, a folder that other libraries load out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from adaptive_merge.cli.configs import suite_name
from adaptive_merge.cli.loading import SOURCES, load_run_and_data
from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import AdaptiveMergeError, InputError
from adaptive_merge.export.formats import FORMATS
from adaptive_merge.export.hub import check_repository, push
from adaptive_merge.export.model import export_model
from adaptive_merge.export.tall import export_tall, table
from adaptive_merge.export.verify import IMAGES
from adaptive_merge.limits import read_json
from adaptive_merge.suites.clip_folder import KIND, read_clip_suite
from adaptive_merge.suites.clip_suite import ClipSuite
from adaptive_merge.suites.loading import folder_of, read_manifest
from adaptive_merge.weights.text_tower import read_text_tower

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
    parser.add_argument(
        "--text",
        help="open_clip only: a full CLIP whose text tower the folder is to have (default: the suite's, if it has one)",
    )
    parser.add_argument("--verify", action="store_true", help=f"load it again and compare on {IMAGES} images")
    parser.add_argument(
        "--threshold",
        type=float,
        nargs="+",
        help="tall only: λ of the masks, one for all tasks or one each, and no image is read; default: for each task "
        "the one of .2, .3 … .6 that agrees most with its expert on the suite's images",
    )
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to this repository of the hub as well")
    parser.add_argument("--private", action="store_true", help="--push makes a private repository")
    options = parser.parse_args(arguments)
    _check(options)
    write(_export(options))
    if options.push:
        write(f"pushed to {push(options.output, options.push, options.private)}")


def _export(options: argparse.Namespace) -> str:
    shown = [f"--format {options.format}"] + [f"--task {options.task}"] * bool(options.task)
    sources = " ".join(Path(run).name for run in options.run)
    command = f"adaptive-merge export {sources} {' '.join(shown)} --output FOLDER"
    module, stream = load_run_and_data(*options.run)
    if options.format == TALL:
        return _tall(module, stream, options, command)
    results = Path(options.run[0]) / "results.json"
    suite = _suite(options.run)
    return export_model(
        module,
        options.output,
        options.format,
        task=options.task,
        text=options.text or (_text_of(suite) if options.format == "open_clip" else None),
        check=options.verify,
        results=read_json(results, strict=False) if results.is_file() else None,
        command=command,
        base_models=_hub_names(suite) if suite else (),
    )


def _check(options: argparse.Namespace) -> None:
    if options.push:
        check_repository(options.push)
    if options.format != TALL and options.threshold:
        raise InputError(f"a threshold belongs to masks, not to {options.format}; leave out --threshold")
    if options.format == TALL and (options.task or options.text):
        raise InputError("tall holds the experts of all tasks, and no text tower; leave out --task and --text")


def _suite(sources: Sequence[str]) -> ClipSuite | None:
    """What the run's suite is made of; None where it is none of CLIP."""
    config = Path(sources[0]) / "config.yaml"
    folder = folder_of(suite_name([str(config)] if config.is_file() else sources))
    manifest = read_manifest(folder)
    return read_clip_suite(folder, manifest) if manifest.get("kind") == KIND else None


def _text_of(suite: ClipSuite | None) -> str | None:
    """A full CLIP that the suite names; None where what it names has no text tower under open_clip's names."""
    for source in (suite.text, suite.pretrained) if suite else ():
        try:
            if source and read_text_tower(source):
                return source
        except AdaptiveMergeError:
            continue
    return None


def _hub_names(suite: ClipSuite) -> list[str]:
    """The pre-trained model and the experts, as far as they are on the hub."""
    sources = [suite.pretrained, *map(suite.expert_path, suite.tasks)]
    names = [source.removeprefix("hf-hub:").partition("@")[0] for source in sources if source.startswith("hf-hub:")]
    return list(dict.fromkeys(names))


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
