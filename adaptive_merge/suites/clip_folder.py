"""A CLIP suite as a folder with a `suite.json`: how it is read, and which of its tasks are taken."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.limits import check_names
from adaptive_merge.suites.base import Suite
from adaptive_merge.suites.clip_suite import ClipSuite, load_clip_suite

__all__ = ["KIND", "chosen_tasks", "load_clip_folder", "read_clip_suite"]

KIND: Final = "clip"
_PATHS: Final = ("pretrained", "experts", "heads", "text", "data", "cache", "folders", "class_names")


def load_clip_folder(
    folder: Path,
    manifest: dict[str, Any],
    tasks: list[str] | None,
    split: str,
    dtype: str = "float32",
    lazy: bool = False,
    banks: str | None = None,
) -> Suite:
    """What `load_suite` gives for a folder whose `suite.json` says `"kind": "clip"`.

    Args:
        folder: of `suite.json`; relative paths in it start there.
        manifest: its content.
        tasks: some of its tasks, in this order; default all.
        split: `"test"`; CLIP suites have no other.
        dtype: of the task vectors; `"bfloat16"` here or as `bank` in the manifest.
        lazy, banks: see `load_clip_suite`.
    """
    if split != "test":
        raise InputError(f"{folder / 'suite.json'}: a CLIP suite has test images only, no split {split!r}")
    suite = read_clip_suite(folder, manifest, tasks)
    return load_clip_suite(suite if dtype == "float32" else dataclasses.replace(suite, bank=dtype), lazy, banks)


def read_clip_suite(folder: Path, manifest: dict[str, Any], tasks: list[str] | None = None) -> ClipSuite:
    """The suite that a `suite.json` describes, with every path resolved; nothing is loaded.

    Raises:
        InputError: an unknown key, a missing one, a value of the wrong kind, an environment variable that is not set.
    """
    path = folder / "suite.json"
    fields = {field.name: field for field in dataclasses.fields(ClipSuite)}
    settings = {key: value for key, value in manifest.items() if key not in ("kind", "schema")}
    for key, value in settings.items():
        if key not in fields:
            raise InputError(f"{path}: unknown key {key!r}{did_you_mean(key, fields)}")
        _check_kind(path, key, value, str(fields[key].type))
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in settings:
            raise InputError(f"{path}: the key {key!r} is missing; a CLIP suite needs it")
    if tasks is not None:
        settings["tasks"] = chosen_tasks(f"suite `{path.parent}`", settings["tasks"], tasks)
    check_names(settings["tasks"], "task", path, folder=True)
    # The defaults are paths as well, and start at the folder like all others.
    settings = {"data": "data", "cache": "cache"} | settings
    settings |= {key: _resolve(path, key, settings[key]) for key in _PATHS if settings.get(key) is not None}
    if settings["architecture"].endswith(".json"):
        settings["architecture"] = _resolve(path, "architecture", settings["architecture"])
    return ClipSuite(**{"name": folder.resolve().name} | settings)


def chosen_tasks(suite: str, known: Collection[str], tasks: list[str] | None) -> list[str]:
    """The tasks that were asked for, each once; all that are known where none were.

    Raises:
        InputError: none, an unknown one, or one named twice.
    """
    chosen = list(known) if tasks is None else tasks
    if not chosen:
        raise InputError("no task is left to adapt on; name at least one")
    for task in chosen:
        if task not in known:
            raise InputError(f"{suite} has no task {task!r}{did_you_mean(task, known)}")
        if chosen.count(task) > 1:
            raise InputError(f"{suite}: task {task!r} is named twice; name each once")
    return chosen


def _check_kind(path: Path, key: str, value: Any, annotation: str) -> None:
    """Text, a list of texts, or an object of them, as the field says."""
    fits = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "list[str]": isinstance(value, list) and all(isinstance(item, str) for item in value),
        "dict[str, list[str]]": isinstance(value, dict) and all(isinstance(item, list) for item in value.values()),
        "dict[str, str]": isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
    }
    either = annotation.startswith("str | dict") and (isinstance(value, str) or fits["dict[str, str]"])
    nothing = value is None and annotation.endswith("None")
    if not (either or nothing or fits.get(annotation, isinstance(value, str))):
        raise InputError(f"{path}: {key}: expected {annotation.replace(' | None', '')}, found {value!r}")


def _resolve(path: Path, key: str, value: str | dict[str, str]) -> str | dict[str, str]:
    """Paths with variables and `~` expanded, relative ones from the folder of `suite.json`."""
    if isinstance(value, dict):
        return {name: str(_resolve(path, key, item)) for name, item in value.items()}
    expanded = os.path.expanduser(os.path.expandvars(value))
    if "$" in expanded:
        raise InputError(f"{path}: {key}: {value!r}: its environment variable is not set; export it, or write the path")
    if expanded.startswith("hf-hub:"):
        return expanded
    scheme = "local-dir:" if expanded.startswith("local-dir:") else ""
    return scheme + str(path.parent / expanded.removeprefix(scheme))
