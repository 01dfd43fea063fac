"""Accuracy against image draws, and the label-free choice of the `fast` settings: docs/sample_efficiency.md.

    python scripts/draws.py                                   # curves on the test images, seeds 0 1 2
    python scripts/draws.py --recipes adamerging_fast --seeds 0
    python scripts/draws.py --choose adamerging tinting_pp    # candidates on the validation images, seed 0

A draw is one image shown to a training step. Runs take the path of the command line, one after the other in this
process with one thread. Every finished run is kept in runs/draws/ and not done again; the two parts of the page
are written from what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torchmetrics.functional import spearman_corrcoef

from adaptive_merge.cli.fit import AdaptiveMergeCLI
from adaptive_merge.data import TaskStream
from adaptive_merge.engine.frozen import FrozenOutputs
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.files import save_json
from adaptive_merge.objectives.functional import jensen_shannon

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "embedded"
RUNS = ROOT / "runs" / "draws"
PAGE = ROOT / "docs" / "sample_efficiency.md"
MARKS = (640, 1280, 2560, 5120, 7680, 12_800, 38_400)
RECIPES = ("adamerging", "adamerging_fast", "tinting_pp", "tinting_pp_fast", "surgery_ta", "best")
QUIET = ("logger", "enable_checkpointing", "enable_progress_bar")

TASKS = 8
PUBLISHED = "as published"
BUDGET = {"adamerging": 7680, "tinting_pp": 2560}  # a fifth of what the published settings take

# Candidates, as arguments of the command line in short: `a|b` stands for one candidate each.
CANDIDATES = {
    "adamerging": (
        "images=4|8|16 lr=0.003|0.01",
        "images=16 lr=0.03",
        "images=8 lr=0.01 stages=experts_first",
    ),
    "tinting_pp": (
        "images=16 schedule=shuffled lr=0.01|0.02|0.03",
        "images=16 schedule=shuffled lr=0.02 adapter_lr=0.03|0.1|0.3",
        "images=2|4|8 lr=0.01|0.03 adapter_lr=0.03|0.1",
        "images=2 lr=0.01 adapter_lr=0.03 sampling=epoch",
        "images=2 lr=0.01 adapter_lr=0.03 soft=true",
        "images=2 lr=0.01 adapter_lr=0.03 bounds=project",
        "images=2 lr=0.01 adapter_lr=0.015|0.03|0.05 sampling=epoch soft=true",
        "images=4 lr=0.01|0.03 adapter_lr=0.03 sampling=epoch soft=true",
        "images=4 lr=0.01|0.02 adapter_lr=0.05 sampling=epoch soft=true",
        "images=2 lr=0.03 adapter_lr=0.03 sampling=epoch soft=true",
        "images=1 lr=0.005 adapter_lr=0.02 sampling=epoch soft=true",
        "images=2 lr=0.01 adapter_lr=0.03 sampling=epoch soft=true init=average",
        "images=2 lr=0.01 adapter_lr=0.03 sampling=epoch soft=true betas=[0.9,0.99]",
        "images=2 lr=0.02 adapter_lr=0.03 sampling=epoch soft=true betas=[0.95,0.99]",
        "images=2 lr=0.01 adapter_lr=0.03 sampling=epoch soft=true bounds=project",
        "images=2 lr=0.03 adapter_lr=0.015 sampling=epoch soft=true bounds=project",
        "images=4 lr=0.05 adapter_lr=0.03 sampling=epoch soft=true bounds=project",
        "images=8 lr=0.03 adapter_lr=0.05 sampling=epoch soft=true bounds=project",
        "images=2 lr=0.01 adapter_lr=0.03 sampling=epoch stages=heads_last",
    ),
}
OPTIONS = {
    "images": "data.images_per_task",
    "schedule": "data.schedule",
    "sampling": "data.sampling",
    "lr": "model.lr",
    "adapter_lr": "model.adapter_lr",
    "betas": "model.betas",
    "init": "model.coefficients.init_args.init",
    "bounds": "model.coefficients.init_args.bounds",
    "soft": "model.objective.init_args.soft",
    "stages": "model.stages",
}
SOFT = {"class_path": "PseudoLabel", "init_args": {"soft": True, "confident": True}}
STAGES = {
    "experts_first": [
        {"steps": 60, "learn": "coefficients", "objective": "ExpertDivergence"},
        {"steps": 60, "learn": "coefficients", "objective": "Entropy"},
    ],
    "heads_last": [
        {"steps": 110, "learn": "all", "objective": SOFT},
        {"steps": 50, "learn": "adapters", "objective": SOFT},
    ],
}


class Marks(pl.Callback):
    """Scores the module once it has been shown so many images, and at the end.

    Args:
        marks: numbers of draws.

    Attributes:
        points: {"draws", "accuracy", "agreement", "js"} of each mark that was reached.
    """

    def __init__(self, marks: Iterable[int] = ()) -> None:
        self.left, self.draws, self.points = sorted(marks), 0, []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: AdaptiveMerge, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.draws += sum(len(part["index"]) for part in batch.values())
        due = [mark for mark in self.left if mark <= self.draws]
        if due:
            self.left = self.left[len(due) :]
            self._score(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: AdaptiveMerge) -> None:
        if not self.points or self.points[-1]["draws"] < self.draws:
            self._score(trainer, pl_module)

    def _score(self, trainer: pl.Trainer, module: AdaptiveMerge) -> None:
        self.points.append({"draws": self.draws} | score(module, trainer.datamodule))


@torch.no_grad()
def score(module: AdaptiveMerge, stream: TaskStream) -> dict[str, float]:
    """Means over tasks: accuracy, and without labels agreement with the experts and JS to them in nats."""
    rows = []
    for loader in stream.val_dataloader():
        columns = []
        for batch in loader:
            task = batch["task"]
            logits = module.model(task, batch["image"], module.views.weights("adapted", task)).logits
            expert = module.views.expert(task, batch, stream.images[task]).logits
            chosen = logits.argmax(-1)
            found = chosen == batch["label"], chosen == expert.argmax(-1), jensen_shannon(logits, expert)
            columns.append(torch.stack([column.double() for column in found]))
        rows.append(torch.cat(columns, 1).mean(1))
    return dict(zip(("accuracy", "agreement", "js"), torch.stack(rows).mean(0).tolist()))


def adapt(arguments: Sequence[str], marks: Iterable[int], outputs: FrozenOutputs) -> list[dict[str, float]]:
    """The points of one run.

    Args:
        arguments: of the command line, without the subcommand.
        marks: numbers of draws at which to score.
        outputs: what the experts say about the images, shared between runs.
    """
    quiet = [word for name in QUIET for word in (f"--trainer.{name}", "false")]
    cli = AdaptiveMergeCLI(args=[*arguments, *quiet], run=False)
    cli.model.views.outputs = outputs
    seen = Marks(marks)
    cli.trainer.callbacks.append(seen)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return seen.points


def candidates(recipe: str) -> list[str]:
    """The recipe's candidates, one combination each, such as `images=2 lr=0.01`."""
    axes = [[word.split("=") for word in line.split()] for line in CANDIDATES[recipe]]
    products = (
        itertools.product(*([f"{name}={value}" for value in values.split("|")] for name, values in line))
        for line in axes
    )
    return [" ".join(words) for product in products for words in product]


def arguments_of(candidate: str, budget: int) -> list[str]:
    """A candidate as arguments of the command line; as many steps as the budget of draws gives."""
    chosen = {"schedule": "joint"} | dict(word.split("=") for word in candidate.split())
    joint = chosen["schedule"] == "joint"
    steps = budget // (int(chosen["images"]) * (TASKS if joint else 1))
    found = ["--trainer.max_steps", str(steps), "--model.accumulate", "joint" if joint else "per_task"]
    if "stages" in chosen:
        found += ["--model.objective", "null"]
        chosen["stages"] = json.dumps(STAGES[chosen["stages"]])
    return [*found, *(word for name, value in chosen.items() for word in (f"--{OPTIONS[name]}", value))]


def run_missing(file: Path, jobs: Iterable[tuple[str, list[str]]], marks: Sequence[int]) -> dict[str, Any]:
    """Name → points of all jobs; runs those that the file does not hold yet, and notes each as it ends."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    outputs = FrozenOutputs()
    for name, arguments in jobs:
        if name not in known:
            known[name] = adapt(arguments, marks, outputs)
            save_json(file, known)
            print(name, known[name][-1], flush=True)
    return known


def curves(recipes: Sequence[str], seeds: Sequence[int], marks: Sequence[int]) -> str:
    """Run what is missing and give the Markdown table of accuracy against draws, in percent."""
    jobs = [
        (f"{recipe}-{seed}", ["--config", str(CONFIGS / f"{recipe}.yaml"), "--seed_everything", str(seed)])
        for seed in seeds
        for recipe in recipes
    ]
    known = run_missing(RUNS / "curves.json", jobs, marks)
    lines = ["| recipe | seeds | " + " | ".join(f"{mark:,}" for mark in MARKS) + " | last |", "|---" * 10 + "|"]
    for recipe in RECIPES:
        runs = [points for name, points in known.items() if name.rpartition("-")[0] == recipe]
        if runs:
            cells = [mean_and_spread([at(points, mark) for points in runs]) for mark in MARKS]
            last = f"{mean_and_spread([points[-1]['accuracy'] for points in runs])} at {runs[0][-1]['draws']:,}"
            lines.append(f"| `{recipe}` | {len(runs)} | " + " | ".join([*cells, last]) + " |")
    return "\n".join(lines)


def at(points: Sequence[dict[str, float]], draws: int) -> float | None:
    """The accuracy after so many draws; None where the run was not scored there."""
    return next((point["accuracy"] for point in points if point["draws"] == draws), None)


def mean_and_spread(values: Sequence[float | None]) -> str:
    """In percent; empty where a run has no value."""
    if None in values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def choice(recipe: str) -> str:
    """Run a recipe's candidates on the validation images and give their table, the highest agreement first."""
    start = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--suite.split", "val"]
    jobs = [(name, [*start, *arguments_of(name, BUDGET[recipe])]) for name in candidates(recipe)]
    jobs.append((PUBLISHED, start))
    known = run_missing(RUNS / f"choose-{recipe}.json", jobs, (2560,))
    ends = {name: known[name][-1] for name, _ in jobs}
    lines = ["| settings | draws | agreement, % | JS, nats | accuracy, % |", "|---|---|---|---|---|"]
    for name, end in sorted(ends.items(), key=lambda item: -item[1]["agreement"]):
        numbers = f"{100 * end['agreement']:.1f} | {end['js']:.4f} | {100 * end['accuracy']:.1f}"
        lines.append(f"| `{name}` | {end['draws']:,} | {numbers} |")
    tried = [ends[name] for name, _ in jobs[:-1]]
    return "\n".join([*lines, "", ranking(tried)])


def ranking(tried: Sequence[dict[str, float]]) -> str:
    """How well the label-free criteria order the candidates: Spearman's rank correlation with the accuracy."""
    accuracy, agreement, js = (torch.tensor([end[key] for end in tried]) for key in ("accuracy", "agreement", "js"))
    values = float(spearman_corrcoef(agreement, accuracy)), float(spearman_corrcoef(-js, accuracy))
    return f"Rank correlation with the accuracy: agreement {values[0]:.2f}, closeness in JS {values[1]:.2f}."


def write(part: str, table: str) -> None:
    """Put a table between the marks of its part of the page."""
    start, end = f"<!-- {part}: python scripts/draws.py -->", f"<!-- end of {part} -->"
    page = PAGE.read_text()
    before, after = page.split(start)[0], page.split(end)[1]
    PAGE.write_text(f"{before}{start}\n{table}\n{end}{after}")
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--choose", nargs="+", choices=CANDIDATES, help="instead: candidates for the fast variants of these"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
    if options.choose:
        for recipe in options.choose:
            write(f"candidates of {recipe}", choice(recipe))
    else:
        write("curves", curves(options.recipes, options.seeds, MARKS))


if __name__ == "__main__":
    main()
