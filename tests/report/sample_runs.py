"""Run folders as `fit` leaves them, without a run: for tests of what reads them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch

from adaptive_merge.files import save_json, save_tensors

HOSTILE = (
    "<script>alert(1)</script>",
    "../../x",
    "x" * 300,
    "\u202eשלום עולם",
    "a\"b'c&d.e/f",
    "$\\frac{1}{",
    "\x00\n|`",
)
VIEWS = ("pretrained", "individual", "initial", "adapted")
GROUPS = ("stem.weight", *(f"blocks.{block}.{part}" for block in range(3) for part in ("ln.weight", "fc.bias")), "proj")


def write_run(folder: Path, tasks=("mnist", "fashion", "kmnist"), seed=0, recipe="adamerging", better=0.0) -> Path:
    """A whole run folder with plausible numbers."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    rows = {
        task: {"n": 500} | dict(zip(VIEWS, (0.4, 0.95, 0.6, 0.75 + better + 0.02 * random.standard_normal())))
        for task in tasks
    }
    save_json(folder / "results.json", results(rows, recipe, seed))
    (folder / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{recipe: {recipe}}}\nrun: {{name: x}}\n")
    write_metrics(folder / "metrics.csv", tasks, random)
    write_history(folder / "history.safetensors", tasks)
    write_diagnostics(folder / "diagnostics.safetensors", tasks, random)
    return folder


def change(folder: Path, **fields) -> Path:
    """Replace fields of a run's `results.json`; None takes one away."""
    path = folder / "results.json"
    content = {key: value for key, value in (json.loads(path.read_text()) | fields).items() if value is not None}
    save_json(path, content)
    return folder


def start_only(folder: Path) -> Path:
    """A run of a start chosen without labels, and no step."""
    rows = json.loads((write_run(folder) / "results.json").read_text())["tasks"]
    for name in ("history.safetensors", "metrics.csv"):
        (folder / name).unlink()
    settings = [{"kind": "CompensatedRegression", "strength": strength, "stem": False} for strength in (0.1, 0.3)]
    judged = zip(settings, (0.06, 0.04))
    start = {
        "kind": "ChosenRegression<",
        "settings": {"seed": 0},
        "images": dict.fromkeys(rows, 64),
        "seconds": 2.4,
        "choice": [{"settings": one, "agreement": 0.9, "js": js, "chosen": js < 0.05} for one, js in judged],
    }
    return change(folder, start=start, steps=0, tasks={task: row | {"anchor": 0.55} for task, row in rows.items()})


def routed(folder: Path, tasks=("mnist", "fashion", "kmnist")) -> Path:
    """A run with a route and a mask."""
    rows = {
        task: {"routing": 0.8, "known": 0.75, "unknown": 0.6, "scores": [0.8 if task == one else 0.1 for one in tasks]}
        for task in tasks
    }
    routing = {"task": "known", "tasks": rows, "average": {"routing": 0.8, "known": 0.75, "unknown": 0.6}}
    kept = {task: {group: 0.1 * (place + 1) for group in GROUPS} for place, task in enumerate(tasks)}
    return change(write_run(folder, tasks), routing=routing, kept=kept)


def results(rows, recipe="adamerging", seed=0):
    return {
        "schema": 1,
        "recipe": recipe,
        "seed": seed,
        "protocol": {
            "name": "transductive",
            "adapted_on": {task: 480 for task in rows},
            "scored_on": {task: 500 for task in rows},
        },
        "tasks": rows,
        "average": {view: sum(row[view] for row in rows.values()) / len(rows) for view in VIEWS},
        "calibration": {view: {task: 0.125 for task in rows} for view in VIEWS},
        "criteria": {view: {"agreement": 0.71, "js": 0.164, "entropy": 0.3} for view in ("initial", "adapted")},
        "guard": {"select": "last", "kept_step": 60, "checks": 3, "warnings": [], "stopped": None},
        "steps": 60,
        "seconds": {"load": 0.5, "adapt": 75.2, "evaluate": 1.0},
        "peak_memory_bytes": 2**30,
        "trainable_parameters": 24,
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "experts": {task: "ab" * 32 for task in rows},
    }


def write_metrics(path: Path, tasks, random) -> None:
    keys = [f"train/{task}/entropy" for task in tasks]
    looks = [f"train/{task}/{kind}" for task in tasks for kind in ("agreement", "js", "marginal", "norm")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", "train/entropy", "train/kept", *keys, *looks])
        writer.writeheader()
        for step in range(60):
            values = {key: round(0.5 + 0.1 * random.random() - step / 200, 5) for key in writer.fieldnames[1:]}
            writer.writerow({"step": step} | {k: v for k, v in values.items() if k not in looks or step % 20 == 19})
        writer.writerow({"step": 60})


def write_history(path: Path, tasks, steps=(0, 20, 40, 60)) -> None:
    values = 0.3 + 0.01 * torch.randn(len(steps), len(tasks), len(GROUPS), generator=torch.Generator().manual_seed(0))
    tensors = {
        "steps": torch.tensor(steps),
        "coefficients": values,
        "throughput": torch.tensor([float("nan"), *[800.0] * (len(steps) - 1)]),
        "memory": torch.full((len(steps),), 2**29),
    }
    names = {"tasks": list(tasks), "groups": list(GROUPS), "every": 20}
    save_tensors(path, tensors, {key: json.dumps(value) for key, value in names.items()})


def write_diagnostics(path: Path, tasks, random) -> None:
    arrays = {"cosine": np.eye(len(tasks)), "cross": random.random((len(tasks), len(tasks)))}
    for place in range(len(tasks)):
        for view in ("individual", "initial", "adapted"):
            confidence = random.random(40)
            arrays |= {
                f"confidence.{view}.{place}": confidence,
                f"correct.{view}.{place}": (random.random(40) < confidence).astype("uint8"),
                f"label.{view}.{place}": random.integers(0, 4, 40),
                f"features.{view}.{place}": random.standard_normal((25, 8)).astype("float16"),
            }
    arrays |= {f"distance.{view}": random.random(len(tasks)) for view in ("initial", "adapted")}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
    save_tensors(path, tensors, {"tasks": json.dumps(list(tasks))})
