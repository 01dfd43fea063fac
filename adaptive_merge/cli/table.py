"""The table of commands: what each does in one line, and where its function is; nothing here imports torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Final

from adaptive_merge.errors import InputError, did_you_mean

__all__ = ["COMMANDS", "Command", "command", "overview"]

Command = Callable[[list[str]], None]
"""Takes the arguments after its name."""

# Name → what it does, and `module:function` under this package.
COMMANDS: Final = {
    "fit": ("adapt a merge on unlabelled test images and write a run folder", "fit:fit"),
    "validate": (
        "score the merge that a configuration starts from; nothing is written (--json for machines)",
        "fit:validate",
    ),
    "predict": ("write what an adapted model says about a folder of images", "predict:predict"),
    "merge": ("write the merged weights of a run or a recipe as safetensors", "merge:merge"),
    "inspect": ("print what is in a run folder, a checkpoint or a safetensors file", "inspect:inspect"),
    "report": ("write one HTML file about a run, or about several side by side", "report:report"),
    "doctor": ("print what this machine and this launch look like to the trainer", "doctor:doctor"),
    "export": ("write an adapted model for open_clip, Hugging Face or ONNX Runtime", "export:export"),
    "data": ("check whether the data sets of a suite are there and readable", "data:data"),
    "tune": ("run fit over a grid of settings and rank the runs without labels", "tune:tune"),
    "submit": ("hand a run, or an array of runs, to SLURM; list how far they are", "submit:submit"),
    "choose": ("rank finished runs by a criterion that needs no labels", "choose:choose"),
    "recipes": ("list the recipes that --config knows by name", "recipes:recipes"),
}


def command(name: str) -> Command:
    """The function of a command; its module is imported only now.

    Raises:
        InputError: there is no such command.
    """
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; choose {', '.join(COMMANDS)}"
        raise InputError(f"there is no command {name!r}{hint}")
    module, _, function = COMMANDS[name][1].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), function)


def overview() -> str:
    """The help of the program: every command, one line each."""
    lines = "\n".join(f"  {name:<9} {line}" for name, (line, _) in COMMANDS.items())
    return (
        "usage: adaptive-merge COMMAND ...\n\nAdapt a merge of experts on unlabelled test batches.\n\n"
        f"{lines}\n\n"
        "  --version, --debug (show tracebacks), --allow-import PACKAGE (let configurations name its classes)\n"
        "Each command answers to --help.\n"
    )
