"""Reading `results.json` for people: checked, with the means over merged and unseen tasks taken anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Final

import numpy as np

from adaptive_merge.engine.views import ROUTED, VIEWS
from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.limits import LimitError, read_json

__all__ = ["MEASURES", "read_record"]

MEASURES = {"accuracy": "accuracy", "agreement": "agreement with the experts (no labels)"}
"""What models are compared by, and how people are told."""


def read_record(path: Path, notes: list[str]) -> dict[str, Any]:
    """The content of a `results.json`; what older runs did not record is None or empty, with a note.

    Raises:
        MissingFileError, InputError: the file is not there, or it is not one of ours.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such file; name a run folder whose `fit` has finished")
    try:
        return _checked(read_json(path, strict=False), notes)
    except LimitError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not results of this version of the program ({error!r}); run `fit` again") from error


# What a report shows as it is, where it is there: key → its kind.
_SHOWN: Final[dict[str, tuple[type, ...]]] = {
    "recipe": (str,),
    "seed": (int,),
    "steps": (int,),
    "trainable_parameters": (int,),
    "peak_memory_bytes": (int,),
    **{
        key: (dict,)
        for key in ("tasks", "seconds", "versions", "experts", "guard", "calibration", "criteria", "unseen")
    },
    **{key: (dict, NoneType) for key in ("protocol", "corruption", "online", "start", "kept", "routing")},
}


def _check_shown(results: dict[str, Any]) -> None:
    for key, kinds in _SHOWN.items():
        if key in results and not isinstance(results[key], kinds):
            raise TypeError(f"{key}: {results[key]!r:.60}")
    for key in ("versions", "experts"):
        if not all(isinstance(value, str) for value in results.get(key, {}).values()):
            raise TypeError(key)
    _numbers(results.get("seconds", {}))
    for key, name, kind in (("guard", "select", str), ("protocol", "name", str), ("corruption", "kind", str)):
        if not isinstance((results.get(key) or {}).get(name, ""), kind):
            raise TypeError(f"{key}: {name}")
    if not isinstance((results.get("protocol") or {}).get("settings", {}), dict):
        raise TypeError("protocol: settings")


def _checked(results: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    tasks, _ = results["tasks"], results["recipe"]
    _check_shown(results)
    if results["schema"] != 1 or not tasks:
        raise KeyError("schema")
    for row in tasks.values():
        _numbers(row, ("n", *VIEWS, *(["anchor"] if "anchor" in row else [])))
    if results.setdefault("protocol", None) is None:
        notes.append("The protocol was not recorded: what was adapted on and what was scored is not known.")
    else:
        for part in ("adapted_on", "scored_on"):
            _numbers(results["protocol"][part], tasks)
    unseen = list(results.get("unseen", {}).get("tasks", ()))
    merged = [task for task in tasks if task not in unseen]
    if not merged or len(merged) + len(unseen) != len(tasks):
        raise KeyError("unseen")
    results["average"] = _means(tasks, merged)
    results["unseen"] = {"tasks": unseen, "average": _means(tasks, unseen) if unseen else None}
    results["online"] = _online(results.get("online"), merged)
    if results.setdefault("measure", "accuracy") not in MEASURES:
        raise KeyError("measure")
    for name in ("calibration", "criteria", "guard", "kept", "routing"):
        results[name] = dict(results.get(name) or {})
    for part in results["calibration"].values():
        _numbers(part, tasks)
    for part in results["criteria"].values():
        _numbers(part, part)
    _check_guard(results["guard"])
    _check_routing(results["routing"])
    _check_kept(results["kept"])
    if results.setdefault("start", None) is not None:
        _check_start(results["start"], tasks)
    return results


def _means(tasks: Mapping[str, Mapping[str, float]], names: list[str]) -> dict[str, float]:
    views = [view for view in (*VIEWS, "anchor") if all(view in tasks[task] for task in names)]
    return {view: float(np.mean([tasks[task][view] for task in names])) for view in views}


def _online(found: Any, merged: list[str]) -> dict[str, Any] | None:
    if found is None:
        return None
    for task in merged:
        one = found["tasks"][task]
        if not one["images"] or len(one["images"]) != len(one["curve"]):
            raise KeyError("online")
        _numbers(dict(enumerate(one["images"] + one["curve"])))
        _numbers(one, ("predicted",))
    _numbers(found["final"], merged)
    return found


def _check_guard(guard: Mapping[str, Any]) -> None:
    for warning in guard.get("warnings", ()):
        if not isinstance(warning["signal"], str) or "task" not in warning:
            raise TypeError(f"guard: {warning!r}")
        _numbers(warning, ("step",))
    if guard.get("stopped"):
        _numbers(guard["stopped"], ("step", "restored_step"))
        if "reason" not in guard["stopped"]:
            raise KeyError("reason")


def _check_routing(routing: Mapping[str, Any]) -> None:
    for row in (*routing.get("tasks", {}).values(), *([routing["average"]] if routing else [])):
        _numbers(row, ROUTED)
    for row in routing.get("tasks", {}).values():
        _numbers(dict(enumerate(row["scores"])))


def _check_kept(kept: Mapping[str, Mapping[str, float]]) -> None:
    for shares in kept.values():
        _numbers(shares)
        if shares.keys() != next(iter(kept.values())).keys() or not shares:
            raise KeyError("kept")


def _check_start(start: Mapping[str, Any], tasks: Mapping[str, Mapping[str, float]]) -> None:
    _numbers(start, ("seconds",))
    _numbers(start["images"])
    if not isinstance(start.get("settings", {}), dict):
        raise TypeError(f"start: {start['settings']!r}")
    if not start["images"] or not isinstance(start["kind"], str) or any("anchor" not in row for row in tasks.values()):
        raise KeyError("start")
    for row in start.get("choice", ()):
        _numbers(row, ("agreement", "js"))
        if not isinstance(row["settings"], dict):
            raise TypeError(f"start: {row!r}")


def _numbers(row: Mapping[Any, Any], names: Any = None) -> None:
    """TypeError where one of the named values is not a number."""
    for name in row if names is None else names:
        if not isinstance(row[name], (int, float)):
            raise TypeError(f"{name}: {row[name]!r}")
