"""What a configuration may name: a YAML file is read as settings, not as a way to import and call anything."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence

from jsonargparse import set_parsing_settings

from adaptive_merge.errors import AdaptiveMergeError, InputError

__all__ = ["ALLOWED", "OPTION", "VARIABLE", "open_packages", "restrict_imports"]

VARIABLE = "ADAPTIVE_MERGE_ALLOW"
ALLOWED = (
    "adaptive_merge",
    "pytorch_lightning.accelerators",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.plugins",
    "pytorch_lightning.profilers",
    "pytorch_lightning.strategies",
    # Where some of the above are defined.
    "lightning_fabric.accelerators",
    "lightning_fabric.loggers",
    "lightning_fabric.plugins",
    "lightning_fabric.strategies",
)
OPTION = "--allow-import"
_ever_opened: set[str] = set()
_open: list[str] = []


def restrict_imports(arguments: Sequence[str]) -> list[str]:
    """From here on, class paths and callables in configurations are of this package and Lightning's parts only.

    jsonargparse then refuses any other path before it imports the module. `--allow-import PACKAGE`, which may be
    repeated, and a comma-separated list in ADAPTIVE_MERGE_ALLOW add to them; these packages are imported at once, so
    that what registers itself, such as a `Reader` of weights, is known.

    Args:
        arguments: of the command line.

    Returns:
        The arguments without the option.
    """
    rest, named = _take(arguments)
    opened = named + [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in opened:
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(f"{OPTION} {name!r}: give the name of a package, such as my_methods")
    # The settings are the process's: what an earlier call has opened does not stay open.
    closed = sorted(_ever_opened - set(opened) - set(ALLOWED))
    try:
        set_parsing_settings(import_path_denylist=["*", *closed], import_path_allowlist=[*ALLOWED, *opened])
    except ValueError as error:
        raise InputError(f"{OPTION}: {error}") from error
    _ever_opened.update(opened)
    _open[:] = opened
    for name in opened:
        _import(name, name in named)
    return rest


def _import(name: str, needed: bool) -> None:
    """Import what was opened; the variable may name packages that are not on every machine."""
    try:
        importlib.import_module(name)
    except AdaptiveMergeError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and name.startswith(f"{error.name}") and not needed:
            return
        raise InputError(
            f"{OPTION} {name}: cannot be imported ({type(error).__name__}: {error}); a module of the working directory "
            "is found with PYTHONPATH=. in front of the command"
        ) from error


def open_packages() -> list[str]:
    """What `--allow-import` and ADAPTIVE_MERGE_ALLOW have opened for this call."""
    return list(_open)


def _take(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    rest: list[str] = []
    opened: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == OPTION:
            opened.append(next(left, ""))
        elif argument.startswith(f"{OPTION}="):
            opened.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return rest, opened
