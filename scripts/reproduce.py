"""Run every method on the embedded suite over several seeds and write the table of docs/results.md.

    python scripts/reproduce.py                       # all methods, seeds 0 1 2, two runs at a time
    python scripts/reproduce.py --methods tinting best --seeds 0

Runs go to runs/reproduce/<method>-<seed>; one that has its results.json is not run again, so that an interrupted
call goes on where it stopped. The table holds whatever runs are there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "embedded"
RUNS = ROOT / "runs" / "reproduce"
PAGE = ROOT / "docs" / "results.md"
START, END = "<!-- table: python scripts/reproduce.py -->", "<!-- end of table -->"

# Method → published mean on CLIP ViT-B/32, eight tasks, task_vectors checkpoints; None where no table is published.
PUBLISHED: dict[str, float | None] = {
    "weight_averaging": 65.8,
    "task_arithmetic": 69.1,
    "ties": 72.4,
    "adamerging_task": 71.1,
    "adamerging_pp_task": 73.8,
    "adamerging": 80.2,
    "adamerging_pp": 81.1,
    "surgery_avg": 80.0,
    "surgery_ta": 80.9,
    "surgery_adamerging": 86.1,
    "surgery_v2": None,
    "tinting": None,
    "tinting_pp": None,
    "symerge": None,
    "best": None,
}
STATIC = ("weight_averaging", "task_arithmetic", "ties")  # nothing random in them: one seed says all
REFERENCES = {"pretrained": ("pre-trained", 48.0), "individual": ("individual experts", 90.5)}


def run(method: str, seed: int) -> None:
    """One run, in a process of its own with one thread, so that two at a time do not fight over the cores."""
    folder = RUNS / f"{method}-{seed}"
    if (folder / "results.json").is_file():
        return
    command = [sys.executable, "-m", "adaptive_merge", "fit", "--config", str(CONFIGS / f"{method}.yaml")]
    command += ["--seed_everything", str(seed), "--run.root", str(RUNS), "--run.name", folder.name]
    command += ["--run.if_exists", "overwrite", "--trainer.enable_progress_bar", "false"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method}, seed {seed}, ended with {done.returncode}:\n{done.stderr}")
    print(done.stdout, flush=True)


def load(method: str) -> list[dict]:
    """The results of a method's finished runs."""
    return [json.loads(path.read_text()) for path in sorted(RUNS.glob(f"{method}-[0-9]*/results.json"))]


def row(method: str, published: float | None) -> str | None:
    results = load(method)
    if not results:
        return None
    averages = [100 * result["average"]["adapted"] for result in results]
    spread = f" ± {statistics.stdev(averages):.1f}" if len(averages) > 1 else ""
    worst = min(
        100 * (result["tasks"][task]["adapted"] - result["tasks"][task]["initial"])
        for result in results
        for task in result["tasks"]
    )
    seconds = statistics.median(result["seconds"]["adapt"] for result in results)
    cells = [
        f"[`{method}`](../configs/embedded/{method}.yaml)",
        f"{statistics.mean(averages):.1f}{spread}",
        f"{recovered(results):.0f} %",
        f"{worst:+.1f}",
        str(len(averages)),
        f"{results[0]['steps']:,}",
        f"{results[0]['trainable_parameters']:,}" if results[0]["steps"] else "0",
        f"{seconds:.0f}" if results[0]["steps"] else "0",
        f"{published:.1f}" if published else "–",
    ]
    return "| " + " | ".join(cells) + " |"


def recovered(results: list[dict]) -> float:
    """Percent of the gap between task arithmetic at 0.3 and the individual experts that is closed."""
    floor = load("task_arithmetic")[0]["average"]["adapted"]
    individual = results[0]["average"]["individual"]
    mean = statistics.mean(result["average"]["adapted"] for result in results)
    return 100 * (mean - floor) / (individual - floor)


def table() -> str:
    """The Markdown table of all finished runs."""
    some = load("task_arithmetic")[0]
    head = [
        "method",
        "mean accuracy, %",
        "gap closed",
        "worst task vs its merge",
        "seeds",
        "steps",
        "learned numbers",
        "seconds",
        "published, ViT-B/32",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        f"| {REFERENCES[name][0]} | {100 * some['average'][name]:.1f} | | | | | | | {REFERENCES[name][1]:.1f} |"
        for name in ("pretrained", "individual")
    ]
    lines += [line for method, published in PUBLISHED.items() if (line := row(method, published))]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    options = parser.parse_args()
    wanted = dict.fromkeys(["task_arithmetic", *options.methods])
    jobs = [
        (method, seed)
        for seed in options.seeds
        for method in wanted
        if method not in STATIC or seed == options.seeds[0]
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: run(*job), jobs))
    page = PAGE.read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}")
    print(table())


if __name__ == "__main__":
    main()
