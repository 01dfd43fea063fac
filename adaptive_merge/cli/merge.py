"""`adaptive-merge merge`: the merged weights of a run, or those that a recipe starts from, as one file."""

from __future__ import annotations

import json
from collections.abc import Sequence

from adaptive_merge.cli.loading import SOURCES, load_run
from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.engine import identity
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError
from adaptive_merge.files import check_output, save_tensors

__all__ = ["merge"]


def merge(arguments: list[str]) -> None:
    """Write the merged weights of a run or of a configuration as safetensors."""
    parser = Parser("adaptive-merge merge", description=merge.__doc__)
    parser.add_argument("source", nargs="+", help=SOURCES)
    parser.add_argument("--output", default="merged.safetensors", help="file to write (default: merged.safetensors)")
    parser.add_argument("--force", action="store_true", help="replace the file of --output, if it is there")
    options = parser.parse_args(arguments)
    check_output(options.output, options.force)
    module = load_run(*options.source)
    if module.start is not None and module.begun is None:
        raise InputError(
            f"recipe {module.recipe!r} has a start, which is solved from images; run `fit` (with --trainer.max_steps 0 "
            "for the start alone), and merge the run folder"
        )
    metadata = {
        "recipe": module.recipe,
        "tasks": json.dumps(module.tasks),
        "experts": json.dumps(module.merged_fingerprints),
    }
    tensors = module.merged_state_dict()
    save_tensors(options.output, tensors, metadata)
    write(f"wrote {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} entries, to {options.output}")
    if len(module.model.adapters):
        write(_left_out(module, options.source))


def _left_out(module: AdaptiveMerge, sources: Sequence[str]) -> str:
    """What the merged weights lack of the adapted model, and how it is had."""
    kinds = ", ".join(dict.fromkeys(identity.kind(adapter) for adapter in module.model.adapters))
    return (
        f"left out: {kinds}, which the scores of the run count on. These are the weights that all tasks share; "
        f"`adaptive-merge export {' '.join(sources)} --format safetensors --output FOLDER` writes the adapters beside "
        "them, and with --task TASK a task's own model (--format onnx where adapters do not fold into weights)"
    )
