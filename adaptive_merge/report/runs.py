"""Reading a run folder for people: results, metrics, history and diagnostics, the last three where they are there."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.report.figures import Curve
from adaptive_merge.report.privacy import scrub

__all__ = ["Diagnostics", "History", "Run", "read_run", "read_tensors"]

_VIEWS = ("pretrained", "individual", "initial", "adapted")


@dataclass(frozen=True)
class History:
    """What the callback `History` kept: S samples of T tasks and G groups."""

    steps: np.ndarray
    coefficients: np.ndarray
    throughput: np.ndarray
    memory: np.ndarray
    tasks: list[str]
    groups: list[str]


@dataclass(frozen=True)
class Diagnostics:
    """What the callback `Diagnostics` kept; names of arrays are explained there."""

    arrays: dict[str, np.ndarray]
    tasks: list[str]


@dataclass(frozen=True)
class Run:
    """One run folder. `notes` says what is missing and what that costs."""

    folder: Path
    results: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    history: History | None = None
    diagnostics: Diagnostics | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def tasks(self) -> dict[str, dict[str, float]]:
        """Task → number of images and the four accuracies."""
        return self.results["tasks"]

    def curve(self, quantity: str, task: str | None = None) -> Curve | None:
        """Steps and values of a logged training quantity, of one task or of all together."""
        return self.curves.get(f"train/{task}/{quantity}" if task is not None else f"train/{quantity}")


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        MissingFileError, InputError: there is no `results.json`, or it is not one of ours.
    """
    folder, notes = Path(folder), []
    results = _read_results(folder / "results.json")
    config, curves = _read_config(folder / "config.yaml", notes), _read_curves(folder / "metrics.csv", notes)
    history = _read_history(folder / "history.safetensors", notes)
    diagnostics = _read_diagnostics(folder / "diagnostics.safetensors", notes)
    return Run(folder, results, config, curves, history, diagnostics, notes)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and decoded metadata of a safetensors file whose metadata are JSON."""
    with safe_open(path, framework="np") as file:
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def _read_results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such file; name a run folder whose `fit` has finished")
    try:
        results = json.loads(path.read_text())
        complete = all(isinstance(row[view], (int, float)) for row in results["tasks"].values() for view in _VIEWS)
        if results["schema"] != 1 or not results["tasks"] or not complete:
            raise KeyError("schema")
        results["average"] = {view: float(np.mean([row[view] for row in results["tasks"].values()])) for view in _VIEWS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not results of this version of the program ({error!r}); run `fit` again") from error
    return results


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("config.yaml is not there: the configuration is left out.")
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        notes.append("config.yaml cannot be read: the configuration is left out.")
        return {}
    return scrub(content) if isinstance(content, dict) else {}


def _read_curves(path: Path, notes: list[str]) -> dict[str, Curve]:
    """Key → steps and values, of the numbers that were logged in training."""
    if not path.is_file():
        notes.append("metrics.csv is not there: curves over the steps are left out.")
        return {}
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                step = float(row["step"])
                for key, value in row.items():
                    if value and key and key.startswith("train/"):
                        points[key].append((step, float(value)))
    except (ValueError, KeyError, TypeError, csv.Error):
        notes.append("metrics.csv is damaged: curves hold what could be read.")
    return {key: (np.array(found)[:, 0], np.array(found)[:, 1]) for key, found in points.items()}


def _read_history(path: Path, notes: list[str]) -> History | None:
    if not path.is_file():
        notes.append("history.safetensors is not there: coefficients, throughput and memory over steps are left out.")
        return None
    try:
        arrays, metadata = read_tensors(path)
        history = History(
            *(arrays[name] for name in ("steps", "coefficients", "throughput", "memory")),
            metadata["tasks"],
            metadata["groups"],
        )
        if history.coefficients.shape != (len(history.steps), len(history.tasks), len(history.groups)):
            raise ValueError("shape")
    except (SafetensorError, ValueError, KeyError, TypeError):
        notes.append("history.safetensors cannot be read: coefficients, throughput and memory are left out.")
        return None
    return history if len(history.steps) else None


def _read_diagnostics(path: Path, notes: list[str]) -> Diagnostics | None:
    if not path.is_file():
        notes.append("diagnostics.safetensors is not there: features, interference and calibration are left out.")
        return None
    try:
        arrays, metadata = read_tensors(path)
        return Diagnostics(arrays, metadata["tasks"])
    except (SafetensorError, ValueError, KeyError, TypeError):
        notes.append("diagnostics.safetensors cannot be read: features, interference and calibration are left out.")
        return None
