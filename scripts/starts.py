"""The start that chooses its settings without labels, by the number of images a task: accuracy, agreement and regret.

    python scripts/starts.py --folder runs/starts                              # every cell, then the table
    python scripts/starts.py --folder runs/starts --images 4 16 --seeds 0      # some of the Holdout cells
    python scripts/starts.py --folder runs/starts --table                      # run nothing, print the table

Embedded suite, TSV-M anchor, one thread. A cell is a number of images and a seed: under `Holdout(seed=…)` images are
drawn from one half of a task's and scored on the other; the transductive cells take 512 and score on all. Every
candidate that the start judged is solved from all of the cell's images and scored too: the regret is what the best of
them by accuracy is above the chosen one. A finished cell is a JSON file in the folder and not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import adaptive_merge as am
from adaptive_merge.files import save_json
from adaptive_merge.starts.base import Problem, Solution

TRANSDUCTIVE = 512
COLUMNS = ("images", "seed", "accuracy", "FeatCal", "best candidate", "regret", "agreement", "chosen", "CPU seconds")


def problem_of(suite: am.Suite, images: int, seed: int) -> tuple[Problem, dict[str, Tensor]]:
    """The cell's problem, and the indices that are scored."""
    protocol = am.Transductive() if images == TRANSDUCTIVE else am.Holdout(seed=seed)
    bank, drawn, scored = suite.task_vectors, {}, {}
    for task, source in suite.images.items():
        rows = protocol.adapted(task, len(source))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        drawn[task] = normalised(suite, task, rows[order[:images]]).split(64)
        scored[task] = protocol.scored(task, len(source))
    anchor = bank.pretrained + am.TSVM()(bank).vectors.sum(0)
    return Problem(suite.backbone, bank, anchor, drawn, suite.heads), scored


def normalised(suite: am.Suite, task: str, rows: Tensor) -> Tensor:
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (suite.backbone.image_mean, suite.backbone.image_std))
    return (suite.images[task].take(rows).float() / 255 - mean) / std


@torch.no_grad()
def accuracy(suite: am.Suite, solution: Solution, scored: Mapping[str, Tensor]) -> float:
    """Mean over tasks, in percent."""
    weights = suite.task_vectors.layout.unflatten(solution.weights)
    shares = []
    for task, rows in scored.items():
        hits = 0
        for part in rows.split(128):
            features = torch.func.functional_call(suite.backbone.eval(), weights, (normalised(suite, task, part),))
            logits = nn.functional.normalize(features, dim=-1) @ suite.heads[task].T
            hits += int((logits.argmax(-1) == suite.images[task].labels[part]).sum())
        shares.append(hits / len(rows))
    return 100 * statistics.mean(shares)


def cell(suite: am.Suite, images: int, seed: int) -> dict:
    problem, scored = problem_of(suite, images, seed)
    begin = time.process_time()
    choice = am.ChosenRegression().solve(problem).choice
    seconds = time.process_time() - begin
    candidates = [
        row.start.settings | row.agreement._asdict() | {"accuracy": accuracy(suite, row.start.solve(problem), scored)}
        for row in choice.table
    ]
    chosen = next(row for row, judged in zip(candidates, choice.table) if judged.start == choice.start)
    featcal = accuracy(suite, am.FeatCal().solve(problem), scored)
    return {"images": images, "seed": seed, "seconds": seconds, "chosen": chosen, "featcal": featcal} | {
        "regret": max(row["accuracy"] for row in candidates) - chosen["accuracy"],
        "candidates": candidates,
    }


def table(cells: list[dict]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in sorted(cells, key=lambda row: (row["images"], row["seed"])):
        chosen = row["chosen"]
        settings = f"λ {chosen['strength']:.3g}, ρ {chosen['extrapolation']:g}, other {chosen['other_tokens']:g}"
        settings += f", mixing {chosen['mixing']:g}" * (chosen["mixing"] < 1) + ", stem" * chosen["stem"]
        figures = [chosen["accuracy"], row["featcal"], chosen["accuracy"] + row["regret"], row["regret"]]
        values = [f"{row['images']}{' (transductive)' * (row['images'] == TRANSDUCTIVE)}", str(row["seed"])]
        values += [f"{value:.2f}" for value in figures]
        values += [f"{100 * chosen['share']:.1f} %, {chosen['divergence']:.4f}", settings, f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where finished cells are kept")
    parser.add_argument("--images", type=int, nargs="*", default=[4, 16, 64, 256, TRANSDUCTIVE])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    suite = None if options.table else am.load_suite("embedded")
    for images in options.images if suite else ():
        for seed in options.seeds:
            path = options.folder / f"{images}-{seed}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_json(path, cell(suite, images, seed))
    print(table([json.loads(path.read_text()) for path in options.folder.glob("*-*.json")]))


if __name__ == "__main__":
    main()
