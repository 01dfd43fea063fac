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
from safetensors import SafetensorError

from adaptive_merge.privacy import scrub
from adaptive_merge.runs.record import read_record
from adaptive_merge.sealed import load_sealed

__all__ = ["Curve", "Diagnostics", "History", "Run", "read_run", "read_tensors"]


Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values."""


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
        """Task → number of scored images and the four accuracies; merged and unseen tasks."""
        return self.results["tasks"]

    @property
    def merged(self) -> dict[str, dict[str, float]]:
        """The same of the tasks that were merged, which all means are over."""
        return {task: row for task, row in self.tasks.items() if task not in self.results["unseen"]["tasks"]}

    def shown(self, task: str) -> str:
        """A task's name in figures and sentences; in front, because long names lose their end."""
        return f"unseen: {task}" if task in self.results["unseen"]["tasks"] else task

    def calibration_error(self, view: str) -> float | None:
        """Mean over the merged tasks of the expected calibration error; None where it was not recorded."""
        found = self.results["calibration"].get(view)
        return float(np.mean([found[task] for task in self.merged])) if found else None

    def criterion(self, view: str, name: str) -> float | None:
        """Mean over the merged tasks of what needs no labels: `"agreement"`, `"js"` or `"entropy"`."""
        return self.results["criteria"].get(view, {}).get(name)

    def curve(self, quantity: str, task: str | None = None) -> Curve | None:
        """Steps and values of a logged training quantity, of one task or of all together."""
        return self.curves.get(f"train/{task}/{quantity}" if task is not None else f"train/{quantity}")


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        MissingFileError, InputError: there is no `results.json`, or it is not one of ours.
    """
    folder, notes = Path(folder), []
    results = read_record(folder / "results.json", notes)
    config, curves = _read_config(folder / "config.yaml", notes), _read_curves(folder / "metrics.csv", notes)
    history = _read_history(folder / "history.safetensors", notes)
    diagnostics = _read_diagnostics(folder / "diagnostics.safetensors", notes)
    return Run(folder, results, config, curves, history, diagnostics, notes)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and decoded metadata of a safetensors file whose metadata are JSON."""
    tensors, texts = load_sealed(path, old=True)
    metadata = {key: json.loads(value) for key, value in texts.items()}
    return {name: tensor.numpy() for name, tensor in tensors.items()}, metadata


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
