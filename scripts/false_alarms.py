"""Run the recipes of configs/embedded under the guard, over many seeds, and count its alarms: all are healthy runs.

    python scripts/false_alarms.py                                    # each learned recipe, seeds 0 to 19
    python scripts/false_alarms.py --recipes adamerging best --seeds 0 1 2 --steps 100 --images 8

The runs share one process, the suite and what frozen networks say about its images, and nothing is scored, so that
twenty seeds of each recipe are a matter of hours on one core. Every run is a line of runs/false_alarms.jsonl; one that
is there already is not run again. `--steps` and `--images` bound a run; a recipe of several stages keeps their parts.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

import adaptive_merge as am
from adaptive_merge import adapters, coefficients, objectives, transforms
from adaptive_merge.callbacks.guard.collapse import Signals
from adaptive_merge.callbacks.guard.guard import LOOKS_IN_A_ROW, Guard
from adaptive_merge.engine.frozen import FrozenOutputs

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "embedded"
PARTS = {
    name: getattr(part, name) for part in (adapters, coefficients, objectives, transforms) for name in part.__all__
}


class Recorder(Guard):
    """A guard that notes how far each signal went from the start, and stops nothing."""

    def __init__(self, every: int | None) -> None:
        super().__init__(every, on_collapse="warn")
        self.worst = {"agreement": math.inf, "task agreement": math.inf, "marginal": math.inf, "norm": 0.0}
        self.would_stop = False

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Signals]:
        now = super()._look(trainer, module)
        start, worst = self._watch.start, self.worst
        changes = [now[task].agreement - start[task].agreement for task in now]
        left = [ours.marginal / min(start[task].marginal, start[task].expert_marginal) for task, ours in now.items()]
        norms = [max(ours.norm / start[task].norm, start[task].norm / ours.norm) for task, ours in now.items()]
        worst["agreement"] = min(worst["agreement"], sum(changes) / len(changes))
        worst["task agreement"] = min(worst["task agreement"], *changes)
        worst["marginal"], worst["norm"] = min(worst["marginal"], *left), max(worst["norm"], *norms)
        self.would_stop |= self._in_a_row >= LOOKS_IN_A_ROW
        return now


def learned() -> list[str]:
    """The recipes that learn something."""
    found = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))}
    return [name for name, config in found.items() if config["trainer"]["max_steps"]]


def build(value: Any) -> Any:
    """The object that a piece of a configuration stands for."""
    if isinstance(value, list):
        return [build(one) for one in value]
    if isinstance(value, dict) and "class_path" in value:
        arguments = value.get("init_args", {})
        return PARTS[value["class_path"].rsplit(".")[-1]](**{name: build(one) for name, one in arguments.items()})
    if isinstance(value, dict) and "learn" in value:
        return am.Stage(value["steps"], value["learn"], build(value["objective"]))
    return PARTS[value]() if isinstance(value, str) and value in PARTS else value


def run(
    name: str, seed: int, suite: am.Suite, outputs: FrozenOutputs, steps: int, images: int, every: int | None
) -> dict[str, Any]:
    """One run and what its guard saw."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    wanted = config["trainer"]["max_steps"]
    steps = min(steps, wanted)
    model = {key: build(value) for key, value in config["model"].items()}
    for stage in model.get("stages", ()):
        stage.steps = max(1, stage.steps * steps // wanted)
    module = am.AdaptiveMerge(suite.task_vectors, suite.backbone, suite.heads, **model)
    module.views.outputs = outputs
    guard = Recorder(every)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[guard],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    stream = {key: value for key, value in config.get("data", {}).items() if key != "images_per_task"}
    batch = min(images, config.get("data", {}).get("images_per_task", 16))
    began = time.process_time()
    trainer.fit(module, datamodule=am.TaskStream(suite.images, batch, seed=seed, **stream))
    record = guard.record()
    return {
        "recipe": name,
        "seed": seed,
        "steps": steps,
        "images": batch,
        "seconds": round(time.process_time() - began, 1),
        "checks": record["checks"],
        "warnings": record["warnings"],
        "stop": guard.would_stop,
        "worst": {key: round(value, 4) for key, value in guard.worst.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line per recipe: runs, alarms, and the worst that any healthy run came to."""
    head = ["recipe", "runs", "looks", "warnings", "stops", "mean agreement", "one task's", "marginal", "norm"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        least = {key: min(row["worst"][key] for row in own) for key in ("agreement", "task agreement", "marginal")}
        cells = [
            *(name, len(own), sum(row["checks"] for row in own)),
            *(sum(len(row["warnings"]) for row in own), sum(row["stop"] for row in own)),
            *(f"{100 * least['agreement']:+.1f}", f"{100 * least['task agreement']:+.1f}"),
            *(f"{least['marginal']:.2f}", f"{max(row['worst']['norm'] for row in own):.2f}"),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", choices=learned(), default=learned())
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(20)))
    parser.add_argument("--steps", type=int, default=10**9, help="most steps of a run")
    parser.add_argument("--images", type=int, default=10**9, help="most images of a task in a step")
    parser.add_argument("--every", type=int, help="steps between looks, where short runs would have too few")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "false_alarms.jsonl")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    suite, shared = am.load_suite("embedded"), {name: FrozenOutputs() for name in options.recipes}
    for seed in options.seeds:
        for name in options.recipes:
            if not any((row["recipe"], row["seed"]) == (name, seed) for row in rows):
                rows.append(run(name, seed, suite, shared[name], options.steps, options.images, options.every))
                with options.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    print(table([row for row in rows if row["recipe"] in options.recipes]))


if __name__ == "__main__":
    main()
