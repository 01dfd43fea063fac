"""Reading a run folder for people: results, metrics, history and diagnostics, the last three where they are there."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from adaptive_merge.engine.views import VIEWS
from adaptive_merge.errors import InputError
from adaptive_merge.limits import read_yaml
from adaptive_merge.privacy import scrub
from adaptive_merge.runs.record import read_record
from adaptive_merge.sealed import load_sealed

__all__ = ["Curve", "Diagnostics", "History", "Run", "classes_of", "read_run", "read_tensors"]


Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values."""

STAGES = {view: view for view in VIEWS}

_SAME = 1e-5  # of two accuracies


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
    parameters: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def verdicts(self, task: str, view: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels of a task's images, and whether a view was right about them; empty where they were not kept."""
        place = self.tasks.index(task) if task in self.tasks else -1
        labels, correct = (self.arrays.get(f"{kind}.{view}.{place}") for kind in ("label", "correct"))
        return (np.zeros(0), np.zeros(0)) if labels is None or correct is None else (labels, correct)

    def interference(self) -> dict[str, Any]:
        """What was recorded of task vectors, masks, subspaces and layers, in plain numbers under names."""
        arrays, found = self.arrays, {}
        if (conflicts := arrays.get("sign_conflicts")) is not None and len(self.parameters) == conflicts.shape[-1]:
            rows = dict(zip(self.parameters, conflicts.T.astype(float).round(4).tolist()))
            found["sign_conflicts"] = {name: dict(zip(("any", "pairs"), row)) for name, row in rows.items()}
        if {"masks.density", "masks.jaccard", "masks.kept_by"} <= arrays.keys():
            kept = arrays["masks.kept_by"]
            found["masks"] = {
                "density": self._by_task(arrays["masks.density"]),
                "jaccard": {task: self._by_task(row) for task, row in zip(self.tasks, arrays["masks.jaccard"])},
                "catastrophic": round(float(kept[0]), 4),
                "selfish": round(float(kept[1]), 4),
            }
        views = {name.partition(".")[2]: value for name, value in arrays.items() if name.startswith("alignment.")}
        if views:
            found["alignment"] = {view: self._by_task(value) for view, value in views.items()}
        if "contribution" in arrays:
            found["contribution"] = {
                layer: self._by_task(row) for layer, row in zip(self.layers, arrays["contribution"])
            }
        return found

    def _by_task(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self.tasks, values.astype(float).round(4).tolist()))


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
    def measure(self) -> str:
        """What its models are compared by: `"accuracy"`, or `"agreement"` with the experts without labels."""
        return self.results.get("measure", "accuracy")

    @property
    def tasks(self) -> dict[str, dict[str, float]]:
        """Task → number of scored images and the four accuracies; merged and unseen tasks."""
        return self.results["tasks"]

    @property
    def merged(self) -> dict[str, dict[str, float]]:
        """The same of the tasks that were merged, which all means are over."""
        return {task: row for task, row in self.tasks.items() if task not in self.results["unseen"]["tasks"]}

    @property
    def base(self) -> str:
        """The view that gains are over: the static merge, before a start where there was one."""
        return "initial" if self.results["start"] is None else "anchor"

    @property
    def stages(self) -> dict[str, str]:
        """What a view is called in figures and tables → the view; with a start, `initial` is what came before it."""
        return STAGES | ({} if self.base == "initial" else {"initial": "anchor", "start": "initial"})

    def scores(self, row: Mapping[str, float]) -> dict[str, float]:
        """A row of `tasks` or a mean, by what its views are called in figures and tables."""
        counted = {"n": row["n"]} if "n" in row else {}
        return counted | {name: row[view] for name, view in self.stages.items()}

    def shown(self, task: str) -> str:
        """A task's name in figures and sentences; in front, because long names lose their end."""
        return f"unseen: {task}" if task in self.results["unseen"]["tasks"] else task

    def calibration_error(self, view: str) -> float | None:
        """Mean over the merged tasks of the expected calibration error; None where it was not recorded."""
        errors = self.results["calibration"].get(view)
        return float(np.mean([errors[task] for task in self.merged])) if errors else None

    def verdicts(self, view: str = "adapted") -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Merged task → label of each scored image, and whether a view was right about it, [n] each.

        Without the tasks whose accuracy is not the mean of these: of a single pass, of an image's task being unknown,
        or of several processes, of which the first keeps its share alone.
        """
        if self.diagnostics is None:
            return {}
        pairs = {task: self.diagnostics.verdicts(task, view) for task in self.merged}
        return {
            task: pair
            for task, pair in pairs.items()
            if len(pair[1]) == self.tasks[task]["n"] and abs(pair[1].mean() - self.tasks[task][view]) < _SAME
        }

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


def classes_of(folder: str | Path, task: str) -> list[str]:
    """The names of a task's classes, as a run folder keeps them; empty where it does not."""
    try:
        names = json.loads((Path(folder) / "results.json").read_text())["classes"][task]
        return [str(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return []


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
        content = read_yaml(path)
    except InputError:
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
                        point = (step, float(value))  # first, so that what is no number leaves no empty curve
                        points[key].append(point)
    except (ValueError, KeyError, TypeError, csv.Error):
        notes.append("metrics.csv is damaged: curves hold what could be read.")
    return {key: (np.array(found)[:, 0], np.array(found)[:, 1]) for key, found in points.items() if found}


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
        return Diagnostics(arrays, metadata["tasks"], *(metadata.get(name, []) for name in ("parameters", "layers")))
    except (SafetensorError, ValueError, KeyError, TypeError):
        notes.append("diagnostics.safetensors cannot be read: features, interference and calibration are left out.")
        return None
